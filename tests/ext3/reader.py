"""Read an ext3 filesystem from its bytes alone, without the code under test.

For small, sound images: everything is in memory, and nothing is checked (e2fsck is there for that).
Layout: the kernel's Documentation/filesystems/ext4, of which ext3 is the older part.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass

ROOT = 2
JOURNAL = 8
_PREFIXES = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}
_ACL_NAMED = (2, 8)
"""The tags of ACL entries for a named user or group."""


@dataclass(frozen=True)
class Facts:
    """The facts of an inode, without the data of a file. Equal facts look the same to every program."""

    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    """The size; 0 for a directory, because it depends on the filesystem."""
    rdev: tuple[int, int]
    atime: int
    mtime: int
    ctime: int
    xattrs: dict[bytes, bytes]
    target: bytes
    names: dict[bytes, int] | None
    """The inode of each name of a directory."""


@dataclass(frozen=True)
class Inode:
    """The fields of an inode on disk."""

    number: int
    raw: bytes
    mode: int
    uid: int
    gid: int
    size: int
    nlink: int
    sectors: int
    flags: int
    block: tuple[int, ...]
    acl_block: int
    times: tuple[int, int, int]


class Image:
    """The image in *data*."""

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self.data = data = memoryview(data)
        word = struct.Struct("<I").unpack_from
        self.inodes: int = word(data, 1024)[0]
        self.blocks: int = word(data, 1024 + 4)[0]
        self.first_block: int = word(data, 1024 + 20)[0]
        self.block_size: int = 1024 << word(data, 1024 + 24)[0]
        self.blocks_per_group: int = word(data, 1024 + 32)[0]
        self.inodes_per_group: int = word(data, 1024 + 40)[0]
        (self.revision,) = word(data, 1024 + 76)
        self.inode_size: int = struct.unpack_from("<H", data, 1024 + 88)[0] if self.revision else 128
        self.compat, self.incompat, self.read_only_compat = struct.unpack_from("<III", data, 1024 + 92)
        (self.first_meta_group,) = word(data, 1024 + 260)
        (self.last_orphan,) = word(data, 1024 + 232)
        self.groups = -(-(self.blocks - self.first_block) // self.blocks_per_group)
        self._pointers = struct.Struct(f"<{self.block_size // 4}I")

    # --- places

    def group(self, number: int) -> tuple[int, int, int]:
        """Return the blocks of a group's block bitmap, inode bitmap and inode table."""
        blocks, inodes, table = struct.unpack_from("<III", self.data, self.descriptor(number))
        return blocks, inodes, table

    def descriptor(self, number: int) -> int:
        """Return the offset of a group's descriptor."""
        per_block = self.block_size // 32
        index = number // per_block
        at = self.first_block + 1 + index
        if self.incompat & 0x10 and index >= self.first_meta_group:  # meta_bg: in the groups themselves
            first = index * per_block
            at = self.first_block + first * self.blocks_per_group + self.has_super(first)
        return at * self.block_size + number % per_block * 32

    def has_super(self, group: int) -> bool:
        """Return whether a group has a copy of the superblock."""
        if group == 0 or (group == 1 and not self.compat & 0x200):
            return True
        if self.compat & 0x200:  # sparse_super2
            return group in struct.unpack_from("<II", self.data, 1024 + 0x24C)
        powers = {base**exponent for base in (3, 5, 7) for exponent in range(1, 20)}
        return not self.read_only_compat & 1 or group in powers

    def unset_features(self) -> list[str]:
        """Return the features that are used although the superblock lacks them."""
        used = set()
        for ino in self.used_inodes():
            inode = self.inode(ino)
            if ino < 11 and ino != ROOT:
                continue
            if self._xattrs(inode):
                used.add("ext_attr")
            if stat.S_ISREG(inode.mode) and inode.size >= 1 << 31:
                used.add("large_file")
            if inode.flags & 0x1000:
                used.add("dir_index")
            if stat.S_ISDIR(inode.mode) and any(self.types(inode)):
                used.add("filetype")
        has = {
            "ext_attr": self.compat & 8, "dir_index": self.compat & 0x20, "filetype": self.incompat & 2,
            "large_file": self.read_only_compat & 2,
        }  # fmt: skip
        return sorted(name for name in used if not has[name] or not self.revision)

    def place(self, ino: int) -> int:
        """Return the offset of inode *ino*."""
        group, index = divmod(ino - 1, self.inodes_per_group)
        return self.group(group)[2] * self.block_size + index * self.inode_size

    def block(self, number: int) -> bytes:
        """Return a block."""
        return bytes(self.data[number * self.block_size : (number + 1) * self.block_size])

    def used_inodes(self) -> list[int]:
        """Return the inodes that are in use according to the bitmaps."""
        found = []
        for group in range(self.groups):
            bitmap = self.block(self.group(group)[1])
            first = group * self.inodes_per_group + 1
            found += [
                first + bit for bit in range(self.inodes_per_group) if bitmap[bit >> 3] & (1 << (bit & 7))
            ]
        return found

    # --- inodes

    def inode(self, ino: int) -> Inode:
        """Read an inode."""
        at = self.place(ino)
        raw = bytes(self.data[at : at + self.inode_size])
        mode, uid, low, atime, ctime, mtime, _, gid, nlink, sectors, flags = struct.unpack_from(
            "<HHIiiiIHHII", raw
        )
        (acl_block, high) = struct.unpack_from("<II", raw, 104)
        uid_high, gid_high = struct.unpack_from("<HH", raw, 120)
        extra = struct.unpack_from("<H", raw, 128)[0] if self.inode_size > 128 else 0
        fine = struct.unpack_from("<III", raw, 132) if extra >= 16 else (0, 0, 0)  # ctime, mtime, atime
        times = tuple(
            (seconds + ((more & 3) << 32)) * 1_000_000_000 + (more >> 2)
            for seconds, more in ((atime, fine[2]), (mtime, fine[1]), (ctime, fine[0]))
        )
        return Inode(
            ino, raw, mode, uid | uid_high << 16, gid | gid_high << 16,
            low | (high << 32 if stat.S_ISREG(mode) else 0), nlink, sectors, flags,
            struct.unpack_from("<15I", raw, 40), acl_block, times,
        )  # fmt: skip

    def mapping(self, inode: Inode) -> Iterator[tuple[int, int]]:
        """Yield the (logical, physical) numbers of all mapped blocks, in order."""
        for logical, block in enumerate(inode.block[:12]):
            if block:
                yield logical, block
        first, width = 12, 1
        for depth in (1, 2, 3):
            yield from self._indirect(inode.block[11 + depth], depth, first)
            width *= self.block_size // 4
            first += width

    def _indirect(self, block: int, depth: int, first: int) -> Iterator[tuple[int, int]]:
        if not block:
            return
        step = (self.block_size // 4) ** (depth - 1)
        for index, below in enumerate(self._pointers.unpack(self.block(block))):
            if not below:
                continue
            if depth == 1:
                yield first + index, below
            else:
                yield from self._indirect(below, depth - 1, first + index * step)

    def indirect_blocks(self, inode: Inode) -> list[int]:
        """Return the blocks that contain block numbers."""
        found: list[int] = []
        pending = [(block, depth) for depth, block in enumerate(inode.block[12:], 1) if block]
        while pending:
            block, depth = pending.pop()
            found.append(block)
            if depth > 1:
                pending += [(below, depth - 1) for below in self._pointers.unpack(self.block(block)) if below]
        return found

    def contents(self, ino: int) -> dict[int, bytes]:
        """Return the blocks of a file that are not holes."""
        return {logical: self.block(block) for logical, block in self.mapping(self.inode(ino))}

    # --- content of inodes

    def facts(self, ino: int) -> Facts:
        """Return the facts of *ino*."""
        inode = self.inode(ino)
        kind = stat.S_IFMT(inode.mode)
        return Facts(
            mode=inode.mode,
            nlink=inode.nlink,
            uid=inode.uid,
            gid=inode.gid,
            size=0 if kind == stat.S_IFDIR else inode.size,
            rdev=self._device(inode) if kind in (stat.S_IFCHR, stat.S_IFBLK) else (0, 0),
            atime=inode.times[0],
            mtime=inode.times[1],
            ctime=inode.times[2],
            xattrs=self._xattrs(inode),
            target=self._target(inode) if kind == stat.S_IFLNK else b"",
            names=self.names(inode) if kind == stat.S_IFDIR else None,
        )

    def tree(self) -> dict[int, Facts]:
        """Return the facts of all reachable inodes by number; without ``lost+found`` while it is empty."""
        found: dict[int, Facts] = {}
        pending = [ROOT]
        while pending:
            ino = pending.pop()
            if ino in found:
                continue
            facts = found[ino] = self.facts(ino)
            pending += (facts.names or {}).values()
        return found

    def names(self, inode: Inode) -> dict[bytes, int]:
        """Return the names in a directory, without ``.`` and ``..``, skipping its index."""
        found: dict[bytes, int] = {}
        for ino, _, name in self._entries_of(inode):
            if ino and name not in (b".", b".."):
                assert name not in found, f"{name!r} twice in directory {inode.number}"
                found[name] = ino
        return found

    def types(self, inode: Inode) -> list[int]:
        """Return the types of inodes in the entries of a directory."""
        return [kind for ino, kind, _ in self._entries_of(inode) if ino]

    def _entries_of(self, inode: Inode) -> Iterator[tuple[int, int, bytes]]:
        for _, number in self.mapping(inode):
            block, at = self.block(number), 0
            while at < self.block_size:
                ino, length, size, kind = struct.unpack_from("<IHBB", block, at)
                yield ino, kind, block[at + 8 : at + 8 + size]
                if self.block_size == 65536:  # 16 bits are not enough
                    length = 65536 if length in (0, 65535) else length & ~3 | (length & 3) << 16
                at += length

    @staticmethod
    def _device(inode: Inode) -> tuple[int, int]:
        old, new = inode.block[:2]
        if old:
            return old >> 8 & 0xFF, old & 0xFF
        return new >> 8 & 0xFFF, new & 0xFF | new >> 12 & 0xFFF00

    def _target(self, inode: Inode) -> bytes:
        own = inode.sectors - (self.block_size // 512 if inode.acl_block else 0)
        if own:
            return self.block(inode.block[0])[: inode.size]
        return inode.raw[40 : 40 + inode.size]

    def _xattrs(self, inode: Inode) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        if self.inode_size > 128:
            begin = 128 + struct.unpack_from("<H", inode.raw, 128)[0]
            if struct.unpack_from("<I", inode.raw, begin)[0] == 0xEA020000:
                found.update(_entries(inode.raw, begin + 4, begin + 4))
        if inode.acl_block:
            found.update(_entries(self.block(inode.acl_block), 32, 0))
        return found


def _entries(raw: bytes, at: int, base: int) -> Iterator[tuple[bytes, bytes]]:
    """Return the attributes whose list begins at *at*; the offsets of values count from *base*."""
    while struct.unpack_from("<I", raw, at)[0]:
        length, prefix, offset, _, size, _ = struct.unpack_from("<BBHIII", raw, at)
        name = _PREFIXES[prefix] + raw[at + 16 : at + 16 + length]
        value = raw[base + offset : base + offset + size]
        yield name, _acl(value) if prefix in (2, 3) else value
        at += 16 + (length + 3 & ~3)


def _acl(value: bytes) -> bytes:
    """Return an ACL in the form of getxattr(2), from the shorter form on disk."""
    result, at = struct.pack("<I", 2), 4
    while at < len(value):
        tag, permissions = struct.unpack_from("<HH", value, at)
        at += 4
        identity = 0xFFFFFFFF
        if tag in _ACL_NAMED:
            (identity,) = struct.unpack_from("<I", value, at)
            at += 4
        result += struct.pack("<HHI", tag, permissions, identity)
    return result
