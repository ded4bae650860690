"""Back up what an apply replaces, and restore it.

::

    DIR/tree/    the root's version of each path that was to change, with the directories above it
    DIR/absent   the paths that did not exist in the root, each followed by a NUL
    DIR/root     the path of the root
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import ExitStack, suppress

from cowfs.changes.merged import Merged
from cowfs.changes.version import Tree
from cowfs.errors import UsageError, os_error
from cowfs.exports.apply import Apply
from cowfs.exports.apply_root import Root
from cowfs.exports.entries import Entry, Tick, Withheld, feed
from cowfs.exports.losses import Losses
from cowfs.exports.plan import Item, Plan, everything
from cowfs.exports.target import new_directory
from cowfs.exports.upper import Upper
from cowfs.layers.directory import DirectoryLayer
from cowfs.overlay.stack import Stack
from cowfs.overlay.xattr_format import TRUSTED, XattrFormat

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_TREE, _ABSENT, _ROOT = b"tree", b"absent", b"root"
_LARGEST = 256 << 20
"""The limit of the names in ``absent``, in bytes."""
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR}


class _All:
    """:class:`cowfs.exports.apply.Known` for a restore: all attributes are set."""

    def differs(self, _: Entry) -> bool:
        return True

    def keeps_owner(self, _: bytes) -> bool:
        return False

    def keeps_acls(self, _: bytes) -> bool:
        return False

    def source(self, _: bytes) -> bytes | None:
        return None


def back_up(items: Plan, after: Tree, root: Root, named: str, directory: str, tick: Tick) -> Losses:
    """Make *directory*, with all that these changes replace in *root*; return what it cannot hold. Blocks.

    *named* is the root as the user gave it: perhaps the store that is mounted there. At the end *directory*
    is complete and on disk, or does not exist. Raises CowfsError, and OSError with the path.
    """
    losses = Losses()
    if os.path.lexists(os.path.join(os.fsencode(directory), _ROOT)):
        hint = "leave out --backup to complete that apply, undo it with --undo, or give another name"
        raise UsageError(f"{directory}: is the backup of an earlier apply", hint)
    with ExitStack() as stack:
        fd = root.open(b"")
        assert fd is not None
        tree = _tree_of(fd, root.path, stack)
        top = stack.enter_context(new_directory(directory, force=True))
        os.mkdir(_TREE, 0o700, dir_fd=top)
        fd = os.open(_TREE, _DIRECTORY, dir_fd=top)
        stack.callback(os.close, fd)
        saved: set[bytes] = set()
        absent = []
        for path, item in items.items():
            node = tree.node(path)
            if node is None:
                absent.append(path)
                continue
            saved.add(path)
            to_be = after.node(path) if item is Item.NODE else None
            if node.is_dir and (to_be is None or not to_be.is_dir):
                saved.update(below for below, _ in everything(tree, path))
        upper = Upper(fd, losses, tick, whole=True)
        try:
            feed([(path, Item.NODE) for path in _in_order(saved)], tree, upper, losses, tick, None)
        finally:
            upper.close()
        _write(top, _ABSENT, b"".join(path + b"\0" for path in absent))
        _write(top, _ROOT, os.fsencode(os.path.realpath(named)))
    return losses


def must_be_backup(directory: str, named: str) -> None:
    """Raise UsageError unless *directory* is a backup of the root that the user gave as *named*."""
    with ExitStack() as stack:
        _open(directory, named, stack)


def _open(directory: str, named: str, stack: ExitStack) -> tuple[list[bytes], int]:
    """Return which paths were absent, and a descriptor of the tree in the backup."""
    try:
        top = os.open(directory, _DIRECTORY)
        stack.callback(os.close, top)
        absent = _read(top, _ABSENT).split(b"\0")[:-1]
        of = os.fsdecode(_read(top, _ROOT))
        tree = os.open(_TREE, _DIRECTORY, dir_fd=top)
        stack.callback(os.close, tree)
    except OSError as error:
        hint = "give a directory that cowfs apply --backup created"
        raise UsageError(f"{directory}: cannot be read: {error.strerror}", hint) from None
    if of != os.path.realpath(named):
        raise UsageError(f"{directory}: is a backup of {of}, not of {named}", f"give {of}")
    return absent, tree


def restore(
    directory: str, root: Root, named: str, tick: Tick, withheld: Withheld
) -> tuple[list[bytes], Losses]:
    """Restore in *root* what :func:`back_up` saved; a second call completes an interrupted one. Blocks.

    Return the directories that stay because something new is in them, and what could not be restored.
    UsageError as :func:`must_be_backup`.
    """
    losses = Losses()
    with ExitStack() as stack:
        absent, fd = _open(directory, named, stack)
        tree = _tree_of(os.dup(fd), directory, stack)
        stay = [path for path in reversed(_in_order(absent)) if not _removed(root, path, tick)]
        items = dict(sorted(everything(tree), key=_key))
        Apply(root, _All(), losses, tick).run(items, tree, withheld)  # last: it sets the times of directories
    return stay, losses


def _tree_of(fd: int, name: str, stack: ExitStack) -> Tree:
    layer = DirectoryLayer(fd, name)
    stack.callback(layer.close)
    return Merged(Stack([layer], XattrFormat(TRUSTED)))


def _in_order(paths: Iterable[bytes]) -> list[bytes]:
    return sorted(paths, key=lambda path: path.replace(b"/", b"\0"))


def _key(item: tuple[bytes, Item]) -> bytes:
    return item[0].replace(b"/", b"\0")


def _removed(root: Root, path: bytes, tick: Tick) -> bool:
    """Remove a path; return False if it is a directory that is not empty."""
    tick(path, 0)
    try:
        parent, name = root.place(path)
        root.forget(path)
        there = root.stat_in(parent, name)
        if there is not None:
            _remove(parent, name)
    except OSError as error:
        if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
            return False
        if error.errno not in _NOT_THERE:
            raise OSError(error.errno, error.strerror, b"/" + path) from None
    return True


def _remove(parent: int, name: bytes) -> None:
    with suppress(IsADirectoryError):
        os.unlink(name, dir_fd=parent)
        return
    os.rmdir(name, dir_fd=parent)


def _write(directory: int, name: bytes, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(name, flags, 0o600, dir_fd=directory), "wb") as file:
        file.write(data)


def _read(directory: int, name: bytes) -> bytes:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(name, flags, dir_fd=directory), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a file", name)
        text = file.read(_LARGEST + 1)
    if len(text) > _LARGEST:
        raise os_error(errno.EFBIG, name)
    return text
