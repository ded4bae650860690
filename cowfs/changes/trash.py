"""The trash of a store. It keeps reverted changes until the revert is undone or the trash is emptied.

Each ``cowfs revert`` makes a directory ``cowfs/trash/NUMBER`` in the store. The file ``log`` in it has a line
of JSON for each step, written before the step is done, and a line for each step that is undone. A file that a
step removed from the merged tree is in the directory, with the step's number as its name.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import stat
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
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
MOST_STEPS = 3_000_000
"""The most steps of one revert. The log has two lines for each when all of it is undone."""
MOST_BYTES = 192 << 20
"""The most bytes of the steps' lines."""
_MOST_ASIDE = 1 << 18
"""The most files in one revert that were in the way of a rename."""
ASIDE = b".cowfs-aside-"
"""The start of the temporary name of a file that was in the way of a rename."""
_GIVEN_UP = b".gone"
"""The end of the name of a batch that is being deleted."""
_KINDS = frozenset(("moved", "whiteout", "copied", "attributes", "renamed"))
_STEP = re.compile(
    rb'\{"number": ([0-9]{1,15}), "kind": "([a-z]{1,16})", "path": "([0-9A-Za-z+/=]*)"'
    rb'(?:, "source": "([0-9A-Za-z+/=]*)")?(, "attributes": \{.*\})?\}'
)
_UNDONE = re.compile(rb'\{"undone": ([0-9]{1,15})\}')
_MOST_BRACKETS, _MOST_COMMAS = 1 << 16, 1 << 17
"""Upper limits for one line. A valid line has fewer, and each takes much memory when the line is parsed."""
_MOST_ID = (1 << 32) - 2
_LINES = 1000
"""How many lines are written at once."""
_READ = 64 << 10
_NO_UNDO = "what was reverted is in the store's cowfs/trash; cowfs vacuum --trash deletes it"
_LONGEST_LINE = 16 << 20
"""Bytes. The extended attributes of a file are shorter, even in base64."""


class Step(NamedTuple):
    """One step of a revert, as written in the log."""

    number: int
    kind: str
    """``moved``: moved out of the tree into the trash. ``whiteout``: a whiteout was removed. ``copied``:
    copied to the trash, then overwritten in place. ``attributes``: the attributes were overwritten.
    ``renamed``: renamed back, from *source* to *path*. A ``moved`` step has a *source* if the file was in the
    way of a rename and had been renamed: its former path."""
    path: bytes
    source: bytes = b""
    attributes: dict[str, Any] | None = None


class Batch:
    """The directory in the trash of one ``cowfs revert``. Its methods block; OSError."""

    def __init__(self, layer: UpperLayer, parent: Key, name: bytes, key: Key) -> None:
        self.layer = layer
        self.key = key
        self.name = name
        self._parent = parent
        self._end: int | None = None

    @property
    def is_written(self) -> bool:
        """Whether the log has been begun."""
        return self._end is not None

    def place(self, number: int) -> tuple[Key, bytes]:
        """Return the directory and the name to which a step moves what it removes from the tree."""
        return self.key, b"%d" % number

    def write(self, lines: Iterable[bytes]) -> None:
        """Append lines from :func:`line_of` to the log. Blocks until they are on disk. ENOSPC, EIO."""
        whole = iter(lines)
        while piece := b"".join(line + b"\n" for line in islice(whole, _LINES)):
            self._append(piece, sync=False)
        self._append(b"", sync=True)

    def note_undone(self, numbers: Iterable[int]) -> None:
        """Record that these steps are undone. Blocks, but does not wait for the disk."""
        lines = b"".join(json.dumps({"undone": number}).encode() + b"\n" for number in numbers)
        if lines:
            self._append(lines, sync=False)

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
        """Open the log for :class:`Log`'s methods. Close it."""
        return Log(self)

    def open_log(self) -> File | None:
        """Open the file of the log for reading; None if there is none."""
        found = self.layer.lookup(self.key, _LOG)
        return None if found is None else self.layer.open(found[0], os.O_RDONLY)

    def ends_at(self, end: int) -> None:
        """Set where the next lines are written: after the first *end* bytes of the log."""
        self._end = end

    def remove(self) -> None:
        """Delete the directory with everything in it."""
        layout.empty(self.layer, self.key)
        self.layer.rmdir(self._parent, self.name, self.key)

    def give_up(self) -> None:
        """Give up the batch, in one step: nobody can undo it any more."""
        name = self.name + _GIVEN_UP
        self.layer.rename((self._parent, self.name), (self._parent, name), 0, moved=self.key)
        self.name = name

    def counted(self) -> Iterator[int]:
        """Count what is in it; yield now and then how many more were found. Blocks."""
        waiting = [self.key]
        while waiting:
            directory, entries = waiting.pop(), []
            with suppress(OSError):  # its mode may forbid that
                entries = self.layer.readdir(directory)
            yield len(entries)
            for entry in entries:
                below = layout.directory_of(self.layer, directory, entry)
                if below is not None:
                    waiting.append(below)
            if directory is not self.key:
                self.layer.forget(directory)

    def removing(self, leaves: Callable[[tuple[Key, bytes]], object]) -> Iterator[None]:
        """Delete everything in it, step by step; *leaves* as for :func:`layout.emptying`. Blocks."""
        yield from layout.emptying(self.layer, self.key, leaves)
        self.layer.rmdir(self._parent, self.name, self.key)

    def is_empty(self) -> bool:
        """Whether only the log is left, or copies that a killed process did not finish."""
        return not any(entry.name.isdigit() for entry in self.layer.readdir(self.key))


class Log:
    """The steps of a batch that are not undone. Takes nine bytes of memory for each. Close it.

    An incomplete last line is ignored: its step was not begun.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._name = batch.layer.name
        self._file = batch.open_log()
        self._starts = array("Q")
        self._undone = bytearray()
        self._renames = 0
        """The number of the last rename, plus one."""
        self._end = 0
        """The offset of the end of the last step. The lines after it say which steps are undone."""
        self.aside: dict[bytes, bytes] = {}
        """Files that were in the way of a rename: present path to former path, in the order of the steps."""

    def scan(self) -> Iterator[None]:
        """Read all lines; yield now and then. Call it once, first. Blocks. StoreError if the log is damaged.

        Time and memory are limited, whatever the log contains.
        """
        end = 0
        for number, (start, line) in enumerate(self._lines()):
            end = start + len(line) + 1
            self._scan_line(start, line)
            if number % _LINES == 0:
                yield None
        self._batch.ends_at(end)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        if self._file is None:
            return
        size, rest, start = self._file.stat().st_size, list[bytes](), 0
        if size > _LARGEST_LOG:
            raise self._damaged()
        for at in range(0, size, _READ):
            rest.append(self._file.pread(min(_READ, size - at), at))
            if b"\n" in rest[-1]:
                *lines, last = b"".join(rest).split(b"\n")
                rest = [last]
                for line in lines:
                    yield start, line
                    start += len(line) + 1
            if len(rest) > _LONGEST_LINE // _READ:
                raise self._damaged()

    def _scan_line(self, start: int, line: bytes) -> None:
        if found := _UNDONE.fullmatch(line):
            number = int(found[1])
            if number >= len(self._undone) or self._undone[number]:
                raise self._damaged()
            self._undone[number] = True
            return
        found = _STEP.fullmatch(line)
        number = len(self._starts)
        if found is None or int(found[1]) != number or number >= MOST_STEPS or start != self._end:
            raise self._damaged()
        if found[5]:
            self._step(line)
        if found[4]:
            self._note_aside(found[3], found[4])
        if found[2] == b"renamed":
            self._renames = number + 1
        self._starts.append(start)
        self._undone.append(False)
        self._end = start + len(line) + 1

    def _note_aside(self, path: bytes, source: bytes) -> None:
        try:
            where = binascii.a2b_base64(path)
            if ASIDE not in where[where.rfind(b"/") + 1 :]:
                return
            self.aside[where] = binascii.a2b_base64(source)
        except ValueError:
            raise self._damaged() from None
        if len(self.aside) > _MOST_ASIDE:
            raise self._damaged()

    def _step(self, line: bytes) -> Step:
        try:
            if line.count(b"[") > _MOST_BRACKETS or line.count(b"{") > 2 or line.count(b",") > _MOST_COMMAS:
                raise ValueError(len(line))
            return step_of(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._damaged() from None

    def _damaged(self) -> StoreError:
        return StoreError(f"{self._name}: the log of what was reverted is damaged", _NO_UNDO)

    def __reversed__(self) -> Iterator[Step]:
        """Yield the steps that :meth:`scan` found, the last first. Blocks. StoreError; OSError."""
        return self._before(len(self._starts))

    def renames(self) -> Iterator[Step]:
        """Yield the renames among them, the last first, at most 2^18. Blocks. StoreError; OSError."""
        steps = (step for step in self._before(self._renames) if step.kind == "renamed")
        return islice(steps, _MOST_ASIDE)

    def _before(self, count: int) -> Iterator[Step]:
        end = self._starts[count] if count < len(self._starts) else self._end
        for number in range(count - 1, -1, -1):
            assert self._file is not None
            start = self._starts[number]
            if not self._undone[number]:
                yield self._step(self._file.pread(end - start, start).removesuffix(b"\n"))
            end = start

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def new_batch(layer: UpperLayer) -> Batch:
    """Make an empty batch. Blocks; OSError."""
    private = layout.find(layer, layout.PRIVATE)
    trash = layout.ensure_directory(layer, private, layout.TRASH, 0o700)
    names = [entry.name.removesuffix(_GIVEN_UP) for entry in layer.readdir(trash)]
    last = max((int(name) for name in names if name.isdigit()), default=0)
    name = b"%d" % (last + 1)
    return Batch(layer, trash, name, layout.ensure_directory(layer, trash, name, 0o700))


def batches(layer: UpperLayer) -> Iterator[Batch]:
    """Yield the batches, the newest first. Blocks; OSError."""
    trash = layout.find(layer, layout.PRIVATE, layout.TRASH)
    if trash is None:
        return
    numbers = [entry.name for entry in layer.readdir(trash) if entry.name.isdigit()]
    for name in sorted(numbers, key=int, reverse=True):
        found = layer.lookup(trash, name)
        if found is not None and stat.S_ISDIR(found[1].st_mode):
            yield Batch(layer, trash, name, found[0])


def given_up(layer: UpperLayer) -> Iterator[Batch]:
    """Yield the batches that nobody can undo any more: ``vacuum --trash`` did not end."""
    trash = layout.find(layer, layout.PRIVATE, layout.TRASH)
    names = [] if trash is None else [entry.name for entry in layer.readdir(trash)]
    for name in names:
        found = layer.lookup(trash, name) if _is_given_up(name) else None
        if found is not None and stat.S_ISDIR(found[1].st_mode):
            yield Batch(layer, trash, name, found[0])


def _is_given_up(name: bytes) -> bool:
    return name.endswith(_GIVEN_UP) and name.removesuffix(_GIVEN_UP).isdigit()


def _owner(layer: UpperLayer) -> tuple[int, int]:
    attr = layer.stat(layer.root)
    return attr.st_uid, attr.st_gid


def line_of(step: Step) -> bytes:
    """Return a step as a line of the log."""
    return json.dumps(_to_json(step)).encode()


def step_of(line: bytes) -> Step:
    """Return the step of a line from :func:`line_of`. ValueError, KeyError, TypeError if it is invalid."""
    return _from_json(json.loads(line))


def _to_json(step: Step) -> dict[str, Any]:
    entry: dict[str, Any] = {"number": step.number, "kind": step.kind, "path": _text(step.path)}
    if step.source:
        entry["source"] = _text(step.source)
    if step.attributes is not None:
        entry["attributes"] = step.attributes
    return entry


def _from_json(entry: dict[str, Any]) -> Step:
    kind, attributes, path = entry["kind"], entry.get("attributes"), _bytes(entry["path"])
    if kind not in _KINDS or (kind == "attributes") != (attributes is not None):
        raise ValueError(kind)
    if attributes is not None:
        attributes_from_json(attributes)
    source = _bytes(entry["source"]) if "source" in entry else b""
    if not (path or attributes) or (kind == "renamed" and not source):
        raise ValueError(path)
    return Step(whole(entry["number"], MOST_STEPS), kind, path, source, attributes)


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def attributes_to_json(attributes: Attributes) -> dict[str, Any]:
    """Return attributes as an object for the log."""
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
