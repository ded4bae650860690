"""An open image: the interface of the package.

An inode is given by its reference, an integer. Results are plain data.
"""

from __future__ import annotations

import errno
import hashlib
import stat
import struct
from dataclasses import replace

from cowfs.errors import LayerError, os_error
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
"""The owner that the kernel shows for 0xffffffff, which means none (overflowuid)."""
CACHE_BYTES = 32 << 20
"""How many bytes of decompressed data of one image are cached."""
LISTED_ENTRIES = 200_000
"""How many directory entries are cached in dictionaries, for quick lookups (about 150 bytes each)."""
_INDEX_FROM = 256 << 10
"""A directory with a longer listing is at first searched by its index."""
_INDEX_TO = 1 << 19
"""Directories with a listing longer than this are only ever searched by their index: others would wait."""
_GZIP, _LZMA = 1, 2
"""Compressors by their numbers in the superblock."""
_UNCOMPRESSED = 0x8000
"""The bit in the length of a metadata block."""
_PROBES = 16
"""After how many searches by its index a directory is read completely."""


class Image:
    """A squashfs image, open for reading.

    Any thread may call its methods, and those of what :meth:`data` returns. All of them may block, and raise
    OSError: EIO if the image is damaged (the log says where), or the kernel's error if it cannot be read.
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
        # The directory table ends where the next table begins.
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
        # The parent through which each directory was reached. A second parent means that the image has a
        # loop, or a directory twice, so that a walk might never end.
        self._parents: dict[int, int | tuple[int, bytes]] = {self.root: -1}
        if not stat.S_ISDIR(self.inode(self.root).mode):
            raise source.damaged("the root is not a directory")

    def _old_owners(self) -> tuple[tuple[int, ...], list[int]]:
        """Return owners and then groups, which are not in metadata blocks; and the starts of the tables."""
        sb, source = self.superblock, self.source
        ids = _owners(source.pread(4 * sb.ids, sb.id_table, "owner table"), sb.order)
        if not sb.groups:
            return ids, [sb.id_table]
        groups = _owners(source.pread(4 * sb.groups, sb.group_table, "group table"), sb.order)
        return ids + groups, [sb.id_table, sb.group_table]

    def inode(self, ref: int) -> Inode:
        """Return the inode at *ref*. EIO."""
        return self._inodes.read(ref)

    def listing(self, ref: int) -> Listing:
        """Return the entries of the directory at *ref*. ENOTDIR; EIO; EFBIG (two million names).

        The caller must not change the result.
        """
        entries = self._listings.get(ref)
        if entries is None:
            entries = self._list(self._directory(ref))
        self._check(entries, ref)
        return entries

    def is_long(self, ref: int) -> bool:
        """Whether the listing of a directory is not cached, and takes long to read. ENOTDIR, EIO."""
        return self._listings.get(ref) is None and self._directory(ref).size > _INDEX_FROM

    def lookup(self, ref: int, name: bytes) -> Inode | None:
        """Return the inode *name* in the directory at *ref*; None if it does not exist. ENOTDIR, EIO."""
        value = self._value(ref, name)
        if value is None:
            return None
        inode = self._inodes.read(value >> 3)
        if stat.S_ISDIR(inode.mode):
            # parse() has made sure that a listing has each directory only once.
            parent = ref if value & 7 == 1 else (ref, name)
            if self._parents.setdefault(inode.ref, parent) != parent:
                raise self.source.damaged(
                    f"directory {inode.ref:#x}, {name!r} in {ref:#x}, has two parents: the tree has a loop"
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
        """Search for *name* by the index, if that is faster; None if the whole listing must be searched."""
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
            raise os_error(errno.ENOTDIR)
        return inode

    def target(self, ref: int) -> bytes:
        """Return the target of the symbolic link at *ref*. EINVAL if it is not one."""
        inode = self._inodes.read(ref)
        if not stat.S_ISLNK(inode.mode):
            raise os_error(errno.EINVAL)
        return self._inodes.target(inode)

    def xattr_names(self, ref: int) -> list[bytes]:
        """Return the names of the xattrs of the inode at *ref*."""
        if self.xattrs is None:
            return []
        number = self._inodes.read(ref).xattr
        return [] if number == NONE else self.xattrs.names(number)

    def xattr(self, ref: int, name: bytes) -> bytes:
        """Return the value of an xattr.

        ENODATA; EOPNOTSUPP for a namespace that squashfs does not support.
        """
        if not name.startswith(KINDS):
            raise os_error(errno.EOPNOTSUPP)
        number = self._inodes.read(ref).xattr
        value = None if number == NONE or self.xattrs is None else self.xattrs.value(number, name)
        if value is None:
            raise os_error(errno.ENODATA)
        return value

    def data(self, ref: int) -> FileData:
        """Return the data of the regular file at *ref*. EISDIR, EINVAL (a special file); EIO, EFBIG."""
        inode = self._inodes.read(ref)
        if not stat.S_ISREG(inode.mode):
            code = errno.EISDIR if stat.S_ISDIR(inode.mode) else errno.EINVAL
            raise os_error(code)
        return FileData(self._blocks, self._inode_bytes, inode)

    def compressor_options(self) -> bytes:
        """Return the stored options of the compressor, or b"". May block. EIO."""
        has_some = self.superblock.flags & sblk.COMPRESSOR_OPTIONS
        return self._metadata.block(sblk.SIZE)[0] if has_some else b""

    def caches(self) -> dict[str, tuple[int, int]]:
        """Return the hits and misses of each cache, by its name."""
        metadata = self._metadata
        own = {"squashfs metadata": (metadata.hits, metadata.misses), "squashfs data": self._blocks.found()}
        return own | self.source.caches()

    def fingerprint(self) -> str:
        """Return the fingerprint: SHA-256 of the superblock and all tables, in hexadecimal.

        Two images with the same fingerprint have the same tree. Only file data of equal stored length may
        differ.
        """
        digest = hashlib.sha256(self.superblock.raw)
        position, end = self.superblock.inode_table, self.superblock.bytes_used
        while position < end:
            size = min(1 << 20, end - position)
            digest.update(self.source.pread(size, position, "tables"))
            position += size
        return digest.hexdigest()

    def shrink(self) -> None:
        """Free the caches."""
        self._metadata.shrink()
        self._blocks.shrink()
        self._listings.clear()
        self._directories.shrink()
        if self.xattrs is not None:
            self.xattrs.shrink()

    def close(self) -> None:
        """Wait for running reads, and release threads, memory and the file. Safe to call twice."""
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
    """Open the image that begins *offset* bytes into the file, block device or URL *path*.

    Reads little, so that an image of any size opens in milliseconds. :class:`LayerError` says why an image
    cannot be used: missing, unreadable, not a squashfs image (and what it is), of an unsupported version,
    truncated, damaged, or compressed with a method whose library is not installed.
    """
    try:
        data = open_bytes(path)
    except OSError as error:
        raise LayerError(
            f"{path}: {error.strerror}", "give the path of an image that you may read"
        ) from error
    return image_in(data, path, offset, cache_bytes)


def image_in(data: Bytes, path: str, offset: int = 0, cache_bytes: int = CACHE_BYTES) -> Image:
    """Open the image in *data*, which it closes. See :func:`open_image`."""
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
