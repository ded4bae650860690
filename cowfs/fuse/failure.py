"""What the kernel gets as an answer when a request fails."""

from __future__ import annotations

import errno
import logging

log = logging.getLogger(__name__)


def errno_of(error: BaseException, name: str) -> int:
    """Return the errno for what the handler *name* raised; what it should not have raised is logged."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    log.error("unexpected error in %s; answered EIO", name, exc_info=error)
    return errno.EIO
