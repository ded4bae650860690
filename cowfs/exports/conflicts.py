"""Find conflicts: paths where a directory has neither the old nor the new version of a change."""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import closing

from cowfs.changes.paths import join
from cowfs.changes.version import Node, Tree
from cowfs.errors import UsageError
from cowfs.exports.apply_root import NOT_THERE, Root, is_ours
from cowfs.exports.plan import Item, Plan, everything
from cowfs.layers import beneath
from cowfs.layers.base import File
from cowfs.layers.kernel_file import KernelFile
from cowfs.layers.partial import either

_PIECE = 1 << 20


def conflicts(items: Plan, root: Root, before: Tree, after: Tree) -> Iterator[tuple[bytes, str]]:
    """Yield each path where *root* has neither the lowers' version nor the new one, and what is wrong there.

    Blocks; OSError. UsageError if *root* is the lower itself, which would change while it is read.
    """
    for path, item in items.items():
        was = before.node(path)
        to_be = None if item is Item.WHITEOUT else after.node(path)
        yield from _conflict(path, root, was, to_be)
        if was is not None and was.is_dir and (to_be is None or not to_be.is_dir):
            yield from _in_removed(path, root, before)


def _conflict(path: bytes, root: Root, was: Node | None, to_be: Node | None) -> Iterator[tuple[bytes, str]]:
    fd = root.open(path)
    if fd is None:
        if was is not None and to_be is not None:
            yield path, "is missing"
        return
    try:
        info = os.fstat(fd)
        if was is not None and was.is_dir and stat.S_ISDIR(info.st_mode):
            if (info.st_dev, info.st_ino) == (was.attr.st_dev, was.attr.st_ino):
                raise UsageError(
                    f"{root.path}: is the lower itself, on which the changes are based",
                    "apply them to a copy of it",
                )
        if to_be is not None and is_same(fd, info, to_be):
            return
        why = _why(info.st_mode, was, lambda node: is_same(fd, info, node))
        if why:
            yield path, why
    finally:
        os.close(fd)


def _why(mode: int, was: Node | None, is_node: Callable[[Node], bool]) -> str:
    if was is None:
        return "exists, but did not in the lower"
    if stat.S_IFMT(mode) != stat.S_IFMT(was.attr.st_mode):
        return "has another type than in the lower"
    return "" if is_node(was) else "has other content than in the lower"


def _in_removed(top: bytes, root: Root, before: Tree) -> Iterator[tuple[bytes, str]]:
    """Yield the conflicts below a directory that will be removed."""
    waiting = [top]
    while waiting:
        path = waiting.pop()
        try:
            names = beneath.entries(root.directory(path))
        except OSError as error:
            if error.errno in NOT_THERE:
                continue
            raise
        for name in sorted(entry.name for entry in names):
            below = join(path, name)
            if is_ours(name):
                continue
            was = before.node(below)
            yield from _conflict(below, root, was, None)
            if was is not None and was.is_dir:
                waiting.append(below)


def conflicts_in_tree(items: Plan, there: Tree, before: Tree, after: Tree) -> Iterator[tuple[bytes, str]]:
    """The same for a tree that is only read: that of a store that is not mounted."""
    for path, item in items.items():
        was = before.node(path)
        to_be = None if item is Item.WHITEOUT else after.node(path)
        found = there.node(path)
        if found is None:
            if was is not None and to_be is not None:
                yield path, "is missing"
            continue
        if to_be is None or not _is_same_node(found, to_be):
            why = _why(found.attr.st_mode, was, functools.partial(_is_same_node, found))
            if why:
                yield path, why
        if was is None or not was.is_dir or (to_be is not None and to_be.is_dir):
            continue
        for below, _ in everything(there, path) if found.is_dir else ():
            node, was = there.node(below), before.node(below)
            if below == path or node is None:
                continue
            why = _why(node.attr.st_mode, was, functools.partial(_is_same_node, node))
            if why:
                yield below, why


def is_done(items: Plan, there: Tree, before: Tree, after: Tree) -> bool:
    """Whether the tree *there*, of a store that is not mounted, has the new version of everything already.

    Blocks; OSError.
    """
    names: dict[tuple[int, int, int], tuple[int, int, int]] = {}
    for path, item in items.items():
        found, to_be = there.node(path), after.node(path)
        if item is Item.WHITEOUT or found is None or to_be is None:
            if item is Item.WHITEOUT and found is None:
                continue
            return False
        was = before.node(path)
        if found.is_dir and was is not None and is_unchanged(was, to_be):
            continue  # it is there for what is in it
        if not has_attributes(found, to_be) or found.attr.st_mtime_ns != to_be.attr.st_mtime_ns:
            return False
        if names.setdefault(to_be.identity, found.identity) != found.identity:
            return False
        if not _is_same_node(found, to_be):
            return False
    return len(set(names.values())) == len(names)


def is_unchanged(was: Node | None, now: Node | None) -> bool:
    """Whether both are directories that have the same attributes and times, whatever is in them."""
    if was is None or now is None or not was.is_dir or was.attr.st_mtime_ns != now.attr.st_mtime_ns:
        return False
    return has_attributes(was, now)


def has_attributes(one: Node, other: Node) -> bool:
    """Whether two inodes have the same owner, mode and extended attributes."""
    mine, others = one.attr, other.attr
    same = (mine.st_mode, mine.st_uid, mine.st_gid) == (others.st_mode, others.st_uid, others.st_gid)
    return same and one.xattrs() == other.xattrs()


def _is_same_node(one: Node, other: Node) -> bool:
    mode = one.attr.st_mode
    if stat.S_IFMT(mode) != stat.S_IFMT(other.attr.st_mode):
        return False
    if stat.S_ISLNK(mode):
        return one.target() == other.target()
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        return one.attr.st_rdev == other.attr.st_rdev
    if not stat.S_ISREG(mode):
        return True
    if one.attr.st_size != other.attr.st_size:
        return False
    with closing(one.open()) as there, closing(other.open()) as file:
        return _has_content(there, file, one.attr.st_size)


def _has_content(there: File, file: File, size: int) -> bool:
    for position, length in pieces(there, file, size):
        if there.pread(length, position) != file.pread(length, position):
            return False
    return True


def pieces(there: File, file: File, size: int) -> Iterator[tuple[int, int]]:
    """Yield the place and length of each piece of two files that must be read to compare them.

    Where both have holes, they are equal: a user's file of some terabytes may hold nothing else.
    """
    for start, stop in either(there.segments(size), file.segments(size)):
        for position in range(start, stop, _PIECE):
            yield position, min(_PIECE, stop - position)


def is_same(fd: int, info: os.stat_result, node: Node) -> bool:
    """Whether type and content are equal. Other attributes cause no conflict."""
    mode = info.st_mode
    if stat.S_IFMT(mode) != stat.S_IFMT(node.attr.st_mode):
        return False
    if stat.S_ISLNK(mode):
        return beneath.readlink(fd) == node.target()
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        return info.st_rdev == node.attr.st_rdev
    if not stat.S_ISREG(mode):
        return True
    if info.st_size != node.attr.st_size:
        return False
    with closing(KernelFile(beneath.reopen(fd, os.O_RDONLY))) as there, closing(node.open()) as file:
        return _has_content(there, file, info.st_size)
