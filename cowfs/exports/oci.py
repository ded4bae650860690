"""Write an OCI image layout: a single layer, or one on a base image.

The formats are in the OCI image specification: image-layout.md, manifest.md, config.md, layer.md.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import re
import stat
import zlib
from contextlib import ExitStack
from typing import Any

from cowfs.errors import UsageError

NAME = re.compile(r"[A-Za-z0-9]+(?:(?:[-._:@+/]|--)[A-Za-z0-9]+)*")
"""The syntax of an image's name (annotations.md of the image specification)."""
_ANNOTATION = "org.opencontainers.image.ref.name"
_TYPE = "application/vnd.oci.image."
_MANIFEST, _CONFIG = _TYPE + "manifest.v1+json", _TYPE + "config.v1+json"
_LAYER = _TYPE + "layer.v1.tar+gzip"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LARGEST = 4 << 20
"""The limit of a manifest or a configuration in bytes."""
_PIECE = 1 << 20
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "i686": "386", "i386": "386", "armv7l": "arm"}
"""The machines for which Go, whose names an image uses, has another name than uname(2)."""
Json = dict[str, Any]


class Base:
    """The image of a layout to which the new layer is added."""

    def __init__(self, where: str, stack: ExitStack) -> None:
        """*where* is ``DIRECTORY[:TAG]``. TAG, the name of an image, is needed if there are several.

        UsageError.
        """
        self._where = where
        path, _, tag = where.rpartition(":") if not os.path.isdir(where) else (where, "", "")
        try:
            self._fd = os.open(path or where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(
                f"--base {where}: {error.strerror}", "give the directory of an OCI layout"
            ) from None
        stack.callback(os.close, self._fd)
        try:
            self._read(tag)
        except (KeyError, TypeError, AttributeError, ValueError):
            raise self._wrong("not a valid image") from None

    def _read(self, tag: str) -> None:
        found = [
            each
            for each in self._json("index.json")["manifests"]
            if not tag or (each.get("annotations") or {}).get(_ANNOTATION) == tag
        ]
        where = f"--base {self._where}"
        if len(found) != 1:
            raise UsageError(f"{where}: found {len(found)} images of that name", "give DIRECTORY:TAG of one")
        if found[0].get("mediaType") != _MANIFEST:
            raise UsageError(f"{where}: not one OCI image", "skopeo copy creates an OCI layout of one image")
        manifest = self._blob(found[0])
        self.annotations = dict(manifest.get("annotations") or {})
        self.config = self._blob(manifest["config"])
        self.layers = [dict(layer) for layer in manifest["layers"]]
        self.diff_ids = list(self.config["rootfs"]["diff_ids"])
        self.history = list(self.config.get("history") or [])
        if len(self.diff_ids) != len(self.layers):
            raise ValueError

    def copy_layers(self, layout: Layout) -> None:
        """Copy the layers; UsageError for one that is damaged. Blocks."""
        for layer in self.layers:
            digest = self._digest(layer)
            with layout.blob() as blob, os.fdopen(self._open(f"blobs/sha256/{digest}"), "rb") as file:
                while piece := file.read(_PIECE):
                    blob.write(piece)
                if blob.finish() != digest:
                    raise self._wrong(f"layer {digest[:12]}… is damaged")

    def _blob(self, descriptor: Json) -> Json:
        return self._json(f"blobs/sha256/{self._digest(descriptor)}")

    def _digest(self, descriptor: Json) -> str:
        digest = str(descriptor.get("digest"))
        if not _DIGEST.fullmatch(digest):
            raise self._wrong("not a sha256 digest")
        return digest.partition(":")[2]

    def _open(self, name: str) -> int:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._fd)
        except OSError as error:
            raise self._wrong(f"{name}: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise self._wrong(f"{name}: not a file")
        return fd

    def _json(self, name: str) -> Json:
        with os.fdopen(self._open(name), "rb") as file:
            text = file.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise self._wrong(f"{name}: too large")
        try:
            found: Json = json.loads(text)
        except (ValueError, RecursionError):
            raise self._wrong(f"{name}: not JSON") from None
        return found

    def _wrong(self, why: str) -> UsageError:
        return UsageError(f"--base {self._where}: {why}", "give the directory of an OCI layout")


class Layout:
    """A new layout in an empty directory."""

    def __init__(self, root: int) -> None:
        self._root = root
        os.makedirs(f"/proc/self/fd/{root}/blobs/sha256")
        self._blobs = os.open("blobs/sha256", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)

    def close(self) -> None:
        """Close the directory."""
        os.close(self._blobs)

    def blob(self) -> _Blob:
        """Return a new blob, for writing."""
        return _Blob(self._blobs)

    def finish(self, layer: tuple[str, int, str], base: Base | None, created: int, tag: str) -> None:
        """Write the manifest and configuration of an image with *layer*: digest, bytes, archive's digest."""
        when = datetime.datetime.fromtimestamp(created, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        machine = _MACHINES.get(platform.machine(), platform.machine())
        config: Json = {"architecture": machine, "os": "linux", "config": {}}
        layers: list[Json] = []
        diff_ids: list[str] = []
        history: list[Json] = []
        annotations: Json = {}
        if base is not None:
            config, layers, annotations = dict(base.config), base.layers, base.annotations
            diff_ids, history = base.diff_ids, base.history
        config["created"] = when
        config["rootfs"] = {"type": "layers", "diff_ids": [*diff_ids, f"sha256:{layer[2]}"]}
        config["history"] = [*history, {"created": when, "created_by": "cowfs export"}]
        manifest: Json = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": self._put(_CONFIG, config),
            "layers": [*layers, {"mediaType": _LAYER, "digest": f"sha256:{layer[0]}", "size": layer[1]}],
        }
        if annotations:
            manifest["annotations"] = annotations
        descriptor = self._put(_MANIFEST, manifest)
        descriptor["annotations"] = {_ANNOTATION: tag}
        self._write("index.json", {"schemaVersion": 2, "manifests": [descriptor]})
        self._write("oci-layout", {"imageLayoutVersion": "1.0.0"})

    def _put(self, kind: str, value: Json) -> Json:
        text = _text(value)
        with self.blob() as blob:
            blob.write(text)
            digest = blob.finish()
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(text)}

    def _write(self, name: str, value: Json) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with os.fdopen(os.open(name, flags, 0o644, dir_fd=self._root), "wb") as file:
            file.write(_text(value))


class _Blob:
    """A blob that is being written. When finished, it gets its digest as its name."""

    def __init__(self, directory: int) -> None:
        self._directory = directory
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._file = os.fdopen(os.open("new", flags, 0o644, dir_fd=directory), "wb", buffering=_PIECE)
        self._digest = hashlib.sha256()
        self.size = 0

    def __enter__(self) -> _Blob:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    def finish(self) -> str:
        """Name the blob by its digest; return that."""
        self._file.close()
        digest = self._digest.hexdigest()
        os.rename("new", digest, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        return digest


class Gzip:
    """Compresses an archive into a blob. The same archive always gives the same bytes."""

    def __init__(self, blob: _Blob) -> None:
        self._blob = blob
        self._digest = hashlib.sha256()
        self._deflate = zlib.compressobj(6, zlib.DEFLATED, 16 + zlib.MAX_WBITS)

    def write(self, data: bytes) -> None:
        self._digest.update(data)
        self._blob.write(self._deflate.compress(data))

    def finish(self) -> tuple[str, int, str]:
        """Finish the blob; return its digest, its size in bytes, and the digest of the archive."""
        self._blob.write(self._deflate.flush())
        size = self._blob.size
        return self._blob.finish(), size, self._digest.hexdigest()


def _text(value: Json) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
