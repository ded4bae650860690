"""Who made, wrote, renamed and removed a file, from what ``mount -o blame`` has recorded.

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
"""The end of the year 9998, in µs: it has a date in each time zone."""
_LONGEST_PATHS = 32 << 20
"""Bytes that the paths in one batch have together: a recorder ends it long before that."""
_MOST_NAMES_TOLD = 256 << 20
"""Bytes of all names that are told at once."""
_MOST_LOOKED_AT = 2 << 30
"""Bytes that are looked at to find what all directories above them were renamed to."""

KINDS = {
    **dict.fromkeys(MAKING, "made"),
    **dict.fromkeys(("write", "truncate"), "written"),
    **dict.fromkeys(("chmod", "chown", "utimes", "setxattr", "removexattr"), "attributes"),
    **dict.fromkeys(("rename", "exchange"), "renamed"),
    **dict.fromkeys(("remove", "rmdir"), "removed"),
}
"""What people call the operations."""


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
    """Yield the records in what :meth:`cowfs.store.format.records.Records.contents` gives, the newest first.

    Raises StoreError for a record that makes no sense; *name* is the name of the store.
    """
    for batch in batches(contents, name):
        try:
            found = list(_records(batch))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            raise damaged(name) from None
        yield from reversed(found)


def _records(batch: dict[str, Any]) -> Iterator[Record]:
    begun = _number(batch["begun"])
    processes = [_process(*told) for told in batch["processes"]]
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


def _number(told: object) -> int:
    if type(told) is not int or not 0 <= told <= _LATEST:
        raise ValueError(told)
    return told


def _process(pid: int, uid: int, program: str, command: list[str], cgroup: str) -> Process:
    for word in (program, *command, cgroup):
        raw(word)  # ValueError: half a character, which no name has
    return Process(_number(pid), _number(uid), program, tuple(command), cgroup)


class Deed(NamedTuple):
    """Something that one process did to a file."""

    operations: tuple[str, ...]
    time: int
    """µs since the epoch."""
    process: Process | None
    path: bytes
    """What it was called then."""
    to: bytes | None


@dataclass(slots=True)
class History:
    """What is known of one path: the first and the last event of each kind."""

    path: bytes
    first: dict[str, Deed] = field(default_factory=dict)
    last: dict[str, Deed] = field(default_factory=dict)
    names: dict[bytes, None] = field(default_factory=dict)
    """What the file was called at the time that has been reached, going back; and the path itself: what was
    there before the file was renamed to it counts, too."""

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
                return  # it has one more name, and existed already
            is_ours = is_ours or bool(before)
        if not is_ours:
            return
        for kind in dict.fromkeys(map(KINDS.__getitem__, operations)):
            self._note(kind, tuple(word for word in operations if KINDS[word] == kind), record)
        if record.to is None and record.path != self.path and _MAKES.intersection(operations):
            del self.names[record.path]  # what was there before is another file

    def _note(self, kind: str, operations: tuple[str, ...], record: Record) -> None:
        begin = Deed(operations, record.first, record.process, record.path, record.to)
        if kind not in self.last:
            self.last[kind] = begin if kind == "made" else begin._replace(time=record.last)
        self.first[kind] = begin

    def to_json(self) -> Iterator[dict[str, Any]]:
        """Yield a JSON object for each kind of event."""
        for kind in _in_order(self.first):
            entry: dict[str, Any] = {"version": VERSION}
            put_path(entry, "path", self.path)
            entry["what"] = kind
            entry["first"], entry["last"] = (_json(deeds[kind]) for deeds in (self.first, self.last))
            yield entry

    def deeds(self) -> Iterator[tuple[str, list[tuple[str, Deed]]]]:
        """Yield each kind with its first and last event, or with one where they are nearly the same."""
        for kind in _in_order(self.first):
            first, last = self.first[kind], self.last[kind]
            alike = first._replace(time=0) == last._replace(time=0) and last.time - first.time < _ALIKE
            yield kind, [("", last)] if alike else [("first", first), ("last", last)]


def _in_order(found: dict[str, Deed]) -> list[str]:
    return [kind for kind in dict.fromkeys(KINDS.values()) if kind in found]


def _before(record: Record, name: bytes) -> bytes | None:
    """Return the earlier name of what *name* names, if the record says that it got the name then."""
    assert record.to is not None
    before = _moved(name, record.to, record.path)
    return (
        _moved(name, record.path, record.to) if before is None and "exchange" in record.operations else before
    )


def _moved(name: bytes, there: bytes, before: bytes) -> bytes | None:
    """Return what *name* was called before *before* became *there*; None if it is neither *there* nor below
    it.
    """
    if name == there:
        return before
    if there and name.startswith(there + b"/"):
        return before + name[len(there) :]
    return None


def _json(deed: Deed) -> dict[str, Any]:
    entry: dict[str, Any] = {"time": stamp(deed.time), "operations": list(deed.operations)}
    put_path(entry, "path", deed.path)
    if deed.to is not None:
        put_path(entry, "to", deed.to)
    entry["process"] = None if deed.process is None else described(deed.process)
    return entry


class _Histories:
    """Histories, by the names that their files had at the time reached."""

    def __init__(self) -> None:
        self._by_name: dict[bytes, list[History]] = {}
        self._above: set[bytes] = set()
        """The directories that these names are in."""

    def add(self, history: History, names: Iterable[bytes]) -> None:
        for name in names:
            self._by_name.setdefault(name, []).append(history)
            while b"/" in name:
                name = name.rpartition(b"/")[0]
                if name in self._above:
                    break
                self._above.add(name)

    def go_back(self, record: Record) -> None:
        """Add a record to the histories that it may concern."""
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
        """Of files and directories that were renamed since."""

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
                self._later.pop(path, None)  # what was there before is another file
            return
        last = self.of(to)
        yield last
        if "rename" not in record.operations:
            yield self.of(path)
        if "exchange" in record.operations:
            self._later[path], self._later[to] = last, self.of(path)
        elif "rename" in record.operations:
            self._later[path] = last
            self._later[to] = to  # what was there before disappeared


def names_of(contents: Iterable[bytes], name: str, selects: Callable[[bytes], object]) -> list[bytes]:
    """Return all recorded paths that *selects* accepts, under their last names, sorted."""
    names, found, left, look = _Names(), set[bytes](), _MOST_NAMES_TOLD, _MOST_LOOKED_AT
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
    """Return what is recorded of each path, and the time of the first record (µs since the epoch).

    *contents* is what a store's records contain; *name* is for messages. Raises StoreError if they are
    damaged. The whole result is held in memory.
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
