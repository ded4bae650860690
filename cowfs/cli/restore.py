"""``cowfs restore``: copy a backup back to a store."""

from __future__ import annotations

import argparse

from cowfs.cli import options
from cowfs.cli.output import bytes_of, counted, note, progress_line, warn

DESCRIPTION = """\
Check FILE, a backup made by `cowfs backup`, and copy it to STORE.
"""
EPILOG = """\
If this is interrupted, STORE is unchanged or complete. It must not be in use.

examples:
  cowfs restore monday.bs sysrcd.bs --force

Exit codes: 0 STORE is a copy of FILE; 1 usage error; 2 it could not be written; 32 FILE is damaged or not a
store, or STORE is in use.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("file", metavar="FILE", help="the backup to restore")
    parser.add_argument("store", metavar="STORE", help="the store to create")
    parser.add_argument(
        "-f", "--force", action="store_true", help="replace STORE if it is a file, or an empty directory"
    )


def run(args: argparse.Namespace) -> int:
    """Check and copy the backup."""
    from cowfs.api import restore
    from cowfs.linux.limits import take_all_descriptors
    from cowfs.store.e2fsprogs.signals import cleaned_up

    options.must_have_name(args.store)
    take_all_descriptors()  # each directory on the way to a path needs several
    with cleaned_up(), progress_line() as progress:
        restore(
            args.file, args.store, force=args.force, tell=warn, tick=counted(progress, bytes_of(args.file))
        )
    note(f"{args.store}: restored from {args.file}")
    return 0
