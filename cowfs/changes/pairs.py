"""Turn changes into pairs of files, as git sees them: a renamed or deleted directory becomes its files."""

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
    """Gives the two versions of a path. Blocks; OSError."""

    def before(self, path: bytes) -> Version | None:
        """Return the file at *path* in the lowers; None if there is none."""

    def after(self, path: bytes) -> Version | None:
        """Return the file at *path* in the merged tree; None if there is none."""

    def files_before(self, path: bytes) -> Iterator[bytes]:
        """Yield the paths of everything below the directory *path* in the lowers, except directories."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One file, before and after."""

    old_path: bytes
    new_path: bytes
    old: Version | None
    new: Version | None


def files(changes: Iterable[Change], sides: Sides) -> Iterator[Pair | bytes]:
    """Yield each file that differs, as git sees it, and comments on changes that git does not record.

    A renamed or deleted directory is yielded as its files. If a file was deleted and another one took its
    name, the deletion comes first: otherwise git would delete the new file. All changes are collected first,
    because a deleted directory may have contained a renamed file. Blocks as *sides* do; OSError.
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
    """Yield the pairs, with each rename of a symlink whose old name is now a directory split in two.

    git refuses to write below a path that it believes to be a symlink. It learns that the symlink is gone
    from a deletion, not from a rename (register_symlink_changes() in git's apply.c).
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
    """Whether git sees a deleted file at a path that has another file now."""
    if not in_git(pair.old) or not in_git(sides.after(pair.old_path)):
        return False
    if not in_git(pair.new):
        return True
    # A file with another type is reported as one deleted and one added.
    return pair.old_path != pair.new_path and _is_link(pair.old) != _is_link(pair.new)


def _files(changes: Iterable[Change], sides: Sides, moved: set[bytes]) -> Iterator[Pair | bytes]:
    """Yield pairs and comments. *moved* are the old paths of everything renamed."""
    renames: list[_Rename] = []
    pending: bytes | None = None  # an added directory in which nothing has been found yet
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
                yield from _deleted(_old_path(renames, change.path), sides, moved)
            elif change.kind == "R":
                assert change.source is not None
                if renames:
                    renames[-1].replaced.add(_old_path(renames, change.path))
                renames.append(_Rename(change.path, change.source))
            elif "type" in change.what:
                yield _of(change, renames, sides)
            yield from _remarks(change, renames, sides)
            continue
        if "type" in change.what:  # diff() reports a directory that became a file in one line
            old = _old_path(renames, change.path)
            before = sides.before(old)
            if before is not None and before.is_dir:
                yield from _deleted(old, sides, moved)
        yield from _remarks(change, renames, sides)
        yield _of(change, renames, sides)
    if pending is not None:
        yield b"# " + text(pending) + b"/: an empty directory was added"
    while renames:
        yield from renames.pop().untouched(sides, moved)


def _deleted(directory: bytes, sides: Sides, moved: set[bytes]) -> Iterator[Pair]:
    """Yield the files of a deleted directory, except those that were renamed."""
    for path in sides.files_before(directory):
        if path not in moved and not is_below(path, moved, directory):
            yield Pair(path, path, sides.before(path), None)


class _Rename:
    """A renamed directory whose contents are being listed."""

    def __init__(self, path: bytes, source: bytes) -> None:
        self.path = path
        self.source = source
        self.listed: set[bytes] = set()
        """Old paths of entries that have a change of their own."""
        self.replaced: set[bytes] = set()
        """Old paths at which other directories, renamed to there, are now."""

    def untouched(self, sides: Sides, moved: set[bytes]) -> Iterator[Pair]:
        """Yield the files that moved with the directory and have no change of their own."""
        for old in sides.files_before(self.source):
            new = self.path + old[len(self.source) :]
            if old in self.listed or old in moved or is_below(old, self.replaced):
                continue
            if is_below(old, moved, self.source):
                continue
            after = sides.after(new)
            if after is not None:  # else it was deleted or moved on, or a directory above it was
                yield Pair(old, new, sides.before(old), after)


def _old_path(renames: list[_Rename], path: bytes) -> bytes:
    """Return *path* as it was before the directories above it were renamed, and note that it has a change."""
    if not renames:
        return path
    rename = renames[-1]
    old = rename.source + path[len(rename.path) :]
    rename.listed.add(old)
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
    """Yield comments on the parts of a change that git does not record."""
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
        yield name + b"extended attributes differ: " + b" ".join(map(text, change.xattrs))
    if "device" in change.what:
        yield name + b"device %s -> %s" % (_device(was.st_rdev), _device(is_.st_rdev))


def _unusual(*modes: int) -> bool:
    return any(stat.S_IMODE(mode) not in {0o644, 0o755} for mode in modes)


def _device(number: int) -> bytes:
    return b"%d:%d" % (os.major(number), os.minor(number))


def in_git(version: Version | None) -> bool:
    """Whether git stores files of this type."""
    return version is not None and (version.is_file or version.is_link)


def git_mode(version: Version | None) -> int:
    """Return the mode that git records for a file."""
    assert version is not None
    mode = version.attr.st_mode
    if stat.S_ISLNK(mode):
        return stat.S_IFLNK
    return stat.S_IFREG | (0o755 if mode & 0o100 else 0o644)


def text(path: bytes) -> bytes:
    """Return a path as it is written in a comment of a patch."""
    return escape(path).encode()
