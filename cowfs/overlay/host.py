"""The callbacks of the union to the program that serves it and keeps its store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cowfs.overlay.node import Node


@dataclass(slots=True)
class Host:
    """The callbacks. The program that serves the union sets them all before others use the union."""

    # --- the store

    make_room: Callable[[], bool] = lambda: False
    """Called when the upper is full; True: there is more room now, try again."""
    not_saved: Callable[[OSError], None] = lambda error: None
    """Called when the upper could not write data to the disk."""
    wants_rest: Callable[[], bool] = lambda: True
    """Whether partly copied files should be completed while nobody waits for them."""

    # --- deferred work

    rest_soon: Callable[[], None] = lambda: None
    """Called when there is one more of these files."""
    sweep_soon: Callable[[], None] | None = None
    """Called when there is much rubbish, to arrange a call of :func:`~cowfs.overlay.whiteout.sweep`; if None,
    it is swept at once."""

    # --- what is in use

    close_idle: Callable[[Node], bool] = lambda node: True
    """Called before an inode gets other data: closes its idle descriptors; False if one is in use at the
    moment."""
    end_writes: Callable[[Node], bool] = lambda node: True
    """Called before an inode is frozen: closes what is kept open for writing; False if that is in use at the
    moment."""
    is_still: Callable[[], bool] = lambda: True
    """Whether no thread changes the data of a file."""
    opened: Callable[[], list[Node]] = list
    """The open files of the tree, as far as we know them …"""
    lent: Callable[[], list[Node]] = list
    """… and those that the kernel itself reads and writes, or may."""
    prune: Callable[[], None] = lambda: None
    """Asks the kernel to forget those that are not in use; it reports later which it forgot. Blocks."""
    rolled_back: Callable[[], None] = lambda: None
    """Called after the whole tree has become another."""
