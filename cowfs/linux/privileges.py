"""Drop the privileges that root's daemon does not need, so that an attacker who takes it over lacks them.

Privileges belong to single threads, and the threads and programs that they start inherit them. So drop them
before starting any.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import resource
import struct
from contextlib import suppress

from cowfs.errors import os_error
from cowfs.linux import limits
from cowfs.linux.seccomp import refuse_needless_calls

log = logging.getLogger(__name__)

# include/uapi/linux/capability.h
CAPABILITIES = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_FOWNER": 3,
    "CAP_FSETID": 4,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_RESOURCE": 24,
    "CAP_MKNOD": 27,
    "CAP_SETFCAP": 31,
}
"""The capabilities that a daemon keeps, with their numbers; docs/adr/0024-root-with-little.md says why."""
_CAP_SYS_NICE = 23
_VERSION_3 = 0x20080522
_HEADER = struct.Struct("=Ii")  # struct __user_cap_header_struct: version, pid
_DATA = struct.Struct("=6I")  # 2 of struct __user_cap_data_struct: effective, permitted, inheritable

# include/uapi/linux/prctl.h
_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 4, 24, 38, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_LAST_POSSIBLE = 63

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)


def drop(*, has_rings: bool = False) -> None:
    """Keep only the privileges of root that a daemon needs, and hide its memory from other processes.

    Does nothing in a user's daemon: it has none to drop, and needs the set-user-ID program fusermount3 to
    unmount. *has_rings*: the daemon continues to use its io_uring rings. What the kernel or a container does
    not allow is logged, and not raised.
    """
    if os.geteuid() != 0:
        return

    def refuse() -> None:
        refuse_needless_calls(has_rings=has_rings)

    def drop_capabilities() -> None:
        _drop_capabilities(0 if not has_rings or limits.steps_back_by_limit() else 1 << _CAP_SYS_NICE)

    refuse.__name__ = refuse_needless_calls.__name__
    for step in (_hide_memory, drop_capabilities, _no_new_privileges, refuse):
        try:
            step()
        except OSError as error:
            level = logging.INFO if error.errno == errno.ENOENT else logging.WARNING
            log.log(
                level, "keeps more privileges than needed: %s: %s", step.__name__.strip("_"), error.strerror
            )


def _hide_memory() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hide()


def hide() -> None:
    """Protect this process from ptrace(2) and from access to its files through /proc (PR_SET_DUMPABLE).

    This keeps out processes without privileges, and all of a child user namespace. Forked processes are
    protected too; executed programs are not. OSError.
    """
    _prctl(_PR_SET_DUMPABLE, 0)


def _drop_capabilities(more: int) -> None:
    """Keep the needed capabilities, and *more* as a mask, of those that the process has.

    Programs that it starts get those of the bounding set, as root's programs do.
    """
    kept = sum(1 << number for number in CAPABILITIES.values()) | more
    with suppress(OSError):  # Linux before 4.3 has no ambient set
        _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    header = _HEADER.pack(_VERSION_3, 0)
    raw = ctypes.create_string_buffer(_DATA.size)
    if _libc.capget(header, raw):
        raise _failure()
    effective, permitted, _, effective_high, permitted_high, _ = _DATA.unpack(raw.raw)
    for number in range(_LAST_POSSIBLE + 1):
        if not kept >> number & 1:
            try:
                _prctl(_PR_CAPBSET_DROP, number)
            except OSError as error:
                if error.errno == errno.EINVAL:  # this kernel has no more capabilities
                    break
                log.debug("cannot reduce the bounding set: %s", error.strerror)
                break
    low, high = kept & 0xFFFFFFFF, kept >> 32
    data = _DATA.pack(effective & low, permitted & low, 0, effective_high & high, permitted_high & high, 0)
    if _libc.capset(header, data):
        raise _failure()


def _no_new_privileges() -> None:
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0):
        raise _failure()


def _failure() -> OSError:
    return os_error(ctypes.get_errno())
