"""``cowfs persist``: save a store that is in memory."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from cowfs.cli import options
from cowfs.cli.output import note
from cowfs.client import VIEW_FSTYPE, ask, facts_of, mount_first
from cowfs.errors import StoreError
from cowfs.linux.mount_table import mountinfo

NAME = "persist"

DESCRIPTION = """\
Write the changes of a mount whose store is in memory to a new store, STORE, and keep all later changes there
too. The mount stays in use; at the end, programs that use it wait for a second or two per GiB. If the
command fails or is interrupted, the mount continues as before.

STORE is a path. For root it may begin with a disk, which need not be mounted: /dev/sdb1/my/sysrcd.bs is
/my/sysrcd.bs on that disk, and /dev/sdb1 is /sysrcd.bs on it.
"""
EPILOG = """\
SIZE is the size of STORE, in MiB unless it has a unit (1024M, 2G). By default STORE is as large as the
store in memory has become; `cowfs grow` makes it larger later.

examples:
  cowfs persist /mnt sysrcd.bs 512
  cowfs persist / /dev/sdb1 512          in a live system: the next boot finds it

Exit codes: 0 the changes are kept; 1 usage error; 2 only root can do this; 32 STORE could not be written.
Unless the exit code is 0, the changes are still in memory.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parser.add_argument("store", metavar="STORE", help="the store to create")
    parser.add_argument("size", metavar="SIZE", nargs="?", help="its size in MiB, or with a unit: 1024M, 2G")


def run(args: argparse.Namespace) -> int:
    """Ask the daemon to move its store to a file."""
    from cowfs.store.format.sizes import format_size, parse_size

    options.must_have_name(args.store)
    shown, kept = persist(args.mountpoint, args.store, parse_size(args.size) if args.size else None)
    note(f"{args.mountpoint}: changes are now kept in {shown} ({format_size(kept)})")
    return 0


def persist(
    mountpoint: str, store: str, size: int | None = None, tell: Callable[[str], object] = note
) -> tuple[str, int]:
    """Move a store to a file; return its name and its size. Prints what it does; raises CowfsError."""
    from cowfs.cli.verify import is_kept
    from cowfs.store.disks.block_device import directory_of

    found = mount_first(mountpoint, store, NAME)
    kept = 0
    shown, path = store, os.path.abspath(store)
    with directory_of(path) as (fd, name):
        if os.path.basename(path) != name:  # only the disk was given
            shown = path = os.path.join(path, name)
        device = os.fstat(fd).st_dev
        # The daemon would wait for itself.
        served = {found.dev, *(mount.dev for mount in mountinfo() if mount.fstype == VIEW_FSTYPE)}
        if f"{os.major(device)}:{os.minor(device)}" in served:
            raise StoreError(
                f"{path}: is inside the mount whose changes it would hold", "choose a path outside the mount"
            )
        facts = facts_of(found.dev)
        for reply in ask(found.dev, NAME, timeout=None, fd=fd, name=name, path=path, size=size):
            if "said" in reply:
                tell(f"{reply['said']} …")
            kept = reply.get("size", kept)
        is_kept(fd, name, path, facts, kept)
    return shown, kept
