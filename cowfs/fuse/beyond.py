"""Requests that pyfuse3 has no handlers for: fallocate, copy_file_range, ioctl, statx.

``beyond.c`` turns them into reads with a handle number that no file has. The handlers here return the bytes
that follow the header of the answer. linux/fuse.h describes them and the requests.
"""

from __future__ import annotations

import errno
import functools
import os
import struct
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, NamedTuple, cast

from pyfuse3 import FUSEError

from cowfs.errors import NoRoom
from cowfs.fuse import libfuse
from cowfs.fuse.files import FileHandlers
from cowfs.fuse.handlers import async_
from cowfs.fuse.libfuse import Message
from cowfs.fuse.protocol import Opcode
from cowfs.layers.base import Allocatable, File
from cowfs.layers.reopened import at_hand
from cowfs.layers.slow import SlowFile
from cowfs.linux import inode_flags
from cowfs.linux.callers import look_at
from cowfs.overlay import protect
from cowfs.overlay.file import SET_ID
from cowfs.overlay.handle import Handle
from cowfs.overlay.node import Node

_FALLOCATE_IN = struct.Struct("=QQQII")  # fh, offset, length, mode, padding
COPY_IN = struct.Struct("=QQQQQQQ")  # fh_in, off_in, nodeid_out, fh_out, off_out, len, flags
_COPY_OUT = struct.Struct("=II")  # size, padding
_COPY_64_OUT = struct.Struct("=Q")
_IOCTL_IN = struct.Struct("=QIIQII")  # fh, flags, cmd, arg, in_size, out_size
_IOCTL_OUT = struct.Struct("=iIII")  # result, flags, in_iovs, out_iovs
_WORD = struct.Struct("=I")
_FSXATTR = struct.Struct("=IIIII8x")  # xflags, extsize, nextents, projid, cowextsize
_STATX_OUT = struct.Struct("=QII16x")  # attr_valid, attr_valid_nsec, flags
_STATX_BODY = struct.Struct("=IIQIIIHxxQQQQ")  # mask … mode, ino, size, blocks, attributes_mask
_STATX_TIME = struct.Struct("=qI4x")
_STATX_END = struct.Struct("=IIII112x")  # rdev_major, rdev_minor, dev_major, dev_minor
_STATX_BASIC, _STATX_BTIME = 0x7FF, 0x800

_MOST_AT_ONCE = 64 << 20
"""So much is copied by one request: the caller asks for the rest, and can be killed in between."""
_PIECE = 1 << 20
_LITTLE = 1 << 17
_KEEP_SIZE = 1
"""FALLOC_FL_KEEP_SIZE (linux/falloc.h)."""
_NOT_IN_THE_KERNEL = {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}

_XFLAGS = {  # linux/fs.h: FS_XFLAG_*
    0x8: inode_flags.IMMUTABLE,
    0x10: inode_flags.APPEND,
    0x20: inode_flags.SYNC,
    0x40: inode_flags.NOATIME,
    0x80: inode_flags.NODUMP,
    0x200: inode_flags.PROJINHERIT,
    0x8000: inode_flags.DAX,
}
_ALL_OF_XFLAGS = functools.reduce(int.__or__, _XFLAGS.values())


class _Ioctl(NamedTuple):
    command: int
    data: bytes
    room: int
    """Of the answer."""
    pid: int
    uid: int


def written_by(asked: Message) -> int | None:
    """Return the number of the inode whose data a request changes; None if it changes none."""
    match asked.opcode:
        case Opcode.FALLOCATE:
            return asked.ino
        case Opcode.COPY_FILE_RANGE | Opcode.COPY_FILE_RANGE_64:
            return int(COPY_IN.unpack_from(asked.body)[2])
    return None


class BeyondHandlers(FileHandlers):
    """Answers the requests that pyfuse3 does not pass on."""

    def read(self, fh: int, off: int, size: int) -> Coroutine[Any, Any, bytes]:
        """Answer a read, or a request that arrives as one."""
        if fh == libfuse.BEYOND:
            return self._beyond(libfuse.message())
        return super().read(fh, off, size)

    @async_
    async def _beyond(self, asked: Message) -> bytes:
        match asked.opcode:
            case Opcode.FALLOCATE:
                await self._fallocate(asked)
            case Opcode.COPY_FILE_RANGE | Opcode.COPY_FILE_RANGE_64:
                copied = await self._copy_file_range(asked)
                is_short = asked.opcode == Opcode.COPY_FILE_RANGE
                return _COPY_OUT.pack(copied, 0) if is_short else _COPY_64_OUT.pack(copied)
            case Opcode.IOCTL:
                return await self._ioctl(asked)
            case Opcode.SYNCFS:
                await self._threads.run(self._fs.upper.sync, self._threads.syncs, asked.uid)
            case Opcode.STATX:
                return self._statx(asked)
            case _:
                raise FUSEError(errno.ENOSYS)
        return b""

    # --- file data

    async def _writing(
        self, fh: int, node: Node, asked: Message, *, whole: bool, appends: bool = False
    ) -> Handle:
        """Return the handle by which to write a file, after its copy-up. *whole*: with all its data."""
        protect.must_write(self._fs.union_of(node), node, appends=appends)
        if whole and (node.upper is None or node.metacopy):
            if not node.dead:
                await self._within_reach(node.parent)
            await self._bring_up(node, asked.uid)
        await self._settled(node)
        if fh:
            handle = self._files[fh]
            if handle.is_frozen:
                await self._thaw(node, asked.uid)
        else:
            handle = self._unopened.writes(node) or await self._to_write(node, asked.uid)
        if node.mode & SET_ID:
            mode = node.mode
            self._fs.will_be_written(handle, self._writer_by(node, asked.pid, asked.uid, None))
            self._tell(node, mode)
        return handle

    async def _fallocate(self, asked: Message) -> None:
        fh, offset, length, mode, _ = _FALLOCATE_IN.unpack_from(asked.body)
        node = self._node(asked.ino)
        adds = not mode & ~_KEEP_SIZE  # as vfs_fallocate() allows for an append-only file
        handle = await self._writing(fh, node, asked, whole=True, appends=adds)
        with self._unopened.in_use(node), self._changes(), at_hand(handle.file) as file:
            change = functools.partial(cast(Allocatable, file).fallocate, mode, offset, length)
            await self._threads.run(change, self._threads.reads, asked.uid)
        await self._in_step(node, asked.uid)

    async def _copy_file_range(self, asked: Message) -> int:
        copied = await self._copied_range(asked)
        await self._in_step(self._node(COPY_IN.unpack_from(asked.body)[2]), asked.uid)
        return copied

    async def _copied_range(self, asked: Message) -> int:
        source_fh, source_at, target_ino, target_fh, at, length, flags = COPY_IN.unpack_from(asked.body)
        if flags:
            raise FUSEError(errno.EINVAL)
        node, target_node = self._node(asked.ino), self._node(target_ino)
        target = await self._writing(target_fh, target_node, asked, whole=False)
        source = self._reading(source_fh or asked.ino | libfuse.UNOPENED)
        self._note_read(node)
        data = self._little(source, source_at, length)
        if data is not None and not target.is_synchronous:
            if not self._fs.is_long_to_write(target, len(data), at):
                return self._write(target, data, at)
        with (
            self._unopened.in_use(node),
            self._unopened.in_use(target_node),
            self._changes(),
            at_hand(source.file) as from_,
            at_hand(target.file) as to,
        ):
            copy = functools.partial(_copy_range, from_, to, source_at, at, min(length, _MOST_AT_ONCE))
            if isinstance(from_, SlowFile):
                return await self._threads.run_patiently(copy, self._threads.slow_reads, asked.uid)
            return await self._threads.run(copy, self._threads.reads, asked.uid)

    def _write(self, target: Handle, data: bytes, at: int) -> int:
        """Write data; return how much of it had room. ENOSPC if nothing had."""
        try:
            return self._fs.write(target, data, at)
        except NoRoom as failure:
            if not failure.written:
                raise
            return failure.written

    def _little(self, source: Handle, at: int, length: int) -> bytes | None:
        """Return the data to copy if it is little and at hand: then no thread is worth it."""
        length = min(length, self._fs.stat(source.node).st_size - at)
        data = self._read_at_once(source.file, length, at) if 0 < length <= _LITTLE else None
        return data if data is not None and len(data) == length else None

    # --- inodes

    def _statx(self, asked: Message) -> bytes:
        node = self._node(asked.ino)
        entry = self._shown(node)
        birth = None
        with suppress(OSError):
            birth = self._fs.birth(node)
        mask = _STATX_BASIC | (0 if birth is None else _STATX_BTIME)
        times = (entry.st_atime_ns, birth or 0, entry.st_ctime_ns, entry.st_mtime_ns)
        return b"".join(
            (
                _STATX_OUT.pack(int(entry.attr_timeout), 0, 0),
                _STATX_BODY.pack(
                    *(mask, entry.st_blksize, 0),
                    *(entry.st_nlink, entry.st_uid, entry.st_gid, entry.st_mode),
                    *(node.ino, entry.st_size, entry.st_blocks, 0),
                ),
                *(_STATX_TIME.pack(*divmod(ns, 10**9)) for ns in times),
                _STATX_END.pack(os.major(entry.st_rdev), os.minor(entry.st_rdev), 0, 0),
            )
        )

    async def _ioctl(self, asked: Message) -> bytes:
        _, _, command, _, in_size, room = _IOCTL_IN.unpack_from(asked.body)
        data = asked.body[_IOCTL_IN.size : _IOCTL_IN.size + in_size]
        node = self._node(asked.ino)
        answer = await self._flags(node, _Ioctl(command, data, room, asked.pid, asked.uid))
        # Not more: programs pass an int although the command's number says long.
        return _IOCTL_OUT.pack(0, 0, 0, 0) + answer[:room]

    async def _flags(self, node: Node, asked: _Ioctl) -> bytes:
        """Answer the ioctls of lsattr(1), chattr(1) and xfs_io(8). ENOTTY for any other."""
        match asked.command:
            case inode_flags.FS_IOC_GETFLAGS:
                return _WORD.pack(self._fs.getflags(node))
            case inode_flags.FS_IOC_GETVERSION:
                return _WORD.pack(self._fs.version(node))
            case inode_flags.FS_IOC_FSGETXATTR:
                return _FSXATTR.pack(_xflags(self._fs.getflags(node)), 0, 0, 0, 0)
            case inode_flags.FS_IOC_SETFLAGS:
                await self._set_flags(node, _WORD.unpack_from(asked.data)[0], asked)
            case inode_flags.FS_IOC_FSSETXATTR:
                xflags, _, _, project, _ = _FSXATTR.unpack_from(asked.data)
                if project:
                    raise FUSEError(errno.EOPNOTSUPP)
                # ext4_fileattr_set() ignores all that ext3 does not have.
                flags = sum(flag for xflag, flag in _XFLAGS.items() if xflags & xflag)
                await self._set_flags(node, self._fs.getflags(node) & ~_ALL_OF_XFLAGS | flags, asked)
            case _:
                raise FUSEError(errno.ENOTTY)
        return b""

    async def _set_flags(self, node: Node, flags: int, asked: _Ioctl) -> None:
        """Set the flags. The kernel has checked the permission for all but one flag.

        See fileattr_set_prepare() in fs/file_attr.c.
        """
        before = self._fs.getflags(node)
        if (flags ^ before) & inode_flags.JOURNAL_DATA:
            caller = look_at(asked.pid)
            if caller is None or not caller.has("CAP_SYS_RESOURCE"):
                raise FUSEError(errno.EPERM)
        await self._within_reach(node.parent)
        await self._settled(node)
        await self._with_data(node, asked.uid)
        self._fs.setflags(node, flags)
        await self._in_step(node, asked.uid)
        self._loop.forget_attributes(node.ino)  # ctime


def _xflags(flags: int) -> int:
    return sum(xflag for xflag, flag in _XFLAGS.items() if flags & flag)


def _copy_range(source: File, target: File, source_at: int, at: int, length: int) -> int:
    """Copy bytes; return how many. Less than *length* only at the source's end or on a full store. Blocks."""
    if source.fileno() >= 0 and target.fileno() >= 0:
        try:
            return os.copy_file_range(source.fileno(), target.fileno(), length, source_at, at)
        except OSError as failure:
            if failure.errno not in _NOT_IN_THE_KERNEL:
                raise
    done = 0
    while done < length:
        data = source.pread(min(_PIECE, length - done), source_at + done)
        if not data:
            break
        try:
            done += target.pwrite(data, at + done)
        except OSError as failure:
            done += failure.written if isinstance(failure, NoRoom) else 0
            if not done:
                raise
            break
    return done
