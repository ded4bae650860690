"""Compute the content of a layer that, merged with the lowers, shows a tree.

The layer has no redirects, metacopies or opaque directories, which not all systems support. It contains a
renamed directory with everything in it, and a whiteout for each name to hide. So every system that stacks
layers can express it.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from enum import Enum

from cowfs.changes.paths import join
from cowfs.changes.version import Tree
from cowfs.types import Change


class Item(Enum):
    """What a layer has at a path."""

    NODE = "the inode of the merged tree"
    REPLACED = "the inode of the merged tree, where the lowers have one of another type"
    WHITEOUT = "a whiteout, because only the lowers have the path"


Plan = dict[bytes, Item]


def plan(changes: Iterable[Change], after: Tree, before: Tree) -> Plan:
    """Return what the layer must have, by path, each directory before its content. Blocks; OSError."""
    items: Plan = {}
    sources: list[bytes] = []
    region = b""
    for change in changes:
        if change.source is not None:
            sources.append(change.source)
        path = change.path
        if region and path.startswith(region):
            continue
        if change.kind == "D":
            items.setdefault(path, Item.WHITEOUT)
            continue
        if change.type == "directory" and (
            change.kind == "R" or (change.kind == "A" and _is_dir(before, path))
        ):
            region = path + b"/"
            _include_tree(path, items, after, before)
        else:
            items[path] = _node(change, before)
    for source in sources:
        if source not in items and after.node(source) is None and before.node(source) is not None:
            if _is_dir(after, source.rpartition(b"/")[0]):
                items[source] = Item.WHITEOUT
    _join_links(items, after)
    for path in list(items):
        while path:
            path = path.rpartition(b"/")[0]
            if path in items:
                break
            items[path] = Item.NODE
    items.setdefault(b"", Item.NODE)
    return dict(sorted(items.items(), key=lambda item: item[0].replace(b"/", b"\0")))


def everything(tree: Tree, top: bytes = b"") -> Iterator[tuple[bytes, Item]]:
    """Yield all paths of a tree, from *top* on, as a plan has them. Blocks; OSError."""
    waiting = [top]
    while waiting:
        path = waiting.pop()
        yield path, Item.NODE
        waiting += [join(path, name) for name in sorted(tree.names(path), reverse=True)]


def _is_dir(tree: Tree, path: bytes) -> bool:
    node = tree.node(path)
    return node is not None and node.is_dir


def _node(change: Change, before: Tree) -> Item:
    if change.kind == "M":
        return Item.REPLACED if "type" in change.what else Item.NODE
    was = before.node(change.path)  # a change may also replace a path that was renamed
    return Item.REPLACED if was is not None and was.is_dir != (change.type == "directory") else Item.NODE


def _include_tree(top: bytes, items: Plan, after: Tree, before: Tree) -> None:
    """Add everything in the tree at *top*, and hide what the lowers have there."""
    waiting = [top]
    while waiting:
        path = waiting.pop()
        node, was = after.node(path), before.node(path)
        if node is None:
            continue
        differs = was is not None and stat.S_IFMT(was.attr.st_mode) != stat.S_IFMT(node.attr.st_mode)
        items[path] = Item.REPLACED if differs else Item.NODE
        if node.is_dir:
            names = after.names(path)
            if was is not None and was.is_dir:
                items.update((join(path, name), Item.WHITEOUT) for name in before.names(path) - names)
            waiting += [join(path, name) for name in sorted(names, reverse=True)]


def _join_links(items: Plan, after: Tree) -> None:
    """If one name of an inode is in the layer, add its other names, which would show the lower's inode."""
    known: dict[tuple[int, int, int], int] = {}
    beside: dict[tuple[int, int, int], set[bytes]] = {}
    for path, item in items.items():
        node = after.node(path) if item is not Item.WHITEOUT else None
        if node is not None and not node.is_dir and node.attr.st_nlink > 1:
            known[node.identity] = known.get(node.identity, node.attr.st_nlink) - 1
            beside.setdefault(node.identity, set()).add(path.rpartition(b"/")[0])
    missing = {identity: count for identity, count in known.items() if count > 0}
    for directory in set().union(*(beside[identity] for identity in missing)):
        _find_beside(directory, missing, items, after)
    left = sum(missing.values())
    for path in after.others([identity for identity, count in missing.items() if count > 0]):
        left -= path not in items
        items.setdefault(path, Item.NODE)
        if left <= 0:
            break  # the tree may be a whole system


def _find_beside(
    directory: bytes, missing: dict[tuple[int, int, int], int], items: Plan, after: Tree
) -> None:
    """Search for the missing names of inodes in a directory with another of their names, where most are."""
    for name in after.names(directory):
        path = join(directory, name)
        if path in items or (node := after.node(path)) is None:
            continue
        if not node.is_dir and missing.get(node.identity, 0) > 0:
            missing[node.identity] -= 1
            items[path] = Item.NODE
