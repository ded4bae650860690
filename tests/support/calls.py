"""A table of system calls on names and files, to compare their results between filesystems.

``python -m tests.support.calls DIRECTORY`` must run as root in an empty directory that other users can enter.
It prints JSON: the result of each line by its description. Each line is one call in one situation, as in
other test suites for POSIX.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import product
from typing import Any

from tests.support.call_things import (
    KINDS,
    change_and_get_mode,
    get_mode,
    libc_call,
    make,
    make_others_directory,
    prepare,
    remove,
    rename,
    try_open,
)

NOREPLACE, EXCHANGE = 1, 2
TOO_LONG = "n" * 256
PATH_TOO_LONG = "d/../" * 820
Call = Callable[[], Any]
Line = tuple[str, Call]

BAD_PATHS = (
    "", "missing", "missing/x", "file/x", "file/", "to file/", "loop1", "loop1/x", "fifo/x", "symlink",
    "symlink/x", TOO_LONG, f"{TOO_LONG}/x", f"d/{TOO_LONG}", PATH_TOO_LONG + "d", "d/.", "d/..", ".", "..",
    "d", "to d", "to d/",
)  # fmt: skip
"""Paths on which most calls fail or have an unusual result."""


def _shown(path: str) -> str:
    return repr(path) if len(path) < 99 else f"{path[:5]}… of {len(path)}"


def _one_path() -> Iterator[Line]:
    """Yield every call that takes one path, on every bad path."""
    calls: dict[str, Callable[[str], Any]] = {
        "stat": lambda path: oct(os.stat(path).st_mode),
        "lstat": lambda path: oct(os.lstat(path).st_mode),
        "access": lambda path: libc_call("faccessat", -100, os.fsencode(path), os.R_OK, 0),
        "open to read": lambda path: try_open(path, os.O_RDONLY),
        "open to write": lambda path: try_open(path, os.O_WRONLY),
        "open exclusively": lambda path: try_open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY),
        "open, O_CREAT in a directory": lambda path: try_open(f"{path}/", os.O_CREAT | os.O_WRONLY),
        "open, O_DIRECTORY": lambda path: try_open(path, os.O_DIRECTORY),
        "open, O_NOFOLLOW": lambda path: try_open(path, os.O_NOFOLLOW),
        "open, O_PATH": lambda path: try_open(path, os.O_PATH),
        "open, O_TMPFILE": lambda path: try_open(path, os.O_TMPFILE | os.O_RDWR),
        "truncate": lambda path: os.truncate(path, 3),
        "chmod": lambda path: os.chmod(path, 0o755),
        "chown": lambda path: os.chown(path, 0, 0),
        "lchown": lambda path: os.lchown(path, 0, 0),
        "utime": lambda path: os.utime(path, (1, 1)),
        "lutime": lambda path: os.utime(path, (1, 1), follow_symlinks=False),
        "readlink": os.readlink,
        "chdir": lambda path: os.close(os.open(path, os.O_PATH | os.O_DIRECTORY)),
        "listdir": lambda path: len(os.listdir(path)) if path != ".." else 0,
        "statfs": lambda path: os.statvfs(path).f_namemax,
        "setxattr": lambda path: os.setxattr(path, "user.a", b"1"),
        "lsetxattr": lambda path: os.setxattr(path, "user.a", b"1", follow_symlinks=False),
        "getxattr": lambda path: os.getxattr(path, "user.none"),
        "lgetxattr": lambda path: os.getxattr(path, "user.none", follow_symlinks=False),
        "removexattr": lambda path: os.removexattr(path, "user.none"),
        "unlink": os.unlink,
        "rmdir": os.rmdir,
        "mkdir": os.mkdir,
        "mkfifo": os.mkfifo,
        "mknod": lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
        "symlink": lambda path: os.symlink("target", path),
        "link to": lambda path: os.link("all/f", path),
        "link of": lambda path: os.link(path, "linked", follow_symlinks=False),
        "rename to": lambda path: rename("all/f", path),
        "rename of": lambda path: rename(path, "renamed"),
        "rename a directory to": lambda path: rename("all/d", path),
        "rename, NOREPLACE, to": lambda path: rename("all/f", path, NOREPLACE),
        "rename, EXCHANGE, with": lambda path: rename("all/f", path, EXCHANGE),
    }
    for (name, call), path in product(calls.items(), BAD_PATHS):
        yield f"{name} {_shown(path)}", partial(call, path)


def _kinds() -> Iterator[Line]:
    """Yield every call on every kind of file, and rename and link for every pair of kinds."""
    on_one: dict[str, Callable[[str], Any]] = {
        "open to read": lambda path: try_open(path, os.O_RDONLY),
        "open to write": lambda path: try_open(path, os.O_WRONLY),
        "open, O_TRUNC": lambda path: try_open(path, os.O_RDWR | os.O_TRUNC),
        "open, O_CREAT": lambda path: try_open(path, os.O_CREAT | os.O_RDWR),
        "open, O_CREAT, O_EXCL": lambda path: try_open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR),
        "open, O_CREAT, O_NOFOLLOW": lambda path: try_open(path, os.O_CREAT | os.O_NOFOLLOW | os.O_RDWR),
        "open, O_DIRECTORY": lambda path: try_open(path, os.O_DIRECTORY),
        "truncate": lambda path: os.truncate(path, 2),
        "mkdir": os.mkdir,
        "rmdir": os.rmdir,
        "mkfifo": os.mkfifo,
        "symlink": lambda path: os.symlink("x", path),
        "readlink": os.readlink,
        "chmod": lambda path: change_and_get_mode(path, os.chmod, 0o4711),
        "lchown": lambda path: change_and_get_mode(path, os.lchown, 3, 4),
        "setxattr": lambda path: os.setxattr(path, "user.a", b"1", follow_symlinks=False),
        "trusted xattr": lambda path: os.setxattr(path, "trusted.a", b"1", follow_symlinks=False),
        "default acl": lambda path: os.setxattr(
            path, "system.posix_acl_default", struct.pack("<IHHiHHiHHi", 2, 1, 7, -1, 4, 5, -1, 32, 5, -1),
            follow_symlinks=False,
        ),
        "link": lambda path: change_and_get_mode(path, partial(os.link, follow_symlinks=False), f"{path}.l"),
        "stat": get_mode,
        "unlink": os.unlink,
    }  # fmt: skip
    for (name, call), kind in product(on_one.items(), KINDS):
        yield f"{name}: a {kind}", partial(_on_new, kind, call)
    for old, new, flags in product(KINDS, (*KINDS, "directory with a file"), (0, NOREPLACE, EXCHANGE)):
        yield f"rename {flags}: {old} to {new}", partial(_rename_kinds, old, new, flags)


def _on_new(kind: str, call: Callable[[str], Any]) -> Any:
    path = f"all/new {kind}"
    make(kind, path)
    try:
        return call(path)
    finally:
        for name in (path, f"{path}.l", "nowhere", "all/nowhere"):
            remove(name)


def _rename_kinds(old: str, new: str, flags: int) -> Any:
    make(old, "all/old")
    make(new.split()[0], "all/new")
    if " " in new:
        make("file", "all/new/f")
    try:
        rename("all/old", "all/new", flags)
        return [
            get_mode(f"all/{name}") if os.path.lexists(f"all/{name}") else None for name in ("old", "new")
        ]
    finally:
        for name in ("all/old", "all/new"):
            remove(f"{name}/f")
            remove(name)


def _and_away(path: str, make_it: Callable[[str], None]) -> None:
    make_it(path)
    os.unlink(path)


def _and_back(old: str, new: str) -> None:
    rename(old, new)
    rename(new, old)


def _permissions() -> Iterator[Line]:
    """Yield calls of uid 1000 in directories of other users, each in a process of its own."""
    calls: dict[str, Callable[[str], Any]] = {
        "list": lambda path: len(os.listdir(path)),
        "stat in": lambda path: os.stat(f"{path}/f").st_size,
        "read in": lambda path: try_open(f"{path}/f", os.O_RDONLY),
        "write in": lambda path: try_open(f"{path}/f", os.O_WRONLY),
        "truncate in": lambda path: os.truncate(f"{path}/f", 7),
        "create in": lambda path: try_open(f"{path}/new", os.O_CREAT | os.O_EXCL | os.O_WRONLY),
        "remove what it made in": lambda path: os.unlink(f"{path}/new"),
        "mkdir in": lambda path: os.mkdir(f"{path}/newd"),
        "rmdir what it made in": lambda path: os.rmdir(f"{path}/newd"),
        "symlink in": lambda path: _and_away(f"{path}/s", partial(os.symlink, "x")),
        "mkfifo in": lambda path: _and_away(f"{path}/p", os.mkfifo),
        "mknod in": lambda path: os.mknod(f"{path}/c", stat.S_IFCHR | 0o600, 0x103),
        "socket in": lambda path: _and_away(f"{path}/so", partial(make, "socket")),
        "tmpfile in": lambda path: try_open(path, os.O_TMPFILE | os.O_RDWR),
        "link in": lambda path: _and_away(f"{path}/l", partial(os.link, f"{path}/f")),
        "chmod in": lambda path: os.chmod(f"{path}/f", 0o640),
        "chmod it": lambda path: os.chmod(path, os.stat(path).st_mode & 0o7777),
        "chown in": lambda path: os.chown(f"{path}/f", 1000, 1000),
        "chown to root in": lambda path: os.chown(f"{path}/f", 0, -1),
        "chgrp in": lambda path: os.chown(f"{path}/f", -1, 60),
        "touch in": lambda path: os.utime(f"{path}/f"),
        "utime in": lambda path: os.utime(f"{path}/f", (1, 1)),
        "setxattr in": lambda path: os.setxattr(f"{path}/f", "user.a", b"1"),
        "setxattr on": lambda path: os.setxattr(path, "user.a", b"1"),
        "trusted xattr in": lambda path: os.setxattr(f"{path}/f", "trusted.a", b"1"),
        "security xattr in": lambda path: os.setxattr(f"{path}/f", "security.a", b"1"),
        "acl in": lambda path: os.setxattr(
            f"{path}/f", "system.posix_acl_access",
            struct.pack("<IHHiHHiHHi", 2, 1, 6, -1, 4, 4, -1, 32, 4, -1),
        ),
        "rename in": lambda path: _and_back(f"{path}/f", f"{path}/g"),
        "rename a directory in": lambda path: _and_back(f"{path}/d", f"{path}/e"),
        "rename over in": lambda path: rename("mine/f", f"{path}/f"),
        "rename out of": lambda path: rename(f"{path}/f", "mine/g"),
        "move a directory out of": lambda path: _and_back(f"{path}/d", "mine/e"),
        "rename, EXCHANGE, with": lambda path: rename(f"{path}/f", "mine/f", EXCHANGE),
        "rename it": lambda path: rename(path, "mine/x"),
        "chdir to": os.chdir,
        "rmdir in": lambda path: os.rmdir(f"{path}/d"),
        "unlink in": lambda path: os.unlink(f"{path}/f"),
        "rmdir it": os.rmdir,
    }  # fmt: skip
    for directory, user in product(("theirs", "closed", "sticky", "all"), (1000, 1001)):
        yield f"a directory for {user}", partial(_mine, user)
        for name, call in calls.items():
            yield f"{name} {directory}, as {user}", partial(_as, user, partial(call, directory))
        yield f"{directory} made anew after {user}", partial(_anew, directory)


def _mine(user: int) -> None:
    for name in ("mine/f", "mine/g", "mine/e", "mine/x/f", "mine/x/d", "mine/x", "mine"):
        remove(name)
    os.mkdir("mine")
    make("file", "mine/f")
    for path in ("mine", "mine/f"):
        os.chown(path, user, user)


def _anew(directory: str) -> list[str]:
    found = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
    told = [f"{name} {get_mode(f'{directory}/{name}')}" for name in found]
    for name in found:
        remove(f"{directory}/{name}")
    remove(directory)
    make_others_directory(directory)
    return told


def _as(user: int, call: Call) -> Any:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            os.write(writing, json.dumps(answer(call)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = json.loads(pipe.read())
    os.waitpid(pid, 0)
    return told


def _descriptors() -> Iterator[Line]:
    """Yield calls on descriptors, with wrong open modes, file types or numbers."""
    kinds = {
        "a file to read": ("all/f", os.O_RDONLY),
        "a file to write": ("all/f", os.O_WRONLY),
        "a file to append": ("all/f", os.O_RDWR | os.O_APPEND),
        "a place": ("all/f", os.O_PATH),
        "a directory": ("d", os.O_RDONLY),
        "a fifo": ("fifo", os.O_RDWR),
    }
    calls: dict[str, Callable[[int], Any]] = {
        "read": lambda fd: os.read(fd, 3).decode(),
        "pread": lambda fd: os.pread(fd, 3, 1).decode(),
        "pread before the file": lambda fd: os.pread(fd, 1, -1).decode(),
        "write": lambda fd: os.write(fd, b"con"),
        "pwrite": lambda fd: os.pwrite(fd, b"t", 3),
        "pwrite too far": lambda fd: os.pwrite(fd, b"t", 1 << 50),
        "ftruncate": lambda fd: os.ftruncate(fd, 7),
        "ftruncate to less than nothing": lambda fd: os.ftruncate(fd, -1),
        "ftruncate too far": lambda fd: os.ftruncate(fd, 1 << 50),
        "fallocate": lambda fd: libc_call("fallocate", fd, 0, 0, 7),
        "fallocate nothing": lambda fd: libc_call("fallocate", fd, 0, 0, 0),
        "fallocate before": lambda fd: libc_call("fallocate", fd, 0, -1, 5),
        "fallocate, unknown": lambda fd: libc_call("fallocate", fd, 0x4000, 0, 5),
        "fallocate, punch without keep": lambda fd: libc_call("fallocate", fd, 2, 0, 5),
        "lseek": lambda fd: os.lseek(fd, 2, os.SEEK_SET),
        "lseek before": lambda fd: os.lseek(fd, -1, os.SEEK_SET),
        "lseek to data": lambda fd: os.lseek(fd, 0, os.SEEK_DATA),
        "lseek to a hole": lambda fd: _seek(fd, 0, os.SEEK_HOLE),
        "lseek to data beyond": lambda fd: _seek(fd, 100, os.SEEK_DATA),
        "lseek, unknown": lambda fd: os.lseek(fd, 0, 77),
        "fsync": os.fsync,
        "fdatasync": os.fdatasync,
        "fchmod": lambda fd: os.fchmod(fd, 0o644),
        "fchown": lambda fd: os.fchown(fd, 0, 0),
        "futimens": lambda fd: os.utime(fd, (1, 1)),
        "fsetxattr": lambda fd: os.setxattr(fd, "user.a", b"1"),
        "fgetxattr": lambda fd: os.getxattr(fd, "user.none"),
        "flistxattr": lambda fd: len([name for name in os.listxattr(fd) if name != "user.a"]),
        "fstat": lambda fd: oct(os.fstat(fd).st_mode),
        "fchdir": lambda fd: os.close(os.open(".", os.O_PATH, dir_fd=fd)),
        "getdents": lambda fd: len(os.listdir(fd)),
        "flock": lambda fd: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
        "fcntl lock to read": lambda fd: fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB),
        "fcntl lock to write": lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
        "O_APPEND later": lambda fd: fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND),
        "unknown ioctl": lambda fd: fcntl.ioctl(fd, 0x5401),
        "readahead": lambda fd: os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED),
        "unknown advice": lambda fd: os.posix_fadvise(fd, 0, 0, 77),
        "copy_file_range to itself": lambda fd: os.copy_file_range(fd, fd, 2, 0, 1),
        "sendfile to itself": lambda fd: os.sendfile(fd, fd, 0, 2),
    }
    for (kind, (path, flags)), (name, call) in product(kinds.items(), calls.items()):
        if kind != "a fifo" or name not in {"read", "write", "sendfile to itself"}:
            yield f"{name}, {kind}", partial(_with, path, flags, call)


def _seek(fd: int, offset: int, how: int) -> int:
    """Seek in a regular file; return 0 for others, because a directory's size depends on the filesystem."""
    return os.lseek(fd, offset, how) if stat.S_ISREG(os.fstat(fd).st_mode) else 0


def _with(path: str, flags: int, call: Callable[[int], Any]) -> Any:
    fd = os.open(path, flags | os.O_NONBLOCK)
    try:
        return call(fd)
    finally:
        os.close(fd)


TABLE = (_one_path, _kinds, _descriptors, _permissions)


def answer(call: Call) -> Any:
    """Return the result of a call, or the name of its errno."""
    try:
        result = call()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))
    return result.decode() if isinstance(result, bytes) else result


def run(directory: str) -> dict[str, Any]:
    """Run all lines; return their results by description. Remove what each line leaves behind."""
    os.chdir(directory)
    prepare()
    untouched = _look()
    answers: dict[str, Any] = {}
    for part in TABLE:
        for said, call in part():
            assert said not in answers or said.startswith("a directory for"), said
            answers[said] = answer(call)
            if part is _one_path and _look() != untouched:
                for name in os.listdir("."):
                    _clear(name)
                prepare()
                untouched = _look()
    return answers


def _clear(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _look() -> list[tuple[str, int, int]]:
    """Return the names, inode numbers and modes in the directories."""
    found = []
    for where in (".", "d", "all"):
        with suppress(OSError), os.scandir(where) as entries:
            for entry in entries:
                found.append((entry.path, entry.inode(), entry.stat(follow_symlinks=False).st_mode))
    return sorted(found)


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1])))
