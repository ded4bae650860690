"""The files for the table of calls: one of each type, and directories of others. Standard library only."""

from __future__ import annotations

import ctypes
import os
import socket
import stat
from collections.abc import Callable
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
KINDS = ("file", "directory", "symlink", "fifo", "socket", "char", "block")


def libc_call(name: str, *arguments: Any) -> None:
    if getattr(_libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)


def rename(old: str, new: str, flags: int = 0) -> None:
    libc_call("renameat2", -100, os.fsencode(old), -100, os.fsencode(new), ctypes.c_uint(flags))


def try_open(path: str, flags: int, mode: int = 0o644) -> str:
    os.close(os.open(path, flags | os.O_NONBLOCK, mode))
    return "opened"


def get_mode(path: str) -> str:
    info = os.lstat(path)
    links = 0 if stat.S_ISDIR(info.st_mode) else info.st_nlink
    return f"{info.st_mode:o} {info.st_uid}:{info.st_gid} {links}"


def change_and_get_mode(path: str, change: Callable[..., None], *arguments: Any) -> str:
    change(path, *arguments)
    return get_mode(path)


def make(kind: str, path: str) -> None:
    """Create a file of type *kind*."""
    if kind == "file":
        with open(path, "wb") as file:
            file.write(b"content")
    elif kind == "directory":
        os.mkdir(path)
    elif kind == "symlink":
        os.symlink("nowhere", path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path)
    else:
        kinds = {"fifo": stat.S_IFIFO, "char": stat.S_IFCHR, "block": stat.S_IFBLK}
        os.mknod(path, kinds[kind] | 0o644, os.makedev(1, 3))


def prepare() -> None:
    """Create the files for the table: one of each kind, loops of symlinks, and directories of other users."""
    os.umask(0o022)
    for kind in KINDS:
        make(kind, kind)
    os.mkdir("d")
    make("file", "d/f")
    os.mkdir("d/sub")
    os.symlink("loop2", "loop1")
    os.symlink("loop1", "loop2")
    os.symlink("d", "to d")
    os.symlink("file", "to file")
    for name in OTHERS:
        make_others_directory(name)


OTHERS = {"theirs": (1000, 0o755), "closed": (0, 0o700), "sticky": (0, 0o1777), "all": (0, 0o777)}
"""The directories of other users, with owner and mode."""


def make_others_directory(directory: str) -> None:
    """Create a directory of OTHERS, with a file and a directory in it."""
    owner, mode = OTHERS[directory]
    os.mkdir(directory)
    make("file", f"{directory}/f")
    os.mkdir(f"{directory}/d")
    for path in (directory, f"{directory}/f", f"{directory}/d"):
        os.chown(path, owner, owner)
    os.chmod(directory, mode)


def remove(path: str) -> None:
    try:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            os.rmdir(path)
        else:
            os.unlink(path)
    except OSError:
        pass


def link_followed(path: str, new: str) -> None:
    """linkat(2) with AT_SYMLINK_FOLLOW; *path* is absolute.

    os.link() follows a link only if it has a directory to start from. Otherwise it calls link(2).
    """
    os.link(path, new, src_dir_fd=0, follow_symlinks=True)
