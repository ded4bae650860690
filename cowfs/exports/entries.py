"""Feed the paths of an export, one after the other, to what writes it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Protocol

from cowfs.changes.scan import GONE
from cowfs.changes.version import Node, Tree
from cowfs.exports.losses import Losses
from cowfs.exports.plan import Item
from cowfs.layers.base import File

PIECE = 1 << 20
Tick = Callable[[bytes, int], None]
"""Reports progress: called with a path, and the number of bytes read of it."""
CAPABILITY = b"security.capability"
_PRIVILEGED = (b"security.", b"trusted.")
"""The prefixes of xattrs that only root may set."""
Withheld = Mapping[str, str]
"""The reason, for each of ``nosuid`` and ``nodev``, that no set-ID bits, or no devices, are written."""
NOTHING: Withheld = {}


@dataclass(frozen=True, slots=True)
class Entry:
    """One path of an export."""

    path: bytes
    node: Node
    mode: int
    """The mode of the node, without withheld bits."""
    mtime_ns: int
    xattrs: dict[bytes, bytes]
    same_as: bytes | None
    """An earlier path of the same inode, if any."""

    @property
    def size(self) -> int:
        """The number of bytes of data that follow."""
        return self.node.attr.st_size if stat.S_ISREG(self.mode) and self.same_as is None else 0


class Sink(Protocol):
    """Writes an export."""

    def add(self, entry: Entry) -> None:
        """Write the inode of a path."""

    def whiteout(self, path: bytes) -> None:
        """Write that *path* of the lowers is deleted."""


def feed(
    items: Iterable[tuple[bytes, Item]],
    tree: Tree,
    sink: Sink,
    losses: Losses,
    tick: Tick,
    latest: int | None,
    withheld: Withheld = NOTHING,
) -> None:
    """Pass all of *items* to *sink*. Blocks; OSError with the path.

    Times later than *latest*, in seconds since the epoch, become *latest*. Leaves out what is *withheld*, and
    notes it in *losses*.
    """
    first: dict[tuple[int, int, int], bytes] = {}
    for path, item in items:
        tick(path, 0)
        if item is Item.WHITEOUT:
            sink.whiteout(path)
            continue
        try:
            entry = _entry(path, tree, first, losses, latest)
        except GONE:
            entry = None
        except OSError as error:
            raise _named(error, path) from None
        if entry is None:
            losses.add("left out, because they were deleted during the export", path)
        elif "nodev" in withheld and (stat.S_ISCHR(entry.mode) or stat.S_ISBLK(entry.mode)):
            losses.add(f"devices left out, because {withheld['nodev']}", path)
        else:
            sink.add(_without_privilege(entry, withheld["nosuid"], losses) if "nosuid" in withheld else entry)


def _without_privilege(entry: Entry, why: str, losses: Losses) -> Entry:
    """Return the entry without set-ID bits, capabilities, and xattrs that only root may set."""
    has = not stat.S_ISDIR(entry.mode) and entry.mode & (stat.S_ISUID | stat.S_ISGID)
    if has or CAPABILITY in entry.xattrs:
        losses.add(f"files without their set-ID bits and capabilities, because {why}", entry.path)
    xattrs = {name: value for name, value in entry.xattrs.items() if not name.startswith(_PRIVILEGED)}
    if len(xattrs) < len(entry.xattrs) - (CAPABILITY in entry.xattrs):
        losses.add(f"files without xattrs of security.* and trusted.*, because {why}", entry.path)
    return replace(entry, mode=entry.mode & ~has, xattrs=xattrs)


def _entry(
    path: bytes, tree: Tree, first: dict[tuple[int, int, int], bytes], losses: Losses, latest: int | None
) -> Entry | None:
    node = tree.node(path)
    if node is None:
        return None
    same_as = None
    if not node.is_dir and node.attr.st_nlink > 1:
        same_as = first.setdefault(node.identity, path)
    mtime = node.attr.st_mtime_ns
    if latest is not None and mtime > latest * 1_000_000_000:
        mtime = latest * 1_000_000_000
        losses.add("times later than SOURCE_DATE_EPOCH, changed to that", path, exact=False)
    xattrs = node.xattrs() if same_as in {None, path} else {}
    same_as = None if same_as == path else same_as
    return Entry(path, node, node.attr.st_mode, mtime, dict(sorted(xattrs.items())), same_as)


def data_runs(file: File, size: int) -> list[tuple[int, int]]:
    """Return the runs of data of a file as ``(start, stop)`` in bytes, in order, adjacent ones joined."""
    runs: list[tuple[int, int]] = []
    for start, stop in file.segments(size):
        if runs and runs[-1][1] >= start:
            runs[-1] = runs[-1][0], stop
        elif stop > start:
            runs.append((start, stop))
    return runs


def copy(
    entry: Entry, file: File, runs: Iterable[tuple[int, int]], write: Callable[[bytes, int], object],
    losses: Losses, tick: Tick,
) -> None:  # fmt: skip
    """Write the data of these runs, as many bytes as the attributes say. Blocks; OSError with the path."""
    is_short = False
    for start, stop in runs:
        for position in range(start, stop, PIECE):
            length = min(PIECE, stop - position)
            data = b"".join(_read(entry.path, file, length, position))
            if len(data) < length:
                is_short = True
                data = data.ljust(length, b"\0")
            write(data, position)
            tick(entry.path, length)
    if (
        is_short
        or (now := file.stat()).st_size != entry.size
        or now.st_mtime_ns != entry.node.attr.st_mtime_ns
    ):
        if file.fileno() >= 0 or is_short:
            losses.add("changed during the export, may be inconsistent", entry.path)


def _read(path: bytes, file: File, length: int, position: int) -> Iterator[bytes]:
    while length:
        try:
            piece = file.pread(length, position)
        except OSError as error:
            raise _named(error, path) from None
        if not piece:
            return
        yield piece
        length -= len(piece)
        position += len(piece)


def opened(entry: Entry) -> closing[File]:
    """Open the data of an entry. OSError with the path."""
    try:
        return closing(entry.node.open())
    except OSError as error:
        raise _named(error, entry.path) from None


def target_of(entry: Entry) -> bytes:
    """Return the target of a symbolic link. OSError with the path."""
    try:
        return entry.node.target()
    except OSError as error:
        raise _named(error, entry.path) from None


def _named(error: OSError, path: bytes) -> OSError:
    return OSError(error.errno, error.strerror or os.strerror(error.errno or 0), b"/" + path)
