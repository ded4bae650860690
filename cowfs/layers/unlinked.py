"""Keep inodes of a directory layer that lost their names while they are in use.

Each is kept by a descriptor. A user who holds many of them (cowfs is not told of open(2) with O_PATH) must
not use up all descriptors, so beyond some number they use none. A file then gets a hidden name until it is
released. For a directory, which stays empty, only its attributes are kept.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from cowfs.layers import beneath
from cowfs.layers.beneath import DIRECTORY
from cowfs.layers.keys import PathKey
from cowfs.linux import limits
from cowfs.types import Attr, own_attr

_PART = 8
"""This fraction of all descriptors is for them."""


class Nameless:
    """The nameless inodes of a layer.

    *descriptor_of* returns a descriptor of a directory; *by_fd* makes a call with a descriptor of any inode.
    """

    def __init__(self, descriptor_of: Callable[[PathKey], int], by_fd: Callable[..., Any]) -> None:
        self._descriptor_of = descriptor_of
        self._by_fd = by_fd
        self.place: PathKey | None = None
        """The directory for hidden names."""
        self.pinned: set[PathKey] = set()
        """Those with descriptors."""
        self.hidden: dict[int, PathKey] = {}
        """By mark."""
        self._left: dict[PathKey, Attr] = {}
        self._numbers = itertools.count()

    def are_many(self) -> bool:
        """Whether the next inode should be kept without a descriptor, if possible."""
        return len(self.pinned) >= limits.descriptors() // _PART

    # --- files

    def hide(self, key: PathKey) -> bytes | None:
        """Give a file an additional, hidden name and return it; None if that is not possible."""
        place = self.place
        if place is None or key.mark & 15 == DIRECTORY or key.mark in self.hidden:
            return None
        name = b"#gone-%x" % next(self._numbers)
        try:
            self._by_fd(key, lambda fd: beneath.link(fd, self._descriptor_of(place), name))
        except OSError:  # no hard links here, or too many of this one
            return None
        return name

    def has_only(self, key: PathKey, name: bytes) -> None:
        """Use the hidden name for a key from now on."""
        key.parent, key.name = self.place, name
        self.hidden[key.mark] = key

    def remove(self, name: bytes) -> None:
        """Remove a hidden name."""
        assert self.place is not None
        with suppress(OSError):  # the next mount removes what stays
            beneath.unlink(self._descriptor_of(self.place), name)

    # --- directories

    def leaves(self, key: PathKey, attr: Attr) -> None:
        """Remember the last attributes of a directory that lost its name."""
        self._left[key] = _with_nlink(attr, 0)

    def attributes(self, key: PathKey) -> Attr | None:
        """Return the remembered attributes of a directory; None if there are none."""
        return self._left.get(key)

    # --- all

    def seen(self, mark: int, attr: Attr) -> Attr:
        """Return attributes whose link count does not include the hidden name."""
        return attr if mark not in self.hidden else _with_nlink(attr, attr.st_nlink - 1)

    def forget(self, key: PathKey) -> None:
        """Forget an inode, except its descriptor."""
        self.pinned.discard(key)
        self._left.pop(key, None)
        if self.hidden.get(key.mark) is key:
            del self.hidden[key.mark]
            self.remove(key.name)

    def close(self) -> None:
        """Forget all nameless inodes."""
        for key in list(self.hidden.values()):
            self.forget(key)
        for key in self.pinned:
            if key.fd >= 0:
                os.close(key.fd)
                key.fd = -1
        self.pinned.clear()
        self._left.clear()


def _with_nlink(attr: Attr, nlink: int) -> Attr:
    counted = own_attr(attr)
    counted.st_nlink = nlink
    return counted
