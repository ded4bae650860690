"""``cowfs backup``: copy a store, even while it is in use."""

from __future__ import annotations

import argparse

from cowfs.cli import options
from cowfs.cli.output import bytes_of, counted, note, progress_line, warn

DESCRIPTION = """\
Copy a store to FILE, as it is at one moment, even while its mount is in use. FILE is a store itself: you can
mount it, and `cowfs restore` copies it back.
"""
EPILOG = """\
At the end, programs that use the mount wait while the changes made during the copy are copied. They wait only
for a moment if FILE can share blocks with the store (btrfs, XFS). A store that is an image, or in memory,
becomes a file with holes where the store has nothing; one in a directory becomes a directory.

At the end FILE is complete, or does not exist. It has the state that a power failure at that moment would
leave: it contains all data synced by fsync(2), and no data that a program has not written yet.

examples:
  cowfs backup /mnt monday.bs
  cowfs backup sysrcd.bs /media/stick/sysrcd.bs
  cowfs mount root.sfs /look --store monday.bs -o ro

Exit codes: 0 FILE is complete; 1 usage error; 2 it could not be written; 32 the store could not be copied.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("what", metavar="STORE|MOUNTPOINT")
    parser.add_argument("file", metavar="FILE", help="the file or directory to create")
    parser.add_argument("-f", "--force", action="store_true", help="replace FILE if it exists")


def run(args: argparse.Namespace) -> int:
    """Copy the store."""
    from cowfs.api import backup
    from cowfs.linux.limits import take_all_descriptors
    from cowfs.store.e2fsprogs.signals import cleaned_up

    options.must_have_name(args.file)
    take_all_descriptors()  # each directory on the way to a path needs several
    whole = bytes_of(args.what)
    with cleaned_up(), progress_line() as progress:
        backup(
            args.what,
            args.file,
            force=args.force,
            tell=warn,
            progress=progress,
            tick=counted(progress, whole),
        )
    note(f"{args.what}: copied to {args.file}")
    return 0
