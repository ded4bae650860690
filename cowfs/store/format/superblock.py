"""The superblock of an ext3 image: is this a store's filesystem, and is it clean?

Layout: include/uapi and fs/ext4/ext4.h of Linux (struct ext4_super_block), little-endian, at byte 1024.
"""

from __future__ import annotations

import os
import struct
import uuid
from dataclasses import dataclass

from cowfs.errors import StoreError
from cowfs.formats.ext3 import features
from cowfs.linux.files import size_of
from cowfs.store.format.sizes import SMALLEST, format_size
from cowfs.store.format.sniff import DYNFILEFS, LUKS, SNAPSHOT, what_is

# inodes, blocks, reserved, free blocks, free inodes, first data block, log2(block size / 1024)
_COUNTS = struct.Struct("<7I")
_STATE = struct.Struct("<H")  # at 58
_UUID = struct.Struct("16s")  # at 104
_REVISION = struct.Struct("<I")  # at 76
_INODE_SIZE = struct.Struct("<H")  # at 88
_JOURNAL_INODE = struct.Struct("<I")  # at 224
_INODE_TABLE = struct.Struct("<I")  # at 8 of a group descriptor
_FIRST_BLOCK = struct.Struct("<I")  # at 40 of an inode
# journal_superblock_s: magic, type, sequence; block size, length, first block, first sequence, start, errno
_JOURNAL = struct.Struct(">3I6I")
_JOURNAL_MAGIC = 0xC03B3998
_VALID, _ERRORS = 1, 2
_WAYS_OUT = {
    LUKS: "cryptsetup open FILE NAME opens it, and /dev/mapper/NAME can be a store",
    DYNFILEFS: "dynfilefs -f FILE -m DIR; mount -o loop DIR/virtual.dat DIR2, and give DIR2",
    SNAPSHOT: "it holds blocks, not files: boot that system with it, and copy the files",
}
"""What to do with a file that begins like this."""


@dataclass(frozen=True, slots=True)
class Superblock:
    """The fields of an ext3 superblock that matter for a store. Sizes are in bytes."""

    block_size: int
    blocks: int
    free_blocks: int
    inodes: int
    free_inodes: int
    needs_recovery: bool
    """Whether the journal holds changes that are not in place yet, whatever its flag says: the image was not
    unmounted, or is mounted now."""
    has_errors: bool
    """Whether the kernel has found it damaged, or it was never cleanly unmounted."""
    uuid: str

    @property
    def size(self) -> int:
        """The size of the filesystem, which may be less than that of its file."""
        return self.blocks * self.block_size

    @property
    def state(self) -> str:
        """``clean``, ``needs recovery`` or ``has errors``."""
        if self.has_errors:
            return "has errors"
        return "needs recovery" if self.needs_recovery else "clean"


def read_superblock(fd: int, path: str, *, smallest: int = SMALLEST) -> Superblock:
    """Read and check the superblock of the image open as *fd*.

    Raises StoreError, naming what the file is, unless it is a whole ext3 filesystem of *smallest*
    bytes or more.
    """
    length = size_of(fd)
    data = os.pread(fd, features.SUPERBLOCK_SIZE, features.SUPERBLOCK)
    found = features.read(data)
    if found is None:
        raise StoreError(f"{path}: not a store but {what_is(fd)}", _way_out(fd))
    if why := features.obstacle(data, path):
        raise StoreError(f"{path}: {why[0]}", why[1])
    inodes, blocks, _, free_blocks, free_inodes, _, log_size = _COUNTS.unpack_from(data)
    (state,) = _STATE.unpack_from(data, 58)
    (identity,) = _UUID.unpack_from(data, 104)
    if log_size > 6 or blocks == 0 or inodes == 0 or free_blocks > blocks or free_inodes > inodes:
        hint = f"copy the file, then run on the copy: e2fsck -f {path}"
        raise StoreError(f"{path}: the ext3 superblock is damaged", hint)
    block_size = 1024 << log_size
    if length < blocks * block_size:
        raise StoreError(
            f"{path}: the image is truncated: it has only {format_size(length)} of "
            f"{format_size(blocks * block_size)}",
            "copy it again from its source",
        )
    if blocks * block_size < smallest:
        raise StoreError(
            f"{path}: {format_size(blocks * block_size)} is too small for a store",
            f"cowfs grow makes it larger, to at least {format_size(SMALLEST)}",
        )
    start, error = _journal(fd, data)
    return Superblock(
        block_size=block_size,
        blocks=blocks,
        free_blocks=free_blocks,
        inodes=inodes,
        free_inodes=free_inodes,
        needs_recovery=bool(found.incompatible & features.NEEDS_RECOVERY or start),
        has_errors=bool(state & _ERRORS or error) or not state & _VALID,
        uuid=str(uuid.UUID(bytes=identity)),
    )


def _way_out(fd: int) -> str:
    """Return a hint about a file that is not a store."""
    head = os.pread(fd, 16, 0)
    for magic, hint in _WAYS_OUT.items():
        if head.startswith(magic):
            return hint
    return "cowfs create creates a store"


def needs_recovery(fd: int) -> bool:
    """Whether the journal has unreplayed transactions, or the superblock says so."""
    data = os.pread(fd, features.SUPERBLOCK_SIZE, features.SUPERBLOCK)
    found = features.read(data)
    return bool((found and found.incompatible & features.NEEDS_RECOVERY) or _journal(fd, data)[0])


def _journal(fd: int, superblock: bytes) -> tuple[int, int]:
    """Return where the journal's log begins (0: nothing to replay), and the error that stopped it, or 0.

    Both are 0 for a journal that cannot be found.
    """
    _, _, _, _, _, first, log_size = _COUNTS.unpack_from(superblock)
    (journal,) = _JOURNAL_INODE.unpack_from(superblock, 224)
    (revision,) = _REVISION.unpack_from(superblock, 76)
    (size,) = _INODE_SIZE.unpack_from(superblock, 88) if revision else (128,)
    block_size = 1024 << log_size
    try:
        (table,) = _INODE_TABLE.unpack(os.pread(fd, 4, (first + 1) * block_size + 8))
        inode = table * block_size + (journal - 1) * size  # the journal's inode is in the first group
        (block,) = _FIRST_BLOCK.unpack(os.pread(fd, 4, inode + 40))
        magic, _, _, _, _, _, _, start, error = _JOURNAL.unpack(
            os.pread(fd, _JOURNAL.size, block * block_size)
        )
    except (OSError, struct.error):
        return 0, 0
    return (start, error) if magic == _JOURNAL_MAGIC else (0, 0)


def flag_recovery(fd: int) -> None:
    """Set the flag *needs_recovery* in an image that needs it: without the flag, e2fsck asks a question."""
    data = os.pread(fd, features.SUPERBLOCK_SIZE, features.SUPERBLOCK)
    found = features.read(data)
    if found and not found.incompatible & features.NEEDS_RECOVERY and _journal(fd, data)[0]:
        words = struct.pack("<I", found.incompatible | features.NEEDS_RECOVERY)
        os.pwrite(fd, words, features.SUPERBLOCK + 96)
