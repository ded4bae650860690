"""Let the engine recover an image, and first show what it will recover."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from cowfs.layers.base import UpperLayer
from tests.ext3 import engine, images

OTHER_BOOT = 16
"""X3_OTHER_BOOT of engine.h: the machine was restarted, so no page cache has survived."""

MUCH = 256 << 20


def shown(layer: UpperLayer) -> dict[bytes, Any]:
    """Return the whole tree of a layer, by path. AssertionError if it is invalid or endless."""
    found: dict[bytes, Any] = {}
    directories: set[int] = set()
    waiting = [(layer.root, b"")]
    while waiting:
        key, path = waiting.pop()
        attr = layer.stat(key)
        assert not (stat.S_ISDIR(attr.st_mode) and attr.st_ino in directories), f"{path!r} is seen twice"
        directories.add(attr.st_ino)
        xattrs = {name: layer.getxattr(key, name) for name in layer.listxattr(key)}
        times = (attr.st_mtime_ns, attr.st_ctime_ns)
        facts = (attr.st_ino, attr.st_mode, attr.st_nlink, attr.st_uid, attr.st_gid, attr.st_size, *times)
        found[path] = (facts, xattrs, _content(layer, key, attr.st_mode, attr.st_size))
        if stat.S_ISDIR(attr.st_mode):
            for name, _ in layer.readdir(key):
                child = layer.lookup(key, name)
                assert child is not None, name
                waiting.append((child[0], path + b"/" + name))
    return found


def _content(layer: UpperLayer, key: Any, mode: int, size: int) -> bytes:
    if stat.S_ISLNK(mode):
        return layer.readlink(key)
    if not stat.S_ISREG(mode):
        return b""
    file = layer.open(key, os.O_RDONLY)
    try:
        segments = list(file.segments(size))
        assert sum(stop - start for start, stop in segments) < MUCH, "more data than there is room"
        return b"".join(file.pread(stop - start, start) for start, stop in segments) + b"%d" % size
    finally:
        file.close()


def by_engine(path: Path, debug: int = 0, *, trace_fd: int = -1) -> str | None:
    """Open the image read-only, then for writing; return the errors."""
    before = path.read_bytes()
    with engine.opened(path, read_only=True, debug=debug) as opened:
        promised = shown(opened.layer)
    if path.read_bytes() != before:
        return "reading has written"
    with engine.opened(path, debug=debug, trace_fd=trace_fd):
        pass
    with engine.opened(path, read_only=True) as opened:
        if shown(opened.layer) != promised:
            return "recovered it is not what was shown before"
    return images.unclean(path)
