"""The work directory: new files are prepared here, and then get their names or are removed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cowfs.overlay.fs import OverlayFs


@contextmanager
def made_aside(fs: OverlayFs, *, directory: bool = False) -> Iterator[bytes]:
    """Give a name in the work directory; after an exception remove what has it, a directory or not."""
    temporary = fs.temporary()
    try:
        yield temporary
    except BaseException:
        with suppress(OSError):
            (fs.upper.rmdir if directory else fs.upper.unlink)(fs.work, temporary, None)
        raise
