"""``cowfs umount``: unmount, and wait until all changes are written and the store is released."""

from __future__ import annotations

import argparse
import threading
from contextlib import suppress

from cowfs.cli.output import warn
from cowfs.errors import UsageError
from cowfs.unmounting import unmount

DESCRIPTION = "Unmount MOUNTPOINT, and wait until all changes are written and the store is released."
EPILOG = """\
umount(8) returns before the daemon has written all changes and released the store. This command waits for
that, so that afterwards the store can be copied, checked, resized or unplugged. If the tree is also mounted
elsewhere (by a bind mount, or in another mount namespace), it prints where, and waits for that unmount.

example:
  cowfs umount /mnt
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parser.add_argument(
        "-l", "--lazy", action="store_true", help="detach now, finish when no longer in use; do not wait"
    )
    parser.add_argument(
        "--force", action="store_true", help="unmount even if changes that cannot be written are lost"
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=600,
        metavar="SECONDS",
        help="how long to wait before and after the unmount (default: 600)",
    )


def _seconds(given: str) -> float:
    with suppress(ValueError):
        if 0 <= (seconds := float(given)) <= threading.TIMEOUT_MAX:
            return seconds
    raise UsageError(f"--timeout: {given!r} is not a number of seconds", "give 0 or more")


def run(args: argparse.Namespace) -> int:
    """Unmount, and wait."""
    unmount(args.mountpoint, lazy=args.lazy, force=args.force, timeout=args.timeout, say=warn)
    return 0
