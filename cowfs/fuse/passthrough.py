"""Which open files the kernel itself reads, writes and maps (docs/adr/0031-passthrough.md).

The kernel reads the data of an inode either from its own page cache or from a file that cowfs lends to it. At
any time, all open handles of an inode use the same way, and the same lent file. So the first open decides. A
file in a lower is never lent: copy-up moves its data to another file, and readers must see what is written
there.
"""

from __future__ import annotations

import errno
import logging
import os
from contextlib import suppress

from cowfs.fuse import libfuse
from cowfs.layers.base import UpperLayer
from cowfs.layers.directory import DirectoryLayer
from cowfs.linux.remote import may_wait
from cowfs.overlay.handle import Handle
from cowfs.overlay.node import Node

log = logging.getLogger(__name__)

_UNFIT = os.O_APPEND | os.O_DIRECT
"""fcntl(2) can clear these flags of an open file, but the kernel would still apply those of the open."""
_SHORT = 64 << 20
_SHORT_PART = 8
"""Space is short when less than this many bytes, and this part of all, are free: then writes come here, where
they wait until removed files are freed."""
_MUCH = 16
"""cowfs waits for a file if at most this many times its size is free."""
_NEVER = {
    errno.ELOOP: "the store's filesystem is itself on another one",
    errno.EPERM: "the daemon lacks the privileges of the system's root",
    errno.EINVAL: "the kernel does not accept the store's files",
    errno.EOPNOTSUPP: "the kernel does not accept the store's files",
    errno.ENOTTY: "this kernel does not support it",
}


def why_not(upper: UpperLayer, wanted: str) -> str:
    """Return why no file of a store can be lent to the kernel; "" if it is worth trying. May block."""
    if wanted == "off":
        return "turned off"
    if os.geteuid() != 0:
        return "only root can use it"
    if not isinstance(upper, DirectoryLayer):
        return "the daemon reads the image itself"
    try:
        waits = may_wait(upper.root.fd)
    except OSError:
        waits = True
    if waits:
        return "the store's filesystem may depend on other machines or processes"
    if not upper.atime.files and not os.fstatvfs(upper.root.fd).f_flag & os.ST_NOATIME:
        return "reading would update access times in the store"
    return ""


class _Lent:
    """A file of an inode that is lent to the kernel."""

    __slots__ = ("number", "users")

    def __init__(self, number: int) -> None:
        self.number = number
        self.users = 0


class Passthrough:
    """The files that are lent to the kernel."""

    def __init__(self, upper: UpperLayer, wanted: str) -> None:
        self._why = why_not(upper, wanted)
        self._upper = upper
        self._lent: dict[Node, _Lent] = {}
        self.pauses = False
        """Whether only what must be lent is lent, because somebody wants to see each write."""
        self._known: dict[int, bool] = {}
        """Inodes that were lent for reading. A mapping of them may remain, which the kernel does not report.
        True: the mapping may be writable."""

    @property
    def wanted(self) -> bool:
        """Whether the session should be able to lend files."""
        return not self._why

    def why_not(self) -> str:
        """Return why nothing is lent; "" if something is."""
        return self._why or libfuse.why_no_passthrough()

    def __len__(self) -> int:
        """Return how many inodes have a lent file."""
        return len(self._lent)

    def __contains__(self, node: Node) -> bool:
        """Whether an inode has a lent file."""
        return node in self._lent

    def lent(self) -> list[Node]:
        """Return the files that are lent."""
        return list(self._lent)

    def written_by(self) -> list[int]:
        """Return the inodes that the kernel may write through a mapping, without an open file."""
        return [ino for ino, changes in self._known.items() if changes]

    def may_change(self, ino: int) -> bool:
        """Whether a mapping may change an inode's times without the kernel noticing."""
        return self._known.get(ino, False)

    def forget(self, ino: int) -> None:
        """Note that the kernel has forgotten an inode, so that it has no mapping."""
        self._known.pop(ino, None)

    def opened(self, handle: Handle, flags: int) -> bool:
        """Lend a file that was just opened to the kernel, if possible.

        Return whether the times that the kernel has cached for the inode can be wrong from now on.
        """
        node = handle.node
        if self._why or node.upper is None or node.metacopy:
            return False
        access = flags & os.O_ACCMODE
        lasts = not flags & (os.O_DIRECT if access == os.O_RDONLY else _UNFIT) and access != os.O_ACCMODE
        lent = self._lent.get(node)
        if lent is None:
            if handle.file.fileno() < 0:
                return False
            others = node.handles is not None and len(node.handles) > 1
            fit = node.ino in self._known or (lasts and not self.pauses and self._is_fit(access))
            lent = None if others or not fit else self._lend(handle)
            if lent is None:
                return False
            self._lent[node] = lent
        lent.users += 1
        libfuse.pass_through(handle.number, lent.number, direct=not lasts)
        changes = access == os.O_RDWR and not self._known.get(node.ino)
        if changes or (access != os.O_WRONLY and node.ino not in self._known):
            self._known[node.ino] = changes
        return changes

    def _is_fit(self, access: int) -> bool:
        return access == os.O_RDONLY or not self._room_is_short()

    def _room_is_short(self, removed: int = 0) -> bool:
        room = self._upper.statfs()
        free = room.bavail * room.frsize
        return free < max(min(_SHORT, room.blocks * room.frsize // _SHORT_PART), _MUCH * removed)

    def wants_room(self, removed: int) -> bool:
        """Whether the kernel, which writes without asking us for space, may soon need the space of a removed
        file of this size.
        """
        return bool(self._lent) and self._room_is_short(removed)

    def _lend(self, handle: Handle) -> _Lent | None:
        if libfuse.why_no_passthrough():
            return None
        try:
            return _Lent(libfuse.lend(handle.file.fileno()))
        except OSError as error:
            if error.errno in _NEVER:
                self._why = _NEVER[error.errno]
                log.info("files are read and written through the daemon: %s", self._why)
            return None

    def closed(self, handle: Handle) -> None:
        """Note that a file was closed, and take it back from the kernel."""
        lent = self._lent.get(handle.node)
        if lent is None:
            return
        libfuse.pass_through(handle.number, 0)
        lent.users -= 1
        if not lent.users:
            del self._lent[handle.node]
            with suppress(OSError):  # the filesystem is unmounted, and nothing is lent any more
                libfuse.take_back(lent.number)
