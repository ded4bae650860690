"""Identify a lower, so that it is recognised when its store is mounted on it again.

*A squashfs image* is read-only, so its content identifies it: the SHA-256 of the superblock and of everything
from the inode table to the end, which covers all names, attributes, sizes and positions of the data. The data
blocks are left out, so that this takes only milliseconds. The creation date is not used, because reproducible
builds share one, nor is the path.

*An EROFS image* has its data between its tables. It is identified by the superblock, which has a UUID, the
time and the counts, and by its first MiB.

*A tar archive* is identified by its headers and the positions of the data; *a zip archive* by its central
directory, which includes a CRC of each member; *an ISO 9660 image* by its descriptor and all its directories.

*A directory* can change at any time, so its place identifies it: the type of filesystem, the identity of the
filesystem if it has one that survives a reboot, and the directory's inode number.

- ext2/3/4, btrfs, bcachefs, zfs: f_fsid of statfs(2), which they derive from their UUID; and the file handle,
  which includes the inode's generation: the number of a removed directory is used again for a new one.
- xfs: the UUID, because its f_fsid is a device number; and the file handle.
- squashfs, erofs, iso9660 (mounted images, whose UUID no system call returns): f_blocks and f_files.
- all others: f_blocks and the block size. Their f_fsid is a device number or 0.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import zip_longest

from cowfs.errors import LayerError
from cowfs.formats import archives, erofs
from cowfs.formats.squashfs.recognise import MAGIC, SAMPLE, image_behind
from cowfs.formats.squashfs.source import Bytes, FileBytes, open_bytes, open_unchecked
from cowfs.formats.squashfs.superblock import Superblock, parse
from cowfs.formats.verified import checked
from cowfs.linux import files, filesystems
from cowfs.overlay.named_whiteouts import BRANCH_NAMES
from cowfs.store.format.sizes import format_size
from cowfs.types import DATA_ONLY, WHITEOUTS, Identity
from cowfs.url.names import is_url, place

_CHUNK = 1 << 20

_WITH_FSID = {filesystems.EXT, filesystems.BTRFS, filesystems.BCACHEFS, filesystems.ZFS}
_WITH_GENERATIONS = {filesystems.TMPFS, filesystems.F2FS}  # random numbers, and no f_fsid that lasts
_FROZEN = {filesystems.SQUASHFS, filesystems.EROFS, filesystems.ISOFS}
_NAMES = {
    filesystems.EXT: "ext4",
    filesystems.BTRFS: "btrfs",
    filesystems.BCACHEFS: "bcachefs",
    filesystems.ZFS: "zfs",
    filesystems.XFS: "xfs",
    filesystems.SQUASHFS: "squashfs",
    filesystems.EROFS: "erofs",
    filesystems.ISOFS: "iso9660",
    filesystems.TMPFS: "tmpfs",
    filesystems.OVERLAYFS: "overlay",
    filesystems.FUSE: "fuse",
    filesystems.NFS: "nfs",
    filesystems.FAT: "vfat",
}
_XFS_IOC_FSGEOMETRY_V1 = 0x80705864  # _IOR('X', 100, struct xfs_fsop_geom_v1), 112 bytes
_XFS_UUID = slice(64, 80)


def identify_lowers(
    lowers: Sequence[str], offsets: Sequence[int], data_only: int = 0, whiteouts: Sequence[str] = ()
) -> list[Identity]:
    """Return the identities of lowers, topmost first. Blocks. LayerError, as :func:`identify_lower`.

    The last *data_only* lowers are data-only. *offsets* are those of the images in their files, for the first
    lowers. *whiteouts* are the formats of their whiteouts; ``auto`` and missing ones are detected.
    """
    found = [identify_lower(path, at) for path, at in zip_longest(lowers, offsets, fillvalue=0)]  # type: ignore[arg-type]
    merged = len(found) - data_only
    styles = [*whiteouts, *["auto"] * (merged - len(whiteouts))]
    return [
        *(_with_whiteouts(low, style) for low, style in zip(found[:merged], styles, strict=False)),
        *(
            replace(low, fingerprint=DATA_ONLY + low.fingerprint, description=f"{low.description}, data only")
            for low in found[merged:]
        ),
    ]


def _with_whiteouts(low: Identity, style: str) -> Identity:
    """Return the identity with the format of its whiteouts."""
    if style == "auto":
        style = _found_style(low.path) if low.kind == "directory" else "overlayfs"
    if style == "overlayfs":
        return low
    described = f"{low.description}, whiteouts of {style}"
    return replace(low, fingerprint=f"{WHITEOUTS}{style}:{low.fingerprint}", description=described)


def _found_style(path: str) -> str:
    if _is_branch(path):
        return "aufs"
    return "oci" if _is_container_layer(path) else "overlayfs"


def _is_container_layer(path: str) -> bool:
    """Whether a directory is a layer in the storage of podman and buildah: overlay/ID/diff."""
    layer, name = os.path.split(os.path.realpath(path))
    overlay, identifier = os.path.split(layer)
    if name != "diff" or not re.fullmatch("[0-9a-f]{64}", identifier):
        return False
    return os.path.isfile(os.path.join(layer, "link")) and os.path.isdir(os.path.join(overlay, "l"))


def _is_branch(path: str) -> bool:
    """Whether aufs has written to a directory: it leaves entries of its own there."""
    return any(os.path.lexists(os.path.join(path, os.fsdecode(name))) for name in BRANCH_NAMES)


def identify_lower(path: str, offset: int = 0) -> Identity:
    """Return the identity of the lower at *path*: an image or archive in a file, device or URL, or a
    directory.

    An image begins *offset* bytes into the file; the fingerprint does not depend on that. Blocks. LayerError
    if it is missing, unreadable, damaged, or cannot be a lower.
    """
    if is_url(path):
        try:
            with closing(open_bytes(path)) as data:
                return _image(data, path, offset)
        except OSError as error:
            raise LayerError(error.strerror or str(error)) from None
    try:
        fd = files.open_ordinary(path, os.O_RDONLY)
    except OSError as error:
        raise LayerError(*_why(path, error)) from None
    try:
        kind = stat.S_IFMT(os.fstat(fd).st_mode)
        if kind == stat.S_IFDIR and offset:
            raise LayerError(
                f"{path}: is a directory, not an image that begins at offset {offset}", "remove offset="
            )
        if kind == stat.S_IFDIR:
            return _directory(fd, path)
        if kind in {stat.S_IFREG, stat.S_IFBLK}:
            with closing(checked(FileBytes(os.dup(fd)), place(path), open_unchecked)) as data:
                return _image(data, path, offset)
    except OSError as error:
        raise LayerError(f"{path}: cannot be read: {error.strerror}", "check its disk: see dmesg") from None
    finally:
        os.close(fd)
    raise LayerError(f"{path}: neither a squashfs image nor a directory", "mksquashfs creates an image")


def identify_image(fd: int, path: str) -> Identity:
    """Return the identity of the squashfs image in the open file *fd*, which begins at the file's start.

    *path* is for messages. Blocks. LayerError if the file has none.
    """
    try:
        with closing(FileBytes(os.dup(fd))) as data:
            try:
                return _squashfs(data, path, 0)
            except LayerError as error:
                raise LayerError(error.message, _copied_out(data, error.hint)) from None
    except OSError as error:
        raise LayerError(f"{path}: cannot be read: {error.strerror}", "check its disk: see dmesg") from None


def _copied_out(data: Bytes, hint: str) -> str:
    """Return what to do about a file without an image at its start, where no offset can be given."""
    if "offset=" not in hint:
        return hint
    at = image_behind(data.pread(SAMPLE, 0), data.pread)
    number = "OFFSET+1" if at is None or at >= data.size else at + 1
    return f"if an image begins later in the file, copy it out: tail -c +{number} FILE >MODULE"


def _why(path: str, error: OSError) -> tuple[str, str]:
    if error.errno == errno.ENOENT:
        return f"{path}: no such lower", "give the path of a squashfs image or a directory"
    return f"{path}: cannot be opened: {error.strerror}", "the user who mounts must be able to read the lower"


def _image(data: Bytes, path: str, start: int) -> Identity:
    head = data.pread(archives.SAMPLE, start)
    if erofs.is_erofs(head):
        return _erofs(data, path, start)
    kind = archives.kind_of(head)
    if kind and not start:
        return _archive(data, path, kind)
    return _squashfs(data, path, start)


def _archive(data: Bytes, path: str, kind: str) -> Identity:
    archive = archives.INDEXES[kind](data, path)
    what, size, fingerprint = archives.NAMES[kind], format_size(data.size), archive.fingerprint
    return Identity(
        kind=kind,
        fingerprint=fingerprint,
        description=f"{what}, {size}, {archive.inodes} inodes, fingerprint {fingerprint[:8]}",
        path=place(path),
    )


def _erofs(data: Bytes, path: str, start: int) -> Identity:
    """Identify an EROFS image by its superblock and the tables at its start."""
    head = data.pread(min(_CHUNK, data.size - start), start)
    superblock = erofs.parse(head, path, data.size - start)
    date = datetime.datetime.fromtimestamp(superblock.made, datetime.UTC)
    size, inodes = format_size(superblock.size), superblock.inodes
    where = f", at offset {start} of its file" if start else ""
    return Identity(
        kind="erofs",
        fingerprint=hashlib.sha256(superblock.raw + head[: superblock.size]).hexdigest(),
        description=f"EROFS, {size}, {inodes} inodes, made {date:%Y-%m-%d %H:%M:%S} UTC{where}",
        path=place(path),
        offset=start,
    )


def _squashfs(data: Bytes, path: str, start: int) -> Identity:
    superblock = _superblock(data, path, start)
    used = superblock.bytes_used
    digest = hashlib.sha256(superblock.raw)
    for position in range(superblock.inode_table, used, _CHUNK):
        digest.update(data.pread(min(_CHUNK, used - position), start + position))
    date = datetime.datetime.fromtimestamp(superblock.mkfs_time, datetime.UTC)
    size, inodes = format_size(used), superblock.inodes
    where = f", at offset {start} of its file" if start else ""
    return Identity(
        kind="squashfs",
        fingerprint=digest.hexdigest(),
        description=f"squashfs, {size}, {inodes} inodes, made {date:%Y-%m-%d %H:%M:%S} UTC{where}",
        path=place(path),
        offset=start,
    )


def _superblock(data: Bytes, path: str, start: int) -> Superblock:
    """Read the superblock at an offset. LayerError, with what is there instead, if there is none."""
    size, pread = data.size, data.pread
    if not start:
        return parse(pread(SAMPLE, 0), path, size, pread)
    if start >= size:
        raise LayerError(f"{path}: offset {start} is beyond its end ({size} bytes)", "see cowfs info IMAGE")
    try:
        return parse(pread(SAMPLE, start), f"{path} at offset {start}", size - start)
    except LayerError as error:
        head = pread(SAMPLE, 0)
        end = image_behind(head, pread)
        if head.startswith(MAGIC):
            raise LayerError(
                error.message, "an image begins at the start of the file: remove offset="
            ) from None
        if end is not None and start != end < size:
            raise LayerError(error.message, f"if this is an AppImage, try -o offset={end}") from None
        raise


def identify_file(fd: int) -> str:
    """Return an identity of a file that no copy has, and that does not depend on where it is mounted. Blocks.

    "" for a device, and if the filesystem has no such identity (FAT, NFS, FUSE).
    """
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        return ""  # another device may have the number tomorrow
    try:
        magic = files.fs_magic(fd)
        facts = [files.file_handle(fd, b"")] if magic in _WITH_GENERATIONS else _lasting(fd, magic)
    except OSError:
        return ""
    if not facts or facts[-1] is None:
        return ""
    return _fingerprint([f"{magic:x}", os.fstat(fd).st_ino, *facts])


def _lasting(fd: int, magic: int) -> list[object]:
    """Return the identity of the filesystem and the inode's generation; nothing if these do not last."""
    if magic in _WITH_FSID:
        return [f"{os.fstatvfs(fd).f_fsid:x}", files.file_handle(fd, b"")]
    if magic == filesystems.XFS:
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
