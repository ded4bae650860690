"""Helpers for quick cases: open flags that fail, ACLs, fallocate(2)."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Generator
from typing import Any

from tests.parity.quick import errno_of
from tests.parity.script import Script
from tests.support.tree import RECENT_NS

Steps = Generator[None, None, None]
Acts = tuple[tuple[str, Callable[[], Any]], ...]
KEEP, PUNCH, COLLAPSE, ZERO, INSERT = 1, 2, 8, 16, 32
ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
OLD = 1_234_567_890_000_000_000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    if _libc.fallocate(fd, mode, offset, size):
        raise OSError(ctypes.get_errno(), "fallocate")


def fails(s: Script, path: str, flags: int, said: str = "") -> None:
    s.step(
        f"open {path} {flags:#o} {said}",
        lambda: errno_of(lambda: os.close(os.open(s.at(path), flags, 0o644))),
    )


def acl(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)


def full(owner: int, user: int, group: int, mask: int, others: int, who: int = 1000) -> bytes:
    return acl((1, owner, -1), (2, user, who), (4, group, -1), (0x10, mask, -1), (0x20, others, -1))


def is_new(s: Script, path: str) -> bool:
    return os.lstat(s.at(path)).st_mtime_ns > RECENT_NS
