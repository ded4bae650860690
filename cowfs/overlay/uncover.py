"""Uncover: remove an entry of the upper so that the lowers show again; the reverse of copy-up.

The entry is not destroyed. It is renamed, in one step, to a place outside of the merged tree that the caller
chooses. :func:`cover` moves it back.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Container, Iterator
from contextlib import closing, contextmanager, suppress

from cowfs.errors import os_error
from cowfs.layers.base import Key, LowerLayer
from cowfs.linux import files
from cowfs.overlay import away, whiteout
from cowfs.overlay.copyup import copy_up_directory, link_alias, write_nlink
from cowfs.overlay.dir import last_removed, name_removed, rekey
from cowfs.overlay.fs import OverlayFs
from cowfs.overlay.install import show_to_handles
from cowfs.overlay.lookup import lookup, shown_below, union_nlink
from cowfs.overlay.node import Node
from cowfs.overlay.original import Xattr, user_xattrs
from cowfs.overlay.readdir import readdir
from cowfs.overlay.stack import Hit
from cowfs.overlay.stack import Place as Lower
from cowfs.overlay.xattr_format import index_name, make_nlink, parse_count
from cowfs.types import Attr

Place = tuple[Key, bytes]
"""A directory of the upper layer, and a name in it."""
UNFINISHED = b".unfinished"
"""How the name of a copy ends until keep_copy() is done with it."""
Stale = list[tuple[int, bytes | None]]
"""What the kernel must ask for again: a name in a directory, or (None) an inode, by the union's numbers."""
Hidden = dict[tuple[Node, bytes], Node]
"""Files whose names show nothing until they show the lower's: by directory and name."""


def uncover(
    fs: OverlayFs, parent: Node, name: bytes, place: Place | None, stale: Stale, hidden: Hidden | None = None
) -> bool:
    """Move the upper's entry *name* to *place*. If it is a whiteout, remove it and return False.

    Without a *place*, remove a file of any type. With *hidden*, leave a whiteout where it was: call show()
    later, and show_no_more() at the end.

    ENOENT if the upper has no such name; EBUSY while its data is being copied up.
    """
    with _names_counted(fs, parent, name, stale, moved=place is not None):
        return _uncover(fs, parent, name, place, stale, hidden)


def show(fs: OverlayFs, parent: Node, name: bytes, stale: Stale, hidden: Hidden) -> None:
    """Remove a whiteout that uncover() has left. Open files of the name are the lower's then.

    EEXIST if something else has the name now.
    """
    with _names_counted(fs, parent, name, stale):
        found = fs.upper.lookup(parent.upper, name) if parent.upper is not None else None
        if found is None or not fs.is_whiteout(*found):
            raise os_error(errno.EEXIST, name)
        _uncover(fs, parent, name, None, stale, None)
        _show(fs, parent, name, stale, hidden)


def _uncover(
    fs: OverlayFs, parent: Node, name: bytes, place: Place | None, stale: Stale, hidden: Hidden | None
) -> bool:
    found = fs.upper.lookup(parent.upper, name) if parent.upper is not None else None
    if found is None:
        raise os_error(errno.ENOENT, name)
    key, attr = found
    node = fs.nodes.child(parent, name)
    hides = fs.is_whiteout(key, attr)
    if hides:
        fs.upper.unlink(parent.upper, name, None)
    else:
        if node is not None:
            node = must_be_idle(fs, node)
        used = node.upper if node is not None else key
        if place is None:
            fs.upper.unlink(parent.upper, name, used)
        else:
            fs.upper.rename((parent.upper, name), place, 0, moved=used)
            away.moved(fs, place, 1)
        if hidden is not None:
            whiteout.make(fs, parent.upper, name)
    parent.added += 1
    fs.below.pop(parent, None)
    if node is not None and not hides:
        if hidden is None or node.is_dir or node.indexed is not None:
            _follow(fs, node, parent, name, stale)
        else:
            fs.nodes.detach(parent, name)
            node.lookups += 1
            hidden[parent, name] = node
    stale.append((parent.ino, name))
    return not hides


def _show(fs: OverlayFs, parent: Node, name: bytes, stale: Stale, hidden: Hidden) -> None:
    """Update the file that had a name before it was hidden."""
    node = hidden.pop((parent, name), None)
    if node is None:
        return
    if fs.nodes.get(node.ino) is node and fs.nodes.child(parent, name) is None:
        _follow(fs, node, parent, name, stale)
    else:
        _lose_name(fs, node, parent, name)
    node.lookups -= 1
    fs.release(node)


def show_no_more(fs: OverlayFs, hidden: Hidden) -> None:
    """Forget the files whose names are still hidden: they have lost their names."""
    while hidden:
        (parent, name), node = hidden.popitem()
        _lose_name(fs, node, parent, name)
        node.lookups -= 1
        fs.release(node)


@contextmanager
def _names_counted(
    fs: OverlayFs, parent: Node, name: bytes, stale: Stale, *, moved: bool = False
) -> Iterator[None]:
    """Update the counts of indexed hard links that gain or lose names in the block, at *name* and below.

    With *moved*, first create those of the names in the upper that show only through the index.
    """
    before = _pin(fs, parent, name, link=moved)
    after: list[Node] = []
    try:
        yield
        after = _pin(fs, parent, name)
        difference = Counter(node for node in after if node.indexed is not None)
        difference.subtract(node for node in before if node.indexed is not None)
        for node, count in difference.items():
            if count:
                _add_to_count(fs, node, count)
                stale.append((node.ino, None))
        for node in difference:
            if not node.dead:
                _key_in_index(fs, node)
    finally:
        for node in reversed(before + after):
            node.lookups -= 1
            fs.release(node)


def _pin(fs: OverlayFs, parent: Node, name: bytes, *, link: bool = False) -> list[Node]:
    """Return the directories and the indexed hard links at a name and below it, once for each name.

    Each stays known until the caller subtracts one from its *lookups*, and releases it.
    """
    held: list[Node] = []
    waiting = [(parent, name)] if fs.indexed else []
    while waiting:
        directory, name = waiting.pop()
        found = None
        with suppress(OSError):  # skip what cannot be read
            found = lookup(fs, directory, name)
        if found is None:
            continue
        node = found[0]
        if not node.is_dir and node.indexed is None:
            fs.release(node)
            continue
        node.lookups += 1
        held.append(node)
        if link and not node.is_dir and node.upper is not None:
            link_alias(fs, node, directory, name)
        if node.is_dir:
            with suppress(OSError):
                waiting += [(node, entry.name) for entry in readdir(fs, node)]
    return held


def _key_in_index(fs: OverlayFs, node: Node) -> None:
    """Use the key of a hard link's name in the index, which does not move."""
    with suppress(OSError):
        name = index_name(fs.noted(node.upper, fs.format.origin))
        place = fs.index_of(name) if name in fs.indexed else None
        found = None if place is None else fs.upper.lookup(place, name)
        if found is not None and found[1].st_ino == fs.upper.stat(node.upper).st_ino:
            fs.upper.forget(node.upper)
            node.upper = found[0]


def _add_to_count(fs: OverlayFs, node: Node, count: int) -> None:
    """Change the name count of an indexed hard link by *count*; at 0, remove it from the index."""
    assert node.indexed is not None
    node.indexed += count
    if node.indexed > 0:
        write_nlink(fs, node)
    elif not node.dead:
        last_removed(fs, node)


def must_be_idle(fs: OverlayFs, node: Node) -> Node | None:
    """Return *node*, or None if nobody used it, and it is forgotten now.

    EBUSY while a file's data is being copied up, a thread reads it, or the file is partial.
    """
    if node.partial is not None or node.copying is not None or not fs.host.close_idle(node):
        raise os_error(errno.EBUSY, node.name)
    return node if fs.nodes.get(node.ino) is node else None


def cover(fs: OverlayFs, parent: Node, name: bytes, place: Place, stale: Stale) -> None:
    """Move what uncover() moved to *place* back to *name*. EEXIST if the upper has that name."""
    copy_up_directory(fs, parent)
    with _names_counted(fs, parent, name, stale):
        _cover(fs, parent, name, place, stale)


def _cover(fs: OverlayFs, parent: Node, name: bytes, place: Place, stale: Stale) -> None:
    found = fs.upper.lookup(*place)
    if found is None:
        raise os_error(errno.ENOENT, name)
    there = fs.upper.lookup(parent.upper, name)
    if there is not None and not fs.is_whiteout(*there):
        raise os_error(errno.EEXIST, name)
    node = fs.nodes.child(parent, name)
    if node is not None:
        node = must_be_idle(fs, node)
    target = (parent.upper, name)
    if there is None:
        fs.upper.rename(place, target, files.RENAME_NOREPLACE, moved=found[0])
    else:
        fs.upper.rename(place, target, files.RENAME_EXCHANGE, moved=found[0])
        fs.upper.unlink(*place, None)
    away.moved(fs, target, -1)
    parent.added += 1
    fs.below.pop(parent, None)
    if node is not None:
        _follow(fs, node, parent, name, stale)
    stale.append((parent.ino, name))


def _follow(fs: OverlayFs, node: Node, parent: Node, name: bytes, stale: Stale) -> None:
    """Update a node to what its name shows now if the number is the same; else remove its name."""
    fs.nodes.detach(parent, name)
    if node.is_dir:
        _mark_removed(fs, node)
        return
    fs.nodes.set_aside(node)
    try:
        found = lookup(fs, parent, name)
    except OSError:
        fs.nodes.put_back(node)
        raise
    fresh = None if found is None else found[0]
    fs.nodes.put_back(node)
    if fresh is None or fresh.ino != node.ino or stat.S_IFMT(fresh.mode) != stat.S_IFMT(node.mode):
        _lose_name(fs, node, parent, name)
        return
    before = node.upper
    for what in ("upper", "lowers", "metacopy", "partial", "redirect", "indexed", "mode"):
        setattr(node, what, getattr(fresh, what))
    fs.nodes.rename(node, parent, name)
    show_to_handles(fs, node)
    if before is not None:
        fs.upper.forget(before)
    stale.append((node.ino, None))


def _lose_name(fs: OverlayFs, node: Node, parent: Node, name: bytes) -> None:
    if node.upper is None:
        node.dead = True
        fs.release(node)
        return
    if node.indexed is not None:  # its count tells when it has no name
        fs.nodes.detach(parent, name)
        rekey(fs, node)
        return
    # uncover() moved one of the inode's names there.
    name_removed(
        fs, node, parent, name, last=fs.upper.stat(node.upper).st_nlink <= 2 and fs.nodes.place(node) is None
    )


def _mark_removed(fs: OverlayFs, directory: Node) -> None:
    """Note that a directory and everything known below it have lost their names."""
    waiting = [directory]
    order = []
    while waiting:
        node = waiting.pop()
        order.append(node)
        for name, child in list((node.children or {}).items()):
            fs.nodes.detach(node, name)
            if child.is_dir:
                waiting.append(child)
            else:
                _lose_name(fs, child, node, name)
    for node in reversed(order):
        node.dead = True
        fs.release(node)


def count_by_lower(fs: OverlayFs) -> None:
    """Make the counts of the index independent of names outside the merged tree, which will be removed.

    Counts of inodes that the kernel copied up stay: no note records the link count of their lower.
    """
    for name in fs.indexed:
        place = fs.index_of(name)
        found = None if place is None else fs.upper.lookup(place, name)
        if found is None or found[1].st_nlink <= 1:
            continue
        key, attr = found
        notes = fs.notes(fs.upper, key) or {}
        links = parse_count(notes.get(fs.format.links, b""))
        if links is not None:
            count = union_nlink(fs, notes, attr.st_nlink, links)
            fs.note(key, fs.format.nlink, make_nlink(b"L", count - links))


# --- attributes and content, in place


class Attributes:
    """Attributes and xattrs of an inode, to be given to another."""

    __slots__ = ("attr", "xattrs")

    def __init__(self, attr: Attr, xattrs: list[Xattr]) -> None:
        self.attr = attr
        self.xattrs = xattrs


def attributes_of(fs: OverlayFs, layer: LowerLayer, key: Key) -> Attributes:
    """Return the attributes and xattrs of an inode of a layer."""
    return Attributes(layer.stat(key), user_xattrs(fs, layer, key))


def give_attributes(fs: OverlayFs, node: Node, wanted: Attributes, stale: Stale) -> None:
    """Give an upper inode these attributes: owner, mode, times and xattrs. Remove its other xattrs."""
    upper, key, attr = fs.upper, node.upper, wanted.attr
    kept = {name for name, _ in wanted.xattrs}
    for name, value in user_xattrs(fs, upper, key):
        if name not in kept:
            with suppress(OSError):
                upper.removexattr(key, name)
        elif (name, value) in wanted.xattrs:
            kept.discard(name)
    for name, value in wanted.xattrs:
        if name in kept:
            upper.setxattr(key, name, value)
    now = upper.stat(key)
    if (now.st_uid, now.st_gid) != (attr.st_uid, attr.st_gid):
        upper.chown(key, attr.st_uid, attr.st_gid)
    if not stat.S_ISLNK(attr.st_mode) and upper.stat(key).st_mode != attr.st_mode:
        upper.chmod(key, attr.st_mode)
    upper.utimens(key, attr.st_atime_ns, attr.st_mtime_ns)
    node.mode = attr.st_mode
    stale.append((node.ino, None))


def give_content(fs: OverlayFs, node: Node, layer: LowerLayer, key: Key, stale: Stale) -> None:
    """Replace the content of a regular upper file by that of a file in *layer*. Blocks until it is done."""
    with (
        closing(layer.open(key, os.O_RDONLY)) as source,
        closing(fs.upper.open(node.upper, os.O_RDWR)) as file,
    ):
        fs.upper.truncate(node.upper, 0)
        source.copy_to(file)
    stale.append((node.ino, None))


def keep_copy(fs: OverlayFs, layer: LowerLayer, key: Key, place: Place) -> None:
    """Copy a regular file of a layer, with its attributes, to *place*. Blocks; ENOSPC.

    The name appears when the copy is complete and on disk.
    """
    attributes = attributes_of(fs, layer, key)
    attr = attributes.attr
    unfinished = (place[0], place[1] + UNFINISHED)
    made, file = fs.upper.create(*unfinished, stat.S_IMODE(attr.st_mode), attr.st_uid, attr.st_gid)
    with closing(file), closing(layer.open(key, os.O_RDONLY)) as source:
        source.copy_to(file)
        file.fsync(datasync=False)
    for name, value in attributes.xattrs:
        with suppress(OSError):
            fs.upper.setxattr(made, name, value)
    fs.upper.chmod(made, attr.st_mode)
    fs.upper.utimens(made, attr.st_atime_ns, attr.st_mtime_ns)
    fs.upper.rename(unfinished, place, files.RENAME_NOREPLACE, moved=made)


def drop_directory(
    fs: OverlayFs,
    node: Node,
    stale: Stale,
    *,
    any_times: bool = True,
    dry_run: Container[bytes] | None = None,
) -> bool:
    """Remove a directory from the upper if it makes no difference there; return whether it makes none.

    It makes no difference if it is empty, shows a directory of a lower under the same name, and has its
    attributes (apart from the times if *any_times*). With *dry_run*, the names in it to treat as removed,
    change nothing.
    """
    parent, name = node.parent, node.name
    if node.upper is None or not node.lowers or parent is None or node.redirect is not None or node.dead:
        return False
    if any(dry_run is None or entry.name not in dry_run for entry in fs.upper.readdir(node.upper)):
        return False
    below = shown_below(fs, parent, name)
    if below is None or not _is_same(fs, below, node.lowers[0]):
        return False
    was = attributes_of(fs, fs.upper, node.upper)
    is_ = attributes_of(fs, fs.lowers[below[0]], below[1])
    if not _alike(was, is_, any_times=any_times):
        return False
    if dry_run is not None:
        return True
    with keeping_times(fs, parent):
        fs.upper.rmdir(parent.upper, name, node.upper)
    fs.upper.forget(node.upper)
    node.upper = None
    for each in (parent, node):
        fs.below.pop(each, None)
    stale.append((node.ino, None))
    return True


@contextmanager
def keeping_times(fs: OverlayFs, directory: Node) -> Iterator[None]:
    """After the block, give an upper directory the times that it has now, even if the block is interrupted.

    If the process is killed in the block, :func:`restore_times` does it at the next mount. If the store has
    no room for that note, it does not.
    """
    before = fs.upper.stat(directory.upper)
    where = b"/".join(reversed([node.name for node in _up_to_root(directory)]))
    with suppress(OSError):
        if fs.notebook is not None:
            fs.note(fs.notebook, _times(fs), b"%d:%d:%s" % (before.st_atime_ns, before.st_mtime_ns, where))
    try:
        yield
    finally:
        fs.upper.utimens(directory.upper, before.st_atime_ns, before.st_mtime_ns)
        _forget_times(fs)


def restore_times(fs: OverlayFs) -> None:
    """Give a directory its times again if a process was killed in :func:`keeping_times`. Blocks."""
    note = b""
    with suppress(OSError):
        note = b"" if fs.notebook is None else fs.noted(fs.notebook, _times(fs))
    if not note:
        return
    with suppress(OSError, ValueError):
        atime, mtime, where = note.split(b":", 2)
        key = fs.root.upper
        for name in where.split(b"/") if where else ():
            found = None if name in {b"", b".", b".."} else fs.upper.lookup(key, name)
            if found is None or not stat.S_ISDIR(found[1].st_mode):
                raise os_error(errno.ENOENT, name)
            key = found[0]
        fs.upper.utimens(key, int(atime), int(mtime))
    _forget_times(fs)


def _forget_times(fs: OverlayFs) -> None:
    with suppress(OSError):
        if fs.notebook is not None:
            fs.upper.removexattr(fs.notebook, _times(fs))


def _times(fs: OverlayFs) -> bytes:
    return fs.format.prefix + b"cowfs.times"


def _up_to_root(node: Node) -> Iterator[Node]:
    above: Node | None = node
    while above is not None and above.parent is not None:
        yield above
        above = above.parent


def _is_same(fs: OverlayFs, found: Hit, lower: Lower) -> bool:
    """Whether two places in lowers are of the same inode."""
    attr = fs.lowers[lower[0]].stat(lower[1])
    return found[0] == lower[0] and (found[2].st_dev, found[2].st_ino) == (attr.st_dev, attr.st_ino)


def at_home(fs: OverlayFs, node: Node) -> None:
    """Remove the redirect of a directory whose lower has the same place and name."""
    if node.redirect is not None and is_at_home(fs, node):
        fs.upper.removexattr(node.upper, fs.format.redirect)
        node.redirect = None


def is_at_home(fs: OverlayFs, node: Node) -> bool:
    """Whether a directory has the same parent and name as its lower."""
    below = shown_below(fs, node.parent, node.name) if node.parent is not None else None
    return below is not None and bool(node.lowers) and _is_same(fs, below, node.lowers[0])


def give_lower_times(fs: OverlayFs, node: Node, stale: Stale) -> None:
    """Give a merged directory the times of its lower."""
    if node.upper is not None and node.lowers and node.redirect is None:
        layer, key = node.lowers[0]
        attr = fs.lowers[layer].stat(key)
        fs.upper.utimens(node.upper, attr.st_atime_ns, attr.st_mtime_ns)
        stale.append((node.ino, None))


def hide(fs: OverlayFs, parent: Node, name: bytes, stale: Stale) -> None:
    """Restore a whiteout that uncover() removed. EEXIST if the upper has the name now."""
    copy_up_directory(fs, parent)
    if fs.upper.lookup(parent.upper, name) is not None:
        raise os_error(errno.EEXIST, name)
    with _names_counted(fs, parent, name, stale):
        node = fs.nodes.child(parent, name)
        whiteout.make(fs, parent.upper, name)
        if node is not None:
            fs.nodes.detach(parent, name)
            if node.is_dir:
                _mark_removed(fs, node)
            else:
                _lose_name(fs, node, parent, name)
    stale.append((parent.ino, name))


def _alike(one: Attributes, two: Attributes, *, any_times: bool) -> bool:
    a, b = one.attr, two.attr
    return (
        (a.st_mode, a.st_uid, a.st_gid) == (b.st_mode, b.st_uid, b.st_gid)
        and sorted(one.xattrs) == sorted(two.xattrs)
        and (any_times or a.st_mtime_ns == b.st_mtime_ns)
    )
