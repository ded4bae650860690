"""An ext3 image, open in this process: the engine's operations in Python's terms.

Inodes are named by their numbers. Everything raises OSError and nothing else. What is written is on
disk after ``commit``, ``fsync``, ``close`` or, at the latest, some seconds later: a thread sees to that.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
import time
from collections.abc import Iterator
from typing import Any

from cowfs.formats.ext3 import features
from cowfs.formats.ext3._engine import ffi, lib
from cowfs.formats.ext3.directory import (
    INO,
    LARGE,
    MOST_LISTED,
    AnyNames,
    Directories,
    LargeNames,
    entry,
    packed,
    parse,
    place_of,
    type_of,
)
from cowfs.formats.ext3.places import places
from cowfs.formats.ext3.records import INODE, Facts, Inode
from cowfs.linux.files import LACK_OF_ROOM
from cowfs.linux.signals import held_back

log = logging.getLogger(__name__)

ROOT = 2
CACHE_BYTES = 64 << 20
"""Of metadata; the data of files is in the page cache."""
COMMIT_SECONDS = 5.0
"""How often what has changed is put on disk, as the kernel does it."""

MODE, UID, GID, ATIME, MTIME = 1, 2, 4, 8, 16
"""What setattr sets."""

_LISTING = 64 << 10
"""Bytes of names that are asked for at a time; at least four blocks."""
_MOST_TOLD = 100
"""Damages of one image that are logged."""
_NOTHING_NEW = 1000
"""How often in a row a part of a directory may have no name that is new."""
_XATTR = 1024
"""Bytes that most attributes fit in."""
_CHARS = ffi.typeof("char[]")
_unset = ffi.new_allocator(should_clear_after_alloc=False)


def _way_out(error: int) -> str:
    """Say when changes are taken again that were refused for this errno."""
    if error == errno.ENOMEM:
        return "there is memory"
    return "it has room" if error in LACK_OF_ROOM else "it takes them"


class _Together:
    """A block of changes that are one to the disk."""

    __slots__ = ("_handle",)

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __enter__(self) -> None:
        lib.x3_begin(self._handle)

    def __exit__(self, *failure: object) -> None:
        lib.x3_end(self._handle)


class Image:
    """The image behind a descriptor, which is duplicated: the caller's stays the caller's.

    The methods about names are for one thread; those about one inode, and ``commit``, for any.
    """

    def __init__(
        self,
        fd: int,
        name: str,
        *,
        read_only: bool = False,
        cache_bytes: int = CACHE_BYTES,
        commit_seconds: float = COMMIT_SECONDS,
        trace_fd: int = -1,
        debug: int = 0,
    ) -> None:
        """Open it. EUCLEAN when its journal must be recovered first; what is no mere ext3: features.check.

        *name* is for messages; *trace_fd* and *debug* are for tests: see x3_open. Without
        *commit_seconds* (0) nothing is committed but on demand.
        """
        features.check(fd, name)
        self.name = name
        self.read_only = read_only
        self._said = False
        self._damages: set[str] = set()
        self._stalled = 0
        self._lost_told = False
        out = ffi.new("x3_image **")
        code = lib.x3_open(fd, lib.X3_READ_ONLY if read_only else 0, cache_bytes, trace_fd, debug, out)
        if code < 0:
            raise OSError(-code, _message(ffi.NULL) or os.strerror(-code), name)
        self.handle: Any = out[0]
        """The engine's own, for what only tests do with it."""
        self._listing = max(_LISTING, 4 * self.facts().block_size)
        self._attr = ffi.new("struct x3_attr *")
        self._attr_bytes = ffi.buffer(self._attr)
        self._directories = Directories(self._list, self._large)
        self._seconds = 0 if read_only else commit_seconds
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._start_thread()

    def close(self) -> None:
        """Write everything to its place and let go of the image. Blocks. Safe to call twice.

        Raises what went wrong with that; nothing is open all the same.
        """
        handle = self._let_go()
        if handle is not None:
            code = lib.x3_close(handle)
            if code < 0:
                raise OSError(-code, os.strerror(-code), self.name)

    def abandon(self) -> None:
        """Let go of the image as a crash would: nothing more is written."""
        handle = self._let_go()
        if handle is not None:
            lib.x3_abandon(handle)

    def _let_go(self) -> Any:
        self._stop_thread()
        handle, self.handle = self.handle, None
        return handle

    def _start_thread(self) -> None:
        if self._seconds:
            self._stop.clear()
            name = f"commit {self.name}"
            self._thread = threading.Thread(target=self._commit_now_and_then, name=name, daemon=True)
            with held_back():  # else a signal would find this thread when the others hold it back
                self._thread.start()

    def _stop_thread(self) -> None:
        self._stop.set()
        if self._thread is not None:
            lib.x3_wake(self.handle)
            self._thread.join()
            self._thread = None

    def _commit_now_and_then(self) -> None:
        milliseconds = round(self._seconds * 1000)
        while not self._stop.is_set():
            if lib.x3_wait(self.handle, milliseconds) and not self._stop.is_set():
                code = lib.x3_commit(self.handle)
                if code < 0:
                    self._failure(code)  # which says so; the next call that changes something fails too
            self._tell_stall()
            self.tell_lost()

    # --- errors

    def _failure(self, code: int, *names: object) -> OSError:
        """Return the exception for a result below 0; say it loudly, once, if the image is given up."""
        if code in {-errno.EIO, -errno.EROFS, -errno.EUCLEAN} and not self._said and not self.read_only:
            aborted = self.facts().aborted
            if aborted and not self._said:
                self._said = True
                log.error(
                    "%s: given up, nothing more is written to it: %s. What was done in the last seconds"
                    " may be lost when it is unmounted; until then it can be read. Then: cowfs check %s",
                    *(self.name, _message(self.handle) or os.strerror(aborted), self.name),
                )
        if code == -errno.EUCLEAN:
            return self.damaged(_message(self.handle))
        if -code in LACK_OF_ROOM or code in {-errno.EIO, -errno.ENOMEM}:
            self._tell_stall()
        return OSError(-code, os.strerror(-code), *names)

    def damaged(self, what: str) -> OSError:
        """Log a damage, each once and no more than anybody reads; return the exception for it."""
        if what not in self._damages and len(self._damages) < _MOST_TOLD:
            self._damages.add(what)
            log.error("%s: damaged: %s. Unmount it, then: cowfs check %s", self.name, what, self.name)
        return OSError(errno.EUCLEAN, f"damaged: {what} (see `cowfs check`)", self.name)

    def tell_lost(self) -> None:
        """Log, once, which files have data that the disk has refused, and nobody has any more. Blocks."""
        inodes = ffi.new("uint32_t[]", _MOST_TOLD)
        count = lib.x3_lost(self.handle, inodes, _MOST_TOLD)
        if not count or self._lost_told:
            return
        self._lost_told = True
        found = sorted(places(set(inodes[0:count]), self._list, self._stop.is_set))
        log.error(
            "%s: what was written to these files in the last seconds is lost: %s",
            self.name,
            ", ".join(os.fsdecode(path) for path in found) or "files without names",
        )

    def _tell_stall(self) -> None:
        """Log that changes are refused from now on because the disk is full, or not any more."""
        facts = self.facts()
        if facts.stalled and not self._stalled:
            since = time.strftime("%H:%M:%S", time.localtime(facts.saved_ns / 1e9))
            log.error(
                "%s: nothing can be written to its disk: %s. Changes are refused until %s; those"
                " since %s are in memory alone until then",
                *(self.name, os.strerror(facts.stalled), _way_out(facts.stalled), since),
            )
        elif self._stalled and not facts.stalled and not facts.aborted:
            log.warning("%s: %s again, and all is written", self.name, _way_out(self._stalled))
        self._stalled = facts.stalled

    def _done(self, code: int, *names: object) -> int:
        if code < 0:
            raise self._failure(code, *names)
        return code

    # --- the whole

    def facts(self) -> Facts:
        """Return what is known of the whole image now."""
        out = ffi.new("struct x3_facts *")
        lib.x3_facts(self.handle, out)
        known = {name: getattr(out, name) for name in Facts._fields if name != "uuid"}
        return Facts(**known, uuid=bytes(ffi.buffer(out.uuid)))

    def commit(self) -> None:
        """Return when everything that was done is on disk. Blocks."""
        self._done(lib.x3_commit(self.handle))

    def checkpoint(self) -> None:
        """Commit, and leave nothing in the journal. Blocks."""
        self._done(lib.x3_checkpoint(self.handle))

    def fsync(self, ino: int, datasync: bool) -> None:
        """Return when an inode and its data are on disk. Blocks."""
        self._done(lib.x3_fsync(self.handle, ino, datasync))

    def together(self) -> _Together:
        """The changes in the block come to disk together or not at all: a few quick ones."""
        return _Together(self.handle)

    def suspend(self) -> None:
        """Leave the image to others, whole and clean, until resume. Blocks; what is called meanwhile waits.

        Inodes without names are lost when others check the image.
        """
        self._stop_thread()
        try:
            self._done(lib.x3_suspend(self.handle))
        except OSError:
            self._start_thread()
            raise

    def resume(self, fd: int = -1) -> None:
        """Go on with the image as it is now, behind *fd* if that is given. Blocks.

        If this fails so does all that follows, with EIO.
        """
        self._done(lib.x3_resume(self.handle, fd))
        self._directories.clear()
        self._start_thread()

    def switch(self, fd: int) -> None:
        """Go on with a descriptor of a file with the same content. EBUSY if something has changed since
        the last checkpoint."""
        self._done(lib.x3_switch(self.handle, fd))

    # --- inodes

    def raw(self, ino: int) -> tuple[int, ...]:
        """Return the fields of an Inode, bare and quick. ESTALE for what is not in use. For one thread."""
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
        return Inode._make(INODE.unpack(ffi.buffer(attr)))

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
        attr.mode, attr.uid, attr.gid = mode, uid, gid
        attr.atime_ns, attr.mtime_ns = max(min(atime, _LAST), -_LAST), max(min(mtime, _LAST), -_LAST)
        self._done(lib.x3_setattr(self.handle, ino, what, attr))

    def readlink(self, ino: int) -> bytes:
        """Return the target. EINVAL for what is no symlink."""
        buffer = _unset(_CHARS, 4096)
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
        """Return all names with their entries, read anew: for any thread. Blocks. EFBIG over two millions.

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
                raise OSError(errno.EFBIG, "a directory too large to be listed", self.name)
            if count > _NOTHING_NEW:
                raise self.damaged(f"directory {directory} has the same names again and again")
        return names

    def _list(self, directory: int) -> Iterator[bytes]:
        cursor = ffi.new("uint64_t *")
        room = self._listing
        buffer = _unset(_CHARS, room)
        while size := self._done(lib.x3_readdir(self.handle, directory, cursor, buffer, room)):
            yield bytes(ffi.buffer(buffer, size))

    def create(
        self, directory: int, name: bytes, mode: int, uid: int, gid: int, rdev: int = 0, target: bytes = b""
    ) -> int:
        """Make an inode of any type under a name that is free; return its number."""
        names = self.names(directory)
        new = ffi.new("struct x3_new *")
        new.mode, new.uid, new.gid = mode, uid, gid
        if rdev:
            new.major, new.minor = os.major(rdev), os.minor(rdev)
        if target:
            kept = ffi.from_buffer(target)
            new.target, new.target_len = ffi.cast("const char *", kept), len(target)
        self._done(lib.x3_create(self.handle, directory, name, len(name), names.hint, new), name)
        ino: int = new.ino
        self._directories.forget(ino)  # which had the number before
        names[name] = entry(ino, mode, new.place.block, new.place.offset)
        names.hint = new.place.block
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
        names, new_names = self.names(source[0]), self.names(target[0])
        value, replaced = names[source[1]], new_names.get(target[1])
        how = ffi.new("struct x3_rename *")
        how.source_dir, how.target_dir = source[0], target[0]
        names_ = ffi.from_buffer(source[1]), ffi.from_buffer(target[1])
        how.source_name, how.target_name = (ffi.cast("const char *", name) for name in names_)
        how.source_len, how.target_len = len(source[1]), len(target[1])
        how.source_place.block, how.source_place.offset = place_of(value)
        how.ino, how.hint = value & INO, new_names.hint
        if replaced is not None:
            how.target_place.block, how.target_place.offset = place_of(replaced)
            how.replaced = replaced & INO
        if whiteout is not None:
            how.uid, how.gid = whiteout
        how.flags = (
            (lib.X3_EXCHANGE if exchange else 0)
            | (lib.X3_WHITEOUT if whiteout is not None else 0)
            | (lib.X3_KEEP if keep else 0)
        )
        kept = bool(self._done(lib.x3_rename(self.handle, how), source[1], None, target[1]))
        new_names[target[1]] = entry(value & INO, type_of(value), how.place.block, how.place.offset)
        here = place_of(value)
        if exchange and replaced is not None:
            names[source[1]] = entry(replaced & INO, type_of(replaced), *here)
            return False
        if replaced is None:
            new_names.hint = how.place.block
        else:
            self._directories.forget(replaced & INO)
        if whiteout is not None:
            names[source[1]] = entry(how.whiteout, _CHAR, *here)
        else:
            del names[source[1]]
            names.hint = min(names.hint, here[0])
        return kept

    def release(self, ino: int) -> None:
        """Let an inode go that has no name any more."""
        self._done(lib.x3_release(self.handle, ino))

    # --- data

    def pread(self, ino: int, size: int, offset: int) -> bytes:
        """Read up to *size* bytes; fewer only at the end of the file. May block."""
        buffer = _unset(_CHARS, size)
        got = lib.x3_read(self.handle, ino, buffer, size, offset)
        if got < 0:
            raise self._failure(got)
        return bytes(ffi.buffer(buffer, got))

    def pwrite(self, ino: int, data: bytes, offset: int) -> int:
        """Write all of *data*; return its length. May block. After ENOSPC a part may be there."""
        return self._write(lib.x3_write, ino, data, offset)

    def fill(self, ino: int, data: bytes, offset: int) -> int:
        """Write *data* where there are holes, and change nothing else: neither blocks, nor size, nor times.

        *offset* is a multiple of the block size; what is missing of the last block is zero. Each block is a
        hole or has all of its data, after a crash too. ENOSPC. May block.
        """
        return self._write(lib.x3_fill, ino, data, offset)

    def _write(self, call: Any, ino: int, data: bytes, offset: int) -> int:
        size = len(data)
        done: int = call(self.handle, ino, ffi.from_buffer(data), size, offset)
        while 0 <= done < size:  # full: the rest says so
            rest = memoryview(data)[done:]
            done += self._done(call(self.handle, ino, ffi.from_buffer(rest), size - done, offset + done))
        return self._done(done)

    def truncate(self, ino: int, size: int) -> None:
        """Set the size in bytes. EFBIG."""
        self._done(lib.x3_truncate(self.handle, ino, size))

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
            buffer = _unset(_CHARS, room)
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


_LAST = (1 << 63) - 1
_CHAR = 0o020000


def _message(handle: Any) -> str:
    said = lib.x3_message(handle)
    return "" if said == ffi.NULL else ffi.string(said).decode(errors="replace")
