"""Fault injection: handlers that check each request before they answer it.

They are installed only if the mount was made with faults.
"""

from __future__ import annotations

import errno
import functools
import inspect
import os
import stat
from collections.abc import Collection, Iterator
from typing import Any, Protocol

import trio
from pyfuse3 import FUSEError, SetattrFields

from cowfs.fuse import libfuse
from cowfs.fuse.adapter import Adapter
from cowfs.fuse.beyond import COPY_IN
from cowfs.fuse.libfuse import Message
from cowfs.fuse.paths import join
from cowfs.fuse.protocol import Opcode
from cowfs.overlay.node import Node, path_of

Seen = tuple[str, tuple[bytes, ...]]
"""An operation, and the paths that it is about."""

OPERATIONS = {
    "lookup": "lookup", "getattr": "stat", "readlink": "readlink", "open": "open", "read": "read",
    "write": "write", "create": "create", "mkdir": "mkdir", "mknod": "mknod", "symlink": "symlink",
    "link": "link", "unlink": "unlink", "rmdir": "rmdir", "rename": "rename", "fsync": "fsync",
    "fsyncdir": "fsync", "opendir": "readdir", "getxattr": "getxattr", "listxattr": "listxattr",
    "setxattr": "setxattr", "removexattr": "removexattr", "statfs": "statfs",
}  # fmt: skip
"""The handlers, and the operation that each of them serves."""
OTHERS = ("chmod", "chown", "utimens", "truncate", "fallocate")
_SYNCS = ("fsync", "fsyncdir", "_beyond")
_SYNCHRONOUS = os.O_SYNC | os.O_DSYNC


class Faults(Protocol):
    """The faults to inject."""

    def meet(self, operation: str, paths: Collection[bytes]) -> tuple[int, float]:
        """Return the errno with which a request fails, or 0, and by how many seconds to delay its answer.

        Does not return if the fault is a crash of the machine.
        """
        ...

    def synced(self) -> None:
        """Note that everything is on disk."""
        ...


def install(adapter: Adapter, faults: Faults) -> None:
    """Apply *faults* to the requests to *adapter* from now on."""
    kind = type(adapter)
    handlers = {
        name: _handler(name, getattr(kind, name), faults) for name in (*OPERATIONS, "setattr", "_beyond")
    }
    adapter.__class__ = type(kind.__name__, (kind,), {"__slots__": (), **handlers})


def _handler(name: str, method: Any, faults: Faults) -> Any:
    names = [
        parameter for parameter in inspect.signature(method).parameters if parameter not in {"self", "said"}
    ]

    async def faulty(self: Any, *args: Any) -> Any:
        if name == "read" and args[0] == libfuse.BEYOND:
            return await method(self, *args)
        pause = 0.0
        for operation, paths in _seen(self, name, dict(zip(names, args, strict=False))):
            code, delay = faults.meet(operation, paths)
            if code:
                raise FUSEError(code)
            pause += delay
        is_sync = name in _SYNCS and (name != "_beyond" or args[0].opcode == Opcode.SYNCFS)
        if name == "write":
            is_sync = bool(libfuse.request()[2] & _SYNCHRONOUS)
        answer = await method(self, *args)
        if is_sync:
            try:
                faults.synced()
            except OSError as failure:
                raise FUSEError(failure.errno or errno.EIO) from None
        if pause:  # last: details of a request are known only until an await
            await self._loop.step_aside()
            await trio.sleep(pause)
        return answer

    functools.update_wrapper(faulty, method)
    return faulty


def _seen(adapter: Any, name: str, args: dict[str, Any]) -> Iterator[Seen]:
    """Yield the operations of a request, of which there may be two."""
    if name == "_beyond":
        yield from _beyond(adapter, args["asked"])
        return
    paths = tuple(_paths(adapter, args))
    if name == "setattr":
        for operation in _set(args["fields"]):
            yield operation, paths
        return
    makes_file = name == "mknod" and stat.S_ISREG(args["mode"])
    yield "create" if makes_file else OPERATIONS[name], paths
    if name == "open" and args["flags"] & os.O_TRUNC:
        yield "truncate", paths


def _set(fields: SetattrFields) -> Iterator[str]:
    if fields.update_mode:
        yield "chmod"
    if fields.update_uid or fields.update_gid:
        yield "chown"
    if fields.update_size:
        yield "truncate"
    elif fields.update_atime or fields.update_mtime:
        yield "utimens"


def _beyond(adapter: Any, asked: Message) -> Iterator[Seen]:
    match asked.opcode:
        case Opcode.FALLOCATE:
            yield "fallocate", tuple(_place(adapter, asked.ino))
        case Opcode.COPY_FILE_RANGE | Opcode.COPY_FILE_RANGE_64:
            target = COPY_IN.unpack_from(asked.body)[2]
            yield "read", tuple(_place(adapter, asked.ino))
            yield "write", tuple(_place(adapter, target))
        case Opcode.SYNCFS:
            yield "fsync", (b"",)


def _paths(adapter: Any, args: dict[str, Any]) -> Iterator[bytes]:
    """Yield the paths in the arguments of a handler."""
    for parent, name in (
        ("parent_inode", "name"),
        ("parent_inode_old", "name_old"),
        ("parent_inode_new", "name_new"),
        ("new_parent_inode", "new_name"),
    ):
        if parent in args:
            yield join((adapter._fs.nodes.get(args[parent]), args[name]))
    if args.keys() == {"ctx"}:  # statfs
        yield from _place(adapter, libfuse.inode())
    elif "inode" in args:
        yield from _place(adapter, args["inode"])
    elif "fh" in args:
        node = adapter.node_of(args["fh"])
        listing = adapter.directories.get(args["fh"])
        yield from _of(node if node is not None else listing.node if listing is not None else None)


def _place(adapter: Any, ino: int) -> Iterator[bytes]:
    return _of(adapter._fs.nodes.get(ino))


def _of(node: Node | None) -> Iterator[bytes]:
    if node is not None:
        yield path_of(node)
