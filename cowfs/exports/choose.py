"""Let the user choose which changes to apply."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cowfs.changes.version import Tree
from cowfs.exports.conflicts import has_attributes
from cowfs.exports.plan import Item, Plan

Ask = Callable[[str, bytes, str], bool]
"""Asks whether to apply a change: its kind (A, D or M), its path, and the conflict there, or ""."""


def chosen(items: Plan, before: Tree, after: Tree, bad: Mapping[bytes, str], ask: Ask) -> Plan:
    """Return those of *items* that the user wants, and the directories above them.

    Blocks; OSError. It does not ask about directories that only have another time, or about the content of an
    unwanted directory that is new or has another type.
    """
    wanted: set[bytes] = set()
    aside: set[bytes] = set()
    """Directories that it did not ask about."""
    refused, is_whole = b"", True
    for path, item in items.items():
        if refused and path.startswith(refused):
            continue
        was = before.node(path)
        to_be = None if item is Item.WHITEOUT else after.node(path)
        stays = was is not None and to_be is not None and was.is_dir and to_be.is_dir
        if was and to_be and stays and path not in bad and has_attributes(was, to_be):
            aside.add(path)
            continue
        kind = "D" if to_be is None else "A" if was is None else "M"
        inside = (why for below, why in bad.items() if not stays and below.startswith(path + b"/"))
        conflict = bad.get(path) or next((f"something in it {why}" for why in inside), "")
        if ask(kind, path, conflict):
            wanted.add(path)
            continue
        is_whole = False
        if not stays:
            refused = path + b"/"
    these = _with_above(wanted, aside, is_whole=is_whole)
    return {path: item for path, item in items.items() if path in these}


def _with_above(wanted: set[bytes], aside: set[bytes], *, is_whole: bool) -> set[bytes]:
    """Return *wanted*, and those of *aside* that are above one of them; all if *is_whole*."""
    if is_whole:
        return wanted | aside
    above: set[bytes] = set()
    for path in wanted:
        while path:
            path = path.rpartition(b"/")[0]
            above.add(path)
    return wanted | (aside & above)
