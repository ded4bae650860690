"""Reading an ext3 image as a layer: names, attributes, figures."""

from __future__ import annotations

import errno
import itertools
import os
import stat
import struct
from collections.abc import Iterator

from cowfs.errors import os_error
from cowfs.formats.ext3 import image as ext3
from cowfs.formats.ext3.directory import INO, LargeNames, type_of
from cowfs.formats.ext3.image import Image
from cowfs.formats.ext3.records import FIRST, time_of
from cowfs.layers.base import NamesJob
from cowfs.layers.ext3_file import Key
from cowfs.types import Attr, AttrData, DirEntry, FileHandle, FsStats

_FILEID_INO32_GEN = 1
"""The kernel's type of a handle that is an inode number and a generation (linux/exportfs.h)."""
_HANDLE = struct.Struct("=II")
NAME_MAX = 255
_devices = itertools.count(1)
_FIRST_DEVICE = 2 << 40
"""Device numbers of layers that the kernel does not know are beyond its 32 bits; squashfs has 1 << 40."""
_FLAGS_SHOWN = 0x725BDFFF
"""EXT4_FL_USER_VISIBLE in fs/ext4/ext4.h."""


class Ext3Reader:
    """The part of :class:`cowfs.layers.ext3.Ext3Layer` that changes nothing."""

    generation: int | None = 0
    waits = False
    has_descriptors = False
    data_only = False

    def __init__(self, image: Image) -> None:
        self.image = image
        self.name = image.name
        self.root = Key(ext3.ROOT)
        self.dev = _FIRST_DEVICE + next(_devices)
        facts = image.facts()
        self._uuid = facts.uuid
        self._block_size = facts.block_size
        self.spare_bytes = 0
        """How much the image can be enlarged when it is full: counted as free."""

    def lookup(self, directory: int, name: bytes) -> tuple[Key, Attr] | None:
        """Find *name*; None if it does not exist.

        ENOTDIR, ENAMETOOLONG. EUCLEAN for a directory that is also at another place, so that the tree is
        finite.
        """
        names = self.image.names(directory)
        value = names.get(name)
        if value is None:
            if len(name) > NAME_MAX:
                raise os_error(errno.ENAMETOOLONG)
            return None
        key = Key(value & INO)
        fields = self.image.child(directory, key)
        if stat.S_ISDIR(fields[0]) and names.is_twice(key, name):
            raise self.image.damaged(f"directory {key} has two names in directory {directory}")
        return key, self.attributes(key, fields)

    def stat(self, key: int) -> Attr:
        return self.attributes(key, self.image.raw(key))

    def attributes(self, ino: int, fields: tuple[int, ...]) -> AttrData:
        """Convert an inode's attributes from the engine's form to a layer's."""
        mode, nlink, uid, gid, major, minor, gen, _, size, blocks, atime, mtime, ctime = fields
        rdev = os.makedev(major, minor) if major or minor else 0
        if atime < FIRST or mtime < FIRST or ctime < FIRST:  # one is beyond 2262
            atime, mtime, ctime = time_of(atime), time_of(mtime), time_of(ctime)
        return AttrData(
            mode, ino, self.dev, nlink, uid, gid, rdev, size, blocks, self._block_size, atime, mtime, ctime,
            gen,
        )  # fmt: skip

    def readdir(self, directory: int) -> list[DirEntry]:
        """Return all entries, in the order of the directory. ENOTDIR."""
        return [DirEntry(name, type_of(value)) for name, value in self.image.names(directory).items()]

    def names(self, directory: int) -> list[bytes] | NamesJob:
        names = self.image.names(directory)
        if isinstance(names, LargeNames):
            return lambda: list(self.image.list_large(directory))
        return list(names)

    def pieces(self, directory: int) -> Iterator[list[DirEntry]]:
        """Yield the entries, some at a time if there are very many; other calls may come in between.

        It may or may not contain names that are added or removed meanwhile. ENOTDIR, EFBIG.
        """
        names = self.image.names(directory)
        if not isinstance(names, LargeNames):
            yield self.readdir(directory)
            return
        for some in self.image.list_pieces(directory):
            yield [DirEntry(name, type_of(value)) for name, value in some.items()]

    def readlink(self, key: int) -> bytes:
        return self.image.readlink(key)

    def listxattr(self, key: int) -> list[bytes]:
        """Return all names, including trusted.*, whatever the privileges of this process."""
        return self.image.listxattr(key)

    def getxattr(self, key: int, name: bytes) -> bytes:
        return self.image.getxattr(key, name)

    def statfs(self) -> FsStats:
        """Return the figures like the kernel's ext3, but count the blocks of removed files as free at once.

        Do not count, as total or free, blocks that a sparse image does not have and that its disk cannot
        hold.
        """
        facts = self.image.facts()
        spare = self.spare_bytes // facts.block_size
        free = facts.free_blocks * facts.block_size
        can_be_had = facts.disk_free + max(free - facts.missing, 0)
        spare -= max(free - can_be_had, 0) // facts.block_size
        spare_inodes = facts.inodes * max(spare, 0) // facts.blocks
        return FsStats(
            bsize=facts.block_size,
            frsize=facts.block_size,
            blocks=facts.blocks - facts.overhead + spare,
            bfree=facts.free_blocks + spare,
            bavail=max(facts.free_blocks - facts.reserved + spare, 0),
            files=facts.inodes + spare_inodes,
            ffree=facts.free_inodes + spare_inodes,
            favail=facts.free_inodes + spare_inodes,
        )

    def shrink(self) -> None:
        """Forget what can be read again."""
        self.image.shrink()

    def caches(self) -> dict[str, tuple[int, int]]:
        """Return cache hits and misses of blocks, by kind."""
        facts = self.image.facts()
        return {"ext3 metadata": (facts.cache_hits, facts.cache_misses)}

    def handle(self, key: int) -> FileHandle:
        """Return what name_to_handle_at(2) returns for the same inode of the mounted image."""
        return FileHandle(
            _FILEID_INO32_GEN, _HANDLE.pack(key, self.image.getattr(key).generation), self._uuid
        )

    def handle_ino(self, handle: FileHandle) -> int | None:
        if handle.uuid != self._uuid or handle.type not in {1, 2} or len(handle.data) < _HANDLE.size:
            return None
        ino, generation = _HANDLE.unpack_from(handle.data)
        try:
            found = self.image.getattr(ino)
        except OSError:
            return None
        return int(ino) if found.nlink and found.generation == generation else None

    def numbered(self, ino: int) -> Key:
        return Key(ino)

    def getflags(self, key: int) -> int:
        return self.image.getattr(key).flags & _FLAGS_SHOWN

    def version(self, key: int) -> int:
        return self.image.getattr(key).generation

    def birth(self, key: int) -> int | None:
        return self.image.birth(key)
