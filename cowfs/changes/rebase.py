"""Apply the changes of a store to another version of its lowers: a three-way merge, inode by inode.

Three versions are compared: that of the store (*changed*), of its lowers (*old*), and of the other lowers
(*new*):

- If old and new are equal, the store's version is kept.
- If the store's version equals old or new, it is dropped, and new is visible.
- Otherwise there is a conflict: it is reported, and the store's version is kept.

Times are not compared, but kept files keep their times. A :class:`Maker` makes the new upper as decided, with
links to the files of the present one.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from cowfs.changes.compare import Inode, compare, set_data
from cowfs.changes.composite import Composite
from cowfs.changes.links import Aliases, find_aliases
from cowfs.changes.lowers import Lower, LowerView
from cowfs.changes.paths import join
from cowfs.changes.scan import rename_source, renamed, source_of
from cowfs.layers.base import Key
from cowfs.overlay.fs import done_at_once
from cowfs.overlay.stack import Stack, is_whiteout, notes_of
from cowfs.overlay.xattr_format import Notes, XattrFormat
from cowfs.types import Attr


class Outcome(NamedTuple):
    """A change that is in conflict, or dropped."""

    kind: str
    """``conflict``, or ``dropped``."""
    path: bytes
    why: str
    base: bytes
    """The path in the lowers. It differs from *path* below a renamed directory."""
    checkpoint: str = ""
    """The checkpoint that contains the change, ``-`` for a deleted one; "": the upper contains it."""


class Maker(Protocol):
    """Makes the new upper. Blocks; OSError.

    *parent* and *target* are directories that it made. :meth:`date` sets a directory's times after all its
    entries are made. :meth:`link` takes the key of an inode of the changes, :meth:`copy` an inode of any
    layer.
    """

    root: Key

    def directory(
        self, parent: Key, name: bytes, like: Inode, *, opaque: bool = False, redirect: bytes | None = None
    ) -> Key: ...
    def set_root_attributes(self, like: Inode) -> None: ...
    def date(self, directory: Key, attr: Attr) -> None: ...
    def link(self, key: Key, parent: Key, name: bytes) -> None: ...
    def copy(self, inode: Inode, parent: Key, name: bytes) -> None: ...
    def metacopy(self, like: Inode, redirect: bytes, parent: Key, name: bytes) -> None: ...
    def whiteout(self, parent: Key, name: bytes) -> None: ...
    def rmdir(self, parent: Key, name: bytes) -> None: ...


@dataclass(slots=True)
class _Directory:
    """A directory that is being made."""

    path: bytes
    source: Key | None
    """The directory in the store; None if the store only has changed hard links below it."""
    target: Key
    place: tuple[_Directory, bytes] | None
    old: Lower | None
    new: Lower | None
    old_path: bytes
    """The path in both lowers."""
    dated: Attr
    """The attributes with the times to set at the end."""
    replaces: bool = False
    """Whether the names that old has and the store does not are deleted."""
    shows: bool = True
    """Whether the names of new are visible."""
    whole: bool = False
    """Whether the names of old are to be copied, because no lower has them any more."""
    droppable: bool = False
    """Whether to remove the directory if it stays empty."""
    made: int = 0


class Rebase:
    """One walk through the changes. *tell* gets each :class:`Outcome`, *tick* each path. Blocks; OSError."""

    def __init__(
        self,
        changes: Composite,
        old: Stack,
        new: Stack,
        maker: Maker,
        tell: Callable[[Outcome], None],
        tick: Callable[[bytes], None],
    ) -> None:
        self._changes: Any = changes
        self._xattrs: XattrFormat = old.format
        self._old, self._new = LowerView(old), LowerView(new)
        self._maker = maker
        self._tell = tell
        self._tick = tick
        self._moved: dict[bytes, bytes] = {}
        self._aliases = Aliases()
        self.kept = 0
        """How many names of the store are kept, not counting directories."""

    def run(self) -> None:
        """Make the new upper."""
        self._moved = _done(renamed(self._changes, self._changes.root, self._xattrs))
        if self._changes.index is not None:
            self._aliases = _done(
                find_aliases(self._changes, self._changes.root, self._changes.index, self._old)
            )
        old, new = self._old.root(), self._new.root()
        here = Inode(self._changes, self._changes.root, self._changes.root.attr)
        like, dated = self._choose(here, old, new, b"", b"")
        if like is not here:
            self._maker.set_root_attributes(like)
        root = _Directory(
            b"", self._changes.root, self._maker.root, None, old, new, b"", dated, shows=new is not None
        )
        levels = [self._fill(root)]
        while levels:
            for inside in levels[-1]:
                levels.append(self._fill(inside))
                break
            else:
                levels.pop()

    def _fill(self, here: _Directory) -> Iterator[_Directory]:
        names = set()
        if here.source is not None:
            names = {entry.name for entry in self._changes.readdir(here.source)}
        if here.old is not None:
            if here.replaces or here.whole:
                names |= self._old.names(here.old)
            else:
                names |= self._aliases.inside.get(here.old_path, set())
        for name in sorted(names):
            self._tick(join(here.path, name))
            inside = self._entry(here, name)
            if inside is not None:
                yield inside
        self._finish(here)

    def _finish(self, here: _Directory) -> None:
        if here.place is not None:
            above, name = here.place
            if here.droppable and not here.made:
                self._maker.rmdir(above.target, name)
                above.made -= 1
                return
            if here.droppable and above.shows and above.new is not None:
                there = self._new.lookup(above.new, name)
                if there is not None and not there.is_dir:
                    self._conflict(here.path, here.old_path, "has changes in it, and is no directory there")
        self._maker.date(here.target, here.dated)

    def _entry(self, here: _Directory, name: bytes) -> _Directory | None:
        """Decide on one name; return it if it is a directory, to be filled."""
        natural = join(here.old_path, name)
        hit = None if here.source is None else self._changes.lookup(here.source, name)
        old = None if here.old is None else self._old.lookup(here.old, name)
        new = None if here.new is None else self._new.lookup(here.new, name)
        if hit is not None and not is_whiteout(self._changes, hit[0], hit[1], self._xattrs):
            key, attr = hit
            if stat.S_ISDIR(attr.st_mode):
                return self._directory(here, name, key, Inode(self._changes, key, attr), old, new)
            self._file(here, name, key, attr, old, new)
        elif hit is not None or here.replaces:
            self._deleted(here, name, natural, old, new, is_reported=hit is not None)
        elif old is not None:
            return self._untouched(here, name, natural, old, new)
        return None

    def _untouched(
        self, here: _Directory, name: bytes, natural: bytes, old: Lower, new: Lower | None
    ) -> _Directory | None:
        """Handle a name without an entry in the store. The store may have its inode, or something below
        it."""
        alias = self._aliases.keys.get(natural)
        if alias is not None:
            self._file(here, name, alias, self._changes.stat(alias), old, new)
        elif old.is_dir:
            return self._directory(here, name, None, self._inode(self._old, old), old, new)
        elif here.whole:
            self._copied(here, name, self._inode(self._old, old))
        return None

    # --- deleted names

    def _deleted(
        self, here: _Directory, name: bytes, natural: bytes, old: Lower | None, new: Lower | None, *,
        is_reported: bool,
    ) -> None:  # fmt: skip
        path = join(here.path, name)
        if not here.shows or here.whole:
            return
        if new is None and old is None:
            return  # it hid a name of a deleted checkpoint
        if new is None or old is None:
            if is_reported:
                why = "deleted there, too" if new is None else "deletes a name that did not exist"
                self._drop(path, natural, why)
            return
        if natural not in self._moved and not self._equal(old, new):
            self._conflict(path, natural, "deleted in the store, changed in the new root")
        self._maker.whiteout(here.target, name)
        here.made += 1
        self.kept += 1

    # --- files

    def _file(
        self, here: _Directory, name: bytes, key: Key, attr: Attr, old: Lower | None, new: Lower | None
    ) -> None:
        path, natural = join(here.path, name), join(here.old_path, name)
        notes: Notes = {}
        if stat.S_ISREG(attr.st_mode):
            notes = notes_of(self._changes, key, self._xattrs) or {}
        seen = self._xattrs.seen(notes, attr) if not attr.st_size else attr
        changed = Inode(self._changes, key, seen)
        source = None
        if self._xattrs.is_metacopy(notes, attr):
            elsewhere = source_of(notes, attr, here.old_path, self._xattrs)
            origin = old if elsewhere is None else self._old.resolve(elsewhere)
            if origin is not None and not origin.is_dir:
                number, data = origin.places[-1]
                set_data(changed, notes, (self._old.layers[number], data), self._xattrs)
            source = rename_source(notes, attr, here.old_path, self._xattrs)
            holds = self._holds(here, changed, elsewhere, new)
            is_elsewhere = source is not None and (here.old is None or source != natural)
            if is_elsewhere and not here.whole and changed.data is not None:
                assert source is not None and origin is not None
                self._renamed(
                    here, name, changed, (source, origin), holds, self._seen_here(natural, old, new)
                )
                return
        else:
            holds = len(key.places) == 1
        if natural in self._moved:
            old = new = None
        if not here.whole and not self._stays(here, path, natural, changed, old, new):
            return
        self._keep(here, name, changed, holds=holds)

    def _stays(
        self, here: _Directory, path: bytes, base: bytes, changed: Inode, old: Lower | None, new: Lower | None
    ) -> bool:
        """Whether the new upper keeps a file of the store. Report it if not, or if there is a conflict."""
        was = None if old is None else self._inode(self._old, old)
        if new is None:
            if was is None or (not here.shows and here.new is not None):
                return True
            if self._same(changed, was):
                self._drop(path, base, "unchanged in the store, gone in the new root")
                return False
            self._conflict(path, base, "changed in the store, gone in the new root")
            return True
        to_be = self._inode(self._new, new)
        if old is not None and self._equal(old, new):
            return True
        if was is not None and self._same(changed, was) and here.shows:
            self._drop(path, base, "unchanged in the store, changed in the new root")
            return False
        if self._same(changed, to_be):
            if here.shows:
                self._drop(path, base, "equal to the new root")
            return not here.shows
        if was is None:
            why = "added in both"
        elif stat.S_IFMT(to_be.attr.st_mode) != stat.S_IFMT(changed.attr.st_mode):
            why = "changed in both, to different types"
        else:
            why = "changed in both"
        self._conflict(path, base, why)
        return True

    def _renamed(
        self, here: _Directory, name: bytes, changed: Inode, origin: tuple[bytes, Lower], holds: bool,
        place: tuple[Lower | None, Lower | None],
    ) -> None:  # fmt: skip
        """Handle a renamed file whose data is still in a lower."""
        source, was = origin
        path = join(here.path, name)
        self._covers(path, join(here.old_path, name), *place)
        there = self._new.resolve(source)
        if there is None or not stat.S_ISREG(there.attr.st_mode):
            self._conflict(path, source, "renamed in the store, gone in the new root")
        else:
            before, after = self._inode(self._old, was), self._inode(self._new, there)
            if not self._same(before, after) and not self._same(changed, after):
                if self._same(changed, before):
                    self._maker.metacopy(after, b"/" + source, here.target, name)
                    here.made += 1
                    self.kept += 1
                    return
                self._conflict(path, source, "changed in both")
        self._keep(here, name, changed, holds=holds)

    def _keep(self, here: _Directory, name: bytes, changed: Inode, *, holds: bool) -> None:
        if holds or not stat.S_ISREG(changed.attr.st_mode):
            self._maker.link(changed.key, here.target, name)
            here.made += 1
        else:
            self._copied(here, name, changed)
        self.kept += 1

    def _copied(self, here: _Directory, name: bytes, inode: Inode) -> None:
        self._maker.copy(inode, here.target, name)
        here.made += 1

    def _holds(self, here: _Directory, changed: Inode, elsewhere: bytes | None, new: Lower | None) -> bool:
        """Whether a metacopy finds the same data in the new lowers."""
        if changed.data is None:
            return True  # its data was missing before
        if here.whole or changed.end is not None or len(changed.key.places) > 1:
            return False
        there = self._new.resolve(elsewhere) if elsewhere is not None else new if here.shows else None
        if there is None or not stat.S_ISREG(there.attr.st_mode):
            return False
        return "content" not in _done(compare(changed, self._inode(self._new, there), self._xattrs))

    # --- directories

    def _directory(
        self, here: _Directory, name: bytes, key: Key | None, changed: Inode, old: Lower | None,
        new: Lower | None,
    ) -> _Directory | None:  # fmt: skip
        natural = join(here.old_path, name)
        notes = {} if key is None else notes_of(self._changes, key, self._xattrs) or {}
        source = source_of(notes, changed.attr, here.old_path, self._xattrs)
        if source is not None and (here.old is None or source != natural):
            origin = self._old.resolve(source)
            if origin is not None and origin.is_dir:
                return self._moved_directory(here, name, key, changed, (source, origin), (old, new))
        if natural in self._moved:
            old, taken = None, new
            new = None
        else:
            taken = None
        path = join(here.path, name)
        is_opaque = self._xattrs.is_opaque(notes)
        old_dir = old if old is not None and old.is_dir else None
        new_dir = new if new is not None and new.is_dir else None
        like, dated = self._choose(changed, old_dir, new_dir, path, natural)
        if here.whole:
            droppable = False
        elif key is None:
            droppable = True
        else:
            droppable = (
                old_dir is not None
                and new_dir is None
                and self._same(changed, self._inode(self._old, old_dir))
            )
        inside = _Directory(
            path, key, None, (here, name), old_dir, new_dir, natural, dated,
            replaces=(is_opaque or here.replaces) and old_dir is not None,
            shows=here.shows and new_dir is not None,
            whole=here.whole and not is_opaque,
            droppable=droppable,
        )  # fmt: skip
        if here.whole and is_opaque:
            inside.old = None
        opaque = is_opaque and new_dir is None and not here.whole
        if inside.replaces and old_dir is not None and new_dir is not None and self._equal(old_dir, new_dir):
            inside.shows, opaque = False, here.shows
        opaque = opaque or (taken is not None and taken.is_dir and here.shows)
        if new_dir is None and not droppable and not here.whole:
            if new is None:
                if old_dir is not None and (here.shows or here.new is None):
                    self._conflict(path, natural, "changed in the store, gone in the new root")
            elif old is None or not self._equal(old, new):
                self._conflict(path, natural, "a directory in the store, and none in the new root")
        inside.target = self._maker.directory(here.target, name, like, opaque=opaque)
        here.made += 1
        return inside

    def _moved_directory(
        self, here: _Directory, name: bytes, key: Key | None, changed: Inode, origin: tuple[bytes, Lower],
        place: tuple[Lower | None, Lower | None],
    ) -> _Directory:  # fmt: skip
        """Handle a renamed directory. It stays renamed if the new root has it at the old path."""
        source, was = origin
        path, natural = join(here.path, name), join(here.old_path, name)
        old, new = self._seen_here(natural, *place)
        self._covers(path, natural, old, new)
        there = self._new.resolve(source)
        here.made += 1
        if there is not None and there.is_dir:
            like, dated = self._choose(changed, was, there, path, source)
            target = self._maker.directory(here.target, name, like, redirect=b"/" + source)
            return _Directory(path, key, target, (here, name), was, there, source, dated)
        self._conflict(path, source, "renamed in the store, gone in the new root")
        hides = here.shows and place[1] is not None and place[1].is_dir
        target = self._maker.directory(here.target, name, changed, opaque=hides)
        return _Directory(
            path, key, target, (here, name), was, None, source, changed.attr, shows=False, whole=True
        )

    def _seen_here(
        self, natural: bytes, old: Lower | None, new: Lower | None
    ) -> tuple[Lower | None, Lower | None]:
        """Return the inodes that both lowers have under a name, unless the store renamed it."""
        return (None, None) if natural in self._moved else (old, new)

    def _covers(self, path: bytes, base: bytes, old: Lower | None, new: Lower | None) -> None:
        """Report a conflict if a file was renamed to a name whose old and new versions differ."""
        if new is not None and (old is None or not self._equal(old, new)):
            self._conflict(path, base, "renamed to this name in the store, changed in the new root")

    def _choose(
        self, changed: Inode, old: Lower | None, new: Lower | None, path: bytes, base: bytes
    ) -> tuple[Inode, Attr]:
        """Return the inode whose attributes a directory gets, and the attributes with its times."""
        if new is None:
            return changed, changed.attr
        to_be = self._inode(self._new, new)
        if self._same(changed, to_be):
            return changed, changed.attr
        was = None if old is None else self._inode(self._old, old)
        if was is not None and self._same(changed, was):
            is_dated = changed.attr.st_mtime_ns != was.attr.st_mtime_ns
            return to_be, changed.attr if is_dated else to_be.attr
        if was is None or not self._same(was, to_be):
            why = "added in both" if was is None else "changed in both"
            self._conflict(path, base, f"its attributes were {why}")
        return changed, changed.attr

    # --- what is equal

    def _inode(self, view: LowerView, lower: Lower) -> Inode:
        number, key = lower.places[0]
        inode = Inode(view.layers[number], key, lower.attr)
        if not lower.is_dir and len(lower.places) > 1:
            data, data_key = lower.places[-1]
            inode.data = view.layers[data], data_key
        return inode

    def _same(self, one: Inode, other: Inode) -> bool:
        return not {*_done(compare(one, other, self._xattrs))} - {"times"}

    def _equal(self, old: Lower, new: Lower) -> bool:
        """Whether both lowers have equal files, or equal directories including everything below."""
        waiting = [(old, new)]
        while waiting:
            old, new = waiting.pop()
            if not self._same(self._inode(self._old, old), self._inode(self._new, new)):
                return False
            if not old.is_dir:
                continue
            names = self._old.names(old)
            if names != self._new.names(new):
                return False
            for name in names:
                one, other = self._old.lookup(old, name), self._new.lookup(new, name)
                if one is None or other is None:
                    return False
                waiting.append((one, other))
        return True

    def _conflict(self, path: bytes, base: bytes, why: str) -> None:
        self._tell(Outcome("conflict", path, why, base))

    def _drop(self, path: bytes, base: bytes, why: str) -> None:
        self._tell(Outcome("dropped", path, why, base))


def _done(steps: Any) -> Any:
    return done_at_once(steps)
