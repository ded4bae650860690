"""``cowfs lower``: add a module to a mounted tree, or remove it."""

from __future__ import annotations

import argparse
import base64
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from cowfs.cli.output import note
from cowfs.errors import LayerError

if TYPE_CHECKING:
    from cowfs.linux.mount_table import MountInfo

NAME = "lower"

DESCRIPTION = """\
Add a module to a mounted tree, or remove it again. A module is a squashfs image; it is merged above the
lowers and below the store.
"""
EPILOG = """\
Afterwards the tree shows the same as after a new mount, so changes and deletions in the store stay in effect.
An open file does not change until it is closed.

If root's mount allows set-user-ID programs or devices, or other users can see it, the image must be one that
only root can change; --trust accepts any image.

The store does not depend on its modules. At the next mount you can name them above the lower that the store
belongs to, in any order, or leave them out: cowfs mount MODULE:LOWER MOUNTPOINT --store STORE.

examples:
  cowfs lower add /mnt firefox.sb
  cowfs lower remove /mnt firefox.sb

Exit codes: 0 done; 1 usage error, no such module, or added already; others as those of `cowfs mount`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("what", metavar="add|remove", choices=("add", "remove"), help="what to do")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parser.add_argument("image", metavar="IMAGE", help="the module: a squashfs image in a file")
    parser.add_argument(
        "--trust", action="store_true", help="add the image even if other users can change it"
    )


def run(args: argparse.Namespace) -> int:
    """Ask the daemon to add or remove the module."""
    from cowfs.client import ask, mount_first
    from cowfs.linux.files import open_ordinary
    from cowfs.linux.remote import may_wait

    mount = mount_first(args.mountpoint, args.image, f"{NAME} {args.what}")
    path = os.path.abspath(args.image)
    fd = -1
    try:
        try:
            fd = open_ordinary(path, os.O_RDONLY)
        except OSError as error:
            if args.what == "add":
                raise LayerError(f"{args.image}: {error.strerror}", "give a squashfs image") from None
        if fd >= 0 and may_wait(fd):
            if args.what == "add":
                raise LayerError(
                    f"{args.image}: is on a filesystem that may hang (NFS, FUSE), or in the mount itself",
                    "copy it to /run or to a disk",
                )
            os.close(fd)  # a daemon that reads a file of its own mount waits for itself
            fd = -1
        if args.what == "add" and os.geteuid() == 0 and not args.trust:
            _must_be_roots(mount, path, fd)
        replies = ask(
            mount.dev,
            NAME,
            timeout=None,
            fd=fd,
            what=args.what,
            path=path,
            mounts=[base64.b64encode(place).decode() for place in _mounts_in(mount.mountpoint)],
        )
        for reply in replies:
            used = int(reply.get("in_use", 0))
            if used:
                what, verb = ("file or directory", "is") if used == 1 else ("files or directories", "are")
                note(f"{args.image}: removed; it is closed when {used} {what} in it {verb} no longer in use")
    finally:
        if fd >= 0:
            os.close(fd)
    return 0


def _must_be_roots(mount: MountInfo, path: str, fd: int) -> None:
    """LayerError if other users can change the image, and root's mount would give them rights."""
    from cowfs.client import facts_of
    from cowfs.linux import trust
    from cowfs.url.trust import shows_too_much

    hint = "copy it to where only root can write, or use --trust if you trust it"
    try:
        reason = trust.who_can_change(path)
        if not os.path.samestat(os.stat(path), os.fstat(fd)):
            raise LayerError(f"{path}: was replaced by another file", "try again")
    except OSError as error:
        raise LayerError(f"{path}: {error.strerror}") from None
    if reason is None:
        return
    options = mount.options.split(",")
    if "nosuid" not in options or "nodev" not in options:
        what = "set-user-ID programs" if "nosuid" not in options else "devices"
        raise LayerError(f"{path}: {reason}, and the mount allows {what}", hint)
    if "allow_other" in mount.super_words:
        lowers = [str(one["path"]) for one in facts_of(mount.dev)["lowers"]]
        reason = shows_too_much([path, *lowers], trust.who_can_change)
        if reason is not None:
            raise LayerError(f"{path}: {reason}", hint)


def _mounts_in(mountpoint: bytes) -> list[bytes]:
    """Return the paths, relative to a mountpoint, of the mounts below it."""
    from cowfs.linux.mount_table import mountinfo

    above = mountpoint.rstrip(b"/") + b"/"
    found = []
    with suppress(OSError):
        found = [mount.mountpoint for mount in mountinfo()]
    return sorted({place[len(above) :] for place in found if place.startswith(above) and place != above})
