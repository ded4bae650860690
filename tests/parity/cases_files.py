"""Files: create, write, append, truncate, open descriptors, sparse files, mappings."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from functools import partial

from cowfs.linux import files
from tests.parity.script import Script, attempt, case
from tests.parity.trees import BASE, BIG

_libc = ctypes.CDLL(None, use_errno=True)


def _size(fd: int) -> int:
    return os.fstat(fd).st_size


def _group(fd: int) -> int:
    return os.fstat(fd).st_gid


def _mode_and_names(fd: int) -> tuple[str, int]:
    return oct(os.fstat(fd).st_mode), os.fstat(fd).st_nlink


@case(BASE)
def create_files(s: Script) -> None:
    s.create("new", b"data", 0o640)
    s.create("dir/new", b"", 0o600)
    s.create("dir/sub/deep/new", BIG, 0o755)
    s.create("emptydir/new", b"x")
    s.create("file", b"exists")
    s.create("dir", b"exists")
    s.create("sym", b"exists")
    s.create("nowhere/new", b"no parent")
    s.create("file/new", b"not a directory")


@case(BASE)
def write_lower_file(s: Script) -> None:
    s.write("file", b"J")
    s.write("dir/a", b"longer than before\n")
    s.write("big", b"in the middle", 100_000)
    s.write("empty", b"no longer")
    s.write("file", b"past the end", 50)
    s.write("dir", b"")
    s.write("missing", b"")
    s.write("sym", b"through a link")
    s.write("dangling", b"")


@case(BASE)
def append_to_files(s: Script) -> None:
    s.append("file", b"more\n")
    s.append("big", b"tail")
    s.append("file", b"and more\n")
    s.create("new", b"start")
    s.append("new", b" end")
    s.append("script", b"echo\n")


@case(BASE)
def truncate_files(s: Script) -> None:
    s.truncate("file", 0)
    s.truncate("big", 1000)
    s.truncate("big", 100_000)
    s.truncate("dir/a", 4096)
    s.truncate("empty", 10)
    s.create("new", b"data")
    s.truncate("new", 2)
    s.truncate("dir", 0)
    s.truncate("missing", 0)
    s.truncate("fifo", 0)


@case(BASE)
def open_with_trunc(s: Script) -> None:
    s.replace("file", b"new text")
    s.replace("big", b"")
    s.replace("dir/sub/c", BIG)
    s.replace("brand_new", b"x")
    s.replace("file", b"again")
    s.replace("dir", b"")
    s.replace("sym", b"through")


@case(BASE)
def open_flags(s: Script) -> None:
    s.open_do("file", os.O_RDONLY | os.O_CREAT | os.O_EXCL)
    s.open_do("dangling", os.O_RDONLY | os.O_CREAT | os.O_EXCL)
    s.open_do("sym", os.O_RDONLY | os.O_NOFOLLOW)
    s.open_do("dir", os.O_WRONLY)
    s.open_do("dir", os.O_RDONLY | os.O_CREAT)
    s.open_do("file", os.O_RDONLY | os.O_DIRECTORY)
    s.open_do("dir/a", os.O_RDWR, lambda fd: os.read(fd, 10))
    s.open_do("dir/b", os.O_RDONLY, lambda fd: os.write(fd, b"x"))
    s.open_do("file", os.O_WRONLY, lambda fd: os.read(fd, 1))
    s.open_do("socket", os.O_RDONLY)
    s.open_do("created", os.O_RDONLY | os.O_CREAT, mode=0o200)
    s.open_do("dangling", os.O_WRONLY | os.O_CREAT, lambda fd: os.write(fd, b"at nowhere"))


@case(BASE)
def readonly_descriptor_sees_later_writes(s: Script) -> None:
    before = s.open("file")
    s.write("file", b"HELLO")
    s.fd("read the old descriptor", lambda: os.pread(before, 100, 0))
    s.append("file", b"more\n")
    s.fd("read the old descriptor", lambda: os.pread(before, 100, 0))
    s.fd("its size", lambda: os.fstat(before).st_size)
    s.truncate("file", 1)
    s.fd("read the old descriptor", lambda: os.pread(before, 100, 0))
    s.close(before)


@case(BASE)
def descriptors_of_an_upper_file_agree(s: Script) -> None:
    s.write("file", b"J")
    reading = s.open("file")
    writing = s.open("file", os.O_RDWR)
    s.fd("write", lambda: os.pwrite(writing, b"12345678", 2))
    s.fd("read", lambda: os.pread(reading, 100, 0))
    s.fd("read by the writer", lambda: os.pread(writing, 100, 0))
    s.fd("ftruncate", lambda: os.ftruncate(writing, 3))
    s.fd("read", lambda: os.pread(reading, 100, 0))
    s.fd("fsync", lambda: os.fsync(writing))
    s.fd("fdatasync", lambda: os.fdatasync(writing))
    s.close(reading)
    s.close(writing)


@case(BASE)
def unlinked_open_files(s: Script) -> None:
    lower = s.open("dir/a")
    upper = s.open("dir/b", os.O_RDWR)
    fresh = s.open("fresh", os.O_RDWR | os.O_CREAT)
    s.fd("write", lambda: os.write(fresh, b"fresh data"))
    for name in ("dir/a", "dir/b", "fresh"):
        s.unlink(name)
    s.fd("write after unlink", lambda: os.pwrite(upper, b"BB", 0))
    s.fd("write after unlink", lambda: os.pwrite(fresh, b"FRESH", 0))
    s.fd("truncate after unlink", lambda: os.ftruncate(fresh, 7))
    s.fd("chmod after unlink", lambda: os.fchmod(upper, 0o600))
    for what, fd in (("lower", lower), ("upper", upper), ("fresh", fresh)):
        s.fd(f"read {what}", lambda fd=fd: os.pread(fd, 100, 0))  # type: ignore[misc]
    s.differs(
        "POSIX: no name is left", "nlink lower", lambda: os.fstat(lower).st_nlink, kernel=1, cowfs=0
    )  # fmt: skip
    s.fd("nlink upper", lambda: os.fstat(upper).st_nlink)
    s.fd("nlink fresh", lambda: os.fstat(fresh).st_nlink)
    s.create("dir/a", b"another\n")
    s.fd("read the unlinked", lambda: os.pread(lower, 100, 0))
    s.fd("mode", lambda: oct(os.fstat(upper).st_mode))
    for fd in (lower, upper, fresh):
        s.close(fd)


@case(BASE)
def file_replaced_while_open(s: Script) -> None:
    fd = s.open("file", os.O_RDWR)
    s.create("other", b"other\n")
    s.rename("other", "file")
    s.fd("write to the replaced", lambda: os.pwrite(fd, b"XX", 0))
    s.fd("read the replaced", lambda: os.pread(fd, 100, 0))
    s.read("file")
    s.close(fd)


@case(BASE)
def append_descriptor(s: Script) -> None:
    one = s.open("file", os.O_WRONLY | os.O_APPEND)
    two = s.open("file", os.O_WRONLY | os.O_APPEND)
    s.fd("one", lambda: os.write(one, b"1\n"))
    s.fd("two", lambda: os.write(two, b"2\n"))
    s.fd("one", lambda: os.write(one, b"3\n"))
    s.truncate("file", 2)
    s.fd("two", lambda: os.write(two, b"4\n"))
    s.fd("drop O_APPEND", lambda: fcntl.fcntl(one, fcntl.F_SETFL, 0))
    s.fd("one at 0", lambda: os.pwrite(one, b"0", 0))
    s.close(one)
    s.close(two)


@case(BASE)
def sparse_files(s: Script) -> None:
    """Holes stay holes through copy-up, and in new files."""

    def is_sparse(path: str) -> bool:
        st = os.stat(s.at(path))
        return st.st_blocks * 512 < st.st_size // 2

    s.write("sparse", b"x", 10)
    s.differs(
        "the kernel's copy-up fills holes up to a limit", "still sparse", lambda: is_sparse("sparse"),
        kernel=False, cowfs=True,
    )  # fmt: skip
    s.create("new")
    s.write("new", b"end", 3 << 20)
    s.step("sparse", lambda: is_sparse("new"))
    s.truncate("new", 8 << 20)
    s.step("sparse", lambda: is_sparse("new"))
    s.write("new", b"middle", 5 << 20)
    s.read("sparse")


@case(BASE)
def shared_mapping(s: Script) -> None:
    fd = s.open("file", os.O_RDWR)

    def through_memory() -> bytes:
        with mmap.mmap(fd, 0) as view:
            view[0:5] = b"MMAP!"
            view.flush()
            return bytes(view)

    s.fd("write through a mapping", through_memory)
    s.close(fd)
    s.read("file")
    s.open_do("big", os.O_RDONLY, lambda f: mmap.mmap(f, 0, prot=mmap.PROT_READ)[5000:5010])

    def copy_on_write(f: int) -> bytes:
        with mmap.mmap(f, 0, flags=mmap.MAP_PRIVATE) as view:
            view[0:3] = b"abc"
            return bytes(view[0:5])

    s.open_do("dir/b", os.O_RDONLY, copy_on_write)
    s.read("dir/b")


@case(BASE)
def mapping_sees_writes(s: Script) -> None:
    s.write("file", b"J")
    fd = s.open("file", os.O_RDWR)
    view = mmap.mmap(fd, 0)
    s.write("file", b"WRITE")
    s.fd("seen in the mapping", lambda: view[:])
    s.fd("written in the mapping", lambda: view.__setitem__(slice(0, 2), b"ZZ"))
    s.fd("read by pread", lambda: os.pread(fd, 100, 0))
    view.close()
    s.close(fd)


@case(BASE)
def copy_between_files(s: Script) -> None:
    """Copy with copy_file_range in the merged tree, and with sendfile from a lower file."""
    s.append("dir/b", b"x" * 6000)
    upper, lower = s.open("dir/b"), s.open("big")
    target = s.open("target", os.O_RDWR | os.O_CREAT)
    s.fd("copy_file_range", lambda: os.copy_file_range(upper, target, 5000))
    s.fd("sendfile", lambda: os.sendfile(target, lower, 0, 3000))
    s.fd("offset", lambda: os.lseek(target, 0, os.SEEK_CUR))

    def from_below() -> int:
        before = os.fstat(target).st_size
        copied = os.copy_file_range(lower, target, 10_000, 50, before)
        os.ftruncate(target, before)
        return copied

    s.differs("no copy between filesystems", "from below", from_below, kernel="errno EXDEV", cowfs=10_000)
    s.fd("at the end", lambda: os.copy_file_range(upper, target, 10_000, 5990, 0))
    s.fd("behind it", lambda: os.copy_file_range(upper, target, 10, 1 << 30, 0))
    s.fd("overlapping", lambda: os.copy_file_range(target, target, 100, 0, 50))
    s.fd("to who reads", lambda: os.copy_file_range(target, lower, 100))
    changed = s.open("file", os.O_RDWR)
    s.fd("to below", lambda: os.copy_file_range(upper, changed, 100, 5, 2))
    s.close(changed)
    s.read("file")
    s.read("target")
    for fd in (upper, lower, target):
        s.close(fd)


@case(BASE)
def allocate(s: Script) -> None:
    """fallocate(2): ext3 does not support it, so the C library writes zeros; but it can punch holes."""
    fd = s.open("new", os.O_RDWR | os.O_CREAT)
    s.fd("posix_fallocate", lambda: os.posix_fallocate(fd, 0, 10_000))
    s.fd("its size", lambda: os.fstat(fd).st_size)
    s.close(fd)
    for name in ("big", "new", "file"):
        fd = s.open(name, os.O_RDWR)
        for mode in (0, 1, 2, files.PUNCH_HOLE, 0x10, 0x11, 8, 0x20):
            # The kernel's ext3 sets mtime before it fails, so do not compare trees until a call succeeds.
            allocated = partial(files.fallocate, fd, 4000, 9000, mode)
            s.step(f"{name}: mode {mode}", allocated, look=False)
            s.step(f"{name}: its size", partial(_size, fd), look=False)
        s.fd(f"{name}: nothing", partial(files.fallocate, fd, 4000, 0, files.PUNCH_HOLE))
        s.fd(f"{name}: behind the end", partial(files.fallocate, fd, 1 << 30, 9, files.PUNCH_HOLE))
        s.read(name)
        s.close(fd)
    fd = s.open("big")
    s.fd("for who reads", lambda: files.fallocate(fd, 0, 9, files.PUNCH_HOLE))
    s.close(fd)


@case(BASE)
def holes(s: Script) -> None:
    """SEEK_DATA and SEEK_HOLE, in files of the lower and the upper."""
    s.create("hollow")
    s.truncate("hollow", 1 << 20)
    s.write("hollow", b"x" * 4096, 65536)
    for name in ("sparse", "hollow", "big"):
        fd = s.open(name)
        for offset in (0, 4096, 65536, 70_000, (1 << 20) - 1, 1 << 20, 1 << 30):
            s.fd(f"{name}: data from {offset}", partial(os.lseek, fd, offset, os.SEEK_DATA))
            s.fd(f"{name}: a hole from {offset}", partial(os.lseek, fd, offset, os.SEEK_HOLE))
        s.fd("no such way", partial(os.lseek, fd, -1, os.SEEK_DATA))
        s.close(fd)


@case(BASE)
def tmpfile(s: Script) -> None:
    """O_TMPFILE, and linkat(2) to a new name, a whiteout, and an existing name."""
    os.chmod(s.at("emptydir"), 0o2775)
    attempt(lambda: os.chown(s.at("emptydir"), 0, 1000))
    s.unlink("dir/a")
    for directory, name, flags in (
        ("dir", "dir/new", 0),
        ("dir", "dir/a", 0),
        ("dir", "dir/b", 0),
        ("emptydir", "emptydir/new", 0),
        ("emptydir", "there", 0),
        (".", "never", os.O_EXCL),
    ):
        fd = s.open(directory, os.O_TMPFILE | os.O_RDWR | flags, 0o664)
        s.fd("write", partial(os.write, fd, b"unnamed"))
        for _ in range(2):
            s.fd("its mode and names", partial(_mode_and_names, fd))
            s.fd("its group", partial(_group, fd))
            s.step(f"name {name}", partial(link_fd, fd, s.at(name)))
        s.fd("read", partial(os.pread, fd, 10, 0))
        s.close(fd)
    s.step("read only", lambda: os.open(s.at("dir"), os.O_TMPFILE | os.O_RDONLY))
    s.step("not in a file", lambda: os.open(s.at("file"), os.O_TMPFILE | os.O_RDWR))
    s.unlink("dir/new")
    s.remounted()


def link_fd(fd: int, name: str) -> None:
    """Give an open file a name (open(2), O_TMPFILE)."""
    if _libc.linkat(-100, b"/proc/self/fd/%d" % fd, -100, os.fsencode(name), 0x400):  # AT_SYMLINK_FOLLOW
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@case(BASE)
def locks(s: Script) -> None:
    """Locks of the kernel hold across descriptors from before and after a copy-up."""
    one = s.open("open", os.O_RDWR)
    lock = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    s.fd("lock", lambda: fcntl.fcntl(one, fcntl.F_SETLK, lock) and None)

    def other() -> None:
        fd = os.open(s.at("open"), os.O_RDWR)
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    s.as_user(1000, "lock held by another", other)
    s.fd("flock", lambda: fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB))
    s.close(one)
    s.as_user(1000, "lock now free", other)


@case(BASE)
def many_writes_in_one_file(s: Script) -> None:
    fd = s.open("grown", os.O_RDWR | os.O_CREAT)

    def scattered() -> int:
        for number in range(200):
            os.pwrite(fd, bytes([number]) * 777, (number * 7919) % 500_000)
        return os.fstat(fd).st_size

    s.fd("scattered writes", scattered)
    s.fd("readv", lambda: os.preadv(fd, [bytearray(1000), bytearray(5000)], 100_000))
    s.fd("negative offset", lambda: os.pread(fd, 1, -1))
    s.fd("past the end", lambda: os.pread(fd, 10, 1 << 40))
    s.close(fd)
    s.remounted()


@case(BASE)
def file_too_large(s: Script) -> None:
    """ext3 files hold up to 2 TiB: writes beyond it fail with EFBIG."""
    s.create("new", b"x")
    s.truncate("new", 1 << 45)

    def beyond() -> str:
        fd = os.open(s.at("new"), os.O_WRONLY)
        try:
            os.pwrite(fd, b"x", 1 << 45)
            os.fsync(fd)
            return "written"
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        finally:
            os.close(fd)

    s.step("write far beyond", beyond)
