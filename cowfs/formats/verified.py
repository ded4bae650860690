"""Verify images against hash trees as they are read, each by its root hash."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from urllib.parse import urlsplit, urlunsplit

from cowfs.errors import LayerError, SystemFailure, UsageError
from cowfs.formats.verity import Readable, VerifiedBytes
from cowfs.linux.programs import environment, find
from cowfs.url.names import is_url

Open = Callable[[str], Readable]

_HASH = re.compile(rb"([0-9a-fA-F]{64})\s*")
_CERTIFICATE = b"-----BEGIN CERTIFICATE-----"
_MOST = 64 << 10
"""The limit of a root hash file or a signature in bytes."""

_required: dict[str, bytes] = {}


def require(hashes: Mapping[str, bytes]) -> None:
    """From now on, verify these images (paths or URLs) by their root hashes when they are opened."""
    _required.update(hashes)


def checked(data: Readable, path: str, open_: Open) -> Readable:
    """Return *data* of an image, as :class:`VerifiedBytes` if it must be verified.

    Blocks. LayerError, OSError; *data* is closed then.
    """
    root_hash = _required.get(path)
    if root_hash is None:
        return data
    try:
        tree = open_(beside(path, ".verity"))
    except OSError as error:
        data.close()
        raise LayerError(
            f"{beside(path, '.verity')}: {error.strerror}", "veritysetup format creates it"
        ) from None
    except BaseException:
        data.close()
        raise
    try:
        return VerifiedBytes(data, tree, root_hash, path)
    except BaseException:
        data.close()
        tree.close()
        raise


def beside(path: str, end: str) -> str:
    """Return the path or URL of an image with another file name extension, *end*."""
    if is_url(path):
        parts = urlsplit(path)
        return urlunsplit(parts._replace(path=os.path.splitext(parts.path)[0] + end))
    return os.path.splitext(path)[0] + end


def belonging(path: str, given: str) -> list[str]:
    """Return the files that are needed to verify an image by *given* (see :func:`root_hash_of`)."""
    ends = [".verity", *((".roothash", ".roothash.p7s") if _is_certificate(given) else ())]
    return [beside(path, end) for end in ends]


def root_hash_of(path: str, given: str, open_: Open) -> bytes:
    """Return the root hash of an image: *given* itself, or that in the file *given*.

    If the file contains a certificate, it is the hash in the ``.roothash`` file beside the image, whose
    signature is checked. Blocks; UsageError, LayerError.
    """
    if is_root_hash(given):
        return bytes.fromhex(given)
    match = _HASH.fullmatch(_signed(path, given, open_) if _is_certificate(given) else _file(given))
    if match is None:
        raise UsageError(
            f"verify={given}: neither a root hash of 64 digits, nor a file with one, nor a certificate",
            "veritysetup format prints the root hash",
        )
    return bytes.fromhex(match[1].decode())


def is_root_hash(given: str) -> bool:
    """Whether *given* is a root hash rather than the name of a file."""
    return _HASH.fullmatch(given.encode(errors="surrogateescape")) is not None


def _is_certificate(given: str) -> bool:
    return not is_root_hash(given) and _CERTIFICATE in _file(given)


def _file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_MOST)
    except OSError as error:
        raise UsageError(
            f"verify={path}: neither a root hash nor a file: {error.strerror}",
            "veritysetup format prints the root hash",
        ) from None


def _signed(path: str, certificate: str, open_: Open) -> bytes:
    """Return the content of the root hash file. LayerError unless it is signed with the certificate."""
    openssl = find("openssl")
    if openssl is None:
        raise SystemFailure("openssl: not found; it checks the signature", "apt install openssl")
    with tempfile.TemporaryDirectory(prefix="cowfs-") as place:
        for end in (".roothash", ".roothash.p7s"):
            try:
                with closing(open_(beside(path, end))) as data, open(f"{place}/x{end}", "wb") as file:
                    file.write(data.pread(_MOST, 0))
            except OSError as error:
                raise LayerError(f"{beside(path, end)}: {error.strerror}") from None
        done = subprocess.run(
            [
                *(openssl, "smime", "-verify", "-binary", "-inform", "der", "-in", f"{place}/x.roothash.p7s"),
                *("-content", f"{place}/x.roothash", "-certfile", certificate, "-nointern", "-noverify"),
                *("-out", f"{place}/said"),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environment(),
        )
        if done.returncode:
            raise LayerError(
                f"{beside(path, '.roothash')}: is not signed with {certificate}",
                "do not use the image, or give the certificate of its signer",
            )
        with open(f"{place}/said", "rb") as file:
            return file.read(_MOST)
