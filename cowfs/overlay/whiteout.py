"""Whiteouts: marks in the upper that a lower name is deleted.

A whiteout is a character device 0:0. If the filesystem allows, all whiteouts are links to one inode, so that
deleting many files uses names, not inodes.
"""

from __future__ import annotations

import errno
import stat
from contextlib import closing, suppress
from itertools import islice

from cowfs.layers.base import Key
from cowfs.linux import files
from cowfs.overlay.fs import OverlayFs, Rubbish, Steps, done_at_once
from cowfs.overlay.node import Node
from cowfs.overlay.work import made_aside

_NAME = b"#whiteout"
_NO_LINK = {errno.EMLINK, errno.EPERM, errno.ENOENT, errno.EOPNOTSUPP}


def make(fs: OverlayFs, directory: Key, name: bytes) -> None:
    """Create a whiteout at a name that the upper does not have."""
    shared = fs.shared_whiteout
    if shared is not None:
        try:
            fs.upper.link(shared, directory, name)
            return
        except OSError as failure:
            if failure.errno not in _NO_LINK:
                raise
            fs.upper.forget(shared)
            fs.shared_whiteout = None
            with suppress(OSError):
                fs.upper.unlink(fs.work, _NAME, None)
    fs.upper.forget(_mknod(fs, directory, name))
    with suppress(OSError):
        fs.upper.link(_key_of(fs, directory, name), fs.work, _NAME)
        found = fs.upper.lookup(fs.work, _NAME)
        fs.shared_whiteout = found[0] if found else None


def _mknod(fs: OverlayFs, directory: Key, name: bytes) -> Key:
    return fs.upper.mknod(directory, name, stat.S_IFCHR, 0, 0, 0)


def _key_of(fs: OverlayFs, directory: Key, name: bytes) -> Key:
    found = fs.upper.lookup(directory, name)
    assert found is not None
    return found[0]


def replace(fs: OverlayFs, parent: Node, name: bytes, node: Node) -> None:
    """Replace the upper's entry under a name by a whiteout, in one step.

    *node* is the entry's node. A directory must contain only whiteouts.
    """
    flags = files.RENAME_EXCHANGE if node.is_dir else 0
    with made_aside(fs) as temporary:
        make(fs, fs.work, temporary)
        fs.upper.rename((fs.work, temporary), (parent.upper, name), flags, replaced=node.upper)
    if node.is_dir:
        throw_away(fs, temporary, node)


_AT_ONCE = 200
"""How many whiteouts are removed at once; with more, others have a turn."""


def throw_away(fs: OverlayFs, name: bytes, node: Node | None) -> None:
    """Remove, now or soon, a directory in the work directory that contains only whiteouts.

    *node* is its former node, if still in use. The next mount removes what is left.
    """
    fs.rubbish.append(Rubbish(name, node))
    if fs.host.sweep_soon is None:
        done_at_once(sweep(fs))
    elif len(fs.rubbish) == 1:
        steps = sweep(fs)
        with closing(steps):
            if all(step is None for step in islice(steps, _AT_ONCE)) and not fs.rubbish:
                return
        fs.host.sweep_soon()


def sweep(fs: OverlayFs) -> Steps[None]:
    """Remove the directories that were thrown away. Only one caller at a time."""
    while fs.rubbish:
        rubbish = fs.rubbish[0]
        with suppress(OSError):
            yield from _clear(fs, rubbish)
        fs.rubbish.remove(rubbish)


def _clear(fs: OverlayFs, rubbish: Rubbish) -> Steps[None]:
    found = fs.upper.lookup(fs.work, rubbish.name)
    if found is None:
        return
    key = found[0]
    try:
        names = fs.upper.names(key)
        for name in (yield names) if callable(names) else names:
            yield None
            with suppress(FileNotFoundError):
                fs.upper.unlink(key, name, None)
    finally:
        fs.upper.forget(key)
    node = rubbish.node
    in_use = node is not None and fs.nodes.get(node.ino) is node
    fs.upper.rmdir(fs.work, rubbish.name, node.upper if in_use and node is not None else None)
