"""An image: everything the package can read, behind one face.

Inodes are known by their references (integers). What is returned is plain data.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
from dataclasses import replace

from cowfs.errors import LayerError
from cowfs.formats.squashfs import old_lzma
from cowfs.formats.squashfs import superblock as sblk
from cowfs.formats.squashfs.blocks import FragmentTable
from cowfs.formats.squashfs.cache import GenerationCache
from cowfs.formats.squashfs.codecs import decompressor
from cowfs.formats.squashfs.data import Blocks, FileData
from cowfs.formats.squashfs.directory import DirectoryTable, Found, Listing
from cowfs.formats.squashfs.errors import CodecError
from cowfs.formats.squashfs.inodes import NONE, Inode, InodeTable
from cowfs.formats.squashfs.metadata import BLOCK, IndexedTable, Metadata, Table
from cowfs.formats.squashfs.old import OldInodeTable, old_listing
from cowfs.formats.squashfs.recognise import SAMPLE, VENDOR
from cowfs.formats.squashfs.source import Bytes, Source, open_bytes
from cowfs.formats.squashfs.superblock import Superblock
from cowfs.formats.squashfs.xattrs import KINDS, XattrTable

NOBODY = 65534
"""Whose the kernel says that something is whose owner is 0xffffffff, which is none (overflowuid)."""
CACHE_BYTES = 32 << 20
"""How much decompressed data of one image is kept."""
LISTED_ENTRIES = 200_000
"""How many directory entries are kept as dictionaries, for quick lookups (about 150 bytes each)."""
_INDEX_FROM = 256 << 10
"""Directories with a listing longer than this are at first searched by their index."""
_INDEX_TO = 1 << 19
"""Directories with a listing longer than this are only ever searched by their index: others would wait."""
_GZIP, _LZMA = 1, 2
"""Compressors by their numbers in the superblock."""
_UNCOMPRESSED = 0x8000
"""The bit in the length of a metadata block."""
_PROBES = 16
"""After how many searches by index a directory is read whole."""


class Image:
    """A squashfs image, open for reading.

    All methods, and those of what :meth:`data` returns, may be used from any thread. All of them may
    block, and raise :class:`OSError`: EIO where the image is damaged (the log says where), what the
    kernel says where it cannot be read.
    """

    def __init__(self, source: Source, superblock: Superblock, cache_bytes: int) -> None:
        """Use :func:`open_image`."""
        self.source = source
        self.superblock = superblock
        self.root = superblock.root
        decompress = decompressor(superblock.compression, superblock.block_size, source.name)
        sb = superblock
        header = 3 if sb.is_old and sb.flags & sblk.CHECKED else 2
        if sb.compressor == sblk.ANY:
            sb = superblock = self.superblock = replace(sb, compressor=_compressor(source, sb, header))
        metadata = self._metadata = Metadata(source, decompress, sb.byteorder, header)
        if sb.is_old:
            ids, ends = self._old_owners()
        else:
            owners = IndexedTable(metadata, sb.id_table, sb.ids, 4, "owner")
            ids, ends = _owners(owners.all(), "<"), [owners.first_block()]
        self.xattrs = XattrTable(metadata, sb.xattr_table) if sb.has_xattrs else None
        fragments = FragmentTable(metadata, sb)
        # The directory table ends where the first of the tables after it begins.
        ends.append(sb.bytes_used)
        if sb.fragments:
            ends.append(fragments.first_block())
        if sb.exportable:
            ends.append(IndexedTable(metadata, sb.export_table, sb.inodes, 8, "export").first_block())
        if self.xattrs is not None:
            ends.append(self.xattrs.first_block)
        directories_end = min(end for end in ends if end > sb.directory_table)
        self._inode_bytes = Table(metadata, sb.inode_table, sb.directory_table, "inode table")
        listings = Table(metadata, sb.directory_table, directories_end, "directory table")
        if sb.is_old:
            self._inodes: InodeTable = OldInodeTable(self._inode_bytes, ids, sb)
            self._directories = DirectoryTable(listings, self._inode_bytes, old_listing(sb))
        else:
            self._inodes = InodeTable(self._inode_bytes, ids)
            self._directories = DirectoryTable(listings, self._inode_bytes)
        self._blocks = Blocks(source, sb, decompress, fragments, cache_bytes)
        self._listings: GenerationCache[int, Listing] = GenerationCache(LISTED_ENTRIES, _entries)
        self._probes: dict[int, int] = {}
        # By which directory each directory was reached. In a tree there is one such; a second one means
        # that the image has a loop, or the same directory twice, and a walk would never end.
        self._parents: dict[int, int | tuple[int, bytes]] = {self.root: -1}
        if not stat.S_ISDIR(self.inode(self.root).mode):
            raise source.damaged("the root is not a directory")

    def _old_owners(self) -> tuple[tuple[int, ...], list[int]]:
        """Owners and behind them groups, which are in no metadata block; and where the tables begin."""
        sb, source = self.superblock, self.source
        ids = _owners(source.pread(4 * sb.ids, sb.id_table, "owner table"), sb.order)
        if not sb.groups:
            return ids, [sb.id_table]
        groups = _owners(source.pread(4 * sb.groups, sb.group_table, "group table"), sb.order)
        return ids + groups, [sb.id_table, sb.group_table]

    def inode(self, ref: int) -> Inode:
        """The inode at *ref*. EIO."""
        return self._inodes.read(ref)

    def listing(self, ref: int) -> Listing:
        """The entries of the directory at *ref*. ENOTDIR; EIO; EFBIG (two million names).

        Do not change what is returned.
        """
        entries = self._listings.get(ref)
        if entries is None:
            entries = self._list(self._directory(ref))
        self._check(entries, ref)
        return entries

    def is_long(self, ref: int) -> bool:
        """Say whether the listing of a directory is not in memory, and long work. ENOTDIR, EIO."""
        return self._listings.get(ref) is None and self._directory(ref).size > _INDEX_FROM

    def lookup(self, ref: int, name: bytes) -> Inode | None:
        """The inode called *name* in the directory at *ref*; None when there is none. ENOTDIR, EIO."""
        value = self._value(ref, name)
        if value is None:
            return None
        inode = self._inodes.read(value >> 3)
        if stat.S_ISDIR(inode.mode):
            # Of the directories that a listing calls so, parse() has seen to it that each is there once.
            parent = ref if value & 7 == 1 else (ref, name)
            if self._parents.setdefault(inode.ref, parent) != parent:
                raise self.source.damaged(
                    f"directory {inode.ref:#x}, {name!r} in {ref:#x}, is in two places: the tree has a loop"
                )
        return inode

    def _value(self, ref: int, name: bytes) -> int | None:
        entries = self._listings.get(ref)
        if entries is None:
            directory = self._directory(ref)
            found = self._search(directory, name)
            if found is not None:
                return found.value
            entries = self._list(directory)
        value = entries.get(name)
        if value is None:
            self._check(entries, ref)
        return value

    def _search(self, directory: Inode, name: bytes) -> Found | None:
        """Look for *name* by the index, if that is faster; None: search the whole listing."""
        if not directory.index_count or directory.size <= _INDEX_FROM:
            return None
        if len(self._probes) >= 1000:
            self._probes.clear()
        probes = self._probes[directory.ref] = self._probes.get(directory.ref, 0) + 1
        if probes > _PROBES and directory.size <= _INDEX_TO:
            return None
        return self._directories.find(directory, name)

    def _check(self, entries: Listing, ref: int) -> None:
        if entries.problem:
            raise self._directories.damaged(self._directory(ref), entries.problem)

    def _list(self, directory: Inode) -> Listing:
        entries = self._directories.read(directory)
        self._listings.put(directory.ref, entries)
        return entries

    def _directory(self, ref: int) -> Inode:
        inode = self._inodes.read(ref)
        if not stat.S_ISDIR(inode.mode):
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return inode

    def target(self, ref: int) -> bytes:
        """What the symlink at *ref* points to. EINVAL when it is none."""
        inode = self._inodes.read(ref)
        if not stat.S_ISLNK(inode.mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return self._inodes.target(inode)

    def xattr_names(self, ref: int) -> list[bytes]:
        """The names of the extended attributes of the inode at *ref*."""
        if self.xattrs is None:
            return []
        number = self._inodes.read(ref).xattr
        return [] if number == NONE else self.xattrs.names(number)

    def xattr(self, ref: int, name: bytes) -> bytes:
        """The value of an extended attribute. ENODATA; EOPNOTSUPP for one that no squashfs has."""
        if not name.startswith(KINDS):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        number = self._inodes.read(ref).xattr
        value = None if number == NONE or self.xattrs is None else self.xattrs.value(number, name)
        if value is None:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        return value

    def data(self, ref: int) -> FileData:
        """The data of the regular file at *ref*. EISDIR, EINVAL (a special file); EIO, EFBIG."""
        inode = self._inodes.read(ref)
        if not stat.S_ISREG(inode.mode):
            code = errno.EISDIR if stat.S_ISDIR(inode.mode) else errno.EINVAL
            raise OSError(code, os.strerror(code))
        return FileData(self._blocks, self._inode_bytes, inode)

    def compressor_options(self) -> bytes:
        """The options of the compressor as they are stored, or nothing. May block. EIO."""
        has_some = self.superblock.flags & sblk.COMPRESSOR_OPTIONS
        return self._metadata.block(sblk.SIZE)[0] if has_some else b""

    def caches(self) -> dict[str, tuple[int, int]]:
        """How often a block was there decompressed when it was needed, and how often not, by its kind."""
        metadata = self._metadata
        own = {"squashfs metadata": (metadata.hits, metadata.misses), "squashfs data": self._blocks.found()}
        return own | self.source.caches()

    def fingerprint(self) -> str:
        """What the image is recognised by: SHA-256 of the superblock and all tables, in hexadecimal.

        Two images with equal fingerprints hold the same tree, but for data of equal stored length.
        """
        digest = hashlib.sha256(self.superblock.raw)
        position, end = self.superblock.inode_table, self.superblock.bytes_used
        while position < end:
            size = min(1 << 20, end - position)
            digest.update(self.source.pread(size, position, "tables"))
            position += size
        return digest.hexdigest()

    def shrink(self) -> None:
        """Forget what can be read and decompressed again."""
        self._metadata.shrink()
        self._blocks.shrink()
        self._listings.clear()
        if self.xattrs is not None:
            self.xattrs.shrink()

    def close(self) -> None:
        """Wait for reads under way, release threads, memory and the file. Safe to call twice."""
        self.source.stop()
        self._blocks.close()
        self._listings.clear()
        self.source.close()


def _compressor(source: Source, sb: Superblock, header: int) -> int:
    """The compressor of an image that does not say it, by its first block of inodes. LayerError; OSError."""
    word = int.from_bytes(source.pread(2, sb.inode_table, "metadata block"), sb.byteorder)
    if word & _UNCOMPRESSED:
        return _GZIP
    size = min(word, source.size - sb.inode_table - header)
    block = source.pread(size, sb.inode_table + header, "metadata block")
    try:
        decompressor(sb.compression, sb.block_size, source.name)(block, BLOCK)
    except CodecError as error:
        version = "squashfs version {}.{}".format(*sb.version)
        raise LayerError(
            f"{source.name}: {version}, compressed in a way of its vendor, or damaged", VENDOR
        ) from error
    return _GZIP if old_lzma.layout(block, BLOCK) == old_lzma.NONE else _LZMA


def _owners(raw: bytes, order: str) -> tuple[int, ...]:
    ids = struct.unpack(f"{order}{len(raw) // 4}I", raw)
    return tuple(NOBODY if owner == NONE else owner for owner in ids)


def _entries(listing: Listing) -> int:
    return len(listing) + 4


def open_image(path: str, offset: int = 0, cache_bytes: int = CACHE_BYTES) -> Image:
    """Open the image that begins *offset* bytes into the file, block device or URL at *path*.

    Reads little: an image of any size opens in milliseconds. :class:`LayerError` says why an image
    cannot be used: not there, not readable, not a squashfs (and what it is instead), of another
    version, truncated, damaged, or compressed with something there is no library for.
    """
    try:
        data = open_bytes(path)
    except OSError as error:
        raise LayerError(f"{path}: {error.strerror}") from error
    return image_in(data, path, offset, cache_bytes)


def image_in(data: Bytes, path: str, offset: int = 0, cache_bytes: int = CACHE_BYTES) -> Image:
    """Open the image in *data*, which belongs to it then. As :func:`open_image`."""
    name = path if not offset else f"{path} at offset {offset}"
    source = Source(data, name, offset, 0)
    try:
        size = data.size - offset
        if offset < 0 or size <= 0:
            what = f"offset {offset} is beyond its end" if offset else "is empty"
            hint = "offset=auto looks for the image" if offset else "download or copy it again"
            raise LayerError(f"{path}: {what}", hint)
        source.size = size
        start = source.pread(min(size, SAMPLE), 0, "superblock")
        superblock = sblk.parse(start, name, size, lambda count, at: data.pread(count, offset + at))
        source.size = superblock.bytes_used
        return Image(source, superblock, cache_bytes)
    except OSError as error:
        source.close()
        raise LayerError(str(error.strerror)) from error
    except BaseException:
        source.close()
        raise
