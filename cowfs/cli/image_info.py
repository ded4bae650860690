"""Describe an image or archive that can be a lower, for ``cowfs info``."""

from __future__ import annotations

import os
import re
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

from cowfs.errors import LayerError
from cowfs.types import Identity


def is_image(path: str) -> bool:
    """Whether a file is a squashfs image of any version, a program with one appended, EROFS or an archive.

    LayerError if it cannot be read.
    """
    from cowfs.formats import archives, erofs
    from cowfs.formats.squashfs.recognise import MAGICS, appended_at

    try:
        with open(path, "rb", buffering=0, opener=_without_waiting) as file:
            head = file.read(archives.SAMPLE)
    except PermissionError as error:
        raise LayerError(
            f"{path}: cannot be read: {error.strerror}", "run this as its owner, or as root"
        ) from None
    except OSError:
        return False  # a directory, or a store
    size = os.path.getsize(path)
    end = appended_at(head, size)
    if head[:4] in MAGICS or (end is not None and end < size):
        return True
    return erofs.is_erofs(head) or bool(archives.kind_of(head))


def _without_waiting(path: str, flags: int) -> int:
    from cowfs.linux.files import open_ordinary

    return open_ordinary(path, flags)


def describe(path: str, offset: int = 0) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the facts about an image or archive: for JSON, and as lines to print. Blocks; LayerError."""
    from cowfs.store.format.identity import identify_lower
    from cowfs.store.format.sizes import format_size

    identity = identify_lower(path, offset)
    summary = _squashfs(identity) if identity.kind == "squashfs" else _other(identity)
    facts: dict[str, Any] = {"path": identity.path, "kind": identity.kind, "offset": offset}
    facts |= {what.replace(" ", "_"): _value(what, said) for what, said in summary}
    facts["fingerprint"] = identity.fingerprint
    lines = [("path", identity.path), *([("offset", f"{offset} bytes")] if offset else [])]
    for what, said in summary:
        lines.append((what, f"{format_size(facts['size'])} ({said})" if what == "size" else said))
    return facts, [*lines, ("fingerprint", identity.fingerprint)]


def _squashfs(identity: Identity) -> list[tuple[str, str]]:
    from cowfs.layers.squashfs import SquashfsLayer

    with closing(SquashfsLayer(identity.path, offset=identity.offset)) as layer:
        return layer.summary()


def _other(identity: Identity) -> list[tuple[str, str]]:
    """Return the facts about an EROFS image or an archive, from its identity."""
    from cowfs.formats import archives, erofs
    from cowfs.formats.squashfs.source import open_bytes

    with closing(open_bytes(identity.path)) as data:
        if identity.kind != "erofs":
            found = archives.INDEXES[identity.kind](data, identity.path)
            name, size, inodes, made = archives.NAMES[identity.kind], data.size, found.inodes, []
        else:
            head = data.pread(erofs.OFFSET + erofs.SIZE, identity.offset)
            superblock = erofs.parse(head, identity.path, data.size - identity.offset)
            name, size, inodes = "EROFS", superblock.size, superblock.inodes
            made = [("made", f"{datetime.fromtimestamp(superblock.made, UTC):%Y-%m-%d %H:%M:%S} UTC")]
    return [("format", name), *made, ("size", f"{size} bytes"), ("inodes", str(inodes))]


_LISTS = {"uncompressed", "strategies", "filters"}
_NUMBER = re.compile(r"(\d+)(?: bytes)?")


def _value(what: str, said: str) -> int | bool | str | list[str]:
    """Return the value of a summary line in the type that a program expects."""
    if what in _LISTS:
        return [] if said == "nothing" else said.split(", ")
    if said in {"yes", "no"}:
        return said == "yes"
    if what == "attribute sets" and said == "none":
        return 0
    number = _NUMBER.fullmatch(said)
    return int(number[1]) if number else said
