"""The data to browse: read the tree of changes and their differences, and revert them. Draws nothing.

All functions block and belong to one thread. A store that is not mounted is open for reading while the user
browses, and closed while changes are reverted.
"""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice

from cowfs.api import Changes, Done, Lowers, Tell, open_changes, take_back
from cowfs.changes import explain
from cowfs.changes.patch import patch
from cowfs.changes.render import Summary, escape, line
from cowfs.changes.version import Version
from cowfs.client import checked_answer
from cowfs.errors import printable
from cowfs.types import Change

_LARGEST = 4 << 20
"""The size in bytes of the largest file that is compared."""
_MOST = 64 << 10
"""How many bytes of a diff are shown."""
_MOST_FILES = 200
"""How many files of a deleted or renamed directory are shown."""
_FOR_GIT = ("index ", "similarity ")
"""How lines of a patch begin that only git needs."""
_LONGEST = 1000
"""How many characters of a line are shown."""


class Entry:
    """A changed path, or a directory with changes in it. It stores its name, not its path, to save memory."""

    __slots__ = ("_change", "children", "count", "name", "parent")

    def __init__(self, name: bytes, parent: Entry | None) -> None:
        self.name = name
        self.parent = parent
        self._change: Change | None = None
        self.children: dict[bytes, Entry] = {}
        self.count = 0
        """The number of changes here and below."""

    @property
    def path(self) -> bytes:
        return b"/".join(each.name for each in reversed([*self.ways()][:-1]))

    @property
    def change(self) -> Change | None:
        return None if self._change is None else replace(self._change, path=self.path)

    @property
    def is_directory(self) -> bool:
        return bool(self.children) or self._change is None or self._change.type == "directory"

    def ways(self) -> Iterator[Entry]:
        """Yield this entry and those above it, the root last."""
        entry: Entry | None = self
        while entry is not None:
            yield entry
            entry = entry.parent

    def find(self, path: bytes) -> Entry:
        """Return the entry of *path*, or the nearest existing entry above it."""
        entry = self
        for name in filter(None, path.split(b"/")):
            child = entry.children.get(name)
            if child is None:
                break
            entry = child
        return entry

    def add(self, change: Change) -> None:
        """Add a change to the tree below this entry, the root."""
        entry = self
        entry.count += 1
        for name in filter(None, change.path.split(b"/")):
            child = entry.children.get(name)
            if child is None:
                child = entry.children[name] = Entry(name, entry)
            entry = child
            entry.count += 1
        entry._change = replace(change, path=b"")

    def below(self) -> Iterator[Change]:
        waiting = [*reversed(self.children.values())]
        while waiting:
            entry = waiting.pop()
            change = entry.change
            if change is not None:
                yield change
            waiting.extend(reversed(entry.children.values()))


class Source:
    """The changes of a store or a mount."""

    def __init__(self, what: str, lowers: Lowers, since: str | None, tell: Tell) -> None:
        self.what = what
        self.since = since
        self.found = 0
        """How many changes :meth:`read` has found so far. Any thread may read it."""
        self.stopped = False
        """Any thread may set it to make :meth:`read` end early."""
        self._lowers = lowers
        self._tell = tell
        self._stack = ExitStack()
        self._changes: Changes | None = None

    def open(self) -> Changes:
        """Return the open changes; open them if necessary. CowfsError."""
        if self._changes is None:
            opening = open_changes(self.what, self._lowers, self._tell, since=self.since)
            self._changes = self._stack.enter_context(opening)
        return self._changes

    def close(self) -> None:
        """Close the changes. The next call of another method opens them again."""
        self._changes = None
        self._stack.close()

    def read(self) -> Entry:
        """Read all changes; return the root of their tree."""
        self.close()
        root = Entry(b"", None)
        self.found = 0
        for change in self.open():
            root.add(change)
            self.found += 1
            if self.stopped:
                break
        return root

    def explain(self, entry: Entry) -> str:
        """Return the explanation of a path, as ``cowfs explain`` prints it."""
        answer = self.open().explain(entry.path)
        with checked_answer(self.what):
            lines = list(explain.render(answer, escape(entry.path) or "/", explain.date_of))
        return "\n".join(map(printable, lines))

    def diff(self, entry: Entry) -> str:
        """Return the differences of a path: a patch, or for a directory a summary of the changes below it."""
        change = entry.change
        head = [line(change)] if change is not None else []
        below = entry.count - (change is not None)
        if below:
            counts = Summary()
            for _ in counts.counted(entry.below()):
                pass
            kinds = Counter(each.type for each in entry.below())
            types = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
            head.append(f"Below {escape(entry.path) or '/'}: {counts} ({types}).")
        if change is None:
            return "\n".join(head)
        return "\n".join([*map(printable, head), "", *self._patch(entry, change)])

    def _patch(self, entry: Entry, change: Change) -> Iterator[str]:
        sides = _Sides(self.open(), whole=change.kind in "DR" or "type" in change.what)
        # Below a renamed directory the old version has another path, which patch() finds from the rename.
        above = [each.change for each in entry.ways() if each is not entry and each.change is not None]
        renames = [replace(each, what=()) for each in reversed(above) if each.kind == "R"]
        if renames:
            sides.whole = False
        elif any(
            version is not None and version.attr.st_size > _LARGEST
            for version in (sides.before(change.path), sides.after(change.path))
        ):
            yield f"Not compared: the file is larger than {_LARGEST >> 20} MiB."
            return
        room = _MOST
        needless = _FOR_GIT if change.type == "directory" else (*_FOR_GIT, "diff --git ")
        for piece in patch([*renames, change], sides):
            lines = list(_shown(piece[:room]))
            head = next((number for number, each in enumerate(lines) if each.startswith("@@")), len(lines))
            yield from (each for each in lines[:head] if not each.startswith(needless))
            yield from lines[head:]
            room -= len(piece)
            if room <= 0:
                yield "(The rest is left out.)"
                return

    def revert(self, paths: Sequence[bytes]) -> list[Done]:
        """Revert *paths* and everything below them. An empty path is the root."""
        everything = b"" in paths
        return self._take_back("revert", None if everything else [glob.escape(path) for path in paths])

    def undo(self) -> list[Done]:
        """Undo the last revert."""
        return self._take_back("undo", None)

    def _take_back(self, asked: str, paths: Sequence[bytes] | None) -> list[Done]:
        self.close()  # a revert needs the store for itself
        return list(take_back(self.what, asked, paths, self._lowers, tell=self._tell))


class _Sides:
    """The two versions of each path, without large files and long lists."""

    def __init__(self, changes: Changes, *, whole: bool) -> None:
        self._changes = changes
        self.whole = whole
        """Whether to show the content of a deleted or renamed directory."""

    def before(self, path: bytes) -> Version | None:
        return self._changes.before(path)

    def after(self, path: bytes) -> Version | None:
        return self._changes.after(path)

    def files_before(self, path: bytes) -> Iterator[bytes]:
        if self.whole:
            yield from islice(filter(self._is_small, self._changes.files_before(path)), _MOST_FILES)

    def _is_small(self, path: bytes) -> bool:
        version = self.before(path)
        return version is not None and version.attr.st_size <= _LARGEST


def _shown(text: bytes) -> Iterator[str]:
    """Yield the lines of a text, without control characters."""
    lines = text.decode(errors="surrogateescape").split("\n")
    for each in lines[:-1] if not lines[-1] else lines:
        cut = each[:_LONGEST].expandtabs(8)
        yield printable(cut) + ("…" if len(each) > _LONGEST else "")


def topmost(entries: Iterable[Entry]) -> list[Entry]:
    """Return those of *entries* that are below no other of them."""
    chosen = {entry.path: entry for entry in entries}
    return [
        entry
        for entry in chosen.values()
        if not any(above.path in chosen for above in entry.ways() if above is not entry)
    ]
