"""The names of directories, kept in dictionaries, so that a lookup reads no blocks."""

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
"""The S_IFMT bits for each EXT2_FT_* of a directory entry; 0 where the filesystem does not say."""
_NUMBERS = {mode: number for number, mode in enumerate(TYPES)}

MOST_NAMES = 1 << 18
"""How many names are kept in all, about 200 bytes each; the directory used last is kept, however large."""
LARGE = 1 << 18
"""Bytes of a directory above which it is not read whole to find a name: others would wait."""
MOST_LISTED = 2_000_000
"""How many names of a directory are listed: the memory for them is bounded."""
_ITSELF = 16
"""How many names a directory without names counts for."""
_COUNT_AFTER = 256
"""Directories that are known already get new names: so after this many loads all are counted again."""


def entry(ino: int, mode: int, block: int, offset: int) -> int:
    """Pack what is known of a name into one integer, which is small and quick to make."""
    return packed(ino, _NUMBERS[stat.S_IFMT(mode)], block, offset)


def packed(ino: int, kind: int, block: int, offset: int) -> int:
    """The same for a type in the form that directories have."""
    return ino | kind << _TYPE_AT | offset << _OFFSET_AT | block << _BLOCK_AT


def moved(value: int, block: int, offset: int) -> int:
    """Return the entry of the same inode in another place."""
    return value & _WHAT | offset << _OFFSET_AT | block << _BLOCK_AT


def type_of(value: int) -> int:
    """Return the S_IFMT bits of an entry's type."""
    return TYPES[value >> _TYPE_AT & 7]


def place_of(value: int) -> tuple[int, int]:
    """Return the block and the offset where an entry is, or was: an index may have moved it."""
    return value >> _BLOCK_AT, value >> _OFFSET_AT & 0xFFFF


class Names(dict[bytes, int]):
    """All names of one directory except ``.`` and ``..``, each with its entry."""

    __slots__ = ("_twice", "hint", "more")

    def __init__(self) -> None:
        super().__init__()
        self.hint = 0
        """The first block that may have room."""
        self.more: object = None
        """Data of the image's user about the directory."""
        self._twice: frozenset[int] = frozenset()

    def find_double(self) -> None:
        """Find the inodes that have more than one name here, now that all names are known."""
        seen = {value & INO for value in self.values()}
        if len(seen) < len(self):
            counted = Counter(value & INO for value in self.values())
            self._twice = frozenset(ino for ino, names in counted.items() if names > 1)

    def is_twice(self, ino: int, name: bytes) -> bool:
        """Return whether a directory has another name here, which is an error."""
        return ino in self._twice


class LargeNames:
    """The same for a directory that is too large for memory: each name is read from the image."""

    __slots__ = ("_directories", "_find", "_list", "_names", "hint", "more")

    def __init__(
        self, find: Callable[[bytes], int | None], list_: Callable[[], Iterator[tuple[bytes, int]]]
    ) -> None:
        """*find* gives the entry of a name, *list_* all names with their entries."""
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
        """Do nothing: the image has the name already."""
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
        """Return the memory that it takes, as a number of names."""
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
        """*load* yields what x3_readdir returns for a directory; *large* serves those that must not be
        loaded.
        """
        self._load = load
        self._large = large
        self._most = most
        self._by_ino: OrderedDict[int, AnyNames] = OrderedDict()
        self._count = 0
        self._loads = 0

    def names(self, directory: int) -> AnyNames:
        """Return the names of a directory; change them together with the directory. ENOTDIR."""
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
        self._by_ino[directory] = names
        self._count += len(names) + _ITSELF
        self._loads += 1
        if self._count > self._most or self._loads % _COUNT_AFTER == 0:
            self._evict()
        return names

    def known(self, directory: int) -> AnyNames | None:
        """Return the names if they are in memory."""
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
