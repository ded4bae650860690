"""What the union asks of those who serve it and keep its store, and what it tells them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cowfs.overlay.node import Node


@dataclass(slots=True)
class Host:
    """Each is set by whoever can answer it; until then nobody else uses the union, and nothing can be had."""

    # --- of the store

    make_room: Callable[[], bool] = lambda: False
    """Called when the upper is full; True: there is more room now, try again."""
    not_saved: Callable[[OSError], None] = lambda error: None
    """Called when the upper could not put on disk what was written to it."""
    wants_rest: Callable[[], bool] = lambda: True
    """Whether files that are copied up in part shall become whole while nobody waits for that."""

    # --- of what is done later

    rest_soon: Callable[[], None] = lambda: None
    """Called when there is one more of these files."""
    sweep_soon: Callable[[], None] | None = None
    """Called when there is much rubbish, to let somebody call :func:`~cowfs.overlay.whiteout.sweep`; without
    it that is done at once."""

    # --- of what is in use

    close_idle: Callable[[Node], bool] = lambda node: True
    """Called before an inode gets other data: closes what is open of it for nobody; False if it is in use at
    the moment."""
    end_writes: Callable[[Node], bool] = lambda node: True
    """Called before an inode is frozen: closes what is kept open to write to it; False if that is in use at
    the moment."""
    is_still: Callable[[], bool] = lambda: True
    """Whether no thread changes the data of a file."""
    opened: Callable[[], list[Node]] = list
    """What is open of the tree, as far as we are told of it …"""
    lent: Callable[[], list[Node]] = list
    """… and what of it the kernel reads and writes by itself, or may."""
    prune: Callable[[], None] = lambda: None
    """Asks the kernel to forget what of that is not in use, which it tells later. Blocks."""
    rolled_back: Callable[[], None] = lambda: None
    """Called after the whole tree has become another."""
