"""Hard links of the lower that hold no notes: symlinks, fifos, sockets and devices take no user.* xattrs.

So in a user's directory store they have an index of their own, a directory that the kernel's overlayfs does
not look into. As in the other one, each is there under the name of its origin; beside it, with ``.notes``
behind that name, is an empty file which has the xattrs in its place.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from cowfs.layers.base import Key, UpperLayer

_NOTES = b".notes"


class Companions:
    """Those of one store, in the directory *place* of its upper layer."""

    def __init__(self, upper: UpperLayer, place: Key) -> None:
        self._upper = upper
        self.place = place
        self.names: dict[bytes, int] = {}
        """Which inode an entry of the index is."""
        self._by_ino: dict[int, bytes] = {}
        entries = {entry.name for entry in upper.readdir(place)}
        for name in entries:
            if name.endswith(_NOTES):
                if name.removesuffix(_NOTES) not in entries:  # the daemon was killed right there
                    with suppress(OSError):
                        upper.unlink(place, name, None)
            elif name + _NOTES in entries:
                found = upper.lookup(place, name)
                if found is not None:
                    self._enter(name, found[1].st_ino)

    def _enter(self, name: bytes, ino: int) -> None:
        self.names[name] = ino
        self._by_ino[ino] = name

    def begin(self, key: Key, name: bytes) -> None:
        """Let an inode of the upper, which is about to be put into the index, have notes."""
        upper = self._upper
        with suppress(FileNotFoundError):
            upper.unlink(self.place, name + _NOTES, None)
        made, file = upper.create(self.place, name + _NOTES, 0o600, os.geteuid(), os.getegid())
        file.close()
        upper.forget(made)
        self._enter(name, upper.stat(key).st_ino)

    def of(self, key: Key) -> Key | None:
        """Return what has the notes of an inode; None if nothing has."""
        if not self.names:
            return None
        attr = self._upper.stat(key)
        if stat.S_ISREG(attr.st_mode) or stat.S_ISDIR(attr.st_mode):
            return None
        name = self._by_ino.get(attr.st_ino)
        found = None if name is None else self._upper.lookup(self.place, name + _NOTES)
        return found[0] if found is not None else None

    def leave(self, name: bytes) -> None:
        """Remove the notes of an inode that is not in the index any more."""
        self._by_ino.pop(self.names.pop(name), None)
        with suppress(OSError):
            self._upper.unlink(self.place, name + _NOTES, None)

    def clear(self) -> None:
        """Forget all of them: the directory has been emptied."""
        self.names.clear()
        self._by_ino.clear()


NOT_HERE = {errno.EPERM, errno.EOPNOTSUPP}
"""What setting an xattr on an inode that takes none fails with."""
