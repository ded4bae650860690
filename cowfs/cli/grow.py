"""``cowfs grow``: make a store larger."""

from __future__ import annotations

import argparse
import os
import sys

from cowfs.cli.client import ask, facts_of, mount_with_store
from cowfs.cli.output import say

NAME = "grow"

_DESCRIPTION = """\
Make a store larger; what is in it stays. Its filesystem is checked (and repaired where that is safe), the
file is extended, and the filesystem is made to fill it. If a step fails the store is as usable as before:
remove the cause, and run the same command again. A store that cowfs has mounted (not with the engine kernel)
is grown under its users, who wait while it is checked and resized. A store in memory may become that large.
"""
_EPILOG = """\
SIZE is the new size, not what is added: in megabytes, or with a unit (1024, 1024M, 1G). A store can
not be made smaller.

examples:
  cowfs grow sysrcd.bs 1024        let it have 1 GB, mounted or not
  cowfs grow /mnt 1024             the same, for the store of this mount

exit codes: 0 it has that size; 1 wrong usage; 2 a program is missing; 32 the store could not be grown.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the subcommand."""
    parser = subparsers.add_parser(
        NAME,
        help="make a store larger",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("store", metavar="STORE|MOUNTPOINT", help="the store to grow")
    parser.add_argument(
        "size",
        metavar="SIZE",
        nargs="?",
        help="its new size in megabytes, or 1024M, 2G; without it the filesystem is made to fill the file",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Grow the store."""
    from cowfs.cli.verify import has_size
    from cowfs.store.grow import grow_store
    from cowfs.store.sizes import format_size, parse_size

    def tell(message: str) -> None:
        # On a terminal resize2fs shows its own progress below these lines; a script gets the result alone.
        if sys.stdout.isatty():
            say(message)

    wanted = parse_size(args.size) if args.size else None
    mount = mount_with_store(args.store)
    if mount is None:
        size = grow_store(args.store, wanted, progress=tell)
    else:
        size = 0
        for reply in ask(mount.dev, NAME, timeout=None, size=wanted):
            size = reply.get("size", size)
            if "said" in reply:
                tell(str(reply["said"]))
        facts = facts_of(mount.dev)
        if facts["store"]["kind"] == "image":
            named = args.store if os.path.isfile(args.store) else facts["store"]["path"]
            has_size(named, facts, size)
    say(f"{args.store}: has {format_size(size)} now")
    return 0
