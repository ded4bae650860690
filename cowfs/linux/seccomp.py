"""A filter that refuses system calls that a filesystem daemon does not use (seccomp(2)).

It lists the refused calls rather than the allowed ones, because later versions of Python, libfuse and
e2fsprogs may need other calls. A refused call returns EPERM, as for a process without privilege. libseccomp
supplies the numbers.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Callable
from functools import cache

from cowfs.errors import os_error

_REFUSED = """
    acct add_key adjtimex bpf chroot clock_adjtime clock_settime create_module delete_module
    fanotify_init finit_module get_kernel_syms init_module io_uring_setup ioperm iopl ioprio_set
    kcmp kexec_file_load kexec_load keyctl lookup_dcookie migrate_pages modify_ldt move_pages
    nfsservctl perf_event_open personality pidfd_getfd process_madvise process_vm_readv
    process_vm_writev ptrace query_module quotactl quotactl_fd reboot request_key sched_setattr
    sched_setparam setdomainname sethostname setns setpriority settimeofday stime swapoff swapon
    _sysctl sysfs syslog uselib userfaultfd ustat vhangup vm86 vm86old
"""
_RINGS = "io_uring_enter io_uring_register"
"""Also refused, unless the daemon has made rings before. ``ring.c`` restricts what those can do."""

_REFUSED_AT_LAST = """
    chroot execve execveat fsconfig fsmount fsopen fspick mount mount_setattr move_mount open_by_handle_at
    open_tree open_tree_attr pivot_root setns swapoff swapon umount umount2 unshare
"""
"""Refused to a confined daemon: calls that could lead out of its root, or execute another program."""
_NEW = {"open_tree_attr": 467}
"""Calls that libseccomp may not know yet; their numbers are the same on all machines (Linux 6.15)."""
_NAMESPACES = (0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
"""The flags of clone(2) for new namespaces, which are refused with unshare(2)."""

# include/seccomp.h of libseccomp 2
_ALLOW = 0x7FFF0000
_EPERM = 0x00050000 | errno.EPERM
_NOTHING = 0x00050000  # SCMP_ACT_ERRNO(0)
_ENOSYS = 0x00050000 | errno.ENOSYS
_NOT_EQUAL, _EQUAL, _GREATER, _MASKED = 1, 4, 6, 7  # SCMP_CMP_NE, _EQ, _GT, _MASKED_EQ
_UNKNOWN = -1  # __NR_SCMP_ERROR

_CLONE_FLAGS = int(os.uname().machine.startswith("s390"))
"""The index of clone(2)'s argument with the flags."""

# include/uapi/linux/seccomp.h and prctl.h
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC = 1, 1
_PR_SET_NO_NEW_PRIVS = 38
_INSTRUCTION = 8  # the size of struct sock_filter

_libc = ctypes.CDLL(None, use_errno=True)


class _Comparison(ctypes.Structure):
    _fields_ = (  # struct scmp_arg_cmp
        ("argument", ctypes.c_uint),
        ("operation", ctypes.c_int),
        ("value", ctypes.c_uint64),
        ("mask", ctypes.c_uint64),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))  # struct sock_fprog


def prepare() -> None:
    """Compile the filters of a daemon, so that forks of this process load them faster. OSError: ENOENT."""
    for refused in (_REFUSED, f"{_REFUSED} {_RINGS}"):
        _compiled(refused, sockets=True)
    _compiled(_REFUSED_AT_LAST, sockets=False)


def refuse_needless_calls(*, has_rings: bool = False) -> None:
    """Refuse needless calls, and sockets other than AF_UNIX, to this thread and those it starts, for good.

    OSError: ENOENT without libseccomp, EACCES without no_new_privs or CAP_SYS_ADMIN.
    """
    _load(_REFUSED if has_rings else f"{_REFUSED} {_RINGS}", sockets=True)


def refuse_for_good() -> None:
    """Refuse to all threads, for good, the calls that could lead out of a confined daemon's root.

    OSError, as for :func:`refuse_needless_calls`.
    """
    _load(_REFUSED_AT_LAST, sockets=False)


def refuse_all_but_network() -> None:
    """Refuse to all threads, for good, the calls that a process for the network does not use. OSError."""
    _load(f"{_REFUSED} {_RINGS} {_REFUSED_AT_LAST}", sockets=False)


_OWNERS = {"chown": 1, "lchown": 1, "fchown": 1, "fchownat": 2, "chown32": 1, "lchown32": 1, "fchown32": 1}
"""The calls that change an owner, and the index of the argument for the user; the group's is the next."""


def chown_ignorer() -> Callable[[], None]:
    """Return what, for good, lets chown(2) to a user or group other than 0 succeed without any effect.

    It may be called in another root, which need not have libseccomp. OSError here and there.
    """
    library = _library()

    def ignore() -> None:
        context = _context(library)
        try:
            for name, user in _OWNERS.items():
                for argument in (user, user + 1):
                    _rule(library, context, _NOTHING, name, _Comparison(argument, _GREATER, 0, 0))
            _check(library.seccomp_load(context))
        finally:
            library.seccomp_release(context)

    return ignore


def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        raise OSError(errno.ENOENT, "libseccomp is not installed") from None
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = (ctypes.c_uint32,)
    library.seccomp_rule_add_array.argtypes = (
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.POINTER(_Comparison),
    )
    library.seccomp_export_bpf.argtypes = (ctypes.c_void_p, ctypes.c_int)
    library.seccomp_load.argtypes = library.seccomp_release.argtypes = (ctypes.c_void_p,)
    return library


def _context(library: ctypes.CDLL) -> int:
    context: int | None = library.seccomp_init(_ALLOW)
    if not context:
        raise OSError(errno.EINVAL, "libseccomp does not know this machine")
    return context


def _load(refused: str, *, sockets: bool) -> None:
    """Refuse these calls to this thread, or without *sockets* to all; it can gain no privileges then."""
    code = _compiled(refused, sockets=sockets)
    program = _Program(len(code) // _INSTRUCTION, code)
    number = _library().seccomp_syscall_resolve_name(b"seccomp")
    flags = 0 if sockets else _SECCOMP_FILTER_FLAG_TSYNC
    if (
        _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0
        or (result := _libc.syscall(number, _SECCOMP_SET_MODE_FILTER, flags, ctypes.byref(program))) < 0
    ):
        raise os_error(ctypes.get_errno())
    if result:  # a thread that has another filter
        raise os_error(errno.ECANCELED)


@cache
def _compiled(refused: str, *, sockets: bool) -> bytes:
    """Return the filter as instructions for the kernel."""
    library = _library()
    context = _context(library)
    with open(os.memfd_create("cowfs-filter"), "rb", buffering=0) as program:
        try:
            if sockets:
                _refuse(library, context, "socket", _Comparison(0, _NOT_EQUAL, socket.AF_UNIX, 0))
            for name in refused.split():
                _refuse(library, context, name)
            if "unshare" in refused:
                # The C library then calls clone(2), the flags of which a filter can see.
                _rule(library, context, _ENOSYS, "clone3")
                for flag in _NAMESPACES:
                    _refuse(library, context, "clone", _Comparison(_CLONE_FLAGS, _MASKED, flag, flag))
            for policy in range(os.SCHED_OTHER + 1, os.SCHED_IDLE):  # what give_way.c does remains
                _refuse(library, context, "sched_setscheduler", _Comparison(1, _EQUAL, policy, 0))
            _refuse(library, context, "sched_setscheduler", _Comparison(1, _GREATER, os.SCHED_IDLE, 0))
            _check(library.seccomp_export_bpf(context, program.fileno()))
        finally:
            library.seccomp_release(context)
        program.seek(0)
        return program.readall()


def _refuse(library: ctypes.CDLL, context: int, name: str, *only: _Comparison) -> None:
    _rule(library, context, _EPERM, name, *only)


def _rule(library: ctypes.CDLL, context: int, action: int, name: str, *only: _Comparison) -> None:
    number = library.seccomp_syscall_resolve_name(name.encode())
    if number == _UNKNOWN:  # a call newer than the library
        number = _NEW.get(name, _UNKNOWN)
    if number == _UNKNOWN:
        return
    _check(
        library.seccomp_rule_add_array(context, action, number, len(only), (_Comparison * len(only))(*only))
    )


def _check(result: int) -> None:
    if result < 0:
        raise os_error(-result)
