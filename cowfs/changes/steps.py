"""The steps of commands that change a store while others may use it, and what they yield in between."""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from cowfs.overlay import uncover
from cowfs.overlay.node import Node
from cowfs.overlay.overlay import Overlay

Forget = Callable[[uncover.Stale], None]
"""Tells the kernel to drop stale cache entries. Blocks: call it in a thread."""


class Done(NamedTuple):
    """A step that was done, or could not be done."""

    path: bytes
    why_not: str = ""
    kind: str = ""
    size: int = 0
    """Bytes of the store that the step freed; 0 for steps whose purpose is another."""


class Seen(NamedTuple):
    """The number of changes examined so far."""

    changes: int
    whole: int = 0
    """About how many there are in all; 0 if not known."""


Look = Generator[Done | Seen | None, None, bool]
"""Returns whether there is something to do."""
Progress = Iterator[Done | Seen | Callable[[], None] | None]
"""None when others may do something; a callable for a thread to call before the next step."""

OFTEN = 1000
"""Changes between two reports of progress."""


@dataclass(slots=True)
class Found:
    """A path of the merged tree."""

    parent: Node
    name: bytes
    nodes: list[Node] = field(default_factory=list)
    """The directories on the way, the root first."""


def is_open(fs: Overlay, node: Node) -> bool:
    """Whether a file is open, as far as cowfs knows: with images only, the kernel does not report opens."""
    return not fs.host.close_idle(node) or node.handles is not None


def find(fs: Overlay, path: bytes) -> Found:
    """Return the directory of a path, and the name in it. Blocks.

    ENOENT if the directory does not exist, EXDEV below a volatile directory.
    """
    node = fs.root
    nodes = [node]
    *directories, name = path.split(b"/")
    for directory in directories:
        found = fs.lookup(node, directory)
        if found is None or not found[0].is_dir:
            raise FileNotFoundError(errno.ENOENT, "no such directory", path)
        node = found[0]
        nodes.append(node)
    child = fs.nodes.child(node, name)
    must_be_kept(fs, node if child is None else child)
    return Found(node, name, nodes)


def must_be_kept(fs: Overlay, node: Node) -> None:
    """Raise EXDEV for a node below a volatile directory: it is not in the store
    (:mod:`cowfs.overlay.graft`)."""
    if fs.union_of(node) is not fs:
        raise OSError(errno.EXDEV, "is below a volatile directory of this mount", node.name)


def why(error: OSError) -> str:
    """Return why a step could not be done, for users."""
    if error.errno == errno.EBUSY:
        return "its data is still being copied to the store; try again later"
    if error.errno == errno.EEXIST:
        return "something else is there now"
    return error.strerror or str(error)
