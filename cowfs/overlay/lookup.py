"""Lookup: from a name to the stack of inodes that it shows (the kernel's namei.c)."""

from __future__ import annotations

import errno
import re
import stat
from collections.abc import Sequence

from cowfs.layers.base import Key
from cowfs.overlay import origin, partial
from cowfs.overlay import redirect as redirects
from cowfs.overlay.node import Lower, Node
from cowfs.overlay.state import State, count_in, error, is_whiteout
from cowfs.types import Attr

_Found = list[tuple[int, Key, Attr]]


def lookup(fs: State, parent: Node, name: bytes) -> tuple[Node, Attr] | None:
    """Find *name* in a directory; None when the merged tree has no such name."""
    if parent.children is None:
        raise error(errno.ENOTDIR, parent.name)
    node = fs.nodes.child(parent, name)
    if node is not None:
        try:
            return node, fs.stat(node)
        except OSError as failure:
            if failure.errno != errno.ESTALE or node.upper is not None:
                raise
            fs.nodes.detach(parent, name)  # somebody has replaced it in its lower
    if parent.dead:
        return None
    above = None
    if parent.upper is not None:
        above = fs.upper.lookup(parent.upper, name)
        if above is not None:
            if is_whiteout(above[1]):
                return None
            return _from_upper(fs, parent, name, *above)
    if len(name) > redirects.NAME_MAX:
        raise error(errno.ENAMETOOLONG, name)
    if not parent.lowers:
        return None
    found = _below(fs, parent.lowers, name)
    return _from_lower(fs, parent, name, found) if found else None


def resolve(fs: State, parent: Node, name: bytes) -> Node:
    """Like :func:`lookup`, but ENOENT when there is no such name."""
    node = fs.nodes.child(parent, name) if parent.children is not None else None
    if node is not None:
        return node
    found = lookup(fs, parent, name)
    if found is None:
        raise error(errno.ENOENT, name)
    return found[0]


def lower_has(fs: State, parent: Node, name: bytes) -> bool:
    """Whether the name would show if the upper had nothing under it (ovl_lower_positive)."""
    for layer, key in parent.lowers:
        found = fs.lowers[layer].lookup(key, name)
        if found is not None:
            return not is_whiteout(found[1])
    return False


def _from_upper(
    fs: State, parent: Node, name: bytes, key: Key, attr: Attr, lower_nlink: int | None = None
) -> tuple[Node, Attr]:
    notes = fs.notes(fs.upper, key)
    if stat.S_ISDIR(attr.st_mode):
        return _upper_directory(fs, parent, name, key, attr, notes or {}), attr
    if notes is None:
        return _enter(fs, parent, name, key, (), fs.ino_of(0, fs.upper.dev, attr), attr)
    lowers: tuple[Lower, ...] = ()
    metacopy = fs.x_metacopy in notes and stat.S_ISREG(attr.st_mode)
    note = partial.note_in(fs, notes) if metacopy else None
    redirect = None if not metacopy else _redirect(fs, notes) if note is None else note.path
    if metacopy:
        found = _descend(fs, *_start(fs, parent, name, redirect))
        if not found or not stat.S_ISREG(found[-1][2].st_mode):
            raise error(errno.EIO, name)  # its data is nowhere: not the lower it was made for
        if note is not None:
            partial.must_be_the_same(note, found[-1][2])
        lowers = tuple((layer, low) for layer, low, _ in found)
    value = notes.get(fs.x_origin, b"")
    ino = _ino_of_origin(fs, value, notes.get(fs.x_layer))
    node, attr = _enter(fs, parent, name, key, lowers, ino or fs.ino_of(0, fs.upper.dev, attr), attr)
    if node.indexed is None and origin.index_name(value) in fs.indexed:
        node.indexed = _union_nlink(fs, notes, attr.st_nlink, lower_nlink)
    if metacopy and node.upper is key:
        node.metacopy = True
        node.redirect = redirect
        if note is not None:
            partial.enter(fs, node, note, attr)
        attr = fs.stat(node)  # last, for the lower may fail: the node is known from now on
    return node, attr


def _upper_directory(
    fs: State, parent: Node, name: bytes, key: Key, attr: Attr, notes: dict[bytes, bytes]
) -> Node:
    lowers: tuple[Lower, ...] = ()
    redirect = None
    ino = None
    if notes.get(fs.x_opaque) != b"y":
        redirect = _redirect(fs, notes)
        if parent.lowers or redirect is not None:
            found = _descend(fs, *_start(fs, parent, name, redirect), directories=True)
            lowers = tuple((layer, low) for layer, low, _ in found)
            if found:
                ino = fs.ino_of(found[0][0] + 1, fs.lowers[found[0][0]].dev, found[0][2])
    if ino is None:
        ino = fs.ino_of(0, fs.upper.dev, attr)
    node, _ = _enter(fs, parent, name, key, lowers, ino, attr)
    node.redirect = redirect
    return node


def _redirect(fs: State, notes: dict[bytes, bytes]) -> bytes | None:
    value = notes.get(fs.x_redirect)
    return None if value is None else redirects.parse(value)


def _start(
    fs: State, parent: Node, name: bytes, redirect: bytes | None
) -> tuple[Sequence[Lower], tuple[bytes, ...]]:
    """Where the search in the lowers begins for an upper with this redirect."""
    if redirect is None:
        return parent.lowers, (name,)
    return fs.roots if redirect.startswith(b"/") else parent.lowers, redirects.names(redirect)


def _from_lower(fs: State, parent: Node, name: bytes, found: _Found) -> tuple[Node, Attr]:
    layer, key, attr = found[0]
    lowers = ((layer, key),) if len(found) == 1 else tuple((i, low) for i, low, _ in found)
    ino = fs.ino_of(layer + 1, fs.lowers[layer].dev, attr)
    if attr.st_nlink > 1 and fs.indexed and not stat.S_ISDIR(attr.st_mode) and fs.nodes.get(ino) is None:
        index = find_in_index(fs, layer, key)
        if index is not None:
            if stat.S_IFMT(index[1].st_mode) != stat.S_IFMT(attr.st_mode):
                raise error(errno.EIO, name)  # a forged index (ovl_lookup_index)
            return _from_upper(fs, parent, name, *index, attr.st_nlink)
    return _enter(fs, parent, name, None, lowers, ino, attr)


def find_in_index(fs: State, layer: int, key: Key) -> tuple[Key, Attr] | None:
    """Return the upper inode of a hard-linked lower one that was copied up under another name."""
    handle = fs.lowers[layer].handle(key)
    if handle is None or fs.index is None:
        return None
    name = origin.index_name(origin.encode(handle))
    found = fs.upper.lookup(fs.index, name) if name in fs.indexed else None
    return found if found is not None and fs.came_from(found[0], handle.place) else None


def _union_nlink(fs: State, notes: dict[bytes, bytes], upper_nlink: int, lower_nlink: int | None) -> int:
    """Return how many names an indexed hard link has in the union.

    The note says it relative to the upper's nlink (``U+n``) or to the lower's (``L+n``), whichever
    does not change with the operation that it was written for (ovl_get_nlink). Without one, only the
    index itself is a name too many.
    """
    kept = count_in(notes.get(fs.x_links, b""))
    lower = lower_nlink if kept is None else kept
    note = _NLINK.fullmatch(notes.get(fs.x_nlink, b""))
    if note is None or (note[1] == b"L" and lower is None):
        return max(upper_nlink - 1, 1)
    base = upper_nlink if note[1] == b"U" else lower
    assert base is not None
    return max(base + int(note[2]), 1)


_NLINK = re.compile(rb"([LU])([+-]\d{1,9})")


def _ino_of_origin(fs: State, value: bytes, hint: bytes | None) -> int | None:
    """Return the union's number for the lower inode that an origin names, if a layer knows it.

    Images have no UUID to tell them apart, so a note says which of several was meant.
    """
    handle = origin.decode(value) if value else None
    if handle is None:
        return None
    first = count_in(hint or b"") or 0
    for index in [first, *range(len(fs.lowers))]:
        if index >= len(fs.lowers):
            continue
        layer = fs.lowers[index]
        real = layer.handle_ino(handle)
        if real is not None:
            return fs.ino_of_real(index + 1, layer.dev, real)
    return None


def _enter(
    fs: State, parent: Node, name: bytes, upper: Key | None, lowers: tuple[Lower, ...], ino: int, attr: Attr
) -> tuple[Node, Attr]:
    """Return the node for what was found: a known one for another name of the same inode."""
    known = fs.nodes.get(ino)
    if known is not None and not known.dead:
        if _same(fs, known, upper, lowers, attr):
            return _another_name(fs, known, parent, name, upper, lowers, attr)
        # Two uppers of one origin: hard links that somebody without an index broke.
        ino = (
            fs.ino_of(0, fs.upper.dev, attr)
            if upper is not None
            else fs.strange_ino(-1, attr.st_dev, attr.st_ino)
        )
        known = fs.nodes.get(ino)
        if known is not None and not known.dead:
            return _another_name(fs, known, parent, name, upper, lowers, attr)
    node = Node(ino, attr.st_mode, parent, name, upper, lowers)
    fs.nodes.add(node)
    return node, attr


def _same(fs: State, known: Node, upper: Key | None, lowers: tuple[Lower, ...], attr: Attr) -> bool:
    if known.is_dir or stat.S_IFMT(known.mode) != stat.S_IFMT(attr.st_mode):
        return False
    if known.upper is None:
        return upper is None
    if upper is None:
        # Another name of it: a hard link, whatever an origin says.
        layer, key = lowers[0]
        handle = fs.lowers[layer].handle(key) if attr.st_nlink > 1 else None
        return attr.st_nlink > 1 and (handle is None or fs.came_from(known.upper, handle.place))
    return fs.upper.stat(known.upper).st_ino == attr.st_ino


def _another_name(
    fs: State,
    node: Node,
    parent: Node,
    name: bytes,
    upper: Key | None,
    lowers: tuple[Lower, ...],
    attr: Attr,
) -> tuple[Node, Attr]:
    if node.is_dir:
        _must_not_be_above(node, parent, name)
    if upper is not None and node.upper is not None:
        # The new key stands for a name that is there; the old one's may be gone.
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
    """EUCLEAN if a known directory is found below itself: a damaged layer, or one that somebody changes.

    So every way up ends at the root.
    """
    walk: Node | None = parent
    while walk is not None:
        if walk is node:
            raise error(errno.EUCLEAN, name)
        walk = walk.parent


def _below(fs: State, stack: Sequence[Lower], name: bytes) -> _Found:
    """Collect what the lower layers show under *name*, topmost first."""
    if len(stack) != 1 or stack[0][0] != len(fs.lowers) - 1:
        return _descend(fs, stack, (name,))
    # In the lowest layer nothing is below to be hidden, and most unions have but one.
    layer, key = stack[0]
    hit = fs.lowers[layer].lookup(key, name)
    return [] if hit is None or is_whiteout(hit[1]) else [(layer, *hit)]


def _descend(
    fs: State, stack: Sequence[Lower], path: tuple[bytes, ...], *, directories: bool = False
) -> _Found:
    """Collect what the lower layers show at *path* below each directory of *stack*, topmost first.

    A whiteout or a file ends the search, and so does an opaque directory; a redirect renames what
    is searched in the layers below. With *directories*, files are not wanted (a directory is above).
    """
    found: _Found = []
    position = 0
    incomplete = False
    while position < len(stack):
        layer, base = stack[position]
        position += 1
        step = _walk(fs, layer, base, path)
        if step.hit is not None:
            key, attr = step.hit
            if is_whiteout(attr):
                break
            if not stat.S_ISDIR(attr.st_mode):
                if directories or (found and stat.S_ISDIR(found[-1][2].st_mode)):
                    break
                if incomplete and not stat.S_ISREG(attr.st_mode):
                    break
                found.append((layer, key, attr))
                incomplete = step.metacopy
                if not incomplete:
                    break
            else:
                if found and not stat.S_ISDIR(found[-1][2].st_mode):
                    break
                found.append((layer, key, attr))
        if step.stop:
            break
        if step.path is not None:
            path = step.path
            if step.absolute:
                stack, position = fs.roots[layer + 1 :], 0
    if incomplete:
        raise error(errno.EIO, path[-1])  # a metacopy whose data no layer has
    return found


class _Step:
    """What one layer says to a path."""

    __slots__ = ("absolute", "hit", "metacopy", "path", "stop")

    def __init__(self) -> None:
        self.hit: tuple[Key, Attr] | None = None
        self.stop = False
        self.path: tuple[bytes, ...] | None = None
        self.absolute = False
        self.metacopy = False


def _walk(fs: State, index: int, base: Key, path: tuple[bytes, ...]) -> _Step:
    """Follow *path* in one layer, noting what opaque directories and redirects on it mean below."""
    step = _Step()
    layer = fs.lowers[index]
    key = base
    below = index < len(fs.lowers) - 1
    for depth, name in enumerate(path):
        hit = layer.lookup(key, name) if redirects.may_exist(name) else None
        if hit is None:
            return step
        key, attr = hit
        at_end = depth == len(path) - 1
        if not stat.S_ISDIR(attr.st_mode):
            step.stop = not at_end or is_whiteout(attr)
            step.hit = hit if at_end else None
            if at_end and below and stat.S_ISREG(attr.st_mode):
                notes = fs.notes(layer, key)
                if notes is not None and fs.x_metacopy in notes:
                    step.metacopy = True
                    _obey(fs, step, notes, path, depth)
            return step
        if below:
            notes = fs.notes(layer, key)
            if notes is not None:
                _obey(fs, step, notes, path, depth)
        if at_end:
            step.hit = hit
    return step


def find_below(fs: State, path: tuple[bytes, ...]) -> tuple[int, Key, Attr] | None:
    """Return the file, with its data, that the lowers have at a path from their root; None if it is none."""
    found = _descend(fs, fs.roots, path)
    return found[-1] if found and stat.S_ISREG(found[-1][2].st_mode) else None


def _obey(fs: State, step: _Step, notes: dict[bytes, bytes], path: tuple[bytes, ...], depth: int) -> None:
    if notes.get(fs.x_opaque) == b"y":
        step.stop = True
        return
    redirect = _redirect(fs, notes)
    if redirect is None:
        return
    rest = path[depth + 1 :]
    if redirect.startswith(b"/"):
        step.path = (*redirects.names(redirect), *rest)
        step.absolute = True
        step.stop = False  # an opaque directory above says nothing of where this leads
    else:
        step.path = (*(step.path or path)[: -len(rest) - 1], redirect, *rest)
