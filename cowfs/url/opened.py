"""The open files on servers. All users share one open file."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from cowfs.errors import LayerError
from cowfs.url import names
from cowfs.url.disk_cache import DiskCache, default_directory, open_directory
from cowfs.url.link import Link
from cowfs.url.protocol import BEGINNING, Version
from cowfs.url.remote import BLOCK, RemoteFile
from cowfs.url.settings import Settings

log = logging.getLogger(__name__)


class _Shared:
    """An open file, and the number of its users."""

    def __init__(self, file: RemoteFile) -> None:
        self.file = file
        self.users = 0


_open: dict[str, _Shared] = {}
_lock = threading.Lock()
_started: dict[str, Link] = {}
"""What fetches files that will be opened."""
_settings = Settings()


class Opened:
    """A file on a server, open for one user, who reads it with :meth:`pread`."""

    def __init__(self, shared: _Shared) -> None:
        self._shared = shared
        self._is_open = True
        self._is_over = False
        self.file = shared.file
        self.forget = shared.file.forget

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        return self.file.size

    def pread(self, size: int, at: int) -> bytes:
        """Return bytes as :meth:`RemoteFile.pread` does; EIO after :meth:`stop`."""
        return self.file.pread(size, at, lambda: self._is_over)

    def stop(self) -> None:
        """End the waits of all reads through this object."""
        self._is_over = True

    def caches(self) -> dict[str, tuple[int, int]]:
        """Return how many blocks were cached, and how many had to be fetched."""
        return self.file.caches()

    def close(self) -> None:
        """Close the file if nobody else uses it. Safe to call twice."""
        with _lock:
            if not self._is_open:
                return
            self._is_open = False
            self._shared.users -= 1
            last = not self._shared.users
            if last:
                del _open[self.file.url]
        if last:
            self.file.close()


def open_url(url: str) -> Opened:
    """Open a file on a server. Blocks; LayerError says why it cannot be used.

    The first open starts a fetching process; UsageError for an invalid URL.
    """
    with _lock:
        shared = _open.get(url)
        if shared is None:
            shared = _open[url] = _Shared(_begin(url, _settings))
        shared.users += 1
        return Opened(shared)


@contextmanager
def held_open(lowers: Sequence[str], settings: Settings) -> Iterator[Callable[[], None]]:
    """Start the fetching processes of those *lowers* that are URLs; open the files when the yielded function
    is called.

    In between, a daemon that still has only one thread drops the rights that starting processes needs.
    *settings*
    apply to all files opened from now on. SystemFailure; as :func:`open_url`.
    """
    global _settings  # noqa: PLW0603 - a process has one
    _settings = settings
    urls = list(dict.fromkeys(filter(names.is_url, lowers)))
    with ExitStack() as stack:
        for url in urls:
            _started[url] = link = Link(url, settings.patience)
            stack.callback(link.close)

        def begin() -> None:
            for url in urls:
                stack.callback(open_url(url).close)

        yield begin


def _begin(url: str, settings: Settings) -> RemoteFile:
    names.check(url)
    link = _started.pop(url, None) or Link(url, settings.patience)
    try:
        version = link.open()
        if not version.size:
            raise LayerError(f"{url}: is empty", "check the URL")
        return RemoteFile(link, version, _disk_cache(url, version, settings))
    except BaseException:
        link.close()
        raise


def _disk_cache(url: str, version: Version, settings: Settings) -> DiskCache | None:
    path = default_directory() if settings.cache is None else settings.cache
    if not path:
        return None
    if not any(name != BEGINNING for name, _ in version.marks):
        log.warning("%s: it is not cached on disk: its server sends neither ETag nor Last-Modified", url)
        return None
    try:
        return DiskCache(open_directory(os.path.abspath(path)), url, version, BLOCK, settings.cache_size)
    except OSError as error:
        log.warning("%s: it is not cached on disk: %s: %s", url, path, error.strerror)
        return None
