"""``cowfs shrink``: make a store smaller."""

from __future__ import annotations

import argparse
from functools import partial

from cowfs.cli import options
from cowfs.cli.output import bytes_of, counted, progress_line, say, shares

NAME = "shrink"

DESCRIPTION = """\
Make a store smaller, and keep its contents. It must not be mounted. cowfs checks a copy, makes it smaller,
and replaces the store with it. If this is interrupted, the store is the old one or the new one.
"""
EPILOG = """\
SIZE is the new size in MiB, or with a unit (256, 256M, 1.5G); without it, as small as possible, but at
least 16 MiB. The copy needs space beside the store: as much as the store takes on the disk now. `cowfs trim`
frees space on the disk without a copy.

examples:
  cowfs shrink sysrcd.bs 256
  cowfs shrink sysrcd.bs           to archive it: no space is left for more changes

Exit codes: 0 the store has that size; 1 usage error; 2 a program is missing; 32 it was not changed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("store", metavar="STORE", help="the store to shrink")
    parser.add_argument(
        "size", metavar="SIZE", nargs="?", help="its new size in MiB, or with a unit: 256M, 1G"
    )


def run(args: argparse.Namespace) -> int:
    """Shrink the store."""
    from cowfs.client import mount_with_store
    from cowfs.errors import StoreError
    from cowfs.exports.target import new_file
    from cowfs.store.format.sizes import format_size, parse_size
    from cowfs.store.format.sniff import split_subdir
    from cowfs.store.offline.shrink import shrink_store

    options.must_precede(NAME, args.store, args.size)
    if mount_with_store(args.store) is not None:
        raise StoreError(f"{args.store}: is mounted", "unmount it first")
    size = parse_size(args.size) if args.size else None
    image, replacing = split_subdir(args.store)[0], partial(new_file, force=True)
    with progress_line() as show:
        tick = counted(show, bytes_of(image))
        size = shrink_store(image, size, replacing, share=shares(show), tick=tick)
    say(f"{args.store}: resized to {format_size(size)}")
    return 0
