"""``cowfs blame``: which process made, wrote, renamed or removed a file."""

from __future__ import annotations

import argparse
import glob
import json
import os
import shlex
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Any

from cowfs.cli import options
from cowfs.cli.output import progress_line, say, warn
from cowfs.client import from_root, mount_above, the_mount
from cowfs.errors import StoreError, UsageError, printable
from cowfs.jsontext import raw, stamp
from cowfs.linux.fuse import LISTED

if TYPE_CHECKING:
    from cowfs.changes.blame import Event, History

EXIT_NOTHING = 1

DESCRIPTION = """\
Show which processes created a file, wrote to it, changed its attributes, renamed or removed it: the first and
the last of each. This is recorded only while the store is mounted with -o blame.
"""
EPILOG = """\
PATH is below a mountpoint (/mnt/etc/hosts); or it is a path in the merged tree (etc/hosts), after the
mountpoint or the store. For a removed file, give its last path. If a file was renamed, changes under its
earlier names are shown too. PATH can be a glob such as '*.conf', which matches in all directories.

A process can set its own command line and name. Its pid, user and cgroup come from the kernel.

Exit codes: 0 done; 1 usage error, or nothing is recorded for some PATH.

examples:
  cowfs blame /mnt/etc/hosts
  cowfs blame sysrcd.bs etc/hosts usr/share/doc
  cowfs blame /mnt/etc -r                       everything recorded below /etc
  cowfs blame /mnt '*.conf'
  cowfs blame /mnt/etc/hosts --json | jq -r 'select(.what == "written") | .last.process.command | join(" ")'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("where", metavar="STORE|MOUNTPOINT|PATH")
    parser.add_argument("paths", metavar="PATH", nargs="*", default=())
    parser.add_argument(
        "-r", "--recursive", action="store_true", help="include everything recorded below PATH"
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "process", "kernel"),
        default="auto",
        help="the engine that reads images, as for cowfs mount",
    )
    options.add_json_or_null(
        parser,
        "path, what, first or last, time, operations, path at that time, new path, pid, uid, program, "
        "unit, container",
    )


def run(args: argparse.Namespace) -> int:
    """Print what is recorded about each path."""
    from cowfs.api import histories

    what, asked = _asked(args)
    code, number = 0, 0
    with progress_line() as progress:
        pieces = histories(
            what, asked, recursive=args.recursive, engine=args.engine, tell=warn, tick=progress
        )  # fmt: skip
        for piece, since in pieces:
            if not piece:
                warn(f"{what}: {_nothing(since)} about such paths")
                code = EXIT_NOTHING
            for history in piece:
                if not history.first:
                    warn(f"{os.fsdecode(history.path) or '/'}: {_nothing(since)}")
                    code = EXIT_NOTHING
                else:
                    _tell(history, args, after=number > 0)
                number += 1
    sys.stdout.flush()
    return code


def _tell(history: History, args: argparse.Namespace, *, after: bool) -> None:
    if args.json:
        for entry in history.to_json():
            say(json.dumps(entry))
    elif args.null:
        _print_with_nul(history)
    else:
        _print(history, after=after)


def _nothing(since: int | None) -> str:
    return "nothing is recorded" if since is None else f"nothing is recorded since {_local(since)}"


# --- the store or mount, and the paths


def _asked(args: argparse.Namespace) -> tuple[str, list[bytes]]:
    """Return the store or mountpoint, and the paths and globs in the merged tree."""
    from cowfs.store.format.sniff import may_be_store, may_exist

    if "" in args.paths:
        raise UsageError("'': an empty path", "give / for the whole tree")
    above = mount_above(args.where)
    if args.recursive and not args.paths and (above is None or not above[1]):
        args.paths = [""]
    if above is not None and not above[1]:
        if not args.paths:
            raise UsageError(f"{args.where}: no path given", "cowfs blame MOUNTPOINT/PATH")
        mountpoint = os.fsdecode(the_mount(args.where).mountpoint)
        return args.where, [_in_tree(path, mountpoint) for path in args.paths]
    if above is not None and not may_be_store(args.where):
        return above[0], [_below(path, above[0]) for path in (args.where, *args.paths)]
    if not may_exist(args.where):
        raise StoreError(f"{args.where}: no such store, and not below a mountpoint", LISTED)
    if not args.paths:
        raise UsageError(f"{args.where}: no path given", "cowfs blame STORE PATH")
    return args.where, [_plain(path) for path in args.paths]


def _in_tree(path: str, mountpoint: str) -> bytes:
    below = from_root(path, mountpoint)
    return _plain(below) if below == path else glob.escape(_plain(below))


def _below(path: str, mountpoint: str) -> bytes:
    """Return the path in the merged tree of a path below a mountpoint. UsageError for any other."""
    found = mount_above(path)
    if found is None or found[0] != mountpoint:
        raise UsageError(f"{path}: is not below {mountpoint}", "give the paths of one mount")
    return glob.escape(_plain(found[1]))


def _plain(path: str) -> bytes:
    from cowfs.changes.select import normal

    return normal(os.fsencode(path))


# --- output


def _print(history: History, *, after: bool) -> None:
    from cowfs.changes.render import escape
    from cowfs.linux.processes import described

    if after:
        print()
    print(escape(history.path) or "/")
    for kind, events in history.events():
        for which, event in events:
            who = None if event.process is None else described(event.process)
            label = f"{kind} {which}".strip()
            say(f"  {label:<17} {_local(event.time)}  {_what(event, history.path)}{by(who)}")
            if who is not None and who["command"]:
                say(f"  {'':<17} {_command(who['command'])}")


def _what(event: Event, path: bytes) -> str:
    from cowfs.changes.render import escape

    done = " ".join(event.operations)
    if event.to is not None:
        return f"{done} {escape(event.path)} -> {escape(event.to)}, "
    return f"{done} {escape(event.path)}, " if event.path != path else f"{done}, "


def by(process: dict[str, Any] | None) -> str:
    """Name the process, as its JSON describes it."""
    if process is None:
        return "by the kernel, for a mapping"
    program = printable(str(process["program"])) or "a hidden process"
    where = process.get("container") or process.get("unit")
    inside = f", in {printable(str(where))[:_LONGEST_UNIT]}" if where else ""
    pid, uid = (printable(str(process[name])) for name in ("pid", "uid"))
    return f"by {program} (pid {pid}, uid {uid}{inside})"


_LONGEST_UNIT = 64
_LONGEST_COMMAND = 300


def _command(words: list[str]) -> str:
    text = printable(shlex.join(words))
    return text if len(text) <= _LONGEST_COMMAND else text[:_LONGEST_COMMAND] + " ..."


def local(time: str) -> str:
    """Return the local time for a time in a JSON line. ValueError."""
    return _shown(datetime.fromisoformat(time))


def _local(microseconds: int) -> str:
    return _shown(datetime.fromtimestamp(microseconds / 1e6).astimezone())


def _shown(time: datetime) -> str:
    return time.astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def _print_with_nul(history: History) -> None:
    from cowfs.linux.processes import container, unit

    for kind in history.first:
        for which, event in (("first", history.first[kind]), ("last", history.last[kind])):
            process = event.process
            fields: list[bytes | str] = [
                history.path,
                kind,
                which,
                stamp(event.time),
                ",".join(event.operations),
            ]
            fields += [event.path, event.to or b""]
            if process is None:
                fields += [""] * 5
            else:
                fields += [str(process.pid), str(process.uid), process.program]
                fields += [unit(process.cgroup), container(process.cgroup)]
            for entry in fields:
                sys.stdout.buffer.write((entry if isinstance(entry, bytes) else raw(entry)) + b"\0")
