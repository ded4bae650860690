"""What libfuse can do and pyfuse3 has no words for, where the small C module beside this file could be built.

- The kernel caches the listing of a directory (FOPEN_CACHE_DIR), and the next listing sends no request. Only
  we change the tree, so it is right for every reader from the beginning; one reader at a time.
- Reads of a file behind which stands one of the kernel's are served without Python.
- The umask is left to us (FUSE_CAP_DONT_MASK), because a directory's default ACL takes its place.
- Targets of symbolic links are kept by the kernel (FUSE_CAP_CACHE_SYMLINKS).
- Before it writes or changes an owner, the kernel does not ask what that takes from a file (set-ID bits,
  capabilities; FUSE_HANDLE_KILLPRIV and its V2): the union and the layers take it.
- lseek(2) knows holes.
- Any number of reads ahead may be under way (max_background): the kernel has 12 of a filesystem at a time,
  and those of one user that hang would be all of them.
- Requests are counted, and timed.
- Requests that pyfuse3 has no handlers for are answered (``beyond.py``).
- Files may be lent to the kernel, which then reads and writes them without us (passthrough).
- Whether a write, or an ACL, leaves set-ID bits (CAP_FSETID), which the kernel alone knows, is read from its
  request.
- What the kernel has read of a file it keeps when the file's times change (not FUSE_CAP_AUTO_INVAL_DATA).
- Which files are opened, and closed, we need not be told (FUSE_NO_OPEN_SUPPORT): the kernel then reads and
  writes by the inode. ``unopened.py`` says where.

Without the module everything else works, slower; :func:`lacks` says why it takes no part.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

_DONT_MASK = 1 << 6  # fuse_common.h
_HANDLE_KILLPRIV = 1 << 20
_CACHE_SYMLINKS = 1 << 23


_LAST = "identify"
"""What came into the module last."""


def _load() -> tuple[Any, str]:
    # Global symbols, and before pyfuse3 is loaded: that is how its calls come through the module.
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
"""What :func:`takes_set_id` and :func:`request` return, in one."""

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


class Message(NamedTuple):
    """A request as the kernel sends it (linux/fuse.h)."""

    opcode: int
    ino: int
    uid: int
    pid: int
    body: bytes
    """What follows the header; of very long ones the beginning."""


def message() -> Message:
    """Return the request that has just come as a read by the handle number :data:`BEYOND`.

    For handlers, before they await anything.
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
    """Set what the next session can do; *seek* answers lseek(2): an offset, or -errno.

    *knows_files*: files that were opened without us can be read and written. *passthrough*: whether to lend
    files to the kernel. *exports*: file handles are valid as long as their inodes; else none are given (Linux
    6.10). *most_held*: so many bytes of data may be in memory with writes that wait, of which nobody but root
    gets more than is left if the mount is *shared* (``held_data.c``).
    """
    if _module is not None:
        wanted = _DONT_MASK | _HANDLE_KILLPRIV | _CACHE_SYMLINKS
        _module.prepare(wanted, seek, knows_files, passthrough, exports, most_held, shared)


def opens_nothing() -> bool:
    """Whether the kernel opens all files without us once open(2) was answered by ENOSYS."""
    return _module is not None and bool(_module.opens_nothing())


def request() -> tuple[int, int, int]:
    """Return process and user of the request that has just come, and the flags of the file read or written.

    For handlers, before they await anything. A user of 0xFFFFFFFF: the kernel writes what mmap(2) changed.
    """
    if _module is None:
        return 0, 0, 0
    found: tuple[int, int, int] = _module.request()
    return found


def inode() -> int:
    """Return the number of the inode that the request that has just come is about; 0: not known."""
    if _module is None:
        return 0
    found: int = _module.inode()
    return found


def lacks() -> str | None:
    """Return why the session that pyfuse3 has made has nothing of this; None when it has all of it."""
    if _module is None:
        return _why
    if not _module.takes_part():
        return "pyfuse3 was loaded first, or calls libfuse by an unknown name"
    return None


def leaves_umask() -> bool:
    """Whether the kernel leaves it to us to apply the umask."""
    return _module is not None and bool(_module.capabilities() & _DONT_MASK)


def read_from(handle: int, descriptor: int) -> None:
    """Serve reads of a handle from *descriptor* from now on; -1: by pyfuse3's handler."""
    if _module is not None:
        _module.read_from(handle, descriptor)


def why_no_passthrough() -> str:
    """Return why the session that pyfuse3 has made cannot lend files to the kernel; "" if it can."""
    if _module is None or not _module.takes_part():
        return lacks() or ""
    if not _module.watches():
        return "libfuse was built without custom I/O"
    return str(_module.passthrough_lacking())


def lend(descriptor: int) -> int:
    """Let the kernel have a file; return its number there. OSError: ELOOP on a filesystem that is on another,
    EPERM, EINVAL, ENOMEM."""
    return int(_module.lend(descriptor))


def take_back(number: int) -> None:
    """Name a file that was lent in no answer any more."""
    _module.take_back(number)


def pass_through(handle: int, number: int, *, direct: bool = False) -> None:
    """Name a file that was lent in the answer to the open of a handle; 0: none.

    *direct*: only its mappings are the kernel's, reads and writes come here.
    """
    _module.pass_through(handle, number, direct)


note: Callable[[int, int, int], bool] = _module.note if _module is not None else lambda *_: False
"""Takes note that a process (inode, pid, uid) has changed an inode, for :data:`goes_on`; 0: that ends there.

Returns whether the change before this one was the same process's, of the same program.
"""

identify: Callable[[int, bytes], None] = _module.identify if _module is not None else lambda *_: None
"""Says by what the process that was noted last is known: a descriptor, which is not kept, of its
``/proc/PID/cmdline``, and what is in there; -1: there is none."""

goes_on: Callable[[], int] = _module.goes_on if _module is not None else lambda: -1
"""Returns how the request that has just come changes what :data:`note` was told of last, if the same process
makes it: 1: it writes, 2: the mode, 4: the owner, 8: times; 0: as it has told before. Else -1."""

wrote: Callable[[int], None] = _module.wrote if _module is not None else lambda _: None
"""Takes note that a write to an inode has succeeded: :data:`goes_on` tells of a write until then."""


def empty_buffer() -> None:
    """Free the memory of the last request: its handler is about to wait, and has taken what it needs."""
    if _module is not None:
        _module.empty_buffer()


def takes_set_id() -> bool | None:
    """Whether the request that has just come takes set-ID bits from a file; None where that is not told.

    For handlers of open, create, write, setattr and setxattr (set-group-ID then), before they await anything.
    """
    return None if _module is None else _module.takes_set_id()


def requester() -> tuple[int, int]:
    """Return the process and the user who make the request that has just come, as :func:`takes_set_id` does;
    process 0 is not known."""
    return (0, 0) if _module is None else _module.requester()


class Counted(NamedTuple):
    """What was counted since the mount."""

    operations: list[tuple[int, int, int, int, list[tuple[int, int, int]]]]
    """Opcode, answers, errors among them, ns, and how many took from so many ns to so many."""
    under_way: list[tuple[int, int]]
    """Opcode, and for how many ns."""
    direct_reads: int
    """How many reads were served without Python."""


def counted() -> Counted | str:
    """Return what requests there were; or why that is not known."""
    lacking = lacks()
    if lacking is not None:
        return lacking
    if not _module.watches():
        return "libfuse was built without custom I/O"
    return Counted(*_module.figures())


def rings_serve() -> bool:
    """Whether requests come by io_uring."""
    return _module is not None and not _module.ring_refused()


def rings_refused() -> str:
    """Return why requests do not come by io_uring, though that was asked for; "" when they do."""
    return str(_module.ring_refused())
