"""``cowfs checkpoint``: keep the current state of a tree."""

from __future__ import annotations

import argparse

from cowfs.cli import options
from cowfs.cli.output import Tally, progress_line, warn

DESCRIPTION = """\
Keep the current state of the tree under a name. `cowfs rollback` restores it, and `cowfs diff --since`
compares with it. A checkpoint takes no space: only later changes do.
"""
EPILOG = """\
Programs can use a mounted tree meanwhile: files that are open for writing are copied once more at the next
write. The checkpoint contains all data that programs wrote before the command, synced by fsync(2) or not.
Versions of cowfs that do not know checkpoints cannot use a store that has some.

--delete removes a checkpoint, and changes neither the tree nor other checkpoints. Its space is freed at once
if the store is not mounted, otherwise at the next mount.

examples:
  cowfs checkpoint /mnt before-upgrade
  cowfs checkpoint sysrcd.bs clean               of a store that is not mounted
  cowfs checkpoint /mnt --delete before-upgrade

Exit codes: 0 done; 1 no such name, or not a name; others as those of `cowfs mount`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("what", metavar="STORE|MOUNTPOINT")
    parser.add_argument("name", metavar="NAME", help="the name of the checkpoint")
    parser.add_argument("--delete", action="store_true", help="delete the checkpoint of that name")
    options.add_lower(parser)


def run(args: argparse.Namespace) -> int:
    """Create or delete a checkpoint."""
    from cowfs import api

    lowers = options.lowers_of(args)
    if not args.delete:
        api.checkpoint(args.what, args.name, lowers, warn)
        return 0
    with progress_line() as progress:
        api.delete_checkpoint(args.what, args.name, lowers, warn, Tally(progress, "names").add)
    return 0
