"""``cowfs rebase``: move the changes to a new version of the root."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING

from cowfs.cli import options
from cowfs.cli.output import Tally, progress_line, say, warn

if TYPE_CHECKING:
    from cowfs.api import Lowers
    from cowfs.rebasing import Rebased

EXIT_CONFLICT = 65

DESCRIPTION = """\
Move the changes of a store to another version of its root. Afterwards the store belongs to NEWROOT.
Each file is compared in the store, OLDROOT and NEWROOT. Changes that only the store has stay; changes that
only NEWROOT has are taken from NEWROOT. Changes that both have are dropped from the store, and so are
deletions of files that NEWROOT does not have.
"""
EPILOG = """\
If both have changed a file in different ways, this is a conflict: it is listed; the store's version stays.
--conflicts DIR writes all versions of these to DIR/old, DIR/new and DIR/changed. A renamed directory that
NEWROOT no longer has stays complete, as in OLDROOT.

If it is interrupted, even by a power failure, the store is the old one or the new one. The store needs
space for new directories, and for copies of files whose data OLDROOT had and NEWROOT has not. Its
checkpoints are moved in the same way. It must not be mounted, and its trash (of `cowfs revert`) must
be empty.

examples:
  cowfs rebase sysrcd.bs --from old.sfs --onto new.sfs --dry-run
  cowfs rebase sysrcd.bs --from old.sfs --onto new.sfs --conflicts /tmp/look
  diff -r /tmp/look/new /tmp/look/changed
  cowfs rebase sysrcd.bs --onto new.sfs       the old root is where the store last saw it

Exit codes: 0 done; 65 done, with conflicts (with --dry-run: there would be some); 1 usage error; 2 a file
could not be written; 32 the store or a root cannot be used, and nothing was changed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("store", metavar="STORE")
    parser.add_argument(
        "--from",
        metavar="OLDROOT",
        dest="old",
        help="the root that the store belongs to: images or directories, separated by colons",
    )
    parser.add_argument("--onto", metavar="NEWROOT", required=True, help="the new root")
    options.add_offset(parser)
    parser.add_argument("-n", "--dry-run", action="store_true", help="only report what would be done")
    parser.add_argument("--json", action="store_true", help="report as one JSON object")
    parser.add_argument(
        "--conflicts", metavar="DIR", default="", help="write each conflict's versions to DIR"
    )
    parser.add_argument(
        "--force-lower", action="store_true", help="use OLDROOT even if the store belongs to another"
    )
    parser.add_argument(
        "--engine",
        choices=options.ENGINES,
        default="auto",
        help="engine for images: cowfs (auto, process) or the kernel",
    )


def run(args: argparse.Namespace) -> int:
    """Move the changes, or report what would be done."""
    from cowfs.api import rebase
    from cowfs.changes.render import escape
    from cowfs.linux.limits import take_all_descriptors
    from cowfs.store.e2fsprogs.signals import cleaned_up

    options.must_have_name(args.conflicts, "--conflicts ")
    old, new = _lowers(args, args.old, ""), _lowers(args, args.onto, args.offset)
    take_all_descriptors()
    with cleaned_up(), progress_line() as progress:
        tally = Tally(progress, "paths")
        done = rebase(
            args.store,
            new,
            old,
            dry_run=args.dry_run,
            conflicts=args.conflicts,
            tell=warn,
            tick=lambda _: tally.add(),
            expect=tally.expect,
        )
    if args.json:
        say(json.dumps(_facts(done, args)))
    else:
        for one in done.told:
            where = f" (checkpoint {escape(os.fsencode(one.checkpoint))})" if one.checkpoint else ""
            say(f"{one.kind:<9} {escape(one.path) or '/'}: {one.why}{where}")
        dropped, conflicts = len(done.told) - len(done.conflicts), len(done.conflicts)
        warn(f"{args.store}: {done.kept} kept, {dropped} dropped, {conflicts} in conflict")
    return EXIT_CONFLICT if done.conflicts else 0


def _lowers(args: argparse.Namespace, text: str | None, offset: str) -> Lowers:
    from cowfs.api import Lowers

    given, data_only = (None, 0) if text is None else options.split_layers(text)
    options.refuse_bare_colon(given or ())
    offsets = options.find_offsets(options.parse_offsets(offset), given or ())
    return Lowers(given, offsets, args.engine, args.force_lower, data_only)


def _facts(done: Rebased, args: argparse.Namespace) -> dict[str, object]:
    from cowfs.jsontext import put_path

    told: list[dict[str, object]] = []
    for one in done.told:
        told.append({"kind": one.kind, "why": one.why, "checkpoint": one.checkpoint or None})
        put_path(told[-1], "path", one.path)
    return {
        "store": args.store,
        "dry_run": args.dry_run,
        "from": [low.path for low in done.old],
        "onto": [low.path for low in done.new],
        "kept": done.kept,
        "told": told,
    }
