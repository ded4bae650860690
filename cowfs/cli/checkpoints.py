"""``cowfs checkpoints``: list the checkpoints of a store or mount."""

from __future__ import annotations

import argparse
import json
import sys

from cowfs.cli import options
from cowfs.cli.output import say, say_fields

DESCRIPTION = "List the checkpoints of a store or of a mount, the oldest first."
EPILOG = """\
Each line has the time of a checkpoint, its name, and the checkpoint before it. A star marks those that the
tree is based on. `cowfs diff --since NAME` lists the changes since the last of them.

--json prints one object: "version" (1), and "checkpoints", an array of objects with "name", "taken", "on"
(the one before it, or null), "current" (starred) and "last" (the last one with a star). --json and -z print
times in UTC.

example:
  cowfs checkpoints /mnt
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("what", metavar="STORE|MOUNTPOINT")
    options.add_json_or_null(
        parser, "* if the tree is based on it, time, name, the one before it", "print one JSON object"
    )


def run(args: argparse.Namespace) -> int:
    """List the checkpoints."""
    from cowfs.api import checkpoints
    from cowfs.jsontext import to_local_time

    found = checkpoints(args.what)
    if args.json:
        print(json.dumps({"version": 1, "checkpoints": [one._asdict() for one in found]}, indent=2))
        return 0
    for one in found:
        if args.null:
            say_fields("*" if one.current else "", one.taken, one.name, one.on or "")
            continue
        after = f"  (after {one.on})" if one.on is not None else ""
        say(f"{'*' if one.current else ' '} {to_local_time(one.taken)}  {one.name}{after}")
    sys.stdout.flush()
    return 0
