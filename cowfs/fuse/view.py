"""Show a store: its raw filesystem, read-only, as a mount of its own beside the union's.

For a layer that is read in this process, it shows what the kernel's mount of the image would show at
``/mnt/memory``: ``upper/``, ``work/`` and ``cowfs/`` as they are, whiteouts as devices 0:0, and the overlay's
own attributes.

pyfuse3 has one session per process, so this module implements the kernel's protocol itself (linux/fuse.h).
The kernel caches no names, attributes or data of the view, because the union changes the layer without
telling the view: every access sends a request.

**A removed inode is never confused with a new one.** When the union removes an inode that the view knows, the
layer may reuse its number. So the view gives each inode that the kernel knows a number that is never reused.
Before each use, it compares the handle of the layer's inode, which contains the generation, with the one that
it saw first. It answers ESTALE if they differ. Open files are safe: the layer keeps their inodes.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import stat
import struct
from collections.abc import Callable
from contextlib import suppress

import trio

from cowfs.errors import os_error
from cowfs.fuse import protocol
from cowfs.fuse.failure import errno_of
from cowfs.fuse.protocol import Opcode, Request
from cowfs.layers.base import File, Key, LowerLayer
from cowfs.linux import mount_table, mounts
from cowfs.linux.callers import may_see_trusted
from cowfs.types import FileHandle

log = logging.getLogger(__name__)

FSTYPE = "fuse.cowfs-store"
"""Another type than a union's, so that programs that look for unions by type do not find it."""
_SOURCE = "cowfs-store"
"""Not the path of the image: e2fsck and resize2fs would believe it to be mounted, and grow would fail."""
_MOST = 128 << 10
"""Bytes that are read at a time: the union waits meanwhile."""
_LISTED = 16 << 10
"""Bytes of a directory that are listed at a time: some hundred names, each of which is looked up."""
_REQUEST_MAX = 128 << 10
"""Bytes of the longest request: nothing is written here, and names and attributes are shorter."""


class _Node:
    """An inode that the kernel knows."""

    __slots__ = ("identity", "ino", "key", "lookups", "parent")

    def __init__(self, key: Key, identity: FileHandle, ino: int) -> None:
        self.key = key
        self.identity = identity
        self.ino = ino
        self.parent = ino
        """The inode number of the directory that it was last found in."""
        self.lookups = 0


class View:
    """Answers the requests of a connection to the kernel from a layer, until :meth:`close`."""

    def __init__(self, layer: LowerLayer, fd: int) -> None:
        """*fd* is a ``/dev/fuse``, which :meth:`close` closes. OSError if the layer does not support it."""
        self._layer = layer
        self._fd = fd
        self._place = self._dev = ""
        root = _Node(layer.root, self._identity(layer.root), layer.stat(layer.root).st_ino)
        self._nodes = {protocol.ROOT_ID: root}
        self._numbers = {root.identity: protocol.ROOT_ID}
        self._fresh = itertools.count(protocol.ROOT_ID + 1)
        self._files: dict[int, File] = {}
        self._listings: dict[int, list[bytes]] = {}
        """For each open directory, the names in it when the listing began."""
        self._buffer = bytearray(_REQUEST_MAX)
        self._handlers: dict[int, Callable[[Request], bytes]] = {
            Opcode.INIT: self._init,
            Opcode.LOOKUP: self._lookup,
            Opcode.FORGET: self._forget,
            Opcode.BATCH_FORGET: self._batch_forget,
            Opcode.GETATTR: self._getattr,
            Opcode.READLINK: lambda request: self._layer.readlink(self._node(request).key),
            Opcode.OPEN: self._open,
            Opcode.RELEASE: self._release,
            Opcode.OPENDIR: self._opendir,
            Opcode.RELEASEDIR: self._releasedir,
            Opcode.STATFS: self._statfs,
            Opcode.GETXATTR: self._getxattr,
            Opcode.LISTXATTR: self._listxattr,
            Opcode.INTERRUPT: lambda request: b"",  # no request takes long
            Opcode.NOTIFY_REPLY: lambda request: b"",
            Opcode.DESTROY: lambda request: b"",
        }

    # --- the connection

    def mount(self, place: str) -> None:
        """Mount on a directory: read-only, for everybody whom the file modes permit.

        Raises OSError. Needs root. Until :meth:`serve` runs, accesses wait.
        """
        mode = self._layer.stat(self._layer.root).st_mode
        options = f"fd={self._fd},rootmode={mode:o},user_id={os.geteuid()},group_id={os.getegid()}"
        options += f",default_permissions,allow_other,max_read={_MOST}"
        flags = mounts.MS_RDONLY | mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC
        place = os.path.realpath(place)
        mounts.mount(_SOURCE, place, FSTYPE, flags, options)
        here = mount_table.mount_of(place)
        if here is not None:
            self._place, self._dev = place, here.dev

    async def serve(self) -> None:
        """Answer requests until unmounted or cancelled; then :meth:`close`."""
        try:
            while True:
                await trio.lowlevel.wait_readable(self._fd)
                try:
                    size = os.readv(self._fd, [self._buffer])
                except OSError as error:
                    if error.errno in {errno.EAGAIN, errno.ENOENT}:  # the caller was killed
                        continue
                    if error.errno != errno.ENODEV:  # unmounted
                        log.warning("the view of the store has failed: %s", error)
                    return
                if not size:
                    return
                await self._answer(bytes(memoryview(self._buffer)[:size]))
        finally:
            self.close()

    def close(self) -> None:
        """Detach the mount, even if it is in use, and close all files.

        Safe to call twice. Call it before the layer is closed. Pending requests get ECONNABORTED, later ones
        ENOTCONN.
        """
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        here = mount_table.mount_of(self._place) if self._place else None
        if here is not None and here.dev == self._dev:
            with suppress(OSError):
                mounts.umount2(self._place, mounts.MNT_DETACH)
        os.close(fd)
        while self._files:
            self._files.popitem()[1].close()

    async def _answer(self, message: bytes) -> None:
        if len(message) < protocol.IN.size:
            log.warning("the kernel sent an invalid request of %d bytes", len(message))
            return
        length, opcode, unique, nodeid, uid, _, pid, _ = protocol.IN.unpack_from(message)
        request = Request(opcode, unique, nodeid, uid, pid, message[protocol.IN.size :])
        data, code = b"", 0
        try:
            if length != len(message):
                code = errno.EINVAL
            elif opcode == Opcode.READ:
                data = await self._read(request)
            elif opcode == Opcode.READDIR:
                data = await self._readdir(request)
            elif opcode in self._handlers:
                data = self._handlers[opcode](request)
            else:
                code = errno.EROFS if opcode in protocol.CHANGES else errno.ENOSYS
        except struct.error:  # too short
            code = errno.EINVAL
        except Exception as error:
            code = errno_of(error, f"request {opcode} of the view")
        if opcode not in protocol.NOT_ANSWERED:
            self._reply(unique, code, data)

    def _reply(self, unique: int, code: int, data: bytes) -> None:
        try:
            os.writev(self._fd, [protocol.OUT.pack(protocol.OUT.size + len(data), -code, unique), data])
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.ENODEV}:  # no one waits any more
                log.warning("the kernel did not accept an answer: %s", error)

    def _init(self, request: Request) -> bytes:
        major, minor, readahead, flags = protocol.INIT_IN.unpack_from(request.body)
        if major < protocol.MAJOR:
            raise os_error(errno.EPROTO)
        # To a later major version, answer only with this one; the kernel then asks again.
        minor = min(minor, protocol.MINOR) if major == protocol.MAJOR else protocol.MINOR
        readahead = min(readahead, _MOST)
        # With ACLs: else the mode alone would decide, whose group bits are the mask of an ACL.
        flags &= protocol.POSIX_ACL
        return protocol.INIT_OUT.pack(protocol.MAJOR, minor, readahead, flags, 0, 0, 4096, 1, 0, 0, 0)

    # --- inodes

    def _identity(self, key: Key) -> FileHandle:
        handle = self._layer.handle(key)
        if handle is None:
            raise os_error(errno.EOPNOTSUPP)
        return handle

    def _node(self, request: Request) -> _Node:
        """Return the node of a request. ESTALE if it is another inode now."""
        node = self._nodes.get(request.nodeid)
        if node is None or self._layer.handle(node.key) != node.identity:
            raise os_error(errno.ESTALE)
        return node

    def _lookup(self, request: Request) -> bytes:
        directory = self._node(request)
        found = self._layer.lookup(directory.key, _name(request.body))
        if found is None:
            raise os_error(errno.ENOENT)
        key, attr = found
        identity = self._identity(key)
        number = self._numbers.get(identity)
        if number is None:
            number = self._numbers[identity] = next(self._fresh)
            self._nodes[number] = _Node(key, identity, attr.st_ino)
        else:
            self._layer.forget(key)
        node = self._nodes[number]
        node.lookups += 1
        node.parent = directory.ino
        return protocol.ENTRY_OUT.pack(number, 0, 0, 0, 0, 0) + protocol.attributes(attr)

    def _forget(self, request: Request) -> bytes:
        (lookups,) = protocol.FORGET_IN.unpack_from(request.body)
        self._drop(request.nodeid, lookups)
        return b""

    def _batch_forget(self, request: Request) -> bytes:
        (count,) = protocol.BATCH_FORGET_IN.unpack_from(request.body)
        rest = request.body[protocol.BATCH_FORGET_IN.size :]
        count = min(count, len(rest) // protocol.FORGET_ONE.size)
        for nodeid, lookups in protocol.FORGET_ONE.iter_unpack(rest[: count * protocol.FORGET_ONE.size]):
            self._drop(nodeid, lookups)
        return b""

    def _drop(self, nodeid: int, lookups: int) -> None:
        node = self._nodes.get(nodeid)
        if node is None or nodeid == protocol.ROOT_ID:
            return
        node.lookups -= lookups
        if node.lookups <= 0:
            del self._nodes[nodeid], self._numbers[node.identity]
            self._layer.forget(node.key)

    def _getattr(self, request: Request) -> bytes:
        attr = self._layer.stat(self._node(request).key)
        return protocol.ATTR_OUT.pack(0, 0, 0) + protocol.attributes(attr)

    def _statfs(self, request: Request) -> bytes:
        room = self._layer.statfs()
        numbers = room.blocks, room.bfree, room.bavail, room.files, room.ffree
        return protocol.STATFS_OUT.pack(*numbers, room.bsize, room.namemax, room.frsize)

    def _getxattr(self, request: Request) -> bytes:
        (size,) = protocol.GETXATTR_IN.unpack_from(request.body)
        name = _name(request.body[protocol.GETXATTR_IN.size :])
        return _xattr_reply(self._layer.getxattr(self._node(request).key, name), size)

    def _listxattr(self, request: Request) -> bytes:
        (size,) = protocol.GETXATTR_IN.unpack_from(request.body)
        names = self._layer.listxattr(self._node(request).key)
        if not may_see_trusted(request.pid, request.uid):  # as on ext3
            names = [name for name in names if not name.startswith(b"trusted.")]
        return _xattr_reply(b"".join(name + b"\0" for name in names), size)

    # --- files

    def _open(self, request: Request) -> bytes:
        flags, _ = protocol.OPEN_IN.unpack_from(request.body)
        if flags & (os.O_ACCMODE | os.O_TRUNC):
            raise os_error(errno.EROFS)
        number = next(self._fresh)
        self._files[number] = self._layer.open(self._node(request).key, os.O_RDONLY)
        # The page cache would be right only if the union reported each change.
        return protocol.OPEN_OUT.pack(number, protocol.DIRECT_IO)

    async def _read(self, request: Request) -> bytes:
        number, offset, size = protocol.READ_IN.unpack_from(request.body)
        file = self._files.get(number)
        if file is None:
            raise os_error(errno.EBADF)
        if offset >= 1 << 63:
            raise os_error(errno.EINVAL)
        size = min(size, _MOST)
        data = file.try_pread(size, offset)
        if data is None:
            # Wait even if cancelled: the layer must not be closed while the thread uses it.
            data = await trio.to_thread.run_sync(file.pread, size, offset)
        return data

    def _release(self, request: Request) -> bytes:
        file = self._files.pop(protocol.RELEASE_IN.unpack_from(request.body)[0], None)
        if file is not None:
            file.close()
        return b""

    # --- directories

    def _opendir(self, request: Request) -> bytes:
        if not stat.S_ISDIR(self._layer.stat(self._node(request).key).st_mode):
            raise os_error(errno.ENOTDIR)
        number = next(self._fresh)
        self._listings[number] = []
        return protocol.OPEN_OUT.pack(number, 0)

    async def _readdir(self, request: Request) -> bytes:
        number, offset, size = protocol.READ_IN.unpack_from(request.body)
        names = self._listings.get(number)
        if names is None:
            raise os_error(errno.EBADF)
        node = self._node(request)
        if offset == 0:
            listed = self._layer.names(node.key)
            # Wait even if cancelled, as in _read.
            names[:] = b".", b"..", *(await trio.to_thread.run_sync(listed) if callable(listed) else listed)
        entries, room = [], min(size, _LISTED)
        for at in range(offset, len(names)):
            name = names[at]
            found = self._entry(node, name)
            if found is None:  # removed since the listing began
                continue
            entry = protocol.DIRENT.pack(found[0], at + 1, len(name), stat.S_IFMT(found[1]) >> 12) + name
            entry += bytes(-len(entry) % 8)
            if len(entry) > room:
                break
            room -= len(entry)
            entries.append(entry)
        return b"".join(entries)

    def _entry(self, node: _Node, name: bytes) -> tuple[int, int] | None:
        """Return the inode number and mode of a name in a directory."""
        if name == b"..":
            return node.parent, stat.S_IFDIR
        if name == b".":
            attr = self._layer.stat(node.key)
        else:
            try:
                found = self._layer.lookup(node.key, name)
            except OSError:  # a lookup will report it
                return protocol.UNKNOWN_INO, 0
            if found is None:
                return None
            self._layer.forget(found[0])
            attr = found[1]
        return attr.st_ino, attr.st_mode

    def _releasedir(self, request: Request) -> bytes:
        self._listings.pop(protocol.RELEASE_IN.unpack_from(request.body)[0], None)
        return b""


def open_view(layer: LowerLayer, place: str) -> View:
    """Mount a layer at *place*; see :meth:`View.mount`. Raises OSError, and then leaves nothing behind."""
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        view = View(layer, fd)
        view.mount(place)
    except BaseException:
        os.close(fd)
        raise
    return view


def _name(body: bytes) -> bytes:
    name, end, _ = body.partition(b"\0")
    if not name or not end:
        raise os_error(errno.EINVAL)
    return name


def _xattr_reply(value: bytes, size: int) -> bytes:
    """Return the answer to a request for an xattr of at most *size* bytes; 0 asks for its length."""
    if size == 0:
        return protocol.GETXATTR_OUT.pack(len(value))
    if len(value) > size:
        raise os_error(errno.ERANGE)
    return value
