"""Record in the store which processes make changes, for ``-o blame``.

All that one process does to one file becomes one record, as long as the batch is open and the file keeps its
name. So unpacking a thousand files makes a thousand records, and a log that grows all day makes one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

from cowfs.fuse import libfuse
from cowfs.fuse.paths import Place
from cowfs.jsontext import text
from cowfs.linux.processes import Process
from cowfs.overlay.node import Node, path_of
from cowfs.store.format.records import MAKING, MOST_RECORDS, OPERATIONS, Records, pack

log = logging.getLogger(__name__)

_MOST_BYTES = 32 << 10
"""A batch with this many bytes of names and command lines is full."""
_MAKING = (1 << len(MAKING)) - 1
_CREATE, _WRITE, *_OTHERS = (
    1 << OPERATIONS.index(word) for word in ("create", "write", "chmod", "chown", "utimes")
)
_NOTED = [
    sum(bit for number, bit in enumerate((_WRITE, *_OTHERS)) if changes >> number & 1)
    for changes in range(16)
]
"""The operations of a record, indexed by the result of :data:`cowfs.fuse.libfuse.changes`."""
_OPERATIONS, _LAST, _BY, _INO = 0, 2, 3, 6
"""The indexes of these fields in a record."""


class Recorder:
    """The open batch of a store's records (docs/store-format.md), which :meth:`save` writes to the store.

    If the store refuses a write, recording stops, and the log says so once.
    """

    def __init__(self, records: Records, name: str) -> None:
        self._records: Records | None = records
        self._name = name
        self._changed = False
        self._begin()

    def _begin(self) -> None:
        self._base = time.time_ns() // 1000
        self._batch: list[list[Any]] = []
        self._open: dict[Node, list[Any]] = {}
        """The last record of each file that can still be extended."""
        self._processes: list[Process] = []
        self._numbers: dict[int, int] = {id(None): -1}
        """The index of each process in the batch, by its id(), because processes are compared often."""
        self._directories: dict[Node, int] = {}
        self._paths: list[str] = []
        self._bytes = 0
        libfuse.note(0, 0, 0)
        self.last: list[Any] | None = None
        """The record of the last change, if it can still be extended."""

    def _ends(self) -> None:
        """End the last record: the next change does not belong to it."""
        self.adds(libfuse.note(0, 0, 0))
        self.last = None

    # --- the changes

    def changed(self, operation: int, process: Process | None, node: Node, place: Place) -> None:
        """Record a change to the file at *place*."""
        now = time.time_ns() // 1000 - self._base
        record = self._open.get(node)
        if record is not None and record[_BY] == self._numbers.get(id(process)):
            record[_OPERATIONS] |= operation
            record[_LAST] = now
            self._changed = True
            self.last = record
            return
        self.last = self._open[node] = self._add(operation, process, node.ino, place)

    def named(
        self,
        operation: int,
        process: Process | None,
        node: Node | None,
        place: Place,
        to: Place | None = None,
    ) -> None:
        """Record that *node* got or lost a name, or that its name was changed to *to*."""
        record = self._add(operation, process, node.ino if node is not None else 0, place, to)
        if to is None and node is not None and operation & _MAKING:
            self.last = self._open[node] = record
        else:
            self.last = None

    def created(self, process: Process | None, directory: Node | None, name: bytes, node: Node) -> None:
        """Record that a file was created: like :meth:`named`, but faster."""
        number = self._numbers.get(id(process))
        above = None if directory is None else self._directories.get(directory)
        if number is None or above is None or len(self._batch) >= MOST_RECORDS or self._bytes > _MOST_BYTES:
            self.named(_CREATE, process, node, (directory, name))
            return
        now = time.time_ns() // 1000 - self._base
        record = [_CREATE, now, now, number, above, text(name), node.ino]
        self.last = self._open[node] = record
        self._bytes += len(name)
        self._batch.append(record)
        self._changed = True

    def adds(self, noted: int) -> None:
        """Add to the last record what :data:`cowfs.fuse.libfuse.changes` says."""
        if self.last is not None:
            more = _NOTED[noted & 15] & ~self.last[_OPERATIONS]
            if more:
                self.last[_OPERATIONS] |= more
                self._changed = True

    def wrote(self, record: list[Any]) -> None:
        """Note in *record* that its file was also written."""
        record[_OPERATIONS] |= _WRITE
        libfuse.wrote(record[_INO])
        self._changed = True

    def closes(self, node: Node, *, moved: bool) -> None:
        """End the record of a file, which has *moved* or lost a name."""
        self._ends()
        if moved and node.is_dir:  # with everything below it
            self._open.clear()
            self._directories.clear()
        else:
            self._open.pop(node, None)
            self._directories.pop(node, None)

    def forget(self) -> None:
        """End all records: names may have changed in an unknown way."""
        self._open.clear()
        self._directories.clear()
        self._ends()

    def _add(
        self, operation: int, process: Process | None, ino: int, place: Place, to: Place | None = None
    ) -> list[Any]:
        if len(self._batch) >= MOST_RECORDS or self._bytes > _MOST_BYTES:
            self._end_batch()
        now = max(time.time_ns() // 1000 - self._base, 0)
        number = self._numbers.get(id(process))
        if number is None:
            assert process is not None
            number = self._numbers[id(process)] = len(self._processes)
            self._processes.append(process)
            self._bytes += 64 + len(process.program) + len(process.cgroup) + sum(map(len, process.command))
        record = [
            operation,
            now,
            now,
            number,
            self._directory(place[0]),
            text(place[1]),
            ino,
        ]
        self._bytes += len(place[1])
        if to is not None:
            record += [self._directory(to[0]), text(to[1])]
            self._bytes += len(to[1])
        self._batch.append(record)
        self._changed = True
        return record

    def _directory(self, node: Node | None) -> int:
        """Return the index of a directory's path in the list; -1 for the root."""
        if node is None:
            return -1
        number = self._directories.get(node)
        if number is None:
            path = text(path_of(node))
            number = self._directories[node] = len(self._paths)
            self._paths.append(path)
            self._bytes += len(path)
        return number

    # --- writing the records

    def contents(self) -> Iterator[bytes]:
        """Save new records, and return all, as :class:`Records` does."""
        self.save()
        return iter(()) if self._records is None else self._records.contents()

    def save(self) -> None:
        """Write new records to the store: they are then as safe as any data written to it."""
        self.adds(libfuse.changes())
        if self._changed and self._records is not None:
            self._changed = False
            try:
                if not self._records.keep_draft(self._packed()):
                    self._end_batch()
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        """Save new records, and close the file. Call it before the store is closed."""
        self.save()
        if self._records is not None:
            self._records.close()
            self._records = None

    def _end_batch(self) -> None:
        self.adds(libfuse.changes())
        self._changed = False
        if self._batch and self._records is not None:
            try:
                self._records.end_draft(self._packed())
            except OSError as error:
                self._give_up(error)
        self._begin()

    def _give_up(self, error: OSError) -> None:
        log.warning("%s: changes are no longer recorded: %s", self._name, error.strerror)
        if self._records is not None:
            self._records.close()
            self._records = None

    def _packed(self) -> bytes:
        return pack(
            {
                "begun": self._base,
                "processes": self._processes,
                "directories": self._paths,
                "records": self._batch,
            }
        )
