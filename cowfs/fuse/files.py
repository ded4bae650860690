"""Reading, writing and fsync(2) of open files, and of files that the kernel opens without a request."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress

from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext

from cowfs.errors import NoRoom
from cowfs.fuse import libfuse
from cowfs.fuse.handlers import Said, async_, changing, failure_of, sync, told
from cowfs.fuse.loop import RequestLoop
from cowfs.fuse.no_open import Unopened
from cowfs.fuse.nodes import NodeHandlers
from cowfs.fuse.open_files import OpenFiles
from cowfs.fuse.owners import OwnerMap
from cowfs.fuse.quotas import Bounds
from cowfs.layers.base import File
from cowfs.layers.reopened import at_hand
from cowfs.layers.slow import SlowFile
from cowfs.layers.squashfs import SquashfsFile
from cowfs.overlay import protect
from cowfs.overlay.attr import NewAttributes
from cowfs.overlay.file import SET_ID
from cowfs.overlay.handle import Handle, Writer
from cowfs.overlay.node import Node
from cowfs.overlay.overlay import Overlay
from cowfs.url.waiting import WouldWait, at_once

_SYNCHRONOUS = os.O_SYNC | os.O_DSYNC
_UNKNOWN = 0
"""The handle number of files that the kernel opens without a request, and never releases."""


def _by_uid(ctx: RequestContext) -> Writer:
    return Writer.PRIVILEGED if ctx.uid == 0 else Writer.MEMBER


class FileHandlers(NodeHandlers):
    """Answers the requests about files."""

    def __init__(
        self,
        fs: Overlay,
        loop: RequestLoop,
        *,
        acl: bool,
        passthrough: str,
        bounds: Bounds,
        owner_map: OwnerMap | None = None,
        sees_all: bool = False,
    ) -> None:
        """*sees_all*: the kernel sends a request for every open and every read."""
        super().__init__(fs, loop, acl=acl, passthrough=passthrough, owner_map=owner_map)
        self._files = OpenFiles(bounds, reads_itself=not sees_all)
        self._unopened = Unopened(fs)
        for union in fs.unions():
            union.host.close_idle = self._unopened.let_go
        fs.host.end_writes = self._unopened.end_writes
        fs.host.is_still = lambda: not self._changing
        self._changing = 0
        """How many threads change the data of files."""
        self._notes_reads = fs.upper.atime.files
        self._kernel_notes = fs.upper.has_descriptors
        libfuse.prepare(
            self._seek,
            knows_files=self.may_open_nothing() and not sees_all,
            passthrough=self._passthrough.wanted,
            exports=fs.exports,
            most_held=bounds.data,
            shared=bounds.shared,
        )
        self._no_capability = libfuse.no_capability()

    def may_open_nothing(self) -> bool:
        """Whether the kernel may open files without a request: then they count for no user."""
        return not any(layer.has_descriptors for layer in (self._fs.upper, *self._fs.lowers))

    def node_of(self, fh: int) -> Node | None:
        """Return the node that is open under a number; None if there is none."""
        try:
            return self._files[fh].node
        except KeyError:
            return None

    @told
    async def open(self, said: Said, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        if libfuse.opens_nothing():
            raise FUSEError(errno.ENOSYS)
        node = self._node(inode)
        self._files.must_have(ctx.uid)
        if flags & (os.O_ACCMODE | os.O_TRUNC):
            protect.must_write(
                self._fs.union_of(node), node, appends=bool(flags & os.O_APPEND and not flags & os.O_TRUNC)
            )
            await self._within_reach(node.parent)
            await self._settled(node)
            if flags & os.O_TRUNC and self._clear_set_id_bits(node, self._writer(node, ctx, said.clears)):
                raise FUSEError(errno.ESTALE)
            if flags & os.O_TRUNC or not self._fs.begin_lazily(node):
                await self._bring_up(node, ctx.uid, 0 if flags & os.O_TRUNC else None)
            if flags & os.O_TRUNC:
                await self._cut(node, 0, ctx.uid)
            self._files.must_have(ctx.uid)
        opener = self._writer(node, ctx, said.clears) if flags & os.O_TRUNC else _by_uid(ctx)
        info = self._opened(node, flags, ctx, opener)
        if flags & os.O_TRUNC:
            await self._in_step(node, ctx.uid)
        return info

    def _clear_set_id_bits(self, node: Node, opener: Writer) -> bool:
        """Clear the set-ID bits that an open with O_TRUNC clears; return whether it cleared any.

        The answer to an open cannot tell the kernel the new mode. After ESTALE, the kernel looks the file
        up, and learns the mode, then opens it again (do_filp_open() in fs/namei.c).
        """
        mode = node.mode
        if not mode & SET_ID or opener is Writer.PRIVILEGED:
            return False
        self._fs.setattr(node, NewAttributes(writer=opener))
        self._tell(node, mode)
        return node.mode != mode

    @changing
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        owner = self._owner(ctx)
        parent = self._node(parent_inode)
        if parent.upper is None:
            await self._within_reach(parent)
        self._files.must_have(ctx.uid)
        mode = self._masked(parent, mode, ctx.umask)
        if name == libfuse.NO_NAME:
            node, attr, file = self._fs.create_unnamed(parent, mode, owner)
        else:
            node, attr, file = self._fs.create(parent, name, mode, owner)
        if libfuse.opens_nothing():
            file.close()
            info = FileInfo(fh=_UNKNOWN)
        elif flags & _SYNCHRONOUS or self._files.must_be_frugal(ctx.uid):
            file.close()
            info = self._opened(node, flags & ~os.O_TRUNC, ctx, _by_uid(ctx))
        else:
            info = self._numbered(
                self._fs.attach(node, file, opener=_by_uid(ctx)), ctx.uid, flags, is_new=True
            )
        self._no_capability.add(node.ino)
        entry = self._given((node, attr))
        await self._in_step(parent, ctx.uid)
        return info, entry

    def _opened(self, node: Node, flags: int, ctx: RequestContext, opener: Writer) -> FileInfo:
        mode = node.mode
        frugal = self._files.must_be_frugal(ctx.uid)
        handle = self._fs.open(node, flags, opener=opener, frugal=frugal)
        self._tell(node, mode)
        return self._numbered(handle, ctx.uid, flags)

    def _numbered(self, handle: Handle, uid: int, flags: int, *, is_new: bool = False) -> FileInfo:
        number = self._files.enter(handle, uid)
        if self._passthrough.opened(handle, flags) and not is_new:
            self._loop.forget_attributes(handle.node.ino)
        return FileInfo(fh=number)

    def _reading(self, fh: int) -> Handle:
        """Return the handle by which to read the file of a number."""
        if fh & libfuse.UNOPENED:
            return self._unopened.to_read(self._node(fh ^ libfuse.UNOPENED))
        return self._files[fh]

    def _user(self, fh: int) -> int:
        """Return the user for whom a file is read or written. Call it before awaiting anything."""
        return libfuse.request()[1] if fh & libfuse.UNOPENED else self._files.opener(fh)

    def _note_read(self, node: Node) -> None:
        """Update the access time of a file, unless the kernel does, which knows where the data of most is."""
        if self._notes_reads and (not self._kernel_notes or node.metacopy):
            self._fs.was_read(node)

    @async_
    async def read(self, fh: int, off: int, size: int) -> bytes:
        handle = self._reading(fh)
        if not libfuse.request()[2] & os.O_NOATIME:
            self._note_read(handle.node)
        file = handle.file
        data = self._read_at_once(file, size, off)
        if data is not None:
            return data
        threads = self._threads
        if isinstance(file, SlowFile):
            pread = functools.partial(file.pread, size, off)
            if file.knows_at_once:  # so that a wait for a server does not delay reads of cached data
                with suppress(WouldWait):
                    return await threads.run(
                        functools.partial(at_once, pread), threads.reads, self._files.opener(fh)
                    )
            return await threads.run_patiently(pread, threads.slow_reads, self._files.opener(fh))
        uid = self._user(fh)
        with self._unopened.in_use(handle.node):
            return await threads.run(lambda: file.pread(size, off), threads.reads, uid)

    def _read_at_once(self, file: File, size: int, offset: int) -> bytes | None:
        """Return the data if it is at hand, or if no other request waits and it is not long to read; else
        None."""
        data = file.try_pread(size, offset)
        if data is None and isinstance(file, SquashfsFile) and self._loop.is_quiet():
            # A thread is not worth it for a block. For an archive, it may be gigabytes.
            return file.pread(size, offset)
        return data

    @told
    async def write(self, said: Said, fh: int, off: int, buf: bytes) -> int:
        threads = self._threads
        if fh & libfuse.UNOPENED:
            node, uid = self._node(fh ^ libfuse.UNOPENED), said.uid
            handle = self._unopened.writes(node) or await self._to_write(node, uid)
        else:
            handle, uid = self._files[fh], self._files.opener(fh)
            if handle.is_frozen:
                await self._thaw(handle.node, uid)
        node = handle.node
        if node.protection:
            protect.must_write(self._fs.union_of(node), node, appends=bool(said.flags & os.O_APPEND))
        mode = node.mode
        writer = None
        if mode & SET_ID and (said.clears is not None or fh & libfuse.UNOPENED):
            writer = self._writer_by(node, said.pid, said.uid, said.clears)
        to_disk = said.flags & _SYNCHRONOUS
        if node.protection and protect.is_synchronous(self._fs.union_of(node), node):
            to_disk |= os.O_DSYNC
        try:
            is_long = self._fs.is_long_to_write(handle, len(buf), off)
            if not handle.is_synchronous and not is_long and not to_disk:
                if said.uid == libfuse.KERNEL_UID and not handle.is_frozen:
                    self._fs.will_be_written(handle, writer)
                    return self._write_back(handle.file)(buf, off)
                return self._fs.write(handle, buf, off, writer=writer)
            self._fs.will_be_written(handle, writer)
            turns = threads.reads if is_long else threads.syncs
            with self._unopened.in_use(node), self._changes(), at_hand(handle.file) as file:
                pwrite = self._write_back(file) if said.uid == libfuse.KERNEL_UID else file.pwrite
                written = await threads.run(functools.partial(pwrite, buf, off), turns, uid)
                if not handle.is_synchronous and to_disk:
                    sync = functools.partial(file.fsync, to_disk & os.O_SYNC != os.O_SYNC)
                    await threads.run(sync, threads.syncs, uid)
            return written
        except NoRoom as failure:
            if failure.written and not handle.is_frozen and said.uid != libfuse.KERNEL_UID:
                if handle.is_synchronous or to_disk:
                    await threads.run(functools.partial(handle.file.fsync, False), threads.syncs, uid)
                failure.answer = failure.written
            raise
        finally:
            self._tell(node, mode)

    @staticmethod
    def _write_back(file: File) -> Callable[[bytes, int], int]:
        """Return what writes the kernel's pages that were changed through mmap(2)."""
        write: Callable[[bytes, int], int] = getattr(file, "write_back", file.pwrite)
        return write

    async def _to_write(self, node: Node, uid: int) -> Handle:
        """Copy up a file that the kernel opened without a request; return the handle by which to write it."""
        protect.must_write(self._fs.union_of(node), node, appends=True)
        if node.upper is None or node.metacopy or node.copying is not None:
            await self._begin_to_write(node, uid)
        return self._unopened.to_write(node)

    async def _begin_to_write(self, node: Node, uid: int) -> None:
        if not node.dead:
            await self._within_reach(node.parent)
        await self._settled(node)
        if not self._fs.begin_lazily(node):
            await self._bring_up(node, uid)

    async def _thaw(self, node: Node, uid: int) -> None:
        """Copy up open, writable files again, so that writing continues in the new upper."""
        await self._begin_to_write(node, uid)
        if node.partial is None:
            self._fs.copy_up(node)  # now, because a thread may do the write

    @contextmanager
    def _changes(self) -> Iterator[None]:
        """Note that a thread changes the data of a file during the block."""
        self._changing += 1
        try:
            yield
        finally:
            self._changing -= 1

    async def flush(self, fh: int) -> None:
        # Nothing is buffered, so close(2) has no error to report; the kernel does not ask again.
        raise FUSEError(errno.ENOSYS)

    @sync
    def release(self, fh: int) -> None:
        if fh == _UNKNOWN:  # created before the kernel opened files itself
            return
        handle = self._files.leave(fh)
        self._passthrough.closed(handle)
        self._fs.release_handle(handle)

    def _seek(self, fh: int, offset: int, whence: int) -> int:
        """Answer lseek(2) with SEEK_DATA or SEEK_HOLE: return the offset, or a negated errno."""
        try:
            return self._fs.seek(self._reading(fh), offset, whence)
        except Exception as error:
            return -failure_of(error, "lseek").errno

    @async_
    async def fsync(self, fh: int, datasync: bool) -> None:
        ino = fh ^ libfuse.UNOPENED if fh & libfuse.UNOPENED else self._files[fh].node.ino
        inode = libfuse.quick_to_sync(ino)
        if inode and await self._loop.apart(lambda: libfuse.sync_quickly(inode, datasync=datasync)):
            return
        uid = self._user(fh)
        node = self._node(ino)
        stored = self._fs.stored(node)
        if stored is None:
            return
        async with self._threads.turn(self._threads.syncs, uid):
            # What is open of a metacopy is the file of the lower.
            if fh & libfuse.UNOPENED or (node.metacopy and node.partial is None):
                with closing(self._fs.union_of(node).upper.open(stored, os.O_RDONLY)) as file:
                    await self._synced(file, datasync)
            else:
                with at_hand(self._files[fh].file) as file:
                    await self._synced(file, datasync)

    async def _synced(self, file: File, datasync: bool) -> None:
        try:
            await self._threads.do(lambda: file.fsync(datasync))
        except OSError as failure:
            self._fs.host.not_saved(failure)
            raise
