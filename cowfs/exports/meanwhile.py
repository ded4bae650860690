"""Find what other programs have changed in a directory since a commit to it was staged and interrupted.

If no program has changed a path, it has its old or its new state. The old one is recognised by its
attributes, because its content is not recorded; the new one by its content.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import closing

from cowfs.changes.paths import join
from cowfs.changes.version import Node, Tree
from cowfs.exports.apply import MOUNTED, is_replaced
from cowfs.exports.apply_root import Root, is_ours
from cowfs.exports.conflicts import is_same, pieces
from cowfs.layers import beneath
from cowfs.layers.kernel_file import KernelFile

Facts = tuple[int, int, int, int, int]
"""Mode, size, mtime and ctime in ns, and number of links."""
_ANY = -1
"""The ctime of what the commit itself may rename."""


def facts_of(before: Tree, top: bytes, *, stays: bool) -> Iterator[tuple[bytes, Facts]]:
    """Yield the facts of *top*, if it exists, and of all below a directory unless it *stays*.

    Blocks; OSError.
    """
    waiting = [top]
    while waiting:
        path = waiting.pop()
        node = before.node(path)
        if node is None:
            continue
        attr = node.attr
        yield path, (attr.st_mode, attr.st_size, attr.st_mtime_ns, attr.st_ctime_ns, attr.st_nlink)
        if node.is_dir and not stays:
            waiting += [join(path, name) for name in before.names(path)]


def renamed(before: Tree, path: bytes) -> Iterator[tuple[bytes, Facts]]:
    """Yield the facts of *path* as they stay if it is renamed, which changes the ctime. Blocks; OSError."""
    for each, (mode, size, mtime, _, nlink) in facts_of(before, path, stays=True):
        yield each, (mode, size, mtime, _ANY, nlink)


def changed(root: Root, top: bytes, was: dict[bytes, Facts], to_be: Node | None) -> Iterator[bytes]:
    """Yield *top*, and each path below a directory to be removed, whose state is neither old nor new.

    Blocks; OSError.
    """
    waiting = [top]
    while waiting:
        path = waiting.pop()
        try:
            fd = root.open(path)
        except OSError as error:
            if error.errno in MOUNTED:
                continue  # the commit does not remove it
            raise
        if fd is None:
            continue
        try:
            info, wanted = os.fstat(fd), to_be if path == top else None
            if wanted is not None and wanted.is_dir and stat.S_ISDIR(info.st_mode):
                continue
            if not _is_old(info, was.get(path)):
                if wanted is not None and is_same(fd, info, wanted):
                    continue
                if (
                    wanted is None
                    or is_replaced(fd, info, root.place(path)[0])
                    or not _is_torn(fd, info, wanted)
                ):
                    yield path
            elif stat.S_ISDIR(info.st_mode):
                names = (entry.name for entry in beneath.entries(root.directory(path)))
                waiting += [join(path, name) for name in names if not is_ours(name)]
        finally:
            os.close(fd)


def _is_old(info: os.stat_result, was: Facts | None) -> bool:
    if was is None or stat.S_IFMT(info.st_mode) != stat.S_IFMT(was[0]):
        return False
    if stat.S_ISDIR(info.st_mode) or info.st_ctime_ns == was[3]:
        return True
    # The commit may have renamed it, or replaced another of its names, which changes its ctime.
    may_differ = was[3] == _ANY or info.st_nlink < was[4]
    return may_differ and (info.st_mode, info.st_size, info.st_mtime_ns) == was[:3]


def _is_torn(fd: int, info: os.stat_result, node: Node) -> bool:
    """Whether a write in place was interrupted: then zeros replace the missing part of the new content."""
    if not (stat.S_ISREG(info.st_mode) and stat.S_ISREG(node.attr.st_mode)):
        return False
    if info.st_size not in {0, node.attr.st_size}:
        return False
    with closing(KernelFile(beneath.reopen(fd, os.O_RDONLY))) as there, closing(node.open()) as file:
        for position, size in pieces(there, file, info.st_size):
            has, wants = there.pread(size, position), file.pread(size, position)
            if has != wants and any(one not in {0, other} for one, other in zip(has, wants, strict=True)):
                return False
    return True
