"""``cowfs create``: create a store."""

from __future__ import annotations

import argparse

from cowfs.cli import options
from cowfs.cli.output import note

NAME = "create"

_DESCRIPTION = """\
Create a store: a file that holds an ext3 filesystem, in which the changes made through a mount are kept.
STORE must not exist. All SIZE MiB are allocated now, so that the disk cannot run out of space for
the store later. Root is not needed. If the command fails or is interrupted, it leaves nothing behind.
"""
_EPILOG = """\
SIZE is in MiB unless it has a unit: 256, 256M and 262144K are the same; 2G is 2048. The minimum is 16;
on FAT filesystems the maximum is 4095.

examples:
  cowfs create sysrcd.bs 512                        create a 512 MiB store
  cowfs mount root.squashfs /mnt --store sysrcd.bs  use it

Exit codes: 0 success; 1 usage error; 2 a program is missing; 32 the store could not be created.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand's parser."""
    parser = options.add_subcommand(subparsers, NAME, "create a store", _DESCRIPTION, _EPILOG)
    parser.add_argument("store", metavar="STORE", help="the file to create, such as sysrcd.bs")
    parser.add_argument("size", metavar="SIZE", help="its size in MiB, or with a unit: 512M, 2G")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Create the store."""
    from cowfs.store.format.sizes import format_size, parse_size
    from cowfs.store.offline.create import create_store

    size = parse_size(args.size)
    create_store(args.store, size)
    note(f"{args.store}: created an empty {format_size(size)} store")
    return 0
