"""What a lower layer is recognised by when its store is mounted on it again.

*A squashfs image* is read-only, so its identity is its content: the SHA-256 of the superblock and of
everything from the inode table to the end, that is all names, attributes, sizes and the places of the
data. Only the data blocks themselves are left out, to stay in milliseconds. The date it was made on
is no identity (reproducible builds share one), and neither is its path.

*A directory* may change at any time, so its identity is that of the place: the kind of filesystem, the
identity of the filesystem where one survives a reboot, and the directory's inode number.

- ext2/3/4, btrfs, bcachefs, zfs: statfs(2)'s f_fsid, which these derive from their UUID; and the file
  handle, which has the inode's generation besides its number: a removed directory's number is given
  to the next one that is made.
- xfs: the UUID itself, its f_fsid is a device number; and the file handle.
- squashfs, erofs, iso9660 (mounted images, which have no UUID that can be asked for): f_blocks and f_files.
- all others: f_blocks and the block size. Their f_fsid is a device number or nothing at all.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import hashlib
import os
import stat

from cowfs.errors import LayerError
from cowfs.formats.squashfs.recognise import SAMPLE, appended_at
from cowfs.formats.squashfs.superblock import Superblock, parse
from cowfs.linux import files
from cowfs.store.sizes import format_size
from cowfs.types import Identity

_CHUNK = 1 << 20

_EXT, _BTRFS, _BCACHEFS, _ZFS, _XFS = 0xEF53, 0x9123683E, 0xCA451A4E, 0x2FC12FC1, 0x58465342
_WITH_FSID = {_EXT, _BTRFS, _BCACHEFS, _ZFS}
_WITH_GENERATIONS = {0x01021994, 0xF2F52010}  # tmpfs, f2fs: random numbers, and no f_fsid that lasts
_FROZEN = {0x73717368, 0xE0F5E1E2, 0x9660}  # squashfs, erofs, iso9660
_NAMES = {
    _EXT: "ext4",
    _BTRFS: "btrfs",
    _BCACHEFS: "bcachefs",
    _ZFS: "zfs",
    _XFS: "xfs",
    0x73717368: "squashfs",
    0xE0F5E1E2: "erofs",
    0x9660: "iso9660",
    0x01021994: "tmpfs",
    0x794C7630: "overlay",
    0x65735546: "fuse",
    0x6969: "nfs",
    0x4D44: "vfat",
}
_XFS_IOC_FSGEOMETRY_V1 = 0x80705864  # _IOR('X', 100, struct xfs_fsop_geom_v1), 112 bytes
_XFS_UUID = slice(64, 80)


def identify_lower(path: str, offset: int = 0) -> Identity:
    """Return the identity of the lower at *path*, a squashfs image or a directory. Reads from disk.

    The image begins *offset* bytes into the file; its fingerprint is that of the same image in a file of
    its own. Raises LayerError when it is missing, unreadable, damaged, or nothing that can be a lower.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise LayerError(*_why(path, error)) from None
    try:
        kind = stat.S_IFMT(os.fstat(fd).st_mode)
        if kind == stat.S_IFDIR and offset:
            raise LayerError(
                f"{path}: is a directory, not an image that begins at offset {offset}", "leave offset= out"
            )
        if kind == stat.S_IFDIR:
            return _directory(fd, path)
        if kind == stat.S_IFREG:
            return _squashfs(fd, path, offset)
    except OSError as error:
        raise LayerError(f"{path}: cannot be read: {error.strerror}") from None
    finally:
        os.close(fd)
    raise LayerError(f"{path}: neither a squashfs image nor a directory", "mksquashfs makes an image")


def _why(path: str, error: OSError) -> tuple[str, str]:
    if error.errno == errno.ENOENT:
        return f"{path}: no such lower", "give the path of a squashfs image or of a directory"
    return f"{path}: cannot be opened: {error.strerror}", "a lower is read by whoever mounts it"


def _squashfs(fd: int, path: str, start: int) -> Identity:
    superblock = _superblock(fd, path, start)
    used = superblock.bytes_used
    digest = hashlib.sha256(superblock.raw)
    for position in range(superblock.inode_table, used, _CHUNK):
        digest.update(os.pread(fd, min(_CHUNK, used - position), start + position))
    date = datetime.datetime.fromtimestamp(superblock.mkfs_time, datetime.UTC)
    size, inodes = format_size(used), superblock.inodes
    where = f", at offset {start} of its file" if start else ""
    return Identity(
        kind="squashfs",
        fingerprint=digest.hexdigest(),
        description=f"squashfs, {size}, {inodes} inodes, made {date:%Y-%m-%d %H:%M:%S}{where}",
        path=os.path.abspath(path),
    )


def _superblock(fd: int, path: str, start: int) -> Superblock:
    """Read the superblock at an offset; LayerError says what is there instead, and where to look."""
    size = os.fstat(fd).st_size
    if not start:
        return parse(os.pread(fd, SAMPLE, 0), path, size)
    if start >= size:
        raise LayerError(f"{path}: has no byte at offset {start}: it has {size}", "see cowfs info IMAGE")
    try:
        return parse(os.pread(fd, SAMPLE, start), f"{path} at offset {start}", size - start)
    except LayerError as error:
        head = os.pread(fd, SAMPLE, 0)
        end = appended_at(head)
        if head.startswith(b"hsqs"):
            raise LayerError(
                error.message, "one begins at the start of the file: leave offset= out"
            ) from None
        if end is not None and start != end < size:
            raise LayerError(error.message, f"if this is an AppImage, try -o offset={end}") from None
        raise


def identify_file(fd: int) -> str:
    """Return what a file is known by for as long as it exists, wherever its filesystem is mounted: no copy
    of it has the same. "" where its filesystem has nothing like that (FAT, NFS, FUSE)."""
    try:
        magic = files.fs_magic(fd)
        facts = [files.file_handle(fd, b"")] if magic in _WITH_GENERATIONS else _lasting(fd, magic)
    except OSError:
        return ""
    if not facts or facts[-1] is None:
        return ""
    return _fingerprint([f"{magic:x}", os.fstat(fd).st_ino, *facts])


def _lasting(fd: int, magic: int) -> list[object]:
    """Return what tells of the filesystem and of the inode's generation; nothing where that does not last."""
    if magic in _WITH_FSID:
        return [f"{os.fstatvfs(fd).f_fsid:x}", files.file_handle(fd, b"")]
    if magic == _XFS:
        return [_xfs_uuid(fd), files.file_handle(fd, b"")]
    return []


def _fingerprint(facts: list[object]) -> str:
    return hashlib.sha256(":".join(map(str, facts)).encode()).hexdigest()


def _directory(fd: int, path: str) -> Identity:
    info, place = os.fstat(fd), os.fstatvfs(fd)
    magic = files.fs_magic(fd)
    facts = _lasting(fd, magic) or [place.f_blocks, place.f_frsize]
    facts += [place.f_files] if magic in _FROZEN else []
    fingerprint = _fingerprint([f"{magic:x}", info.st_ino, *facts])
    name = _NAMES.get(magic, f"filesystem {magic:#x}")
    return Identity(
        kind="directory",
        fingerprint=fingerprint,
        description=f"directory on {name}, inode {info.st_ino}, fingerprint {fingerprint[:8]}",
        path=os.path.abspath(path),
    )


def _xfs_uuid(fd: int) -> str:
    geometry = bytearray(112)
    fcntl.ioctl(fd, _XFS_IOC_FSGEOMETRY_V1, geometry, True)
    return bytes(geometry[_XFS_UUID]).hex()
