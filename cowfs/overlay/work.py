"""The work directory: new files are prepared here, then renamed into place, or removed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cowfs.overlay.fs import OverlayFs


@contextmanager
def made_aside(fs: OverlayFs, *, directory: bool = False) -> Iterator[bytes]:
    """Give a free name in the work directory; after an exception, remove the file or directory of that
    name."""
    temporary = fs.temporary()
    try:
        yield temporary
    except BaseException:
        with suppress(OSError):
            (fs.upper.rmdir if directory else fs.upper.unlink)(fs.work, temporary, None)
        raise
