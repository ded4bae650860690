"""Make calls that may remove set-ID bits and capabilities from files in a tree, and print the results.

``python -m tests.support.setid make TREE`` creates the files; ``... do TREE WHERE`` makes the calls. The
tests compare the output with that of the kernel's filesystems.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from cowfs.layers import acl

OWNER, MEMBER, STRANGER, FOREIGN = 4001, 4002, 4003, 4009
"""The owner and group of the files; a member of the group; a non-member; a group without members."""
SMALL, BIG = 10, 70_000
CAPABILITY = struct.pack("<5I", 0x2000001, 1 << 10, 0, 0, 0)
MODES = (0o6777, 0o2767)
FSETID = 4

_libc = ctypes.CDLL(None, use_errno=True)


def lacks(capability: int) -> None:
    """Drop one capability permanently."""
    head, data = (
        ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0)),
        ctypes.create_string_buffer(24),
    )
    assert _libc.capget(head, data) == 0
    words = list(struct.unpack("=6I", data.raw))
    for place in range(3):
        words[place] &= ~(1 << capability)
    assert _libc.capset(head, ctypes.create_string_buffer(struct.pack("=6I", *words))) == 0


class Who(NamedTuple):
    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    keeps: bool = False
    """Whether it has CAP_FSETID although it is not root."""
    lacks: bool = False
    """Whether it lacks CAP_FSETID although it is root."""

    def become(self) -> None:
        if self.lacks:
            lacks(FSETID)
        if self.keeps:
            _libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
        os.setgroups(self.groups)
        os.setresgid(self.gid, self.gid, self.gid)
        os.setresuid(self.uid, self.uid, self.uid)
        if self.keeps:
            words = struct.pack("=6I", 1 << FSETID, 1 << FSETID, 0, 0, 0, 0)
            head = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
            assert _libc.capset(head, ctypes.create_string_buffer(words)) == 0


PEOPLE = {
    "root": Who(0, 0),
    "root without CAP_FSETID": Who(0, 0, lacks=True),
    "the owner": Who(OWNER, OWNER),
    "a member": Who(MEMBER, MEMBER, (OWNER,)),
    "a stranger": Who(STRANGER, STRANGER),
    "a stranger with CAP_FSETID": Who(STRANGER, STRANGER, keeps=True),
}


def other_file(size: int) -> int:
    fd = os.memfd_create("data")
    os.write(fd, b"y" * size)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def to_map(fd: int, *, sync: bool) -> None:
    with mmap.mmap(fd, SMALL) as memory:
        memory[0] = 65
        if sync:
            memory.flush()


def spliced(fd: int) -> None:
    read, write = os.pipe()
    os.write(write, b"abc")
    os.splice(read, fd, 3)


def copied(fd: int) -> None:
    """Copy within the filesystem."""
    os.lseek(fd, 0, os.SEEK_SET)
    os.copy_file_range(fd, fd, 2, offset_src=0, offset_dst=5)


def direct(fd: int) -> None:
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_DIRECT)
    os.pwritev(again, [mmap.mmap(-1, 4096)], 0)
    os.close(again)


def cloned(fd: int) -> None:
    with suppress(OSError):
        fcntl.ioctl(fd, 0x40049409, other_file(SMALL))  # FICLONE


def by_io_uring(fd: int) -> None:
    """Write with io_uring(7), or with write(2) if it is not available."""
    parameters = ctypes.create_string_buffer(120)
    ring = _libc.syscall(425, 1, parameters)
    if ring < 0:
        os.write(fd, b"x")
        return
    _, tail, _, _, _, _, array = struct.unpack_from("=7I", parameters.raw, 40)
    data = ctypes.create_string_buffer(b"x")
    with mmap.mmap(ring, array + 4) as queue, mmap.mmap(ring, 64, offset=0x10000000) as entries:
        entries[:28] = struct.pack("=BBHiQQI", 23, 0, 0, fd, 0, ctypes.addressof(data), 1)
        queue[array : array + 4] = bytes(4)
        queue[tail : tail + 4] = struct.pack("=I", 1)
        assert _libc.syscall(426, ring, 1, 1, 1, None, 0) == 1
    os.close(ring)


BY_DESCRIPTOR: dict[str, Callable[[int], object]] = {
    "write": lambda fd: os.write(fd, b"x"),
    "pwritev": lambda fd: os.pwritev(fd, [b"x", b"y"], 3),
    "pwritev2 with RWF_DSYNC": lambda fd: os.pwritev(fd, [b"x"], 3, os.RWF_DSYNC),
    "write of nothing": lambda fd: os.write(fd, b""),
    "O_DIRECT": direct,
    "io_uring": by_io_uring,
    "sendfile": lambda fd: os.sendfile(fd, other_file(3), 0, 3),
    "splice": spliced,
    "copy_file_range": copied,
    "FICLONE": cloned,
    "posix_fallocate": lambda fd: os.posix_fallocate(fd, 0, 200_000),
    "ftruncate": lambda fd: os.ftruncate(fd, 5),
    "ftruncate to the same": lambda fd: os.ftruncate(fd, os.fstat(fd).st_size),
    "mmap": lambda fd: to_map(fd, sync=False),
    "mmap and msync": lambda fd: to_map(fd, sync=True),
    "fchmod to the same": lambda fd: os.fchmod(fd, os.fstat(fd).st_mode & 0o7777),
    "utime": os.utime,
}
AN_ACL = acl.build([(1, 7, 2**32 - 1), (2, 7, 77), (4, 5, 2**32 - 1), (16, 7, 2**32 - 1), (32, 6, 2**32 - 1)])
BY_NAME: dict[str, Callable[[str], object]] = {
    "append": lambda path: os.write(os.open(path, os.O_WRONLY | os.O_APPEND), b"x"),
    "open to truncate": lambda path: os.open(path, os.O_WRONLY | os.O_TRUNC),
    "open or create to truncate": lambda path: os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    "truncate": lambda path: os.truncate(path, 5),
    "truncate to grow": lambda path: os.truncate(path, 100_000),
    "open": lambda path: os.open(path, os.O_RDWR),
}
ATTRIBUTES: dict[str, Callable[[str], object]] = {
    "chown of nobody": lambda path: os.chown(path, -1, -1),
    "chown to the same": lambda path: os.chown(path, OWNER, -1),
    "chown of the group": lambda path: os.chown(path, -1, os.getgid()),
    "chmod": lambda path: os.chmod(path, os.stat(path).st_mode & 0o7777),
    "an ACL": lambda path: os.setxattr(path, "system.posix_acl_access", AN_ACL),
    "no ACL": lambda path: os.removexattr(path, "system.posix_acl_access"),
    "setxattr": lambda path: os.setxattr(path, "user.x", b"1"),
}


class Case(NamedTuple):
    what: str
    who: str
    mode: int
    opener: str = ""
    """The user who opens the file for *who*; "" if *who* does."""
    foreign: bool = False
    """Whether the file has a group that no user is in."""
    bare: bool = False
    """Whether the file has no capabilities."""

    def name(self) -> str:
        group = ("foreign " if self.foreign else "") + ("bare " if self.bare else "")
        return f"{self.mode:o} {group}{self.what} by {self.who} {self.opener and 'opened by ' + self.opener}"


def cases() -> list[Case]:
    found = []
    for mode in MODES:
        for what in (*BY_DESCRIPTOR, *BY_NAME):
            found.append(
                Case(what, "a stranger" if "mod" not in what and what != "utime" else "the owner", mode)
            )
        for who in PEOPLE:
            found += [Case(what, who, mode) for what in ("write", "truncate", "open to truncate", "O_DIRECT")]
        for opener, who in (("root", "a stranger"), ("a stranger", "root")):
            found += [Case(what, who, mode, opener) for what in ("write", "ftruncate", "mmap", "O_DIRECT")]
        for foreign in (False, True):
            for who in ("the owner", "root", "root without CAP_FSETID"):
                found += [Case(what, who, mode, "", foreign) for what in ATTRIBUTES]
                found += [Case(what, who, mode, "", foreign, True) for what in ("chown of nobody", "write")]
    return list(dict.fromkeys(found))


def name_of(number: int, size: int) -> str:
    return f"{number}-{size}"


def make(tree: str) -> None:
    for number, case in enumerate(cases()):
        for size in (SMALL, BIG):
            path = f"{tree}/{name_of(number, size)}"
            with open(path, "wb") as file:
                file.write(b"x" * size)
            os.chown(path, OWNER, FOREIGN if case.foreign else OWNER)
            set_attributes(path, case)


def set_attributes(path: str, case: Case) -> None:
    os.chmod(path, case.mode)
    if not case.bare:
        os.setxattr(path, "security.capability", CAPABILITY)


class _Statx(ctypes.Structure):
    _fields_ = (("head", ctypes.c_char * 28), ("mode", ctypes.c_uint16), ("rest", ctypes.c_char * 226))


DONT_SYNC, FORCE_SYNC, MODE = 0x4000, 0x2000, 2


def statx(path: str, flags: int) -> str:
    buffer = _Statx()
    if _libc.statx(-100, os.fsencode(path), flags, MODE, ctypes.byref(buffer)):
        raise OSError(ctypes.get_errno(), "statx")
    return f"{buffer.mode & 0o7777:o}"


def act(path: str, case: Case) -> str:
    """Make the call in a new process; return its outcome and the mode that it has seen."""
    ours, theirs = socket.socketpair()
    fd = -1
    child = os.fork()
    if not child:
        try:
            if case.opener:
                PEOPLE[case.who].become()
                theirs.send(b"!")
                ours.close()
                fd = socket.recv_fds(theirs, 1, 1)[1][0]
            else:
                PEOPLE[case.who].become()
            theirs.send(outcome(path, case, fd).encode())
        finally:
            os._exit(0)
    theirs.close()
    if case.opener:
        ours.recv(1)
        opener = os.fork()
        if not opener:
            try:
                PEOPLE[case.opener].become()
                socket.send_fds(ours, [b"!"], [os.open(path, os.O_RDWR)])
            finally:
                os._exit(0)
        os.waitpid(opener, 0)
    said = ours.recv(1000).decode()
    os.waitpid(child, 0)
    ours.close()
    return said


def outcome(path: str, case: Case, fd: int) -> str:
    try:
        if case.what in BY_DESCRIPTOR:
            fd = os.open(path, os.O_RDWR) if fd < 0 else fd
            BY_DESCRIPTOR[case.what](fd)
            return f"{os.fstat(fd).st_mode & 0o7777:o}" if case.what != "mmap" else ""
        (BY_NAME.get(case.what) or ATTRIBUTES[case.what])(path)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""


def see(path: str) -> dict[str, str]:
    seen = {"DONT_SYNC": statx(path, DONT_SYNC)}  # before a call that makes the kernel send GETATTR
    seen["statx"] = statx(path, 0)  # the mode that execve(2) uses
    seen["FORCE_SYNC"] = statx(path, FORCE_SYNC)
    seen["stat"] = f"{os.stat(path).st_mode & 0o7777:o}"
    seen["capability"] = str("security.capability" in os.listxattr(path))
    return seen


def write_back(path: str) -> None:
    """Write changes in memory back to the file."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def do(tree: str, where: str) -> dict[str, dict[str, str]]:
    """Make all calls. *where* is ``lower``, or ``upper`` or ``metacopy`` after a change of mode."""
    results = {}
    for number, case in enumerate(cases()):
        path = f"{tree}/{name_of(number, BIG if where == 'metacopy' else SMALL)}"
        if where != "lower":
            set_attributes(path, case)
        statx(path, FORCE_SYNC)
        said = act(path, case)
        results[case.name()] = {"said": said, **see(path)}
        if case.what == "mmap":
            write_back(path)
        results[case.name()]["later"] = f"{os.stat(path).st_mode & 0o7777:o}"
    return results


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(sys.argv[2])
    else:
        json.dump(do(sys.argv[2], sys.argv[3]), sys.stdout)
