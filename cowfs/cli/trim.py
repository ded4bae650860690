"""``cowfs trim``: return the free space of a store to the disk."""

from __future__ import annotations

import argparse

from cowfs.cli.output import progress_line, say, shares

NAME = "trim"

DESCRIPTION = """\
Return the free space of a store that is an image to the disk, by making holes in its file. The file keeps its
size, and takes space again as it is filled. For a store in memory, this frees memory.
"""
EPILOG = """\
cowfs checks the store (and repairs what is safe). It can be mounted, unless by --engine kernel; programs
that use the mount wait while it is checked.

Afterwards the store needs free space on its disk when it is written to: if the disk is full, writes fail.
`cowfs create` and `grow` allocate all space at once, so that this cannot happen.

examples:
  cowfs trim /mnt
  cowfs trim sysrcd.bs

Exit codes: 0 done; 1 usage error; 2 a program is missing; 32 the store cannot be used.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("store", metavar="STORE|MOUNTPOINT", help="the store to trim")


def run(args: argparse.Namespace) -> int:
    """Trim the store."""
    from cowfs.client import ask, checked_answer, mount_with_store
    from cowfs.jsontext import whole
    from cowfs.store.format.sizes import LARGEST, format_size
    from cowfs.store.format.sniff import split_subdir
    from cowfs.store.offline.shrink import trim_store

    mount = mount_with_store(args.store)
    if mount is None:
        with progress_line() as show:
            freed = trim_store(split_subdir(args.store)[0], share=shares(show))
    else:
        told = [reply.get("freed") for reply in ask(mount.dev, NAME, timeout=None)]
        with checked_answer(args.store):
            freed = whole(told[-1] if told else None, LARGEST)
    say(f"{args.store}: {format_size(freed)} freed on the disk")
    return 0
