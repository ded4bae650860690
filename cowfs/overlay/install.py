"""Install a finished copy: give it its name, its place in the index, and its readers."""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from cowfs.errors import os_error
from cowfs.layers.base import Key
from cowfs.linux import files
from cowfs.overlay import partial
from cowfs.overlay.companions import NOT_HERE
from cowfs.overlay.fs import OverlayFs
from cowfs.overlay.handle import Reader
from cowfs.overlay.node import Node
from cowfs.overlay.original import Original
from cowfs.overlay.xattr_format import IMPURE, make_nlink

Place = tuple[Node, bytes]
"""A directory, and a name in it."""


def place_of(fs: OverlayFs, node: Node) -> Place:
    """Return a place where the node has a name; for a hard link, any known one. ENOENT if it has none."""
    found = fs.nodes.place(node)
    if found is None:
        raise os_error(errno.ENOENT, node.name)
    return found


def install(
    fs: OverlayFs, node: Node, place: Place | None, key: Key, temporary: bytes, original: Original
) -> None:
    """Move the finished inode from the work directory to the node's name.

    A node without a name only gets the key.
    """
    upper = fs.upper
    if place is None:
        (upper.rmdir if node.is_dir else upper.unlink)(fs.work, temporary, key)
        return
    parent, name = place
    if _is_taken(fs, original):
        original = original._replace(origin=b"", index_name=None)
    try:
        _note_origin(fs, node, key, original)
    except OSError as failure:
        # user.* xattrs are not allowed on symlinks and devices (xattr(7)).
        if failure.errno not in NOT_HERE:
            raise
        if original.index_name is not None:
            original = _begin_notes(fs, node, key, original, original.index_name)
    if node.is_dir:  # after the origin, which should fit in the inode
        with suppress(OSError):  # only a hint to the kernel's readdir
            fs.note(key, fs.format.impure, IMPURE)
    before = upper.stat(parent.upper)
    if original.index_name is not None and fs.index is not None:
        _install_indexed(fs, node, place, key, temporary, original.index_name, original)
    else:
        upper.rename((fs.work, temporary), (parent.upper, name), files.RENAME_NOREPLACE, moved=key)
    # In the merged tree, the directory has not changed.
    upper.utimens(parent.upper, before.st_atime_ns, before.st_mtime_ns)


def _begin_notes(fs: OverlayFs, node: Node, key: Key, original: Original, name: bytes) -> Original:
    """Make a place for the notes of a hard link that cannot hold them; without notes, do not index it."""
    if fs.companions is None:
        return original._replace(index_name=None)
    fs.stand_in(key)
    try:
        _note_origin(fs, node, key, original)
    except OSError as failure:
        if failure.errno not in NOT_HERE:
            raise
        fs.companions.begin(key, name)
        _note_origin(fs, node, key, original)
    return original


def _note_origin(fs: OverlayFs, node: Node, key: Key, original: Original) -> None:
    fs.note(key, fs.format.origin, original.origin)
    number, lower = node.lowers[0]
    if number > 0:
        fs.note(key, fs.format.layer, b"%d" % number)
    if number < 0 and not node.is_dir:
        notes = fs.notes(fs.lowers[number], lower) or {}
        first = notes.get(fs.format.first) or notes.get(fs.format.origin)
        if first:
            fs.note(key, fs.format.first, first)
        if first and fs.format.layer in notes:
            fs.note(key, fs.format.layer, notes[fs.format.layer])


def _is_taken(fs: OverlayFs, original: Original) -> bool:
    """Whether the index already has another lower inode with the same number under this name."""
    if not original.place or original.index_name not in fs.indexed or fs.index is None:
        return False
    found = fs.upper.lookup(fs.index_of(original.index_name), original.index_name)
    return found is not None and not fs.came_from(found[0], original.place)


def _install_indexed(
    fs: OverlayFs,
    node: Node,
    place: Place,
    key: Key,
    temporary: bytes,
    index_name: bytes,
    original: Original,
) -> None:
    """Install a hard link in the index, and link it from there to its name."""
    parent, name = place
    fs.note(key, fs.format.nlink, make_nlink(b"L", 0))
    fs.note(key, fs.format.links, b"%d" % original.attr.st_nlink)
    if original.place:
        fs.note(key, fs.format.place, original.place)
    fs.upper.rename((fs.work, temporary), (fs.index_of(index_name), index_name), moved=key)
    fs.indexed.add(index_name)
    node.indexed = original.attr.st_nlink
    fs.upper.link(key, parent.upper, name)


def set_upper(fs: OverlayFs, node: Node, key: Key) -> None:
    """Set the inode in the upper that the node has from now on."""
    node.upper = key
    show_to_handles(fs, node)


def show_to_handles(fs: OverlayFs, node: Node) -> None:
    """Switch files that are open for reading to the upper, so that they see what is written there."""
    handles = node.handles
    if handles is None or (node.metacopy and node.partial is None):  # its data is where it was
        return
    for handle in handles:
        if handle.is_frozen:
            flags = os.O_RDWR | (os.O_SYNC if handle.is_synchronous else 0)
            handle.thaw(partial.open_data(fs, node, flags))
    reading = [handle for handle in handles if not handle.writable]
    if reading:
        reader = handles.reader = Reader(partial.open_data(fs, node, os.O_RDONLY))
        for handle in reading:
            handle.replace(reader)
