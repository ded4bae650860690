"""Garbage in an attribute, a header or a link harms the inode that has it, and nothing else."""

from __future__ import annotations

import errno
import os
import stat
import struct
from pathlib import Path

import pytest

from cowfs.layers.owner_notes import OWNER_XATTR, USER_XATTR, Note, parse, to_bytes
from tests.ext3 import images
from tests.support.mounts import mounted
from tests.support.system import as_nobody_prefix, needs_fuse, needs_root, run

pytestmark = pytest.mark.timeout(60)

NOTES = [
    b"",
    b"\0",
    b":",
    b"0",
    b"0:",
    b"-1:0",
    b"0:-1",
    b"+1:0",
    b" 1:0",
    b"1_0:0",
    b"\xd9\xa1:0",  # a digit to Python
    b"1099511627776:0",
    b"0:1099511627776",
    b"4294967295:0",
    b"0:4294967295",
    b"9" * 500 + b":0",
    b"0:0:",
    b"0:0:-1",
    b"0:0:0x1ff",
    b"0:0:8",
    b"0:0:7777777777777",
    b"0:0:0",
    b"0:0:755",  # of no type
    b"0:0:170000",
    b"0:0:30644",
    b"0:0:40755",  # a directory that is a file
    b"0:0:20644:1",
    b"0:0:20644:-1:3",
    b"0:0:20644:1:-3",
    b"0:0:20644:99999999999999999999:3",
    b"0:0:20644:1:99999999999999999999",
    b"0:0:20644:4096:3",
    b"0:0:20644:1:1048576",
    b"0:0:20644:1:3:4",
    b"0:0:20644:0:0",  # a whiteout
    b"0:0:20644",
    b"0:0:100644:1:3",
    b"0:0:100644\0",
    b"0:0:100644\n",
    b"\xff" * 100,
]


@pytest.mark.parametrize("value", NOTES)
def test_garbage_is_no_note(value: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse(value, stat.S_IFREG | 0o644)


@pytest.mark.parametrize(
    ("real", "note"),
    [
        (stat.S_IFREG | 0o644, Note(0, 0)),
        (stat.S_IFREG | 0o644, Note(4294967294, 4294967294, stat.S_IFREG | 0o7777)),
        (stat.S_IFREG | 0o644, Note(1, 2, stat.S_IFLNK | 0o777)),
        (stat.S_IFREG | 0o644, Note(1, 2, stat.S_IFBLK | 0o600, os.makedev(4095, 1048575))),
        (stat.S_IFREG | 0o644, Note(1, 2, stat.S_IFSOCK | 0o600)),
        (stat.S_IFDIR | 0o755, Note(1, 2, stat.S_IFDIR | 0o1777)),
    ],
)
def test_a_note_is_read_as_it_was_written(real: int, note: Note) -> None:
    assert parse(to_bytes(note), real) == note


@pytest.mark.parametrize("mode", [stat.S_IFREG, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_a_directory_is_nothing_else(mode: int) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse(to_bytes(Note(0, 0, mode | 0o644)), stat.S_IFDIR | 0o755)


@needs_root
@needs_fuse
def test_notes_that_are_garbage_are_not_seen(nobody_path: Path) -> None:
    """By a mount of the user whose store it is: what has such a note shows its own attributes."""
    lower, store = nobody_path / "lower", nobody_path / "store"
    lower.mkdir()
    (store / "upper").mkdir(parents=True)
    (store / "work").mkdir()
    for number, value in enumerate(NOTES):
        for path in (store / f"upper/file{number}", store / f"upper/dir{number}"):
            path.write_text("text") if "file" in path.name else path.mkdir()
            os.setxattr(path, OWNER_XATTR, value)
    os.setxattr(store / "upper", USER_XATTR, b"1099511627776:5")
    run("chown", "-R", "65534:65534", store)
    with mounted(lower, nobody_path / "at", store, nobody=True, quiet=False) as here:
        names = run(*as_nobody_prefix(), "find", here.path, "-printf", r"%P %U %y\n").stdout.splitlines()
        assert sorted(name for name in names if not name.startswith(" ")) == sorted(
            f"{kind}{number} {0 if note == b'0:0:40755' and kind == 'dir' else 65534} {kind[0]}"
            for kind in ("file", "dir")
            for number, note in enumerate(NOTES)
        )
        assert "Traceback" not in here.log.read_text()


GARBAGE = [
    b"",
    b"\0",
    b"y\0",
    b"U",
    b"U+",
    b"U-99999999999999999999",
    b"U+99999999999999999999",
    b"L+4294967296",
    b"U+ 1_0",
    b"L+" + b"9" * 150,
    b"9" * 150,
    b"-1",
    b"18446744073709551616",
    b"/",
    b"//",
    b"a\0b",
    b"/ok\0/b",
    b"\xff\xfe" * 20,
    b"\x00\xfb\x1d\x00\x01" + bytes(16) + b"\xff" * 8,
    b"\x00\xfb\x15\x00\x01" + bytes(16),
    b"\x00\xfb\x05\x00\x01",
]
OURS = [
    "opaque",
    "redirect",
    "metacopy",
    "origin",
    "nlink",
    "impure",
    "cowfs.links",
    "cowfs.layer",
    "overlay.x",
]


def garbage(top: Path) -> int:
    """Inodes with each garbage in each of the overlay's attributes, and sound ones beside them."""
    count = 0
    for note in OURS:
        for number, value in enumerate(GARBAGE):
            for kind in ("file", "dir"):
                path = top / f"{note}.{number}.{kind}"
                path.mkdir() if kind == "dir" else path.write_text("text")
                os.setxattr(path, f"trusted.overlay.{note}", value)
                if kind == "file" and note in {"nlink", "cowfs.links", "cowfs.layer"}:
                    os.setxattr(path, "trusted.overlay.origin", origin(number))
                    os.setxattr(path, "trusted.overlay.cowfs.layer", value)
                count += 1
    (top / "sound").write_text("sound")
    return count


def origin(number: int) -> bytes:
    handle = struct.pack("<II", 2 + number, 0)
    return struct.pack("<BBBBB16s", 0, 0xFB, 21 + len(handle), 0, 1, bytes(16)) + handle


@needs_root
@needs_fuse
@pytest.mark.parametrize("where", ["upper", "lower", "image"])
def test_garbage_harms_the_inode_that_has_it(tmp_path: Path, where: str) -> None:
    tops = tmp_path / "top", tmp_path / "bottom"
    for top in tops:
        top.mkdir()
        (top / "other").write_text("other")
    store = tmp_path / "store"
    for name in ("upper", "work/index"):
        (store / name).mkdir(parents=True)
    names = garbage(tops[0] if where == "lower" else store / "upper")
    for number, value in enumerate(GARBAGE):  # and an index, some of it garbage
        name = value.hex()
        if 0 < len(name) < 256:
            (store / "work/index" / name).touch()
        if where != "lower":
            os.link(store / f"upper/nlink.{number}.file", store / "work/index" / origin(number).hex())
    if where == "image":
        store = images.make(tmp_path / "image", images.Shape(1024, mib=20, journal=4), store)
    with mounted(tops, tmp_path / "at", store, quiet=False) as here:
        assert (here.path / "sound").read_text() == "sound"
        assert (here.path / "other").read_text() == "other"
        seen = list(os.scandir(here.path))
        assert len(seen) > names // 2
        for entry in seen:
            for call in (os.lstat, os.listxattr, touch, lambda path: os.rename(path, f"{path}.new")):
                try:
                    call(entry.path)
                except OSError as error:
                    assert error.errno in TOLD, (entry.name, error)
        log = here.log.read_text()
        assert "Traceback" not in log
        assert log.count("\n") < 250


TOLD = {errno.EIO, errno.EUCLEAN, errno.EINVAL, errno.EACCES, errno.ENOENT, errno.ENAMETOOLONG}


def touch(path: str) -> None:
    if os.path.isdir(path):
        os.listdir(path)
    with open(os.path.join(path, "new") if os.path.isdir(path) else path, "a") as out:
        out.write("more")
