"""``cowfs persist``: keep a store that is in memory."""

from __future__ import annotations

import argparse
import os

from cowfs.cli.client import VIEW_FSTYPE, ask, find_mount
from cowfs.errors import MountFailure, StoreError
from cowfs.linux.mounts import mountinfo

NAME = "persist"

_DESCRIPTION = """\
Write the changes of a mount whose store is in memory to a new store, STORE, and go on with them there:
what is changed from now on is kept too. The mount can be used meanwhile; at the end its users wait, a second
or two for each gigabyte. If it fails, or is interrupted, the mount goes on as it was.
"""
_EPILOG = """\
SIZE is how large STORE shall be: in megabytes, or with a unit (1024M, 2G). Without it STORE is as large
as the store in memory has become; `cowfs grow` makes it larger later.

example:
  cowfs persist /mnt sysrcd.bs 512

exit codes: 0 it is kept; 1 wrong usage; 32 it could not be written, and is in memory as before.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the subcommand."""
    parser = subparsers.add_parser(
        NAME,
        help="keep the changes of a mount that has them in memory",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parser.add_argument("store", metavar="STORE", help="the store to make")
    parser.add_argument("size", metavar="SIZE", nargs="?", help="its size in megabytes, or 1024M, 2G")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Ask the daemon to move its store."""
    from cowfs.store.sizes import format_size, parse_size

    size = parse_size(args.size) if args.size else None
    found = find_mount(args.mountpoint)
    if found is None:
        raise MountFailure(f"{args.mountpoint}: no cowfs is mounted here")
    path = os.path.abspath(args.store)
    directory, name = os.path.split(path)
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from None
    try:
        device = os.fstat(fd).st_dev
        # The daemon would wait for itself.
        served = {found.dev, *(mount.dev for mount in mountinfo() if mount.fstype == VIEW_FSTYPE)}
        if f"{os.major(device)}:{os.minor(device)}" in served:
            raise StoreError(f"{path}: is inside the mount whose changes it shall hold", "put it elsewhere")
        kept = 0
        for reply in ask(found.dev, NAME, timeout=None, fd=fd, name=name, path=path, size=size):
            if "said" in reply:
                print(reply["said"] + " …", flush=True)
            kept = reply.get("size", kept)
    finally:
        os.close(fd)
    print(f"{args.mountpoint}: the changes are kept in {args.store}, {format_size(kept)}, from now on")
    return 0
