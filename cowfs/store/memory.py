"""Open a store that is gone when it is closed."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from cowfs.errors import StoreError, SystemFailure, UsageError
from cowfs.layers.directory import DirectoryLayer
from cowfs.linux import mounts
from cowfs.store import directory, layout, lock
from cowfs.store.store import Store, Wanted

_NAME = "memory"


def open_memory(want: Wanted, size: int | None = None) -> Store:
    """Open an empty store: on a tmpfs of at most *size* bytes that only we see, or, without root, in
    a private directory that close() removes (and, after a crash, the next one that is opened).

    Raises UsageError for a *size* that nobody would keep, which is so in a directory.
    """
    with ExitStack() as stack:
        if os.geteuid() == 0:
            try:
                root = mounts.tmpfs(size)
            except PermissionError:
                root = -1  # a container's root, who may not mount
            except OSError as error:
                raise SystemFailure(f"no tmpfs for the store in memory: {error.strerror}") from None
            if root >= 0:
                stack.callback(os.close, root)
                return directory.open_root(root, _NAME, want, stack, kind="memory")
        if size is not None:
            raise UsageError(
                "memory: only root can limit its size",
                "without size= it may fill the filesystem that it is in",
            )
        root, path = _private_directory(stack)
        return directory.open_root(root, path, want, stack, kind="memory")


def _places() -> Iterator[str]:
    """Yield where a private directory may be, what is in memory first."""
    runtime, temporary = os.environ.get("XDG_RUNTIME_DIR"), os.environ.get("TMPDIR")
    for place in (runtime, "/dev/shm", temporary, "/tmp", "/var/tmp"):
        if place and os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK):
            yield place


def _prefix() -> str:
    return f"cowfs-{os.geteuid()}-"


def _private_directory(stack: ExitStack) -> tuple[int, str]:
    """Make an empty directory of our own, locked; remove those of the dead. Returns descriptor, path."""
    tried = []
    for place in _places():
        _remove_stale(place)
        made = _make(place)
        if made is None:
            tried.append(place)
            continue
        path, fd = made
        stack.callback(os.close, fd)
        stack.callback(_remove, path, fd)
        return fd, path
    raise StoreError(
        f"no place for a store in memory: {', '.join(tried) or 'nothing'} cannot hold user.* attributes",
        "give a directory with --store DIR",
    )


def _make(place: str) -> tuple[str, int] | None:
    while True:
        path = tempfile.mkdtemp(prefix=_prefix(), dir=place)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        # Somebody who cleans up may have taken it for a dead one's before it was locked.
        if lock.try_lock(fd) and os.path.exists(path):
            break
        os.close(fd)
    try:
        os.setxattr(fd, b"user.overlay.cowfs.probe", b"y")
        os.removexattr(fd, b"user.overlay.cowfs.probe")
    except OSError as error:
        os.rmdir(path)
        os.close(fd)
        if error.errno not in {errno.EOPNOTSUPP, errno.EPERM}:
            raise
        return None
    return path, fd


def _remove_stale(place: str) -> None:
    """Remove the private directories of processes that have died without closing theirs."""
    for path in Path(place).glob(_prefix() + "*"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if os.fstat(fd).st_uid == os.geteuid() and lock.try_lock(fd):
                _remove(str(path), fd)
        finally:
            os.close(fd)


def _remove(path: str, fd: int) -> None:
    layer = DirectoryLayer(os.dup(fd), path)
    try:
        layout.empty(layer, layer.root)
        os.rmdir(path)
    except OSError:
        pass  # what is left is tried again next time
    finally:
        layer.close()
