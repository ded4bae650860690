"""``cowfs rollback``: return to the state of a checkpoint."""

from __future__ import annotations

import argparse

from cowfs.cli import options
from cowfs.cli.output import Tally, progress_line, warn

DESCRIPTION = """\
Make the tree what it was at a checkpoint. Later changes are lost, unless another checkpoint has them.
"""
EPILOG = """\
In a mounted tree no file may be open, mapped or running, and no directory may be a working directory;
otherwise cowfs reports what is in use, and by whom. Later checkpoints stay: `cowfs rollback` can also return
to one of them.

examples:
  cowfs rollback /mnt before-upgrade
  cowfs checkpoint /mnt tried && cowfs rollback /mnt clean    keep what there is, and go back
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("what", metavar="STORE|MOUNTPOINT")
    parser.add_argument("name", metavar="NAME", help="the checkpoint")
    options.add_lower(parser)


def run(args: argparse.Namespace) -> int:
    """Go back to the checkpoint."""
    from cowfs import api

    with progress_line() as progress:
        lowers = options.lowers_of(args)
        api.rollback(args.what, args.name, lowers, warn, Tally(progress, "names").add)
    return 0
