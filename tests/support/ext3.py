"""Ext3 images for tests: create them, open them in-process, mount them with the kernel, compare them."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cowfs.formats.ext3.image import Image
from cowfs.layers.base import Key, LowerLayer
from cowfs.layers.beneath import open_given
from cowfs.layers.directory import DirectoryLayer, open_directory
from cowfs.layers.ext3 import Ext3Layer
from tests.support.system import run

FEATURES = "has_journal,ext_attr,resize_inode,dir_index,filetype,sparse_super,large_file"
GEOMETRIES = [(block_size, inode_size) for block_size in (1024, 4096) for inode_size in (128, 256)]
"""Sizes of blocks and inodes in bytes."""

FIELDS = (
    *("st_mode", "st_ino", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size", "st_blocks", "st_blksize"),
    *("st_atime_ns", "st_mtime_ns", "st_ctime_ns"),
)


def open_ext3(path: str, **how: Any) -> Ext3Layer:
    """Open an image as a layer; *how* are arguments of Image. Raises the errors of open(2) and Image."""
    fd = open_given(path, os.O_RDONLY if how.get("read_only") else os.O_RDWR)
    try:
        return Ext3Layer(Image(fd, os.path.abspath(path), **how))
    finally:
        os.close(fd)


def make(
    image: Path,
    block_size: int = 4096,
    inode_size: int = 256,
    size: int = 64 << 20,
    more: tuple[str, ...] = (),
    features: str = FEATURES,
) -> Path:
    """Create an empty ext3 in a sparse file, and return its path."""
    with image.open("wb") as out:
        out.truncate(size)
    options = ["-b", str(block_size), "-I", str(inode_size), "-m", "0", "-E", "root_owner=0:0", *more]
    run("mke2fs", "-q", "-F", "-t", "ext3", "-O", f"none,{features}", *options, image)
    return image


@contextmanager
def opened(image: Path, **options: Any) -> Iterator[Ext3Layer]:
    """Open the image as a layer; check it with e2fsck after it is closed."""
    layer = open_ext3(str(image), **options)
    try:
        yield layer
    finally:
        layer.close()
        sound(image)


@contextmanager
def mounted(image: Path, *options: str) -> Iterator[DirectoryLayer]:
    """Mount the image with the kernel's ext3, and open the mount as a layer."""
    at = image.with_name(f"{image.name}.at")
    at.mkdir(exist_ok=True)
    run("mount", "-t", "ext3", "-o", ",".join(("loop", "noatime", *options)), image, at)
    try:
        layer = open_directory(str(at))
        try:
            yield layer
        finally:
            layer.close()
    finally:
        run("umount", at)


def sound(image: Path) -> None:
    """Fail unless e2fsck finds no error."""
    run("e2fsck", "-fn", image)


def describe(layer: LowerLayer, key: Key = None, path: str = ".") -> dict[str, dict[str, Any]]:
    """Return everything that a layer shows of the tree below *key*, as ``{path: facts}``."""
    key = layer.root if key is None else key
    attr = layer.stat(key)
    facts: dict[str, Any] = {name: getattr(attr, name) for name in FIELDS}
    facts["handle"] = layer.handle(key)
    facts["xattrs"] = {name: layer.getxattr(key, name) for name in sorted(layer.listxattr(key))}
    result = {path: facts}
    if stat.S_ISLNK(attr.st_mode):
        facts["target"] = layer.readlink(key)
    elif stat.S_ISREG(attr.st_mode):
        facts |= _content(layer, key, attr.st_size)
    elif stat.S_ISDIR(attr.st_mode):
        entries = sorted(layer.readdir(key))
        facts["names"] = [entry.name for entry in entries]
        for entry in entries:
            found = layer.lookup(key, entry.name)
            assert found is not None, entry
            assert entry.type in {0, stat.S_IFMT(found[1].st_mode)}, entry
            result |= describe(layer, found[0], f"{path}/{os.fsdecode(entry.name)}")
            layer.forget(found[0])
    return result


def _content(layer: LowerLayer, key: Key, size: int) -> dict[str, Any]:
    file = layer.open(key, os.O_RDONLY)
    try:
        segments = list(file.segments(size))
        digest = hashlib.blake2b(digest_size=8)
        for start, stop in segments:
            for at in range(start, stop, 1 << 20):
                data = file.pread(min(1 << 20, stop - at), at)
                assert len(data) == min(1 << 20, stop - at)
                digest.update(data)
        return {"segments": segments, "content": digest.hexdigest()}
    finally:
        file.close()


def differences(
    one: dict[str, dict[str, Any]], two: dict[str, dict[str, Any]], *, ignore: tuple[str, ...] = ()
) -> list[str]:
    """Return a line for each difference between two descriptions."""
    lines = [f"{path}: only in one" for path in sorted(one.keys() ^ two.keys())]
    for path in sorted(one.keys() & two.keys()):
        for name in one[path].keys() | two[path].keys():
            left, right = one[path].get(name), two[path].get(name)
            if name not in ignore and left != right:
                lines.append(f"{path}: {name}: {left!r}, {right!r}")
    return lines
