"""Write a report of the changes as one HTML page, which loads nothing else.

The page contains the facts as JSON, and a script (``report.js``) that shows part of them at a time, so that a
browser opens a page of 50,000 changes quickly. Its Content-Security-Policy allows that script and style by
their hashes, and no other script, image or request. Paths are escaped as for a terminal
(:func:`cowfs.changes.render.escape`), and the script inserts them as text, never as markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
import stat
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from xml.sax.saxutils import escape as xml

from cowfs.changes.du import APART
from cowfs.changes.pairs import Pair, Sides, files
from cowfs.changes.patch import patch_of
from cowfs.changes.render import Summary, escape
from cowfs.changes.select import Selection
from cowfs.changes.spool import Lines, Spool
from cowfs.changes.treemap import Areas
from cowfs.changes.version import Version
from cowfs.errors import printable
from cowfs.exports.timeline import Timeline
from cowfs.types import Change

if TYPE_CHECKING:
    from cowfs.changes.blame import Record
    from cowfs.changes.du import Used

_MOST_ROWS = 200_000
"""How many changes are listed. The others are only counted."""
_LARGEST_TEXT = 256 << 10
"""The size in bytes of the largest file whose differences are shown."""
_LONGEST_DIFF = 32 << 10
"""How many characters of one file's differences are shown."""
_DIFFS = 6 << 20
"""How many characters of differences the page has in all."""
_MOST_DIFFS = 2000
_LEAST_AREA = 8.0
"""Pixels: a treemap of any number of files has so many areas at most, and the page has a bounded size."""
_AT_A_TIME = 200
_HERE = Path(__file__).parent


@dataclass(slots=True)
class Facts:
    """The facts of a report besides the changes."""

    what: str
    """The store or the mountpoint, as the user gave it."""
    about: list[tuple[str, str]]
    """Names and values for the summary."""
    records: Iterable[Record] | None = None
    """The records of ``-o blame``, the newest first; None if there are none."""


Tick = Callable[[str, int, int], None]
"""Reports progress: called with the activity, how many are done, and how many there are (0: unknown)."""


class _Table:
    """The changes, a row for each. Their paths are in a file that has no name, and the rest takes some 50
    bytes of memory for each. Close it at the end."""

    def __init__(self) -> None:
        self.rows = Lines()
        self.diffs: list[str] = []
        self.left_out = 0
        """Changes that have no row."""
        self.latest = 0
        """Seconds since the epoch."""
        self.sizes = array("q"), array("q")
        """Before and after, of each row; -1: none."""
        self.diff_of = array("i")
        self.who, self.details = array("I"), array("I")
        """For each row, the numbers of its words."""
        self.compared = bytearray()
        """For each row, 1 if it shows differences."""
        self._words = {"": 0}
        self._keys = array("q")
        self._order = array("I")
        """The rows in the order of their keys."""

    def add(self, change: Change, row: list[str]) -> None:
        """Add a row. *row* are the fields that are known already."""
        self.rows.add(json.dumps(row).encode())
        self._keys.append(hash((change.path, change.kind == "D")))
        for numbers, value in zip(
            (*self.sizes, self.diff_of, self.who, self.details), (-1, -1, -1, 0, 0), strict=True
        ):
            numbers.append(value)
        self.compared.append(change.kind in "AD" or bool({"content", "target", "type"} & set(change.what)))

    def complete(self) -> None:
        """End adding rows; from now on :meth:`find` works."""
        self._order = array("I", sorted(range(len(self._keys)), key=self._keys.__getitem__))

    def find(self, path: bytes, *, gone: bool) -> int | None:
        """Return the row of a path, or of what was deleted there."""
        key = hash((path, gone))
        at = bisect_left(self._order, key, key=self._keys.__getitem__)
        found = self._order[at] if at < len(self._order) else None
        return found if found is not None and self._keys[found] == key else None

    def word(self, text: str) -> int:
        """Return the number of a text that many rows have."""
        return self._words.setdefault(text, len(self._words))

    def done_by(self, path: bytes, program: str) -> None:
        """Note which program was the last to do something to a path; ignore those before."""
        for gone in (False, True):
            at = self.find(path, gone=gone)
            if at is not None and not self.who[at]:
                self.who[at] = self.word(program)

    def __iter__(self) -> Iterator[list[Any]]:
        """Yield kind, path, what, size before and after, source, number of the differences, program, type,
        details."""
        words = [*self._words]
        before, after = self.sizes
        for at, line in enumerate(self.rows):
            kind, path, what, source, type_ = json.loads(line)
            who, details = words[self.who[at]], words[self.details[at]]
            yield [kind, path, what, before[at], after[at], source, self.diff_of[at], who, type_, details]


class Changes(Sides, Protocol):
    """The changes to report; see :class:`cowfs.api.Changes`."""

    def within(self, paths: Sequence[bytes]) -> Iterator[Change]:
        """Find the changes, at least all within *paths*."""

    def usage(self) -> Iterator[Used]:
        """Yield how much space each inode uses in the store."""


class Out(Protocol):
    """Writes the page."""

    def __call__(self, data: bytes, /) -> object:
        """Write *data*, all of it."""


def write_report(
    changes: Changes, facts: Facts, wanted: Selection, out: Out, tick: Tick = lambda *_: None
) -> None:
    """Write the page. Blocks. Takes some 50 bytes of memory for each change; raises what *changes* does."""
    reasons, areas = _used(changes, wanted, tick)
    summary, table = Summary(), _Table()
    with closing(table.rows):
        found = summary.counted(wanted.of(changes.within(wanted.places)))
        with closing(Spool(_listed(table, found, tick))) as listed:
            table.complete()
            reached = _fill(table, listed, changes, tick)
        timeline = Timeline(table.done_by)
        if facts.records is not None:
            for number, record in enumerate(facts.records):
                tick("records", number, 0)
                if wanted.matches(record.path) or (record.to is not None and wanted.matches(record.to)):
                    timeline.add(record)
        data = {
            "left": {"rows": table.left_out, "diffs": reached.skipped},
            "counts": [summary.added, summary.modified, summary.deleted, summary.renamed],
            "latest": table.latest,
            "reasons": reasons,
            "recorded": facts.records is not None,
            "programs": timeline.programs(),
        }
        picture = "" if areas.is_empty else areas.picture(_LEAST_AREA)
        for piece in _page(facts.what, facts.about, table, data, picture, timeline.picture()):
            out(piece)


def _listed(table: _Table, changes: Iterable[Change], tick: Tick) -> Iterator[Change]:
    """Add the changes to the table; yield those that fit into it, and may be compared."""
    for number, change in enumerate(changes):
        tick("changes", number, 0)
        if table.rows.count >= _MOST_ROWS:
            table.left_out += 1
            continue
        _list(table, change)
        if not (change.kind == "D" and change.type == "directory"):
            yield change


def _list(table: _Table, change: Change) -> None:
    slash = "/" if change.type == "directory" else ""
    what = [each for each in change.what if each != "xattrs"]
    if change.xattrs:
        what.append("xattrs " + " ".join(map(escape, change.xattrs)))
    elif "xattrs" in change.what:
        what.append("xattrs")
    source = "" if change.source is None else escape(change.source) + slash
    table.add(change, [change.kind, escape(change.path) + slash, ", ".join(what), source, change.type])


@dataclass(slots=True)
class _Reached:
    characters: int = 0
    skipped: int = 0
    """Texts whose differences were left out."""


def _fill(table: _Table, listed: Iterable[Change], changes: Changes, tick: Tick) -> _Reached:
    """Add sizes, attributes and differences to the rows."""
    reached = _Reached()
    for number, pair in enumerate(files(listed, changes)):
        tick("files", number, table.rows.count)
        if isinstance(pair, bytes):
            continue
        at = table.find(pair.new_path, gone=pair.new is None)
        if at is None:
            continue
        for sizes, version in zip(table.sizes, (pair.old, pair.new), strict=True):
            sizes[at] = _size(version)
        table.details[at] = table.word(_details(pair.old, pair.new))
        if pair.new is not None:
            table.latest = max(table.latest, pair.new.attr.st_mtime_ns // 10**9)
        if table.compared[at]:
            _add_diff(table, at, pair, reached)
    return reached


def _add_diff(table: _Table, at: int, pair: Pair, reached: _Reached) -> None:
    both = [version for version in (pair.old, pair.new) if version is not None]
    sizes = [version.attr.st_size for version in both if version.is_file or version.is_link]
    if not sizes or not max(sizes):
        return
    if max(sizes) > _LARGEST_TEXT or len(table.diffs) >= _MOST_DIFFS or reached.characters >= _DIFFS:
        reached.skipped += 1
        return
    try:
        told = patch_of(pair, binary=False)
    except OSError:  # deleted meanwhile, in a mounted store
        reached.skipped += 1
        return
    text = _shown(told)
    if not text:
        return
    reached.characters += len(text)
    table.diff_of[at] = len(table.diffs)
    table.diffs.append(text)


def _shown(patch: bytes) -> str:
    """Return the differences in a patch of one file, without git's lines; "" for a binary file."""
    lines = patch.decode("utf-8", "surrogateescape").split("\n")
    begin = next((number for number, line in enumerate(lines) if line.startswith("@@ ")), None)
    if begin is None:
        return ""
    kept: list[str] = []
    room = _LONGEST_DIFF
    for number, line in enumerate(lines[begin:], begin):
        plain = "\t".join(map(printable, line.split("\t")))
        room -= len(plain) + 1
        if room < 0:
            kept.append(f"\\ {len(lines) - number} more lines are left out; cowfs diff -p shows them")
            break
        kept.append(plain)
    return "\n".join(kept)


def _size(version: Version | None) -> int:
    return version.attr.st_size if version is not None and not version.is_dir else -1


def _details(old: Version | None, new: Version | None) -> str:
    """Return mode and owner; both versions of those that differ."""
    shown = []
    for name, of in (("mode", _mode), ("owner", _owner)):
        values = [of(version) for version in (old, new) if version is not None]
        shown.append(f"{name} {' → '.join(dict.fromkeys(values))}")
    return ", ".join(shown)


def _mode(version: Version) -> str:
    return f"{stat.S_IMODE(version.attr.st_mode):04o}"


def _owner(version: Version) -> str:
    return f"{version.attr.st_uid}:{version.attr.st_gid}"


def _used(changes: Changes, wanted: Selection, tick: Tick) -> tuple[list[tuple[str, int]], Areas]:
    """Return how much of the store is taken for each reason, and where."""
    reasons: dict[str, int] = {}
    areas = Areas()
    for number, used in enumerate(changes.usage()):
        tick("inodes", number, 0)
        is_file = used.reason not in APART
        if is_file and not wanted.matches(used.path):
            continue
        reasons[used.reason] = reasons.get(used.reason, 0) + used.size
        if is_file and used.size:
            areas.add(used.path, used.reason, used.size)
    return sorted(reasons.items(), key=lambda item: (-item[1], item[0])), areas


# --- the page


def _page(
    what: str, about: list[tuple[str, str]], table: _Table, data: dict[str, Any], picture: str, timeline: str
) -> Iterable[bytes]:
    script, style = ((_HERE / f"report.{kind}").read_text(encoding="ascii") for kind in ("js", "css"))
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    title = xml(printable(what))
    rows = "".join(f"<dt>{xml(name)}</dt><dd>{xml(printable(value))}</dd>" for name, value in about)
    parts = {"h-summary": "Summary", "h-time": timeline and "Time", "h-space": picture and "Space"}
    links = " ".join(f'<a href="#{at}">{name}</a>' for at, name in parts.items() if name)
    links += ' <a href="#changes">Changes</a>'
    head = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta name="color-scheme" content="light dark">
<title>Changes in {title}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#changes">Skip to the list of changes</a>
<header><h1>Changes in <bdi>{title}</bdi></h1>
<nav aria-label="Parts of this page">{links}</nav></header>
<main>
<noscript><p class="note">This page needs JavaScript to list the changes. It loads nothing.</p></noscript>
<section aria-labelledby="h-summary"><h2 id="h-summary">Summary</h2>
<div id="counts" class="counts"></div><dl id="about">{rows}</dl></section>
"""
    yield _ascii(head)
    if timeline:
        yield _ascii(
            '<section aria-labelledby="h-time"><h2 id="h-time">When, and by what</h2>'
            f'<div class="wide">{timeline}</div><div id="programs"></div></section>\n'
        )
    if picture:
        yield _ascii(
            '<section aria-labelledby="h-space"><h2 id="h-space">What fills the store</h2>'
            '<div id="reasons"></div><p class="hint">The larger an area, the more is there. '
            "Click one to list what is in it.</p>"
            f'<div class="wide" id="map">{picture}</div></section>\n'
        )
    yield (
        b'<section aria-labelledby="changes"><h2 id="changes" tabindex="-1">What was changed</h2>'
        b'<div id="table"></div></section>\n</main>\n<script id="data" type="application/json">'
    )
    yield from _data(table, data)
    yield f"</script>\n<script>{script}</script>\n</body>\n</html>\n".encode()


def _data(table: _Table, data: dict[str, Any]) -> Iterator[bytes]:
    """Yield in_script() of the data, a part at a time."""
    for name, values in (("rows", iter(table)), ("diffs", iter(table.diffs))):
        yield b'%b"%b":[' % (b"{" if name == "rows" else b"],", name.encode())
        comma = ""
        while piece := [*islice(values, _AT_A_TIME)]:
            yield (comma + in_script(piece)[1:-1]).encode()
            comma = ","
    yield b"]," + in_script(data)[1:].encode()


def _ascii(markup: str) -> bytes:
    return markup.encode("ascii", "xmlcharrefreplace")


def in_script(data: object) -> str:
    """Return JSON for a script element: ASCII, without anything that ends the element or begins a comment."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
