"""Remount an existing mount: ``mount -o remount,ro`` and ``remount,rw``."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from cowfs.cli.options import split
from cowfs.client import ask, facts_of, the_mount
from cowfs.errors import MountFailure
from cowfs.linux import fuse, mounts

_MAY_BE_SET = frozenset({"nosuid", "nodev", "noexec"})
"""Options that the kernel alone applies, without the daemon. mount(8) does not pass on their opposites."""


def is_asked_for(given: list[str]) -> bool:
    """Return whether the options of all ``-o`` request a remount."""
    return "remount" in _words(given)


def _words(given: list[str]) -> Sequence[str]:
    return [word for text in given for word in split(text)]


def _must_be_writable(mountpoint: str, dev: str) -> None:
    """MountFailure if the store is read-only, whatever the mount allows."""
    store = facts_of(dev)["store"]
    if store.get("read_only"):
        raise MountFailure(
            f"{mountpoint}: the store {store['path']} was opened read-only", "unmount, and mount without ro"
        )


def remount(mountpoint: str, given: list[str]) -> int:
    """Make a mount read-only or writable, and set ``nosuid``, ``nodev`` and ``noexec`` if they are given.

    Other options stay the same, because mount(8) repeats them all. If it becomes read-only, all changes are
    then written to disk. MountFailure if the mount is in use, or belongs to another user.
    """
    mount = the_mount(mountpoint)
    words = _words(given)
    asked = [word for word in words if word in {"ro", "rw"}]
    is_read_only = asked[-1:] == ["ro"]
    options = {*mount.options.split(","), *(word for word in words if word in _MAY_BE_SET)}
    if asked and not is_read_only:
        _must_be_writable(mountpoint, mount.dev)
    try:
        with mounts.reached(mount.mountpoint) as place:
            fuse.remount(place, options, read_only=is_read_only)
    except OSError as failure:
        hint = {
            errno.EBUSY: "a file is open for writing: fuser -vm shows by which process",
            errno.EPERM: "only root can remount",
        }.get(failure.errno or 0, "")
        raise MountFailure(f"{mountpoint}: {os.strerror(failure.errno or 0)}", hint) from None
    if is_read_only:
        for _ in ask(mount.dev, "sync", timeout=None):
            pass
    return 0
