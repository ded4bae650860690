"""Create the target of an export: complete, or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

from cowfs.errors import SystemFailure, UsageError
from cowfs.layers import beneath
from cowfs.linux import files
from cowfs.linux.trust import who_can_redirect
from cowfs.linux.user_namespace import has_all
from cowfs.store.format.sniff import split_subdir

_NO_TMPFILE = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT}
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FORCE = "give another name, or --force to replace it"


@contextmanager
def new_file(path: str, *, force: bool) -> Iterator[int]:
    """Open a file that gets its name at the end of the block, when all of it is on disk.

    After an error nothing is left of it. Until the end it has no name, if the filesystem supports that
    (O_TMPFILE). UsageError if *path* exists and must not, or cannot, be replaced; SystemFailure with *path*
    if a system call fails.
    """
    with _parent(path) as (parent, name):
        _refuse(path, parent, name, stat.S_IFREG, force=force)
        temporary = ""
        with ExitStack() as stack:
            try:
                fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=parent)
            except OSError as error:
                if error.errno not in _NO_TMPFILE:
                    raise
                temporary = _temporary(name)
                stack.callback(_remove, parent, temporary)
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                fd = os.open(temporary, flags, 0o600, dir_fd=parent)
            stack.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
            os.fsync(fd)
            if not temporary:
                temporary = _temporary(name) if force else name
                os.link(f"/proc/self/fd/{fd}", temporary, dst_dir_fd=parent, follow_symlinks=True)
                stack.callback(_remove, parent, temporary if force else "")
            if temporary != name:
                _rename(parent, temporary, name, force=force)
            os.fsync(parent)


@contextmanager
def new_directory(path: str, *, force: bool) -> Iterator[int]:
    """Like :func:`new_file`, for a directory, which has a temporary name beside *path* until the end.

    If an export is killed, the next one to the same path removes that directory. *force* replaces an empty
    directory, never one with something in it.
    """
    with _parent(path) as (parent, name):
        _refuse(path, parent, name, stat.S_IFDIR, force=force)
        with _made(parent, name) as (fd, temporary):
            yield fd
            files.syncfs(fd)
            _rename(parent, temporary, name, force=force)
            os.fsync(parent)


def must_be_elsewhere(path: str, sources: Sequence[str], *, below: bool = False) -> None:
    """UsageError if writing *path* would change what is read: one of the *sources*, the store first.

    That is the image of the store or of a lower, and anything inside a store that is a directory; with
    *below* also anything inside a lower that is a directory.
    """
    parent = os.path.dirname(os.path.abspath(path))
    for number, source in enumerate(sources):
        name = "a lower of the store" if number else "the store"
        image = source if number else split_subdir(os.path.abspath(source))[0]
        if os.path.isfile(image):
            if is_same(path, image):
                raise UsageError(f"{path}: is {name} that is read", "give another name")
        elif os.path.isdir(source) and (below or not number) and _is_inside(parent, source, other=not number):
            raise UsageError(f"{path}: is inside {name} that is read", "choose a path outside of it")


def is_same(one: str, other: str) -> bool:
    """Whether both paths lead to one file."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _is_inside(path: str, directory: str, *, other: bool) -> bool:
    """Whether *path* is *directory* or below it; with *other* also on a filesystem that is mounted there."""
    path = os.path.realpath(path)
    while not is_same(path, directory):
        above = os.path.dirname(path)
        if above == path or (os.path.ismount(path) and not other):
            return False
        path = above
    return True


def must_be_possible(path: str) -> None:
    """Raise the error now that :func:`new_directory` with *force* would raise, as far as that is known."""
    with _parent(path) as (parent, name):
        _refuse(path, parent, name, stat.S_IFDIR, force=True)
        with _made(parent, name):
            pass


@contextmanager
def scratch_directory(path: str) -> Iterator[int]:
    """Open a temporary directory beside *path*. It is removed at the end of the block."""
    with _parent(path) as (parent, name), _made(parent, name) as (fd, _):
        yield fd


def remove(path: str) -> None:
    """Remove what this process has made at *path*, as far as possible, if another user led it nowhere else.

    Follows no symbolic link, and enters nothing that is mounted there. Blocks.
    """
    above, name = os.path.split(os.path.abspath(path))
    with suppress(OSError):
        parent = os.open(above, _DIRECTORY)
        try:
            # In a user namespace root's own links seem to be another user's.
            if not has_all("uid") or who_can_redirect(above, parent) is None:
                beneath.remove_tree(parent, os.fsencode(name), beneath.guarded(parent))
        finally:
            os.close(parent)


@contextmanager
def _made(parent: int, name: str) -> Iterator[tuple[int, str]]:
    """Create a directory with a temporary name. It is removed at the end, unless it has been renamed."""
    temporary = _temporary(name)
    with ExitStack() as stack:
        stack.callback(_remove, parent, temporary)
        since = beneath.now()
        os.mkdir(temporary, 0o700, dir_fd=parent)
        fd = os.open(temporary, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        stack.callback(os.close, fd)
        if not beneath.is_new(fd, os.fstat(fd), since, files.fs_magic(fd)):
            raise beneath.stale(os.fsencode(temporary))
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd, temporary


@contextmanager
def _parent(path: str) -> Iterator[tuple[int, str]]:
    """Open the directory of *path*; turn an OSError in the block into an error that names *path*."""
    directory, name = os.path.split(path.rstrip("/") if path.strip("/") else path)
    if name in {"", ".", ".."}:
        raise UsageError(f"{path}: not a name for a file", "give the name of a file to create")
    try:
        parent = os.open(directory or ".", _DIRECTORY)
    except OSError as error:
        hint = ""
        if isinstance(error, FileNotFoundError):
            hint = f"there is no directory {directory}: mkdir -p {directory}"
        elif isinstance(error, NotADirectoryError):
            hint = f"{directory} is not a directory: give another name"
        raise SystemFailure(f"{path}: {error.strerror}", hint) from None
    try:
        reason = who_can_redirect(directory or ".", parent)
        if reason is not None:
            raise UsageError(f"{path}: {reason}", "give a name in the directory itself")
        _sweep(parent, name)
        yield parent, name
    except FileExistsError:
        raise UsageError(f"{path}: already exists", _FORCE) from None
    except OSError as error:
        if _is_read(error.filename):
            raise
        hint = "free space there, or give another path"
        if os.fstat(parent).st_nlink == 0:
            hint = f"its directory was removed meanwhile: mkdir -p {directory or os.getcwd()}, and try again"
        elif error.errno == errno.EACCES:
            hint = f"it needs a new file in {directory or '.'}"
        raise SystemFailure(f"{path}: cannot be written: {error.strerror or error}", hint) from None
    finally:
        os.close(parent)


def _is_read(name: str | bytes | int | None) -> bool:
    """Whether an error with that name is about a file that is read, not about the new one."""
    if not isinstance(name, str | bytes):
        return False
    return os.fsencode(name).startswith(b"/") and not os.fsencode(name).startswith(b"/proc/self/fd/")


def _refuse(path: str, parent: int, name: str, wanted: int, *, force: bool) -> None:
    """UsageError if *name* exists and must not, or cannot, be replaced."""
    try:
        there = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not force:
        raise UsageError(f"{path}: already exists", _FORCE)
    if stat.S_IFMT(there.st_mode) != wanted:
        kind = "regular file" if wanted == stat.S_IFREG else "directory"
        raise UsageError(f"{path}: exists, but is not a {kind}", "give another name")
    if wanted == stat.S_IFDIR:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            if os.listdir(fd):
                raise UsageError(f"{path}: is not empty", "remove it first, or give another name")
        finally:
            os.close(fd)


def _rename(parent: int, temporary: str, name: str, *, force: bool) -> None:
    if force:
        os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
    else:
        files.rename_new(parent, temporary, name)


def _prefix(name: str) -> str:
    return f".{name[:100]}.cowfs-"


def _temporary(name: str) -> str:
    return _prefix(name) + secrets.token_hex(8)


def _sweep(parent: int, name: str) -> None:
    """Remove what killed exports to this path have left, which no process has locked any more."""
    for each in os.listdir(parent):
        rest = each.removeprefix(_prefix(name))
        if rest == each or len(rest) != 16:
            continue
        with suppress(OSError):
            fd = os.open(each, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
            try:
                if os.fstat(fd).st_uid != os.geteuid():
                    continue
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(parent, each)
            finally:
                os.close(fd)


def _remove(parent: int, name: str) -> None:
    if not name:
        return
    with suppress(OSError):
        beneath.remove_tree(parent, os.fsencode(name))
