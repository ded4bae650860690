"""Whiteouts: how the upper says that a lower name is gone.

A whiteout is a character device 0:0. All of them are links to one inode as far as the filesystem
allows, so that deleting many files costs names only, not inodes.
"""

from __future__ import annotations

import errno
import stat
from contextlib import suppress

from cowfs.layers.base import Key
from cowfs.linux import files
from cowfs.overlay.node import Node
from cowfs.overlay.state import State

_NAME = b"#whiteout"
_NO_LINK = {errno.EMLINK, errno.EPERM, errno.ENOENT, errno.EOPNOTSUPP}


def make(fs: State, directory: Key, name: bytes) -> None:
    """Put a whiteout at a name that the upper does not have."""
    shared = fs.shared_whiteout
    if shared is not None:
        try:
            fs.upper.link(shared, directory, name)
            return
        except OSError as failure:
            if failure.errno not in _NO_LINK:
                raise
            fs.upper.forget(shared)
            fs.shared_whiteout = None
            with suppress(OSError):
                fs.upper.unlink(fs.work, _NAME, None)
    fs.upper.forget(_mknod(fs, directory, name))
    with suppress(OSError):
        fs.upper.link(_key_of(fs, directory, name), fs.work, _NAME)
        found = fs.upper.lookup(fs.work, _NAME)
        fs.shared_whiteout = found[0] if found else None


def _mknod(fs: State, directory: Key, name: bytes) -> Key:
    return fs.upper.mknod(directory, name, stat.S_IFCHR, 0, 0, 0)


def _key_of(fs: State, directory: Key, name: bytes) -> Key:
    found = fs.upper.lookup(directory, name)
    assert found is not None
    return found[0]


def replace(fs: State, parent: Node, name: bytes, key: Key | None) -> None:
    """Put a whiteout in the place of what the upper has at a name, in one step.

    *key* is that of the inode there, if somebody goes on using it. A directory must hold nothing
    but whiteouts.
    """
    temporary = fs.temporary()
    make(fs, fs.work, temporary)
    place = (parent.upper, name)
    try:
        found = fs.upper.lookup(*place)
        if found is not None and stat.S_ISDIR(found[1].st_mode):
            fs.upper.rename((fs.work, temporary), place, files.RENAME_EXCHANGE, replaced=key)
            with suppress(OSError):  # what stays in the work directory goes at the next mount
                clear(fs, fs.work, temporary, key)
        else:
            fs.upper.rename((fs.work, temporary), place, replaced=key)
    except BaseException:
        with suppress(OSError):
            fs.upper.unlink(fs.work, temporary, None)
        raise


def clear(fs: State, directory: Key, name: bytes, key: Key | None) -> None:
    """Remove a directory of the upper that holds nothing but whiteouts."""
    found = fs.upper.lookup(directory, name)
    if found is None:
        return
    for entry in fs.upper.readdir(found[0]):
        fs.upper.unlink(found[0], entry.name, None)
    fs.upper.forget(found[0])
    fs.upper.rmdir(directory, name, key)
