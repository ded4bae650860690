"""Write squashfs images of versions 1 to 3, in either byte order. Current tools cannot."""

from __future__ import annotations

import lzma
import stat
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.support.squashfs import noise, text

METADATA = 8192
RAW_BLOCK, RAW_METADATA = 1 << 24, 0x8000
NONE = 0xFFFF_FFFF
MADE = 1_100_000_000
_TYPES = {
    stat.S_IFDIR: 1,
    stat.S_IFREG: 2,
    stat.S_IFLNK: 3,
    stat.S_IFBLK: 4,
    stat.S_IFCHR: 5,
    stat.S_IFIFO: 6,
    stat.S_IFSOCK: 7,
}


Pack = Callable[[bytes], bytes]


def _lzma(data: bytes) -> bytes:
    options = {"id": lzma.FILTER_LZMA1, "dict_size": 1 << 16, "lc": 3, "lp": 0, "pb": 2}
    # The old writers left out the end mark, but the range coder may need the bytes before it.
    return lzma.compress(data, lzma.FORMAT_RAW, filters=[options])


_PROPERTIES = b"\x5d" + struct.pack("<I", 1 << 16)


def sqlzma(data: bytes) -> bytes:
    """Compress a block as sqlzma does: small ones with zlib."""
    if len(data) < 100:
        return gzip(data)
    return _PROPERTIES + struct.pack("<Q", len(data)) + _lzma(data)


def broadcom(data: bytes) -> bytes:
    """Compress a block as Broadcom's firmware does."""
    return _PROPERTIES + _lzma(data)


def sized(data: bytes) -> bytes:
    """Compress a block as the patch for uClinux does."""
    return struct.pack("<I", len(data)) + _PROPERTIES + _lzma(data)


def gzip(data: bytes) -> bytes:
    """Compress a block as squashfs before version 4 does."""
    return zlib.compress(data, 9)


@dataclass(eq=False)
class Node:
    """An inode. If it is in two places, it has two links."""

    mode: int
    content: bytes = b""
    """The content of a file, or the target of a symlink."""
    names: dict[bytes, Node] = field(default_factory=dict)
    uid: int = 0
    gid: int = 0
    mtime: int = MADE - 1000
    rdev: int = 0
    nlink: int = 1
    extended: bool = False
    fragment: bool = True
    """Whether the last partial block goes into a fragment."""


class Table:
    """A table of metadata blocks."""

    def __init__(self, order: str, pack: Pack | None, check: bool) -> None:
        self.order, self.pack, self.check = order, pack, check
        self.stored, self.pending = b"", b""

    def place(self) -> tuple[int, int]:
        """Return the (block, offset) of the next data."""
        return len(self.stored), len(self.pending)

    def add(self, data: bytes) -> None:
        self.pending += data
        while len(self.pending) >= METADATA:
            self._flush()

    def _flush(self) -> None:
        data, self.pending = self.pending[:METADATA], self.pending[METADATA:]
        packed = self.pack(data) if self.pack else data
        raw = len(packed) >= len(data)
        word = len(data) | RAW_METADATA if raw else len(packed)
        self.stored += struct.pack(self.order + "H", word) + b"\xff" * self.check + (data if raw else packed)

    def finish(self) -> bytes:
        if self.pending:
            self._flush()
        return self.stored


def bits(order: str, *fields: tuple[int, int]) -> bytes:
    """Pack (value, width) pairs, from the highest bit on if big-endian, else from the lowest."""
    written = [format(value & ((1 << width) - 1), f"0{width}b") for value, width in fields]
    if order == ">":
        digits = "".join(written)
        return int(digits, 2).to_bytes(len(digits) // 8, "big")
    digits = "".join(reversed(written))
    return int(digits, 2).to_bytes(len(digits) // 8, "little")


class Writer:
    """A writer of an image."""

    def __init__(
        self,
        version: tuple[int, int],
        order: str,
        *,
        pack: Pack | None = gzip,
        check: bool = False,
        magic: int = 0x73717368,
    ) -> None:
        self.version, self.order, self.pack, self.check = version, order, pack, check
        self.magic = magic
        self.block_size = 4096
        self.data = bytearray({1: 51, 2: 63, 3: 119}[version[0]])
        self.tail = b""
        self.fragments: list[tuple[int, int]] = []
        self.inodes = Table(order, pack, check)
        self.listings = Table(order, pack, check)
        self.uids: list[int] = []
        self.gids: list[int] = []
        self.refs: dict[Node, int] = {}
        self.numbers: dict[Node, int] = {}

    def _block(self, data: bytes) -> int:
        packed = self.pack(data) if self.pack else data
        raw = len(packed) >= len(data)
        self.data += data if raw else packed
        return len(data) | RAW_BLOCK if raw else len(packed)

    def _fragment(self) -> None:
        if self.tail:
            at = len(self.data)
            self.fragments.append((at, self._block(self.tail)))
            self.tail = b""

    def _content(self, node: Node) -> tuple[int, int, int, list[int]]:
        """Write the data of a file; return start, fragment, offset in it, and block list."""
        size, content = self.block_size, node.content
        to_fragment = node.fragment and self.version[0] > 1
        whole = len(content) // size * size if to_fragment else len(content)
        start = len(self.data)
        words = []
        for at in range(0, whole, size):
            block = content[at : at + size]
            words.append(self._block(block) if self.version[0] == 1 or block.strip(b"\0") else 0)
        tail = content[whole:]
        if not tail:
            return start, NONE, 0, words
        if len(self.tail) + len(tail) > size:
            self._fragment()
        self.tail += tail
        return start, len(self.fragments), len(self.tail) - len(tail), words

    def _owners(self, node: Node) -> tuple[int, int]:
        if node.uid not in self.uids:
            self.uids.append(node.uid)
        if node.gid == node.uid:
            return self.uids.index(node.uid), 15 if self.version[0] == 1 else 255
        if node.gid not in self.gids:
            self.gids.append(node.gid)
        return self.uids.index(node.uid), self.gids.index(node.gid)

    def _listing(self, node: Node) -> tuple[int, int, int]:
        """Write a directory; return block, offset and length. Each run of one metadata block has a header."""
        block, offset = self.listings.place()
        data, names = b"", sorted(node.names.items())
        while names:
            first = self.refs[names[0][1]] >> 16
            base = self.numbers[names[0][1]]
            run: list[tuple[bytes, Node]] = []
            while names and self.refs[names[0][1]] >> 16 == first and len(run) < 256:
                run.append(names.pop(0))
            if self.version[0] == 3:
                data += struct.pack(self.order + "BII", len(run) - 1, first, base)
            else:
                data += bits(self.order, (len(run) - 1, 8), (first, 24))
            for name, child in run:
                kind = _TYPES[stat.S_IFMT(child.mode)]
                data += bits(self.order, (self.refs[child] & 0xFFFF, 13), (kind, 3), (len(name) - 1, 8))
                if self.version[0] == 3:
                    data += struct.pack(self.order + "h", self.numbers[child] - base)
                data += name
        self.listings.add(data)
        return block, offset, len(data)

    def _number(self, node: Node) -> None:
        if node not in self.numbers:
            self.numbers[node] = len(self.numbers) + 1
        for child in node.names.values():
            self._number(child)

    def _add(self, node: Node, parent: int) -> None:
        for child in node.names.values():
            if child not in self.refs:
                self._add(child, self.numbers[node])
        kind, three = _TYPES[stat.S_IFMT(node.mode)], self.version[0] == 3
        owner, group = self._owners(node)
        rest: list[tuple[int, int]] = [(node.nlink, 32)] if three else []
        time = [] if three else [(node.mtime, 32)]
        more = b""
        extended = node.extended and self.version[0] > 1
        if kind == 1:
            block, offset, size = self._listing(node)
            rest += [(size + 3 * three, 27 if extended else 19), (offset, 13), *time]
            rest += [(block, 32 if three else 24)]
            rest += [(0, 16)] if extended else []
            rest += [(parent, 32)] if three else []
            kind = 8 if extended else 1
        elif kind == 2:
            start, fragment, offset, words = self._content(node)
            large = three and (extended or node.nlink > 1)
            rest = rest if large else []
            rest += [*time, (start, 64 if three else 32), (fragment, 32), (offset, 32)]
            rest += [(len(node.content), 64 if large else 32)]
            more = struct.pack(f"{self.order}{len(words)}I", *words)
            kind = 9 if large else 2
        elif kind == 3:
            rest += [(len(node.content), 16)]
            more = node.content
        elif kind in (4, 5):
            rest += [(node.rdev, 16)]
        if self.version[0] == 1:
            kind, owner, rest, more = self._of_1(kind, owner, rest, more)
        width = 4 if self.version[0] == 1 else 8
        base = [(kind, 4), (node.mode & 0o7777, 12), (owner, width), (group, width)]
        if three:
            base += [(node.mtime, 32), (self.numbers[node], 32)]
        block, offset = self.inodes.place()
        self.refs[node] = block << 16 | offset
        self.inodes.add(bits(self.order, *base, *rest) + more)

    def _of_1(
        self, kind: int, owner: int, rest: list[tuple[int, int]], more: bytes
    ) -> tuple[int, int, list[tuple[int, int]], bytes]:
        """Return type, owner, fields of version 2 and block list, as version 1 stores them."""
        bank, owner = divmod(owner, 16)
        if kind in (6, 7):
            return 0, owner, [(kind, 4), (bank, 4)], more
        if kind == 2:
            rest = [rest[0], rest[1], rest[4]]
            words = struct.unpack(f"{self.order}{len(more) // 4}I", more)
            more = struct.pack(
                f"{self.order}{len(words)}H", *(w & 0x7FFF | (0x8000 if w & RAW_BLOCK else 0) for w in words)
            )
        return kind + 5 * bank, owner, rest, more

    def _indexed(self, image: bytearray, entries: bytes, pointer: str) -> int:
        starts = []
        for at in range(0, len(entries), METADATA):
            starts.append(len(image))
            table = Table(self.order, self.pack, self.check)
            table.add(entries[at : at + METADATA])
            image += table.finish()
        position = len(image)
        image += struct.pack(f"{self.order}{len(starts)}{pointer}", *starts)
        return position

    def finish(self, root: Node) -> bytes:
        """Return the image of the tree below *root*."""
        self._number(root)
        self._add(root, 0)
        self._fragment()
        order, three = self.order, self.version[0] == 3
        image = self.data
        inode_table = len(image)
        image += self.inodes.finish()
        directory_table = len(image)
        image += self.listings.finish()
        entry, pointer = ("QII", "Q") if three else ("II", "I")
        unused = (0,) if three else ()
        table = b"".join(struct.pack(order + entry, *one, *unused) for one in self.fragments)
        fragment_table = self._indexed(image, table, pointer) if self.version[0] > 1 else 0
        lookup = (1 << 64) - 1
        if self.version >= (3, 1):
            refs = [self.refs[node] for node, _ in sorted(self.numbers.items(), key=lambda pair: pair[1])]
            lookup = self._indexed(image, struct.pack(f"{order}{len(refs)}Q", *refs), "Q")
        uid_table = len(image)
        image += struct.pack(f"{order}{len(self.uids)}I", *self.uids)
        gid_table = len(image)
        image += struct.pack(f"{order}{len(self.gids)}I", *self.gids)
        tables = (len(image), uid_table, gid_table, inode_table, directory_table)
        flags = 0x40 | 0x4 * self.check | (0 if self.pack else 0xB) | 0x80 * (self.version >= (3, 1))
        log = self.block_size.bit_length() - 1
        head = struct.pack(
            order + "7I4H3BIQ3I",
            self.magic,
            len(self.numbers),
            *((0,) * 5 if three else tables),
            *self.version,
            self.block_size & 0xFFFF,
            log,
            flags,
            len(self.uids),
            len(self.gids),
            MADE,
            self.refs[root],
            self.block_size,
            len(self.fragments),
            0 if three else fragment_table,
        )
        size = 51 if self.version[0] == 1 else 63
        image[:size] = head[:size]
        if three:
            image[63:119] = struct.pack(order + "7Q", *tables, fragment_table, lookup)
        return bytes(image)


_MODES = (0o100600, 0o40700, 0o60600, 0o10600, 0o140700)


def sample() -> Node:
    """Return a tree with all types of inodes and data, and several metadata blocks."""
    linked = Node(0o100644, text(9000), uid=1000, gid=100, nlink=2)
    many = {b"%s%04d" % (b"n" * 100, number): Node(0o120777, b"%0150d" % number) for number in range(100)}
    many |= {b"f%02d" % number: Node(0o100600, b"%d" % number) for number in range(40)}
    names = {
        b"dir": Node(0o40755, names=many | {b"hard": linked}, nlink=2, extended=True, gid=7),
        b"empty": Node(0o41777, nlink=2, uid=3, gid=3),
        b"nothing": Node(0o100644),
        b"linked": linked,
        b"noise": Node(0o104755, noise(9000), uid=1000, gid=1000),
        b"blocks": Node(0o100444, text(3 * 4096 + 77), fragment=False),
        b"whole": Node(0o100444, text(8192)),
        b"holes": Node(0o100644, bytes(8192) + text(5000) + bytes(4000) + b"end", extended=True),
        b"link": Node(0o120777, b"dir/" + b"t" * 200),
        b"block": Node(0o60660, rdev=0x0801),
        b"char": Node(0o20666, rdev=0x0103, uid=5, gid=100),
        b"fifo": Node(0o10644),
        b"sock": Node(0o140755),
        b"\xff\xfe name": Node(0o40700, names={b"deep": Node(0o100640, b"deep")}, nlink=2),
    }
    # More owners than the bits of an inode of version 1 can number.
    names |= {b"o%d" % uid: Node(mode, uid=uid) for uid, mode in zip(range(50, 80), 6 * _MODES, strict=True)}
    return Node(0o40755, names=names, nlink=5 + 6, uid=0, gid=100)


KINDS: dict[str, tuple[tuple[int, int], str, dict[str, Any]]] = {
    "3.1 little": ((3, 1), "<", {}),
    "3.1 big checked": ((3, 1), ">", {"check": True}),
    "3.0 big uncompressed": ((3, 0), ">", {"pack": None}),
    "2.1 little": ((2, 1), "<", {}),
    "2.0 big checked": ((2, 0), ">", {"check": True}),
    "1.0 little": ((1, 0), "<", {}),
    "1.0 big checked": ((1, 0), ">", {"check": True}),
}
"""The images to read: version, byte order, and options."""

SHSQ, SQLZ = 0x71736873, 0x73716C7A
VENDORS: dict[str, tuple[tuple[int, int], str, dict[str, Any]]] = {
    "3.0 little shsq": ((3, 0), "<", {"pack": sqlzma, "magic": SHSQ}),
    "3.1 big qshs": ((3, 1), ">", {"pack": sqlzma, "magic": SHSQ}),
    "3.0 big sqlz": ((3, 0), ">", {"pack": sqlzma, "magic": SQLZ}),
    "3.0 little Broadcom": ((3, 0), "<", {"pack": broadcom}),
    "2.1 big sized": ((2, 1), ">", {"pack": sized}),
}
"""Images with LZMA, as vendors wrote them."""


def old_image(kind: str) -> bytes:
    """Return an image of :func:`sample`, of a kind in :data:`KINDS` or :data:`VENDORS`."""
    version, order, options = (KINDS | VENDORS)[kind]
    return Writer(version, order, **options).finish(sample())
