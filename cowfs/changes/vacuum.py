"""Remove from a store what makes no difference: unchanged copies, useless whiteouts and directories."""

from __future__ import annotations

import stat
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress

from cowfs.changes.compare import Inode, compare
from cowfs.changes.diff import in_order
from cowfs.changes.lowers import must_not_wait
from cowfs.changes.paths import join
from cowfs.changes.scan import entries
from cowfs.changes.steps import OFTEN, Done, Forget, Look, Progress, Seen, is_open
from cowfs.layers.base import Key
from cowfs.overlay import uncover
from cowfs.overlay.lookup import number_of, shown_below
from cowfs.overlay.node import Node
from cowfs.overlay.overlay import Overlay
from cowfs.overlay.stack import Hit
from cowfs.types import Attr


def vacuum(fs: Overlay, forget: Forget, *, dry_run: bool = False) -> Progress:
    """Remove from the store everything that makes no visible difference; with *dry_run*, only list it.

    Inodes in use keep their numbers, and open files stay open. Calls of the layers block, and so do the
    callables that it yields. MountFailure if a lower may wait for other processes.
    """
    must_not_wait(fs.lowers)
    return _Vacuum(fs, forget, dry_run).run()


def is_needed(fs: Overlay) -> Look:
    """Return whether :func:`vacuum` would remove anything from a store, which is only read. Blocks."""
    for step in vacuum(fs, lambda _: None, dry_run=True):
        if isinstance(step, Done):
            return True
        yield step if isinstance(step, Seen) else None
    return False


class _Vacuum:
    def __init__(self, fs: Overlay, forget: Forget, dry_run: bool) -> None:
        self._fs = fs
        self._forget = forget
        self._gone: dict[bytes, set[bytes]] | None = {} if dry_run else None
        """With *dry_run*, the names that would have been removed, by directory; else None."""

    def run(self) -> Progress:
        levels: list[tuple[bytes, Node, Iterator[bytes]]] = [(yield from self._level(b"", self._fs.root))]
        stats = None if self._fs.upper.has_descriptors else self._fs.upper.statfs()  # only an image knows
        whole, looked_at = 0 if stats is None else stats.files - stats.ffree, 0
        while levels:
            path, directory, names = levels[-1]
            name = next(names, None)
            yield Seen(looked_at, whole) if looked_at % OFTEN == 0 else None
            looked_at += name is not None
            if name is None:
                levels.pop()
                if path:
                    yield from self._directory(path, directory)
                continue
            with suppress(OSError):  # removed meanwhile
                child = yield from self._entry(directory, name, join(path, name))
                if child is not None:
                    levels.append((yield from self._level(join(path, name), child)))

    def _level(
        self, path: bytes, directory: Node
    ) -> Generator[None, None, tuple[bytes, Node, Iterator[bytes]]]:
        names: set[bytes] = set()
        for entry in entries(self._fs.upper, directory.upper) if directory.upper is not None else ():
            if entry is None:
                yield
            else:
                names.add(entry.name)
        return path, directory, iter((yield from in_order(names)))

    def _entry(
        self, parent: Node, name: bytes, path: bytes
    ) -> Generator[Done | Seen | Callable[[], None] | None, None, Node | None]:
        """Examine one name of the upper; return its node if it is a directory to descend into."""
        fs = self._fs
        found = fs.upper.lookup(parent.upper, name) if parent.upper is not None else None
        if found is None:
            return None
        key, attr = found
        below = shown_below(fs, parent, name)
        if fs.is_whiteout(key, attr):
            if below is None:
                yield from self._remove(parent, name, path, "whiteout", 0)
            return None
        looked = fs.lookup(parent, name)
        if looked is None:
            return None
        node = looked[0]
        if fs.union_of(node) is not fs:
            return None
        if node.is_dir:
            return node
        if below is not None and self._may_go(node, below):
            if (yield from self._is_same(node, key, attr, parent, name)):
                yield from self._remove(parent, name, path, "copy", attr.st_blocks * 512)
        if node.copying is None:
            fs.release(node)  # there may be many
        return None

    def _may_go(self, node: Node, below: Hit) -> bool:
        """Whether a copy that equals what is below it can be removed: no inode in use changes its number."""
        if node.indexed is not None or node.partial is not None or node.copying is not None:
            return False
        if node.lookups and node.ino != number_of(self._fs, below):
            return False
        return not is_open(self._fs, node)

    def _is_same(
        self, node: Node, key: Key, attr: Attr, parent: Node, name: bytes
    ) -> Generator[None, None, bool]:
        """Compare a file with the lower's in everything that users can see, including the exact mtime."""
        fs = self._fs
        found = fs.stack.find(parent.lowers, name)
        below = found[0]
        if attr.st_nlink > 1 or below[2].st_nlink > 1:
            return False  # users also see which names are one file, and how many
        new = Inode(fs.upper, key, attr)
        old = Inode(fs.lowers[below[0]], below[1], below[2])
        if len(found) > 1 and stat.S_ISREG(below[2].st_mode):
            old.data = fs.lowers[found[-1][0]], found[-1][1]
        if node.metacopy:
            layer, data = node.lowers[-1]
            new.data = fs.lowers[layer], data
        if stat.S_ISREG(attr.st_mode) and attr.st_mtime_ns != below[2].st_mtime_ns:
            return False
        return not (yield from compare(new, old, self._fs.format))

    def _remove(self, parent: Node, name: bytes, path: bytes, kind: str, size: int) -> Progress:
        if self._gone is not None:
            self._pretend(path)
        else:
            stale: uncover.Stale = []
            with uncover.keeping_times(self._fs, parent):
                uncover.uncover(self._fs, parent, name, None, stale)
            yield lambda: self._forget(stale)
        yield Done(path, kind=kind, size=size)

    def _pretend(self, path: bytes) -> None:
        if self._gone is not None:
            directory, _, name = path.rpartition(b"/")
            self._gone.setdefault(directory, set()).add(name)

    def _directory(self, path: bytes, node: Node) -> Progress:
        fs = self._fs
        if node.dead or node.upper is None:
            return
        stale: uncover.Stale = []
        pretended = None if self._gone is None else self._gone.pop(path, set())
        with suppress(OSError):
            size = fs.upper.stat(node.upper).st_blocks * 512
            if uncover.drop_directory(fs, node, stale, any_times=False, dry_run=pretended):
                self._pretend(path)
                if stale:
                    yield lambda: self._forget(stale)
                yield Done(path, kind="directory", size=size)
        fs.release(node)
