"""Let the user choose which changes to apply."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cowfs.changes.version import Tree
from cowfs.exports.plan import Item, Plan

Ask = Callable[[str, bytes, str], bool]
"""Asks whether to apply a change: its kind (A, D or M), its path, and the conflict there, or ""."""


def chosen(items: Plan, before: Tree, after: Tree, bad: Mapping[bytes, str], ask: Ask) -> Plan:
    """Return those of *items* that the user wants, with the directories above them.

    Blocks; OSError. It does not ask about directories that exist before and after, or about the content of
    an unwanted directory.
    """
    wanted: Plan = {}
    refused = b""
    for path, item in items.items():
        if refused and path.startswith(refused):
            continue
        was = before.node(path)
        to_be = None if item is Item.WHITEOUT else after.node(path)
        if was is not None and to_be is not None and was.is_dir and to_be.is_dir and path not in bad:
            wanted[path] = item
            continue
        kind = "D" if to_be is None else "A" if was is None else "M"
        inside = (why for below, why in bad.items() if below.startswith(path + b"/"))
        conflict = bad.get(path) or next((f"something in it {why}" for why in inside), "")
        if ask(kind, path, conflict):
            wanted[path] = item
        else:
            refused = path + b"/"
    return wanted
