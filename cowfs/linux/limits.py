"""How much of the machine this process may take."""

from __future__ import annotations

import os
import resource

_CGROUP = "/sys/fs/cgroup"


def descriptors() -> int:
    """Return how many files this process may have open (RLIMIT_NOFILE)."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else 1 << 20  # fs.nr_open's default: it has no end


def take_all_descriptors() -> None:
    """Let this process have as many files open as it may at all."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def is_lack_of_threads(error: BaseException) -> bool:
    """Whether a thread could not be started, for want of memory or by RLIMIT_NPROC (``_thread`` says so)."""
    return isinstance(error, RuntimeError) and "start new thread" in str(error)


def open_now() -> int:
    """Return how many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd")) - 1


def memory() -> int:
    """Return the bytes of memory that there are for this process: the machine's, or its cgroup's if less."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(pages, _of_cgroup(pages))


def _of_cgroup(most: int) -> int:
    """Return the smallest ``memory.max`` of the cgroups that we are in (cgroups(7), version 2)."""
    try:
        with open("/proc/self/cgroup", encoding="utf-8", errors="replace") as file:
            place = next((line[3:].strip() for line in file if line.startswith("0::")), "/")
        while place != "/":
            with open(f"{_CGROUP}{place}/memory.max", encoding="ascii") as file:
                said = file.read().strip()
            if said.isdigit():
                most = min(most, int(said))
            place = os.path.dirname(place)
    except (OSError, ValueError):  # no such controller, or not to be seen from here
        pass
    return most


def cgroup_file(name: str) -> str:
    """Return the path of a file of our cgroup (cgroups(7), version 2), whether it exists or not."""
    try:
        with open("/proc/self/cgroup", encoding="utf-8", errors="replace") as file:
            place = next((line[3:].strip() for line in file if line.startswith("0::")), "/")
    except OSError:
        place = "/"
    return f"{_CGROUP}{place.rstrip('/')}/{name}"
