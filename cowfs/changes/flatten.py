"""Flatten an upper: remove its redirects and metacopies, and the index of hard links.

Everything that they refer to in the lowers is copied into the upper. If this is interrupted, the store still
shows the same tree.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

from cowfs.layers.base import Key
from cowfs.overlay.copyup import copy_up, copy_up_directory, link_alias
from cowfs.overlay.freeze import give_up_index
from cowfs.overlay.fs import OverlayFs
from cowfs.overlay.lookup import lookup
from cowfs.overlay.node import Node
from cowfs.overlay.readdir import listing
from cowfs.overlay.xattr_format import OPAQUE


class _Level(NamedTuple):
    """A directory on the way down."""

    node: Node
    is_whole: bool
    """Whether to copy everything in it: the lowers have it at another path."""
    names: Iterator[bytes]


def flatten(fs: OverlayFs, tick: Callable[[bytes], None]) -> int:
    """Flatten an upper. Return the number of redirects and metacopies that were removed. Blocks; OSError.

    Nobody else may use the union meanwhile. *tick* gets each name.
    """
    done = 0
    levels = [_enter(fs, fs.root, is_whole=False)]
    while levels:
        level = levels[-1]
        name = next(level.names, None)
        if name is None:
            levels.pop()
            done += _separate(fs, level.node)
            fs.forget(level.node, 1)
            continue
        found = lookup(fs, level.node, name)
        if found is None:
            continue
        tick(name)
        node = found[0]
        if node.is_dir:
            is_whole = level.is_whole or node.redirect is not None
            if is_whole:
                copy_up_directory(fs, node)
            levels.append(_enter(fs, node, is_whole=is_whole))
            continue
        if node.upper is None or node.metacopy:
            done += node.metacopy
            copy_up(fs, node)
        if level.is_whole and node.upper is not None:
            link_alias(fs, node, level.node, name)  # another name of it was copied up
        fs.release(node)
    give_up_index(fs)
    return done


def _enter(fs: OverlayFs, node: Node, *, is_whole: bool) -> _Level:
    node.lookups += 1
    if is_whole:
        names = listing(fs, node)
        shown = [name for _, name in (names() if callable(names) else names).after(0)]
    else:
        shown = [] if node.upper is None else [entry.name for entry in fs.upper.readdir(node.upper)]
    return _Level(node, is_whole, iter(shown))


def _separate(fs: OverlayFs, node: Node) -> int:
    """Separate a renamed directory from the lowers, after everything in it was copied to the upper."""
    if node.redirect is None or node.upper is None:
        return 0
    fs.note(node.upper, fs.format.opaque, OPAQUE)
    with suppress(OSError):
        fs.upper.removexattr(node.upper, fs.format.redirect)
    node.redirect, node.lowers = None, ()
    _drop_whiteouts(fs, node.upper)
    return 1


def _drop_whiteouts(fs: OverlayFs, top: Key) -> None:
    """Remove the whiteouts below an opaque directory, where they hide nothing."""
    waiting = [top]
    while waiting:
        directory = waiting.pop()
        before = fs.upper.stat(directory)
        for entry in fs.upper.readdir(directory):
            found = fs.upper.lookup(directory, entry.name)
            if found is None:
                continue
            key, attr = found
            if stat.S_ISDIR(attr.st_mode):
                waiting.append(key)
            elif fs.is_whiteout(key, attr):
                fs.upper.unlink(directory, entry.name, None)
        fs.upper.utimens(directory, before.st_atime_ns, before.st_mtime_ns)
