"""Explain errors of the system, above all limits that are too low: files, threads, memory."""

from __future__ import annotations

import errno
import os
import resource

from cowfs.errors import SystemFailure
from cowfs.linux.limits import is_lack_of_threads

LEAST_FILES = 64
"""How many open files a mount needs, with a few for its users."""

LEAST_ADDRESS_SPACE = 72 << 20
"""In bytes. With less, libfuse cannot allocate a buffer for the first request, and retries for ever."""

LEAST_DATA = 64 << 20
"""The least limit of writable memory in bytes, for the same reason."""


def explain_shortage(error: BaseException) -> SystemFailure | None:
    """Return the message for an error caused by a limit or by too little memory; None for any other."""
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(explain_shortage, error.exceptions)), None)
    code = error.errno if isinstance(error, OSError) else 0
    if code == errno.EMFILE:
        return too_few_files()
    if code == errno.ENFILE:
        return SystemFailure(
            "too many files are open in the system", "raise the limit, as root: sysctl fs.file-max=..."
        )
    if code == errno.EAGAIN or is_lack_of_threads(error):
        most, _ = resource.getrlimit(resource.RLIMIT_NPROC)
        limited = f" (the limit of user {os.getuid()} is {most})" if most != resource.RLIM_INFINITY else ""
        return SystemFailure(
            f"cannot start another process or thread{limited}",
            "raise the limit of processes (ulimit -u, TasksMax= in a unit) or of memory (ulimit -v)",
        )
    is_import = isinstance(error, ImportError) and ("cannot map" in str(error) or "allocate" in str(error))
    if code == errno.ENOMEM or isinstance(error, MemoryError) or is_import:
        return SystemFailure(
            "out of memory", "raise the limit of memory (ulimit -v and -d, MemoryMax= in a unit)"
        )
    return None


def explain(error: BaseException) -> SystemFailure | None:
    """Return the message for an error of the system, or of a limit; None for any other."""
    failure = explain_shortage(error)
    if failure is not None or not isinstance(error, OSError):
        return failure
    if error.filename is None and _is_astray():
        return SystemFailure(
            "the current directory has been removed", "change to another one, or give absolute paths"
        )
    is_named = isinstance(error.filename, (str, bytes))  # it may be the number of a descriptor
    where = os.fsdecode(error.filename) + ": " if is_named else ""
    return SystemFailure(
        f"{where}{error.strerror or error}", "is /proc mounted?" if where.startswith("/proc/self/") else ""
    )


def _is_astray() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def must_have_address_space() -> None:
    """SystemFailure if RLIMIT_AS or RLIMIT_DATA is too low to serve a mount."""
    data, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if 0 <= data < LEAST_DATA:
        raise SystemFailure(
            f"the limit of data is too low: {data >> 20} MiB",
            f"raise it to {LEAST_DATA >> 20} MiB or more (ulimit -d, LimitDATA= in a unit)",
        )
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if 0 <= most < LEAST_ADDRESS_SPACE:
        raise SystemFailure(
            f"the limit of address space is too low: {most >> 20} MiB",
            f"raise it to {LEAST_ADDRESS_SPACE >> 20} MiB or more (ulimit -v, LimitAS= in a unit)",
        )


def too_few_files() -> SystemFailure:
    """Return the message for a low RLIMIT_NOFILE."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return SystemFailure(
        f"the limit of open files is too low: {hard}",
        "raise it to 1024 or more (ulimit -n, LimitNOFILE= in a unit)",
    )
