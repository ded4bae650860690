"""The two protocols a union is made of: :class:`LowerLayer`, read-only, and :class:`UpperLayer`.

A layer is one tree. It knows nothing of the union: no whiteouts, no opaque directories, no
redirects; those are conventions of :mod:`cowfs.overlay` and to a layer plain device nodes and xattrs.

**Keys.** A layer names its inodes by *keys*. A key is whatever the layer likes (an inode number, an
object); to everybody else it is opaque. Every key comes from ``root``, ``lookup`` or a creating call
and stays valid, through renames and after the last name is gone, until ``forget``.

**Errors.** Every method raises only :class:`OSError` with the errno that the matching system call
would give. ``lookup`` of a name that is not there returns None: misses are frequent, not errors.

**Threads.** All methods are called from one thread, but for those of :class:`File`, which may be
called from any, though never two at once for one File with the same offset range. Layers that are put
behind a :class:`cowfs.layers.slow.SlowLayer` are called from many at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, TypeGuard, runtime_checkable

from cowfs.types import Atime, Attr, DirEntry, FileHandle, FsStats

Key = Any
NamesJob = Callable[[], list[bytes]]
"""Gives the names of a directory that has very many; blocks."""


def at_once(call: Callable[[], None], /) -> None:
    """Make a call at once that may be made later, too."""
    call()


@contextmanager
def may_wait_for_disk(layer: UpperLayer) -> Iterator[None]:
    """Let this thread wait for the disk in the block, whatever it has said."""
    before = layer.hurry(False)
    try:
        yield
    finally:
        layer.hurry(before)


class File(Protocol):
    """An open regular file."""

    def pread(self, size: int, offset: int) -> bytes:
        """Read up to *size* bytes at *offset*; fewer only at the end of the file. May block."""
        ...

    def try_pread(self, size: int, offset: int) -> bytes | None:
        """What pread gives, or None if that is long work, which is better done by pread in a thread."""
        ...

    def pwrite(self, data: bytes, offset: int) -> int:
        """Write all of *data* at *offset*; return its length. May block. EBADF on a lower."""
        ...

    def truncate(self, size: int) -> None:
        """Set the size in bytes."""
        ...

    def fsync(self, datasync: bool) -> None:
        """Return when the file is on disk. Blocks."""
        ...

    def stat(self) -> Attr:
        """The attributes of the open inode (fstat)."""
        ...

    def segments(self, end: int, start: int = 0) -> Iterator[tuple[int, int]]:
        """Yield ``(start, stop)`` of every run of data below *end*, in order; the rest are holes.

        What ends before *start* may be left out.

        A run may be given in parts, one behind the other.
        """
        ...

    def fileno(self) -> int:
        """The kernel's descriptor, or -1 where no kernel file stands behind this one."""
        ...

    def copy_to(self, target: File, size: int | None = None) -> None:
        """Copy the first *size* bytes, or all, to the new, empty file *target*; holes stay holes.

        The fastest way that both files allow: shared blocks, a copy inside the kernel, several
        threads. Blocks. EIO when the file is shorter than its attributes say.
        """
        ...

    def close(self) -> None:
        """Release the file. Safe to call twice."""
        ...


class Allocatable(File, Protocol):
    """A file that can be written to."""

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2). May block. EOPNOTSUPP for a *mode* that the layer cannot do."""
        ...


class LowerLayer(Protocol):
    """A read-only tree."""

    name: str
    """For messages: where the layer comes from."""
    root: Key
    dev: int
    """``st_dev`` of the attributes it gives, except for subvolumes of btrfs."""
    generation: int | None
    """Together with an inode's number this says for all times which inode is meant; an upper's inodes have
    one each (``st_gen``). None if unknown."""
    waits: bool
    """Whether its calls may wait for other machines or programs: threads read the data of its files."""
    has_descriptors: bool
    """Whether an open file of it needs a file descriptor."""
    data_only: bool
    """Whether a union shows no name of it: it has the data of files that layers above name by a redirect."""

    def lookup(self, directory: Key, name: bytes) -> tuple[Key, Attr] | None:
        """Find *name*; None when it is not there. A fresh key may be given for a known inode."""
        ...

    def stat(self, key: Key) -> Attr: ...

    def readdir(self, directory: Key) -> list[DirEntry]:
        """All entries but ``.`` and ``..``, each once, in any order."""
        ...

    def names(self, directory: Key) -> list[bytes] | NamesJob:
        """The names that readdir gives, without their types: cheaper where they are not needed.

        For a very large directory it returns a function that gives them: it may be called once, in any
        thread, while the layer is in use. Names added or removed meanwhile may be missing or not.
        """
        ...

    def readlink(self, key: Key) -> bytes: ...

    def listxattr(self, key: Key) -> list[bytes]:
        """All attribute names, of every namespace that we are allowed to see."""
        ...

    def getxattr(self, key: Key, name: bytes) -> bytes:
        """ENODATA when the inode has no such attribute, EOPNOTSUPP when the layer has none at all."""
        ...

    def open(self, key: Key, flags: int) -> File:
        """Open a regular file. *flags* are those of open(2); a lower knows O_RDONLY only."""
        ...

    def statfs(self) -> FsStats: ...

    def handle(self, key: Key) -> FileHandle | None:
        """What the kernel would find this inode by (its origin), None if the layer has no handles."""
        ...

    def handle_ino(self, handle: FileHandle) -> int | None:
        """The inode number that a handle of this layer means; None for a foreign handle."""
        ...

    def forget(self, key: Key) -> None:
        """The caller will not use *key* again."""
        ...

    def close(self) -> None: ...


class UpperLayer(LowerLayer, Protocol):
    """A tree that can be changed. Every call is atomic: after a crash it happened or it did not.

    New inodes belong to the caller's *uid* and *gid*; *mode* is taken as it is (no umask).
    """

    fill_unit: int
    """The unit of holes in its files, in bytes, if they can be filled while others write to them, as
    :class:`cowfs.layers.partial.Fillable` says; else 0."""
    later: Callable[[Callable[[], None]], None]
    """Takes blocking calls for which nobody waits. A user that has threads sets it; else the calls are made
    at once.
    """
    pressed: Sequence[int]
    """Its first element is not 0 while something should be put on disk before more changes: see relieve."""

    def create(self, directory: Key, name: bytes, mode: int, uid: int, gid: int) -> tuple[Key, File]:
        """Make an empty regular file, open for reading and writing. EEXIST when *name* is there."""
        ...

    def mkdir(self, directory: Key, name: bytes, mode: int, uid: int, gid: int) -> Key: ...

    def symlink(self, directory: Key, name: bytes, target: bytes, uid: int, gid: int) -> Key: ...

    def mknod(self, directory: Key, name: bytes, mode: int, rdev: int, uid: int, gid: int) -> Key: ...

    def link(self, key: Key, directory: Key, name: bytes) -> None:
        """Give the inode one more name. EMLINK if the filesystem does not allow more."""
        ...

    def unlink(self, directory: Key, name: bytes, key: Key | None) -> None:
        """Remove a name. *key* is the inode's, if the caller continues to use it; it stays valid."""
        ...

    def rmdir(self, directory: Key, name: bytes, key: Key | None) -> None: ...

    def rename(
        self,
        source: tuple[Key, bytes],
        target: tuple[Key, bytes],
        flags: int = 0,
        moved: Key | None = None,
        replaced: Key | None = None,
    ) -> None:
        """renameat2(2), with RENAME_NOREPLACE, RENAME_EXCHANGE and RENAME_WHITEOUT.

        *moved* and *replaced* are the keys, if in use, of what stands at *source* and at *target*;
        both stay valid (and follow their inodes to the new places).
        """
        ...

    def chmod(self, key: Key, mode: int) -> None: ...

    def chown(self, key: Key, uid: int, gid: int) -> None:
        """-1 leaves one as it is."""
        ...

    def utimens(self, key: Key, atime_ns: int, mtime_ns: int) -> None: ...

    atime: Atime
    """When reading changes it."""

    def note_reads(self, when: Atime) -> None:
        """Change the atime on later reads through files that are opened from now on."""
        ...

    def was_read(self, key: Key) -> None:
        """Note that something was read, where the kernel does not. A failure is not reported."""
        ...

    def truncate(self, key: Key, size: int) -> None: ...

    def setxattr(self, key: Key, name: bytes, value: bytes, flags: int = 0) -> None:
        """*flags*: XATTR_CREATE, XATTR_REPLACE."""
        ...

    def removexattr(self, key: Key, name: bytes) -> None: ...

    def numbered(self, ino: int) -> Key | None:
        """The key of an inode by its number, which it may not have any more; None where it takes a name."""
        ...

    def open_directory(self, key: Key) -> File:
        """Open a directory, of which only ``fsync`` and ``close`` are good: its names are on disk then."""
        ...

    def sync(self) -> None:
        """Return when everything written so far is on disk. Blocks; may be called from any thread."""
        ...

    def hurry(self, on: bool) -> bool:
        """Say whether what this thread changes must not wait for the disk; return what was said before.

        It gets NotYetFree then where it would have to."""
        ...

    def relieve(self, for_room: bool) -> None:
        """Put on disk what has gathered; *for_room*: after a NotYetFree. Blocks; for another thread."""
        ...


@runtime_checkable
class Cached(Protocol):
    """A layer that keeps in memory what it reads of an image."""

    def caches(self) -> dict[str, tuple[int, int]]:
        """How often what was needed was there, and how often not, by its kind. Does not block."""

    def shrink(self) -> None:
        """Forget all that can be read again."""


class Flagged(Protocol):
    """A layer whose inodes have more than attributes. Flags are asked of files and directories alone."""

    def getflags(self, key: Key) -> int:
        """The flags of chattr(1), as FS_IOC_GETFLAGS returns them; 0 where there are none."""
        ...

    def birth(self, key: Key) -> int | None:
        """When the inode was made, in ns since the epoch; None where that is not kept."""
        ...


class Flaggable(Flagged, Protocol):
    """An upper layer of that kind."""

    def setflags(self, key: Key, flags: int) -> None:
        """Set all of them, as FS_IOC_SETFLAGS does. EOPNOTSUPP. The caller checks the permission."""
        ...

    def version(self, key: Key) -> int:
        """The generation of the inode's number, as FS_IOC_GETVERSION gives it."""
        ...


# isinstance() of a protocol takes longer than most requests: 8 us. So these ask for one method.


def is_flagged(layer: LowerLayer) -> TypeGuard[Flagged]:
    """Whether a layer's inodes have flags."""
    return hasattr(layer, "getflags")


def is_flaggable(layer: UpperLayer) -> TypeGuard[Flaggable]:
    """Whether they can be set as well."""
    return hasattr(layer, "setflags")


class TakesWhole(UpperLayer, Protocol):
    """An upper layer in which a file can appear with all that it has, in one step."""

    def copy_in(
        self, directory: Key, name: bytes, attr: Attr, data: bytes, xattrs: Sequence[tuple[bytes, bytes]]
    ) -> Key:
        """Make a regular file with these *data*, mode, owner, times and *xattrs*, which are no ACLs.

        After a crash it is complete or not there. It inherits nothing of the directory, whose mtime stays as
        it is. EEXIST. A few hundred KiB at most.
        """
        ...


def takes_whole(layer: UpperLayer) -> TypeGuard[TakesWhole]:
    """Return whether a layer has :meth:`TakesWhole.copy_in`."""
    return hasattr(layer, "copy_in")


class Transactional(Protocol):
    """A layer that can put several changes on disk in one step."""

    def together(self) -> AbstractContextManager[object]:
        """The changes in the block reach the disk together or not at all: a few quick ones."""
        ...


def together(layer: UpperLayer) -> AbstractContextManager[object]:
    """Return :meth:`Transactional.together` of a layer that has it; others make the changes one by one."""
    begin: Callable[[], AbstractContextManager[object]] | None = getattr(layer, "together", None)
    return nullcontext() if begin is None else begin()
