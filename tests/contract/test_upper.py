"""UpperLayer: each change has the effect of the system call with its name, and keys follow inodes."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from cowfs.layers.base import Key, UpperLayer
from tests.contract.factories import Kind

NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
T0 = 1_000_000_000_123_456_789


@contextmanager
def fails(*codes: int) -> Iterator[None]:
    """Fail unless the block raises an OSError with one of these errnos."""
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno in codes, caught.value


def me() -> tuple[int, int]:
    """Return an owner that even an unprivileged layer can set."""
    return os.geteuid(), os.getegid()


def make(upper: UpperLayer, name: bytes, data: bytes = b"", directory: Key = None) -> Key:
    """Create a file with *data*; return its key."""
    key = create(upper, name, directory=directory)
    if data:
        write(upper, key, data)
    return key


def create(
    upper: UpperLayer, name: bytes, mode: int = 0o644, owner: Any = None, directory: Key = None
) -> Key:
    """Create an empty file, and close it; return its key."""
    where = upper.root if directory is None else directory
    key, file = upper.create(where, name, mode, *(owner or me()))
    file.close()
    return key


def write(upper: UpperLayer, key: Key, data: bytes, offset: int = 0) -> None:
    """Open the file, write, and close it."""
    file = upper.open(key, os.O_RDWR)
    try:
        assert file.pwrite(data, offset) == len(data)
    finally:
        file.close()


def read(upper: UpperLayer, key: Key) -> bytes:
    """Return the whole content."""
    file = upper.open(key, os.O_RDONLY)
    try:
        return file.pread(1 << 20, 0)
    finally:
        file.close()


def names(upper: UpperLayer, directory: Key = None) -> list[bytes]:
    """Return the names in a directory."""
    return sorted(entry.name for entry in upper.readdir(upper.root if directory is None else directory))


def find(upper: UpperLayer, name: bytes, directory: Key = None) -> Key:
    """Look up a name; return a new key."""
    found = upper.lookup(upper.root if directory is None else directory, name)
    assert found is not None
    return found[0]


def ino(upper: UpperLayer, key: Key) -> int:
    """Return the inode number."""
    return upper.stat(key).st_ino


# -- creations ---------------------------------------------------------------------------------

MAKERS: list[tuple[str, Callable[[UpperLayer, bytes], Key], int]] = [
    ("create", lambda u, n: create(u, n, 0o640), stat.S_IFREG | 0o640),
    ("mkdir", lambda u, n: u.mkdir(u.root, n, 0o710, *me()), stat.S_IFDIR | 0o710),
    ("symlink", lambda u, n: u.symlink(u.root, n, b"a/target", *me()), stat.S_IFLNK | 0o777),
    ("fifo", lambda u, n: u.mknod(u.root, n, stat.S_IFIFO | 0o604, 0, *me()), stat.S_IFIFO | 0o604),
    ("socket", lambda u, n: u.mknod(u.root, n, stat.S_IFSOCK | 0o600, 0, *me()), stat.S_IFSOCK | 0o600),
]


@pytest.mark.parametrize(("what", "maker", "mode"), MAKERS, ids=[m[0] for m in MAKERS])
@pytest.mark.parametrize("name", [b"plain", b"n" * 255, b"\xff\n\x01"], ids=["plain", "long", "odd"])
def test_make(
    upper: UpperLayer, upper_kind: Kind, what: str, maker: Callable[..., Key], mode: int, name: bytes
) -> None:
    name = name[: upper_kind.longest_name]
    old = os.umask(0)
    try:
        key = maker(upper, name)
    finally:
        os.umask(old)
    attr = upper.stat(key)
    assert attr.st_mode == mode
    assert (attr.st_uid, attr.st_gid) == me()
    assert attr.st_nlink == (2 if what == "mkdir" else 1)
    assert names(upper) == [name]
    assert ino(upper, find(upper, name)) == attr.st_ino
    if what == "symlink":
        assert upper.readlink(key) == b"a/target"
    with fails(errno.EEXIST):
        maker(upper, name)


@pytest.mark.parametrize(("what", "maker", "mode"), MAKERS, ids=[m[0] for m in MAKERS])
def test_make_wrong(upper: UpperLayer, what: str, maker: Callable[..., Key], mode: int) -> None:
    with fails(errno.ENAMETOOLONG):
        maker(upper, b"n" * 256)
    assert names(upper) == []


def test_devices(upper: UpperLayer, upper_kind: Kind) -> None:
    if not upper_kind.privileged:
        key = upper.mknod(upper.root, b"whiteout", stat.S_IFCHR, 0, *me())
        assert upper.stat(key).st_rdev == 0
        return
    for name, kind, rdev in (
        (b"null", stat.S_IFCHR, os.makedev(1, 3)),
        *([] if upper_kind.is_aufs else [(b"whiteout", stat.S_IFCHR, 0)]),  # aufs has none
        (b"disk", stat.S_IFBLK, os.makedev(259, 70000)),
    ):
        attr = upper.stat(upper.mknod(upper.root, name, kind | 0o600, rdev, 5, 6))
        assert (stat.S_IFMT(attr.st_mode), attr.st_rdev, attr.st_uid, attr.st_gid) == (kind, rdev, 5, 6)


@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o1777, 0, 0o7777], ids=oct)
def test_mode_is_taken_as_it_is(upper: UpperLayer, upper_kind: Kind, mode: int) -> None:
    uid, gid = (1000, 1000) if upper_kind.privileged else me()
    old = os.umask(0)
    try:
        file = create(upper, b"f", mode, (uid, gid))
        folder = upper.mkdir(upper.root, b"d", mode & 0o1777, uid, gid)
    finally:
        os.umask(old)
    for key, wanted in ((file, mode), (folder, mode & 0o1777)):  # mkdir(2) ignores set-ID bits
        attr = upper.stat(key)
        assert oct(stat.S_IMODE(attr.st_mode)) == oct(wanted)
        assert (attr.st_uid, attr.st_gid) == (uid, gid)


def test_in_a_directory_that_is_none(upper: UpperLayer) -> None:
    file = make(upper, b"file")
    with fails(errno.ENOTDIR):
        create(upper, b"x", directory=file)
    with fails(errno.ENOTDIR):
        upper.mkdir(file, b"x", 0o700, *me())


# -- links, removal ----------------------------------------------------------------------------


def test_link(upper: UpperLayer) -> None:
    key = make(upper, b"a", b"data")
    folder = upper.mkdir(upper.root, b"d", 0o755, *me())
    upper.link(key, folder, b"b")
    assert upper.stat(key).st_nlink == 2
    other = find(upper, b"b", folder)
    assert ino(upper, other) == ino(upper, key)
    write(upper, other, b"DA")
    assert read(upper, key) == b"DAta"
    with fails(errno.EEXIST):
        upper.link(key, folder, b"b")
    with fails(errno.EPERM):
        upper.link(folder, upper.root, b"x")
    symlink = upper.symlink(upper.root, b"s", b"nowhere", *me())
    upper.link(symlink, upper.root, b"s2")
    assert upper.readlink(find(upper, b"s2")) == b"nowhere"
    with fails(errno.EINVAL):
        upper.symlink(upper.root, b"s3", b"no\0where", *me())


def test_unlink(upper: UpperLayer) -> None:
    key = make(upper, b"a")
    upper.unlink(upper.root, b"a", None)
    assert names(upper) == []
    upper.forget(key)
    with fails(errno.ENOENT):
        upper.unlink(upper.root, b"a", None)
    upper.mkdir(upper.root, b"d", 0o755, *me())
    with fails(errno.EISDIR, errno.EPERM):
        upper.unlink(upper.root, b"d", None)


def test_rmdir(upper: UpperLayer) -> None:
    folder = upper.mkdir(upper.root, b"d", 0o755, *me())
    make(upper, b"x", directory=folder)
    with fails(errno.ENOTEMPTY):
        upper.rmdir(upper.root, b"d", folder)
    assert names(upper, folder) == [b"x"], "a failed rmdir leaves the key as it was"
    upper.unlink(folder, b"x", None)
    upper.rmdir(upper.root, b"d", None)
    with fails(errno.ENOENT):
        upper.rmdir(upper.root, b"d", None)
    make(upper, b"f")
    with fails(errno.ENOTDIR):
        upper.rmdir(upper.root, b"f", None)


def test_an_unlinked_inode_lives_by_its_key(upper: UpperLayer, upper_kind: Kind) -> None:
    key = make(upper, b"a", b"kept")
    number = ino(upper, key)
    upper.unlink(upper.root, b"a", key)
    another = make(upper, b"a", b"another")
    assert ino(upper, key) == number
    assert upper.stat(key).st_nlink == 0
    assert read(upper, key) == b"kept"
    write(upper, key, b"written", 2)
    upper.truncate(key, 4)
    upper.chmod(key, 0o600)
    upper.utimens(key, T0, T0)
    upper.setxattr(key, b"user.x", b"y")
    assert read(upper, key) == b"kewr"
    tick = upper_kind.tick_ns
    assert (upper.stat(key).st_mode & 0o777, upper.stat(key).st_mtime_ns) == (0o600, T0 // tick * tick)
    assert upper.getxattr(key, b"user.x") == b"y"
    assert b"user.x" in upper.listxattr(key)
    assert read(upper, another) == b"another"
    upper.forget(key)


def test_an_unlinked_link_lives_by_its_key(upper: UpperLayer) -> None:
    """The key belongs to the removed name; another name still exists."""
    key = make(upper, b"a", b"kept")
    upper.link(key, upper.root, b"b")
    upper.unlink(upper.root, b"a", key)
    assert upper.stat(key).st_nlink == 1
    assert read(upper, key) == b"kept"
    upper.unlink(upper.root, b"b", key)
    assert upper.stat(key).st_nlink == 0
    assert read(upper, key) == b"kept"


def test_a_removed_directory_lives_by_its_key(upper: UpperLayer) -> None:
    folder = upper.mkdir(upper.root, b"d", 0o755, *me())
    upper.rmdir(upper.root, b"d", folder)
    assert names(upper, folder) == []
    assert stat.S_ISDIR(upper.stat(folder).st_mode)
    assert upper.lookup(folder, b"x") is None
    with fails(errno.ENOENT):
        create(upper, b"x", directory=folder)


# -- rename ------------------------------------------------------------------------------------


def test_rename_moves_the_key(upper: UpperLayer) -> None:
    one = upper.mkdir(upper.root, b"one", 0o755, *me())
    two = upper.mkdir(upper.root, b"two", 0o755, *me())
    key = make(upper, b"a", b"data", one)
    number = ino(upper, key)
    upper.rename((one, b"a"), (two, b"b"), moved=key)
    assert (names(upper, one), names(upper, two)) == ([], [b"b"])
    make(upper, b"a", b"another", one)
    assert ino(upper, key) == number
    assert read(upper, key) == b"data"
    upper.unlink(two, b"b", key)
    assert read(upper, key) == b"data"


def test_rename_of_a_directory_keeps_the_keys_below(upper: UpperLayer) -> None:
    top = upper.mkdir(upper.root, b"top", 0o755, *me())
    sub = upper.mkdir(top, b"sub", 0o755, *me())
    leaf = make(upper, b"leaf", b"leaf", sub)
    other = upper.mkdir(upper.root, b"other", 0o755, *me())
    upper.rename((upper.root, b"top"), (other, b"moved"), moved=top)
    upper.mkdir(upper.root, b"top", 0o755, *me())
    assert read(upper, leaf) == b"leaf"
    assert names(upper, sub) == [b"leaf"]
    make(upper, b"new", b"new", sub)
    assert names(upper, find(upper, b"sub", find(upper, b"moved", other))) == [b"leaf", b"new"]


def test_rename_over_keeps_the_replaced(upper: UpperLayer) -> None:
    new, old = make(upper, b"new", b"new"), make(upper, b"old", b"old")
    upper.rename((upper.root, b"new"), (upper.root, b"old"), moved=new, replaced=old)
    assert names(upper) == [b"old"]
    assert (read(upper, new), read(upper, old)) == (b"new", b"old")
    assert upper.stat(old).st_nlink == 0
    empty = upper.mkdir(upper.root, b"empty", 0o700, *me())
    full = upper.mkdir(upper.root, b"full", 0o755, *me())
    make(upper, b"x", directory=full)
    upper.rename((upper.root, b"full"), (upper.root, b"empty"), moved=full, replaced=empty)
    assert names(upper, full) == [b"x"]
    assert names(upper, empty) == []


def test_rename_exchange(upper: UpperLayer) -> None:
    file = make(upper, b"file", b"file")
    folder = upper.mkdir(upper.root, b"dir", 0o755, *me())
    inside = make(upper, b"x", b"x", folder)
    upper.rename((upper.root, b"file"), (upper.root, b"dir"), EXCHANGE, moved=file, replaced=folder)
    assert stat.S_ISREG(upper.stat(find(upper, b"dir")).st_mode)
    assert (read(upper, file), read(upper, inside)) == (b"file", b"x")
    assert names(upper, folder) == [b"x"]
    upper.unlink(upper.root, b"dir", file)
    assert read(upper, file) == b"file"
    assert names(upper) == [b"file"]
    with fails(errno.ENOENT):
        upper.rename((upper.root, b"file"), (upper.root, b"missing"), EXCHANGE)


def test_rename_noreplace(upper: UpperLayer) -> None:
    one, two = make(upper, b"1", b"1"), make(upper, b"2", b"2")
    with fails(errno.EEXIST):
        upper.rename((upper.root, b"1"), (upper.root, b"2"), NOREPLACE, moved=one, replaced=two)
    assert (read(upper, one), read(upper, two)) == (b"1", b"2")
    upper.rename((upper.root, b"1"), (upper.root, b"3"), NOREPLACE, moved=one)
    assert names(upper) == [b"2", b"3"]


def test_rename_whiteout(upper: UpperLayer, upper_kind: Kind) -> None:
    if not upper_kind.privileged:
        pytest.skip("making a whiteout by renaming needs CAP_MKNOD on some filesystems")
    key = make(upper, b"a", b"data")
    upper.rename((upper.root, b"a"), (upper.root, b"b"), WHITEOUT, moved=key)
    attr = upper.stat(find(upper, b"a"))
    assert (stat.S_IFMT(attr.st_mode), attr.st_rdev) == (stat.S_IFCHR, 0)
    assert read(upper, key) == b"data"


def test_rename_wrong(upper: UpperLayer) -> None:
    file = make(upper, b"file")
    folder = upper.mkdir(upper.root, b"dir", 0o755, *me())
    full = upper.mkdir(upper.root, b"full", 0o755, *me())
    make(upper, b"x", directory=full)
    root = upper.root
    with fails(errno.ENOENT):
        upper.rename((root, b"missing"), (root, b"x"))
    with fails(errno.EISDIR):
        upper.rename((root, b"file"), (root, b"dir"), moved=file, replaced=folder)
    with fails(errno.ENOTDIR):
        upper.rename((root, b"dir"), (root, b"file"), moved=folder, replaced=file)
    with fails(errno.ENOTEMPTY, errno.EEXIST):
        upper.rename((root, b"dir"), (root, b"full"), moved=folder, replaced=full)
    with fails(errno.EINVAL):
        upper.rename((root, b"full"), (full, b"inside"), moved=full)
    assert names(upper) == [b"dir", b"file", b"full"]
    assert names(upper, full) == [b"x"]
    assert names(upper, folder) == []


def test_keys_survive_a_failed_removal(upper: UpperLayer) -> None:
    """After a failed rename, the keys still follow their inodes."""
    one, two = make(upper, b"1", b"1"), make(upper, b"2", b"2")
    with fails(errno.EEXIST):
        upper.rename((upper.root, b"1"), (upper.root, b"2"), NOREPLACE, moved=one, replaced=two)
    upper.rename((upper.root, b"2"), (upper.root, b"3"), moved=two)
    assert read(upper, two) == b"2"
    upper.unlink(upper.root, b"3", two)
    assert read(upper, two) == b"2"


# -- attributes --------------------------------------------------------------------------------


def test_chmod(upper: UpperLayer) -> None:
    for key in (make(upper, b"f"), upper.mkdir(upper.root, b"d", 0o755, *me())):
        for mode in (0, 0o600, 0o1755, 0o4711):
            upper.chmod(key, mode)
            assert stat.S_IMODE(upper.stat(key).st_mode) == mode
        upper.chmod(key, 0o700)


def test_chown(upper: UpperLayer) -> None:
    """An unprivileged layer records the owner that it cannot set."""
    file, folder = make(upper, b"f"), upper.mkdir(upper.root, b"d", 0o755, *me())
    for key in (file, folder):
        upper.chown(key, 1000, 2000)
        upper.chown(key, -1, 3000)
        upper.chown(key, 70000, -1)
        attr = upper.stat(key)
        assert (attr.st_uid, attr.st_gid) == (70000, 3000)
    found = upper.lookup(upper.root, b"f")
    assert found is not None
    assert (found[1].st_uid, found[1].st_gid) == (70000, 3000)
    assert read(upper, file) == b""
    upper.chown(file, *me())
    assert (upper.stat(file).st_uid, upper.stat(file).st_gid) == me()


def test_utimens(upper: UpperLayer, upper_kind: Kind) -> None:
    tick = upper_kind.tick_ns
    keys = [
        make(upper, b"f"),
        upper.mkdir(upper.root, b"d", 0o755, *me()),
        upper.symlink(upper.root, b"s", b"nowhere", *me()),
        upper.mknod(upper.root, b"p", stat.S_IFIFO | 0o600, 0, *me()),
    ]
    for key in keys:
        for atime, mtime in ((T0, T0 + 1), (0, 2_000_000_000_999_999_999)):
            upper.utimens(key, atime, mtime)
            attr = upper.stat(key)
            assert (attr.st_atime_ns, attr.st_mtime_ns) == (atime // tick * tick, mtime // tick * tick)


def test_truncate(upper: UpperLayer) -> None:
    key = make(upper, b"f", b"0123456789")
    for size, content in ((4, b"0123"), (8, b"0123\0\0\0\0"), (0, b"")):
        upper.truncate(key, size)
        assert read(upper, key) == content
    upper.truncate(key, 1 << 32)
    attr = upper.stat(key)
    assert attr.st_size == 1 << 32
    assert attr.st_blocks < 100
    with fails(errno.EISDIR, errno.EINVAL):
        upper.truncate(upper.mkdir(upper.root, b"d", 0o755, *me()), 0)


def test_xattrs(upper: UpperLayer) -> None:
    for key in (make(upper, b"f"), upper.mkdir(upper.root, b"d", 0o755, *me())):
        upper.setxattr(key, b"user.a", b"1")
        upper.setxattr(key, b"user.b", b"\0" * 500, os.XATTR_CREATE)
        upper.setxattr(key, b"user.a", b"", os.XATTR_REPLACE)
        assert sorted(upper.listxattr(key)) == [b"user.a", b"user.b"]
        assert upper.getxattr(key, b"user.a") == b""
        assert upper.getxattr(key, b"user.b") == b"\0" * 500
        with fails(errno.EEXIST):
            upper.setxattr(key, b"user.a", b"x", os.XATTR_CREATE)
        with fails(errno.ENODATA):
            upper.setxattr(key, b"user.c", b"x", os.XATTR_REPLACE)
        upper.removexattr(key, b"user.a")
        with fails(errno.ENODATA):
            upper.removexattr(key, b"user.a")
        with fails(errno.ENODATA):
            upper.getxattr(key, b"user.a")


def test_trusted_xattrs(upper: UpperLayer, upper_kind: Kind) -> None:
    if not upper_kind.privileged:
        pytest.skip("trusted.* is root's")
    for key in (make(upper, b"f"), upper.symlink(upper.root, b"s", b"x", *me())):
        name = b"trusted.other" if upper_kind.is_aufs else b"trusted.overlay.opaque"
        upper.setxattr(key, name, b"y")
        assert upper.getxattr(key, name) == b"y"
        assert upper.listxattr(key) == [name]
        upper.removexattr(key, name)


# -- files -------------------------------------------------------------------------------------


def test_file(upper: UpperLayer) -> None:
    key = make(upper, b"f")
    file = upper.open(key, os.O_RDWR)
    try:
        assert file.pwrite(b"hello", 3) == 5
        assert file.pread(100, 0) == b"\0\0\0hello"
        file.truncate(5)
        assert file.pread(100, 0) == b"\0\0\0he"
        file.fsync(False)
        file.fsync(True)
        assert file.stat().st_size == 5
        big = os.urandom(300_000)
        assert file.pwrite(big, 100) == len(big)
        assert file.pread(len(big), 100) == big
    finally:
        file.close()
        file.close()
    assert upper.stat(key).st_size == 300_100


def test_create_opens(upper: UpperLayer) -> None:
    """The mode does not restrict opening for reading and writing."""
    key, file = upper.create(upper.root, b"f", 0o400, *me())
    try:
        assert file.pwrite(b"data", 0) == 4
        assert file.pread(10, 0) == b"data"
    finally:
        file.close()
    assert upper.stat(key).st_size == 4


def test_files_of_one_inode_agree(upper: UpperLayer) -> None:
    key = make(upper, b"f", b"first")
    reading, writing = upper.open(key, os.O_RDONLY), upper.open(key, os.O_RDWR)
    try:
        writing.pwrite(b"F", 0)
        assert reading.pread(10, 0) == b"First"
        with fails(errno.EBADF):
            reading.pwrite(b"x", 0)
        upper.unlink(upper.root, b"f", key)
        writing.pwrite(b"gone", 5)
        assert reading.pread(20, 0) == b"Firstgone"
    finally:
        reading.close()
        writing.close()


def test_holes(upper: UpperLayer) -> None:
    key = make(upper, b"f")
    write(upper, key, b"end", 2 << 20)
    file = upper.open(key, os.O_RDONLY)
    try:
        segments = list(file.segments((2 << 20) + 3))
        assert segments[-1][1] == (2 << 20) + 3
        assert segments[0][0] >= 1 << 20, "the hole is told as data"
        write(upper, key, b"begin", 0)
        assert next(file.segments((2 << 20) + 3, 1 << 20))[1] == (2 << 20) + 3, (
            "what is before is passed over"
        )
    finally:
        file.close()


def test_sync(upper: UpperLayer) -> None:
    folder = upper.mkdir(upper.root, b"d", 0o755, *me())
    make(upper, b"f", b"data", folder)
    for directory in (folder, upper.root):
        opened = upper.open_directory(directory)
        opened.fsync(datasync=False)
        opened.close()
    upper.sync()


def test_parents_times_follow(upper: UpperLayer) -> None:
    folder = upper.mkdir(upper.root, b"d", 0o755, *me())
    actions: list[Callable[[], Any]] = [
        lambda: make(upper, b"a", directory=folder),
        lambda: upper.rename((folder, b"a"), (folder, b"b")),
        lambda: upper.unlink(folder, b"b", None),
        lambda: upper.mkdir(folder, b"sub", 0o755, *me()),
        lambda: upper.rmdir(folder, b"sub", None),
    ]
    for action in actions:
        upper.utimens(folder, T0, T0)
        action()
        assert upper.stat(folder).st_mtime_ns > T0
    assert upper.stat(folder).st_nlink == 2


def test_nothing_leaks(upper: UpperLayer) -> None:
    """Forgotten keys close their descriptors."""
    before = len(os.listdir("/proc/self/fd"))
    for number in range(50):
        name = b"%d" % number
        key = make(upper, name, b"x")
        folder = upper.mkdir(upper.root, b"d" + name, 0o755, *me())
        upper.unlink(upper.root, name, key)
        upper.rmdir(upper.root, b"d" + name, folder)
        assert read(upper, key) == b"x"
        upper.forget(key)
        upper.forget(folder)
    assert len(os.listdir("/proc/self/fd")) <= before + 2
