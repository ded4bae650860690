"""Find the changes between the lowers and the merged tree by reading the upper.

Every path has at most one line, with one exception: if a file was deleted and another was renamed to its
path, the path has a ``D`` and then an ``R``. The rules:

- ``D``: the lowers have the name, the merged tree does not. A directory is one line, without its contents. If
  a directory was deleted and created again (it is opaque), each of its old entries that no longer exists has
  a line.
- ``R``: a directory, or a file whose data did not change, was renamed. Changes below a directory, and of its
  own attributes, are listed under its new name. The old path has no ``D``; a new file there is ``A``.
- ``A``: the merged tree has a name that the lowers do not have. Each file of a new directory is listed.
- ``M``: both have the name, and the files differ. If only one of them is a directory, that is ``M`` with
  ``type``; the contents of a deleted directory are not listed.

A file that was copied up but is equal, and a directory that was copied up only because of its contents, are
not changes. :func:`cowfs.changes.compare.compare` defines what is equal.
"""

from __future__ import annotations

import heapq
import stat
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from cowfs.changes.compare import Inode, compare, differing, set_data
from cowfs.changes.links import Aliases, find_aliases
from cowfs.changes.lowers import Lower, LowerView
from cowfs.changes.near import Needs, Survey, outermost, ways_to
from cowfs.changes.paths import is_below, join, type_name
from cowfs.changes.scan import GONE, entries, rename_source, renamed, source_of
from cowfs.layers.base import Key, LowerLayer, UpperLayer
from cowfs.overlay.stack import Stack, is_whiteout, notes_of
from cowfs.overlay.xattr_format import Notes, XattrFormat
from cowfs.types import Attr, Change


def diff(
    upper: UpperLayer,
    upper_root: Key,
    lowers: Sequence[LowerLayer],
    prefix: bytes,
    index: Key | None = None,
    *,
    directory_times: bool = False,
    within: Iterable[bytes] = (),
) -> Iterator[Change]:
    """Yield every change, sorted by name within each directory, a directory before its contents.

    *lowers* are topmost first. *prefix* is that of the overlay's xattrs (``trusted.overlay.``). *index* is
    the directory of hard links in the upper layer, if there is one. With *directory_times*, a directory is
    listed even if only its mtime differs. *within* are paths: then all changes at and below these are listed,
    renames away from there too, and perhaps others. The names of one directory per level, and the renamed
    paths, are held in memory. The tree may be in use: then each line was true at some moment, and files
    deleted meanwhile are left out. Blocks as the layers do, and may compare whole files between two changes;
    OSError.
    """
    told = steps(upper, upper_root, lowers, prefix, index, directory_times=directory_times, within=within)
    return (step for step in told if step is not None)


def steps(
    upper: UpperLayer,
    upper_root: Key,
    lowers: Sequence[LowerLayer],
    prefix: bytes,
    index: Key | None = None,
    *,
    directory_times: bool = False,
    within: Iterable[bytes] = (),
) -> Iterator[Change | None]:
    """Like :func:`diff`, but also yield None, at least after each inode and each MiB of content.

    A caller can do other work at these points.
    """
    return _Diff(upper, upper_root, lowers, prefix, index, directory_times, within).run()


class ChangeAt(NamedTuple):
    """The change at one path."""

    change: Change | None
    """None if there is none."""
    now_at: bytes | None
    """Where that is now what the lowers have at the path, if it was renamed."""


def change_at(
    upper: UpperLayer,
    upper_root: Key,
    lowers: Sequence[LowerLayer],
    prefix: bytes,
    index: Key | None,
    path: bytes,
    link: bytes | None,
) -> Generator[None, None, ChangeAt]:
    """Return what :func:`diff` lists at *path*. It reads only that path, and the renames if it must.

    *link* is the path in the lowers of the file there, if that may have several names. Blocks as the layers
    do, but yields before each inode and each MiB of content; OSError.
    """
    return _Diff(upper, upper_root, lowers, prefix, index, False, [path]).at(path, link)


@dataclass(slots=True)
class _Directory:
    """A directory of the merged tree whose contents are still to be compared."""

    path: bytes
    upper: Key | None
    """None if the upper has no such directory, and it only contains changed hard links."""
    base: Lower | None
    """What to compare with; None: everything in it is new."""
    base_path: bytes
    """The path of *base* in the lowers."""
    merged: bool
    """Whether the names of *base* are visible. If not, those that the upper does not have are deleted."""


_MANY = 8192
"""How many names are put in order at once: some milliseconds."""
_Step = Change | _Directory | None
"""A change, a directory to descend into, or None: the caller may do other work."""


def in_order(names: set[bytes]) -> Generator[None, None, Iterable[bytes]]:
    """Return the names in order; yield now and then, because there may be a million."""
    if len(names) <= _MANY:
        return sorted(names)
    left, runs = iter(names), []
    while some := [*islice(left, _MANY)]:
        runs.append(sorted(some))
        yield
    return heapq.merge(*runs)


class _Diff:
    def __init__(
        self,
        upper: UpperLayer,
        upper_root: Key,
        lowers: Sequence[LowerLayer],
        prefix: bytes,
        index: Key | None,
        directory_times: bool,
        within: Iterable[bytes],
    ) -> None:
        self._upper = upper
        self._root = upper_root
        self._xattrs = XattrFormat(prefix)
        self._view = LowerView(Stack(lowers, self._xattrs))
        self._index = index
        self._directory_times = directory_times
        self._moved: dict[bytes, bytes] = {}
        self._aliases = Aliases()
        self._within = outermost(within)
        self._ways: dict[bytes, set[bytes]] = {}

    def at(self, path: bytes, link: bytes | None) -> Generator[None, None, ChangeAt]:
        survey = Survey(self._upper, self._root, self._view)
        if path and (yield from survey.needs(path, alone=True)) is not Needs.NOTHING_ELSE:
            self._moved = yield from renamed(self._upper, self._root, self._xattrs)
        if self._index is not None and link is not None:
            aliases = find_aliases(self._upper, self._root, self._index, self._view, [link])
            self._aliases = yield from aliases
        self._ways = ways_to([path])
        last = None
        for change in self._walk(path):
            if change is None:
                yield
            elif change.path == path:
                last = change  # of a D and an R, the R
        return ChangeAt(last, self._moved.get(path))

    def run(self) -> Iterator[Change | None]:
        needs = yield from self._narrow()
        if self._index is not None:
            # the lowers have what is in a renamed directory elsewhere
            within = self._within if needs is Needs.NOTHING_ELSE else ()
            self._aliases = yield from find_aliases(self._upper, self._root, self._index, self._view, within)
        yield from self._walk()

    def _walk(self, alone: bytes | None = None) -> Iterator[Change | None]:
        """Yield the changes. If a path is given, *alone* that and the directories above it."""
        base = self._view.root()
        if base is not None:
            new = Inode(self._upper, self._root, self._upper.stat(self._root))
            what, names = yield from self._compare(new, base)
            if what:
                yield Change("M", b"", what, type="directory", xattrs=names)
        if alone == b"":
            return
        # No recursion: trees may be deeper than the interpreter's stack.
        levels = [self._contents(_Directory(b"", self._root, base, b"", merged=True))]
        while levels:
            for step in levels[-1]:
                if isinstance(step, _Directory):
                    if step.path == alone:
                        self._leave(step)
                        continue
                    levels.append(self._contents(step))
                    break
                yield step
            else:
                levels.pop()
        for key in self._aliases.keys.values():
            self._upper.forget(key)

    def _narrow(self) -> Generator[None, None, Needs]:
        """Decide what must be read to list the changes within the paths; find the renames if need be."""
        survey = Survey(self._upper, self._root, self._view)
        needs = Needs.NOTHING_ELSE if self._within else Needs.EVERYTHING
        for path in self._within:
            if needs is Needs.EVERYTHING:
                break
            needs = max(needs, (yield from survey.needs(path)))
        if needs is not Needs.NOTHING_ELSE:
            self._moved = yield from renamed(self._upper, self._root, self._xattrs)
        paths = self._within
        if needs is Needs.EVERYTHING or any(each in paths or is_below(each, paths) for each in self._moved):
            self._within = frozenset()
        self._ways = ways_to(self._within)
        return needs

    def _names(self, here: _Directory) -> Generator[None, None, set[bytes]]:
        ways = self._ways.get(here.path)
        if ways is not None:
            return ways
        names: set[bytes] = set()
        if here.upper is not None:
            for entry in entries(self._upper, here.upper):
                if entry is None:
                    yield
                else:
                    names.add(entry.name)
        if here.base is not None:
            if here.merged:
                names |= self._aliases.inside.get(here.base_path, set())
            else:
                names |= yield from self._view.names_by_steps(here.base)
        return names

    def _contents(self, here: _Directory) -> Iterator[_Step]:
        for name in (yield from in_order((yield from self._names(here)))):
            yield None
            try:
                yield from self._entry(here, name)
            except GONE:
                continue
        self._leave(here)

    def _leave(self, here: _Directory) -> None:
        if here.upper is not None and here.upper is not self._root:
            self._upper.forget(here.upper)
        if here.base is not None:
            self._view.forget(here.base)

    def _entry(self, here: _Directory, name: bytes) -> Iterator[_Step]:
        path, natural = join(here.path, name), join(here.base_path, name)
        hit = None if here.upper is None else self._upper.lookup(here.upper, name)
        if hit is None or is_whiteout(self._upper, *hit, self._xattrs):
            base = None if natural in self._moved else self._base(here, name)
            if base is None:
                return
            if hit is None and here.merged:
                yield from self._untouched(path, natural, base)
            else:
                yield Change("D", path, type=type_name(base.attr.st_mode))
                self._view.forget(base)
            return
        key, attr = hit
        notes = self._notes(key, attr)
        source = rename_source(notes, attr, here.base_path, self._xattrs)
        if source is not None and (here.base is None or source != natural):
            origin = self._view.resolve(source)
            if origin is not None and origin.is_dir == stat.S_ISDIR(attr.st_mode):
                base = None if natural in self._moved else self._base(here, name)
                if base is not None:
                    yield Change("D", path, type=type_name(base.attr.st_mode))
                    self._view.forget(base)
                yield from self._renamed(path, key, attr, notes, origin, source)
                return
            source = None
        base = None if source is None and natural in self._moved else self._base(here, name)
        if stat.S_ISDIR(attr.st_mode):
            shows = source is not None or (here.merged and not self._xattrs.is_opaque(notes))
            yield from self._directory(path, key, attr, base, natural, shows)
        else:
            yield from self._file(here, path, key, attr, notes, base)

    def _base(self, here: _Directory, name: bytes) -> Lower | None:
        return None if here.base is None else self._view.lookup(here.base, name)

    def _untouched(self, path: bytes, natural: bytes, base: Lower) -> Iterator[_Step]:
        """Find changes without an entry in the upper: hard links in the index, and directories above them."""
        if base.is_dir:
            yield _Directory(path, None, base, natural, merged=True)
            return
        key = self._aliases.keys.get(natural)
        if key is not None:
            new = Inode(self._upper, key, self._upper.stat(key))
            notes = self._notes(key, new.attr)
            if self._xattrs.is_metacopy(notes, new.attr):
                set_data(new, notes, self._data(base), self._xattrs)
            yield from self._modified(path, new, base)
        self._view.forget(base)

    def _notes(self, key: Key, attr: Attr) -> Notes:
        """Return the overlay's own attributes of an inode in the upper."""
        if not (stat.S_ISDIR(attr.st_mode) or stat.S_ISREG(attr.st_mode)):
            return {}
        return notes_of(self._upper, key, self._xattrs) or {}

    def _renamed(
        self, path: bytes, key: Key, attr: Attr, notes: Notes, origin: Lower, source: bytes
    ) -> Iterator[_Step]:
        new = Inode(self._upper, key, attr)
        if not origin.is_dir:
            set_data(new, notes, self._data(origin), self._xattrs)
        what, names = yield from self._compare(new, origin)
        yield Change("R", path, what, source, type_name(attr.st_mode), names)
        if origin.is_dir:
            yield _Directory(path, key, origin, source, merged=True)
        else:
            self._upper.forget(key)
            self._view.forget(origin)

    def _directory(
        self, path: bytes, key: Key, attr: Attr, base: Lower | None, natural: bytes, shows: bool
    ) -> Iterator[_Step]:
        if base is None:
            yield Change("A", path, type="directory")
        else:
            yield from self._modified(path, Inode(self._upper, key, attr), base)
            if not base.is_dir:
                self._view.forget(base)
                base = None
        yield _Directory(path, key, base, natural, merged=shows)

    def _file(
        self, here: _Directory, path: bytes, key: Key, attr: Attr, notes: Notes, base: Lower | None
    ) -> Iterator[_Step]:
        if base is None:
            yield Change("A", path, type=type_name(attr.st_mode))
        else:
            new = Inode(self._upper, key, attr)
            if self._xattrs.is_metacopy(notes, attr):
                elsewhere = source_of(notes, attr, here.base_path, self._xattrs)
                origin = base if elsewhere is None else self._view.resolve(elsewhere)
                if origin is not None:
                    set_data(new, notes, self._data(origin), self._xattrs)
            yield from self._modified(path, new, base)
            self._view.forget(base)
        self._upper.forget(key)

    def _modified(self, path: bytes, new: Inode, base: Lower) -> Iterator[_Step]:
        what, names = yield from self._compare(new, base)
        if what:
            yield Change("M", path, what, type=type_name(new.attr.st_mode), xattrs=names)

    def _compare(
        self, new: Inode, base: Lower
    ) -> Generator[None, None, tuple[tuple[str, ...], tuple[bytes, ...]]]:
        """Return what differs, and the names of the xattrs that differ."""
        number, key = base.places[0]
        old = Inode(self._view.layers[number], key, base.attr)
        if not base.is_dir:
            old.data = self._data(base)
        what = yield from compare(new, old, self._xattrs, directory_times=self._directory_times)
        return what, differing(new, old, self._xattrs) if "xattrs" in what else ()

    def _data(self, base: Lower) -> tuple[LowerLayer, Key]:
        number, key = base.places[-1]
        return self._view.layers[number], key
