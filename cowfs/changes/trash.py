"""The trash of a store: what was reverted, until that is undone or the trash is emptied.

Each use of ``cowfs revert`` makes a directory ``cowfs/trash/NUMBER`` in the store. In it, ``log`` has a line
of JSON for each step, written before the step is done, and one for each step that is undone; what a step
took out of the merged tree is there under the step's number.
"""

from __future__ import annotations

import base64
import json
import os
import stat
from array import array
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import islice
from typing import Any, NamedTuple

from cowfs.errors import StoreError
from cowfs.jsontext import whole
from cowfs.layers.base import File, Key, UpperLayer
from cowfs.overlay.uncover import Attributes
from cowfs.store.format import layout
from cowfs.types import AttrData

_LOG = b"log"
_LARGEST_LOG = 256 << 20
_KINDS = frozenset(("moved", "whiteout", "copied", "attributes", "renamed"))
_MOST_STEPS = 1 << 40
_MOST_ID = (1 << 32) - 2
_LINES = 1000
"""How many are written at once."""
_READ = 64 << 10
_LONGEST_LINE = 16 << 20
"""Bytes: a file has fewer attributes, and each takes a third more."""


class Step(NamedTuple):
    """One step of a revert, as it stands in the log."""

    number: int
    kind: str
    """``moved`` out of the tree; a ``whiteout`` removed; ``copied`` to the trash and written over in place;
    ``attributes`` written over; ``renamed`` back, to *path* from *source*. A step ``moved`` has a *source*
    if what it moved was renamed before, as it was in the way: where it was."""
    path: bytes
    source: bytes = b""
    attributes: dict[str, Any] | None = None


class Batch:
    """What one use of ``revert`` has reverted."""

    def __init__(self, layer: UpperLayer, parent: Key, name: bytes, key: Key) -> None:
        self.layer = layer
        self.key = key
        self.name = name
        self._parent = parent
        self._end: int | None = None

    def place(self, number: int) -> tuple[Key, bytes]:
        """Return where a step puts what it removes from the tree."""
        return self.key, b"%d" % number

    def write(self, lines: Iterable[bytes]) -> None:
        """Write what :func:`line_of` gives of steps into the log, and put it on disk. Blocks. ENOSPC."""
        whole = iter(lines)
        while piece := b"".join(line + b"\n" for line in islice(whole, _LINES)):
            self._append(piece, sync=False)
        self._append(b"", sync=True)

    def note_undone(self, step: Step) -> None:
        """Record that a step is undone. Blocks; not on disk yet."""
        self._append(json.dumps({"undone": step.number}).encode() + b"\n", sync=False)

    def _append(self, lines: bytes, *, sync: bool) -> None:
        found = self.layer.lookup(self.key, _LOG)
        if found is None:
            _, file = self.layer.create(self.key, _LOG, 0o600, *_owner(self.layer))
            end = 0
        else:
            file = self.layer.open(found[0], os.O_RDWR)
            end = found[1].st_size if self._end is None else self._end
        with closing(file):
            file.pwrite(lines, end)
            if sync:
                file.fsync(datasync=False)
        self._end = end + len(lines)

    def log(self) -> Log:
        """Read the log: the steps that are not undone. StoreError if it is damaged."""
        return Log(self)

    def open_log(self) -> File | None:
        """Open the log to be read; None if there is none."""
        found = self.layer.lookup(self.key, _LOG)
        return None if found is None else self.layer.open(found[0], os.O_RDONLY)

    def ends_at(self, end: int) -> None:
        """What is written comes after so many bytes of the log."""
        self._end = end

    def remove(self) -> None:
        """Delete everything in it. Blocks."""
        layout.empty(self.layer, self.key)
        self.layer.rmdir(self._parent, self.name, self.key)

    def is_empty(self) -> bool:
        """Whether only the log is left, and copies that a kill left unfinished."""
        return not any(entry.name.isdigit() for entry in self.layer.readdir(self.key))


class Log:
    """The steps of a batch that are not undone. Holds eight bytes of each; close it in the end.

    A last line that is not whole is of a step that was not begun.
    """

    def __init__(self, batch: Batch) -> None:
        self._name = batch.layer.name
        self._file = batch.open_log()
        self._starts = array("Q")
        self._undone: set[int] = set()
        self.renamed: list[Step] = []
        """Those of renames, and of what was moved that had been renamed."""
        end = 0
        try:
            for start, line in self._lines():
                self._look_at(start, line)
                end = start + len(line) + 1
        except BaseException:
            self.close()
            raise
        self._starts.append(end)
        batch.ends_at(end)
        self.renamed = [step for step in self.renamed if step.number not in self._undone]

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        if self._file is None:
            return
        size, rest, start = min(self._file.stat().st_size, _LARGEST_LOG), b"", 0
        for at in range(0, size, _READ):
            *lines, rest = (rest + self._file.pread(min(_READ, size - at), at)).split(b"\n")
            for line in lines:
                yield start, line
                start += len(line) + 1
            if len(rest) > _LONGEST_LINE:
                raise self._damaged()

    def _look_at(self, start: int, line: bytes) -> None:
        entry = self._parsed(line)
        if "undone" not in entry:
            step = self._step(entry)
            if step.source:
                self.renamed.append(step)
            self._starts.append(start)
            return
        try:
            self._undone.add(whole(entry["undone"], _MOST_STEPS))
        except (ValueError, TypeError):
            raise self._damaged() from None
        self._starts.append(start)

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            raise self._damaged() from None
        if not isinstance(entry, dict):
            raise self._damaged()
        return entry

    def _step(self, entry: dict[str, Any]) -> Step:
        try:
            return _from_json(entry)
        except (ValueError, KeyError, TypeError):
            raise self._damaged() from None

    def _damaged(self) -> StoreError:
        return StoreError(f"{self._name}: the log of what was reverted is damaged")

    def __reversed__(self) -> Iterator[Step]:
        """Yield them, the last first."""
        assert self._file is not None or len(self._starts) == 1
        for number in range(len(self._starts) - 2, -1, -1):
            assert self._file is not None
            start, end = self._starts[number], self._starts[number + 1]
            entry = self._parsed(self._file.pread(end - start, start))
            if "undone" in entry:
                continue
            step = self._step(entry)
            if step.number not in self._undone:
                yield step

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def new_batch(layer: UpperLayer) -> Batch:
    """Make an empty batch."""
    private = layout.find(layer, layout.PRIVATE)
    trash = layout.ensure_directory(layer, private, layout.TRASH, 0o700)
    last = max((int(entry.name) for entry in layer.readdir(trash) if entry.name.isdigit()), default=0)
    name = b"%d" % (last + 1)
    return Batch(layer, trash, name, layout.ensure_directory(layer, trash, name, 0o700))


def batches(layer: UpperLayer) -> Iterator[Batch]:
    """Yield the batches, the newest first."""
    trash = layout.find(layer, layout.PRIVATE, layout.TRASH)
    if trash is None:
        return
    numbers = [entry.name for entry in layer.readdir(trash) if entry.name.isdigit()]
    for name in sorted(numbers, key=int, reverse=True):
        found = layer.lookup(trash, name)
        if found is not None and stat.S_ISDIR(found[1].st_mode):
            yield Batch(layer, trash, name, found[0])


def _owner(layer: UpperLayer) -> tuple[int, int]:
    attr = layer.stat(layer.root)
    return attr.st_uid, attr.st_gid


def line_of(step: Step) -> bytes:
    """Return a step as a line of the log."""
    return json.dumps(_to_json(step)).encode()


def step_of(line: bytes) -> Step:
    """Return the step of a line that :func:`line_of` gave."""
    return _from_json(json.loads(line))


def _to_json(step: Step) -> dict[str, Any]:
    entry: dict[str, Any] = {"number": step.number, "kind": step.kind, "path": _text(step.path)}
    if step.source:
        entry["source"] = _text(step.source)
    if step.attributes is not None:
        entry["attributes"] = step.attributes
    return entry


def _from_json(entry: dict[str, Any]) -> Step:
    kind, attributes = entry["kind"], entry.get("attributes")
    if kind not in _KINDS or (kind == "attributes" and attributes is None):
        raise ValueError(kind)
    if attributes is not None:
        attributes_from_json(attributes)
    source = _bytes(entry["source"]) if "source" in entry else b""
    return Step(whole(entry["number"], _MOST_STEPS), kind, _bytes(entry["path"]), source, attributes)


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def attributes_to_json(attributes: Attributes) -> dict[str, Any]:
    """Return attributes as they are written in the log."""
    attr = attributes.attr
    return {
        "mode": attr.st_mode,
        "uid": attr.st_uid,
        "gid": attr.st_gid,
        "atime_ns": attr.st_atime_ns,
        "mtime_ns": attr.st_mtime_ns,
        "xattrs": [[base64.b64encode(part).decode() for part in pair] for pair in attributes.xattrs],
    }


def attributes_from_json(entry: dict[str, Any]) -> Attributes:
    """Return attributes from the log. KeyError, TypeError, ValueError if they are damaged."""
    attr = AttrData(
        st_mode=whole(entry["mode"], 0xFFFF),
        st_ino=0,
        st_uid=whole(entry["uid"], _MOST_ID),
        st_gid=whole(entry["gid"], _MOST_ID),
        st_atime_ns=whole(entry["atime_ns"], 1 << 63, -1 << 63),
        st_mtime_ns=whole(entry["mtime_ns"], 1 << 63, -1 << 63),
    )
    return Attributes(attr, [(_bytes(name), _bytes(value)) for name, value in entry["xattrs"]])
