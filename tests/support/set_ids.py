"""Find out which calls remove set-ID bits: every call, by every user, on every kind of mode.

``python -m tests.support.set_ids DIRECTORY`` must run as root in a tree that :func:`build` has made. It
prints JSON: the result of each call, and the modes that four kinds of stat return, to the caller and to
others.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_STATX_MODE, _EMPTY_PATH, _DONT_SYNC, _FORCE_SYNC = 2, 0x1000, 0x4000, 0x2000
_PUNCH_KEEP, _KEEP, _ZERO = 3, 1, 0x10
ACL = "system.posix_acl_access"
OWNER, GROUP = 1000, 50

FILES = {
    "2775": (0o2775, OWNER, GROUP),
    "2766": (0o2766, OWNER, GROUP),
    "6777": (0o6777, OWNER, GROUP),
    "4777": (0o4777, OWNER, OWNER),
    "2777 of 60": (0o2777, OWNER, 60),
}
"""Mode, owner and group."""
CALLERS: dict[str, tuple[int, int, list[int]]] = {
    "owner": (OWNER, OWNER, []),
    "owner in the group": (OWNER, OWNER, [GROUP]),
    "member": (1001, 1001, [GROUP]),
    "stranger": (1002, 1002, []),
    "root": (0, 0, []),
}


def statx_mode(path: str, flags: int, fd: int = -100) -> str:
    """Return the mode that statx(2) returns if asked only for the mode."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.statx(fd, os.fsencode(path), flags, _STATX_MODE, buffer):
        return f"errno {ctypes.get_errno()}"
    return f"{struct.unpack_from('=H', buffer, 28)[0]:o}"


def modes(path: str) -> list[str]:
    """Return the modes of statx(2) with and without a request to the daemon, and of stat(2)."""
    asked = [statx_mode(path, flags) for flags in (_DONT_SYNC, 0, _FORCE_SYNC)]
    return [*asked, f"{os.stat(path).st_mode:o}"]


def acl(*permissions: int, user: int | None = None) -> bytes:
    """Return an ACL for owner, group and others, and one more *user*, in the kernel's format."""
    owner, group, others = permissions
    entries = [(1, owner, -1), (4, group, -1), (0x20, others, -1)]
    if user is not None:
        entries = [entries[0], (2, 6, user), entries[1], (0x10, group, -1), entries[2]]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)


def _opened(flags: int, use: Callable[[int], Any] = lambda fd: None) -> Callable[[str], Any]:
    def operation(path: str) -> Any:
        fd = os.open(path, flags)
        try:
            return use(fd)
        finally:
            os.close(fd)

    return operation


def _write_mapped(fd: int) -> list[str]:
    with mmap.mmap(fd, os.fstat(fd).st_size) as memory:
        memory[0] = 65
        before = modes(f"/proc/self/fd/{fd}")
        memory.flush()
    return before


def _write_direct(fd: int) -> int:
    with mmap.mmap(-1, 4096) as memory:
        return os.pwritev(fd, [memory], 0)


def _write_and_look(fd: int) -> list[str]:
    os.write(fd, b"xy")
    told = [statx_mode("", flags | _EMPTY_PATH, fd) for flags in (_DONT_SYNC, 0)]
    return [*told, *modes(f"/proc/self/fd/{fd}")]


def _copy_range(path: str) -> int:
    source, target = os.open(f"{path}.source", os.O_RDONLY), os.open(path, os.O_WRONLY)
    try:
        return os.copy_file_range(source, target, 3)
    finally:
        os.close(source)
        os.close(target)


def _splice(fd: int) -> int:
    reading, writing = os.pipe()
    try:
        os.write(writing, b"abc")
        return os.splice(reading, fd, 3)
    finally:
        os.close(reading)
        os.close(writing)


def _allocate(mode: int, size: int) -> Callable[[int], None]:
    def use(fd: int) -> None:
        if _libc.fallocate(fd, mode, ctypes.c_long(0), ctypes.c_long(size)):
            raise OSError(ctypes.get_errno(), "fallocate")

    return use


def _set_acl(value: bytes) -> Callable[[str], None]:
    return lambda path: os.setxattr(path, ACL, value)


def _and_back(path: str) -> None:
    os.rename(path, f"{path}.r")
    os.rename(f"{path}.r", path)


OPERATIONS: dict[str, Callable[[str], Any]] = {
    "acl, of three": _set_acl(acl(7, 7, 5)),
    "acl, group may not execute": _set_acl(acl(7, 6, 5)),
    "acl, with a user": _set_acl(acl(7, 7, 5, user=1003)),
    "acl, with a user, may not execute": _set_acl(acl(6, 6, 4, user=1003)),
    "acl of nothing": _set_acl(struct.pack("<I", 2)),
    "acl removed": lambda path: os.removexattr(path, ACL),
    "no acl removed": lambda path: os.removexattr(path, ACL),
    "chmod 6755": lambda path: os.chmod(path, 0o6755),
    "chmod 2777": lambda path: os.chmod(path, 0o2777),
    "chmod 644": lambda path: os.chmod(path, 0o644),
    "fchmod 2771": _opened(os.O_RDONLY, lambda fd: os.fchmod(fd, 0o2771)),
    "chown to itself": lambda path: os.chown(path, os.stat(path).st_uid, os.stat(path).st_gid),
    "chown to nobody": lambda path: os.chown(path, -1, -1),
    "chown to the owner": lambda path: os.chown(path, OWNER, OWNER),
    "chgrp to the owner's": lambda path: os.chown(path, -1, OWNER),
    "chgrp to another": lambda path: os.chown(path, -1, 61),
    "chown to another": lambda path: os.chown(path, 1002, -1),
    "truncate to its size": lambda path: os.truncate(path, os.stat(path).st_size),
    "truncate to nothing": lambda path: os.truncate(path, 0),
    "truncate to more": lambda path: os.truncate(path, 20_000),
    "truncate to too much": lambda path: os.truncate(path, 1 << 62),
    "ftruncate": _opened(os.O_RDWR, lambda fd: os.ftruncate(fd, 1)),
    "open with O_TRUNC": _opened(os.O_WRONLY | os.O_TRUNC),
    "open to write": _opened(os.O_WRONLY),
    "write": _opened(os.O_WRONLY, lambda fd: os.write(fd, b"xy")),
    "write nothing": _opened(os.O_WRONLY, lambda fd: os.write(fd, b"")),
    "append": _opened(os.O_WRONLY | os.O_APPEND, lambda fd: os.write(fd, b"xy")),
    "pwritev": _opened(os.O_WRONLY, lambda fd: os.pwritev(fd, [b"xy", b"z"], 1)),
    "write and look": _opened(os.O_RDWR, _write_and_look),
    "write directly": _opened(os.O_RDWR | os.O_DIRECT, _write_direct),
    "write through a mapping": _opened(os.O_RDWR, _write_mapped),
    "copy_file_range": _copy_range,
    "splice": _opened(os.O_WRONLY, _splice),
    "fallocate": _opened(os.O_WRONLY, _allocate(0, 9000)),
    "fallocate, same size": _opened(os.O_WRONLY, _allocate(_KEEP, 9000)),
    "punch a hole": _opened(os.O_WRONLY, _allocate(_PUNCH_KEEP, 4096)),
    "zero a range": _opened(os.O_WRONLY, _allocate(_ZERO, 4096)),
    "utime": os.utime,
    "setxattr": lambda path: os.setxattr(path, "user.x", b"1"),
    "link": lambda path: os.link(path, f"{path}.l"),
    "rename": _and_back,
}


def _place(directory: str | Path, operation: str, caller: str, file: str) -> str:
    names = list(OPERATIONS).index(operation), list(CALLERS).index(caller), file.replace(" ", "_")
    return os.path.join(directory, ".".join(map(str, names)))


def build(directory: Path) -> None:
    """Create a file for each operation, caller and mode."""
    directory.mkdir()
    directory.chmod(0o777)
    for operation in OPERATIONS:
        for caller in CALLERS:
            for file, (mode, uid, gid) in FILES.items():
                path = _place(directory, operation, caller, file)
                Path(path).write_bytes(b"data" * 1500)
                os.chown(path, uid, gid)
                if operation == "acl removed":
                    os.setxattr(path, ACL, acl(7, 7, 7, user=1003))
                os.chmod(path, mode)
                if operation == "copy_file_range":
                    Path(f"{path}.source").write_bytes(b"abcdef")


def run(directory: str) -> dict[str, Any]:
    """Make all calls; return the results by description."""
    os.chdir(directory)  # other users may not enter the directories above it
    return {
        f"{operation}, by {caller}, of {file}": _as(caller, _place("", operation, caller, file), act)
        for operation, act in OPERATIONS.items()
        for caller in CALLERS
        for file in FILES
    }


def _as(caller: str, path: str, act: Callable[[str], Any]) -> list[Any]:
    uid, gid, groups = CALLERS[caller]
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups(groups)
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            os.stat(path)
            try:
                result = act(path)
            except OSError as error:
                result = f"errno {error.errno}"
            os.write(writing, json.dumps([result, modes(path)]).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        told: list[Any] = json.loads(answer.read())
    os.waitpid(pid, 0)
    return [*told, modes(path)]


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1])))
