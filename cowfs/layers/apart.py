"""A store whose parts are anywhere on one filesystem, like upperdir and workdir of overlayfs.

The layer serves a directory that contains all parts. Its root only shows the parts, under their names in a
store.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence

from cowfs.layers.directory import DirectoryLayer
from cowfs.layers.kernel_file import KernelFile
from cowfs.layers.keys import PathKey
from cowfs.types import Attr, DirEntry

Place = tuple[PathKey, bytes]
_SYNCHRONOUS = os.O_SYNC | os.O_DSYNC


class _Unsynced(KernelFile):
    """A file that is never synced."""

    __slots__ = ()

    def fsync(self, datasync: bool) -> None:
        pass


class ApartLayer(DirectoryLayer):
    """Serve parts of the tree below *above* (which the layer owns from now on) as the directory of a store.

    *parts* has, for each name at the root, its path relative to *above*. If not *durable*, nothing waits for
    the disk, even if a caller requests it.
    """

    def __init__(
        self,
        above: int,
        name: str,
        parts: Mapping[bytes, Sequence[bytes]],
        *,
        privileged: bool = True,
        durable: bool = True,
    ) -> None:
        super().__init__(above, name, privileged=privileged)
        self._durable = durable
        self._above_all = self.root
        self.root = PathKey(None, b"", self.root.mark, self.root.fd)
        self._parts: dict[bytes, Place] = {}
        for part, way in parts.items():
            self._parts[part] = self._walk(way[:-1]), way[-1]

    def _walk(self, way: Sequence[bytes]) -> PathKey:
        here = self._above_all
        for name in way:
            found = super().lookup(here, name)
            if found is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(name))
            here = found[0]
        return here

    def _really(self, place: Place) -> Place:
        """Return the real location of *place*. ENOENT if it is not in a part."""
        if place[0] is not self.root:
            return place
        try:
            return self._parts[place[1]]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place[1]) from None

    def lookup(self, directory: PathKey, name: bytes) -> tuple[PathKey, Attr] | None:
        if directory is not self.root:
            return super().lookup(directory, name)
        return super().lookup(*self._parts[name]) if name in self._parts else None

    def readdir(self, directory: PathKey) -> list[DirEntry]:
        if directory is not self.root:
            return super().readdir(directory)
        return [DirEntry(name, 0) for name in self._parts if self.lookup(directory, name) is not None]

    def pieces(self, directory: PathKey) -> Iterator[list[DirEntry]]:
        if directory is self.root:
            yield self.readdir(directory)
        else:
            yield from super().pieces(directory)

    def mkdir(self, directory: PathKey, name: bytes, mode: int, uid: int, gid: int) -> PathKey:
        return super().mkdir(*self._really((directory, name)), mode, uid, gid)

    def rename(
        self,
        source: Place,
        target: Place,
        flags: int = 0,
        moved: PathKey | None = None,
        replaced: PathKey | None = None,
    ) -> None:
        super().rename(self._really(source), self._really(target), flags, moved, replaced)

    # --- syncs, which are skipped if not durable

    def open(self, key: PathKey, flags: int) -> KernelFile:
        if self._durable:
            return super().open(key, flags)
        return _unsynced(super().open(key, flags & ~_SYNCHRONOUS))

    def create(
        self, directory: PathKey, name: bytes, mode: int, uid: int, gid: int
    ) -> tuple[PathKey, KernelFile]:
        key, file = super().create(directory, name, mode, uid, gid)
        return key, file if self._durable else _unsynced(file)

    def open_directory(self, key: PathKey) -> KernelFile:
        file = super().open_directory(key)
        return file if self._durable else _unsynced(file)

    def sync(self) -> None:
        if self._durable:
            super().sync()


def _unsynced(file: KernelFile) -> KernelFile:
    """Return an unsynced file that takes over the descriptor of *file*."""
    fd, file._fd = file._fd, -1
    return _Unsynced(fd)
