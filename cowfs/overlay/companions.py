"""Notes about hard links that cannot hold them: symlinks, fifos, sockets and devices take no user.* xattrs.

In a user's directory store, these have an index of their own, in a directory that the kernel's overlayfs
ignores. As in the main index, an entry's name is its origin. Beside the entry, an empty file with the same
name and the suffix ``.notes`` holds the xattrs.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from cowfs.layers.base import Key, UpperLayer

_NOTES = b".notes"


class Companions:
    """The companions of one store, in the directory *place* of its upper layer."""

    def __init__(self, upper: UpperLayer, place: Key) -> None:
        self._upper = upper
        self.place = place
        self.names: dict[bytes, int] = {}
        """The inode number of each entry of the index."""
        self._by_ino: dict[int, bytes] = {}
        entries = {entry.name for entry in upper.readdir(place)}
        for name in entries:
            if name.endswith(_NOTES):
                if name.removesuffix(_NOTES) not in entries:  # the daemon was killed between the two steps
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
        """Make a place for the notes of an upper inode that is about to be put into the index."""
        upper = self._upper
        with suppress(FileNotFoundError):
            upper.unlink(self.place, name + _NOTES, None)
        made, file = upper.create(self.place, name + _NOTES, 0o600, os.geteuid(), os.getegid())
        file.close()
        upper.forget(made)
        self._enter(name, upper.stat(key).st_ino)

    def of(self, key: Key) -> Key | None:
        """Return the file that holds the notes of an inode; None if there is none."""
        if not self.names:
            return None
        attr = self._upper.stat(key)
        if stat.S_ISREG(attr.st_mode) or stat.S_ISDIR(attr.st_mode):
            return None
        name = self._by_ino.get(attr.st_ino)
        found = None if name is None else self._upper.lookup(self.place, name + _NOTES)
        return found[0] if found is not None else None

    def leave(self, name: bytes) -> None:
        """Remove the notes of an inode that is no longer in the index."""
        self._by_ino.pop(self.names.pop(name), None)
        with suppress(OSError):
            self._upper.unlink(self.place, name + _NOTES, None)

    def clear(self) -> None:
        """Forget all notes: the directory was emptied."""
        self.names.clear()
        self._by_ino.clear()


NOT_HERE = {errno.EPERM, errno.EOPNOTSUPP}
"""The errnos of setting an xattr on an inode that cannot have any."""
