"""``cowfs watch``: print the changes of a mount as they happen."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from cowfs.cli import options
from cowfs.cli.output import warn
from cowfs.client import ask, checked_answer, find_mount, from_root, the_mount
from cowfs.errors import EXIT_MOUNT, EXIT_SYSTEM, CowfsError, MountFailure, SystemFailure
from cowfs.jsontext import get_path, stamp

NAME = "watch"
_VERSION = 1

_DESCRIPTION = """\
Print each change of a mounted tree as it is made: when, what, where, and by which process.
"""
_EPILOG = """\
A PATH is relative to the root of the tree and includes everything below it; a GLOB such as '*.conf' matches
in all directories.

The operations are create, mkdir, symlink, mknod, link, write, truncate, chmod, chown, utimes, setxattr,
removexattr, remove, rmdir, rename, exchange and revert. Writes of a process to a file are reported at the
first write, once a second while they continue, and after the last.

exit codes: 0 Ctrl-C, or the filesystem was unmounted; 2 the output was read too slowly, so that changes
would have been missed; 32 the daemon has died.

examples:
  cowfs watch /mnt                       everything
  cowfs watch /mnt etc '*.so'            below /etc, and all shared libraries
  cowfs watch /mnt --json | jq -r 'select(.operation == "remove") | .path'
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand's parser."""
    parser = options.add_subcommand(subparsers, NAME, "tell of changes as they happen", _DESCRIPTION, _EPILOG)
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parser.add_argument("paths", metavar="PATH|GLOB", nargs="*", default=(), help="report only these")
    options.add_json_or_null(parser, "time, operation, path, new path, pid, uid, program")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print changes until Ctrl-C, or until the mount ends."""
    found = the_mount(args.mountpoint)
    place = os.fsdecode(found.mountpoint)
    wanted = _selection(args.paths, place)
    tell = _json if args.json else _with_nul if args.null else _lines()
    try:
        ended = "died"
        for reply in _replies(args.mountpoint, found.dev):
            if "watching" in reply:
                warn(f"{place}: watching (Ctrl-C ends it)")
            elif "ended" in reply:
                ended = str(reply["ended"])
            else:
                with checked_answer(args.mountpoint):
                    if wanted(get_path(reply, "path")) or ("to" in reply and wanted(get_path(reply, "to"))):
                        tell(reply)
                        sys.stdout.flush()
    except KeyboardInterrupt:
        return 0
    except _Ended as end:
        ended = _why(args.mountpoint, found.dev)
        if ended == "died" and end.failure is not None:
            warn(str(end.failure))
    if args.json:
        now = stamp(time.time_ns() // 1000)
        print(json.dumps({"version": _VERSION, "time": now, "ended": ended}), flush=True)
    return _report_end(place, ended)


class _Ended(Exception):
    """The daemon sends nothing more, and did not say that it ends."""

    def __init__(self, failure: CowfsError | None) -> None:
        super().__init__(failure)
        self.failure = failure


def _replies(mountpoint: str, dev: str) -> Iterator[dict[str, Any]]:
    begun = False
    try:
        for reply in ask(dev, "watch", timeout=None):
            begun = True
            yield reply
    except MountFailure as failure:
        if not begun:
            raise
        raise _Ended(failure) from None
    except CowfsError as failure:
        if failure.message.startswith("unknown command"):
            raise SystemFailure(
                f"{mountpoint}: its daemon is an older cowfs, which cannot be watched", "mount it again"
            ) from None
        raise


def _why(mountpoint: str, dev: str) -> str:
    found = find_mount(mountpoint)
    return "died" if found is not None and found.dev == dev else "unmounted"


def _report_end(place: str, ended: str) -> int:
    if ended == "unmounted":
        warn(f"{place}: was unmounted")
        return 0
    if ended == "slow":
        warn(
            f"{place}: changes came faster than they were read: the last ones are not reported (read faster)"
        )
        return EXIT_SYSTEM
    warn(f"{place}: its daemon has died (cowfs umount {place} removes the mount)")
    return EXIT_MOUNT


# --- which


def _selection(paths: list[str], mountpoint: str) -> Callable[[bytes], bool]:
    """Return a function that tells whether a path is one of those asked for."""
    from cowfs.changes.select import pattern

    patterns = [pattern(os.fsencode(from_root(path, mountpoint))) for path in paths]
    return lambda path: not patterns or any(each.match(path) for each in patterns)


# --- how it is told


def _json(reply: dict[str, Any]) -> None:
    print(json.dumps(reply))


def _with_nul(reply: dict[str, Any]) -> None:
    process = reply["process"] or {}
    to = get_path(reply, "to") if "to" in reply else b""
    by = (process.get("pid", ""), process.get("uid", ""), process.get("program", ""))
    fields = [reply["time"].encode(), reply["operation"].encode(), get_path(reply, "path"), to]
    fields += [str(field).encode() for field in by]
    sys.stdout.buffer.write(b"".join(field + b"\0" for field in fields))


_COLOURS = {"create": 32, "mkdir": 32, "symlink": 32, "mknod": 32, "link": 32, "remove": 31, "rmdir": 31}


def _lines() -> Callable[[dict[str, Any]], None]:
    """Return a function that prints lines for people."""
    from cowfs.changes.render import escape
    from cowfs.cli.blame import by, local

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"

    def tell(reply: dict[str, Any]) -> None:
        operation = f"{reply['operation']!s:<11}"
        if colour:
            operation = f"\033[{_COLOURS.get(reply['operation'], 33)}m{operation}\033[0m"
        path = escape(get_path(reply, "path")) or "/"
        to = f" -> {escape(get_path(reply, 'to'))}" if "to" in reply else ""
        print(f"{local(reply['time'])}  {operation} {path}{to}  {by(reply['process'])}")

    return tell
