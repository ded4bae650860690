"""An open ext3 image as a whole: opening, closing, errors, commits.

Changes are on disk after ``commit``, ``fsync`` or ``close``. A thread also commits every few seconds.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterator
from typing import Any, TypedDict

from cowfs.errors import NoRoom, NotYetFree, os_error
from cowfs.formats.ext3 import features
from cowfs.formats.ext3._engine import ffi, lib
from cowfs.formats.ext3.places import places
from cowfs.formats.ext3.records import Facts
from cowfs.jsontext import local_time
from cowfs.linux.files import LACK_OF_ROOM
from cowfs.linux.remote import may_wait
from cowfs.linux.signals import start

log = logging.getLogger(__name__)

CACHE_BYTES = 64 << 20
"""The cache of metadata in bytes. The data of files is in the page cache."""
READER_CACHE_BYTES = 8 << 20
"""The cache of an image opened read-only. A walk needs most blocks once; the page cache has them too."""
COMMIT_SECONDS = 5.0
"""The interval of commits in seconds, as in the kernel."""

_LISTING = 64 << 10
"""How many bytes of names are read at a time: at least four blocks."""
_UNITS = 4096
_MOST_TOLD = 100
"""How many different damages of one image are logged."""
CHARS = ffi.typeof("char[]")
unset = ffi.new_allocator(should_clear_after_alloc=False)
"""Allocates memory without clearing it."""


def _way_out(error: int) -> str:
    """Return the condition on which refused changes will be accepted again, for a message."""
    if error == errno.ENOMEM:
        return "there is memory"
    return "it has space" if error in LACK_OF_ROOM else "it accepts writes"


class _Together:
    """A context in which all changes reach the disk together."""

    __slots__ = ("_handle",)

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __enter__(self) -> None:
        lib.x3_begin(self._handle)

    def __exit__(self, *failure: object) -> None:
        lib.x3_end(self._handle)


class How(TypedDict, total=False):
    """The options of opening an image; see :class:`Opened`."""

    read_only: bool
    cache_bytes: int
    commit_seconds: float
    trace_fd: int
    debug: int


def _is_near(fd: int) -> bool:
    try:
        return not may_wait(fd)
    except OSError:
        return False


class Opened:
    """An open image. It duplicates the descriptor, and the caller closes its own."""

    def __init__(
        self,
        fd: int,
        name: str,
        *,
        read_only: bool = False,
        cache_bytes: int = 0,
        commit_seconds: float = COMMIT_SECONDS,
        trace_fd: int = -1,
        debug: int = 0,
    ) -> None:
        """Open the image. OSError: EUCLEAN if its journal must be recovered first; see also features.check().

        *name* is for messages. With *commit_seconds* 0, commits happen only on demand. *trace_fd* and *debug*
        are for tests; see x3_open. *cache_bytes* is :data:`CACHE_BYTES` by default, and less for a reader.
        """
        features.check(fd, name)
        self.is_near = _is_near(fd)
        """Whether writing it to disk depends on no other machine or program."""
        self.name = name
        self.read_only = read_only
        self._said = False
        self._damages: set[str] = set()
        self._stalled = 0
        self.is_tracked = False
        """Whether track() is on."""
        self.resumed = 0
        """How often the image was suspended and resumed."""
        self._lost_told = False
        self._shrinks = False
        out = ffi.new("x3_image **")
        cache_bytes = cache_bytes or (READER_CACHE_BYTES if read_only else CACHE_BYTES)
        code = lib.x3_open(fd, lib.X3_READ_ONLY if read_only else 0, cache_bytes, trace_fd, debug, out)
        if code < 0:
            raise OSError(-code, _message(ffi.NULL) or os.strerror(-code), name)
        self.handle: Any = out[0]
        """The engine's handle, public only for tests."""
        self.pressed: Any = lib.x3_pressed(self.handle)
        """While its first element is not 0, threads in a hurry should call relieve() before a change."""
        self._listing = max(_LISTING, 4 * self.facts().block_size)
        self._seconds = 0 if read_only else commit_seconds
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._start_thread()

    def close(self) -> None:
        """Write everything to its place, and close the image.

        Blocks. Safe to call twice. After an OSError, the image is closed too.
        """
        handle = self._let_go()
        if handle is not None:
            code = lib.x3_close(handle)
            if code < 0:
                raise os_error(-code, self.name)

    def abandon(self) -> None:
        """Close the image as in a crash, without writing anything."""
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
            start(self._thread)

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
                    self._failure(code)  # logs it; the next change fails too
            self._shrink_wholly()
            self._tell_stall()
            self.tell_lost()

    def _shrink_wholly(self) -> None:
        """After shrink(), write what the journal has to its place, and free that too. Blocks."""
        if not self._shrinks or self._stop.is_set():
            return
        self._shrinks = False
        code = lib.x3_checkpoint(self.handle)
        if code < 0:
            self._failure(code)
        lib.x3_shrink(self.handle)

    # --- errors

    def _failure(self, code: int, *names: object) -> OSError:
        """Return the exception for a negative result. Logs it, once, if the image is aborted."""
        if code in {-errno.EIO, -errno.EROFS, -errno.EUCLEAN} and not self._said and not self.read_only:
            aborted = self.facts().aborted
            if aborted and not self._said:
                self._said = True
                log.error(
                    "%s: failed, and is read-only from now on: %s. The changes of the last seconds"
                    " may be lost when it is unmounted. Unmount it, then run: cowfs check %s",
                    *(self.name, _message(self.handle) or os.strerror(aborted), self.name),
                )
        if code == -errno.EUCLEAN:
            return self.damaged(_message(self.handle))
        if code == -errno.EAGAIN:
            return NotYetFree(errno.ENOSPC, os.strerror(errno.ENOSPC), *names)
        if -code in LACK_OF_ROOM or code in {-errno.EIO, -errno.ENOMEM}:
            self._tell_stall()
        return (NoRoom if -code in LACK_OF_ROOM else OSError)(-code, os.strerror(-code), *names)

    def damaged(self, what: str) -> OSError:
        """Log a damage, once, up to a limit; return the exception for it."""
        if what not in self._damages and len(self._damages) < _MOST_TOLD:
            self._damages.add(what)
            log.error("%s: damaged: %s. Unmount it, then run: cowfs check %s", self.name, what, self.name)
        return OSError(errno.EUCLEAN, f"damaged: {what} (see `cowfs check`)", self.name)

    def tell_lost(self) -> None:
        """Log, once, the files that have lost data because the disk refused it. Blocks."""
        inodes = ffi.new("uint32_t[]", _MOST_TOLD)
        count = lib.x3_lost(self.handle, inodes, _MOST_TOLD)
        if not count or self._lost_told:
            return
        self._lost_told = True
        found = sorted(places(set(inodes[0:count]), self._list, self._stop.is_set))
        log.error(
            "%s: data written to these files in the last seconds is lost: %s",
            self.name,
            ", ".join(os.fsdecode(path) for path in found) or "files without names",
        )

    def _tell_stall(self) -> None:
        """Log that changes are now refused because the disk is full, or that they are accepted again."""
        facts = self.facts()
        if facts.stalled and not self._stalled:
            since = local_time(facts.saved_ns / 1e9)
            log.error(
                "%s: cannot write to its disk: %s. New changes are refused until %s; the changes"
                " since %s are only in memory until then",
                *(self.name, os.strerror(facts.stalled), _way_out(facts.stalled), since),
            )
        elif self._stalled and not facts.stalled and not facts.aborted:
            log.warning("%s: %s again, and all changes are written", self.name, _way_out(self._stalled))
        self._stalled = facts.stalled

    def _done(self, code: int, *names: object) -> int:
        if code < 0:
            raise self._failure(code, *names)
        return code

    # --- the whole

    def facts(self) -> Facts:
        """Return the current state of the image."""
        out = ffi.new("struct x3_facts *")
        lib.x3_facts(self.handle, out)
        known = {name: getattr(out, name) for name in Facts._fields if name != "uuid"}
        return Facts(**known, uuid=bytes(ffi.buffer(out.uuid)))

    def shrink(self) -> None:
        """Free the caches. The blocks that only the journal has follow soon, in the committing thread."""
        lib.x3_shrink(self.handle)
        self._shrinks = True

    def commit(self) -> None:
        """Write all changes so far to disk. Blocks."""
        self._done(lib.x3_commit(self.handle))

    def directory_is_synced(self, ino: int) -> bool:
        """Whether a directory and its names are on disk. Does not block for I/O."""
        return bool(lib.x3_directory_is_synced(self.handle, ino))

    def checkpoint(self) -> None:
        """Commit, and empty the journal. Blocks."""
        self._done(lib.x3_checkpoint(self.handle))

    @staticmethod
    def hurry(on: bool) -> bool:
        """Set whether this thread is in a hurry; return the old setting.

        Such a thread does not wait for the disk when it needs freed blocks: NotYetFree.
        """
        return bool(lib.x3_hurry(on))

    def relieve(self, for_room: bool) -> None:
        """Commit what threads in a hurry need; *for_room*: after a NotYetFree. Blocks."""
        self._done(lib.x3_relieve(self.handle, for_room))

    def fsync(self, ino: int, datasync: bool) -> None:
        """Write an inode and its data to disk. Blocks."""
        self._done(lib.x3_fsync(self.handle, ino, datasync))

    def together(self) -> _Together:
        """Return a context whose changes, a few quick ones, reach the disk together or not at all."""
        return _Together(self.handle)

    def suspend(self) -> None:
        """Leave the image complete and clean for other programs until resume. Blocks. Calls meanwhile wait.

        If another program checks the image, inodes without names are lost.
        """
        self._stop_thread()
        try:
            self._done(lib.x3_suspend(self.handle))
        except OSError:
            self._start_thread()
            raise

    def resume(self, fd: int = -1) -> None:
        """Continue with the image as it is now, through *fd* if given. Blocks.

        If this fails, every later call fails with EIO.
        """
        self.resumed += 1
        self._done(lib.x3_resume(self.handle, fd))
        self._start_thread()

    def track(self, on: bool) -> None:
        """Start or stop to record which MiB of the image are written."""
        self._done(lib.x3_track(self.handle, on))
        self.is_tracked = on

    def tracked(self) -> list[int]:
        """Return the indices of the MiB that were written since the last call. Read them after the call."""
        units = ffi.new("uint32_t[]", _UNITS)
        found: list[int] = []
        while True:
            count = self._done(lib.x3_tracked(self.handle, units, _UNITS))
            found.extend(units[0:count])
            if count + 64 <= _UNITS:  # the map has been read; later writes are for the next call
                return found

    def switch(self, fd: int) -> None:
        """Continue with another descriptor, of a file with the same content.

        EBUSY if something has changed since the last checkpoint.
        """
        self._done(lib.x3_switch(self.handle, fd))

    def _list(self, directory: int) -> Iterator[bytes]:
        cursor = ffi.new("uint64_t *")
        room = self._listing
        buffer = unset(CHARS, room)
        while size := self._done(lib.x3_readdir(self.handle, directory, cursor, buffer, room)):
            yield bytes(ffi.buffer(buffer, size))


def _message(handle: Any) -> str:
    said = lib.x3_message(handle)
    return "" if said == ffi.NULL else ffi.string(said).decode(errors="replace")
