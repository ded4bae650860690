"""Select changes by path, and by what differs."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from cowfs.changes.pairs import Sides
from cowfs.changes.render import escape
from cowfs.errors import UsageError
from cowfs.types import Change

ASPECTS = ("type", "content", "mode", "owner", "times", "xattrs", "target", "device")
"""What can differ between two versions of a file, see :func:`cowfs.changes.compare.compare`."""
ALL = frozenset(ASPECTS)
CONTENT = frozenset({"type", "content", "target", "device"})
METADATA = frozenset({"mode", "owner", "times", "xattrs"})
_SAME = {
    "mtime": "times",
    "time": "times",
    "xattr": "xattrs",
    "acl": "xattrs",
    "uid": "owner",
    "gid": "owner",
}


def aspect(name: str) -> str | None:
    """Return the aspect with the name or synonym *name* (``mtime`` is ``times``); None if there is none."""
    name = _SAME.get(name, name)
    return name if name in ASPECTS else None


@dataclass(frozen=True, slots=True)
class Selection:
    """Paths and aspects that select changes."""

    patterns: tuple[re.Pattern[bytes], ...] = ()
    """One of them must match the path, or a directory above it. Without patterns, all paths match."""
    aspects: frozenset[str] = frozenset(ASPECTS)
    """A modification of other aspects only is not selected."""
    texts: tuple[bytes, ...] = ()
    """The paths and globs that the patterns were made from."""

    def must_exist(self, sides: Sides, what: str) -> None:
        """UsageError if a path, not a glob, exists neither in the lowers nor in the tree. Blocks; OSError.

        *what* is the tree's name, for the message.
        """
        for text in self.texts:
            path = plain(normal(text))
            if path and sides.after(path) is None and sides.before(path) is None:
                raise UsageError(
                    f"{what}: no {escape(path)} in it, now or before",
                    "give the path from the root of the tree",
                )

    @property
    def places(self) -> tuple[bytes, ...]:
        """Paths at or below which everything is that is selected; none if it may be anywhere."""
        places = tuple(map(_place, self.texts))
        return () if b"" in places or len(places) < len(self.patterns) else places

    def of(self, changes: Iterable[Change]) -> Iterator[Change]:
        """Yield the selected *changes*, each with only the selected aspects."""
        return (change for change in self.among(changes) if change is not None)

    def among(self, changes: Iterable[Change | None]) -> Iterator[Change | None]:
        """Yield the selected changes, and None for each other one and for each None in *changes*.

        If the old or new path of a renamed directory is selected, all changes below it are selected.
        """
        renamed = b""
        for change in changes:
            if change is None:
                yield None
                continue
            is_below = bool(renamed) and change.path.startswith(renamed)
            if not (
                is_below
                or self.matches(change.path)
                or (change.source is not None and self.matches(change.source))
            ):
                yield None
                continue
            if change.kind == "R" and change.type == "directory" and not is_below:
                renamed = change.path + b"/"
            yield self._reduced(change)

    def _reduced(self, change: Change) -> Change | None:
        what = tuple(each for each in change.what if each in self.aspects)
        if change.kind == "M" and not what:
            return None
        if len(what) == len(change.what):
            return change
        return replace(change, what=what, xattrs=change.xattrs if "xattrs" in what else ())

    def matches(self, path: bytes) -> bool:
        """Whether a path is selected."""
        return not self.patterns or any(pattern.match(path) for pattern in self.patterns)


def selected(texts: Iterable[bytes], aspects: frozenset[str] = frozenset(ASPECTS)) -> Selection:
    """Return the selection of paths and globs."""
    texts = tuple(texts)
    return Selection(tuple(map(pattern, texts)), aspects, texts)


def pattern(text: bytes) -> re.Pattern[bytes]:
    """Return a pattern that matches a path or glob, from the root of the tree, and everything below it.

    In a glob, ``*`` and ``?`` also match slashes, as in git: ``*.conf`` matches in all directories. A glob
    also matches the path that is spelled like it: ``[x]`` matches the directory ``[x]`` as well as ``x``. The
    result of :func:`glob.escape` matches only that path. UsageError for ``..``.
    """
    path = normal(text)
    if not path:
        return re.compile(b"")
    exact = plain(path)
    if exact is not None:
        body = re.escape(exact)
    else:
        glob = fnmatch.translate(path.decode("latin-1"))
        body = b"(?:%s|%s)" % (re.sub(r"\\[Zz]\Z", "", glob).encode("latin-1"), re.escape(path))
    return re.compile(b"(?:%s)(?:/|\\Z)" % body, re.DOTALL)


def _place(text: bytes) -> bytes:
    """Return the path that a pattern matches; of a glob, the directory that contains all that it matches."""
    path = normal(text)
    exact = plain(path)
    return re.split(rb"[*?[]", path)[0].rpartition(b"/")[0] if exact is None else exact


def normal(path: bytes) -> bytes:
    """Return a path from the root of the tree without redundant parts: ``./etc//apt/`` becomes ``etc/apt``.

    ``.`` and ``/`` are the root, whose path is empty. UsageError for ``..``: such a path is not relative to
    the tree's root.
    """
    parts = [part for part in path.split(b"/") if part not in {b"", b"."}]
    if b".." in parts:
        raise UsageError(f"{escape(path)}: has .. in it", "give the path from the root of the tree")
    return b"/".join(parts)


def plain(text: bytes) -> bytes | None:
    """Return the path that a pattern matches, without escapes; None if the pattern is a glob."""
    rest = re.sub(rb"\[[*?[]\]", b"", text)
    if any(character in rest for character in b"*?["):
        return None
    return re.sub(rb"\[([*?[])\]", rb"\1", text)
