"""``cowfs rollback``: return to the state of a checkpoint."""

from __future__ import annotations

import argparse

from cowfs.cli import options
from cowfs.cli.output import warn

NAME = "rollback"

_DESCRIPTION = """\
Let the tree be what it was at a checkpoint. What was changed since is gone, unless another checkpoint has it.
"""
_EPILOG = """\
In a mounted tree nothing may be open, mapped, run, or somebody's working directory; what is, and by whom, is
said. Later checkpoints stay: `cowfs rollback` to one of them goes forward again.

examples:
  cowfs rollback /mnt before-upgrade
  cowfs checkpoint /mnt tried && cowfs rollback /mnt clean    keep what there is, and go back
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand's parser."""
    parser = options.add_subcommand(subparsers, NAME, "go back to a checkpoint", _DESCRIPTION, _EPILOG)
    parser.add_argument("what", metavar="STORE|MOUNTPOINT")
    parser.add_argument("name", metavar="NAME", help="the checkpoint")
    options.add_lower(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Go back."""
    from cowfs import api

    api.rollback(args.what, args.name, options.lowers_of(args), warn)
    return 0
