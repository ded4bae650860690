"""Find the processes that use a filesystem, as fuser(1) does, as far as they are visible."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from cowfs.linux.mount_table import MountInfo, mount_id, parse_mountinfo

_LINKS = {"cwd": "its directory", "root": "its root", "exe": "running"}


class Use(NamedTuple):
    """A file that a process uses."""

    pid: int
    program: str
    """The name of the process (proc_pid_comm(5)), not escaped."""
    path: bytes
    """The path of the file as the process sees it."""
    how: str


def uses_of(dev: str) -> Iterator[Use]:
    """Yield the files of the filesystem ``major:minor`` that other processes use: open, mapped or executed.

    Does not ask any filesystem. Only root sees other users' processes.
    """
    namespaces: dict[str, set[int]] = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if int(pid) == os.getpid():
            continue
        with suppress(OSError):  # it has ended, or is another user's
            with open(f"/proc/{pid}/comm", encoding="utf-8", errors="surrogateescape") as comm:
                program = comm.read().rstrip("\n")
            for path, how in _used(pid, dev, _mounts_of(pid, dev, namespaces)):
                yield Use(int(pid), program, path, how)


def mounted_within(dev: str) -> list[MountInfo]:
    """Return the mounts, in this namespace, on directories of the filesystem ``major:minor``."""
    with open("/proc/self/mountinfo", "rb") as table:
        mounts = parse_mountinfo(table.read())
    own = {mount.id for mount in mounts if mount.dev == dev}
    return [mount for mount in mounts if mount.parent in own]


def _mounts_of(pid: str, dev: str, known: dict[str, set[int]]) -> set[int]:
    namespace = os.readlink(f"/proc/{pid}/ns/mnt")
    if namespace not in known:
        with open(f"/proc/{pid}/mountinfo", "rb") as table:
            known[namespace] = {mount.id for mount in parse_mountinfo(table.read()) if mount.dev == dev}
    return known[namespace]


def _used(pid: str, dev: str, mounts: set[int]) -> Iterator[tuple[bytes, str]]:
    major, _, minor = dev.partition(":")
    if mounts:
        for link, how in _LINKS.items():
            with suppress(OSError):
                path = os.readlink(os.fsencode(f"/proc/{pid}/{link}"))
                fd = os.open(f"/proc/{pid}/{link}", os.O_PATH | os.O_CLOEXEC)
                try:  # no stat(2): the filesystem may hang
                    place = mount_id(fd)
                finally:
                    os.close(fd)
                if place in mounts:
                    yield path, how
    for number in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):  # closed meanwhile
            with open(f"/proc/{pid}/fdinfo/{number}", "rb") as info:
                lines = info.read().split(b"\n")
            place = next((int(line.split()[1]) for line in lines if line.startswith(b"mnt_id:")), -1)
            if place in mounts:
                yield os.readlink(os.fsencode(f"/proc/{pid}/fd/{number}")), "open"
    with open(f"/proc/{pid}/maps", "rb") as maps:
        own = b"%02x:%02x" % (int(major), int(minor))
        mapped = {line.split(b" ", 5)[5].strip() for line in maps if line.split(b" ", 4)[3] == own}
    yield from ((path, "mapped") for path in sorted(mapped))
