"""The daemon's control address, the identity of a socket's peer, and systemd's readiness protocol."""

from __future__ import annotations

import os
import socket
import struct

_UCRED = struct.Struct("=iII")  # struct ucred: pid, uid, gid


def control_address(dev: str) -> bytes:
    """Return the abstract socket address of the daemon that serves the mount with this ``major:minor``.

    An abstract address (unix(7)) goes with its process: a killed daemon leaves nothing behind.
    """
    return b"\0cowfs-" + dev.encode()


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Return pid and uid of the process at the other end of a unix socket (SO_PEERCRED)."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(raw)
    return pid, uid


def sd_notify(message: str) -> bool:
    """Tell the service manager a state such as ``READY=1`` (sd_notify(3)); False when none listens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.connect(address)
            sender.sendall(message.encode())
        except OSError:
            return False
    return True
