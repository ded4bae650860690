"""The open files of a mount by number, and the users that they are counted for."""

from __future__ import annotations

from collections import Counter

from cowfs.fuse import libfuse
from cowfs.fuse.quotas import Bounds, Quota
from cowfs.layers.base import File
from cowfs.layers.partial import PartialFile
from cowfs.layers.slow import SlowFile
from cowfs.overlay.handle import Handle
from cowfs.overlay.node import Node


class _Users:
    """The users of an open descriptor: all readers of a file share one."""

    __slots__ = ("by_uid", "payer")

    def __init__(self, payer: int) -> None:
        self.payer = payer
        self.by_uid: Counter[int] = Counter()


def _descriptor_of(file: File) -> int:
    return file.descriptor() if isinstance(file, SlowFile | PartialFile) else file.fileno()


class OpenFiles:
    """Handles by number, from 1 on. A descriptor counts for one of the users who have it open."""

    def __init__(self, bounds: Bounds, *, reads_itself: bool = True) -> None:
        """*reads_itself*: whether files with a descriptor are read without a request."""
        self._reads_itself = reads_itself
        self.opened = Quota(bounds.opened, shared=bounds.shared)
        self._descriptors = Quota(bounds.descriptors, shared=bounds.shared)
        self._handles: dict[int, Handle] = {}
        self._openers: dict[int, int] = {}
        self._users: dict[int, _Users] = {}
        """By descriptor."""
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._handles)

    def __getitem__(self, number: int) -> Handle:
        return self._handles[number]

    def nodes(self) -> list[Node]:
        """Return the nodes that are open."""
        return [handle.node for handle in self._handles.values()]

    def opener(self, number: int) -> int:
        """Return the user who opened a file."""
        return self._openers[number]

    def must_have(self, uid: int) -> None:
        """Raise EMFILE if a user may not open one more file."""
        self.opened.must_have(uid)

    def must_be_frugal(self, uid: int) -> bool:
        """Whether the next file of a user must do without a descriptor: others need the remaining ones."""
        return not self._descriptors.may_have(uid)

    def enter(self, handle: Handle, uid: int) -> int:
        """Add a file that a user has opened; return its number."""
        number = self._free.pop() if self._free else len(self._handles) + 1
        self._handles[number] = handle
        self._openers[number] = uid
        self.opened.take(uid)
        self._use(number, handle.file, uid)
        handle.number = number
        handle.on_replace = self._replaced
        return number

    def _replaced(self, handle: Handle, before: File) -> None:
        uid = self._openers[handle.number]
        if before.fileno() >= 0 and self._reads_itself:
            libfuse.read_from(handle.number, -1)
        self._use(handle.number, handle.file, uid)
        self._stop_using(before, uid)

    def leave(self, number: int) -> Handle:
        """Free a number and return its handle, which is still open."""
        handle = self._handles.pop(number)
        uid = self._openers.pop(number)
        if handle.file.fileno() >= 0 and self._reads_itself:
            libfuse.read_from(number, -1)
        self._free.append(number)
        self.opened.give_back(uid)
        self._stop_using(handle.file, uid)
        return handle

    def _use(self, number: int, file: File, uid: int) -> None:
        # Reads of a metacopy change the access time of another file than the one with its data.
        if file.fileno() >= 0 and self._reads_itself and not self._handles[number].node.metacopy:
            libfuse.read_from(number, file.fileno())
        fd = _descriptor_of(file)
        if fd < 0:
            return
        users = self._users.get(fd)
        if users is None:
            users = self._users[fd] = _Users(uid)
            self._descriptors.take(uid)
        users.by_uid[uid] += 1

    def _stop_using(self, file: File, uid: int) -> None:
        fd = _descriptor_of(file)
        if fd < 0:
            return
        users = self._users[fd]
        users.by_uid[uid] -= 1
        if users.by_uid[uid]:
            return
        del users.by_uid[uid]
        if users.payer != uid:
            return
        self._descriptors.give_back(uid)
        if users.by_uid:
            users.payer = next(iter(users.by_uid))
            self._descriptors.take(users.payer)
        else:
            del self._users[fd]
