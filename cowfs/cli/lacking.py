"""What the system gave too little of: files, threads, memory. It is told as that, and with a way out."""

from __future__ import annotations

import errno
import os
import resource

from cowfs.errors import SystemFailure
from cowfs.linux.limits import is_lack_of_threads

LEAST_FILES = 64
"""So many files a mount has open at once, with some to spare for its users."""


def lacking(error: BaseException) -> SystemFailure | None:
    """Return what to tell of an error that comes of a limit, or of too little memory; None for any other."""
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(lacking, error.exceptions)), None)
    code = error.errno if isinstance(error, OSError) else 0
    if code == errno.EMFILE:
        return too_few_files()
    if code == errno.ENFILE:
        return SystemFailure("the system has too many files open", "as root: sysctl fs.file-max=...")
    if code == errno.EAGAIN or is_lack_of_threads(error):
        most, _ = resource.getrlimit(resource.RLIMIT_NPROC)
        limited = f" (user {os.getuid()} may have {most})" if most != resource.RLIM_INFINITY else ""
        return SystemFailure(
            f"no more processes or threads can be started{limited}",
            "allow more of them (ulimit -u, TasksMax= in a unit), or more memory (ulimit -v)",
        )
    is_import = isinstance(error, ImportError) and ("cannot map" in str(error) or "allocate" in str(error))
    if code == errno.ENOMEM or isinstance(error, MemoryError) or is_import:
        return SystemFailure("memory is lacking", "allow more (ulimit -v and -d, MemoryMax= in a unit)")
    return None


def too_few_files() -> SystemFailure:
    """Return what to tell of RLIMIT_NOFILE."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return SystemFailure(
        f"too few files may be open: {hard}", "allow 1024 or more (ulimit -n, LimitNOFILE= in a unit)"
    )
