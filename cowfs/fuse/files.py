"""Open files, and those that the kernel opens without us: reading, writing, fsync(2)."""

from __future__ import annotations

import errno
import functools
import os
from contextlib import closing

from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext

from cowfs.fuse import libfuse
from cowfs.fuse.handlers import Said, async_, failure_of, sync, told
from cowfs.fuse.loop import RequestLoop
from cowfs.fuse.nodes import NodeHandlers
from cowfs.fuse.open_files import OpenFiles
from cowfs.fuse.shares import Bounds
from cowfs.fuse.unopened import Unopened
from cowfs.layers.base import File
from cowfs.layers.slow import SlowFile
from cowfs.overlay.dir import Owner
from cowfs.overlay.file import SET_ID
from cowfs.overlay.handle import Handle, Writer
from cowfs.overlay.node import Node
from cowfs.overlay.overlay import Overlay

_SYNCHRONOUS = os.O_SYNC | os.O_DSYNC
_UNKNOWN = 0
"""The handle number of files that the kernel opens by itself, and never gives back."""


def _by_uid(ctx: RequestContext) -> Writer:
    return Writer.PRIVILEGED if ctx.uid == 0 else Writer.MEMBER


class FileHandlers(NodeHandlers):
    """Answer what is asked of files."""

    def __init__(
        self, fs: Overlay, loop: RequestLoop, *, acl: bool, passthrough: str, bounds: Bounds
    ) -> None:
        super().__init__(fs, loop, acl=acl, passthrough=passthrough)
        self._files = OpenFiles(bounds)
        self._unopened = Unopened(fs)
        self._no_capability: set[int] = set()
        libfuse.prepare(self._seek, knows_files=self.may_open_nothing(), passthrough=self._passthrough.wanted)

    def may_open_nothing(self) -> bool:
        """Whether the kernel may open files by itself: what they cost us then is counted for nobody."""
        return not any(layer.has_descriptors for layer in (self._fs.upper, *self._fs.lowers))

    @told
    async def open(self, said: Said, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        if libfuse.opens_nothing():
            raise FUSEError(errno.ENOSYS)
        node = self._node(inode)
        self._files.must_have(ctx.uid)
        if flags & (os.O_ACCMODE | os.O_TRUNC):
            await self._within_reach(node.parent)
            await self._settled(node)
            if flags & os.O_TRUNC or not self._fs.begin_lazily(node):
                await self._bring_up(node, ctx.uid, 0 if flags & os.O_TRUNC else None)
            if flags & os.O_TRUNC:
                await self._cut(node, 0, ctx.uid)
            self._files.must_have(ctx.uid)
        opener = self._writer(node, ctx, said.takes) if flags & os.O_TRUNC else _by_uid(ctx)
        return self._opened(node, flags, ctx, opener)

    @async_
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        owner = Owner(ctx.uid, ctx.gid)
        parent = self._node(parent_inode)
        if parent.upper is None:
            await self._within_reach(parent)
        self._files.must_have(ctx.uid)
        node, attr, file = self._fs.create(parent, name, self._masked(parent, mode, ctx), owner)
        if libfuse.opens_nothing():
            self._unopened.created(self._fs.attach(node, file))
            info = FileInfo(fh=_UNKNOWN)
        elif flags & _SYNCHRONOUS:
            file.close()
            info = self._opened(node, flags & ~os.O_TRUNC, ctx, _by_uid(ctx))
        else:
            info = self._numbered(
                self._fs.attach(node, file, opener=_by_uid(ctx)), ctx.uid, flags, is_new=True
            )
        self._no_capability.add(node.ino)
        return info, self._given((node, attr))

    def _opened(self, node: Node, flags: int, ctx: RequestContext, opener: Writer) -> FileInfo:
        mode = node.mode
        handle = self._fs.open(node, flags, opener=opener)
        self._tell(node, mode)
        return self._numbered(handle, ctx.uid, flags)

    def _numbered(self, handle: Handle, uid: int, flags: int, *, is_new: bool = False) -> FileInfo:
        number = self._files.enter(handle, uid)
        if self._passthrough.opened(handle, flags) and not is_new:
            self._loop.forget_attributes(handle.node.ino)
        return FileInfo(fh=number)

    def _reading(self, fh: int) -> Handle:
        """Return what the file of a number is read by."""
        if fh & libfuse.UNOPENED:
            return self._unopened.to_read(self._node(fh ^ libfuse.UNOPENED))
        return self._files[fh]

    def _user(self, fh: int) -> int:
        """Return whose work it is to read or write a file. To be asked before anything is awaited."""
        return libfuse.request()[1] if fh & libfuse.UNOPENED else self._files.opener(fh)

    @async_
    async def read(self, fh: int, off: int, size: int) -> bytes:
        handle = self._reading(fh)
        file = handle.file
        data = file.try_pread(size, off)
        if data is not None:
            return data
        threads = self._threads
        if isinstance(file, SlowFile):
            pread = functools.partial(file.pread, size, off)
            return await threads.run_patiently(pread, threads.slow_reads, self._files.opener(fh))
        if self._loop.nobody_waits():  # the way to a thread and back would help nobody
            return file.pread(size, off)
        uid = self._user(fh)
        with self._unopened.in_use(handle.node):
            return await threads.run(lambda: file.pread(size, off), threads.reads, uid)

    @told
    async def write(self, said: Said, fh: int, off: int, buf: bytes) -> int:
        threads = self._threads
        if fh & libfuse.UNOPENED:
            node, uid = self._node(fh ^ libfuse.UNOPENED), said.uid
            handle = self._unopened.writes(node) or await self._to_write(node, uid)
        else:
            handle, uid = self._files[fh], self._files.opener(fh)
        node = handle.node
        mode = node.mode
        writer = None
        if mode & SET_ID and (said.takes is not None or fh & libfuse.UNOPENED):
            writer = self._writer_by(node, said.pid, said.uid, said.takes)
        try:
            is_long = self._fs.is_long_to_write(handle, len(buf), off)
            if not handle.is_synchronous and not is_long and not said.flags & _SYNCHRONOUS:
                return self._fs.write(handle, buf, off, writer=writer)
            self._fs.will_be_written(handle, writer)
            turns = threads.reads if is_long else threads.syncs
            with self._unopened.in_use(node):
                written = await threads.run(functools.partial(handle.file.pwrite, buf, off), turns, uid)
                if not handle.is_synchronous and said.flags & _SYNCHRONOUS:
                    sync = functools.partial(handle.file.fsync, said.flags & os.O_SYNC != os.O_SYNC)
                    await threads.run(sync, threads.syncs, uid)
            return written
        finally:
            self._tell(node, mode)

    async def _to_write(self, node: Node, uid: int) -> Handle:
        """Return what a file is written by that was opened without us; it is copied up now."""
        if node.upper is None or node.metacopy or node.copying is not None:
            if not node.dead:
                await self._within_reach(node.parent)
            await self._settled(node)
            if not self._fs.begin_lazily(node):
                await self._bring_up(node, uid)
        return self._unopened.to_write(node)

    async def flush(self, fh: int) -> None:
        # Nothing is held back, so close(2) has nothing to say; the kernel does not ask again.
        raise FUSEError(errno.ENOSYS)

    @sync
    def release(self, fh: int) -> None:
        if fh == _UNKNOWN:  # made before the kernel opened files by itself
            return
        handle = self._files.leave(fh)
        self._passthrough.closed(handle)
        self._fs.release_handle(handle)

    def _seek(self, fh: int, offset: int, whence: int) -> int:
        """Answer lseek(2) with SEEK_DATA or SEEK_HOLE: the place, or an errno negated."""
        try:
            return self._fs.seek(self._reading(fh), offset, whence)
        except Exception as error:
            return -failure_of(error, "lseek").errno

    @async_
    async def fsync(self, fh: int, datasync: bool) -> None:
        uid = self._user(fh)
        if fh & libfuse.UNOPENED:
            node = self._node(fh ^ libfuse.UNOPENED)
            if node.upper is not None:
                async with self._threads.turn(self._threads.syncs, uid):
                    with closing(self._fs.upper.open(node.upper, os.O_RDONLY)) as file:
                        await self._synced(file, datasync)
            return
        handle = self._files[fh]
        if handle.node.upper is not None:
            async with self._threads.turn(self._threads.syncs, uid):
                await self._synced(handle.file, datasync)

    async def _synced(self, file: File, datasync: bool) -> None:
        try:
            await self._threads.do(lambda: file.fsync(datasync))
        except OSError as failure:
            self._fs.not_saved(failure)
            raise
