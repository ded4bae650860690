"""The two protocols a union is made of: :class:`LowerLayer`, read-only, and :class:`UpperLayer`.

A layer is one tree. It knows nothing about the union: whiteouts, opaque directories and redirects are
conventions of :mod:`cowfs.overlay`, and a layer sees them as plain device nodes and xattrs.

**Keys.** A layer names its inodes by *keys*. A layer can use anything as a key (an inode number, an object);
to its users, a key is opaque. Every key comes from ``root``, ``lookup`` or a call that creates an inode. It
stays valid until ``forget``, through renames and after the last name is removed.

**Errors.** Every method raises only :class:`OSError`, with the errno of the matching system call. ``lookup``
returns None if the name does not exist, because misses are frequent and not errors.

**Threads.** All methods are called from one thread, except those of :class:`File`. Any thread may call these,
but never two at once for the same range of one File. Layers behind a
:class:`cowfs.layers.slow.SlowLayer` are called from many threads at once.
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
    """Make a call now that could also be made later."""
    call()


@contextmanager
def may_wait_for_disk(layer: UpperLayer) -> Iterator[None]:
    """Let this thread wait for the disk in the block, whatever it told :meth:`UpperLayer.hurry`."""
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
        """Return what pread returns, or None if that takes long, and a thread should call pread instead."""
        ...

    def pwrite(self, data: bytes, offset: int) -> int:
        """Write all of *data* at *offset*; return its length. May block. EBADF on a lower."""
        ...

    def truncate(self, size: int) -> None:
        """Set the size in bytes."""
        ...

    def fsync(self, datasync: bool) -> None:
        """Write the file to disk. Blocks until it is there."""
        ...

    def stat(self) -> Attr:
        """Return the attributes of the open inode (fstat(2))."""
        ...

    def segments(self, end: int, start: int = 0) -> Iterator[tuple[int, int]]:
        """Yield ``(start, stop)`` of every run of data below *end*, in order; the rest are holes.

        Runs that end before *start* may be left out. A run may be given in consecutive parts.
        """
        ...

    def fileno(self) -> int:
        """Return the kernel's descriptor of the file, or -1 if it has none."""
        ...

    def copy_to(self, target: File, size: int | None = None) -> None:
        """Copy the first *size* bytes, or all, to the new, empty file *target*; holes stay holes.

        Uses the fastest way that both files allow: shared blocks, a copy in the kernel, several threads.
        Blocks. EIO if the file is shorter than its attributes say.
        """
        ...

    def close(self) -> None:
        """Release the file. Safe to call twice."""
        ...


class Allocatable(File, Protocol):
    """A file that can be written to."""

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        """Allocate space, as fallocate(2) does. May block. EOPNOTSUPP for an unsupported *mode*."""
        ...


class LowerLayer(Protocol):
    """A read-only tree."""

    name: str
    """For messages: where the layer comes from."""
    root: Key
    dev: int
    """``st_dev`` of the attributes it gives, except for subvolumes of btrfs."""
    generation: int | None
    """Identifies an inode for all time, together with its number; each inode of an upper has its own
    (``st_gen``). None if unknown."""
    waits: bool
    """Whether its calls may wait for other machines or programs: threads read the data of its files."""
    has_descriptors: bool
    """Whether an open file of it needs a file descriptor."""
    data_only: bool
    """Whether a union shows no name of it: it has the data of files that layers above name by a redirect."""

    def lookup(self, directory: Key, name: bytes) -> tuple[Key, Attr] | None:
        """Find *name*; None if it does not exist. A known inode may get a new key."""
        ...

    def stat(self, key: Key) -> Attr: ...

    def readdir(self, directory: Key) -> list[DirEntry]:
        """Return all entries except ``.`` and ``..``, each once, in any order."""
        ...

    def pieces(self, directory: Key) -> Iterator[list[DirEntry]]:
        """Yield the entries of :meth:`readdir`, some at a time if there are very many and the layer can.

        Other calls may come in between. It may or may not yield names that are added or removed meanwhile.
        """
        ...

    def names(self, directory: Key) -> list[bytes] | NamesJob:
        """Return the names of :meth:`readdir` without types, which is cheaper.

        For a very large directory, return a function that returns them. It may be called once, in any thread,
        while the layer is in use. It may or may not return names that are added or removed meanwhile.
        """
        ...

    def readlink(self, key: Key) -> bytes: ...

    def listxattr(self, key: Key) -> list[bytes]:
        """Return the names of all xattrs in the namespaces that this process may see."""
        ...

    def getxattr(self, key: Key, name: bytes) -> bytes:
        """Return an xattr's value. ENODATA if the inode has no such xattr, EOPNOTSUPP if the layer has
        none."""
        ...

    def open(self, key: Key, flags: int) -> File:
        """Open a regular file. *flags* are those of open(2); a lower only accepts O_RDONLY."""
        ...

    def statfs(self) -> FsStats: ...

    def handle(self, key: Key) -> FileHandle | None:
        """Return the kernel's file handle of the inode (its origin); None if the layer has no handles."""
        ...

    def handle_ino(self, handle: FileHandle) -> int | None:
        """Return the inode number in a handle of this layer; None for a handle of another layer."""
        ...

    def forget(self, key: Key) -> None:
        """Release *key*: the caller does not use it again."""
        ...

    def close(self) -> None: ...


class UpperLayer(LowerLayer, Protocol):
    """A tree that can be changed. Every call is atomic: a crash leaves it done completely or not at all.

    New inodes belong to *uid* and *gid*. No umask is applied to *mode*.
    """

    fill_unit: int
    """The unit of holes in its files, in bytes, if they can be filled while others write to them, as
    :class:`cowfs.layers.partial.Fillable` says; else 0."""
    later: Callable[[Callable[[], None]], None]
    """Takes blocking calls for which nobody waits. A user that has threads sets it; else the calls are made
    at once.
    """
    pressed: Sequence[int]
    """Its first element is not 0 if pending changes should be written before more are made: see relieve."""

    def create(self, directory: Key, name: bytes, mode: int, uid: int, gid: int) -> tuple[Key, File]:
        """Create an empty regular file, and open it for reading and writing. EEXIST if *name* exists."""
        ...

    def mkdir(self, directory: Key, name: bytes, mode: int, uid: int, gid: int) -> Key: ...

    def symlink(self, directory: Key, name: bytes, target: bytes, uid: int, gid: int) -> Key: ...

    def mknod(self, directory: Key, name: bytes, mode: int, rdev: int, uid: int, gid: int) -> Key: ...

    def link(self, key: Key, directory: Key, name: bytes) -> None:
        """Give the inode another name. EMLINK if the filesystem does not allow more."""
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

        *moved* and *replaced* are the keys of the inodes at *source* and *target*, if these are in use. Both
        stay valid, and follow their inodes to the new places.
        """
        ...

    def chmod(self, key: Key, mode: int) -> None: ...

    def chown(self, key: Key, uid: int, gid: int) -> None:
        """Change the owner; -1 leaves the user or group unchanged."""
        ...

    def utimens(self, key: Key, atime_ns: int, mtime_ns: int) -> None: ...

    atime: Atime
    """When reading changes it."""

    def note_reads(self, when: Atime) -> None:
        """Set when reads change the atime, for files that are opened from now on."""
        ...

    def was_read(self, key: Key) -> None:
        """Update the atime after a read, if the kernel does not. Failures are not reported."""
        ...

    def truncate(self, key: Key, size: int) -> None: ...

    def setxattr(self, key: Key, name: bytes, value: bytes, flags: int = 0) -> None:
        """Set an xattr. *flags*: XATTR_CREATE, XATTR_REPLACE."""
        ...

    def removexattr(self, key: Key, name: bytes) -> None: ...

    def numbered(self, ino: int) -> Key | None:
        """Return a key for an inode number, which may be unused by now; None if the layer finds inodes by
        name."""
        ...

    def open_directory(self, key: Key) -> File:
        """Open a directory to ``fsync`` its names to disk, and ``close`` it; nothing else works."""
        ...

    def sync(self) -> None:
        """Write all pending changes to disk. Blocks until they are there; any thread may call it."""
        ...

    def hurry(self, on: bool) -> bool:
        """Set whether changes by this thread must not wait for the disk; return the previous setting.

        With *on*, a change that would have to wait raises NotYetFree.
        """
        ...

    def relieve(self, for_room: bool) -> None:
        """Write pending changes to disk; *for_room*: after a NotYetFree. Blocks: call it in another
        thread."""
        ...


@runtime_checkable
class Cached(Protocol):
    """A layer with memory caches of an image."""

    def caches(self) -> dict[str, tuple[int, int]]:
        """Return the cache hits and misses by kind. Does not block."""

    def shrink(self) -> None:
        """Drop all cached data that can be read again."""


class Flagged(Protocol):
    """A layer whose inodes have flags and birth times. Only files and directories are asked for flags."""

    def getflags(self, key: Key) -> int:
        """Return the flags of chattr(1) like FS_IOC_GETFLAGS; 0 if there are none."""
        ...

    def birth(self, key: Key) -> int | None:
        """Return the birth time, in ns since the epoch; None if the layer does not keep it."""
        ...


class Flaggable(Flagged, Protocol):
    """An upper layer whose flags can be set."""

    def setflags(self, key: Key, flags: int) -> None:
        """Set all flags like FS_IOC_SETFLAGS. EOPNOTSUPP. The caller checks the permission."""
        ...

    def version(self, key: Key) -> int:
        """Return the generation of the inode number, like FS_IOC_GETVERSION."""
        ...


# isinstance() of a protocol takes 8 us, longer than most requests. So these check for one method.


def is_flagged(layer: LowerLayer) -> TypeGuard[Flagged]:
    """Whether a layer's inodes have flags."""
    return hasattr(layer, "getflags")


def is_flaggable(layer: UpperLayer) -> TypeGuard[Flaggable]:
    """Whether a layer's flags can be set."""
    return hasattr(layer, "setflags")


class TakesWhole(UpperLayer, Protocol):
    """An upper layer that can create a complete file or directory in one step."""

    def copy_in(
        self,
        directory: Key,
        name: bytes,
        attr: Attr,
        data: bytes | None,
        xattrs: Sequence[tuple[bytes, bytes]],
    ) -> Key:
        """Create a regular file or directory with this mode, owner, times and *xattrs* (no ACLs).

        *data* are those of the file, at most a few hundred KiB. With None, a file has the size in *attr* and
        no data, as a hole. After a crash, it is complete or does not exist. It inherits nothing from the
        directory, whose mtime does not change. EEXIST.
        """
        ...


def takes_whole(layer: UpperLayer) -> TypeGuard[TakesWhole]:
    """Whether a layer has :meth:`TakesWhole.copy_in`."""
    return hasattr(layer, "copy_in")


class ReadsWhole(LowerLayer, Protocol):
    """A lower layer that reads small files without opening them."""

    def read_whole(self, key: Key, size: int) -> bytes | None:
        """Return the first *size* bytes of a regular file. May block. EIO.

        None if the file has holes, or is not small: open it.
        """
        ...


def reads_whole(layer: LowerLayer) -> TypeGuard[ReadsWhole]:
    """Whether a layer has :meth:`ReadsWhole.read_whole`."""
    return hasattr(layer, "read_whole")


class QuickUpper(UpperLayer, Protocol):
    """An upper layer with quick ways for what is enough for most files."""

    def add_file(self, directory: Key, name: bytes, mode: int, uid: int, gid: int) -> tuple[Key, int] | None:
        """Create an empty regular file, *mode* with its type; return its key and its generation. EEXIST.

        None if it would inherit something from the directory: use :meth:`create`.
        """
        ...

    def remove_file(self, directory: Key, name: bytes, key: Key) -> bool:
        """Remove a name of a file whose inode is in use by its *key*; return whether it was the last one."""
        ...

    def plain(self, directory: Key, names: Sequence[bytes]) -> list[tuple[Key, int, int]]:
        """Return the key, mode and generation of each name in a directory, of the first ones at least.

        The mode is 0 for a name that does not exist, and for an inode of which a lookup must know more: with
        several names, with xattrs or flags, and one that is no directory, regular file or symbolic link.
        """
        ...


def together(layer: UpperLayer) -> AbstractContextManager[object]:
    """Return a block whose few quick changes go to disk together or not at all, if the layer can do that."""
    begin: Callable[[], AbstractContextManager[object]] | None = getattr(layer, "together", None)
    return nullcontext() if begin is None else begin()
