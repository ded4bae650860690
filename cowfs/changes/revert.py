"""Revert changes: show the lower's version again of what is selected.

This works on a union, mounted or not, one step at a time, and each step is one change of the store. A mount
keeps working meanwhile; the kernel is told which of its caches are stale. :mod:`cowfs.changes.undo` undoes
it.
"""

from __future__ import annotations

import errno
import itertools
import json
import stat
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from cowfs.changes import diff
from cowfs.changes.lowers import must_not_wait
from cowfs.changes.moves import Moves
from cowfs.changes.paths import is_below, join
from cowfs.changes.render import escape, from_json, json_line
from cowfs.changes.select import METADATA, Selection
from cowfs.changes.spool import Packed
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

Forget = Callable[[uncover.Stale], None]
"""Lets the kernel ask again. Blocks; for a thread."""


class Done(NamedTuple):
    """A step that was done, or that could not be done."""

    path: bytes
    why_not: str = ""
    kind: str = ""
    size: int = 0
    """Bytes of the store that it has freed, if that is what it is for."""


class Seen(NamedTuple):
    """So many changes were looked at."""

    changes: int
    whole: int = 0
    """About how many there are; 0 if that is not known."""


Progress = Iterator[Done | Seen | Callable[[], None] | None]
"""None where others may have a turn, a callable where a thread is to do something before the next step."""

OFTEN = 1000
"""After so many changes it is said how many they are by then."""


@dataclass(slots=True)
class Found:
    """A path of the merged tree."""

    parent: Node
    name: bytes
    nodes: list[Node] = field(default_factory=list)
    """Those on the way, the root first."""


def revert(
    fs: Overlay,
    selection: Selection,
    forget: Forget,
    undo: Callable[[Batch], Progress],
    *,
    metadata: bool = False,
) -> Progress:
    """Revert what *selection* selects; with *metadata* only owners, modes, times and xattrs.

    Raises CowfsError if a part of it cannot be reverted alone. Then it yields nothing, and *undo* reverts the
    renames already made.
    """
    must_not_wait(fs.lowers)
    changes, renames = Packed(), []
    prefix, lowers = fs.options.xattr_prefix, fs.stack.in_order()
    found = diff.steps(fs.upper, fs.root.upper, lowers, prefix, fs.index, directory_times=True)
    for change in selection.among(found):
        yield None
        if change is None:
            continue
        if change.type == "directory":  # what was taken back in it has changed that again
            change = replace(change, what=tuple(what for what in change.what if what != "times"))
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
        yield from work.take_back(_kept(changes), metadata=metadata)
        yield from work.drop_directories(each.path for each in _kept(changes) if _is_bare(each))
    except StoreError:
        if work.number:
            yield from (step for step in undo(batch) if not isinstance(step, Done))
        raise
    finally:
        if not batch.is_written:
            batch.remove()


def _kept(changes: Packed) -> Iterator[Change]:
    return (from_json(json.loads(line)) for line in changes)


def _is_bare(change: Change) -> bool:
    """Whether a directory is told of that says nothing."""
    return change.kind == "M" and not change.what


class _Revert:
    def __init__(self, fs: Overlay, selection: Selection, batch: Batch, forget: Forget) -> None:
        self._fs = fs
        self._selection = selection
        self._batch = batch
        self._forget = forget
        self._moves = Moves()
        """Where what was renamed was, and where it is again."""
        self._touched: set[bytes] = set()
        self._aside: dict[bytes, tuple[bytes, int]] = {}
        """What was in the way of a rename: where it was put, where it had been, and how many moves there had
        been by then."""
        self._away: set[bytes] = set()
        """Where of that was what was taken away."""
        self._homeless: set[bytes] = set()
        """What was renamed out of a directory that is gone, by its path when it was found."""
        self._renamed: list[Done] = []
        """What is to be told when the rest can be taken back, too."""
        self._homes: set[bytes] = set()
        """Where directories are again that were renamed: each is told once, whatever else of it changes."""
        self.number = 0
        self._bytes = 0
        """Of the log."""

    def _next(
        self, kind: str, path: bytes, source: bytes = b"", attributes: dict[str, Any] | None = None
    ) -> Step:
        step = Step(self.number, kind, path, source, attributes)
        self.number += 1
        return step

    def _line(self, step: Step) -> bytes:
        """Return a step as a line of the log. StoreError if the log would be larger than any that is read."""
        line = line_of(step)
        self._bytes += len(line) + 1
        if self._bytes > MOST_BYTES or step.number >= MOST_STEPS:
            raise StoreError(
                "these are more changes than can be reverted at once", "revert some directories first"
            )
        return line

    # --- renames

    def rename_back(self, renames: list[Change]) -> Progress:
        """Rename directories and files back; first those that held others then."""
        for change in sorted(renames, key=lambda change: change.source or b""):
            yield from self._rename_back(change)

    def _rename_back(self, change: Change) -> Progress:
        fs = self._fs
        assert change.source is not None
        here, home = self._moves.now(change.path), change.source
        missing = self._missing(home)
        if missing:
            if self._selection.matches(missing):
                self._homeless.add(change.path)
                return
            raise StoreError(
                f"{escape(change.path)}: the directory that {escape(home)} was in is not there any more",
                "revert that directory too",
            )
        new = find(fs, home)
        stale: uncover.Stale = []
        if fs.lookup(new.parent, new.name) is not None:
            if not self._selection.matches(home):
                raise StoreError(
                    f"{escape(change.path)}: there is another {escape(home)} now", "revert that one too"
                )
            aside = self._free_name(new.parent, home)
            self._rename(home, aside, stale)
            self._aside[aside] = home, len(self._moves)
            here = self._moves.now(change.path)  # which may be in it
        for at, since, until in self._moves.before(here):
            if at in self._aside and since <= self._aside[at][1] <= until:
                del self._aside[at]  # as when two have each other's name
                break
        self._rename(here, home, stale)
        node = fs.resolve(new.parent, new.name)
        if node.is_dir:
            uncover.at_home(fs, node)
        yield lambda: self._forget(stale)
        if change.type == "directory":  # else it is told with what else of it was changed
            self._renamed.append(Done(change.path))
            self._homes.add(home)

    def _missing(self, home: bytes) -> bytes:
        """Return the first directory above *home* that is gone, or is the lower's again; b"" if none is.

        New directories will do there.
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
        """Return a path beside *home* where nothing is."""
        numbers = itertools.count(self.number)
        name = next(
            name for name in (b"%b%d" % (ASIDE, number) for number in numbers)
            if self._fs.lookup(parent, name) is None
        )  # fmt: skip
        return join(home.rpartition(b"/")[0], name)

    def remove_set_aside(self) -> Progress:
        """Remove the directories set aside: every renamed entry in them, if selected, is back."""
        for aside, (home, since) in self._aside.items():
            path = self._moves.now(aside, since)
            self._away.add(path)
            place = find(self._fs, path)
            step = self._next("moved", path, home)
            self._batch.write([self._line(step)])
            stale: uncover.Stale = []
            uncover.uncover(self._fs, place.parent, place.name, self._batch.place(step.number), stale)
            *_, (first, _, _) = self._moves.before(path)
            self._renamed.append(Done(first))
            yield lambda stale=stale: self._forget(stale)  # type: ignore[misc]

    # --- everything else

    def take_back(self, changes: Iterable[Change], *, metadata: bool) -> Progress:
        """Do so with all but renames of directories."""
        plan = yield from self._plan(changes, metadata=metadata)
        self._batch.write(line[1:] for line in plan)
        yield from self._renamed
        # A lower's name of a hard link shows the lower's file again once no other name has the upper's: until
        # all are away that go, nothing shows.
        hides = bool(self._fs.indexed)
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

    def _plan(
        self, changes: Iterable[Change], *, metadata: bool
    ) -> Generator[Done | Seen | None, None, Packed]:
        """Return the lines of the log, each after a byte that says whether a name of the lower shows then."""
        plan = Packed()
        seen: set[bytes] = set()
        whole: set[bytes] = set()
        last = None
        for number, change in enumerate(changes, 1):
            yield Seen(number) if number % OFTEN == 0 else None
            path = change.path if metadata else self._place(change)
            if path in self._away or is_below(path, self._away):
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
            if unit.is_dir or unit.path != path or change.source is not None:  # may come again, and not next
                seen.add(unit.path)
            step = self._next(unit.kind, unit.path, attributes=unit.attributes)
            plan.add((_SHOWS if unit.shows_lower else b" ") + self._line(step))
        return plan

    def _wanted(self, change: Change, path: bytes, *, metadata: bool) -> _Unit | None:
        """Return by what a change is taken back, if it is to be."""
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
        """Return where a change is now."""
        if change.kind == "D":  # under that name; what was renamed to it since is another matter
            directory, _, name = change.path.rpartition(b"/")
            return join(self._moves.now(directory), name)
        if change.source is None or change.path in self._homeless:
            return self._moves.now(change.path)
        return change.source

    def _unit(self, change: Change, path: bytes, *, metadata: bool) -> _Unit | None:
        """Return the smallest thing that includes a change and can be reverted as one."""
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
            _must_be_kept(fs, node)
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
        """Whether an inode keeps its identity: it has several names in the lower, or is open."""
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
        """Handle a name that the upper has no entry for: another name of the file was changed."""
        place = find(self._fs, path)
        found = self._fs.lookup(place.parent, place.name)
        if found is None or found[0].indexed is None or change.kind == "D":
            return None
        return self._in_place(path, found[0])

    def _in_place(self, path: bytes, node: Node) -> _Unit:
        """Return how to revert an inode that must keep its identity."""
        if stat.S_ISREG(node.mode) and not node.metacopy:
            return _Unit("copied", path)
        was = uncover.attributes_of(
            self._fs, self._fs.upper, node.upper
        )  # its data, or target, is the lower's
        return _Unit("attributes", path, attributes_to_json(was))

    def _do(self, step: Step, stale: uncover.Stale, *, hidden: bool) -> None:
        fs = self._fs
        if not step.path:
            number, root = fs.root.lowers[0]
            uncover.give_attributes(fs, fs.root, uncover.attributes_of(fs, fs.lowers[number], root), stale)
            return
        place = find(fs, step.path)
        if step.kind in {"moved", "whiteout", "shown"}:
            kept = self._batch.place(step.number)
            uncover.uncover(fs, place.parent, place.name, kept, stale, hidden=hidden)
            return
        node = fs.resolve(place.parent, place.name)
        if step.kind == "copied":
            found = fs.stack.find(place.parent.lowers, place.name)
            if not found:
                raise FileNotFoundError(errno.ENOENT, "there is nothing of that name below", step.path)
            idle = uncover.must_be_idle(fs, node)
            if idle is None:
                node = fs.resolve(place.parent, place.name)
            if not node.metacopy:
                uncover.keep_copy(fs, fs.upper, node.upper, self._batch.place(step.number))
                layer, key = fs.lowers[found[-1][0]], found[-1][1]
                uncover.give_content(fs, node, layer, key, stale)
        below = node.lowers[0] if node.lowers else shown_below(fs, place.parent, place.name)
        if below is None:  # what was renamed and is whole, or new, has none
            raise FileNotFoundError(errno.ENOENT, "there is nothing of that name below", step.path)
        uncover.give_attributes(fs, node, uncover.attributes_of(fs, fs.lowers[below[0]], below[1]), stale)

    def drop_directories(self, bare: Iterable[bytes]) -> Progress:
        """Remove directories from the store that no longer say anything; *bare* are those that said nothing
        before.
        """
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
                    uncover.at_home(fs, found[0])  # it may have been renamed, and back, before
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
    """What is reverted in one step."""

    kind: str
    path: bytes
    attributes: dict[str, Any] | None = None
    shows_lower: bool = False
    """Whether a name of the lower shows again that was hidden or replaced."""
    is_dir: bool = False
    """Whether it is moved with all that is in it."""


_SHOWS = b"+"


def is_open(fs: Overlay, node: Node) -> bool:
    """Whether anybody has a file open, as far as we know (with images alone we are not told)."""
    return not fs.host.close_idle(node) or node.handles is not None


def find(fs: Overlay, path: bytes) -> Found:
    """Return the directory of a path, and the name in it. FileNotFoundError without that directory."""
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
    _must_be_kept(fs, node if child is None else child)
    return Found(node, name, nodes)


def _must_be_kept(fs: Overlay, node: Node) -> None:
    """Raise EXDEV for what is shown in place of what the store has there (:mod:`cowfs.overlay.graft`)."""
    if fs.union_of(node) is not fs:
        raise OSError(errno.EXDEV, "is below a volatile directory of this mount", node.name)


def why(error: OSError) -> str:
    """Say why a step could not be done."""
    if error.errno == errno.EBUSY:
        return "its data is still being copied to the store; try again later"
    if error.errno == errno.EEXIST:
        return "something else is there now"
    return error.strerror or str(error)
