"""Revert changes: make the lower's version of the selected paths visible again.

This works on a union, mounted or not, in steps. Each step is one change of the store. A mount keeps working
meanwhile; the kernel is told which of its cache entries are stale. :mod:`cowfs.changes.undo` undoes a revert.
"""

from __future__ import annotations

import errno
import itertools
import json
import stat
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from cowfs.changes import diff
from cowfs.changes.lowers import must_not_wait
from cowfs.changes.moves import Moves
from cowfs.changes.paths import is_below, join
from cowfs.changes.render import escape, from_json, json_line
from cowfs.changes.select import METADATA, Selection
from cowfs.changes.spool import Packed
from cowfs.changes.steps import (
    OFTEN,
    Done,
    Forget,
    Found,
    Look,
    Progress,
    Seen,
    find,
    is_open,
    must_be_kept,
    why,
)
from cowfs.changes.trash import (
    ASIDE,
    MOST_BYTES,
    MOST_STEPS,
    Batch,
    Step,
    attributes_to_json,
    line_of,
    new_batch,
    step_of,
)
from cowfs.errors import StoreError
from cowfs.overlay import uncover
from cowfs.overlay.lookup import number_of, shown_below
from cowfs.overlay.node import Node
from cowfs.overlay.overlay import Overlay
from cowfs.overlay.stack import Hit
from cowfs.types import Change


def revert(
    fs: Overlay,
    selection: Selection,
    forget: Forget,
    undo: Callable[[Batch], Progress],
    *,
    metadata: bool = False,
) -> Progress:
    """Revert what *selection* selects; with *metadata* only owners, modes, times and xattrs.

    Calls of the layers block; the callables that it yields block too. Raises CowfsError if a change cannot be
    reverted without others. Then no step is reported as done, and *undo* undoes the renames already made.
    """
    must_not_wait(fs.lowers)
    changes, renames = Packed(), []
    for change in _selected(fs, selection):
        yield None
        if change is None:
            continue
        if change.kind == "R" and not metadata:
            renames.append(change)
        changes.add(json_line(change).encode())
        if changes.count % OFTEN == 0:
            yield Seen(changes.count)
    if not changes.count:
        return
    yield Seen(changes.count, changes.count)
    batch = new_batch(fs.upper)
    work = _Revert(fs, selection, batch, forget)
    try:
        yield from work.rename_back(renames)
        yield from work.remove_set_aside()
        yield from work.revert_others(_kept(changes), metadata=metadata)
        yield from work.drop_directories(each.path for each in _kept(changes) if _is_bare(each))
    except StoreError:
        if work.number:
            yield from (step for step in undo(batch) if not isinstance(step, Done))
        raise
    finally:
        if not batch.is_written:
            batch.remove()


def rehearse(fs: Overlay, selection: Selection, *, metadata: bool = False) -> Progress:
    """Find out what :func:`revert` would do. The store is only read; blocks.

    Yields the steps that would be refused, and one without a reason if something would be done. Raises the
    CowfsError of what would be refused as a whole.
    """
    must_not_wait(fs.lowers)
    if (yield from is_needed(fs, selection, metadata=metadata)):
        yield Done(b"")


def is_needed(fs: Overlay, selection: Selection, *, metadata: bool = False) -> Look:
    """Return whether :func:`revert` would change anything in a store, which is only read. Blocks.

    Raises the CowfsError of what that refuses, except for what only shows after renames.
    """
    changes, renames = Packed(), list[Change]()
    is_all = not selection.patterns and not metadata and len(fs.unions()) == 1
    for change in _selected(fs, selection):
        yield None
        if change is None:
            continue
        if is_all and not _is_bare(change):
            return True  # of everything, nothing is refused
        if change.kind == "R" and not metadata:
            renames.append(change)
        changes.add(json_line(change).encode())
    work = _Revert(fs, selection, Batch(fs.upper, None, b"", None), lambda _: None)
    if renames:
        work.must_go_home(min(renames, key=_home))
        return True
    plan = yield from work.plan(_kept(changes), metadata=metadata)
    return bool(plan.count)


def _selected(fs: Overlay, selection: Selection) -> Iterator[Change | None]:
    """Yield the selected changes, and None in between, when others may do something. Blocks."""
    prefix, lowers = fs.options.xattr_prefix, fs.stack.in_order()
    how: dict[str, Any] = {"directory_times": True, "within": selection.places}
    found = diff.steps(fs.upper, fs.root.upper, lowers, prefix, fs.index, **how)
    for change in selection.among(found):
        if change is not None and change.type == "directory":
            # reverting an entry in it changes its mtime again
            change = replace(change, what=tuple(what for what in change.what if what != "times"))
        yield change


def _home(change: Change) -> bytes:
    return change.source or b""


def _kept(changes: Packed) -> Iterator[Change]:
    return (from_json(json.loads(line)) for line in changes)


def _is_bare(change: Change) -> bool:
    """Whether a directory is in the store without differing from the lower's."""
    return change.kind == "M" and not change.what


class _Revert:
    def __init__(self, fs: Overlay, selection: Selection, batch: Batch, forget: Forget) -> None:
        self._fs = fs
        self._selection = selection
        self._batch = batch
        self._forget = forget
        self._moves = Moves()
        """The renames made by this revert."""
        self._touched: set[bytes] = set()
        self._aside: dict[bytes, tuple[bytes, int]] = {}
        """Files that were in the way of a rename: their temporary path, to their former path and the number
        of moves made before."""
        self._hidden: uncover.Hidden = {}
        self._removed_aside: set[bytes] = set()
        """The paths of those of them that were then removed."""
        self._homeless: set[bytes] = set()
        """Paths of files that were renamed out of a directory that no longer exists."""
        self._renamed: list[Done] = []
        """Renames to report once it is known that everything else can be reverted too."""
        self._homes: set[bytes] = set()
        """Paths of directories that were renamed back. Each is reported once, whatever else of it changes."""
        self.number = 0
        """The number of the next step."""
        self._bytes = 0
        """The size of the log."""

    def _next(
        self, kind: str, path: bytes, source: bytes = b"", attributes: dict[str, Any] | None = None
    ) -> Step:
        step = Step(self.number, kind, path, source, attributes)
        self.number += 1
        return step

    def _line(self, step: Step) -> bytes:
        """Return a step as a line of the log. StoreError if the log would be larger than undo can read."""
        line = line_of(step)
        self._bytes += len(line) + 1
        if self._bytes > MOST_BYTES or step.number >= MOST_STEPS:
            raise StoreError(
                "these are more changes than can be reverted at once", "revert some directories first"
            )
        return line

    # --- renames

    def rename_back(self, renames: list[Change]) -> Progress:
        """Rename directories and files back, those with the shortest old paths first."""
        for change in sorted(renames, key=_home):
            yield from self._rename_back(change)

    def must_go_home(self, change: Change) -> Found | None:
        """Return where a renamed file or directory was; None if the directory that it was in is reverted too.

        StoreError if it cannot be renamed back unless something else is reverted too.
        """
        assert change.source is not None
        home = change.source
        missing = self._missing(home)
        if missing:
            if self._selection.matches(missing):
                return None
            raise StoreError(
                f"{escape(change.path)}: the directory that contained {escape(home)} no longer exists",
                "revert that directory too",
            )
        new = find(self._fs, home)
        if self._fs.lookup(new.parent, new.name) is not None and not self._selection.matches(home):
            raise StoreError(
                f"{escape(change.path)}: there is another {escape(home)} now", "revert that one too"
            )
        return new

    def _rename_back(self, change: Change) -> Progress:
        fs = self._fs
        assert change.source is not None
        here, home = self._moves.now(change.path), change.source
        new = self.must_go_home(change)
        if new is None:
            self._homeless.add(change.path)
            return
        stale: uncover.Stale = []
        if fs.lookup(new.parent, new.name) is not None:
            aside = self._free_name(new.parent, home)
            self._rename(home, aside, stale)
            self._aside[aside] = home, len(self._moves)
            here = self._moves.now(change.path)  # it may be in the directory set aside
        for at, since, until in self._moves.before(here):
            if at in self._aside and since <= self._aside[at][1] <= until:
                del self._aside[at]  # it is renamed back itself: two files had exchanged names
                break
        self._rename(here, home, stale)
        node = fs.resolve(new.parent, new.name)
        if node.is_dir:
            uncover.at_home(fs, node)
        yield lambda: self._forget(stale)
        if change.type == "directory":  # a file is reported with its other changes
            self._renamed.append(Done(change.path))
            self._homes.add(home)

    def _missing(self, home: bytes) -> bytes:
        """Return the first directory above *home* that does not exist, or that has another old path; b"" if
        none.

        A new directory that the lower does not have is not missing.
        """
        fs = self._fs
        node, at = fs.root, b""
        for name in home.split(b"/")[:-1]:
            at = join(at, name)
            found = fs.lookup(node, name)
            if found is None or not found[0].is_dir:
                return at
            node = found[0]
            if node.lowers and not uncover.is_at_home(fs, node):
                return at
        return b""

    def _rename(self, here: bytes, there: bytes, stale: uncover.Stale) -> None:
        old, new = find(self._fs, here), find(self._fs, there)
        self._batch.write([self._line(self._next("renamed", there, here))])
        self._fs.rename(old.parent, old.name, new.parent, new.name)
        stale += [(old.parent.ino, old.name), (new.parent.ino, new.name)]
        self._moves.add(here, there)
        self._touched |= {here, there}

    def _free_name(self, parent: Node, home: bytes) -> bytes:
        """Return an unused path in the directory of *home*."""
        numbers = itertools.count(self.number)
        name = next(
            name for name in (b"%b%d" % (ASIDE, number) for number in numbers)
            if self._fs.lookup(parent, name) is None
        )  # fmt: skip
        return join(home.rpartition(b"/")[0], name)

    def remove_set_aside(self) -> Progress:
        """Remove the files set aside, after the selected renames out of them were reverted."""
        for aside, (home, since) in self._aside.items():
            path = self._moves.now(aside, since)
            self._removed_aside.add(path)
            place = find(self._fs, path)
            step = self._next("moved", path, home)
            self._batch.write([self._line(step)])
            stale: uncover.Stale = []
            uncover.uncover(self._fs, place.parent, place.name, self._batch.place(step.number), stale)
            *_, (first, _, _) = self._moves.before(path)
            self._renamed.append(Done(first))
            yield lambda stale=stale: self._forget(stale)  # type: ignore[misc]

    # --- everything else

    def revert_others(self, changes: Iterable[Change], *, metadata: bool) -> Progress:
        """Revert all changes except renames of directories."""
        plan = yield from self.plan(changes, metadata=metadata)
        self._batch.write(line[1:] for line in plan)
        yield from self._renamed
        # A hard link's name in the lower shows the upper's inode while any other name does. So the reverted
        # names stay hidden until all of them are reverted.
        try:
            yield from self._revert_by(plan, hides=bool(self._fs.indexed))
        finally:
            uncover.show_no_more(self._fs, self._hidden)

    def _revert_by(self, plan: Packed, *, hides: bool) -> Progress:
        """Do the steps of a plan; *hides*: whether names stay hidden first."""
        hidden: set[int] = set()
        for line in plan:
            step = step_of(line[1:])
            if step.kind == "whiteout":
                continue
            hide = hides and step.kind == "moved" and line.startswith(_SHOWS)
            done = yield from self._step(step, hidden=hide)
            if done.why_not or step.kind != "attributes" or step.path not in self._homes:
                yield done
            if hide and not done.why_not:
                hidden.add(step.number)
        for line in plan:
            step = step_of(line[1:])
            if step.number in hidden:
                step = step._replace(kind="shown")
            elif step.kind != "whiteout":
                continue
            done = yield from self._step(step)
            if step.kind == "whiteout" or done.why_not:
                yield done

    def plan(
        self, changes: Iterable[Change], *, metadata: bool
    ) -> Generator[Done | Seen | None, None, Packed]:
        """Return the lines of the log. A byte before each says whether the step makes a lower's name
        visible."""
        plan = Packed()
        seen: set[bytes] = set()
        whole: set[bytes] = set()
        last = None
        for number, change in enumerate(changes, 1):
            yield Seen(number) if number % OFTEN == 0 else None
            path = change.path if metadata else self._place(change)
            if path in self._removed_aside or is_below(path, self._removed_aside):
                continue
            try:
                unit = self._wanted(change, path, metadata=metadata)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                yield Done(path, why(error))
                continue
            if unit is None or unit.path == last or unit.path in seen or is_below(unit.path, whole):
                continue
            last = unit.path
            if unit.is_dir:
                whole.add(unit.path)
            if unit.is_dir or unit.path != path or change.source is not None:  # it may come again, later
                seen.add(unit.path)
            step = self._next(unit.kind, unit.path, attributes=unit.attributes)
            plan.add((_SHOWS if unit.shows_lower else b" ") + self._line(step))
        return plan

    def _wanted(self, change: Change, path: bytes, *, metadata: bool) -> _Unit | None:
        """Return the unit whose revert includes a change; None if the change is not to be reverted."""
        if change.path in self._homeless and change.source is not None:
            place = find(self._fs, path)
            shows = shown_below(self._fs, place.parent, place.name) is not None
            return _Unit("moved", path, shows_lower=shows, is_dir=True)
        if _is_bare(change):
            return None if metadata else self._made_anew(path)
        if metadata and change.kind not in "MR":
            return None
        return self._unit(change, path, metadata=metadata)

    def _step(self, step: Step, *, hidden: bool = False) -> Generator[Callable[[], None], None, Done]:
        stale: uncover.Stale = []
        why_not = ""
        try:
            self._do(step, stale, hidden=hidden)
        except OSError as error:
            why_not = why(error)
        self._touched.add(step.path.rpartition(b"/")[0])
        if step.attributes is not None and stat.S_ISDIR(step.attributes["mode"]):
            self._touched.add(step.path)
        if stale:
            yield lambda: self._forget(stale)
        return Done(step.path, why_not)

    def _place(self, change: Change) -> bytes:
        """Return the path of a change after the renames made by this revert."""
        if change.kind == "D":  # a file that was renamed to this name since is not the deleted one
            directory, _, name = change.path.rpartition(b"/")
            return join(self._moves.now(directory), name)
        if change.source is None or change.path in self._homeless:
            return self._moves.now(change.path)
        return change.source

    def _unit(self, change: Change, path: bytes, *, metadata: bool) -> _Unit | None:
        """Return the smallest unit that includes a change and can be reverted without others.

        StoreError if there is none, EXDEV below a volatile directory.
        """
        fs = self._fs
        node, parent = fs.root, None
        names = path.split(b"/") if path else []
        here = b""
        covers = b""
        for depth, name in enumerate(names):
            parent, here = node, join(here, name)
            found = fs.upper.lookup(parent.upper, name) if parent.upper is not None else None
            if found is None:
                if covers and change.kind == "D":
                    raise self._not_alone(change, covers)
                return self._of_a_link(change, path)
            if fs.is_whiteout(*found):
                return None if metadata else _Unit("whiteout", here, shows_lower=True)
            looked = fs.lookup(parent, name)
            if looked is None:
                return None
            node = looked[0]
            must_be_kept(fs, node)
            if node.is_dir and node.lowers:
                continue
            below = shown_below(fs, parent, name)
            if node.is_dir and depth < len(names) - 1:
                if self._selection.matches(here):
                    return _Unit("moved", here, shows_lower=below is not None, is_dir=True)
                covers = covers or (here if below is not None else b"")
                continue
            try:
                if metadata:
                    return self._attributes(change, here, node)
                if covers and change.kind != "A":
                    raise self._not_alone(change, covers)
                if below is not None and self._stays(node, below):
                    return self._in_place(here, node)
                return _Unit("moved", here, shows_lower=below is not None, is_dir=node.is_dir)
            finally:
                if not node.is_dir:
                    fs.release(node)  # there may be many
        return self._attributes(change, path, node)

    def _made_anew(self, path: bytes) -> _Unit | None:
        """Handle a directory that differs in its times alone: it may have been deleted and created again."""
        if not path:
            return None
        place = find(self._fs, path)
        found = self._fs.lookup(place.parent, place.name)
        if found is None or not found[0].is_dir:
            return None
        node = found[0]
        if node.lowers or shown_below(self._fs, place.parent, place.name) is None:
            return None
        return _Unit("moved", path, shows_lower=True, is_dir=True)

    def _stays(self, node: Node, below: Hit) -> bool:
        """Whether an inode must keep its number: it has several names in the lower, or is open."""
        if stat.S_IFMT(node.mode) != stat.S_IFMT(below[2].st_mode) or node.is_dir:
            return False
        if node.indexed is not None:
            return node.ino == number_of(self._fs, below)
        return is_open(self._fs, node)

    def _not_alone(self, change: Change, directory: bytes) -> StoreError:
        where = escape(directory)
        return StoreError(
            f"{escape(change.path)}: cannot be taken back alone: {where} was deleted and created again",
            f"revert {where}",
        )

    def _attributes(self, change: Change, path: bytes, node: Node) -> _Unit | None:
        if not METADATA.intersection(change.what) or node.upper is None:
            return None
        return _Unit(
            "attributes",
            path,
            attributes_to_json(uncover.attributes_of(self._fs, self._fs.upper, node.upper)),
        )

    def _of_a_link(self, change: Change, path: bytes) -> _Unit | None:
        """Handle a hard link that the upper has no entry for: the file was changed under another name."""
        place = find(self._fs, path)
        found = self._fs.lookup(place.parent, place.name)
        if found is None or found[0].indexed is None or change.kind == "D":
            return None
        return self._in_place(path, found[0])

    def _in_place(self, path: bytes, node: Node) -> _Unit:
        """Return how to revert an inode that must keep its number."""
        if stat.S_ISREG(node.mode) and not node.metacopy:
            return _Unit("copied", path)
        # The data of a metacopy, and the target of a symlink, are the lower's.
        was = uncover.attributes_of(self._fs, self._fs.upper, node.upper)
        return _Unit("attributes", path, attributes_to_json(was))

    def _do(self, step: Step, stale: uncover.Stale, *, hidden: bool) -> None:
        fs = self._fs
        if not step.path:
            number, root = fs.root.lowers[0]
            uncover.give_attributes(fs, fs.root, uncover.attributes_of(fs, fs.lowers[number], root), stale)
            return
        place = find(fs, step.path)
        if step.kind == "shown":
            uncover.show(fs, place.parent, place.name, stale, self._hidden)
            return
        if step.kind in {"moved", "whiteout"}:
            kept = self._batch.place(step.number)
            uncover.uncover(fs, place.parent, place.name, kept, stale, self._hidden if hidden else None)
            return
        node = fs.resolve(place.parent, place.name)
        if step.kind == "copied":
            found = fs.stack.find(place.parent.lowers, place.name)
            if not found:
                raise FileNotFoundError(errno.ENOENT, "no lower has this name", step.path)
            idle = uncover.must_be_idle(fs, node)
            if idle is None:
                node = fs.resolve(place.parent, place.name)
            if not node.metacopy:
                uncover.keep_copy(fs, fs.upper, node.upper, self._batch.place(step.number))
                layer, key = fs.lowers[found[-1][0]], found[-1][1]
                uncover.give_content(fs, node, layer, key, stale)
        below = node.lowers[0] if node.lowers else shown_below(fs, place.parent, place.name)
        if below is None:  # a renamed file that is completely in the upper, or a new one
            raise FileNotFoundError(errno.ENOENT, "no lower has this name", step.path)
        uncover.give_attributes(fs, node, uncover.attributes_of(fs, fs.lowers[below[0]], below[1]), stale)

    def drop_directories(self, bare: Iterable[bytes]) -> Progress:
        """Remove directories from the store that no longer differ from the lower's; *bare* never did."""
        fs = self._fs
        above = set(map(self._moves.now, bare))
        for path in self._touched:
            while path:
                above.add(path)
                path = path.rpartition(b"/")[0]
        for path in sorted(above, key=lambda path: path.count(b"/"), reverse=True):
            stale: uncover.Stale = []
            with suppress(OSError):
                place = find(fs, path)
                found = fs.lookup(place.parent, place.name)
                if found is not None and found[0].is_dir:
                    uncover.at_home(fs, found[0])  # it may have been renamed and renamed back
                    if not uncover.drop_directory(fs, found[0], stale) and self._selection.matches(path):
                        uncover.give_lower_times(fs, found[0], stale)
                    fs.release(found[0])
            if stale:
                yield lambda stale=stale: self._forget(stale)  # type: ignore[misc]
            yield None
        if self._selection.matches(b""):
            stale = []
            uncover.give_lower_times(fs, fs.root, stale)
            yield lambda: self._forget(stale)


class _Unit(NamedTuple):
    """A path that is reverted in one step, with everything below it if *is_dir*."""

    kind: str
    path: bytes
    attributes: dict[str, Any] | None = None
    shows_lower: bool = False
    """Whether a name of the lower that was hidden or replaced becomes visible."""
    is_dir: bool = False
    """Whether a directory is moved with its contents."""


_SHOWS = b"+"
