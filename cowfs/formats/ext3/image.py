"""The inodes of an ext3 image that is open in this process: the engine's operations in Python's terms.

Inodes are named by their numbers. Everything raises OSError and nothing else.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from typing import Any, Unpack

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
"""What setattr sets."""

_NOTHING_NEW = 1000
"""How often in a row a part of a directory may have no name that is new."""
_XATTR = 1024
"""Bytes that most attributes fit in."""
_LENGTHS = struct.Struct("=II")
Xattrs = Sequence[tuple[bytes, bytes]]


def _in_a_row(attrs: Xattrs) -> Any:
    """Return attributes as x3_new has them; who gives them to the engine keeps this meanwhile."""
    parts = [part for name, value in attrs for part in (_LENGTHS.pack(len(name), len(value)), name, value)]
    return ffi.from_buffer(CHARS, b"".join(parts))


class Image(Opened):
    """The image behind a descriptor, which is duplicated: the caller's stays the caller's.

    The methods about names are for one thread; those about one inode, and ``commit``, for any.
    """

    def __init__(self, fd: int, name: str, **how: Unpack[How]) -> None:
        """Open it, as :class:`~cowfs.formats.ext3.opened.Opened`."""
        super().__init__(fd, name, **how)
        self._attr = ffi.new("struct x3_attr *")
        self._new = ffi.new("struct x3_new *")
        self._attr_bytes = ffi.buffer(self._attr)
        self._directories = Directories(self._list, self._large)

    def resume(self, fd: int = -1) -> None:
        super().resume(fd)
        self._directories.clear()

    # --- inodes

    def raw(self, ino: int) -> tuple[int, ...]:
        """Return the fields of an Inode, bare and quick: times as numbers. ESTALE for what is not in use. For
        one thread."""
        code = lib.x3_getattr(self.handle, ino, self._attr)
        if code < 0:
            raise self._failure(code)
        return INODE.unpack(self._attr_bytes)

    def child(self, directory: int, ino: int) -> tuple[int, ...]:
        """The same for what a name in a directory leads to. EUCLEAN for a directory that is in two places."""
        code = lib.x3_child(self.handle, directory, ino, self._attr)
        if code < 0:
            raise self._failure(code)
        return INODE.unpack(self._attr_bytes)

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
        """Set those of the attributes that *what* names, in one step. For one thread."""
        attr = self._attr
        if what & (MODE | UID | GID):
            attr.mode, attr.uid, attr.gid = mode, uid, gid
        if what & (ATIME | MTIME):
            attr.atime_ns, attr.mtime_ns = number_of(atime), number_of(mtime)
        self._done(lib.x3_setattr(self.handle, ino, what, attr))

    def was_read(self, ino: int, *, always: bool) -> None:
        """Set its atime if relatime says so, or *always*. Errors are ignored."""
        lib.x3_was_read(self.handle, ino, always)

    def setflags(self, ino: int, flags: int) -> None:
        """Set the flags of chattr(1) that can be set. EOPNOTSUPP, EINVAL."""
        self._done(lib.x3_setflags(self.handle, ino, flags))

    def birth(self, ino: int) -> int | None:
        """Return when an inode was made, None where that is not kept."""
        out = ffi.new("int64_t *")
        return int(out[0]) if self._done(lib.x3_birth(self.handle, ino, out)) else None

    def readlink(self, ino: int) -> bytes:
        """Return the target. EINVAL for what is no symlink."""
        buffer = unset(CHARS, 4096)
        return bytes(ffi.buffer(buffer, self._done(lib.x3_readlink(self.handle, ino, buffer, 4096))))

    # --- names

    def is_above(self, ino: int, directory: int) -> bool:
        """Say whether an inode is that directory, or above it. EUCLEAN if it is not below the root."""
        return bool(self._done(lib.x3_is_above(self.handle, ino, directory)))

    def names(self, directory: int) -> AnyNames:
        """Return all names of a directory; valid until the next call about names. ENOTDIR."""
        return self._directories.names(directory)

    def known(self, directory: int) -> AnyNames | None:
        """Return its names if they are in memory."""
        return self._directories.known(directory)

    def _large(self, directory: int) -> LargeNames | None:
        """Return the names of a large directory, None for any other. ENOTDIR."""
        mode, *_, size, _, _, _, _ = self.raw(directory)
        if not stat.S_ISDIR(mode):
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
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
        """Return all names with their entries, from the image; for any thread. Blocks. EFBIG over 2,000,000.

        Names that come or go meanwhile may be there; what was there all the time is.
        """
        names: dict[bytes, int] = {}
        count = 0
        for data in self._list(directory):
            before = len(names)
            names.update(parse(data))
            # An index may move names to the end while we read: some come twice. But all cannot.
            count = 0 if len(names) > before else count + 1
            if len(names) > MOST_LISTED:
                raise OSError(errno.EFBIG, "the directory is too large to be listed", self.name)
            if count > _NOTHING_NEW:
                raise self.damaged(f"directory {directory} has the same names again and again")
        return names

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
        """Make an inode of any type under a name that is free, with *attrs*; return its number."""
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
            kept_attrs = _in_a_row(attrs)
            new.attrs, new.attrs_size = kept_attrs, len(kept_attrs)
        code = lib.x3_create(self.handle, directory, name, len(name), names.hint, new)
        if code < 0:
            raise self._failure(code, name)
        ino: int = new.ino
        place = new.place
        self._directories.forget(ino)  # which had the number before
        names[name] = entry(ino, mode, place.block, place.offset)
        names.hint = place.block
        return ino

    def copy(
        self,
        directory: int,
        name: bytes,
        fields: tuple[int, int, int],
        times: tuple[int, int],
        data: bytes,
        attrs: Xattrs,
    ) -> int:
        """Make a regular file, complete from the beginning, under a name that is free; return its number.

        *fields*: mode, owner and group; *times*: atime and mtime. The directory's mtime stays as it is.
        """
        names = self.names(directory)
        new = ffi.new("struct x3_copy *")
        new.mode, new.uid, new.gid = fields
        new.atime_ns, new.mtime_ns = number_of(times[0]), number_of(times[1])
        kept, kept_attrs = ffi.from_buffer(CHARS, data), _in_a_row(attrs)
        new.data, new.size = kept, len(data)
        new.attrs, new.attrs_size = kept_attrs, len(kept_attrs)
        code = lib.x3_copy(self.handle, directory, name, len(name), names.hint, new)
        if code < 0:
            raise self._failure(code, name)
        ino: int = new.ino
        place = new.place
        self._directories.forget(ino)
        names[name] = entry(ino, stat.S_IFREG, place.block, place.offset)
        names.hint = place.block
        return ino

    def link(self, ino: int, mode: int, directory: int, name: bytes) -> None:
        """Give an inode, whose type is in *mode*, one more name, which must be free."""
        names = self.names(directory)
        place = ffi.new("struct x3_place *")
        code = lib.x3_link(self.handle, ino, directory, name, len(name), names.hint, place)
        self._done(code, name)
        names[name] = entry(ino, mode, place.block, place.offset)
        names.hint = place.block

    def unlink(self, directory: int, name: bytes, *, keep: bool) -> bool:
        """Remove the name of a file. With the last one the inode goes, but, to *keep* it, not before release.

        Returns whether that is so: whether it lives on without a name.
        """
        return self._remove(lib.x3_unlink, directory, name, keep=keep)

    def rmdir(self, directory: int, name: bytes, *, keep: bool) -> bool:
        """Remove an empty directory, likewise. ENOTEMPTY."""
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
        """Move a name; *whiteout* is the owner of the one that is left, *keep* is for what is replaced.

        The two must be names of different inodes, and a directory must not end up below itself. Returns
        whether what was replaced lives on without a name.
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
        """Let an inode go that has no name any more."""
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
        """Write all of *data*; return its length. May block. After ENOSPC a part may be there."""
        size = len(data)
        given = data if type(data) is bytes else ffi.from_buffer(data)
        done: int = lib.x3_write(self.handle, ino, given, size, offset)
        return done if done == size else self._write_on(lib.x3_write, ino, data, offset, done)

    def fill(self, ino: int, data: bytes, offset: int) -> int:
        """Write *data* where there are holes, and change nothing else: neither blocks, nor size, nor times.

        *offset* is a multiple of the block size; what is missing of the last block is zero. Each block is a
        hole or has all of its data, after a crash too. ENOSPC. May block.
        """
        return self._write_on(lib.x3_fill, ino, data, offset, 0)

    def _write_on(self, call: Any, ino: int, data: bytes, offset: int, done: int) -> int:
        """Write the rest; *done* is what the first call has said."""
        size = len(data)
        while 0 <= done < size:  # full: the rest says so
            rest = memoryview(data)[done:]
            done += self._done(call(self.handle, ino, ffi.from_buffer(rest), size - done, offset + done))
        return self._done(done)

    def truncate(self, ino: int, size: int) -> None:
        """Set the size in bytes. EFBIG."""
        self._done(lib.x3_truncate(self.handle, ino, size))

    def punch(self, ino: int, offset: int, length: int) -> None:
        """Let a range be a hole. May block."""
        self._done(lib.x3_punch(self.handle, ino, offset, length))

    def size_max(self) -> int:
        """Return the size that no file can exceed."""
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
        """Return the names of all attributes."""
        if not self._done(lib.x3_listxattr(self.handle, ino, ffi.NULL, 0)):
            return []  # as most have
        buffer, size = self._answer(lambda buffer, room: lib.x3_listxattr(self.handle, ino, buffer, room))
        return bytes(ffi.buffer(buffer, size)).split(b"\0")[:-1]

    def getxattr(self, ino: int, name: bytes) -> bytes:
        """Return a value. ENODATA, EOPNOTSUPP."""
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
        """Set an attribute; flags as setxattr(2)."""
        self._done(lib.x3_setxattr(self.handle, ino, name, len(name), value, len(value), flags))

    def removexattr(self, ino: int, name: bytes) -> None:
        """Remove an attribute. ENODATA."""
        self._done(lib.x3_removexattr(self.handle, ino, name, len(name)))


_CHAR = 0o020000
