"""Calls on open files at the edges of POSIX, for :mod:`tests.support.edges`. Standard library only.

Each runs in a directory with ``f`` (7 bytes), ``d`` with a file in it, ``x`` (mode 755) and ``s`` (mode
6777).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import signal
import stat
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from tests.support.call_things import libc_call, link_followed

_libc = ctypes.CDLL(None, use_errno=True)
_GETDENTS64, _OFD_SETLK, _OFD_GETLK = 217, 37, 36


def _tried(call: Callable[[], Any]) -> Any:
    try:
        found = call()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))
    return found.decode("latin-1") if isinstance(found, bytes) else found


def _in_child(call: Callable[[], Any]) -> Any:
    """Call in another process; return the result, or the signal that killed it."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, json.dumps(_tried(call)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    status = os.waitpid(pid, 0)[1]
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else json.loads(told)


def _all_of_a_removed(path: str) -> list[Any]:
    """Return the results of calls on a file that has been unlinked."""
    fd = os.open(path, os.O_RDWR)
    os.unlink(path)
    again = f"/proc/self/fd/{fd}"
    calls: list[Callable[[], Any]] = [
        lambda: os.fstat(fd).st_nlink, lambda: os.write(fd, b"more than was"), lambda: os.ftruncate(fd, 9),
        lambda: os.fchmod(fd, 0o4711), lambda: os.fchown(fd, 5, 6), lambda: os.utime(fd, (3, 4)),
        lambda: os.setxattr(fd, "user.a", b"1"), lambda: os.getxattr(fd, "user.a"),
        lambda: os.listxattr(fd),
        lambda: os.removexattr(fd, "user.a"), lambda: os.pread(fd, 20, 0), lambda: os.link(again, "back"),
        lambda: link_followed(again, "back"), lambda: os.close(os.open(again, os.O_RDWR)),
        lambda: os.readlink(again).rpartition("/")[2], lambda: os.truncate(again, 3), lambda: os.fsync(fd),
        lambda: [oct(os.fstat(fd).st_mode), os.fstat(fd).st_uid, os.fstat(fd).st_size],
        lambda: libc_call("linkat", fd, b"", -100, b"back", 0x1000), lambda: os.chmod(again, 0o600),
        lambda: libc_call("fallocate", fd, 3, 0, 2), lambda: os.pread(fd, 20, 0),
    ]  # fmt: skip
    try:
        return [_tried(call) for call in calls]
    finally:
        os.close(fd)


def _removed_directory() -> list[Any]:
    os.mkdir("gone")
    fd = os.open("gone", os.O_RDONLY)
    os.rmdir("gone")
    calls: list[Callable[[], Any]] = [
        lambda: os.fstat(fd).st_nlink, lambda: os.listdir(fd), lambda: os.mkdir("a", dir_fd=fd),
        lambda: os.open("a", os.O_CREAT | os.O_RDWR, dir_fd=fd),
        lambda: os.open(".", os.O_TMPFILE | 2, dir_fd=fd),
        lambda: os.stat(".", dir_fd=fd).st_nlink, lambda: os.symlink("x", "a", dir_fd=fd),
        lambda: os.fchmod(fd, 0o700),
        lambda: os.rename("f", "a", dst_dir_fd=fd), lambda: os.link("f", "a", dst_dir_fd=fd),
        lambda: os.unlink("a", dir_fd=fd), lambda: os.utime(fd), lambda: os.setxattr(fd, "user.a", b"1"),
        lambda: os.mkfifo("a", dir_fd=fd), lambda: os.rmdir("../gone", dir_fd=fd), lambda: os.fsync(fd),
    ]  # fmt: skip
    try:
        return [_tried(call) for call in calls]
    finally:
        os.close(fd)


def _without_name(flags: int) -> list[Any]:
    fd = os.open("d", os.O_TMPFILE | os.O_RDWR | flags, 0o640)
    path = f"/proc/self/fd/{fd}"
    try:
        return [
            os.fstat(fd).st_nlink,
            os.write(fd, b"text"),
            _tried(lambda: link_followed(path, "f")),
            _tried(lambda: link_followed(path, "t")),
            os.fstat(fd).st_nlink,
            _tried(lambda: link_followed(path, "d/t2")),
            _tried(lambda: os.link("t", "t3")),
            os.fstat(fd).st_nlink,
        ]
    finally:
        os.close(fd)


def _getdents(size: int) -> list[Any]:
    """List a directory with a buffer of *size* bytes; return the sorted names or the errno."""
    os.mkdir("many")
    for number in range(40):
        os.mkdir(f"many/{'n' * (number % 7)}{number}")
    names: list[str] = []
    fd = os.open("many", os.O_RDONLY)
    buffer = ctypes.create_string_buffer(size)
    try:
        while True:
            got = _libc.syscall(_GETDENTS64, fd, buffer, size)
            if got < 0:
                return [errno.errorcode[ctypes.get_errno()]]  # the order depends on the filesystem
            if got == 0:
                return [sorted(names)]
            at = 0
            while at < got:
                length = struct.unpack_from("<H", buffer.raw, at + 16)[0]
                names.append(buffer.raw[at + 19 : at + length].partition(b"\0")[0].decode())
                at += length
    finally:
        os.close(fd)


def _seek_while_it_changes() -> list[Any]:
    """Seek in a directory while names change: names that stay must be listed once."""
    os.mkdir("many")
    for number in range(300):
        os.mkdir(f"many/{number:03}")
    fd = os.open("many", os.O_RDONLY)
    buffer = ctypes.create_string_buffer(1000)

    def read() -> list[str]:
        got, at, names = _libc.syscall(_GETDENTS64, fd, buffer, 1000), 0, []
        while at < got:
            length = struct.unpack_from("<H", buffer.raw, at + 16)[0]
            names.append(buffer.raw[at + 19 : at + length].partition(b"\0")[0].decode())
            at += length
        return names

    seen = read()
    place = os.lseek(fd, 0, os.SEEK_CUR)
    second = read()
    gone = [name for name in second if name.isdigit()][:3]
    for name in gone:
        os.rmdir(f"many/{name}")
    os.mkdir("many/new")
    os.lseek(fd, place, os.SEEK_SET)
    while names := read():
        seen += names
    os.lseek(fd, 0, os.SEEK_SET)
    anew: list[str] = []
    while names := read():
        anew += names
    os.close(fd)
    for name in os.listdir("many"):
        os.rmdir(f"many/{name}")  # which are left depends on the filesystem
    stayed = [name for name in map("{:03}".format, range(300)) if name not in gone]
    return [
        [name for name in stayed if seen.count(name) != 1],
        sorted(anew) == sorted([*stayed, "new", ".", ".."]),
        [name for name in gone if name in anew],
    ]


def _appended_by_many() -> list[Any]:
    """Append lines in eight processes: no line may be lost or torn."""
    pids = []
    for number in range(8):
        pid = os.fork()
        if pid == 0:
            fd = os.open("log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            for _ in range(50):
                os.write(fd, f"{number}".encode() * 99 + b"\n")
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    with open("log", "r+b") as file:
        lines = file.read().splitlines()
        file.seek(0)
        file.write(b"".join(line + b"\n" for line in sorted(lines)))  # the order is random
    return [len(lines), sorted({len(line) for line in lines}), all(len(set(line)) == 1 for line in lines)]


def _lock(fd: int, kind: int, start: int, length: int, command: int = fcntl.F_SETLK) -> Any:
    return fcntl.fcntl(fd, command, struct.pack("hhqqi4x", kind, 0, start, length, 0))


def _deadlock() -> list[Any]:
    """Let two processes wait for each other's locks: the kernel must detect the deadlock."""
    fd = os.open("f", os.O_RDWR)
    _lock(fd, fcntl.F_WRLCK, 0, 1)
    to_child, to_parent = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        other = os.open("f", os.O_RDWR)
        _lock(other, fcntl.F_WRLCK, 1, 1)
        os.write(to_parent[1], b"x")
        _lock(other, fcntl.F_WRLCK, 0, 1, fcntl.F_SETLKW)
        os._exit(0)
    os.read(to_parent[0], 1)
    while (
        f"{pid}" not in open("/proc/locks").read().replace(":", " ").split()
        or "->" not in open("/proc/locks").read()
    ):
        pass
    told = _tried(lambda: _lock(fd, fcntl.F_WRLCK, 1, 1, fcntl.F_SETLKW))
    _lock(fd, fcntl.F_UNLCK, 0, 0)
    os.waitpid(pid, 0)
    for end in (*to_child, *to_parent, fd):
        os.close(end)
    return [told if isinstance(told, str) else "locked"]


def _locks() -> list[Any]:
    """Return the results of conflicting locks: of processes, of open files, and of flock()."""
    one, two = os.open("f", os.O_RDWR), os.open("f", os.O_RDWR)
    reads = os.open("f", os.O_RDONLY)

    def of_another(command: int, kind: int) -> Any:
        def call() -> Any:
            fd = os.open("f", os.O_RDWR)
            return struct.unpack("hhqqi4x", _lock(fd, kind, 0, 5, command))[:4]

        return _in_child(call)

    found = [
        _tried(lambda: bool(_lock(one, fcntl.F_WRLCK, 2, 3))),
        of_another(fcntl.F_SETLK, fcntl.F_RDLCK),
        of_another(fcntl.F_GETLK, fcntl.F_RDLCK),
        _tried(lambda: bool(_lock(two, fcntl.F_WRLCK, 2, 3))),
        _tried(lambda: bool(_lock(two, fcntl.F_WRLCK, 2, 3, _OFD_SETLK))),
        _tried(lambda: bool(_lock(reads, fcntl.F_WRLCK, 50, 3))),
        _tried(lambda: bool(_lock(reads, fcntl.F_RDLCK, 50, 3))),
        _tried(lambda: os.close(os.open("f", os.O_RDONLY))),
        of_another(fcntl.F_SETLK, fcntl.F_RDLCK),
        _tried(lambda: bool(_lock(one, fcntl.F_WRLCK, 0, 0, _OFD_SETLK))),
        _tried(lambda: bool(_lock(two, fcntl.F_RDLCK, 0, 0, _OFD_SETLK))),
        _tried(lambda: fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)),
        _tried(lambda: fcntl.flock(two, fcntl.LOCK_SH | fcntl.LOCK_NB)),
        _tried(lambda: fcntl.flock(one, fcntl.LOCK_SH | fcntl.LOCK_NB)),
        _tried(lambda: fcntl.flock(two, fcntl.LOCK_SH | fcntl.LOCK_NB)),
        _tried(lambda: bool(_lock(one, fcntl.F_WRLCK, -5, 2))),
    ]
    for fd in (one, two, reads):
        os.close(fd)
    return found


def _leases() -> list[Any]:
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    fd, other = os.open("f", os.O_RDONLY), os.open("x", os.O_RDWR)
    found = [
        _tried(lambda: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)),
        _tried(lambda: fcntl.fcntl(fd, fcntl.F_GETLEASE)),
        _in_child(lambda: os.close(os.open("f", os.O_WRONLY | os.O_NONBLOCK))),
        _in_child(lambda: os.close(os.open("f", os.O_RDONLY | os.O_NONBLOCK))),
        _tried(lambda: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)),
        _tried(lambda: fcntl.fcntl(other, fcntl.F_SETLEASE, fcntl.F_RDLCK)),
        _tried(lambda: fcntl.fcntl(other, fcntl.F_SETLEASE, fcntl.F_WRLCK)),
        _in_child(lambda: os.close(os.open("x", os.O_RDONLY | os.O_NONBLOCK))),
        _tried(lambda: fcntl.fcntl(other, fcntl.F_SETLEASE, fcntl.F_UNLCK)),
    ]
    os.close(fd)
    os.close(other)
    return found


def _notices() -> list[Any]:
    """Return the inotify events of some changes."""
    told = _libc.inotify_init1(os.O_NONBLOCK)
    watch = {_libc.inotify_add_watch(told, name, 0xFFF): name.decode() for name in (b".", b"f", b"d")}
    for call in (
        partial(os.mkdir, "new"), partial(os.rename, "f", "g"), partial(os.chmod, "g", 0o600),
        partial(os.link, "g", "d/l"),
        partial(os.truncate, "g", 2), partial(os.unlink, "g"), partial(os.rmdir, "new"),
        partial(os.setxattr, "x", "user.a", b""),
        partial(os.rename, "x", "d/x"), partial(os.unlink, "d/l"), partial(os.utime, "d/x"),
        partial(os.listdir, "d"),
    ):  # fmt: skip
        call()
    events = []
    with suppress(BlockingIOError):
        while data := os.read(told, 65536):
            at = 0
            while at < len(data):
                which, mask, _, length = struct.unpack_from("iIII", data, at)
                name = data[at + 16 : at + 16 + length].rstrip(b"\0").decode()
                events.append(f"{watch[which]} {mask:x} {name}")
                at += 16 + length
    os.close(told)
    return events


def _beyond_the_end() -> list[Any]:
    """Map more than the file: zeros to the end of the page, then SIGBUS; the same after truncation."""
    with open("big", "wb") as file:
        file.write(b"x" * 4 * 4096)
    fd = os.open("big", os.O_RDWR)
    mapped = mmap.mmap(fd, 4 * 4096)
    os.ftruncate(fd, 10_000)
    touch = [_in_child(partial(mapped.__getitem__, at)) for at in (0, 9_999, 10_000, 12_287, 12_288, 16_383)]
    os.ftruncate(fd, 4097)
    touch += [_in_child(partial(mapped.__getitem__, at)) for at in (4096, 4097, 8191, 8192, 9_999)]
    os.ftruncate(fd, 10_000)
    touch += [_in_child(partial(mapped.__getitem__, at)) for at in (4096, 4097, 9_999)]
    mapped[5000] = 1
    mapped.flush()
    found = os.pread(fd, 5, 4998).decode("latin-1")
    mapped.close()
    os.close(fd)
    return [*touch, found]


def _holes() -> list[Any]:
    fd = os.open("sparse", os.O_RDWR | os.O_CREAT, 0o644)
    os.ftruncate(fd, 1 << 20)
    for at in (8192, 100_000, 500_000):
        os.pwrite(fd, b"x" * 5000, at)
    os.fsync(fd)

    def map_of() -> list[Any]:
        found, at = [], 0
        while isinstance(at, int):
            for how in (os.SEEK_DATA, os.SEEK_HOLE):
                at = _tried(partial(os.lseek, fd, at, how))
                found.append(at)
                if not isinstance(at, int):
                    break
        return found

    told = [map_of(), os.fstat(fd).st_blocks]
    told += [_tried(lambda: libc_call("fallocate", fd, 3, 98_304, 8192)), map_of(), os.fstat(fd).st_blocks]
    told += [
        _tried(lambda: libc_call("fallocate", fd, 0x10, 0, 8192)),
        _tried(lambda: libc_call("fallocate", fd, 0, 0, 9)),
    ]
    told += [_tried(partial(os.lseek, fd, at, how)) for at in (0, 1 << 20, 9999) for how in (3, 4)]
    os.ftruncate(fd, 300_000)
    os.ftruncate(fd, 600_000)
    told += [map_of(), os.pread(fd, 3, 299_999).hex(), os.fstat(fd).st_blocks]
    os.close(fd)
    return told


def _text_busy() -> list[Any]:
    """Check that a running program cannot be written, nor a file open for writing be run."""
    with open("prog", "wb") as out, open("/bin/sleep", "rb") as program:
        out.write(program.read())
    os.chmod("prog", 0o755)
    fd = os.open("prog", os.O_RDWR)
    pid = os.fork()
    if pid == 0:
        with suppress(OSError):
            os.execv("prog", ["prog", "0"])
        os._exit(77)
    found: list[Any] = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]
    os.close(fd)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.execv("prog", ["prog", "60"])
    os.close(writing)
    os.read(reading, 1)  # it has become the program
    found += [
        _tried(lambda: os.close(os.open("prog", os.O_WRONLY))),
        _tried(lambda: os.truncate("prog", 3)),
        _tried(lambda: os.close(os.open("prog", os.O_RDONLY | os.O_TRUNC))),
        _tried(lambda: os.rename("prog", "renamed")),
        _tried(lambda: os.unlink("renamed")),
    ]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(reading)
    return found


def _many_links() -> list[Any]:
    """Create as many links as an ext3 inode allows."""
    made = 1
    os.mkdir("l")
    while made < 33_000 and _tried(partial(os.link, "f", f"l/{made}")) is None:
        made += 1
    found = [made, _tried(lambda: os.link("f", "one more")), os.stat("f").st_nlink]
    found.append(_tried(lambda: os.rename("x", "l/1")))
    found += [os.stat("f").st_nlink, _tried(lambda: os.link("f", "one more"))]
    for number in range(1, made):
        os.unlink(f"l/{number}")
    return [*found, os.stat("f").st_nlink]


def _takes_set_ids(how: str, uid: int) -> list[Any]:
    """Return the mode of a set-ID file before and after a write, while descriptors stay open."""
    fd, source = os.open("s", os.O_RDWR), os.open("f", os.O_RDONLY)
    reading, writing = os.pipe()
    os.write(writing, b"piped")
    mapped = mmap.mmap(fd, 7)
    os.seteuid(uid)
    acts: dict[str, Callable[[], Any]] = {
        "write": lambda: os.write(fd, b"x"), "pwritev": lambda: os.pwritev(fd, [b"x", b"y"], 3),
        "copy_file_range": lambda: os.copy_file_range(source, fd, 3),
        "sendfile": lambda: os.sendfile(fd, source, 0, 3),
        "splice": lambda: os.splice(reading, fd, 5), "ftruncate": lambda: os.ftruncate(fd, 3),
        "ftruncate to what it is": lambda: os.ftruncate(fd, 7), "truncate": lambda: os.truncate("s", 1),
        "punch": lambda: libc_call("fallocate", fd, 3, 0, 3),
        "allocate": lambda: libc_call("fallocate", fd, 0, 0, 3),
        "mmap": lambda: mapped.__setitem__(0, 65), "write nothing": lambda: os.write(fd, b""),
        "open, O_TRUNC": lambda: os.close(os.open("s", os.O_WRONLY | os.O_TRUNC)),
        "fsync": lambda: os.fsync(fd),
        "pwritev2, O_DSYNC": lambda: os.pwritev(fd, [b"z"], 1, os.RWF_DSYNC),
        "xattr": lambda: os.setxattr(fd, "user.a", b""),
    }  # fmt: skip
    try:
        gave = _tried(acts[how])
    finally:
        os.seteuid(0)
    if how == "mmap":
        mapped.flush()
    found = [gave, oct(os.fstat(fd).st_mode), oct(os.stat("s").st_mode)]
    mapped.close()
    for one in (fd, source, reading, writing):
        os.close(one)
    return [*found, oct(os.stat("s").st_mode)]


WAYS = (
    "write", "pwritev", "copy_file_range", "sendfile", "splice", "ftruncate", "ftruncate to what it is",
    "truncate",
    "punch", "allocate", "mmap", "write nothing", "open, O_TRUNC", "fsync", "pwritev2, O_DSYNC", "xattr",
)  # fmt: skip


def _copies() -> list[Any]:
    """Return the errors of copy_file_range(2), sendfile(2) and others."""
    one, two = os.open("f", os.O_RDWR), os.open("x", os.O_RDWR)
    end, place = os.open("x", os.O_WRONLY | os.O_APPEND), os.open("f", os.O_PATH)
    reads, directory = os.open("f", os.O_RDONLY), os.open("d", os.O_RDONLY)
    calls: list[Callable[[], Any]] = [
        lambda: os.copy_file_range(one, two, 3, 100, 0), lambda: os.copy_file_range(one, one, 5, 0, 2),
        lambda: os.copy_file_range(one, one, 2, 0, 5), lambda: os.copy_file_range(one, end, 3),
        lambda: os.copy_file_range(one, reads, 3), lambda: os.copy_file_range(directory, two, 3),
        lambda: os.copy_file_range(one, directory, 3), lambda: os.copy_file_range(place, two, 3),
        lambda: os.copy_file_range(one, two, 7, 0, 1 << 50), lambda: os.copy_file_range(one, two, 0),
        lambda: os.sendfile(end, one, 0, 3), lambda: os.sendfile(two, directory, 0, 3),
        lambda: os.posix_fallocate(reads, 0, 5), lambda: os.posix_fallocate(one, 0, 50),
        lambda: os.fstat(one).st_size,
        lambda: os.preadv(directory, [bytearray(3)], 0), lambda: os.pread(place, 3, 0),
        lambda: os.fchmod(place, 0o600),
        lambda: os.fsync(directory), lambda: os.fdatasync(place), lambda: os.ftruncate(directory, 0),
        lambda: os.posix_fadvise(directory, 0, 0, 3),
        lambda: os.pwrite(one, b"x", 1 << 62), lambda: os.lseek(directory, -1, os.SEEK_SET),
        lambda: mmap.mmap(place, 3),
        lambda: mmap.mmap(directory, 3),
        lambda: bool(mmap.mmap(reads, 3, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)),
        lambda: mmap.mmap(reads, 3, flags=mmap.MAP_SHARED),
        lambda: bool(mmap.mmap(reads, 3, flags=mmap.MAP_PRIVATE)),
    ]  # fmt: skip
    try:
        return [_tried(call) for call in calls]
    finally:
        for fd in (one, two, end, place, reads, directory):
            os.close(fd)


def _removed_below() -> list[Any]:
    """Use a directory whose parent was removed, and one that is renamed while it is in use."""
    fd = os.open("d", os.O_RDONLY)
    os.rename("d", "e")
    found = [
        _tried(lambda: sorted(os.listdir(fd))),
        _tried(lambda: stat.S_ISREG(os.stat("f", dir_fd=fd).st_mode)),
    ]
    os.unlink("e/f")
    found += [_tried(lambda: os.rmdir("e")), _tried(lambda: os.stat("..", dir_fd=fd).st_nlink)]
    os.close(fd)
    return found


ON_OPEN_FILES: dict[str, Callable[[], Any]] = {
    "a removed file": partial(_all_of_a_removed, "f"),
    "a removed set-ID file": partial(_all_of_a_removed, "s"),
    "a removed directory": _removed_directory,
    "a renamed directory": _removed_below,
    "O_TMPFILE": partial(_without_name, 0),
    "O_TMPFILE, O_EXCL": partial(_without_name, os.O_EXCL),
    **{
        f"getdents, {size} bytes": partial(_getdents, size)
        for size in (1, 24, 31, 32, 48, 280, 4096, 100_000)
    },
    "seekdir while names come and go": _seek_while_it_changes,
    "appended by many": _appended_by_many,
    "EDEADLK": _deadlock,
    "locks": _locks,
    "leases": _leases,
    "inotify": _notices,
    "SIGBUS": _beyond_the_end,
    "holes": _holes,
    "ETXTBSY": _text_busy,
    "EMLINK": _many_links,
    "copies that are refused": _copies,
    **{
        f"set-ID bits, {how}, by {uid}": partial(_takes_set_ids, how, uid)
        for how in WAYS
        for uid in (0, 1001)
    },
}

assert sys.maxsize > 1 << 32
