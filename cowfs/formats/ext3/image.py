"""The operations on the inodes of an ext3 image, which call the engine.

An inode is given by its number. All functions raise only OSError.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, Unpack

from cowfs.errors import NoRoom, os_error
from cowfs.formats.ext3._engine import ffi, lib
from cowfs.formats.ext3.directory import (
    INO,
    LARGE,
    MOST_LISTED,
    AnyNames,
    Directories,
    LargeNames,
    entry,
    moved,
    packed,
    parse,
    place_of,
)
from cowfs.formats.ext3.opened import CHARS, How, Opened, unset
from cowfs.formats.ext3.records import FIRST, INODE, Inode, number_of, time_of

ROOT = 2
MODE, UID, GID, ATIME, MTIME = 1, 2, 4, 8, 16
"""The attributes that setattr sets, as bits."""

_NOTHING_NEW = 1000
"""How many parts of a directory in a row may have no new name."""
_XATTR = 1024
"""The size of a buffer that most xattrs fit in, in bytes."""
_LENGTHS = struct.Struct("=II")
Xattrs = Sequence[tuple[bytes, bytes]]


def _pack_xattrs(attrs: Xattrs) -> Any:
    """Return xattrs in the form of x3_new. The caller keeps a reference during the call of the engine."""
    parts = [part for name, value in attrs for part in (_LENGTHS.pack(len(name), len(value)), name, value)]
    return ffi.from_buffer(CHARS, b"".join(parts))


class Image(Opened):
    """An open image. It duplicates the descriptor, and the caller closes its own.

    Only one thread may call the methods about names. Any thread may call those about one inode, and
    ``commit``.
    """

    def __init__(self, fd: int, name: str, **how: Unpack[How]) -> None:
        """Open the image; see :class:`~cowfs.formats.ext3.opened.Opened`."""
        super().__init__(fd, name, **how)
        self._attr = ffi.new("struct x3_attr *")
        self._new = ffi.new("struct x3_new *")
        self._copy = ffi.new("struct x3_copy *")
        self._attr_bytes = ffi.buffer(self._attr)
        self._directories = Directories(self._list, self._large)

    def resume(self, fd: int = -1) -> None:
        self._directories.clear()  # they may have changed, even if what follows fails
        super().resume(fd)

    def shrink(self) -> None:
        """Free the caches. Counts as a method about names."""
        super().shrink()
        self._directories.clear()

    # --- inodes

    def raw(self, ino: int) -> tuple[int, ...]:
        """Return the fields of an Inode quickly, with the times as numbers. For one thread.

        ESTALE if the inode is not in use.
        """
        code = lib.x3_getattr(self.handle, ino, self._attr)
        if code < 0:
            raise self._failure(code)
        return INODE.unpack(self._attr_bytes)

    def child(self, directory: int, ino: int) -> tuple[int, ...]:
        """Return the same for the inode of a name in a directory. EUCLEAN if a directory has two parents."""
        code = lib.x3_child(self.handle, directory, ino, self._attr)
        if code < 0:
            raise self._failure(code)
        return INODE.unpack(self._attr_bytes)

    def plain(self, directory: int, inodes: array[int]) -> array[int]:
        """Return the mode and generation of each inode with a name in a directory, one after the other.

        These are two zeros for an inode of which a lookup must know more: see x3_plain() in engine.h. The
        arrays have the type I.
        """
        out = array("I", bytes(8 * len(inodes)))
        lib.x3_plain(
            self.handle, directory, ffi.from_buffer("uint32_t[]", inodes), len(inodes),
            ffi.from_buffer("uint32_t[]", out),
        )  # fmt: skip
        return out

    def getattr(self, ino: int) -> Inode:
        """Return the attributes. ESTALE. For any thread."""
        attr = ffi.new("struct x3_attr *")
        self._done(lib.x3_getattr(self.handle, ino, attr))
        inode = Inode._make(INODE.unpack(ffi.buffer(attr)))
        times = inode.atime_ns, inode.mtime_ns, inode.ctime_ns
        if min(times) >= FIRST:
            return inode
        atime, mtime, ctime = map(time_of, times)
        return inode._replace(atime_ns=atime, mtime_ns=mtime, ctime_ns=ctime)

    def setattr(
        self,
        ino: int,
        what: int,
        *,
        mode: int = 0,
        uid: int = 0,
        gid: int = 0,
        atime: int = 0,
        mtime: int = 0,
    ) -> None:
        """Set the attributes in *what* in one step. Times are in ns since the epoch. For one thread."""
        attr = self._attr
        if what & (MODE | UID | GID):
            attr.mode, attr.uid, attr.gid = mode, uid, gid
        if what & (ATIME | MTIME):
            attr.atime_ns, attr.mtime_ns = number_of(atime), number_of(mtime)
        self._done(lib.x3_setattr(self.handle, ino, what, attr))

    def setattr_simple(self, ino: int, what: int, *, mode: int = 0, uid: int = 0, gid: int = 0) -> bool:
        """Do the same if the inode is simple (see engine.h); return whether it is."""
        attr = self._attr
        attr.mode, attr.uid, attr.gid = mode, uid, gid
        code = lib.x3_setattr_simple(self.handle, ino, what, attr)
        if code == -errno.EOPNOTSUPP:
            return False
        self._done(code)
        return True

    def calls(self) -> tuple[int, ...]:
        """Return what C needs to serve inodes without Python (cowfs/fuse/store_inodes.c).

        These are the addresses of the image, of some functions of engine.h and of :attr:`pressed`, and the
        block size. They are valid until :meth:`close`.
        """
        names = (
            *("x3_getattr", "x3_setattr_simple", "x3_is_simple", "x3_truncate", "x3_write", "x3_read"),
            *("x3_was_read", "x3_hurry", "x3_is_quick_to_sync"),
        )
        fsync = ffi.addressof(lib, "x3_fsync") if self.is_near else ffi.NULL
        pointers = (self.handle, *(ffi.addressof(lib, name) for name in names), fsync, self.pressed)
        return (*(int(ffi.cast("uintptr_t", pointer)) for pointer in pointers), self.facts().block_size)

    def was_read(self, ino: int, *, always: bool) -> None:
        """Update its atime by the rule of relatime, or *always*. Ignores errors."""
        lib.x3_was_read(self.handle, ino, always)

    def setflags(self, ino: int, flags: int) -> None:
        """Set the flags of chattr(1) that can be set. EOPNOTSUPP, EINVAL."""
        self._done(lib.x3_setflags(self.handle, ino, flags))

    def birth(self, ino: int) -> int | None:
        """Return an inode's time of birth in ns since the epoch; None if it is not recorded."""
        out = ffi.new("int64_t *")
        return int(out[0]) if self._done(lib.x3_birth(self.handle, ino, out)) else None

    def readlink(self, ino: int) -> bytes:
        """Return the target of a symbolic link. EINVAL for any other inode."""
        buffer = unset(CHARS, 4096)
        return bytes(ffi.buffer(buffer, self._done(lib.x3_readlink(self.handle, ino, buffer, 4096))))

    # --- names

    def is_above(self, ino: int, directory: int) -> bool:
        """Whether an inode is *directory*, or above it. EUCLEAN if the directory is not below the root."""
        return bool(self._done(lib.x3_is_above(self.handle, ino, directory)))

    def names(self, directory: int) -> AnyNames:
        """Return all names of a directory; valid until the next call about names. ENOTDIR."""
        return self._directories.names(directory)

    def known(self, directory: int) -> AnyNames | None:
        """Return the names of a directory if they are cached, else None."""
        return self._directories.known(directory)

    def _large(self, directory: int) -> LargeNames | None:
        """Return the names of a large directory; None for any other. ENOTDIR."""
        mode, *_, size, _, _, _, _ = self.raw(directory)
        if not stat.S_ISDIR(mode):
            raise os_error(errno.ENOTDIR)
        if size <= LARGE:
            return None
        return LargeNames(
            lambda name: self._find(directory, name), lambda: iter(self.list_large(directory).items())
        )

    def _find(self, directory: int, name: bytes) -> int | None:
        found = ffi.new("struct x3_found *")
        if not self._done(lib.x3_lookup(self.handle, directory, name, len(name), found), name):
            return None
        place = found.place
        return packed(found.ino, found.type, place.block, place.offset)

    def list_large(self, directory: int) -> dict[bytes, int]:
        """Read all names with their entries from the image. For any thread. Blocks. EFBIG over 2,000,000.

        It may or may not contain names that are added or removed meanwhile. It contains all others.
        """
        names: dict[bytes, int] = {}
        for _ in self.list_pieces(directory, names):
            pass
        return names

    def list_pieces(
        self, directory: int, names: dict[bytes, int] | None = None
    ) -> Iterator[dict[bytes, int]]:
        """Yield what :meth:`list_large` returns, a part at a time; *names* collects it."""
        names, count = {} if names is None else names, 0
        for data in self._list(directory):
            before, some = len(names), dict(parse(data))
            names.update(some)
            # An index may move names to the end meanwhile, so that some are read twice, but not all of them.
            count = 0 if len(names) > before else count + 1
            if len(names) > MOST_LISTED:
                raise OSError(errno.EFBIG, "the directory is too large to be listed", self.name)
            if count > _NOTHING_NEW:
                raise self.damaged(f"directory {directory} repeats its names without end")
            yield some

    def create(
        self,
        directory: int,
        name: bytes,
        mode: int,
        uid: int,
        gid: int,
        rdev: int = 0,
        target: bytes = b"",
        attrs: Xattrs = (),
    ) -> int:
        """Create an inode of any type under a new name, with the xattrs *attrs*; return its number."""
        names = self.names(directory)
        new = self._new
        new.mode, new.uid, new.gid = mode, uid, gid
        new.major, new.minor = (os.major(rdev), os.minor(rdev)) if rdev else (0, 0)
        if target:
            kept = ffi.from_buffer(target)
            new.target = ffi.cast("const char *", kept)
        new.target_len = len(target)
        new.attrs_size = 0
        if attrs:
            kept_attrs = _pack_xattrs(attrs)
            new.attrs, new.attrs_size = kept_attrs, len(kept_attrs)
        code = lib.x3_create(self.handle, directory, name, len(name), names.hint, new)
        if code < 0:
            raise self._failure(code, name)
        ino: int = new.ino
        self._note_new(names, name, ino, mode, new.place)
        return ino

    @property
    def generation_of_new(self) -> int:
        """The generation of the inode that was created last."""
        return int(self._new.attr.generation)

    def copy(
        self,
        directory: int,
        name: bytes,
        fields: tuple[int, int, int],
        times: tuple[int, int],
        data: bytes | int,
        attrs: Xattrs,
    ) -> int:
        """Create a complete regular file or directory under a new name, in one step; return its number.

        *fields*: mode, owner and group; *times*: atime and mtime in ns. Keeps the mtime of the directory.
        *data* is that of the file, or the size of a file that is one hole, or 0 for a directory.
        """
        names = self.names(directory)
        new = self._copy
        new.mode, new.uid, new.gid = fields
        new.atime_ns, new.mtime_ns = number_of(times[0]), number_of(times[1])
        kept_attrs = _pack_xattrs(attrs)
        if isinstance(data, int):
            new.data, new.size = ffi.NULL, data
        else:
            kept = ffi.from_buffer(CHARS, data)
            new.data, new.size = kept, len(data)
        new.attrs, new.attrs_size = kept_attrs, len(kept_attrs)
        code = lib.x3_copy(self.handle, directory, name, len(name), names.hint, new)
        if code < 0:
            raise self._failure(code, name)
        ino: int = new.ino
        self._note_new(names, name, ino, fields[0], new.place)
        return ino

    def _note_new(self, names: AnyNames, name: bytes, ino: int, mode: int, place: Any) -> None:
        if stat.S_ISDIR(mode):
            self._directories.made(ino)
        else:
            self._directories.forget(ino)  # a removed directory may have had this number
        names[name] = entry(ino, mode, place.block, place.offset)
        names.hint = place.block

    def link(self, ino: int, mode: int, directory: int, name: bytes) -> None:
        """Give an inode, whose type is in *mode*, another name, which must not exist."""
        names = self.names(directory)
        place = ffi.new("struct x3_place *")
        code = lib.x3_link(self.handle, ino, directory, name, len(name), names.hint, place)
        self._done(code, name)
        names[name] = entry(ino, mode, place.block, place.offset)
        names.hint = place.block

    def unlink(self, directory: int, name: bytes, *, keep: bool) -> bool:
        """Remove a name of a file. Without any other name, the inode is removed, or at release if *keep*.

        Returns whether the inode still exists without a name.
        """
        return self._remove(lib.x3_unlink, directory, name, keep=keep)

    def rmdir(self, directory: int, name: bytes, *, keep: bool) -> bool:
        """Remove an empty directory; see :meth:`unlink`. ENOTEMPTY."""
        ino = self.names(directory)[name] & INO
        kept = self._remove(lib.x3_rmdir, directory, name, keep=keep)
        self._directories.forget(ino)
        return kept

    def _remove(self, call: Any, directory: int, name: bytes, *, keep: bool) -> bool:
        names = self.names(directory)
        value = names[name]
        place = place_of(value)
        kept = self._done(call(self.handle, directory, name, len(name), place, value & INO, keep), name)
        del names[name]
        names.hint = min(names.hint, place[0])
        return bool(kept)

    def rename(
        self,
        source: tuple[int, bytes],
        target: tuple[int, bytes],
        *,
        exchange: bool = False,
        whiteout: tuple[int, int] | None = None,
        keep: bool = False,
    ) -> bool:
        """Move a name, or exchange two. Returns whether a replaced inode still exists without a name.

        With *whiteout*, its owner and group, a whiteout takes the place of *source*. *keep* keeps a replaced
        inode until release. The names must be of different inodes, and no directory may end up below itself.
        """
        (source_dir, source_name), (target_dir, target_name) = source, target
        names = self.names(source_dir)
        new_names = names if target_dir == source_dir else self.names(target_dir)
        value, replaced = names[source_name], new_names.get(target_name)
        here = place_of(value)
        how = ffi.new("struct x3_rename *")
        how.source_dir, how.target_dir = source_dir, target_dir
        kept, kept_too = ffi.from_buffer(CHARS, source_name), ffi.from_buffer(CHARS, target_name)
        how.source_name, how.target_name = kept, kept_too
        how.source_len, how.target_len = len(source_name), len(target_name)
        how.source_place.block, how.source_place.offset = here
        how.ino, how.hint = value & INO, new_names.hint
        if replaced is not None:
            how.target_place.block, how.target_place.offset = place_of(replaced)
            how.replaced = replaced & INO
        if whiteout is not None:
            how.uid, how.gid = whiteout
        if exchange or keep or whiteout is not None:
            how.flags = (
                (lib.X3_EXCHANGE if exchange else 0)
                | (lib.X3_WHITEOUT if whiteout is not None else 0)
                | (lib.X3_KEEP if keep else 0)
            )
        kept_on = bool(self._done(lib.x3_rename(self.handle, how), source_name, None, target_name))
        place = how.place
        new_names[target_name] = moved(value, place.block, place.offset)
        if exchange and replaced is not None:
            names[source_name] = moved(replaced, *here)
            return False
        if replaced is None:
            new_names.hint = place.block
        else:
            self._directories.forget(replaced & INO)
        if whiteout is not None:
            names[source_name] = entry(how.whiteout, _CHAR, *here)
        else:
            del names[source_name]
            names.hint = min(names.hint, here[0])
        return kept_on

    def release(self, ino: int) -> None:
        """Free an inode that has no name any more."""
        self._done(lib.x3_release(self.handle, ino))

    # --- data

    def pread(self, ino: int, size: int, offset: int) -> bytes:
        """Read up to *size* bytes; fewer only at the end of the file. May block."""
        buffer = unset(CHARS, size)
        got = lib.x3_read(self.handle, ino, buffer, size, offset)
        if got < 0:
            raise self._failure(got)
        return bytes(ffi.buffer(buffer, got))

    def pwrite(self, ino: int, data: bytes, offset: int) -> int:
        """Write all of *data*; return its length. May block. NoRoom says how much has been written."""
        size = len(data)
        given = data if type(data) is bytes else ffi.from_buffer(data)
        done: int = lib.x3_write(self.handle, ino, given, size, offset)
        return done if done == size else self._write_on(lib.x3_write, ino, data, offset, done)

    def fill(self, ino: int, data: bytes, offset: int) -> int:
        """Write *data* only into holes. Existing blocks, size and times stay as they are.

        *offset* is a multiple of the block size; zeros fill the last block. Even after a crash, each block is
        a hole or has all of its data. ENOSPC. May block.
        """
        return self._write_on(lib.x3_fill, ino, data, offset, 0)

    def _write_on(self, call: Any, ino: int, data: bytes, offset: int, done: int) -> int:
        """Write the rest of *data*; *done* is the result of the first call."""
        size = len(data)
        while 0 <= done < size:  # full: the rest says so
            rest = memoryview(data)[done:]
            try:
                done += self._done(call(self.handle, ino, ffi.from_buffer(rest), size - done, offset + done))
            except NoRoom as failure:
                failure.written = done
                raise
        return self._done(done)

    def truncate(self, ino: int, size: int) -> None:
        """Set the size in bytes. EFBIG."""
        self._done(lib.x3_truncate(self.handle, ino, size))

    def punch(self, ino: int, offset: int, length: int) -> None:
        """Make a range of bytes a hole. May block."""
        self._done(lib.x3_punch(self.handle, ino, offset, length))

    def size_max(self) -> int:
        """Return the largest possible size of a file in bytes."""
        return int(lib.x3_size_max(self.handle))

    def segments(self, ino: int, end: int, position: int = 0) -> Iterator[tuple[int, int]]:
        """Yield ``(start, stop)`` of every run of data below *end*, from *position* on."""
        stop = ffi.new("uint64_t *")
        while position < end:
            start = lib.x3_segment(self.handle, ino, position, stop)
            if start == -errno.ENXIO or start >= end:
                return
            position = min(stop[0], end)
            yield self._done(start), position

    # --- extended attributes

    def listxattr(self, ino: int) -> list[bytes]:
        """Return the names of all xattrs."""
        if not self._done(lib.x3_listxattr(self.handle, ino, ffi.NULL, 0)):
            return []  # the most frequent case
        buffer, size = self._answer(lambda buffer, room: lib.x3_listxattr(self.handle, ino, buffer, room))
        return bytes(ffi.buffer(buffer, size)).split(b"\0")[:-1]

    def getxattr(self, ino: int, name: bytes) -> bytes:
        """Return the value of an xattr. ENODATA, EOPNOTSUPP."""
        length = len(name)
        buffer, size = self._answer(
            lambda buffer, room: lib.x3_getxattr(self.handle, ino, name, length, buffer, room)
        )
        return bytes(ffi.buffer(buffer, size))

    def _answer(self, ask: Any) -> tuple[Any, int]:
        room = _XATTR
        while True:
            buffer = unset(CHARS, room)
            size = ask(buffer, room)
            if size != -errno.ERANGE:
                return buffer, self._done(size)
            room = max(self._done(ask(ffi.NULL, 0)), room + 1)

    def setxattr(self, ino: int, name: bytes, value: bytes, flags: int = 0) -> None:
        """Set an xattr; *flags* are those of setxattr(2)."""
        self._done(lib.x3_setxattr(self.handle, ino, name, len(name), value, len(value), flags))

    def removexattr(self, ino: int, name: bytes) -> None:
        """Remove an xattr. ENODATA."""
        self._done(lib.x3_removexattr(self.handle, ino, name, len(name)))


_CHAR = 0o020000
