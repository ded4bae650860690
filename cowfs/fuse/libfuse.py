"""Features of libfuse that pyfuse3 does not offer. They need the small C module beside this file.

- The kernel caches the listing of a directory (FOPEN_CACHE_DIR), and the next listing sends no request.
  Only cowfs changes the tree, so the cache is always right; it serves one reader at a time.
- Reads of a file that has a descriptor are served without Python, and so are most requests for files in the
  store's image (``store_inodes.c``). For other frequent requests, C calls Python without pyfuse3
  (``shortcuts.c``).
- cowfs applies the umask (FUSE_CAP_DONT_MASK), because a directory's default ACL replaces it.
- The kernel caches the targets of symbolic links (FUSE_CAP_CACHE_SYMLINKS).
- Before a write or a change of owner, the kernel does not clear set-ID bits and capabilities itself
  (FUSE_HANDLE_KILLPRIV and its V2): the union and the layers clear them.
- lseek(2) finds holes.
- Any number of reads ahead may be pending (max_background): by default, the kernel allows 12 for each
  filesystem, and reads of one user that hang could use them all.
- Requests are counted and timed.
- Requests that pyfuse3 has no handlers for are answered (``beyond.py``).
- Files can be lent to the kernel, which then reads and writes them without cowfs (passthrough).
- The request tells whether a write or an ACL keeps set-ID bits (CAP_FSETID), which only the kernel knows.
- The kernel keeps its cached data of a file when the file's times change (no FUSE_CAP_AUTO_INVAL_DATA).
- The kernel need not tell which files are opened and closed (FUSE_NO_OPEN_SUPPORT): it then reads and writes
  by the inode. ``no_open.py`` says when.

Without the module, everything else works, but slower; :func:`lacks` says why it is not used.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple, Protocol

_DONT_MASK = 1 << 6  # fuse_common.h
_HANDLE_KILLPRIV = 1 << 20
_CACHE_SYMLINKS = 1 << 23


_LAST = "clears_set_id"
"""The function that was added to the module last."""


def _load() -> tuple[Any, str]:
    # With global symbols and before pyfuse3, so that pyfuse3's calls go through the module.
    flags = sys.getdlopenflags()
    sys.setdlopenflags(flags | os.RTLD_GLOBAL)
    try:
        module = import_module("cowfs.fuse._libfuse")
        if not hasattr(module, _LAST):
            return None, "it was built for another version of cowfs; run scripts/setup"
        return module, ""
    except ImportError as error:
        return None, str(error)
    finally:
        sys.setdlopenflags(flags)


_module: Any
_module, _why = _load()

said: Callable[[], tuple[bool | None, int, int, int]]
said = (lambda: (None, 0, 0, 0)) if _module is None else _module.said
"""Returns what :func:`clears_set_id` and :func:`request` return, in one tuple."""

ring: Any = _module
"""What :mod:`cowfs.fuse.rings` calls of ``ring*.c`` and ``core_lock.c``; None without the module."""

KEPT: int = 1 << 62
"""This bit is set in handle numbers of directories whose listing the kernel should cache."""

LISTING: int = 1 << 61
"""This bit is set in the handle numbers of all directories."""

UNOPENED: int = 1 << 63
"""An inode's number with this bit is the handle number of a file that was opened without us."""

BEYOND: int = 1 << 60
"""The handle number of requests that are not reads, but for which pyfuse3 has no handler."""

NO_NAME = b"/"
"""The name in a CREATE that was a TMPFILE (``beyond.c``)."""

KERNEL_UID = 0xFFFFFFFF
"""The user of requests in which the kernel writes data changed through mmap(2)."""


class Message(NamedTuple):
    """A request as the kernel sends it (linux/fuse.h)."""

    opcode: int
    ino: int
    uid: int
    pid: int
    body: bytes
    """What follows the header; only the beginning of a very long request."""


def message() -> Message:
    """Return the request that has just arrived as a read with the handle number :data:`BEYOND`.

    Call it from a handler, before it awaits anything.
    """
    return Message(*_module.message())


def prepare(
    seek: Callable[[int, int, int], int],
    *,
    knows_files: bool = False,
    passthrough: bool = False,
    exports: bool = False,
    most_held: int = 64 << 20,
    shared: bool = False,
) -> None:
    """Set the features of the next session; *seek* answers lseek(2) with an offset, or -errno.

    *knows_files*: cowfs can read and write files that the kernel opened without asking. *passthrough*:
    whether to lend files to the kernel. *exports*: file handles are valid as long as their inodes; otherwise
    there are no file handles (Linux 6.10). *most_held*: how many bytes of data waiting writes may hold in
    memory. If the mount is *shared*, a user other than root gets no more of them than are left
    (``held_data.c``).
    """
    if _module is not None:
        wanted = _DONT_MASK | _HANDLE_KILLPRIV | _CACHE_SYMLINKS
        _module.prepare(wanted, seek, knows_files, passthrough, exports, most_held, shared)


def opens_nothing() -> bool:
    """Whether the kernel opens all files without a request once OPEN was answered with ENOSYS."""
    return _module is not None and bool(_module.opens_nothing())


def request() -> tuple[int, int, int]:
    """Return the process and user of the request that has just arrived, and the flags of its file.

    Call it from a handler, before it awaits anything. A user of 0xFFFFFFFF means that the kernel writes data
    changed through mmap(2).
    """
    if _module is None:
        return 0, 0, 0
    found: tuple[int, int, int] = _module.request()
    return found


def inode() -> int:
    """Return the inode number in the request that has just arrived; 0 if not known."""
    if _module is None:
        return 0
    found: int = _module.inode()
    return found


def lacks() -> str | None:
    """Return why pyfuse3's session does not use this module; None if it does."""
    if _module is None:
        return _why
    if not _module.takes_part():
        return "pyfuse3 was loaded first, or calls libfuse by an unknown name"
    return None


def leaves_umask() -> bool:
    """Whether cowfs must apply the umask."""
    return _module is not None and bool(_module.capabilities() & _DONT_MASK)


def read_from(handle: int, descriptor: int) -> None:
    """Serve reads of a handle from *descriptor* from now on; -1: with pyfuse3's handler."""
    if _module is not None:
        _module.read_from(handle, descriptor)


def why_no_passthrough() -> str:
    """Return why pyfuse3's session cannot lend files to the kernel; "" if it can."""
    if _module is None or not _module.takes_part():
        return lacks() or ""
    if not _module.watches():
        return "libfuse was built without custom I/O"
    return str(_module.passthrough_lacking())


def lend(descriptor: int) -> int:
    """Lend a file to the kernel; return the kernel's number for it.

    OSError: ELOOP if its filesystem is stacked on another, EPERM, EINVAL, ENOMEM.
    """
    return int(_module.lend(descriptor))


def take_back(number: int) -> None:
    """Take a lent file back from the kernel: no later answer names it."""
    _module.take_back(number)


def pass_through(handle: int, number: int, *, direct: bool = False) -> None:
    """Name a lent file in the answer to the open of a handle; 0: none.

    *direct*: the kernel only maps it; reads and writes come here.
    """
    _module.pass_through(handle, number, direct)


IS_SAME = 16

note: Callable[[int, int, int], int] = _module.note if _module is not None else lambda *_: 0
"""Records (inode, pid, uid) that a process has changed an inode, for :data:`goes_on`. Inode 0: no change can
continue this one.

Returns what :data:`changes` returns for the inode recorded before, plus :data:`IS_SAME` if the same process,
running the same program, made the change before."""

changes: Callable[[], int] = _module.changes if _module is not None else lambda: 0
"""Returns how the process has changed the recorded inode since: the sum of 1 for a write, 2 for the mode, 4
for the owner, and 8 for times."""

identify: Callable[[int, bytes], None] = _module.identify if _module is not None else lambda *_: None
"""Sets how to recognise the process recorded last: a descriptor of its ``/proc/PID/cmdline``, which is
duplicated, and the content of that file. Descriptor -1: there is none."""

goes_on: Callable[[], int] = _module.goes_on if _module is not None else lambda: -1
"""Returns what the request that has just arrived adds to :data:`changes`, if the same process makes it; else
-1. It is recorded at once, but a write only by :data:`wrote`."""

wrote: Callable[[int], None] = _module.wrote if _module is not None else lambda _: None
"""Records that a write to an inode has succeeded."""


class InodeSet(Protocol):
    """A set of inode numbers."""

    @property
    def add(self) -> Callable[[int], None]: ...
    @property
    def discard(self) -> Callable[[int], None]: ...
    @property
    def clear(self) -> Callable[[], None]: ...
    def __contains__(self, inode: object, /) -> bool: ...


class _InodeSet:
    """The set that C keeps."""

    __slots__ = ("_has", "add", "clear", "discard")

    def __init__(self, module: Any) -> None:
        self.add: Callable[[int], None] = module.no_capability_add
        self.discard: Callable[[int], None] = module.no_capability_discard
        self.clear: Callable[[], None] = module.no_capability_clear
        self._has: Callable[[object], bool] = module.no_capability_has

    def __contains__(self, inode: object) -> bool:
        return self._has(inode)


def no_capability() -> InodeSet:
    """Return the set of the inodes that have no ``security.capability``. The process has one such set."""
    return set() if _module is None else _InodeSet(_module)


def answer_no_capability() -> None:
    """Let C answer GETXATTR for the inodes in that set, until the next :func:`prepare`."""
    if _module is not None:
        _module.no_capability_answer()


def serve_inodes(find: Callable[[int], int], engine: tuple[int, ...], atime: int) -> None:
    """Let C serve GETATTR, SETATTR, READ, WRITE and RELEASE of simple inodes, until
    :func:`stop_inodes` or :func:`prepare`.

    *find* returns the number of the inode in the store's image that has all of a node, negated if it may only
    be read; 0 if there is none. For a merged directory, it returns the negated number of the upper directory,
    with the number of directories that only the lowers have, plus 1, in the bits from 32 on.
    *engine* is :meth:`cowfs.formats.ext3.image.Image.calls` of the image, which must stay open until then.
    *atime*: when reading updates it: 0 never, 1 by the rule of relatime, 2 always.
    """
    if _module is not None:
        _module.serve_inodes(find, engine, atime)


def take_shortcuts(functions: object) -> None:
    """Let C answer with the methods of a :class:`cowfs.fuse.shortcuts.Shortcuts`, until
    :func:`stop_inodes`."""
    if _module is not None:
        _module.take_shortcuts(functions)


def quick_to_sync(ino: int) -> int:
    """Return the number in the image of an inode that C serves, if this thread may write it to disk; else 0.

    It may if it is a ring's, no other request waits for it, and a switch between threads would take as long.
    """
    return int(_module.quick_to_sync(ino)) if _module is not None else 0


def sync_quickly(inode: int, *, datasync: bool) -> bool:
    """Write the inode with this number to disk; return whether that is done. Blocks, and others run
    meanwhile: not for a coroutine that runs."""
    return _module is not None and bool(_module.sync_quickly(inode, datasync))


def stop_inodes() -> None:
    """Answer all requests in Python: the image is about to be closed."""
    if _module is not None:
        _module.stop_inodes()


def observe_inodes(*, wanted: bool) -> None:
    """Set whether C leaves changes that do not continue the last noted one (:data:`goes_on`) to Python."""
    if _module is not None:
        _module.observe_inodes(wanted)


def empty_buffer() -> None:
    """Free the memory of the last request. Its handler has copied what it needs, and is about to wait."""
    if _module is not None:
        _module.empty_buffer()


def clears_set_id() -> bool | None:
    """Whether the request that has just arrived clears set-ID bits of a file; None if not known.

    Call it from the handlers of open, create, write, setattr and setxattr (there for set-group-ID), before
    they await anything.
    """
    return None if _module is None else _module.clears_set_id()


class Counted(NamedTuple):
    """The counts of requests since the mount."""

    operations: list[tuple[int, int, int, int, list[tuple[int, int, int]]]]
    """Opcode, answers, errors among them, total ns, and ranges of durations: from ns, to ns, count."""
    under_way: list[tuple[int, int]]
    """The requests in progress: opcode, and for how many ns."""
    direct_reads: int
    """How many reads were served without Python."""


def counted() -> Counted | str:
    """Return the counts of requests, or why there are none."""
    lacking = lacks()
    if lacking is not None:
        return lacking
    if not _module.watches():
        return "libfuse was built without custom I/O"
    return Counted(*_module.figures())


def rings_serve() -> bool:
    """Whether requests come through io_uring."""
    return _module is not None and not _module.ring_refused()


def rings_refused() -> str:
    """Return why requests do not come through io_uring although it was requested; "" if they do."""
    return str(_module.ring_refused())
