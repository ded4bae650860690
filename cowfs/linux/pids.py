"""Wait for processes that are not children of this one."""

from __future__ import annotations

import os
import select


def wait_pid_gone(pid: int, timeout: float) -> bool:
    """Wait at most *timeout* seconds until process *pid* has ended; return whether it has. Blocks."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(timeout * 1000))
    finally:
        os.close(fd)
