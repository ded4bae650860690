"""Exchange the upper: the old one becomes the topmost lower, or is dropped to show what is below it.

Freezing changes no inode. A node that was in the upper is then in a lower, and the next change copies it up
again. It keeps its number and its open files.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Sequence

from cowfs.errors import os_error
from cowfs.layers.base import Key, LowerLayer
from cowfs.overlay.copyup import link_alias
from cowfs.overlay.dir import rekey
from cowfs.overlay.find import walk
from cowfs.overlay.fs import OverlayFs, Steps, done_at_once
from cowfs.overlay.lookup import union_nlink
from cowfs.overlay.node import Node
from cowfs.overlay.uncover import Stale


def link_all(fs: OverlayFs) -> Steps[None]:
    """Give the hard links in the index all their names in the upper, because a lower has no index."""
    if are_hidden(fs):
        yield from walk(fs, lambda directory, name, node: _link(fs, directory, name, node))


def give_up_index(fs: OverlayFs) -> None:
    """Give the hard links all their names in the upper, and remove them from the index. Blocks."""
    done_at_once(link_all(fs))
    for name in list(fs.indexed):
        place = fs.index_of(name)
        found = None if place is None else fs.upper.lookup(place, name)
        if found is not None:
            fs.upper.unlink(place, name, None)
        fs.indexed.discard(name)


def are_hidden(fs: OverlayFs) -> bool:
    """Whether a hard link in the index shows under a name that the upper does not have."""
    for name in fs.indexed:
        place = fs.index_of(name)
        found = None if place is None else fs.upper.lookup(place, name)
        if found is None or stat.S_ISDIR(found[1].st_mode):
            continue
        key, attr = found
        if union_nlink(fs, fs.notes(fs.upper, key) or {}, attr.st_nlink, None) >= attr.st_nlink:
            return True
    return False


def _link(fs: OverlayFs, directory: Node, name: bytes, node: Node) -> bool:
    if fs.union_of(node) is not fs:
        return False
    if node.indexed is not None and node.upper is not None:
        link_alias(fs, node, directory, name)
    return True


def unindex(fs: OverlayFs) -> None:
    """Give each node whose key is its name in the index another key."""
    for node in fs.own_nodes():
        if node.indexed is not None:
            rekey(fs, node)


def must_be_still(fs: OverlayFs, *, with_pending: bool) -> None:
    """EBUSY while a file's data is being copied up, or a thread changes it; the caller retries soon.

    Also EBUSY while a file is partial, unless *with_pending*.
    """
    for node in fs.own_nodes():
        if node.copying is not None or (node.handles is not None and not fs.host.end_writes(node)):
            raise os_error(errno.EBUSY, node.name)
    if not fs.host.is_still() or (fs.pending and not with_pending):
        raise os_error(errno.EBUSY, b"")


def freeze(fs: OverlayFs, new_upper: Key, frozen: LowerLayer) -> None:
    """Continue with the empty upper at *new_upper*, above *frozen*, which was the upper until now.

    Before the call, change the layers, empty the index, and let :func:`must_be_still` succeed.
    """
    fs.lay(fs.base, (frozen, *fs.frozen))
    number = -len(fs.frozen)
    for node in fs.own_nodes():
        if node is fs.root or node.dead or node.upper is None:
            continue
        key, node.upper = node.upper, None
        below = node.lowers if node.is_dir else node.lowers[-1:] if node.metacopy else ()
        node.lowers = ((number, key), *below)
        node.metacopy, node.redirect, node.partial, node.protection = False, None, None, None
        for handle in node.handles or ():
            handle.is_frozen = handle.writable
    _begin_anew(fs, new_upper)
    fs.root.lowers = fs.stack.roots


def go_back(fs: OverlayFs, new_upper: Key, frozen: Sequence[LowerLayer]) -> Stale:
    """Continue with the empty upper at *new_upper*, above *frozen*; return what the kernel must forget.

    Files of the old tree that are still in use are gone (ESTALE).
    """
    names = set(_names(fs))
    for node in list(fs.own_nodes()):
        if node is fs.root or node in fs.unnamed:
            continue
        node.dead = True
        node.others = None
        if node.children is not None:
            node.children.clear()
        if node.upper is None:
            node.lowers = ()
    fs.pending.clear()
    children = fs.root.children
    assert children is not None
    children.clear()
    fs.lay(fs.base, frozen)
    _begin_anew(fs, new_upper)
    fs.root.lowers = fs.stack.roots
    fs.host.rolled_back()
    for node in list(fs.own_nodes()):
        if node.dead:
            fs.release(node)
    names.update(_names(fs))
    return [(fs.root.ino, None), *((fs.root.ino, name) for name in names)]


def _names(fs: OverlayFs) -> set[bytes]:
    """Return the names that the root may have, whiteouts among them."""
    names = set(fs.root.children or ())
    places = [(fs.upper, fs.root.upper), *((fs.lowers[number], key) for number, key in fs.root.lowers)]
    for layer, key in places:
        names.update(entry.name for entry in layer.readdir(key))
    return names


def _begin_anew(fs: OverlayFs, new_upper: Key) -> None:
    """Move the root to another upper, which is empty and has an empty index."""
    fs.root.upper = new_upper
    fs.root.mode = fs.upper.stat(new_upper).st_mode
    fs.root.added += 1
    fs.root.protection = None
    fs.indexed.clear()
    if fs.companions is not None:
        fs.companions.clear()
    for node in fs.own_nodes():
        node.indexed = None
    fs.below.clear()
