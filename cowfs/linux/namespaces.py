"""The mounts in the namespaces of other processes, as far as they are visible."""

from __future__ import annotations

import os
from collections.abc import Iterator

from cowfs.linux.mount_table import MountInfo, parse_mountinfo


def mounted_elsewhere() -> Iterator[tuple[int, list[MountInfo]]]:
    """Yield, for each other mount namespace, the pid of a process in it, and its mounts."""
    seen = {_namespace("self")}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            namespace = _namespace(pid)
            if namespace in seen:
                continue
            seen.add(namespace)
            with open(f"/proc/{pid}/mountinfo", "rb") as table:
                mounts = parse_mountinfo(table.read())
        except OSError:
            continue  # it has ended, or is another user's
        yield int(pid), mounts


def is_seen(pid: int) -> bool:
    """Whether the mounts of a process are visible. They are not in a sibling user namespace."""
    try:
        with open(f"/proc/{pid}/uid_map", "rb") as theirs, open("/proc/self/uid_map", "rb") as ours:
            return theirs.read() == ours.read() or bool(_namespace(str(pid)))
    except OSError:
        return False


def _namespace(pid: str) -> str:
    return os.readlink(f"/proc/{pid}/ns/mnt")
