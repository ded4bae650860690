"""The resource limits of this process: open files, memory, threads."""

from __future__ import annotations

import os
import resource
import threading
from contextlib import suppress

_ANY_NICE = 40
"""The RLIMIT_NICE that allows any nice value."""
_CGROUP = "/sys/fs/cgroup"


def descriptors() -> int:
    """Return how many files this process may have open (RLIMIT_NOFILE)."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else 1 << 20  # unlimited: the default of fs.nr_open


def take_all_descriptors() -> None:
    """Raise the limit of open files to the hard limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def may_step_back() -> bool:
    """Let threads leave SCHED_OTHER for SCHED_IDLE for a moment; whether they can come back (sched(7)).

    That needs RLIMIT_NICE, which this raises if it may, or CAP_SYS_NICE.
    """
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NICE, (_ANY_NICE, _ANY_NICE))
    came_back = False

    def attempt() -> None:
        nonlocal came_back
        with suppress(OSError):
            if os.sched_getscheduler(0) == os.SCHED_OTHER:
                os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
                os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
                came_back = True

    thread = threading.Thread(target=attempt)  # which ends, if it cannot come back
    try:
        thread.start()
    except RuntimeError:
        return False
    thread.join()
    return came_back


def steps_back_by_limit() -> bool:
    """Whether that needs no capability."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NICE)
    return soft == resource.RLIM_INFINITY or soft >= _ANY_NICE


def is_lack_of_threads(error: BaseException) -> bool:
    """Whether *error* means that a thread could not be started, for lack of memory or by RLIMIT_NPROC."""
    return isinstance(error, RuntimeError) and "start new thread" in str(error)


def open_now() -> int:
    """Return how many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd")) - 1


def memory() -> int:
    """Return the memory available to this process in bytes: the machine's, or its cgroup's limit if less."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(pages, _of_cgroup(pages))


def _of_cgroup(most: int) -> int:
    """Return the smallest ``memory.max`` of this process's cgroups (cgroups(7), version 2), or *most*."""
    try:
        with open("/proc/self/cgroup", encoding="utf-8", errors="replace") as file:
            place = next((line[3:].strip() for line in file if line.startswith("0::")), "/")
        while place != "/":
            with open(f"{_CGROUP}{place}/memory.max", encoding="ascii") as file:
                said = file.read().strip()
            if said.isdigit():
                most = min(most, int(said))
            place = os.path.dirname(place)
    except (OSError, ValueError):  # no such controller, or not visible from here
        pass
    return most


def cgroup_file(name: str) -> str:
    """Return the path of a file of this process's cgroup (cgroups(7), version 2). It may not exist."""
    try:
        with open("/proc/self/cgroup", encoding="utf-8", errors="replace") as file:
            place = next((line[3:].strip() for line in file if line.startswith("0::")), "/")
    except OSError:
        place = "/"
    return f"{_CGROUP}{place.rstrip('/')}/{name}"
