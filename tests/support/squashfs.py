"""Squashfs images for tests, the kernel's view of them, and comparisons of two views."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from cowfs.layers.base import LowerLayer
from cowfs.layers.directory import DirectoryLayer
from cowfs.linux.loop_devices import attach_loop
from cowfs.linux.mounts import detached_mount
from tests.support.system import run

needs_mksquashfs = pytest.mark.skipif(
    not shutil.which("mksquashfs"), reason="needs mksquashfs (Debian: squashfs-tools)"
)
needs_tar2sqfs = pytest.mark.skipif(
    not shutil.which("tar2sqfs"), reason="needs tar2sqfs and gensquashfs (Debian: squashfs-tools-ng)"
)

BLOCK = 128 << 10


def noise(size: int, seed: int = 0) -> bytes:
    """Return bytes that do not compress, the same for the same *seed*."""
    return random.Random(seed).randbytes(size)


def text(size: int, seed: int = 0) -> bytes:
    """Return bytes that compress well, without two equal blocks."""
    lines = (b"line %d of %d\n" % (number, seed) for number in range(size))
    out = bytearray()
    while len(out) < size:
        out += next(lines)
    return bytes(out[:size])


def sample_tree(top: Path) -> Path:
    """Create a tree with every kind of file that needs no root, and with unusual sizes."""
    top.mkdir(parents=True)
    sizes = {"empty": 0, "one": 1, "small": 4095, "page": 4096, "tail": BLOCK + 17, "block": BLOCK}
    for seed, (name, size) in enumerate(sizes.items()):
        (top / name).write_bytes(text(size, seed))
    (top / "noise").write_bytes(noise(3 * BLOCK + 5))
    (top / "several").write_bytes(text(9 * BLOCK + 100, 7))
    (top / "zeros").write_bytes(bytes(2 * BLOCK))
    with (top / "sparse").open("wb") as file:
        file.write(text(10))
        file.seek(5 * BLOCK + 3)
        file.write(noise(BLOCK))
        file.truncate(11 * BLOCK + 9)
    directory = top / "dir"
    (directory / "deep" / "deeper" / "deepest").mkdir(parents=True)
    (directory / "deep" / "deeper" / "deepest" / "file").write_text("down here")
    (top / "empty dir").mkdir()
    many = top / "many"
    many.mkdir()
    for number in range(700):
        (many / f"name-{number:05}-{'x' * (number % 90)}").write_bytes(b"%d" % (number % 50))
    for odd in (b"\xff\xfe not utf-8", b"new\nline", "\u00fc \u4e2d".encode(), b"n" * 255):
        Path(os.fsdecode(os.fsencode(top) + b"/" + odd)).write_bytes(odd)
    os.link(top / "tail", top / "dir" / "tail-again")
    os.link(top / "tail", top / "dir" / "tail-third")
    (top / "copy of block").write_bytes((top / "block").read_bytes())
    (top / "link").symlink_to("dir/deep")
    (top / "dangling").symlink_to("/nowhere/" + "long/" * 300)
    os.mkfifo(top / "fifo", 0o640)
    _set_xattrs(top)
    for number, path in enumerate(sorted(top.rglob("*"))):
        if not path.is_symlink():
            path.chmod(0o400 | (0o1777 if path.is_dir() else (number * 37) & 0o7777))
        os.utime(path, (0, 1_000_000 + number * 12345), follow_symlinks=False)
    return top


def _set_xattrs(top: Path) -> None:
    with suppress(OSError):  # a filesystem without user xattrs
        os.setxattr(top / "small", "user.one", b"1")
        os.setxattr(top / "small", "user.empty", b"")
        os.setxattr(top / "dir", "user.on-a-directory", b"\0\1\2")
        for name in ("one", "page", "noise", "several"):  # the same long value: stored out of line
            os.setxattr(top / name, "user.shared", b"shared" * 100)
            os.setxattr(top / name, "user.own", name.encode() * 5)
    if os.geteuid() == 0:
        os.setxattr(top / "small", "trusted.secret", b"for root")
        os.setxattr(top / "small", "security.capability", bytes.fromhex("0100000200040000" + "00" * 12))
        os.setxattr(top / "link", "trusted.on-a-symlink", b"yes", follow_symlinks=False)
        os.setxattr(top / "fifo", "trusted.on-a-fifo", b"yes")
        os.chown(top / "page", 12345, 54321)
        os.chown(top / "link", 70000, 80000, follow_symlinks=False)


# mksquashfs creates these itself, which needs no privilege.
DEVICES = (
    "dev d 755 0 0",
    "dev/null c 666 0 0 1 3",
    "dev/disk b 660 0 6 8 17",
    "dev/large c 600 1000 1000 300 70000",
    "dev/socket i 600 5 6 s",
    "dev/pipe i 600 5 6 f",
    "huge f 644 0 0 true",
)


def mksquashfs(image: Path, *sources: Path | str, options: tuple[str, ...] = ()) -> Path:
    """Make an image with mksquashfs; return its path."""
    run(
        "mksquashfs", *sources, image, "-noappend", "-quiet", "-no-progress", "-processors", "2", *options,
        timeout=600,
    )  # fmt: skip
    return image


def devices() -> tuple[str, ...]:
    """Return options of mksquashfs that add a directory ``dev`` with special files."""
    return tuple(part for line in DEVICES for part in ("-p", line))


def tar2sqfs(image: Path, top: Path, *options: str) -> Path:
    """Make an image from a tar archive of *top* with tar2sqfs; return its path."""
    tar = ["tar", "-C", os.fspath(top), "--xattrs", "--sort=name", "-cf", "-", "."]
    with subprocess.Popen(tar, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as packing:
        subprocess.run(
            ["tar2sqfs", "-q", "-f", *options, os.fspath(image)],
            stdin=packing.stdout,
            check=True,
            capture_output=True,
            timeout=120,
        )
    return image


def small_images(directory: Path) -> list[Path]:
    """Make images of 16 to 52 KiB, to damage them: one for each compressor, and two uncompressed."""
    directory.mkdir(parents=True, exist_ok=True)
    top = directory / "tree"
    (top / "dir" / "deep").mkdir(parents=True)
    (top / "file").write_bytes(text(30_000))
    (top / "noise").write_bytes(noise(9_000))
    (top / "tiny").write_bytes(b"tiny")
    with (top / "sparse").open("wb") as file:
        file.seek(50_000)
        file.write(text(5_000))
        file.truncate(100_000)
    os.link(top / "file", top / "dir" / "hard")
    (top / "link").symlink_to("dir/deep")
    for number in range(60):
        (top / "dir" / f"name{number}").write_bytes(b"%d" % number)
    with suppress(OSError):
        for name in ("file", "noise", "dir"):
            os.setxattr(top / name, "user.shared", b"shared" * 30)
            os.setxattr(top / name, "user.own", name.encode())
    kinds: dict[str, tuple[str, ...]] = {
        name: ("-comp", name, "-b", "4K", "-tailends")
        for name in ("gzip", "lzma", "lzo", "lz4", "xz", "zstd")
    }
    kinds["uncompressed"] = ("-noI", "-noD", "-noF", "-noX", "-noId", "-b", "4K")
    kinds["no-fragments"] = ("-noI", "-noX", "-noId", "-b", "4K", "-comp", "zstd", "-no-fragments")
    images = [
        mksquashfs(directory / name, top, options=options + devices()) for name, options in kinds.items()
    ]
    shutil.rmtree(top)
    return images


@contextmanager
def kernel_view(image: Path) -> Iterator[DirectoryLayer]:
    """Open *image* as the kernel's squashfs shows it, as a layer; needs root."""
    with kernel_root(image) as root:
        layer = DirectoryLayer(os.dup(root), os.fspath(image))
        try:
            yield layer
        finally:
            layer.close()


@contextmanager
def kernel_root(image: Path) -> Iterator[int]:
    """Mount *image* with the kernel's squashfs in no namespace; yield a descriptor of its root.

    OSError if the kernel refuses the image.
    """
    padded = image.with_suffix(".padded")
    padded.write_bytes(image.read_bytes() + bytes(-image.stat().st_size % 4096))  # to whole sectors
    loop, device = attach_loop(os.fspath(padded), readonly=True)
    try:
        root = detached_mount("squashfs", device, {}, readonly=True)
    finally:
        os.close(loop)
        padded.unlink()
    try:
        yield root
    finally:
        os.close(root)


FIELDS = (
    "st_mode",
    "st_ino",
    "st_nlink",
    "st_uid",
    "st_gid",
    "st_rdev",
    "st_size",
    "st_atime_ns",
    "st_mtime_ns",
    "st_ctime_ns",
)


def view(layer: LowerLayer, *, content: bool = True) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each path in a layer with everything that the layer shows of it, in the order of the paths."""
    root = layer.stat(layer.root)
    pending = [(b"", layer.root, root)]
    while pending:
        path, key, attr = pending.pop()
        seen: dict[str, Any] = {field: getattr(attr, field) for field in FIELDS}
        form = stat.S_IFMT(attr.st_mode)
        seen["xattrs"] = xattrs(layer, key)
        handle = layer.handle(key)
        seen["handle"] = handle and handle._replace(place=b"")  # that is the layer's own
        if not seen["xattrs"]:  # the kernel counts their blocks too
            seen["st_blocks"] = attr.st_blocks
        if form == stat.S_IFLNK:
            seen["target"] = layer.readlink(key)
        elif form == stat.S_IFREG and content:
            seen["content"] = digest(layer, key, attr.st_size)
        elif form == stat.S_IFDIR:
            entries = sorted(layer.readdir(key))
            seen["names"] = [entry.name for entry in entries]
            for name, kind in reversed(entries):
                found = layer.lookup(key, name)
                assert found is not None, f"{name!r} in {path!r} is listed but not found"
                assert kind in {0, stat.S_IFMT(found[1].st_mode)}
                pending.append((path + b"/" + name, *found))
        yield path, seen
        if form != stat.S_IFDIR:
            layer.forget(key)


def digest(layer: LowerLayer, key: Any, size: int) -> str:
    """Return the SHA-256 of a file's content. Of huge files, read only the data segments."""
    file = layer.open(key, os.O_RDONLY)
    try:
        value = hashlib.sha256()
        offset = 0
        if size > 1 << 28:  # a huge sparse file: only what may not be zeros is read
            chunks: set[int] = set()
            for start, stop in file.segments(size):
                chunks.update(range(start >> 20, ((stop - 1) >> 20) + 1))
            for chunk in sorted(chunks):
                data = file.pread(1 << 20, chunk << 20)
                if data.strip(b"\0"):
                    value.update(b"%d" % chunk + data)
            return value.hexdigest()
        while data := file.pread(1 << 20, offset):
            value.update(data)
            offset += len(data)
        assert offset == size
        return value.hexdigest()
    finally:
        file.close()


def xattrs(layer: LowerLayer, key: Any) -> dict[bytes, bytes]:
    """Return all extended attributes; none if the layer does not support them."""
    try:
        return {name: layer.getxattr(key, name) for name in layer.listxattr(key)}
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return {}
        raise


def assert_equal(ours: LowerLayer, theirs: LowerLayer, *, content: bool = True) -> int:
    """Fail unless every field of every inode is the same in both; return the number of inodes."""
    count = 0
    handles = ours.handle(ours.root) is not None and theirs.handle(theirs.root) is not None
    for (path, mine), (other_path, other) in zip(
        view(ours, content=content), view(theirs, content=content), strict=True
    ):
        assert path == other_path
        if not handles:
            mine.pop("handle")
            other.pop("handle")
        differing = {name: (mine[name], other[name]) for name in mine if mine[name] != other[name]}
        assert not differing, f"{path!r} differs in {differing}"
        count += 1
    return count
