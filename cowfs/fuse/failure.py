"""The errno with which a failed request is answered."""

from __future__ import annotations

import errno
import logging

log = logging.getLogger(__name__)


def errno_of(error: BaseException, name: str) -> int:
    """Return the errno for an exception of the handler *name*. Log exceptions that it should not raise."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    log.error("unexpected error in %s; answered EIO", name, exc_info=error)
    return errno.EIO
