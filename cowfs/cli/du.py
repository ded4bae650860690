"""``cowfs du``: show what fills a store."""

from __future__ import annotations

import argparse
import heapq
import json
import sys
from collections import Counter, defaultdict
from typing import IO, TYPE_CHECKING

from cowfs.cli import options
from cowfs.cli.output import Tally, progress_line, say, say_fields, warn
from cowfs.errors import CowfsError, UsageError

if TYPE_CHECKING:
    from cowfs.api import Changes, Lowers
    from cowfs.changes.du import Used

VERSION = 1
_STANDARD_OUTPUT = "-"

DESCRIPTION = """\
Show what fills a store: how much space is taken, for what reason, and below which directories; and how much
of it `cowfs vacuum` and `cowfs vacuum --trash` would free.
"""
EPILOG = """\
The sum is the used space that df(1) shows. A file with several names counts once. The last JSON object is
{"version": 1, "reclaimable": {"vacuum": BYTES, "trash": BYTES}}; -z leaves it out.

examples:
  cowfs du /mnt                     by reason, and the ten largest directories and files
  cowfs du sysrcd.bs --top 30       the thirty largest
  cowfs du /mnt --treemap map.svg   a picture: the larger an area, the more it takes
  cowfs du sysrcd.bs --json | jq -r 'select(.reason == "new") | .path'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("what", metavar="STORE|MOUNTPOINT")
    parser.add_argument("--top", metavar="N", type=_number, default=10, help="list N paths (default: 10)")
    parser.add_argument("--treemap", metavar="FILE", help="draw a treemap: an SVG image; -: standard output")
    parser.add_argument("-f", "--force", action="store_true", help="replace FILE if it exists")
    options.add_json_or_null(
        parser,
        "reason, bytes, path",
        "print one JSON object per line: version path reason size; last, reclaimable",
    )
    parser.add_argument(
        "--programs",
        action="store_true",
        help="also add up by the program that changed a file last (-o blame)",
    )
    options.add_lower(parser)


def _number(text: str) -> int:
    if not text.isdecimal():
        raise UsageError(f"--top: {text!r} is not a number", "give 0 or more")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Show what fills the store."""
    from cowfs.exports.target import new_file

    if args.force and not args.treemap:
        raise UsageError("--force replaces the file of --treemap", "add --treemap FILE")
    if not args.treemap:
        return _show(args, None)
    if args.treemap == _STANDARD_OUTPUT:
        if args.json or args.null:
            raise UsageError(
                "--treemap -: standard output can hold the picture or the list",
                "leave one of them out, or give --treemap a file",
            )
        return _show(args, sys.stdout.buffer)
    with new_file(args.treemap, force=args.force) as fd, open(fd, "wb", closefd=False) as picture:
        return _show(args, picture)


def _show(args: argparse.Namespace, picture: IO[bytes] | None) -> int:
    from cowfs.api import open_changes
    from cowfs.changes.du import APART
    from cowfs.changes.treemap import Areas
    from cowfs.exports.target import must_be_elsewhere

    lowers = options.lowers_of(args)
    total, areas = _Total(args.top), Areas()
    who: dict[bytes, str] = {}
    trash = None
    with open_changes(args.what, lowers, warn) as changes, progress_line() as progress:
        if picture is not None and args.treemap != _STANDARD_OUTPUT:
            must_be_elsewhere(args.treemap, changes.paths())
        if args.programs:
            who = _programs(changes, args.what)
        tally = Tally(progress, "files")
        tally.expect(changes.count_names)
        for used in changes.usage():
            tally.add()
            if used.reason == "trash":
                trash = 0 if trash is None else trash + used.size  # its first directory stays
            if args.json or args.null:
                _show_file(used, as_json=args.json)
            if picture is not None and used.size and used.reason not in APART:
                areas.add(used.path, used.reason, used.size)
            if not (args.json or args.null):
                total.add(used, who)
    if picture is not None:
        picture.write(areas.picture().encode())
        if args.treemap == _STANDARD_OUTPUT:
            picture.flush()
            return 0
    free = {} if args.null else _reclaimable(args.what, lowers, trash or 0)
    if args.json:
        print(json.dumps({"version": VERSION, "reclaimable": free}))
    elif not args.null:
        _show_sums(args, total, free)
    sys.stdout.flush()
    return 0


def _show_file(used: Used, *, as_json: bool) -> None:
    from cowfs.jsontext import put_path

    if not as_json:
        say_fields(used.reason, used.size, used.path)
        return
    entry: dict[str, object] = {"version": VERSION}
    put_path(entry, "path", used.path)
    print(json.dumps(entry | {"reason": used.reason, "size": used.size}))


def _show_sums(args: argparse.Namespace, total: _Total, free: dict[str, int | None]) -> None:
    from cowfs.changes.render import escape
    from cowfs.store.format.sizes import format_size

    _show_reasons(total.reasons)
    for command, size in free.items():
        if size:
            options_of = "" if command == "vacuum" else f" --{command}"
            say(f"{format_size(size):>12}  of this cowfs vacuum{options_of} would free")
    if args.programs:
        for name, size in total.programs.most_common(args.top):
            say(f"{format_size(size):>12}  by {name}")
    for path, size in total.largest():
        say(f"{format_size(size):>12}  {escape(path)}")


def _reclaimable(what: str, lowers: Lowers | None, trash: int) -> dict[str, int | None]:
    """Return how many bytes each command would free; None if unknown, which is reported."""
    from cowfs.api import reclaimable

    free: int | None = None
    try:
        with progress_line() as progress:
            progress("comparing copies with the lower")
            free = reclaimable(what, lowers, lambda _: None)
    except CowfsError as failure:
        warn(f"{failure.message}: the space that could be freed is unknown")
    return {"vacuum": free, "trash": trash}


class _Total:
    """Adds up sizes. Holds all directories in memory, but only the largest files."""

    def __init__(self, top: int) -> None:
        self.reasons: dict[str, int] = defaultdict(int)
        self.programs: Counter[str] = Counter()
        self._top = top
        self._directories: dict[bytes, int] = defaultdict(int)
        self._largest: list[tuple[int, bytes]] = []

    def add(self, used: Used, who: dict[bytes, str]) -> None:
        from cowfs.changes.du import APART

        self.reasons[used.reason] += used.size
        if used.reason in APART or not used.size:
            return
        self.programs[who.get(used.path, "unrecorded programs")] += used.size
        path = used.path
        if not used.is_dir:
            heapq.heappush(self._largest, (used.size, path))
            if len(self._largest) > 4 * self._top:
                heapq.heappop(self._largest)
            path = path.rpartition(b"/")[0]
        while path:
            self._directories[path] += used.size
            path = path.rpartition(b"/")[0]

    def largest(self) -> list[tuple[bytes, int]]:
        """Return the largest directories, with the size of their contents, and the largest files."""
        sizes = Counter(self._directories)
        for size, path in self._largest:
            sizes[path] += size  # a file may also be in the layer of a checkpoint
        return sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[: self._top]


def _programs(changes: Changes, what: str) -> dict[bytes, str]:
    """Return the program that changed each path last."""
    from cowfs.exports.timeline import Timeline

    records = changes.records()
    if records is None:
        raise UsageError(
            f"{what}: nothing is recorded", "cowfs mount -o blame records it; leave --programs out"
        )
    timeline = Timeline()
    for record in records:
        timeline.add(record)
    return timeline.who


def _show_reasons(reasons: dict[str, int]) -> None:
    from cowfs.changes.du import REASONS
    from cowfs.store.format.sizes import format_size

    for reason, meaning in REASONS.items():
        if reasons.get(reason):
            say(f"{format_size(reasons[reason]):>12}  {reason:<12} {meaning}")
    say(f"{format_size(sum(reasons.values())):>12}  in all")
