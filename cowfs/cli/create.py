"""``cowfs create``: make a store."""

from __future__ import annotations

import argparse

from cowfs.cli.output import say

NAME = "create"

_DESCRIPTION = """\
Make a store: a file with an ext3 filesystem in it, where the changes made through a mount will be kept.
Nothing may stand at STORE yet. All of SIZE is allocated now, so that it cannot run out later.
Needs no root. What fails, or is interrupted, leaves nothing behind.
"""
_EPILOG = """\
SIZE is in megabytes, or has a unit: 256, 256M and 262144K are the same, 2G is 2048. At least 16; on
FAT filesystems at most 4095.

example:
  cowfs create sysrcd.bs 512                       make a store of 512 MB
  cowfs mount root.squashfs /mnt --store sysrcd.bs  use it

exit codes: 0 made; 1 wrong usage; 2 a program is missing; 32 the store could not be made.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the subcommand."""
    parser = subparsers.add_parser(
        NAME,
        help="make a store",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("store", metavar="STORE", help="the file to make, for instance sysrcd.bs")
    parser.add_argument("size", metavar="SIZE", help="its size in megabytes, or 512M, 2G")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make the store."""
    from cowfs.store.create import create_store
    from cowfs.store.sizes import format_size, parse_size

    size = parse_size(args.size)
    create_store(args.store, size)
    say(f"{args.store}: made, an empty store of {format_size(size)}")
    return 0
