"""Where a union may be mounted."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from cowfs.errors import MountFailure
from cowfs.linux.files import is_image
from cowfs.linux.mount_table import mount_of, where_is
from cowfs.linux.trust import who_can_redirect
from cowfs.linux.user_namespace import has_all
from cowfs.union import UnionOptions


def check_mountpoint(mountpoint: str) -> str:
    """Return the mountpoint's real path; MountFailure if it cannot be a mountpoint."""
    if mountpoint.startswith("/dev/fd/"):
        return mountpoint  # another program mounts, and passes the connection
    try:
        os.statvfs(mountpoint)  # asks its daemon; stat(2) may not
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise MountFailure(
                f"{mountpoint}: a cowfs whose daemon is dead is mounted here",
                f"remove it first: cowfs umount {mountpoint}",
            ) from None
    if not os.path.exists(mountpoint):
        raise MountFailure(f"{mountpoint}: no such directory", "create it first")
    if not os.path.isdir(mountpoint):
        raise MountFailure(
            f"{mountpoint}: not a directory", "give a directory after the lower: cowfs mount LOWER MOUNTPOINT"
        )
    _refuse_redirection(mountpoint)
    target = os.path.realpath(mountpoint)
    here = mount_of(target)
    if here is not None and here.fstype == "fuse.cowfs":
        raise MountFailure(
            f"{mountpoint}: a cowfs is already mounted here", f"unmount it first: cowfs umount {mountpoint}"
        )
    return target


def is_automounted(mountpoint: str) -> bool:
    """Whether autofs waits for this mount: for systemd (x-systemd.automount) or automount(8).

    Then only the process group of its caller can reach the mountpoint until the mount is there, and while
    autofs unmounts it.
    """
    here = mount_of(mountpoint)
    return here is not None and here.fstype == "autofs"


def _refuse_redirection(mountpoint: str) -> None:
    """MountFailure if another user's symbolic link could lead root's mount to any directory."""
    if os.geteuid() != 0 or not has_all("uid"):
        return
    try:
        reason = who_can_redirect(mountpoint)
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        raise MountFailure(f"{mountpoint}: {reason}", "give the path of the directory itself")


def check_places(mountpoint: str, options: UnionOptions) -> None:
    """Refuse a store directory in a lower, or the other way round, and a mountpoint in the store:
    MountFailure.

    Otherwise a mountpoint may be a layer, inside one, or above one: layers are known by descriptors, and
    mounts in a layer do not belong to it.
    """
    if mountpoint.startswith("/dev/fd/") or options.store == "memory" or is_image(options.store):
        return
    check_apart(options.store, options.lowers)
    at, store = _place(mountpoint), _place(options.store)
    if at != store and _inside(at, store):
        raise MountFailure(f"{mountpoint}: is inside the store {options.store}", "choose another mountpoint")


def hides_its_store(mountpoint: str, options: UnionOptions) -> bool:
    """Whether the mount is on the store's directory itself."""
    if mountpoint.startswith("/dev/fd/") or options.store == "memory" or is_image(options.store):
        return False
    return _place(mountpoint) == _place(options.store)


def check_apart(store: str, lowers: Sequence[str]) -> None:
    """Refuse a store directory in one of *lowers*, and a lower in it: MountFailure."""
    if is_image(store):
        return
    place = _place(store)
    for lower in filter(os.path.isdir, lowers):
        if _inside(place, _place(lower)):
            raise MountFailure(f"{store}: the store is inside the lower {lower}", "choose another path")
        if _inside(_place(lower), place):
            raise MountFailure(f"{lower}: the lower is inside the store {store}", "choose another store")


_Place = tuple[str, tuple[bytes, ...]]
"""A filesystem, and the names on the way from its root: the same by whatever mount it is reached."""


def _place(path: str) -> _Place:
    """Return the place of what is at *path*, or will be created there."""
    try:
        fd = os.open(path, os.O_PATH)
    except OSError:
        above, name = os.path.split(path)
        if not name:
            return "", ()
        dev, names = _place(above)
        return dev, (*names, os.fsencode(name))
    try:
        dev, way = where_is(fd)
    finally:
        os.close(fd)
    return dev, tuple(filter(None, way.split(b"/")))


def _inside(place: _Place, directory: _Place) -> bool:
    return place[0] == directory[0] and place[1][: len(directory[1])] == directory[1]
