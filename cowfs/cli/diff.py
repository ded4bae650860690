"""``cowfs diff``: what was changed, of a store or of a mount."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from typing import NamedTuple

from cowfs.cli import options
from cowfs.cli.client import ask, find_mount, sensible
from cowfs.cli.output import warn
from cowfs.errors import EXIT_SYSTEM, StoreError, UsageError
from cowfs.linux.fuse import FSTYPE
from cowfs.types import Change, Identity

NAME = "diff"
EXIT_CHANGES = 1
_PATIENCE = 3600.0
"""Seconds that a daemon may take from one change to the next: it may be comparing a huge file."""

_DESCRIPTION = """\
List what was changed: what differs between the merged tree and the lower it was made from. A file that
was written to but is as it was before is not listed.
"""
_EPILOG = """\
Each line is a letter and a path:
  A  added     M  modified, and in brackets what: content, mode, owner, times, xattrs, target of a
  D  deleted      symlink, device, type (a file where a directory was)
  R  renamed: OLD -> NEW; changes in a renamed directory are listed under its new name
A directory ends in a slash, and a deleted one is one line. The times of directories do not count. In
names, what does not print and what is not UTF-8 is written as \\n, \\t or \\ooo (three octal digits).

A store knows where its lower was found. If that is gone or is another one now, give it with --lower.
The counts go to the standard error.

examples:
  cowfs diff /mnt                          of a mount, also while it is in use
  cowfs diff sysrcd.bs                     of a store that is not mounted
  cowfs diff sysrcd.bs --lower /media/cdrom/sysrcd.dat
  cowfs diff /mnt --json | jq -r 'select(.kind == "A") | .path'
  cowfs diff ~/changes --exit-code >/dev/null && echo nothing was changed
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the subcommand."""
    parser = subparsers.add_parser(
        NAME,
        help="list what was changed",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", metavar="STORE|MOUNTPOINT")
    parser.add_argument("--lower", metavar="LOWER[:LOWER...]", help="what the store was mounted on")
    options.add_offset(parser)
    parser.add_argument(
        "--force-lower", action="store_true", help="compare with LOWER though the store belongs to another"
    )
    parser.add_argument("--engine", choices=options.ENGINES, default="auto", help="who reads images")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a line: kind path type what source"
    )
    parser.add_argument(
        "--exit-code",
        action="store_true",
        help="exit with 1 if there are changes, and with 2 or more on errors",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the changes as they are found."""
    try:
        with ExitStack() as stack:
            total = _show(_changes(args, stack), json=args.json)
    except UsageError as error:
        if args.exit_code:
            error.exit_code = EXIT_SYSTEM
        raise
    return EXIT_CHANGES if args.exit_code and total else 0


def _show(changes: Iterator[Change], *, json: bool) -> int:
    from cowfs.changes.render import Summary, json_line, line

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    summary = Summary()
    for change in summary.counted(changes):
        print(json_line(change) if json else line(change, colour=colour))
    sys.stdout.flush()
    if not json:
        print(summary, file=sys.stderr)
    return summary.total


def _changes(args: argparse.Namespace, stack: ExitStack) -> Iterator[Change]:
    """Return the changes of a mount or of a store, which is open until *stack* closes."""
    found = find_mount(args.what)
    if found is not None:
        if args.lower is not None:
            raise UsageError(
                f"{args.what}: is mounted, and compared with what it is mounted on", "no --lower"
            )
        return _of_mount(args.what, found.dev)
    if args.what == "memory":
        raise UsageError("a store in memory is nowhere but in its mount", "give the mountpoint")
    if not os.path.lexists(args.what):
        raise StoreError(f"{args.what}: no such store or mountpoint", f"findmnt -t {FSTYPE} lists the mounts")
    lowers = None if args.lower is None else options.split_lowers(args.lower)
    if lowers == ():
        raise UsageError("--lower names no lower", "give an image or a directory: --lower LOWER[:LOWER...]")
    place = _Lowers(lowers, options.parse_offsets(args.offset), args.engine)
    return _of_store(args.what, place, stack, force=args.force_lower)


def _of_mount(path: str, dev: str) -> Iterator[Change]:
    from cowfs.changes.render import from_json

    for reply in ask(dev, "diff", timeout=_PATIENCE):
        if "said" in reply:
            warn(str(reply["said"]))
        else:
            with sensible(path):
                change = from_json(reply["change"])
            yield change


class _Lowers(NamedTuple):
    """Which lowers to compare with, and how to open them."""

    given: Sequence[str] | None
    offsets: Sequence[int]
    engine: str


def _of_store(path: str, place: _Lowers, stack: ExitStack, *, force: bool) -> Iterator[Change]:
    from cowfs.assemble import open_lowers
    from cowfs.changes.diff import diff
    from cowfs.store import layout
    from cowfs.store.header import check_lowers
    from cowfs.store.open import open_store

    store = open_store(path, engine=place.engine, read_only=True, progress=_tell)
    stack.callback(store.close)
    given = place.given
    if given is None:
        given = _lowers_of_header(path, store.header.lowers, place.offsets)
    elif not force:
        check_lowers(store.header, _identities(given, place.offsets), path)
    lowers = open_lowers(given, place.engine, place.offsets)
    for lower in lowers:
        stack.callback(lower.close)
    index = layout.find(store.layer, layout.WORK, b"index")
    return diff(store.layer, store.upper, lowers, store.xattr_prefix, index)


def _tell(said: str) -> None:
    warn(said)


def _identities(lowers: Sequence[str], offsets: Sequence[int]) -> list[Identity]:
    from cowfs.store.identity import identify_lower

    if len(offsets) > len(lowers):
        raise UsageError(
            f"--offset: {len(offsets)} offsets, {len(lowers)} lower layers",
            "give one for each lower",
        )
    return [
        identify_lower(str(path), int(offset)) for path, offset in zip_longest(lowers, offsets, fillvalue=0)
    ]


def _lowers_of_header(path: str, lowers: Sequence[Identity], offsets: Sequence[int]) -> list[str]:
    """Return where the lowers of a store are. UsageError if they are not there any more."""
    from cowfs.errors import LayerError

    if not lowers:
        raise UsageError(f"{path}: does not say which lower it belongs to", "give it with --lower")
    for number, lower in enumerate(lowers):
        belongs, hint = f"{path}: belongs to {lower.description}", "tell where it is with --lower, --offset"
        try:
            (now,) = _identities([lower.path], offsets[number : number + 1])
        except LayerError as error:
            raise UsageError(f"{belongs}; {error.message}", hint) from None
        if now.fingerprint != lower.fingerprint:
            raise UsageError(f"{belongs}; {lower.path} is now another: {now.description}", hint)
    return [lower.path for lower in lowers]
