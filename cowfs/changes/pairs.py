"""The files that differ, as git sees them: for a renamed or deleted directory, its files."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

from cowfs.changes.paths import is_below
from cowfs.changes.render import escape
from cowfs.changes.spool import Spool
from cowfs.changes.version import Version
from cowfs.types import Change


class Sides(Protocol):
    """Where the two versions of a path are read from."""

    def before(self, path: bytes) -> Version | None:
        """Return what the lowers have at *path*."""

    def after(self, path: bytes) -> Version | None:
        """Return what the merged tree has at *path*."""

    def files_before(self, path: bytes) -> Iterator[bytes]:
        """Yield the paths of everything the lowers have below the directory *path*, except directories."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One file, before and after."""

    old_path: bytes
    new_path: bytes
    old: Version | None
    new: Version | None


def files(changes: Iterable[Change], sides: Sides) -> Iterator[Pair | bytes]:
    """Yield each file that differs, as git sees it, and comments on what git does not see.

    A renamed or deleted directory comes as its files. If something was deleted and something else took its
    place, the deletion comes first: git would take a later one for a deletion of the new file. Blocks as
    *sides* do. Finds all changes first, since a deleted directory may have held what was renamed.
    """
    with closing(Spool(changes)) as found:
        moved = {change.source for change in found if change.source is not None}
        if not moved:
            yield from _files(found, sides, moved)
            return
        for pair in _links_apart(_files(found, sides, moved), sides):
            if not isinstance(pair, bytes) and _gives_way(pair, sides):
                yield Pair(pair.old_path, pair.old_path, pair.old, None)
        for pair in _links_apart(_files(found, sides, moved), sides):
            if isinstance(pair, bytes) or not _gives_way(pair, sides):
                yield pair
            elif pair.new is not None:
                yield Pair(pair.new_path, pair.new_path, None, pair.new)


def _links_apart(pairs: Iterable[Pair | bytes], sides: Sides) -> Iterator[Pair | bytes]:
    """Yield them, but a renamed symbolic link whose place a directory took as one deleted and one added.

    git reads the type of what is gone from a deletion, not from a rename (register_symlink_changes() in its
    apply.c): it refuses to write below a path that is a link, as far as it knows.
    """
    for pair in pairs:
        if not isinstance(pair, bytes) and pair.old_path != pair.new_path and _is_link(pair.old, pair.new):
            there = sides.after(pair.old_path)
            if there is not None and there.is_dir:
                yield Pair(pair.old_path, pair.old_path, pair.old, None)
                yield Pair(pair.new_path, pair.new_path, None, pair.new)
                continue
        yield pair


def _is_link(*versions: Version | None) -> bool:
    return all(version is not None and version.is_link for version in versions)


def _gives_way(pair: Pair, sides: Sides) -> bool:
    """Whether git sees one file deleted where there is another now."""
    if not in_git(pair.old) or not in_git(sides.after(pair.old_path)):
        return False
    if not in_git(pair.new):
        return True
    # A file with another type is reported as one deleted and one added.
    return pair.old_path != pair.new_path and _is_link(pair.old) != _is_link(pair.new)


def _files(changes: Iterable[Change], sides: Sides, moved: set[bytes]) -> Iterator[Pair | bytes]:
    """Yield them, given where everything that was renamed came from."""
    renames: list[_Rename] = []
    pending: bytes | None = None  # an added directory, empty as far as is known
    for change in changes:
        if pending is not None and not change.path.startswith(pending + b"/"):
            yield b"# " + text(pending) + b"/: an empty directory was added"
        pending = None
        while renames and not change.path.startswith(renames[-1].path + b"/"):
            yield from renames.pop().untouched(sides, moved)
        if change.type == "directory":
            if change.kind == "A":
                pending = change.path
            elif change.kind == "D":
                yield from _gone(_old_path(renames, change.path), sides, moved)
            elif change.kind == "R":
                assert change.source is not None
                if renames:
                    renames[-1].replaced.add(_old_path(renames, change.path))
                renames.append(_Rename(change.path, change.source))
            elif "type" in change.what:
                yield _of(change, renames, sides)
            yield from _remarks(change, renames, sides)
            continue
        if "type" in change.what:  # a directory that became something else is one line
            old = _old_path(renames, change.path)
            before = sides.before(old)
            if before is not None and before.is_dir:
                yield from _gone(old, sides, moved)
        yield from _remarks(change, renames, sides)
        yield _of(change, renames, sides)
    if pending is not None:
        yield b"# " + text(pending) + b"/: an empty directory was added"
    while renames:
        yield from renames.pop().untouched(sides, moved)


def _gone(directory: bytes, sides: Sides, moved: set[bytes]) -> Iterator[Pair]:
    """Yield the files of a deleted directory, except those that were renamed."""
    for path in sides.files_before(directory):
        if path not in moved and not is_below(path, moved, directory):
            yield Pair(path, path, sides.before(path), None)


class _Rename:
    """A renamed directory whose contents are being listed."""

    def __init__(self, path: bytes, source: bytes) -> None:
        self.path = path
        self.source = source
        self.told: set[bytes] = set()
        self.replaced: set[bytes] = set()
        """Where other directories have come to, as they would have been called."""

    def untouched(self, sides: Sides, moved: set[bytes]) -> Iterator[Pair]:
        """Yield what moved along with the directory and was not listed by itself."""
        for old in sides.files_before(self.source):
            new = self.path + old[len(self.source) :]
            if old in self.told or old in moved or is_below(old, self.replaced):
                continue
            if is_below(old, moved, self.source):
                continue
            after = sides.after(new)
            if after is not None:  # else it was deleted or moved on, or a directory above it was
                yield Pair(old, new, sides.before(old), after)


def _old_path(renames: list[_Rename], path: bytes) -> bytes:
    """Return what *path* was before the directories above it were renamed, and note that it is listed."""
    if not renames:
        return path
    rename = renames[-1]
    old = rename.source + path[len(rename.path) :]
    rename.told.add(old)
    return old


def _of(change: Change, renames: list[_Rename], sides: Sides) -> Pair:
    there = _old_path(renames, change.path)
    old = there if change.source is None else change.source
    if change.kind == "A":
        return Pair(change.path, change.path, None, sides.after(change.path))
    if change.kind == "D":
        return Pair(old, old, sides.before(old), None)
    return Pair(old, change.path, sides.before(old), sides.after(change.path))


def _remarks(change: Change, renames: list[_Rename], sides: Sides) -> Iterator[bytes]:
    """Yield what git has no words for in a change."""
    if change.kind not in "MR" or not {"mode", "owner", "xattrs", "device"} & set(change.what):
        return
    old = change.source if change.source is not None else _old_path(renames, change.path)
    before, after = sides.before(old), sides.after(change.path)
    if before is None or after is None:
        return
    name = b"# " + text(change.path) + b": "
    was, is_ = before.attr, after.attr
    if "mode" in change.what and (git_mode(before) == git_mode(after) or _unusual(was.st_mode, is_.st_mode)):
        yield name + b"mode %04o -> %04o" % (stat.S_IMODE(was.st_mode), stat.S_IMODE(is_.st_mode))
    if "owner" in change.what:
        yield name + b"owner %d:%d -> %d:%d" % (was.st_uid, was.st_gid, is_.st_uid, is_.st_gid)
    if "xattrs" in change.what:
        yield name + b"extended attributes differ"
    if "device" in change.what:
        yield name + b"device %s -> %s" % (_device(was.st_rdev), _device(is_.st_rdev))


def _unusual(*modes: int) -> bool:
    return any(stat.S_IMODE(mode) not in {0o644, 0o755} for mode in modes)


def _device(number: int) -> bytes:
    return b"%d:%d" % (os.major(number), os.minor(number))


def in_git(version: Version | None) -> bool:
    """Whether git stores files of its type."""
    return version is not None and (version.is_file or version.is_link)


def git_mode(version: Version | None) -> int:
    """Return the mode that git gives it."""
    assert version is not None
    mode = version.attr.st_mode
    if stat.S_ISLNK(mode):
        return stat.S_IFLNK
    return stat.S_IFREG | (0o755 if mode & 0o100 else 0o644)


def text(path: bytes) -> bytes:
    """Return a path as it is written in a comment."""
    return escape(path).encode()
