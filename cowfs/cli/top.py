"""``cowfs top``: show the requests to a mount, their rates, and the time of the answers."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cowfs.cli.output import say
from cowfs.cli.requests import Operation, Requests, caches_in, number, requests_in, why_none
from cowfs.client import checked_answer, facts_of, find_mount, resident, the_mount
from cowfs.errors import MountFailure, SystemFailure, UsageError, printable
from cowfs.linux.mount_table import MountInfo

_SHORTEST = 0.1
"""The shortest delay in seconds."""
_LONGEST = 86400.0
_BAR = 5
_NAME = 11
"""The width of a name, such as READDIRPLUS. A table of usual numbers then fits into 80 columns."""
_HOME, _CLEAR, _TO_END_OF_LINE, _TO_END = "\x1b[H", "\x1b[2J", "\x1b[K", "\x1b[J"

DESCRIPTION = "Show which requests a mount receives, how many, and how long they take."
EPILOG = """\
The first round covers the time since the mount; each later round covers the time since the previous one. For
each operation it shows the number of requests, the share of the total time, the time per request (mean,
median, and 99th percentile, the latter two accurate to one eighth), and the number of errors. Looking up a
name that does not exist is not counted as an error; reading an extended attribute that does not exist is.
FORGET has no answer, so it takes no time here. Press Ctrl-C to quit.

examples:
  cowfs top /mnt                 every two seconds, until Ctrl-C
  cowfs top /mnt -n 1            once: since the mount
  cowfs top /mnt -d 10 --json    one JSON object per line, every ten seconds
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parser.add_argument(
        "-n", "--rounds", metavar="ROUNDS", help="stop after this many rounds (default: on Ctrl-C)"
    )
    parser.add_argument(
        "-d", "--delay", metavar="SECONDS", default="2", help="time between rounds: 0.1 to 86400 (default: 2)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")


def run(args: argparse.Namespace) -> int:
    """Show one table after another, usually until Ctrl-C."""
    rounds, delay = _rounds(args.rounds), _delay(args.delay)
    found = the_mount(args.mountpoint)
    redraws = not args.json and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    try:
        for turn, seen in enumerate(_looks(args.mountpoint, found, rounds, delay)):
            if args.json:
                print(json.dumps(_to_json(seen)), flush=True)
            elif redraws:
                _redraw(_lines(seen), first=not turn)
            else:
                for line in [*([""] if turn else []), *_lines(seen)]:
                    say(line)
    except KeyboardInterrupt:
        if redraws:
            print()
    return 0


def _rounds(given: str | None) -> int | None:
    if given is None:
        return None
    if not re.fullmatch(r"0*[1-9][0-9]{0,8}", given):
        raise UsageError(f"{given!r} is not a number of rounds", "give 1 or more")
    return int(given)


def _delay(given: str) -> float:
    try:
        delay = float(given)
    except ValueError:
        delay = math.nan
    if not _SHORTEST <= delay <= _LONGEST:
        raise UsageError(f"{given!r} is not a number of seconds", f"give {_SHORTEST} to 86400")
    return delay


# --- the counters of a round


@dataclass(frozen=True, slots=True)
class Seen:
    """The requests of one round."""

    facts: dict[str, Any]
    """The last answer of the daemon."""
    seconds: float
    whole: bool
    """Whether the round covers the time since the mount."""
    requests: Requests
    caches: dict[str, tuple[int, int]]
    """The hits and misses of each cache."""
    rss: int


def _looks(mountpoint: str, mount: MountInfo, rounds: int | None, delay: float) -> Iterator[Seen]:
    """Yield the requests since the mount, then those of each *delay* seconds."""
    facts, now = facts_of(mount.dev), time.monotonic()
    with checked_answer(mountpoint):
        requests, caches = requests_in(facts), caches_in(facts)
        seconds = max(time.time() - float(facts["since"]), 0.001)
        if not math.isfinite(seconds):
            raise ValueError(seconds)
    if requests is None:
        raise SystemFailure(f"{mountpoint}: requests are not counted: {why_none(facts)}")
    yield Seen(facts, seconds, True, requests, caches, resident(facts["pid"]))
    for _ in range(rounds - 1) if rounds else itertools.repeat(None):
        time.sleep(delay)
        before, last, cached, then = facts, requests, caches, now
        facts, now = _again(mountpoint, mount, before), time.monotonic()
        with checked_answer(mountpoint):
            requests, caches = requests_in(facts), caches_in(facts)
            if requests is None:
                raise ValueError("no request counters, which it sent before")
            new = {
                name: (hits - cached.get(name, (0, 0))[0], misses - cached.get(name, (0, 0))[1])
                for name, (hits, misses) in caches.items()
            }
            seen = Seen(facts, now - then, False, requests - last, new, resident(facts["pid"]))
        yield seen


def _again(mountpoint: str, mount: MountInfo, before: dict[str, Any]) -> dict[str, Any]:
    """Return the daemon's current counters. MountFailure if it was unmounted, even if mounted again."""
    gone = MountFailure(f"{mountpoint}: no longer mounted", "mount it again, then run this again")
    try:
        facts = facts_of(mount.dev)
    except MountFailure:
        found = find_mount(mountpoint)
        if found is None or found.dev != mount.dev:
            raise gone from None
        raise
    if (facts["pid"], facts.get("since")) != (before["pid"], before["since"]):
        raise gone
    return facts


def _to_json(seen: Seen) -> dict[str, Any]:
    facts = seen.facts
    return {
        "mountpoint": facts["mountpoint"],
        "time": time.time(),
        "seconds": seen.seconds,
        "since_mount": seen.whole,
        "transport": facts.get("transport"),
        "rss": seen.rss,
        "inodes_known": facts.get("inodes_known"),
        "open_files": facts.get("open_files"),
        "requests": seen.requests.to_json(),
        "caches": {name: {"hits": hits, "misses": misses} for name, (hits, misses) in seen.caches.items()},
    }


# --- output


def _lines(seen: Seen) -> list[str]:
    """Return the lines of the table."""
    from cowfs.store.format.sizes import format_size

    facts, requests = seen.facts, seen.requests
    with checked_answer(facts["mountpoint"]):
        known, files = number(facts["inodes_known"]), facts["open_files"]
        opened = "" if files is None else f", {number(files):,} open files"
        head = [
            f"{facts['mountpoint']}: {_period(seen)}",
            f"by {facts.get('transport', '/dev/fuse')}; {format_size(seen.rss)} resident; "
            f"{known:,} inodes known{opened}",
            f"{requests.count() / seen.seconds:,.0f} requests/s{_waiting(requests)}",
            *_hits(seen),
        ]
    rows = sorted(requests.operations.items(), key=lambda row: (-row[1].total_ns, -row[1].count, row[0]))
    width = max([_NAME, *(min(len(name), 2 * _NAME) for name in requests.operations)])
    title = f"{'OPERATION':<{width}} {'COUNT':>9} {'A SECOND':>8}  {'OF ALL TIME':<{_BAR + 7}}"
    title += f"{'MEAN':>8} {'P50':>8} {'P99':>8} {'ERRORS':>6}"
    total = requests.total_ns()
    return [*head, "", title, *(_row(name, width, row, seen.seconds, total) for name, row in rows)]


def _period(seen: Seen) -> str:
    if not seen.whole:
        return f"the last {seen.seconds:.1f} s"
    minutes, seconds = divmod(int(seen.seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"since the mount, {hours}:{minutes:02}:{seconds:02} ago"


def _waiting(requests: Requests) -> str:
    if not requests.under_way:
        return ""
    ns, operation = max(requests.under_way)
    count = len(requests.under_way)
    which = "the longest, " if count > 1 else ""
    return f"; {count:,} under way, {which}{operation}, for {_duration(ns)}"


def _hits(seen: Seen) -> list[str]:
    """Return the hit rates of the caches, and the share of reads that were served without Python."""
    rates = []
    reads = seen.requests.operations.get("READ")
    if reads is not None:
        rates.append(f"{_percent(seen.requests.direct_reads, reads.count)} of reads without Python")
    rates += [
        f"{name} {_percent(hits, hits + misses)}"
        for name, (hits, misses) in seen.caches.items()
        if hits + misses > 0
    ]
    return [f"hits: {', '.join(rates)}"] if rates else []


def _percent(part: int, whole: int) -> str:
    percent = 100 * part / whole
    return f"{percent:.0f} %" if percent in {0, 100} or percent < 99 else f"{min(percent, 99.9):.1f} %"


def _row(name: str, width: int, operation: Operation, seconds: float, total_ns: int) -> str:
    share = operation.total_ns / total_ns if total_ns else 0.0
    bar = "#" * round(_BAR * share)
    times = [operation.mean_ns(), operation.percentile_ns(50), operation.percentile_ns(99)]
    return (
        f"{name:<{width}} {operation.count:>9,} {operation.count / seconds:>8,.1f}"
        f" {100 * share:>4.0f} % {bar:<{_BAR}}"
        + "".join(f" {_duration(ns):>8}" for ns in times)
        + f" {operation.errors:>6,}"
    )


def _duration(ns: float | None) -> str:
    if ns is None:
        return "-"
    for size, unit in ((1e9, "s"), (1e6, "ms")):
        if ns >= size:
            return f"{ns / size:,.1f} {unit}"
    return f"{ns / 1e3:.1f} us"


# --- on a terminal


def _redraw(lines: list[str], *, first: bool) -> None:
    """Overwrite the previous table, without changing the state of the terminal."""
    size = shutil.get_terminal_size()
    room = max(size.lines - 1, 1)
    if len(lines) > room > 1:
        lines = [*lines[: room - 1], f"... and {len(lines) - room + 1} more lines"]
    fitting = [_fit(line, size.columns) for line in lines[:room]]
    text = "".join(f"{line}{_TO_END_OF_LINE}\n" for line in fitting)
    sys.stdout.write(f"{_HOME}{_CLEAR if first else ''}{text}{_TO_END}")
    sys.stdout.flush()


def _fit(line: str, columns: int) -> str:
    """Cut a line to the width of the terminal."""
    encoding = sys.stdout.encoding or "ascii"
    shown = printable(line).encode(encoding, "backslashreplace").decode(encoding)
    room = columns
    for place, character in enumerate(shown):
        room -= 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if room < 0:
            return shown[:place]
    return shown
