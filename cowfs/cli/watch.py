"""``cowfs watch``: print the changes of a mount as they happen."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from cowfs.cli import options
from cowfs.cli.output import warn
from cowfs.client import checked_answer
from cowfs.errors import EXIT_MOUNT, EXIT_SYSTEM
from cowfs.jsontext import stamp

if TYPE_CHECKING:
    from cowfs.api import Event

_VERSION = 1

DESCRIPTION = """\
Print each change of a mounted tree as it is made: when, what, where, and by which process.
"""
EPILOG = """\
A PATH is relative to the root of the tree and includes everything below it; a GLOB such as '*.conf' matches
in all directories.

The operations are create, mkdir, symlink, mknod, link, write, truncate, chmod, chown, utimes, setxattr,
removexattr, remove, rmdir, rename, exchange and revert. Writes of a process to a file are reported at the
first write, once a second while they continue, and after the last.

Exit codes: 0 Ctrl-C, or the filesystem was unmounted; 2 the output was read too slowly, so that changes
would have been missed; 32 the daemon has died.

examples:
  cowfs watch /mnt                       everything
  cowfs watch /mnt etc '*.so'            below /etc, and all shared libraries
  cowfs watch /mnt --json | jq -r 'select(.operation == "remove") | .path'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parser.add_argument("paths", metavar="PATH|GLOB", nargs="*", default=(), help="report only these")
    options.add_json_or_null(parser, "time, operation, path, new path, pid, uid, program")


def run(args: argparse.Namespace) -> int:
    """Print changes until Ctrl-C, or until the mount ends."""
    from cowfs.api import watch

    tell = _json if args.json else _with_nul if args.null else _lines()
    try:
        with watch(args.mountpoint, args.paths) as events:
            place = events.mountpoint
            warn(f"{place}: watching (Ctrl-C ends it)")
            for event in events:
                with checked_answer(place):
                    tell(event)
                sys.stdout.flush()
    except KeyboardInterrupt:
        return 0
    if events.ended == "died" and events.failure is not None:
        warn(str(events.failure))
    if args.json:
        now = stamp(time.time_ns() // 1000)
        print(json.dumps({"version": _VERSION, "time": now, "ended": events.ended}), flush=True)
    return _report_end(place, events.ended)


def _report_end(place: str, ended: str) -> int:
    if ended == "unmounted":
        warn(f"{place}: was unmounted")
        return 0
    if ended == "slow":
        warn(f"{place}: changes came faster than they were read; the last ones are missing (write to a file)")
        return EXIT_SYSTEM
    warn(f"{place}: its daemon has died (cowfs umount {place} removes the mount)")
    return EXIT_MOUNT


# --- output


def _json(event: Event) -> None:
    print(json.dumps({"version": _VERSION} | event.to_json()))


def _with_nul(event: Event) -> None:
    process = event.process or {}
    by = (str(process.get(fact, "")) for fact in ("pid", "uid", "program"))
    texts = (event.time, event.operation)
    fields = [*map(str.encode, texts), event.path, event.to or b"", *map(str.encode, by)]
    sys.stdout.buffer.write(b"".join(field + b"\0" for field in fields))


_COLOURS = {"create": 32, "mkdir": 32, "symlink": 32, "mknod": 32, "link": 32, "remove": 31, "rmdir": 31}


def _lines() -> Callable[[Event], None]:
    """Return a function that prints an event as a line."""
    from cowfs.changes.render import escape
    from cowfs.cli.blame import by, local
    from cowfs.errors import printable

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"

    def tell(event: Event) -> None:
        operation = printable(f"{event.operation:<11}")
        if colour:
            operation = f"\033[{_COLOURS.get(event.operation, 33)}m{operation}\033[0m"
        path = escape(event.path) or "/"
        to = "" if event.to is None else f" -> {escape(event.to)}"
        # cowfs itself reverts
        who = "" if event.operation == "revert" and event.process is None else f"  {by(event.process)}"
        print(f"{local(event.time)}  {operation} {path}{to}{who}")

    return tell
