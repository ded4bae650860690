"""Plain data that every part of cowfs understands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Attr(Protocol):
    """The attributes of an inode, under the names of :class:`os.stat_result`.

    ``os.stat_result`` itself is an Attr; layers that do not get one from the kernel answer
    with :class:`AttrData`. Times are nanoseconds since the epoch, ``st_blocks`` counts 512 bytes.
    """

    @property
    def st_mode(self) -> int: ...
    @property
    def st_ino(self) -> int: ...
    @property
    def st_dev(self) -> int: ...
    @property
    def st_nlink(self) -> int: ...
    @property
    def st_uid(self) -> int: ...
    @property
    def st_gid(self) -> int: ...
    @property
    def st_rdev(self) -> int: ...
    @property
    def st_size(self) -> int: ...
    @property
    def st_blocks(self) -> int: ...
    @property
    def st_blksize(self) -> int: ...
    @property
    def st_atime_ns(self) -> int: ...
    @property
    def st_mtime_ns(self) -> int: ...
    @property
    def st_ctime_ns(self) -> int: ...


@dataclass(slots=True)
class AttrData:
    """An :class:`Attr` that cowfs makes itself."""

    st_mode: int
    st_ino: int
    st_dev: int = 0
    st_nlink: int = 1
    st_uid: int = 0
    st_gid: int = 0
    st_rdev: int = 0
    st_size: int = 0
    st_blocks: int = 0
    st_blksize: int = 4096
    st_atime_ns: int = 0
    st_mtime_ns: int = 0
    st_ctime_ns: int = 0
    st_gen: int = 0
    """Tells the inode from those that had its number before, where the layer knows that (ioctl_iflags(2))."""


def own_attr(attr: Attr) -> AttrData:
    """Return the same attributes as an :class:`AttrData` that may be changed; without ``st_gen``."""
    return AttrData(
        attr.st_mode,
        attr.st_ino,
        attr.st_dev,
        attr.st_nlink,
        attr.st_uid,
        attr.st_gid,
        attr.st_rdev,
        attr.st_size,
        attr.st_blocks,
        attr.st_blksize,
        attr.st_atime_ns,
        attr.st_mtime_ns,
        attr.st_ctime_ns,
    )


class DirEntry(NamedTuple):
    """A name in a directory of a layer, as readdir(3) returns it."""

    name: bytes
    type: int
    """The S_IFMT bits of the mode, or 0 where the layer cannot tell without a stat."""


class FileHandle(NamedTuple):
    """A file handle as name_to_handle_at(2) returns it: the kernel can find an inode by it."""

    type: int
    data: bytes
    uuid: bytes = bytes(16)
    """The UUID of the filesystem, all zero where it has none (squashfs)."""
    place: bytes = b""
    """Where a layer has the inode: tells apart those to which a bad image gives one handle."""
    lower: int = 0
    """Which lower, counted from the topmost, if that has a UUID of :func:`lower_uuid`."""


NO_UUID = bytes(16)
_LOWER = b"cowfs lower "


def lower_uuid(number: int) -> bytes:
    """Return the UUID for handles of a lower that has the UUID of one below it, or both have none.

    *number* counts from the lowest, so that it stays when other lowers are put on top.
    """
    return _LOWER + number.to_bytes(4, "big")


def is_lower_uuid(uuid: bytes) -> bool:
    """Whether a UUID is one of :func:`lower_uuid`."""
    return uuid.startswith(_LOWER)


@dataclass(frozen=True, slots=True)
class FsStats:
    """The numbers of statfs(2): *bsize* in bytes, *blocks* counted in *frsize*."""

    bsize: int
    frsize: int
    blocks: int
    bfree: int
    bavail: int
    files: int
    ffree: int
    favail: int
    namemax: int = 255


class Atime(NamedTuple):
    """When reads of the store change the atime, as in mount(8); by default never."""

    files: bool = False
    """Whether reading a file updates an atime that is older than the last change or a day (relatime)."""
    directories: bool = False
    """The same for directories."""
    always: bool = False
    """Whether every read updates it (strictatime)."""


DATA_ONLY = "data-only:"
"""How the fingerprint of a data-only lower begins."""
WHITEOUTS = "whiteouts-"
"""How that of a lower begins whose whiteouts are not overlayfs's; their style, and a colon follow."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What identifies a lower layer at the next mount."""

    kind: str
    """``squashfs`` or ``directory``."""
    fingerprint: str
    """Two lowers with equal fingerprints hold the same tree."""
    description: str
    """For messages: what a person recognises it by (size, date, number of inodes)."""
    path: str
    """Where it was found; not part of the identity."""
    offset: int = 0
    """Where in that file the image begins, in bytes; not part of the identity either."""

    @property
    def data_only(self) -> bool:
        """Whether the layer only provides data of files, and shows no names. It is part of the identity."""
        return self.fingerprint.startswith(DATA_ONLY)

    @property
    def whiteouts(self) -> str:
        """The format of its whiteouts (cowfs.overlay.named_whiteouts). It is part of the identity."""
        if not self.fingerprint.startswith(WHITEOUTS):
            return "overlayfs"
        return self.fingerprint[len(WHITEOUTS) :].partition(":")[0]


@dataclass(frozen=True, slots=True)
class Change:
    """One difference between a merged tree and its lower."""

    kind: str
    """``A`` added, ``M`` modified, ``D`` deleted, ``R`` renamed (a redirected directory)."""
    path: bytes
    """Relative to the root of the tree, without a leading slash."""
    what: tuple[str, ...] = ()
    """For ``M``: which of ``type content mode owner times xattrs target device`` differ."""
    source: bytes | None = None
    """For ``R``: the path that the directory had in the lower."""
    type: str = "file"
    """``file directory symlink char block fifo socket``: the type now (or before, for ``D``)."""
    xattrs: tuple[bytes, ...] = ()
    """If these differ (``what``): the names of those that do, also of ACLs (``system.posix_acl_access``)."""
