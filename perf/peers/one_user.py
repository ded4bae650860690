"""What an ordinary user can mount: cowfs, and the stack of three daemons, all run by nobody.

nobody also owns the files in the lower and runs the clients: other users cannot access a user's mount.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from perf.box import Box
from perf.images import NOBODY
from perf.peers import System, cowfs
from perf.peers.stacks import Stack

AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]


def give_to_nobody(box: Box) -> None:
    """Make nobody the owner of everything in *box*, and have nobody run its programs."""
    box.user = AS_NOBODY
    for path in (box.path, box.lower, box.store, box.merged, box.image):
        if path.exists():
            os.chown(path, NOBODY, NOBODY)


@dataclass(frozen=True, slots=True)
class UserCowfs(cowfs.Cowfs):
    """cowfs with its defaults, run by nobody."""

    def create(self, box: Box) -> None:
        cowfs.Cowfs.create(self, box)
        give_to_nobody(box)

    def unmount(self, box: Box) -> None:
        box.stop_daemon(box.merged, [*AS_NOBODY, *cowfs.command(), "umount", str(box.merged)])


@dataclass(frozen=True, slots=True)
class UserStack(Stack):
    """The stack of daemons, run by nobody."""

    def create(self, box: Box) -> None:
        Stack.create(self, box)
        give_to_nobody(box)


SYSTEMS: list[System] = [
    UserCowfs("cowfs-user", engine="auto"),
    UserCowfs("cowfs-dev-fuse-user", engine="auto", dev_fuse=True),
    UserStack("stack-user"),
    UserStack("stack-user-new", use_newest=True),
]
