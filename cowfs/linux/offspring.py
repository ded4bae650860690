"""The processes that a command has started and left running."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36  # include/uapi/linux/prctl.h
_LONGEST = 10.0
"""Seconds to wait for killed processes to end."""
_libc = ctypes.CDLL(None, use_errno=True)


def become_subreaper() -> set[int]:
    """Become a subreaper (prctl(2)): orphaned descendants become children. Return the current children."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    return _children()


def end_all(spared: set[int], patience: float = 2.0) -> tuple[list[str], list[str]]:
    """End all descendants except those *spared*; return the programs that ended, and those that did not.

    Even SIGKILL does not end a process that waits for a disk or a server. Blocks: sends SIGTERM, waits
    *patience* seconds, then sends SIGKILL. It kills processes that it finds later at once, since some fork
    again and again.
    """
    names: dict[int, str] = {}
    late_at = time.monotonic() + patience
    while True:
        found, some_ended = _alive(spared)
        if not found and not some_ended:
            break
        now = time.monotonic()
        late = now > late_at
        if now > late_at + _LONGEST:
            left = [names.pop(pid, f"{_name(pid)} ({pid})") for pid in found]
            return list(names.values()), left
        for pid in found:
            is_known = pid in names
            names.setdefault(pid, f"{_name(pid)} ({pid})")
            if late or not is_known:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        if not late:
            time.sleep(0.01)
    return list(names.values()), []


def _alive(spared: set[int]) -> tuple[list[int], bool]:
    """Return the children that have not ended, and whether others have: this process has adopted theirs."""
    children = _children() - spared
    alive = []
    for pid in children:
        with suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                alive.append(pid)
    return alive, len(alive) < len(children)


def _children() -> set[int]:
    with suppress(OSError):  # kernels without CONFIG_PROC_CHILDREN
        return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError, ValueError):
            if int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(pid))
    return found


def _name(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    return "?"
