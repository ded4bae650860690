"""``cowfs vacuum``: remove redundant entries from a store."""

from __future__ import annotations

import argparse
import sys

from cowfs.cli import options
from cowfs.cli.output import Tally, progress_line, say, say_fields, warn
from cowfs.cli.revert import JSON_HELP, json_of

DESCRIPTION = """\
Free space in a store without changing the merged tree: remove copies of files that are identical to the
lower's, whiteouts that hide nothing, and directories that add nothing.
"""
EPILOG = """\
A copy is identical if its content, owner, mode, exact times and attributes are those of the lower's file.
Copies of files that are in use are kept, because removing them would change inode numbers. `cowfs revert`
leaves copies of files that were open.

--trash permanently removes what `cowfs revert` has moved to the trash, and nothing else.

examples:
  cowfs vacuum /mnt --dry-run     list what can be removed
  cowfs vacuum sysrcd.bs          clean up a store that is not mounted
  cowfs vacuum /mnt --trash       empty the trash
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("what", metavar="STORE|MOUNTPOINT")
    parser.add_argument("--trash", action="store_true", help="empty the trash of cowfs revert")
    parser.add_argument("-n", "--dry-run", action="store_true", help="only list what could be removed")
    options.add_lower(parser)
    options.add_json_or_null(parser, "kind, bytes, path", JSON_HELP)
    parser.add_argument("-q", "--quiet", action="store_true", help="do not list the changes")


def run(args: argparse.Namespace) -> int:
    """Remove redundant entries, or list them."""
    from cowfs.api import take_back
    from cowfs.changes.render import escape
    from cowfs.changes.steps import OFTEN
    from cowfs.errors import UsageError
    from cowfs.store.format.sizes import format_size

    if args.trash and args.dry_run:
        raise UsageError("--trash has no --dry-run", "cowfs du shows how large the trash is")
    lowers = options.lowers_of(args)
    count = size = 0
    asked = "trash" if args.trash else "vacuum"
    is_listed = sys.stdout.isatty()
    with progress_line() as progress:
        counted = "removed" if args.trash else "names looked at"
        tally = Tally(progress, counted)

        def tick(number: int, whole: int) -> None:
            if not number:
                tally.begin(counted, whole)
            elif args.trash or not is_listed:
                tally.add(OFTEN)

        asks = take_back(args.what, asked, None, lowers, dry_run=args.dry_run, tell=warn, tick=tick)
        for done in asks:
            count += 1
            size += done.size
            if args.json:
                say(json_of(done))
            elif args.null:
                say_fields(done.kind, done.size, done.path)
            elif not args.quiet:
                say(f"{done.kind:<9} {escape(done.path)}")
    sys.stdout.flush()
    if not args.trash and not (args.json or args.null):
        verb = "could be removed" if args.dry_run else "removed"
        warn(f"{count} {verb}, {format_size(size)}")
    return 0
