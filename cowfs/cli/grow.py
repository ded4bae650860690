"""``cowfs grow``: make a store larger."""

from __future__ import annotations

import argparse
import sys

from cowfs.cli import options
from cowfs.cli.output import note
from cowfs.client import ask, checked_answer, facts_of, mount_with_store
from cowfs.errors import UsageError
from cowfs.jsontext import whole
from cowfs.linux.files import is_image, size_of

NAME = "grow"

DESCRIPTION = """\
Make a store larger, and keep its contents. cowfs checks the filesystem (and repairs what is safe), extends
the file, and resizes the filesystem to fill it. If a step fails, the store is still usable: fix the cause
and run the same command again. The store can be mounted (unless by --engine kernel); programs that use the
mount wait while its filesystem is checked and resized. For a store in memory, SIZE is its new size limit.
"""
EPILOG = """\
SIZE is the new size; with a + before it, the amount to add to an image. It is in MiB unless
it has a unit (1024, 1024M, 1.5G, +100M). `cowfs shrink` makes a store smaller.

examples:
  cowfs grow sysrcd.bs 1024        resize it to 1 GiB, whether it is mounted or not
  cowfs grow /mnt 1024             the same for the store of this mount

Exit codes: 0 the store has that size; 1 usage error; 2 a program is missing; 32 it could not be resized.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("store", metavar="STORE|MOUNTPOINT", help="the store to grow")
    parser.add_argument(
        "size",
        metavar="SIZE",
        nargs="?",
        help="its new size in MiB, or with a unit: 1024M, 2G (default: the size of the file)",
    )


def run(args: argparse.Namespace) -> int:
    """Grow the store."""
    from cowfs.cli.verify import has_size
    from cowfs.store.format.sizes import LARGEST, format_size
    from cowfs.store.format.sniff import split_subdir
    from cowfs.store.offline.grow import grow_store

    def tell(message: str) -> None:
        # On a terminal resize2fs shows its own progress below these lines; a script gets only the result.
        if sys.stdout.isatty():
            note(message)

    options.must_precede(NAME, args.store, args.size)
    mount = mount_with_store(args.store)
    if mount is None:
        image = split_subdir(args.store)[0]
        size = grow_store(image, _wanted(args.size, image, mounted=False), progress=tell)
    else:
        told: object = None
        image = args.store if is_image(args.store) else facts_of(mount.dev)["store"]["path"]
        wanted = _wanted(args.size, image, mounted=True)
        for reply in ask(mount.dev, NAME, timeout=None, size=wanted):
            told = reply.get("size", told)
            if "said" in reply:
                tell(str(reply["said"]))
        facts = facts_of(mount.dev)
        is_file = facts["store"]["kind"] == "image"
        with checked_answer(args.store):
            size = whole(told, LARGEST, 1 if is_file else wanted or 1)
        if is_file:
            named = args.store if is_image(args.store) else facts["store"]["path"]
            has_size(named, facts, size)
    note(f"{args.store}: resized to {format_size(size)}")
    return 0


def _size(image: str) -> int:
    with open(image, "rb", buffering=0) as file:
        return size_of(file.fileno())


def _wanted(text: str | None, image: str, *, mounted: bool) -> int | None:
    """Return the requested size in bytes, None for the size of the file. UsageError if it is invalid."""
    from cowfs.store.format.sizes import parse_size

    if text and text.startswith("-"):
        raise UsageError(f"{text}: grow makes a store larger", "cowfs shrink STORE SIZE makes it smaller")
    if not text or not text.startswith("+"):
        return parse_size(text) if text else None
    more = parse_size(text[1:])
    if not mounted and not is_image(image):
        return more  # there is no store to grow, which opening it reports
    if not is_image(image):
        raise UsageError(f"{text}: only the size of an image can be added to", "give the new size")
    return _size(image) + more
