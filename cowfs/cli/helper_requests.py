"""The requests of the daemon of root's mount to its helper process: mount, unmount, run e2fsck.

The helper is not confined. It learns the mountpoint and the layers before the daemon reads any data, and
later requests contain no path. So an attacker who takes over the daemon can use the helper only for what the
daemon does anyway.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from cowfs.linux import fuse, helper_process, mount_table, mounts, safe_paths
from cowfs.linux.files import syncfs
from cowfs.linux.places import Places
from cowfs.linux.sleep import Disks
from cowfs.linux.sockets import SYSLOG
from cowfs.mountpoint import is_automounted
from cowfs.store.e2fsprogs import tools

Request = dict[str, Any]
Reply = dict[str, Any]


class HelperRequests:
    """The requests of one mount, by name."""

    def __init__(self, mountpoint: str, paths: Sequence[str]) -> None:
        """*paths* are the paths of the store and the lowers, as watched() returns them."""
        self._mountpoint = mountpoint
        self._paths = paths
        self._dev = ""
        self._devices: list[str] = []
        self._places: Places | None = None

    def start(self) -> None:
        """Start to serve requests, while the process has one thread."""
        inline = {"mount": self.mount, "store": self.store, "is_mounted": self.is_mounted}
        waiting = {"answers": self.answers, "sync": self.sync, "drop": self.drop, "unmount": self.unmount}
        asking = {"places": self.places, "loops": self.loops, "wake": self.wake, "syslog": self.syslog}
        helper_process.start(
            {**inline, **waiting, **asking, "run": self.run},
            inline=inline,
            own_session=not is_automounted(self._mountpoint),
        )

    def mount(self, request: Request, fds: list[int]) -> Reply:
        """Mount the FUSE device *fds*, once; return its device number.

        The helper holds the layers and the store open, so that they are seen to be in use.
        """
        if self._dev:
            raise PermissionError(1, "it is already mounted")
        self._places = Places(self._paths)
        self._devices = Disks(self._paths).devices
        tools.hide(self._mountpoint)
        fuse.mount_connection(fds[0], self._mountpoint, request["source"], request["options"])
        here = mount_table.mount_of(self._mountpoint)
        self._dev = here.dev if here is not None else "none"
        return {"dev": here.dev if here is not None else ""}

    def is_mounted(self, request: Request, fds: list[int]) -> Reply:
        """Return whether the mount still exists."""
        here = mount_table.mount_of(self._mountpoint)
        return {"is": here is not None and here.dev == self._dev}

    def unmount(self, request: Request, fds: list[int]) -> Reply:
        """Detach the mount if it still exists; return whether it did."""
        if not self.is_mounted(request, fds)["is"]:
            return {"was": False}
        mounts.unmount(self._mountpoint, mounts.MNT_DETACH)
        return {"was": True}

    def answers(self, request: Request, fds: list[int]) -> Reply:
        """Return once the mount answers requests."""
        os.stat(self._mountpoint)
        return {}

    def sync(self, request: Request, fds: list[int]) -> Reply:
        """Make the kernel write back the cached changes of the mount."""
        fd = os.open(self._mountpoint, os.O_RDONLY | os.O_DIRECTORY)
        try:
            here = os.fstat(fd).st_dev
            if f"{os.major(here)}:{os.minor(here)}" == self._dev:
                syncfs(fd)
        finally:
            os.close(fd)
        return {}

    def drop(self, request: Request, fds: list[int]) -> Reply:
        """Make the kernel drop the unused names and inodes of the mount."""
        mounts.drop_unused(self._mountpoint, self._dev)
        return {}

    def run(self, request: Request, fds: list[int]) -> Reply:
        """Run e2fsck or resize2fs on the image *fds*; see :func:`cowfs.store.e2fsprogs.tools.run`."""
        return tools.run_errand(request, fds)

    def places(self, request: Request, fds: list[int]) -> Reply:
        """Return what has happened to the files of the store and the lowers; see :class:`Places`."""
        opened = [None if inode is None else (inode[0], inode[1]) for inode in request["opened"]]
        return {"changes": self._places.changes(opened) if self._places else [""] * len(self._paths)}

    def store(self, request: Request, fds: list[int]) -> Reply:
        """Watch the file *fds* as the store from now on."""
        if self._places is not None:
            self._places.put(0, fds[0])
        return {}

    def loops(self, request: Request, fds: list[int]) -> Reply:
        """Return the loop devices that use the file *fds*."""
        return {"devices": safe_paths.loop_users(f"/proc/self/fd/{fds[0]}")}

    def wake(self, request: Request, fds: list[int]) -> Reply:
        """Open the disks of the layers again after the machine slept."""
        for device in self._devices:
            with suppress(OSError):
                os.close(os.open(device, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        return {}

    def syslog(self, request: Request, fds: list[int]) -> Reply:
        """Return a connection to the system's log."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        connection.connect(SYSLOG)
        return {"fd": connection.detach()}
