"""Turn the keys of a directory layer into descriptors of its inodes.

Every path is a single name, so trees deeper than PATH_MAX work. Nothing that leads out of the directory is
followed. If another inode has replaced the one that was looked up, it is not touched: ESTALE
(:mod:`cowfs.layers.beneath`).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from cowfs.errors import os_error
from cowfs.layers import beneath
from cowfs.layers.base import at_once
from cowfs.layers.beneath import DIRECTORY, PLAIN, REGULAR, check_name, enclosed, stale
from cowfs.layers.keys import CoveredKey, PathKey
from cowfs.layers.unlinked import Nameless
from cowfs.linux import files, limits
from cowfs.types import Attr

R = TypeVar("R")

_OPEN_DIRECTORIES = 512
"""How many directory descriptors a layer keeps open at most."""
_PART = 8
"""All layers together keep this fraction of all descriptors."""
_FEWEST = 4
_LARGE = 16 << 20
"""Freeing this many bytes is long work."""
_KEPT_CHAIN = 64
"""Descriptors of all directories above are kept too when a directory is less deep than this, of some if not:
then the way to the next one in the same place is not as long."""


class Descriptors:
    """The tree below *root_fd*, which it owns from now on, and its open descriptors.

    *alone*: nothing can be mounted in it, because *root_fd* is the root of a mount that is in no namespace.
    """

    _alive = 0
    """How many of them are open."""

    def __init__(self, root_fd: int, name: str, *, alone: bool = False) -> None:
        self.name = name
        info = os.fstat(root_fd)
        if not stat.S_ISDIR(info.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), name)
        self._given = root_fd
        root, self._ways = (root_fd, PLAIN) if alone else enclosed(root_fd)
        self._has_own_mount = alone or root != root_fd
        self._stat = self._ways.stat
        self.dev = info.st_dev
        self._open: list[PathKey] = []  # directories with a cached descriptor, oldest first
        self._nameless = Nameless(self._dir_fd, self._by_fd)
        self._magic = files.fs_magic(root_fd)
        self._mark = beneath.marker(self._magic, self.dev)
        self.root = PathKey(None, b"", self._mark(info), root)
        self.later: Callable[[Callable[[], None]], None] = at_once
        self.pressed: Sequence[int] = (0,)
        Descriptors._alive += 1

    def _dir_fd(self, key: PathKey) -> int:
        """Return a descriptor of a directory, valid until the next call that opens one."""
        return key.fd if key.fd >= 0 else self._open_dir(key)

    def _most(self) -> int:
        """Return how many directories may be kept open."""
        return max(_FEWEST, min(_OPEN_DIRECTORIES, limits.descriptors() // _PART // Descriptors._alive))

    def _open_dir(self, key: PathKey) -> int:
        most = self._most()
        if len(self._open) >= most:
            self._close_oldest()
        chain = []
        walk = key
        while walk.fd < 0:
            chain.append(walk)
            if walk.parent is None:
                raise stale(walk.name)
            walk = walk.parent
        fd = walk.fd
        every = 1 if len(chain) < min(_KEPT_CHAIN, most) else max(_KEPT_CHAIN, 4 * len(chain) // most)
        for depth, step in enumerate(reversed(chain), 1 - len(chain)):
            above, above_is_kept = fd, step.parent.fd >= 0 if step.parent else True
            try:
                fd = self._enter(above, step)
            finally:
                if not above_is_kept:
                    os.close(above)
            if depth % every == 0:
                step.fd = fd
                self._open.append(step)
        return fd

    def _place(self, directory: PathKey, name: bytes) -> int:
        """Return a descriptor of a directory in which to create, move or remove a name."""
        check_name(name)
        return self._dir_fd(directory)

    def _above(self, key: PathKey) -> int:
        """Return a descriptor of the directory in which *key* has its name.

        ESTALE if it has no name, EXDEV if something is mounted on it.
        """
        if key.parent is None or isinstance(key, CoveredKey):
            code = errno.ESTALE if key.parent is None else errno.EXDEV
            raise os_error(code, key.name)
        return self._dir_fd(key.parent)

    def _close_oldest(self) -> None:
        count = len(self._open) // 2
        old, self._open = self._open[:count], self._open[count:]
        for key in old:
            # This descriptor pins a directory that lost its name: do not close it.
            if key.fd >= 0 and key.parent is not None:
                os.close(key.fd)
                key.fd = -1

    def _two_dir_fds(self, first: PathKey, second: PathKey) -> tuple[int, int]:
        self._dir_fd(first)
        fd = self._dir_fd(second)
        return self._dir_fd(first), fd  # opening the second may have evicted the first from the cache

    def _enter(self, above: int, key: PathKey) -> int:
        """Return a descriptor of the inode of *key* in the directory *above*. ESTALE if another is there
        now."""
        fd = self._ways.open(above, key.name, os.O_PATH)
        if self._mark(os.fstat(fd)) != key.mark:
            os.close(fd)
            raise stale(key.name)
        return fd

    def _reach(self, key: PathKey) -> int:
        """Return a descriptor (O_PATH) of an inode; pass it to :meth:`_leave` afterwards."""
        if key.fd >= 0:
            return key.fd
        above = self._above(key)
        return self._open_dir(key) if key.mark & 15 == DIRECTORY else self._enter(above, key)

    def _leave(self, key: PathKey, fd: int) -> None:
        if fd != key.fd:
            os.close(fd)

    def _by_fd(self, key: PathKey, call: Callable[..., R], *arguments: object) -> R:
        """Apply a function of :mod:`~cowfs.layers.beneath` that takes a descriptor to an inode."""
        fd = self._reach(key)
        try:
            return call(fd, *arguments)
        finally:
            self._leave(key, fd)

    @contextmanager
    def _pinned(self, key: PathKey) -> Iterator[None]:
        """Pin an inode whose name is removed in the block; undo that if the removal fails."""
        many = self._nameless.are_many()
        name = self._nameless.hide(key) if many else None
        attr = self.plain_stat(key) if many and key.mark & 15 == DIRECTORY else None
        if name is not None:
            try:
                yield
            except OSError:
                self._nameless.remove(name)
                raise
            self._nameless.has_only(key, name)
        elif attr is not None:
            yield
            self._close_directory(key)
            key.parent = None
            self._nameless.leaves(key, attr)
        else:
            fresh = key.fd < 0
            self._pin(key)
            try:
                yield
            except OSError:
                self._unpin(key, fresh)
                raise
            key.parent = None

    def _pin(self, key: PathKey) -> None:
        key.fd = self._reach(key)
        if key.mark & 15 == DIRECTORY and key in self._open:
            self._open.remove(key)
        self._nameless.pinned.add(key)

    def _unpin(self, key: PathKey, fresh: bool) -> None:
        self._nameless.pinned.discard(key)
        if fresh:
            os.close(key.fd)
            key.fd = -1
        else:
            self._open.append(key)

    def _close_directory(self, key: PathKey) -> None:
        if key.fd >= 0:
            self._open.remove(key)
            os.close(key.fd)
            key.fd = -1

    def hide_in(self, place: PathKey) -> None:
        """Set the directory in which inodes without a name get hidden names.

        They get one if they are too many to keep a descriptor for each.
        """
        self._nameless.place = place

    def descriptor(self, key: PathKey) -> int:
        """Return a descriptor (O_PATH) of an inode, for the caller to close."""
        return self._by_fd(key, os.dup)

    def plain_stat(self, key: PathKey) -> Attr:
        """Return the real attributes, without notes."""
        if key.fd >= 0:
            return os.fstat(key.fd)
        if isinstance(key, CoveredKey):
            return key.attr
        above = key.parent
        if above is None:
            left = self._nameless.attributes(key)
            if left is not None:
                return left
        fd = above.fd if above is not None and above.fd >= 0 else self._above(key)
        attr: Attr = self._stat(fd, key.name)
        if self._mark(attr) != key.mark:
            raise stale(key.name)
        return self._nameless.seen(key.mark, attr) if self._nameless.hidden else attr

    def forget(self, key: PathKey) -> None:
        if key.parent is None or key.parent is self._nameless.place:
            self._nameless.forget(key)
        if key.fd >= 0 and key is not self.root:
            if key.parent is not None:
                self._open.remove(key)
            fd, key.fd = key.fd, -1
            if key.mark & 15 == REGULAR and os.fstat(fd).st_blocks > _LARGE // 512:
                self.later(lambda: os.close(fd))  # closing the last descriptor frees its blocks
            else:
                os.close(fd)

    def close(self) -> None:
        if self.root.fd >= 0:
            self._nameless.close()
        for key in self._open:
            if key.fd >= 0:
                os.close(key.fd)
                key.fd = -1
        self._open.clear()
        if self.root.fd >= 0:
            Descriptors._alive -= 1
            for fd in {self.root.fd, self._given}:
                os.close(fd)
            self.root.fd = -1


def stands_at(key: PathKey, place: tuple[PathKey, bytes]) -> bool:
    """Whether a key is known by this directory and this name."""
    return key.parent is place[0] and key.name == place[1]
