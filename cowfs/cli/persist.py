"""``cowfs persist``: keep a store that is in memory."""

from __future__ import annotations

import argparse
import os

from cowfs.cli.client import VIEW_FSTYPE, ask, facts_of, the_mount
from cowfs.cli.output import say
from cowfs.errors import StoreError
from cowfs.linux.mounts import mountinfo

NAME = "persist"

_DESCRIPTION = """\
Write the changes of a mount whose store is in memory to a new store, STORE, and go on with them there:
what is changed from now on is kept too. The mount can be used meanwhile; at the end its users wait, a second
or two for each gigabyte. If it fails, or is interrupted, the mount goes on as it was.

STORE is a path, or, for root, one that begins with a disk: /dev/sdb1/my/sysrcd.bs is /my/sysrcd.bs on that
disk, /dev/sdb1 is /sysrcd.bs on it. It need not be mounted.
"""
_EPILOG = """\
SIZE is how large STORE shall be: in megabytes, or with a unit (1024M, 2G). Without it STORE is as large
as the store in memory has become; `cowfs grow` makes it larger later.

examples:
  cowfs persist /mnt sysrcd.bs 512
  cowfs persist / /dev/sdb1 512          in a live system: the next boot finds it

exit codes: 0 it is kept; 1 wrong usage; 2 only root may do that; 32 it could not be written.
In all cases but the first the changes are in memory as before.
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
    from cowfs.cli.verify import is_kept
    from cowfs.store.carrier import directory_of
    from cowfs.store.sizes import format_size, parse_size

    size = parse_size(args.size) if args.size else None
    found = the_mount(args.mountpoint)
    kept = 0
    shown, path = args.store, os.path.abspath(args.store)
    with directory_of(path) as (fd, name):
        if os.path.basename(path) != name:  # only the disk was named
            shown = path = os.path.join(path, name)
        device = os.fstat(fd).st_dev
        # The daemon would wait for itself.
        served = {found.dev, *(mount.dev for mount in mountinfo() if mount.fstype == VIEW_FSTYPE)}
        if f"{os.major(device)}:{os.minor(device)}" in served:
            raise StoreError(f"{path}: is inside the mount whose changes it shall hold", "put it elsewhere")
        facts = facts_of(found.dev)
        for reply in ask(found.dev, NAME, timeout=None, fd=fd, name=name, path=path, size=size):
            if "said" in reply:
                say(f"{reply['said']} …")
            kept = reply.get("size", kept)
        is_kept(fd, name, path, facts, kept)
    say(f"{args.mountpoint}: the changes are kept in {shown}, {format_size(kept)}, from now on")
    return 0
