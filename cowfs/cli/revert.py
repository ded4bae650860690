"""``cowfs revert``: revert changes to the lower's version."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from cowfs.cli import options
from cowfs.cli.output import Tally, progress_line, say, say_fields, warn
from cowfs.errors import CowfsError, UsageError

if TYPE_CHECKING:
    from cowfs.api import Done, Lowers

JSON_HELP = "print one JSON object per line: version path kind size why_not"
VERSION = 1
_EXAMINED = "changes examined"

DESCRIPTION = """\
Revert changes: PATH, and everything below it, becomes what it is in the lower. Added files are removed,
deleted files come back, and renamed directories get their old names. Nothing is lost: removed files are moved
to a trash in the store, and --undo restores them.
"""
EPILOG = """\
A PATH is relative to the root of the tree; a glob such as '*.conf' matches in all directories. `cowfs diff`
with the same paths lists what will be reverted, and so does --dry-run. In a store with checkpoints, PATH
becomes what it was at the last checkpoint; `cowfs diff --since NAME` lists the changes since then.

The tree may be mounted and in use: open files then have the content of the lower. Reverted changes take up
space in the store until `cowfs vacuum --trash` empties the trash.

examples:
  cowfs revert /mnt etc/fstab           one file
  cowfs revert /mnt/etc                 all that was changed below /etc
  cowfs revert sysrcd.bs --all          everything, in a store that is not mounted
  cowfs revert /mnt usr --metadata      owners, modes, times and attributes, but not the contents
  cowfs revert /mnt --undo              undo the last revert

Exit codes: 0 done; 1 usage error, or nothing to revert; 32 some changes could not be reverted. They are the
same with --dry-run.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("what", metavar="STORE|MOUNTPOINT")
    parser.add_argument(
        "paths", metavar="PATH", nargs="*", default=(), help="the path to revert; may be a glob"
    )
    parser.add_argument("--all", action="store_true", help="revert everything")
    parser.add_argument("--metadata", action="store_true", help="only owners, modes, times and xattrs")
    parser.add_argument("--undo", action="store_true", help="undo the last revert")
    parser.add_argument("-n", "--dry-run", action="store_true", help="only list what would be reverted")
    options.add_lower(parser)
    options.add_json_or_null(parser, "path, why it was not reverted", JSON_HELP)
    parser.add_argument("-q", "--quiet", action="store_true", help="do not list the changes")


def run(args: argparse.Namespace) -> int:
    """Revert changes, or undo a revert."""
    from cowfs.api import take_back
    from cowfs.changes.render import escape
    from cowfs.cli.diff import patterns_of

    what, paths = patterns_of(args)
    _check_usage(args, paths)
    lowers = options.lowers_of(args)
    if args.dry_run:
        return _rehearse(args, what, paths, lowers)
    asked = "undo" if args.undo else "revert"
    count = failed = 0
    word = "brought back" if args.undo else "reverted"
    chosen = None if args.all else paths
    is_listed = sys.stdout.isatty()
    with progress_line() as progress:
        tally, expected, last = Tally(progress, _EXAMINED), 0, 0

        def tick(number: int, whole: int) -> None:
            nonlocal expected, last
            expected = whole or expected
            if number < last:  # the second time
                tally.begin(_EXAMINED, expected)
                last = 0
            tally.add(number - last)
            last = number

        asks = take_back(what, asked, chosen, lowers, metadata=args.metadata, tell=warn, tick=tick)
        for done in asks:
            if not count + failed:
                tally.begin(word, expected)
            failed += bool(done.why_not)
            count += not done.why_not
            if args.json:
                say(json_of(done))
            elif args.null:
                say_fields(done.path, done.why_not)
            elif done.why_not:
                warn(f"{escape(done.path) or '/'}: {done.why_not}")
            elif not args.quiet:
                say(f"{word} {escape(done.path) or '/'}")
            if not is_listed:
                tally.add()
    if not count and not failed and args.undo:  # an undo was killed after its last step
        warn("nothing was left to bring back")
    elif not count and not failed:
        raise _nothing(args.what, what)
    sys.stdout.flush()
    if not args.undo and not args.quiet and not (args.json or args.null):
        warn(f"{count} reverted; to undo this, run: cowfs revert {os.path.abspath(what)} --undo")
    return 32 if failed else 0


def _check_usage(args: argparse.Namespace, paths: list[bytes]) -> None:
    """UsageError unless the options and paths go together."""
    if args.undo and (paths or args.all or args.metadata or args.dry_run):
        raise UsageError("--undo undoes the whole last revert", "leave the rest out")
    if not paths and not args.all and not args.undo:
        raise UsageError("no path given", "give paths, or --all")
    if paths and args.all:
        raise UsageError("--all reverts everything", "leave out the paths, or --all")


def _nothing(named: str, what: str) -> UsageError:
    """Return the error that nothing is to be reverted in the tree *what*, which the user *named*."""
    since = last_checkpoint(what)
    return UsageError(
        f"{named}: nothing to revert there" + (f" since the checkpoint {since}" if since else ""),
        f"cowfs diff{f' --since {since}' if since else ''} lists the changes",
    )


def _rehearse(args: argparse.Namespace, what: str, paths: list[bytes], lowers: Lowers) -> int:
    """List what would be reverted, then what could not be; fail as the command itself would."""
    from cowfs.api import open_changes, take_back
    from cowfs.changes.render import escape
    from cowfs.changes.select import selected
    from cowfs.checkpoints import deleted_counts
    from cowfs.store.format.checkpoints import BELOW

    chosen = None if args.all else paths
    found = list(take_back(what, "revert", chosen, lowers, metadata=args.metadata, dry_run=True))
    if not found:
        since = last_checkpoint(what)
        if since == BELOW:
            warn(deleted_counts(what))
        with open_changes(what, lowers, lambda _: None, since=since) as changes:
            selected(paths).must_exist(changes, what)
        raise _nothing(args.what, what)
    _list(args, what, paths, lowers)
    refused = [done for done in found if done.why_not]
    for done in refused:
        warn(f"{escape(done.path) or '/'}: {done.why_not}")
    return 32 if refused else 0


def _list(args: argparse.Namespace, what: str, paths: list[bytes], lowers: Lowers) -> None:
    """Print the changes that would be reverted."""
    from cowfs.api import open_changes
    from cowfs.changes.render import json_line, line
    from cowfs.changes.select import ALL, METADATA, selected
    from cowfs.checkpoints import deleted_counts
    from cowfs.store.format.checkpoints import BELOW

    since = last_checkpoint(what)
    if since == BELOW:
        warn(deleted_counts(what))
    with open_changes(what, lowers, warn, since=since) as changes:
        selection = selected(paths, METADATA if args.metadata else ALL)
        selection.must_exist(changes, what)
        is_listed = sys.stdout.isatty()
        with progress_line() as progress:
            tally = Tally(progress, "changes")
            for change in selection.of(changes.within(selection.places)):
                if args.metadata and (change.kind not in "MR" or not change.what):
                    continue
                if args.json:
                    say(json_line(change))
                elif args.null:
                    source = () if change.source is None else (change.source,)
                    say_fields(change.kind, *source, change.path)
                else:
                    say(line(change))
                if not is_listed:
                    tally.add()
    sys.stdout.flush()


def json_of(done: Done) -> str:
    """Return what was reverted, restored or removed as JSON; ``why_not`` is null if it was."""
    from cowfs.jsontext import put_path

    entry: dict[str, object] = {"version": VERSION}
    put_path(entry, "path", done.path)
    return json.dumps(entry | {"kind": done.kind, "size": done.size, "why_not": done.why_not or None})


def last_checkpoint(what: str) -> str | None:
    """Return the checkpoint to which changes are reverted; None if it is the lower.

    :data:`cowfs.store.format.checkpoints.BELOW` if it is a deleted one, until its layer is merged.
    """
    from cowfs.api import checkpoints
    from cowfs.checkpoints import is_mount_above_deleted
    from cowfs.store.format.checkpoints import BELOW

    if is_mount_above_deleted(what):
        return BELOW
    with suppress(CowfsError):  # opening the store reports it
        return next((one.name for one in checkpoints(what) if one.last), None)
    return None
