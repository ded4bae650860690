"""The kernel's table of mounts, and the mount that a path or descriptor is on."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True, slots=True)
class MountInfo:
    """One line of /proc/PID/mountinfo (proc_pid_mountinfo(5)), its octal escapes decoded."""

    id: int
    parent: int
    dev: str
    """``major:minor`` of the st_dev of its files."""
    root: bytes
    """The directory of the filesystem that is mounted here."""
    mountpoint: bytes
    options: str
    fstype: str
    source: bytes
    super_options: str
    super_words: tuple[str, ...]
    """The same, split at the commas between options, not at those within a name."""


_ESCAPE = re.compile(rb"\\([0-7]{3})")


def _unescape(text: bytes) -> bytes:
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), text)


def parse_mountinfo(text: bytes) -> list[MountInfo]:
    """Return the mounts that a mountinfo file lists, in its order."""
    # Not splitlines(): a mountpoint may contain \r, \f or \v.
    return [_parse_line(line) for line in text.split(b"\n") if line]


@lru_cache(maxsize=1024)
def _parse_line(line: bytes) -> MountInfo:
    """Return the mount of one line. Most lines stay the same from one reading of the table to the next."""
    fields = line.split(b" ")
    dash = fields.index(b"-", 6)  # after a number of optional fields
    fstype, source, super_options = fields[dash + 1 : dash + 4]
    return MountInfo(
        id=int(fields[0]),
        parent=int(fields[1]),
        dev=fields[2].decode(),
        root=_unescape(fields[3]),
        mountpoint=_unescape(fields[4]),
        options=fields[5].decode(),
        fstype=_unescape(fstype).decode(errors="replace"),
        source=_unescape(source),
        super_options=os.fsdecode(_unescape(super_options)),
        super_words=tuple(os.fsdecode(_unescape(word)) for word in super_options.split(b",")),
    )


def mountinfo() -> list[MountInfo]:
    """Return the mounts of this mount namespace, oldest first. Needs no privilege."""
    return parse_mountinfo(Path("/proc/self/mountinfo").read_bytes())


def visible(table: list[MountInfo]) -> list[MountInfo]:
    """Return the mounts of *table* that their paths lead to, which no later mount hides.

    Asks only the table, because a filesystem may never answer.
    """
    by_id = {mount.id: mount for mount in table}
    places: dict[int, set[bytes]] = {}
    for mount in table:
        places.setdefault(mount.parent, set()).add(mount.mountpoint)

    def is_reached(mount: MountInfo) -> bool:
        while True:
            parent = by_id.get(mount.parent)
            if parent is None or parent is mount:
                return True
            path = mount.mountpoint
            if path == b"/" or path.endswith(b"//deleted"):  # path lookup starts in the mount on /
                return False
            above = (path[:at] for at in range(1, len(path)) if path[at : at + 1] == b"/")
            if not places[mount.parent].isdisjoint(above):
                return False
            mount = parent

    def is_on_top(mount: MountInfo) -> bool:
        return mount.mountpoint == b"/" or mount.mountpoint not in places.get(mount.id, ())

    return [mount for mount in table if is_on_top(mount) and is_reached(mount)]


def mount_of(path: str | bytes | os.PathLike[str]) -> MountInfo | None:
    """Return the topmost mount whose mountpoint is *path* itself (made absolute, not resolved)."""
    wanted = os.fsencode(os.path.abspath(path))
    found = [mount for mount in mountinfo() if mount.mountpoint == wanted]
    return found[-1] if found else None


def mount_id(fd: int) -> int:
    """Return the number of the mount that *fd* was opened in: ``id`` of its MountInfo, if it has one."""
    text = Path(f"/proc/self/fdinfo/{fd}").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("mnt_id:"))


def where_is(fd: int) -> tuple[str, bytes]:
    """Return the filesystem (``major:minor``) that *fd* is on, and its path from the root of that filesystem.

    The path does not depend on the mount through which *fd* was opened.
    """
    path, at = os.readlink(b"/proc/self/fd/%d" % fd), mount_id(fd)
    for mount in mountinfo():
        if mount.id == at:
            return mount.dev, mount.root.rstrip(b"/") + path[len(mount.mountpoint.rstrip(b"/")) :]
    device = os.fstat(fd).st_dev
    return f"{os.major(device)}:{os.minor(device)}", path
