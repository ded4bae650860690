"""Modules: lowers that are added and removed while the union is in use, above its other lowers (ADR 0061).

Nothing in the upper depends on a module. A changed file of a module is copied up whole, without an origin;
its directories cannot be renamed (EXDEV); and no redirect or metacopy of the upper leads into a module
(:class:`~cowfs.overlay.stack.Stack`). So the upper is valid with any modules, and with none.

After adding or removing one, each name shows what it would show if the union were made anew from the layers
that there are now. A node that still shows the same inode stays. A node that is covered, or was in the
removed module, loses its name as if it were removed, and those who have it open can still use it. A covered
node gets its name back when the cover is removed.
"""

from __future__ import annotations

import errno
import stat
from contextlib import suppress

from cowfs.errors import os_error
from cowfs.layers.base import LowerLayer
from cowfs.overlay.dir import rekey
from cowfs.overlay.fs import OverlayFs
from cowfs.overlay.node import Node
from cowfs.overlay.stack import Hit, Place
from cowfs.overlay.uncover import Stale

MOST = 64
"""How many there may be at a time, counting removed ones that are still in use."""


def add(fs: OverlayFs, layer: LowerLayer) -> tuple[int, Stale]:
    """Add a module on top of the others; return its number, and what the kernel must look up again.

    Call it while no file is being copied up. EMFILE if there are too many modules.
    """
    number = _free_number(fs)
    place = number - fs.stack.bound
    fs.modules[place : place + 1] = [layer]
    fs.loaded = (number, *fs.loaded)
    return number, _apply_layers(fs)


def remove(fs: OverlayFs, number: int) -> Stale:
    """Remove a module from the union; return what the kernel must look up again.

    The module is closed when nothing of it is in use, perhaps at once.
    """
    fs.loaded = tuple(other for other in fs.loaded if other != number)
    stale = _apply_layers(fs)
    used: set[Node] = set()
    for node in fs.nodes.all():
        if any(layer == number for layer, _ in node.lowers):
            if node.upper is not None and not node.is_dir:  # copied up since
                node.lowers = ()
            else:
                used.add(node)
    if used:
        fs.left[number] = used
    else:
        fs.close_module(number)
    return stale


def _free_number(fs: OverlayFs) -> int:
    """Return a number that no module uses, counting removed modules whose inodes are still in use."""
    first = fs.stack.bound
    for number in range(first, first + MOST):
        if number not in fs.loaded and number not in fs.left:
            return number
    raise os_error(errno.EMFILE)


def _apply_layers(fs: OverlayFs) -> Stale:
    """Apply the current list of layers to all nodes; return what the kernel must look up again."""
    stale: Stale = []
    fs.lay(fs.base, fs.frozen)
    fs.below.clear()
    before, fs.root.lowers = fs.root.lowers, fs.stack.roots
    _below(fs, fs.root, _changed(before, fs.root.lowers), stale)
    _bring_back(fs, stale)
    return stale


def _changed(before: tuple[Place, ...], after: tuple[Place, ...]) -> list[Place]:
    """Return the places that a directory gained or lost: at most one in each layer."""
    had, has = dict(before), dict(after)
    return [place for place in (*before, *after) if not (place[0] in had and place[0] in has)]


def _below(fs: OverlayFs, root: Node, changed: list[Place], stale: Stale) -> None:
    """Look up again everything known below *root*, in directories whose layers have changed."""
    waiting = [(root, changed)]
    while waiting:
        directory, changed = waiting.pop()
        assert directory.children is not None
        directory.added += 1
        directory.protection = None
        stale.append((directory.ino, None))
        unknown: set[bytes] = set()
        for layer, key in changed:
            names = fs.lowers[layer].names(key)
            unknown.update(names() if callable(names) else names)
        for name in list(directory.children):
            child = fs.nodes.child(directory, name)
            if child is None:
                continue
            unknown.discard(name)
            inside = _look_again(fs, directory, name, child, stale)
            if inside:
                waiting.append((child, inside))
        stale += [(directory.ino, name) for name in unknown]
        for layer, key in changed:
            if directory is not root and (layer, key) not in directory.lowers:
                fs.lowers[layer].forget(key)


def _look_again(fs: OverlayFs, directory: Node, name: bytes, child: Node, stale: Stale) -> list[Place]:
    """Update *child* to what its name shows now, or remove its name; return its changed places."""
    found = _found(fs, directory, name, child)
    if found is None:
        _remove_known(fs, directory, name, child)
        stale.append((directory.ino, name))
        return []
    if not child.is_dir:
        fs.stack.forget(found)
        return []
    before, child.lowers = child.lowers, _merged(fs, child.lowers, found)
    if child.upper is None:
        child.mode = fs.stat(child).st_mode
    return _changed(before, child.lowers)


def _found(fs: OverlayFs, directory: Node, name: bytes, child: Node) -> list[Hit] | None:
    """Return what the lowers show under a name, if that is the same inode as *child*; else None."""
    if child.upper is not None and not _is_alias(fs, directory, name, child):
        if not child.is_dir:
            return []
        if fs.format.is_opaque(fs.notes(fs.upper, child.upper) or {}):
            return []
        return fs.stack.below(directory.lowers, name, child.redirect, directories=True)
    try:
        found = fs.stack.find(directory.lowers, name)
    except OSError:
        return None
    if found and _is_shown(fs, found, child):
        return found
    fs.stack.forget(found)
    return None


def _is_alias(fs: OverlayFs, directory: Node, name: bytes, child: Node) -> bool:
    """Whether this name of an indexed hard link is missing in the upper."""
    if child.indexed is None:
        return False
    found = fs.upper.lookup(directory.upper, name) if directory.upper is not None else None
    if found is not None:
        fs.upper.forget(found[0])
    return found is None


def _is_shown(fs: OverlayFs, found: list[Hit], child: Node) -> bool:
    """Whether *found* is what a node shows: for a directory any of its inodes, else the same inode."""
    if stat.S_IFMT(found[0][2].st_mode) != stat.S_IFMT(child.mode):
        return False
    if child.indexed is not None:
        return found[0][0] < fs.stack.bound
    for layer, _, attr in found if child.is_dir else found[:1]:
        for known, key in child.lowers if child.is_dir else child.lowers[:1]:
            if known == layer and fs.lowers[known].stat(key).st_ino == attr.st_ino:
                return True
    return False


def _merged(fs: OverlayFs, before: tuple[Place, ...], found: list[Hit]) -> tuple[Place, ...]:
    """Return the places that were found, with the known keys where there are any."""
    known = dict(before)
    places = []
    for layer, key, _ in found:
        if layer in known and known[layer] is not key:
            fs.lowers[layer].forget(key)
        places.append((layer, known.get(layer, key)))
    return tuple(places)


def _remove_known(fs: OverlayFs, directory: Node, name: bytes, node: Node) -> None:
    """Remove a node's name, and everything known below it."""
    waiting = [(directory, name, node)]
    lost: list[Node] = []
    while waiting:
        parent, name, node = waiting.pop()
        fs.nodes.detach(parent, name)
        lost.append(node)
        if node.children is not None:
            waiting += [(node, name, child) for name, child in node.children.items()]
        elif node.upper is not None:  # a hard link, which has other names
            rekey(fs, node)
    for node in lost:
        if node.upper is None and fs.nodes.place(node) is None:
            node.dead = True
            layer = node.lowers[0][0]
            if layer < fs.stack.bound or layer in fs.loaded:
                fs.covered[node] = None
    for node in reversed(lost):
        fs.release(node)


def _bring_back(fs: OverlayFs, stale: Stale) -> None:
    """Give nodes their names back that are no longer covered."""
    for node in list(fs.covered):
        parent, name = node.parent, node.name
        if fs.nodes.get(node.ino) is not node:
            del fs.covered[node]
        elif node.upper is None and parent is not None and not parent.dead and parent.children is not None:
            if fs.nodes.child(parent, name) is not None:
                continue
            above = fs.upper.lookup(parent.upper, name) if parent.upper is not None else None
            if above is not None:
                fs.upper.forget(above[0])
                continue
            found: list[Hit] = []
            with suppress(OSError):
                found = fs.stack.find(parent.lowers, name)
            if found and _is_shown(fs, found, node):
                node.lowers = _merged(fs, node.lowers, found)
                node.dead = False
                del fs.covered[node]
                fs.nodes.rename(node, parent, name)
                stale.append((parent.ino, name))
            else:
                fs.stack.forget(found)


# --- places that have a mount on them


def would_cover(fs: OverlayFs, layer: LowerLayer, path: bytes) -> bool:
    """Whether adding a module on top would hide the directory or file at *path*."""
    key, node = layer.root, fs.root
    for name in path.split(b"/"):
        child = fs.nodes.child(node, name) if node.children is not None else None
        if child is None:
            return False
        found = layer.lookup(key, name)
        if found is None or child.redirect is not None:
            return False
        if not stat.S_ISDIR(found[1].st_mode) or not child.is_dir:
            return fs.stored(child) is None
        key, node = found[0], child
    return False


def would_lose(fs: OverlayFs, number: int, path: bytes) -> bool:
    """Whether *path* would not exist without the module."""
    node = fs.root
    for name in path.split(b"/"):
        child = fs.nodes.child(node, name) if node.children is not None else None
        if child is None:
            return False
        if child.upper is None and all(layer == number for layer, _ in child.lowers):
            return True
        node = child
    return False
