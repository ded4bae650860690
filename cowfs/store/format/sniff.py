"""Find out what a file is that cannot be used as a store, so that an error message can name it."""

from __future__ import annotations

import os
import re

from cowfs.errors import StoreError, UsageError
from cowfs.formats.squashfs.recognise import EXT_MAGIC, LZMA_MAGICS, MAGIC, MAGIC_BIG_ENDIAN, recognise
from cowfs.linux.files import is_image, open_ordinary
from cowfs.linux.fuse import FSTYPE, LISTED
from cowfs.linux.mount_table import mount_of
from cowfs.overlay.named_whiteouts import BRANCH_NAMES
from cowfs.store.format.foreign import pair_in

_HEAD = 69_632
"""How much of a file is looked at: btrfs has its magic at 64 KiB."""

LUKS = b"LUKS\xba\xbe"
DYNFILEFS = b"DynfilefsFS "
SNAPSHOT = b"SnAp"
"""The magic of the kernel's drivers/md/dm-snap-persistent.c."""
_MAGICS: tuple[tuple[int, bytes, str], ...] = (
    (0, MAGIC, "a squashfs image"),
    (0, MAGIC_BIG_ENDIAN, "a big-endian squashfs image"),
    *((0, magic, "a squashfs image") for magic in LZMA_MAGICS),
    (0, LUKS, "a LUKS encrypted volume"),
    (3, b"NTFS    ", "an NTFS filesystem"),
    (3, b"EXFAT   ", "an exFAT filesystem"),
    (54, b"FAT", "a FAT filesystem"),
    (82, b"FAT32   ", "a FAT filesystem"),
    (512, b"EFI PART", "a disk image with a GPT partition table"),
    (0, DYNFILEFS, "a container of DynFileFS, as Slax and MiniOS make it"),
    (0, SNAPSHOT, "a device-mapper snapshot, as live systems of Fedora make it"),
    (1024, b"\x10\x20\xf5\xf2", "an f2fs filesystem"),
    (4086, b"SWAPSPACE2", "a swap area"),
    (65_588, b"ReIsEr", "a ReiserFS filesystem"),
    (65_600, b"_BHRfS_M", "a btrfs filesystem"),
)
"""What a disk can contain. *recognise* knows archives, programs and similar files."""


def may_be_store(path: str) -> bool:
    """Whether something looks like a store at first sight.

    It is an ext filesystem, a directory with upper/ and work/, or one that aufs wrote to.
    """
    if os.path.isdir(path):
        if any(os.path.lexists(os.path.join(path, os.fsdecode(name))) for name in BRANCH_NAMES):
            return True
        return is_store_directory(path) or pair_in(path) is not None
    try:
        fd = open_ordinary(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        offset, magic = EXT_MAGIC
        return os.pread(fd, len(magic), offset) == magic
    except OSError:
        return False
    finally:
        os.close(fd)


def is_store_directory(path: str) -> bool:
    """Whether a directory has the parts of a store. Another program may have made them."""
    return all(os.path.isdir(os.path.join(path, name)) for name in ("upper", "work"))


_SUBDIR = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")
_TAKEN = {"upper", "work", "cowfs", "lost+found"}


def is_subdir_name(name: str) -> bool:
    """Whether a store in a store may have that name."""
    return _SUBDIR.fullmatch(name) is not None and name not in _TAKEN


def subdir(store: str, name: str) -> str:
    """Return the path of the store *name* in another: STORE/NAME, even if STORE is an image; or ``memory``.

    UsageError for an invalid name.
    """
    if not is_subdir_name(name):
        raise UsageError(
            f"subdir={name}: not a name for a store in a store",
            "use letters, digits and _ . + -; not upper or work",
        )
    return store if store == "memory" else os.path.join(store, name)


def split_subdir(path: str) -> tuple[str, str]:
    """Return image and name if *path* is a store in an image, IMAGE/NAME; else *path* and ""."""
    image, name = os.path.split(path.rstrip("/"))
    return (image, name) if name and not os.path.lexists(path) and is_image(image) else (path, "")


def may_exist(path: str) -> bool:
    """Whether *path* exists, or leads into an image that exists."""
    return os.path.lexists(path) or bool(split_subdir(path)[1])


def is_plain_directory(path: str) -> bool:
    """Whether *path* is a directory that contains no part of a store, not even of a damaged one."""
    parts = ("upper", "work", "cowfs", *map(os.fsdecode, BRANCH_NAMES))
    if not os.path.isdir(path) or any(os.path.lexists(os.path.join(path, name)) for name in parts):
        return False
    return pair_in(path) is None


def not_a_store(path: str) -> StoreError:
    """Return the error for a directory that is not a store; it may be in a mount, or a mountpoint."""
    hint = LISTED
    place = os.path.realpath(path)
    mount = mount_of(place)
    if mount is not None and mount.fstype == FSTYPE:
        return StoreError(f"{path}: is a mountpoint, not a store", "give its store, and unmount it first")
    while (above := os.path.dirname(place)) != place:
        place = above
        mount = mount_of(place)
        if mount is not None:
            if mount.fstype == FSTYPE:
                hint = f"it is inside the mount at {place}: give that"
            break
    stores = sorted(filter(is_subdir_name, os.listdir(path) if os.access(path, os.R_OK) else ()))
    stores = [name for name in stores if is_store_directory(os.path.join(path, name))]
    if stores:
        hint = f"name a store in it: {', '.join(os.path.join(path, name) for name in stores[:5])}"
    return StoreError(f"{path}: neither a store nor a cowfs mountpoint", hint)


def what_is(fd: int) -> str:
    """Return the kind of an open file with its article: ``a text file``. Only reads its head."""
    head = os.pread(fd, _HEAD, 0)
    for offset, magic, name in _MAGICS:
        if head.startswith(magic, offset):
            return name
    return recognise(head) or "a file of unknown kind"


def looks_like_image(spec: str) -> bool:
    """Whether the name of a missing store looks like a file: ``sysrcd.bs``, ``store.img``."""
    return bool(os.path.splitext(os.path.basename(spec))[1])
