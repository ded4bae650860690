"""Find who made, wrote, renamed and removed a file, from the records of ``mount -o blame``.

The records are read from the newest to the oldest, and a file is followed to its earlier names. So an editor
or a package manager, which writes a new file and renames it, is named as the writer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cowfs.errors import StoreError
from cowfs.jsontext import put_path, raw, stamp
from cowfs.linux.processes import Process, described
from cowfs.store.format.records import HINT, MAKING, OPERATIONS, batches, damaged

VERSION = 1
_ROWS = 7
_ROWS_WITH_TO = 9
_MAKES = frozenset(MAKING)
_MOST_NAMES = 64
_ALIKE = 1_000_000
"""µs."""
_LATEST = 253370764800 * 1_000_000
"""The end of the year 9998, in µs. Python can show it in every time zone."""
_LONGEST_PATHS = 32 << 20
"""Bytes of all paths in one batch, at most. A recorder ends a batch long before that."""
_LONGEST_RESULT = 256 << 20
"""Bytes of all names in one result, at most."""
_MOST_EXAMINED = 2 << 30
"""Bytes of paths examined to find the new names of the directories above them, at most."""

KINDS = {
    **dict.fromkeys(MAKING, "made"),
    **dict.fromkeys(("write", "truncate"), "written"),
    **dict.fromkeys(("chmod", "chown", "utimes", "setxattr", "removexattr"), "attributes"),
    **dict.fromkeys(("rename", "exchange"), "renamed"),
    **dict.fromkeys(("remove", "rmdir"), "removed"),
}
"""Operation to the kind of event that is shown to users."""


class Record(NamedTuple):
    """What one process did to one file."""

    operations: tuple[str, ...]
    first: int
    """µs since the epoch."""
    last: int
    process: Process | None
    path: bytes
    to: bytes | None
    """The new path, of a rename and a link."""


def records(contents: Iterable[bytes], name: str) -> Iterator[Record]:
    """Yield the records in :meth:`cowfs.store.format.records.Records.contents`, the newest first.

    Blocks as *contents* does. StoreError for an invalid record; *name* is the store's name, for the message.
    """
    for batch in batches(contents, name):
        try:
            found = list(_records(batch))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            raise damaged(name) from None
        yield from reversed(found)


def _records(batch: dict[str, Any]) -> Iterator[Record]:
    begun = _number(batch["begun"])
    processes = [_process(*each) for each in batch["processes"]]
    directories = [raw(path) for path in batch["directories"]]
    left = _LONGEST_PATHS

    def path(directory: int, name: str) -> bytes:
        nonlocal left
        above = directories[_number(directory)] if directory != -1 else b""
        found = above + b"/" + raw(name) if above else raw(name)
        left -= len(found)
        if left < 0:
            raise ValueError(len(found))
        return found

    for record in batch["records"]:
        if len(record) not in {_ROWS, _ROWS_WITH_TO}:
            raise ValueError(record)
        bits, first, last, process, directory, name, _ = record[:_ROWS]
        operations = tuple(word for number, word in enumerate(OPERATIONS) if _number(bits) >> number & 1)
        yield Record(
            operations,
            _number(begun + first),
            _number(begun + last),
            processes[_number(process)] if process != -1 else None,
            path(directory, name),
            path(*record[_ROWS:]) if len(record) > _ROWS else None,
        )


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value <= _LATEST:
        raise ValueError(value)
    return value


def _process(pid: int, uid: int, program: str, command: list[str], cgroup: str) -> Process:
    for word in (program, *command, cgroup):
        raw(word)  # ValueError for half a surrogate pair, which no name contains
    return Process(_number(pid), _number(uid), program, tuple(command), cgroup)


class Event(NamedTuple):
    """Something that one process did to a file."""

    operations: tuple[str, ...]
    time: int
    """µs since the epoch."""
    process: Process | None
    path: bytes
    """The path at that time."""
    to: bytes | None


@dataclass(slots=True)
class History:
    """What is known of one path: the first and the last event of each kind."""

    path: bytes
    first: dict[str, Event] = field(default_factory=dict)
    last: dict[str, Event] = field(default_factory=dict)
    names: dict[bytes, None] = field(default_factory=dict)
    """The names of the file at the time reached while going back, and the path itself: files that had the
    path before this one count too."""

    def __post_init__(self) -> None:
        self.names[self.path] = None

    def add_older(self, record: Record) -> None:
        """Add a record that is older than all those added before."""
        is_ours, operations = record.path in self.names, record.operations
        if record.to is not None:
            before = [older for name in self.names if (older := _before(record, name)) is not None]
            if before:
                self.names.update(dict.fromkeys(before[: _MOST_NAMES - len(self.names)]))
            elif "link" in operations:
                return  # a new name of a file that existed already
            is_ours = is_ours or bool(before)
        if not is_ours:
            return
        for kind in dict.fromkeys(map(KINDS.__getitem__, operations)):
            self._note(kind, tuple(word for word in operations if KINDS[word] == kind), record)
        if record.to is None and record.path != self.path and _MAKES.intersection(operations):
            del self.names[record.path]  # before that, the path was another file's

    def _note(self, kind: str, operations: tuple[str, ...], record: Record) -> None:
        begin = Event(operations, record.first, record.process, record.path, record.to)
        if kind not in self.last:
            self.last[kind] = begin if kind == "made" else begin._replace(time=record.last)
        self.first[kind] = begin

    def to_json(self) -> Iterator[dict[str, Any]]:
        """Yield a JSON object for each kind of event."""
        for kind in _in_order(self.first):
            entry: dict[str, Any] = {"version": VERSION}
            put_path(entry, "path", self.path)
            entry["what"] = kind
            entry["first"], entry["last"] = (_json(events[kind]) for events in (self.first, self.last))
            yield entry

    def events(self) -> Iterator[tuple[str, list[tuple[str, Event]]]]:
        """Yield each kind with its first and last event, or with one where they are nearly the same."""
        for kind in _in_order(self.first):
            first, last = self.first[kind], self.last[kind]
            alike = first._replace(time=0) == last._replace(time=0) and last.time - first.time < _ALIKE
            yield kind, [("", last)] if alike else [("first", first), ("last", last)]


def _in_order(found: dict[str, Event]) -> list[str]:
    return [kind for kind in dict.fromkeys(KINDS.values()) if kind in found]


def _before(record: Record, name: bytes) -> bytes | None:
    """Return the former name of the file at *name* if the record gave it that name; else None."""
    assert record.to is not None
    before = _moved(name, record.to, record.path)
    return (
        _moved(name, record.path, record.to) if before is None and "exchange" in record.operations else before
    )


def _moved(name: bytes, there: bytes, before: bytes) -> bytes | None:
    """Return the name that *name* had before *before* became *there*; None if *name* is not at or below
    it."""
    if name == there:
        return before
    if there and name.startswith(there + b"/"):
        return before + name[len(there) :]
    return None


def _json(event: Event) -> dict[str, Any]:
    entry: dict[str, Any] = {"time": stamp(event.time), "operations": list(event.operations)}
    put_path(entry, "path", event.path)
    if event.to is not None:
        put_path(entry, "to", event.to)
    entry["process"] = None if event.process is None else described(event.process)
    return entry


class _Histories:
    """Histories, by the names that their files had at the time reached."""

    def __init__(self) -> None:
        self._by_name: dict[bytes, list[History]] = {}
        self._above: set[bytes] = set()
        """All directories above these names."""

    def add(self, history: History, names: Iterable[bytes]) -> None:
        for name in names:
            self._by_name.setdefault(name, []).append(history)
            while b"/" in name:
                name = name.rpartition(b"/")[0]
                if name in self._above:
                    break
                self._above.add(name)

    def go_back(self, record: Record) -> None:
        """Add a record, older than all before it, to the histories that it may concern."""
        found = {id(each): each for each in self._by_name.get(record.path, ())}
        if record.to is not None:
            found |= {id(each): each for each in self._by_name.get(record.to, ())}
            for directory in {record.path, record.to} & self._above:
                inside = directory + b"/"
                for name, below in self._by_name.items():
                    if name.startswith(inside):
                        found |= {id(each): each for each in below}
        for history in found.values():
            before = set(history.names)
            history.add_older(record)
            self.add(history, history.names.keys() - before)


class _Names:
    """The last name of each file, by the name it had at the time reached while going back."""

    def __init__(self) -> None:
        self._later: dict[bytes, bytes] = {}
        """Earlier name to last name, of files and directories that were renamed."""

    def of(self, path: bytes) -> bytes:
        """Return the last name of the file that was at *path*."""
        above, rest = path, b""
        while above:
            later = self._later.get(above)
            if later is not None:
                return later + rest
            directory, _, name = above.rpartition(b"/")
            above, rest = directory, b"/" + name + rest
        return path

    def go_back(self, record: Record) -> Iterator[bytes]:
        """Yield the last names of the files in a record, and go back to before it."""
        path, to = record.path, record.to
        if to is None:
            yield self.of(path)
            if _MAKES.intersection(record.operations):
                self._later.pop(path, None)  # before that, the path was another file's
            return
        last = self.of(to)
        yield last
        if "rename" not in record.operations:
            yield self.of(path)
        if "exchange" in record.operations:
            self._later[path], self._later[to] = last, self.of(path)
        elif "rename" in record.operations:
            self._later[path] = last
            self._later[to] = to  # the rename replaced the former file


def names_of(contents: Iterable[bytes], name: str, selects: Callable[[bytes], object]) -> list[bytes]:
    """Return the last names of all recorded files that *selects* accepts, sorted.

    Blocks as *contents* does. StoreError if the records are damaged, or take too much memory or time; *name*
    is for messages.
    """
    names, found, left, look = _Names(), set[bytes](), _LONGEST_RESULT, _MOST_EXAMINED
    for record in records(contents, name):
        look -= sum(len(path) * path.count(b"/") for path in (record.path, record.to or b""))
        if look < 0:
            raise StoreError(f"{name}: the names in the record of changes are too deep to be found", HINT)
        new = {path for path in names.go_back(record) if path not in found and selects(path)}
        found |= new
        left -= sum(map(len, new)) + (0 if record.to is None else len(record.path) + len(record.to))
        if left < 0:
            raise StoreError(f"{name}: the names in the record of changes take too much memory", HINT)
    return sorted(found)


def blame(contents: Iterable[bytes], paths: Iterable[bytes], name: str) -> tuple[list[History], int | None]:
    """Return the history of each path, and the time of the first record (µs since the epoch; None: no
    record).

    *contents* are the contents of a store's records, the newest first; *name* is for messages. Blocks as
    *contents* does. StoreError if they are damaged. The whole result is held in memory.
    """
    histories = [History(path) for path in paths]
    known = _Histories()
    for history in histories:
        known.add(history, [history.path])
    since = None
    for record in records(contents, name):
        since = record.first if since is None else min(since, record.first)
        known.go_back(record)
    return histories, since
