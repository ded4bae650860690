"""Lookup: from a name to the stack of inodes that it shows (the kernel's namei.c)."""

from __future__ import annotations

import errno
import stat
from contextlib import suppress

from cowfs.errors import os_error
from cowfs.layers.base import Key
from cowfs.overlay import partial
from cowfs.overlay.fs import OverlayFs
from cowfs.overlay.node import Node, in_number
from cowfs.overlay.stack import Hit, Place
from cowfs.overlay.xattr_format import (
    NAME_MAX,
    Notes,
    index_name,
    parse_count,
    parse_nlink,
    parse_origin,
)
from cowfs.types import Attr


def lookup(fs: OverlayFs, parent: Node, name: bytes) -> tuple[Node, Attr] | None:
    """Find *name* in a directory; None when the merged tree has no such name."""
    if parent.children is None:
        raise os_error(errno.ENOTDIR, parent.name)
    node = fs.nodes.child(parent, name)
    if node is not None:
        try:
            return node, fs.stat(node)
        except OSError as failure:
            if failure.errno != errno.ESTALE or node.upper is not None:
                raise
            fs.nodes.detach(parent, name)  # somebody replaced it in its lower
    if parent.dead:
        return None
    above = None
    if parent.upper is not None:
        above = fs.upper.lookup(parent.upper, name)
        if above is not None:
            if fs.is_whiteout(*above):
                return None
            return _from_upper(fs, parent, name, *above)
    if len(name) > NAME_MAX:
        raise os_error(errno.ENAMETOOLONG, name)
    lowers = parent.lowers
    if not lowers:
        return None
    found = fs.stack.find(lowers, name)
    return _from_lower(fs, parent, name, found) if found else None


def resolve(fs: OverlayFs, parent: Node, name: bytes) -> Node:
    """Like :func:`lookup`, but ENOENT when there is no such name."""
    node = fs.nodes.child(parent, name) if parent.children is not None else None
    if node is not None:
        return node
    found = lookup(fs, parent, name)
    if found is None:
        raise os_error(errno.ENOENT, name)
    return found[0]


def lower_has(fs: OverlayFs, parent: Node, name: bytes) -> bool:
    """Whether the name would show if the upper had nothing under it (ovl_lower_positive)."""
    return fs.stack.shows(parent.lowers, name)


def shown_below(fs: OverlayFs, parent: Node, name: bytes) -> Hit | None:
    """Return what the lowers alone show under a name: its topmost layer, key and attributes."""
    found = fs.stack.find(parent.lowers, name)
    return found[0] if found else None


def _from_upper(
    fs: OverlayFs, parent: Node, name: bytes, key: Key, attr: Attr, lower_nlink: int | None = None
) -> tuple[Node, Attr]:
    notes = fs.notes(fs.upper, key)
    if stat.S_ISDIR(attr.st_mode):
        return _upper_directory(fs, parent, name, key, attr, notes or {}), attr
    if notes is None:
        return _enter(fs, parent, name, key, (), fs.ino_of(0, fs.upper.dev, attr), attr)
    attr = fs.format.seen(notes, attr)
    lowers: tuple[Place, ...] = ()
    metacopy = fs.format.is_metacopy(notes, attr)
    note = partial.note_in(fs, notes) if metacopy else None
    redirect = None if not metacopy else fs.stack.redirect_of(notes) if note is None else note.path
    if metacopy:
        found = fs.stack.below(parent.lowers, name, redirect)
        if not found or not stat.S_ISREG(found[-1][2].st_mode):
            raise os_error(errno.EIO, name)  # no layer has its data: another lower than at copy-up
        if note is not None:
            partial.must_be_the_same(note, found[-1][2])
        lowers = tuple((layer, low) for layer, low, _ in found)
    value = notes.get(fs.format.origin, b"")
    ino = _ino_of_origin(fs, notes)
    node, attr = _enter(fs, parent, name, key, lowers, ino or fs.ino_of(0, fs.upper.dev, attr), attr)
    # An inode in the index has a name there too. In a bad image or an old store, others can have its origin.
    is_linked = lower_nlink is not None or attr.st_nlink > 1
    if node.indexed is None and is_linked and index_name(value) in fs.indexed:
        node.indexed = union_nlink(fs, notes, attr.st_nlink, lower_nlink)
    if metacopy and node.upper is key:
        node.metacopy = True
        node.redirect = redirect
        if note is not None:
            partial.enter(fs, node, note, attr)
        attr = fs.stat(node)  # last, because the lower may fail: the node is known from now on
    return node, attr


def _upper_directory(
    fs: OverlayFs, parent: Node, name: bytes, key: Key, attr: Attr, notes: dict[bytes, bytes]
) -> Node:
    lowers: tuple[Place, ...] = ()
    redirect = None
    ino = None
    if not fs.format.is_opaque(notes):
        redirect = fs.stack.redirect_of(notes)
        if parent.lowers or redirect is not None:
            found = fs.stack.below(parent.lowers, name, redirect, directories=True)
            lowers = tuple((layer, low) for layer, low, _ in found)
            if any(hit[0] < fs.stack.bound for hit in found):
                ino = _number_of_directory(fs, found)
    if ino is None:
        ino = fs.ino_of(0, fs.upper.dev, attr)
    node, _ = _enter(fs, parent, name, key, lowers, ino, attr)
    node.redirect = redirect
    return node


def _from_lower(fs: OverlayFs, parent: Node, name: bytes, found: list[Hit]) -> tuple[Node, Attr]:
    layer, key, attr = found[0]
    if layer < 0:
        attr, ino = _seen_frozen(fs, found)
    else:
        ino = fs.ino_of(layer + 1, fs.lowers[layer].dev, attr)
    if attr.st_nlink > 1 and fs.indexed and not stat.S_ISDIR(attr.st_mode):
        index = _unknown_in_index(fs, ino, (layer, key), attr)
        if index is not None:
            if stat.S_IFMT(index[1].st_mode) != stat.S_IFMT(attr.st_mode):
                raise os_error(errno.EIO, name)  # a forged index (ovl_lookup_index)
            return _from_upper(fs, parent, name, *index, attr.st_nlink)
    is_new = fs.nodes.get(ino) is None and ino not in fs.displaced
    if len(found) == 1 and not stat.S_ISDIR(attr.st_mode) and is_new:
        number = in_number(layer, key)
        if number is not None:
            node = Node(ino, attr.st_mode, parent, name, None, number, fs.generation_of(ino, attr))
            fs.nodes.add(node)
            return node, attr
    node, attr = _enter(fs, parent, name, None, tuple((i, low) for i, low, _ in found), ino, attr)
    if len(found) > 1 and not node.is_dir:
        attr = fs.stat(node)  # the layer below says how much data there is
    return node, attr


def _unknown_in_index(fs: OverlayFs, ino: int, place: Place, attr: Attr) -> tuple[Key, Attr] | None:
    """Return what the index has for a hard link of a lower, unless its node is known by its number."""
    layer, key = place
    known = fs.nodes.get(ino)
    if known is not None and (layer >= 0 or known.dead or _same(fs, known, None, (place,), attr)):
        return None
    # A known node may have the number of an inode whose layer was removed, and which this one succeeds.
    return fs.find_in_index(fs.lowers[layer].handle(key))


def _seen_frozen(fs: OverlayFs, found: list[Hit]) -> tuple[Attr, int]:
    """Return the attributes and the number of an inode in a frozen upper: the number is what it was there."""
    layer, key, attr = found[0]
    if stat.S_ISDIR(attr.st_mode):
        return attr, _number_of_directory(fs, found)
    own = fs.ino_of(0, fs.upper.dev, attr)
    notes = fs.notes(fs.lowers[layer], key)
    if notes is None:
        return attr, own
    return fs.format.seen(notes, attr), _ino_of_origin(fs, notes) or own


def number_of(fs: OverlayFs, hit: Hit) -> int:
    """Return the union's number for an inode of a lower that is not a directory."""
    layer, _, attr = hit
    return _seen_frozen(fs, [hit])[1] if layer < 0 else fs.ino_of(layer + 1, fs.lowers[layer].dev, attr)


def _number_of_directory(fs: OverlayFs, found: list[Hit]) -> int:
    """Return the number of a directory in the lowers.

    It does not change when another upper is frozen, or when modules are added or removed.
    """
    kept = [hit for hit in found if hit[0] < fs.stack.bound] or found[:1]
    layer, _, attr = next((hit for hit in kept if hit[0] >= 0), kept[-1])
    return fs.ino_of(layer + 1, fs.lowers[layer].dev, attr)


def union_nlink(fs: OverlayFs, notes: dict[bytes, bytes], upper_nlink: int, lower_nlink: int | None) -> int:
    """Return how many names an indexed hard link has in the union.

    The note is relative to the upper's nlink (``U+n``) or to the lower's (``L+n``), whichever the operation
    that wrote it did not change (ovl_get_nlink()). Without a note, the count is the upper's less the name in
    the index.
    """
    kept = parse_count(notes.get(fs.format.links, b""))
    lower = lower_nlink if kept is None else kept
    base, difference = parse_nlink(notes.get(fs.format.nlink, b"")) or (b"U", -1)
    if base == b"L" and lower is None:
        base, difference = b"U", -1
    return max((upper_nlink if base == b"U" else lower or 0) + difference, 1)


def _ino_of_origin(fs: OverlayFs, notes: Notes) -> int | None:
    """Return the union's number for the lower inode that an origin names, if a layer has it.

    Images have no UUID to tell them apart, so a note says which of several it is. An inode that was copied up
    more than once, because its upper was frozen meanwhile, keeps its first number.
    """
    value = notes.get(fs.format.first) or notes.get(fs.format.origin, b"")
    handle = parse_origin(value) if value else None
    if handle is None:
        return None
    first = parse_count(notes.get(fs.format.layer, b"")) or 0
    for index in [first, *range(len(fs.lowers))]:
        if index >= len(fs.lowers):
            continue
        layer = fs.lowers[index]
        real = layer.handle_ino(handle)
        if real is not None:
            return fs.ino_of_real(index + 1, layer.dev, real)
    real = fs.upper.handle_ino(handle) if fs.format.first in notes else None
    return None if real is None else fs.ino_of_real(0, fs.upper.dev, real)


def _enter(
    fs: OverlayFs,
    parent: Node,
    name: bytes,
    upper: Key | None,
    lowers: tuple[Place, ...],
    ino: int,
    attr: Attr,
) -> tuple[Node, Attr]:
    """Return the node for the inode that was found: a known one if it is another name of that inode."""
    wanted = ino
    known = fs.nodes.get(ino)
    if known is not None and known in fs.covered:  # it keeps its number as long as it is in use
        ino = fs.strange_ino(-3, attr.st_dev, attr.st_ino)
        known = fs.nodes.get(ino)
    if known is not None and known.dead and upper is not None and _is_back(known, attr):
        known.dead = False
        return _another_name(fs, known, parent, name, upper, lowers, attr)
    # Of those displaced, another inode had the number when another name was looked up.
    for other in (known, *fs.displaced_from(wanted)):
        if other is not None and not other.dead and _same(fs, other, upper, lowers, attr):
            return _another_name(fs, other, parent, name, upper, lowers, attr)
    if known is not None and not known.dead:
        # Two uppers of one origin: hard links that an overlay without an index broke.
        ino = (
            fs.ino_of(0, fs.upper.dev, attr)
            if upper is not None
            else fs.strange_ino(-1, attr.st_dev, attr.st_ino)
        )
        known = fs.nodes.get(ino)
        if known is not None and not known.dead:
            if _is_itself(fs, known, attr):
                return _another_name(fs, known, parent, name, upper, lowers, attr)
            # The other has the number of an inode whose layer was removed since, and another successor.
            ino = fs.strange_ino(-2, attr.st_dev, attr.st_ino)
            known = fs.nodes.get(ino)
            if known is not None and not known.dead:
                return _another_name(fs, known, parent, name, upper, lowers, attr)
    if ino != wanted:
        fs.displaced.setdefault(wanted, set()).add(ino)
    node = Node(ino, attr.st_mode, parent, name, upper, lowers, fs.generation_of(ino, attr))
    fs.nodes.add(node)
    return node, attr


def _is_back(known: Node, attr: Attr) -> bool:
    """Whether an open file that had lost its last name has one again, because a revert was undone.

    Another node, with another generation, would make calls with its descriptors fail (EIO).
    """
    if known.is_dir or known.upper is None or stat.S_IFMT(known.mode) != stat.S_IFMT(attr.st_mode):
        return False
    for handle in known.handles or ():  # its number cannot be that of a new file
        with suppress(OSError):
            there = handle.file.stat()
            return (there.st_dev, there.st_ino) == (attr.st_dev, attr.st_ino)
    return False


def _same(fs: OverlayFs, known: Node, upper: Key | None, lowers: tuple[Place, ...], attr: Attr) -> bool:
    if known.is_dir or stat.S_IFMT(known.mode) != stat.S_IFMT(attr.st_mode):
        return False
    frozen = upper is None and bool(lowers) and lowers[0][0] < 0
    if known.upper is None:
        is_frozen = frozen or (bool(known.lowers) and known.lowers[0][0] < 0)
        return upper is None and (not is_frozen or _is_itself(fs, known, attr))
    if frozen:
        handle = fs.lowers[lowers[0][0]].handle(lowers[0][1]) if attr.st_nlink > 1 else None
        found = None if handle is None else fs.find_in_index(handle)
        return found is not None and found[1].st_ino == fs.upper.stat(known.upper).st_ino
    if upper is None:
        # Another name of it: a hard link, whatever an origin says.
        layer, key = lowers[0]
        handle = fs.lowers[layer].handle(key) if attr.st_nlink > 1 else None
        return attr.st_nlink > 1 and (handle is None or fs.came_from(known.upper, handle.place))
    return fs.upper.stat(known.upper).st_ino == attr.st_ino


def _is_itself(fs: OverlayFs, known: Node, attr: Attr) -> bool:
    seen = fs.stat(known)
    return (seen.st_dev, seen.st_ino) == (attr.st_dev, attr.st_ino)


def _another_name(
    fs: OverlayFs,
    node: Node,
    parent: Node,
    name: bytes,
    upper: Key | None,
    lowers: tuple[Place, ...],
    attr: Attr,
) -> tuple[Node, Attr]:
    if node.is_dir:
        _must_not_be_above(node, parent, name)
    if upper is not None and node.upper is not None:
        # The new key's name exists; the old key's may be removed.
        fs.upper.forget(node.upper)
        node.upper = upper
    if node.upper is None and lowers and not node.is_dir and node.copying is None:
        node.lowers, lowers = lowers, node.lowers  # likewise
    for layer, key in lowers:
        if node.lowers and (layer, key) not in node.lowers:
            fs.lowers[layer].forget(key)
    fs.nodes.rename(node, parent, name)
    return node, attr if node.upper is None or upper is not None else fs.stat(node)


def _must_not_be_above(node: Node, parent: Node, name: bytes) -> None:
    """EUCLEAN if a known directory is found below itself, so every path upward ends at the root.

    The cause is a damaged layer, or one that somebody changes.
    """
    walk: Node | None = parent
    while walk is not None:
        if walk is node:
            raise os_error(errno.EUCLEAN, name)
        walk = walk.parent


def find_below(fs: OverlayFs, path: tuple[bytes, ...]) -> Hit | None:
    """Return the file with the data that the lowers have at a path from their root.

    None if it is not a file.
    """
    found = fs.stack.search(fs.stack.kept, path)
    return found[-1] if found and stat.S_ISREG(found[-1][2].st_mode) else None
