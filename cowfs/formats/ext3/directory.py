"""The names of directories, cached in dictionaries so that a lookup reads no blocks."""

from __future__ import annotations

import stat
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator

INO = (1 << 32) - 1
"""The bits of an entry that are the inode number."""
_TYPE_AT, _OFFSET_AT, _BLOCK_AT = 32, 35, 51
_WHAT = (1 << _OFFSET_AT) - 1
_HEAD = struct.Struct("<IIHBB")  # ino, block, offset, type, length of the name: see x3_readdir

TYPES = (
    0,
    stat.S_IFREG,
    stat.S_IFDIR,
    stat.S_IFCHR,
    stat.S_IFBLK,
    stat.S_IFIFO,
    stat.S_IFSOCK,
    stat.S_IFLNK,
)
"""The S_IFMT bits for each EXT2_FT_* of a directory entry; 0 if the filesystem does not record the type."""
_NUMBERS = {mode: number for number, mode in enumerate(TYPES)}

MOST_NAMES = 1 << 18
"""How many names are cached in all, about 200 bytes each. The directory used last stays, however large."""
LARGE = 1 << 18
"""A directory of more bytes is not read as a whole to find a name, because other requests would wait."""
MOST_LISTED = 2_000_000
"""How many names of a directory can be listed. It bounds the memory for them."""
_ITSELF = 16
"""The weight of a directory without names, as a number of names."""
_COUNT_AFTER = 256
"""Recount all names after so many loads, because cached directories get new names too."""


def entry(ino: int, mode: int, block: int, offset: int) -> int:
    """Pack the entry of a name into one integer, which is small and quick to make."""
    return packed(ino, _NUMBERS[stat.S_IFMT(mode)], block, offset)


def packed(ino: int, kind: int, block: int, offset: int) -> int:
    """Pack an entry whose type is an EXT2_FT_*."""
    return ino | kind << _TYPE_AT | offset << _OFFSET_AT | block << _BLOCK_AT


def moved(value: int, block: int, offset: int) -> int:
    """Return the same entry at another block and offset."""
    return value & _WHAT | offset << _OFFSET_AT | block << _BLOCK_AT


def type_of(value: int) -> int:
    """Return the S_IFMT bits of an entry's type."""
    return TYPES[value >> _TYPE_AT & 7]


def place_of(value: int) -> tuple[int, int]:
    """Return the block and offset of an entry. An index may have moved it since."""
    return value >> _BLOCK_AT, value >> _OFFSET_AT & 0xFFFF


class Names(dict[bytes, int]):
    """All names of one directory except ``.`` and ``..``, each with its entry."""

    __slots__ = ("_twice", "hint", "more")

    def __init__(self) -> None:
        super().__init__()
        self.hint = 0
        """The first block that may have free space."""
        self.more: object = None
        """What the user of the image records about the directory."""
        self._twice: frozenset[int] = frozenset()

    def find_double(self) -> None:
        """Find the inodes that have more than one name here. Call it when all names are added."""
        seen = {value & INO for value in self.values()}
        if len(seen) < len(self):
            counted = Counter(value & INO for value in self.values())
            self._twice = frozenset(ino for ino, names in counted.items() if names > 1)

    def is_twice(self, ino: int, name: bytes) -> bool:
        """Whether a directory has another name here, which is an error."""
        return ino in self._twice


class LargeNames:
    """The names of a directory that is too large for memory. Each name is read from the image."""

    __slots__ = ("_directories", "_find", "_list", "_names", "hint", "more")

    def __init__(
        self, find: Callable[[bytes], int | None], list_: Callable[[], Iterator[tuple[bytes, int]]]
    ) -> None:
        """*find* returns the entry of a name, *list_* all names with their entries."""
        self._find = find
        self._list = list_
        self._directories: dict[int, bytes] = {}  # the name by which each requested inode is known
        self._names: dict[bytes, int] = {}  # the reverse
        self.hint = 0
        self.more: object = None

    def get(self, name: bytes) -> int | None:
        return self._find(name)

    def __getitem__(self, name: bytes) -> int:
        value = self._find(name)
        if value is None:
            raise KeyError(name)
        return value

    def __contains__(self, name: bytes) -> bool:
        return self._find(name) is not None

    def __setitem__(self, name: bytes, value: int) -> None:
        """Do nothing: the name is already in the image."""
        ino = value & INO
        if ino in self._directories:
            self._names.pop(self._directories[ino], None)
            self._know(ino, name)

    def _know(self, ino: int, name: bytes) -> None:
        self._directories[ino] = name
        self._names[name] = ino

    def __delitem__(self, name: bytes) -> None:
        ino = self._names.pop(name, None)
        if ino is not None:
            self._directories.pop(ino, None)

    def __iter__(self) -> Iterator[bytes]:
        return (name for name, _ in self._list())

    def items(self) -> Iterator[tuple[bytes, int]]:
        return self._list()

    def __len__(self) -> int:
        """Return the memory that this object takes, as a number of names."""
        return 2 * len(self._directories)

    def is_twice(self, ino: int, name: bytes) -> bool:
        known = self._directories.get(ino)
        if known is None:
            self._know(ino, name)
        return known not in {None, name}


AnyNames = Names | LargeNames


def parse(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield the names that x3_readdir has packed, each with its entry."""
    at, end = 0, len(data)
    while at < end:
        ino, block, offset, kind, length = _HEAD.unpack_from(data, at)
        at += _HEAD.size + length
        yield data[at - length : at], packed(ino, kind, block, offset)


class Directories:
    """The directories whose names are in memory, the least recently used first. Not thread-safe."""

    __slots__ = ("_by_ino", "_count", "_large", "_load", "_loads", "_most")

    def __init__(
        self,
        load: Callable[[int], Iterable[bytes]],
        large: Callable[[int], LargeNames | None] = lambda _: None,
        most: int = MOST_NAMES,
    ) -> None:
        """*load* yields what x3_readdir returns for a directory; *large* returns the names of a large one."""
        self._load = load
        self._large = large
        self._most = most
        self._by_ino: OrderedDict[int, AnyNames] = OrderedDict()
        self._count = 0
        self._loads = 0

    def names(self, directory: int) -> AnyNames:
        """Return the names of a directory. The caller updates them when it changes the directory. ENOTDIR."""
        names = self._by_ino.get(directory)
        if names is not None:
            self._by_ino.move_to_end(directory)
            return names
        names = self._large(directory)
        if names is None:
            names = Names()
            for data in self._load(directory):
                names.update(parse(data))
            names.find_double()
        self._keep(directory, names)
        return names

    def made(self, directory: int) -> Names:
        """Cache the names of a directory that was just created: none yet."""
        self._by_ino.pop(directory, None)  # a removed directory may have had this number
        names = Names()
        self._keep(directory, names)
        return names

    def _keep(self, directory: int, names: AnyNames) -> None:
        self._by_ino[directory] = names
        self._count += len(names) + _ITSELF
        self._loads += 1
        if self._count > self._most or self._loads % _COUNT_AFTER == 0:
            self._evict()

    def known(self, directory: int) -> AnyNames | None:
        """Return the names of a directory if they are cached, else None."""
        return self._by_ino.get(directory)

    def forget(self, directory: int) -> None:
        """Drop a directory that no longer exists."""
        self._by_ino.pop(directory, None)

    def clear(self) -> None:
        """Drop all of them."""
        self._by_ino.clear()
        self._count = 0

    def _evict(self) -> None:
        self._count = sum(map(len, self._by_ino.values())) + len(self._by_ino) * _ITSELF
        while self._count > self._most and len(self._by_ino) > 1:
            _, names = self._by_ino.popitem(last=False)
            self._count -= len(names) + _ITSELF
