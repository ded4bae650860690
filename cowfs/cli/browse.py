"""``cowfs browse``: browse the changes in a terminal."""

from __future__ import annotations

import argparse
import importlib.util
import os

from cowfs.cli import options
from cowfs.errors import SystemFailure, UsageError

DESCRIPTION = """\
Show the changes as a tree in the terminal. You can see the differences of each path and the rule that decides
what it shows, mark paths, and revert them.
"""
EPILOG = """\
keys:
  arrows   move in the tree, open and close directories
  d, e     show the differences of the selected path; explain it
  Enter    scroll that text; Escape: back to the tree
  Space    mark a path and everything below it
  r        revert the marked paths, or else the selected one, after a question
  u        undo the last revert
  R        read the changes again
  ?, q     help; quit

In a store with checkpoints it shows the changes since the last one, because only these can be reverted.
It needs the Python package textual; without it, the error says how to install it.

examples:
  cowfs browse /mnt             of a mount, even while it is in use
  cowfs browse /mnt/etc         start at this directory
  cowfs browse sysrcd.bs        of a store that is not mounted
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("what", metavar="STORE|MOUNTPOINT")
    options.add_lower(parser)


def run(args: argparse.Namespace) -> int:
    """Browse until the user quits."""
    from cowfs.cli.diff import paths_of
    from cowfs.cli.revert import last_checkpoint
    from cowfs.linux.programs import how_to_add

    if not all(os.isatty(fd) for fd in (0, 1, 2)) or os.environ.get("TERM", "dumb") == "dumb":
        raise UsageError(
            "browse needs a terminal for input, output and errors", "cowfs diff prints the changes"
        )
    for name in [name for name in os.environ if name.startswith("TEXTUAL")]:
        del os.environ[name]  # they name modules to load and files to write
    if importlib.util.find_spec("textual") is None:
        raise SystemFailure(
            "browse needs the Python package textual, which is not installed", how_to_add("textual")
        )
    from cowfs.browse.app import browse

    args.paths = ()
    what, paths = paths_of(args)
    browse(what, options.lowers_of(args), last_checkpoint(what), paths[0] if paths else b"")
    return 0
