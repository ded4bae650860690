"""The FUSE protocol on one side, the union on the other; no semantics here but when to await.

The union is synchronous and used from this thread alone, so code between two awaits needs no lock.
Awaited are: the data of large copy-ups, fsync, syncs, what slow lowers are asked, and a copy-up of the same
file by another request, which whoever wants to change or remove the file waits for.
"""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import os
import stat
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from typing import Any

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields, StatvfsData

from cowfs.fuse import libfuse, requests
from cowfs.fuse.failure import errno_of
from cowfs.fuse.handlers import Handlers, Said, async_, failure_of, sync, told
from cowfs.fuse.loop import RequestLoop
from cowfs.fuse.open_files import OpenFiles
from cowfs.fuse.passthrough import Passthrough
from cowfs.fuse.rests import Rests
from cowfs.fuse.shares import Bounds
from cowfs.fuse.shares import bounds as bounds_of_process
from cowfs.fuse.snapshots import OpenDirectory, Snapshots
from cowfs.fuse.threads import SLICE
from cowfs.fuse.unopened import Unopened
from cowfs.layers.acl import ACCESS as ACCESS_ACL
from cowfs.layers.acl import DEFAULT as DEFAULT_ACL
from cowfs.layers.base import File
from cowfs.layers.slow import Answers, NotYet, SlowFile, SlowLayer
from cowfs.linux.callers import look_at, may_see_trusted
from cowfs.overlay.attr import NewAttributes
from cowfs.overlay.dir import Owner
from cowfs.overlay.file import SET_ID
from cowfs.overlay.handle import Handle, Writer
from cowfs.overlay.node import Node
from cowfs.overlay.overlay import Overlay
from cowfs.overlay.readdir import Seen
from cowfs.types import Attr

log = logging.getLogger(__name__)

FOREVER = 10.0**9
"""Seconds that the kernel may keep names and attributes: nobody but us changes them."""
_CAPABILITY = b"security.capability"
_TRUSTED = b"trusted."
_DOTS = 2
"""A listing begins with . and .."""
_DEEP = 16
"""So many directories are copied up at once; if it takes more, others have a turn."""
_AHEAD = 24
"""So many names after the one that is listed are looked up along with it in a slow lower: a page of them."""
_SYNCHRONOUS = os.O_SYNC | os.O_DSYNC
_UNKNOWN = 0
"""The handle number of files that the kernel opens by itself, and never gives back."""


def _dot(node: Node) -> EntryAttributes:
    """Return the entry for . or .., of which the kernel takes no more than this (fuse_direntplus_link())."""
    entry = EntryAttributes()
    entry.st_ino = node.ino
    entry.st_mode = node.mode
    return entry


def _by_uid(ctx: RequestContext) -> Writer:
    return Writer.PRIVILEGED if ctx.uid == 0 else Writer.MEMBER


class Adapter(Handlers):
    """Answer the kernel's requests from an :class:`Overlay`."""

    supports_dot_lookup = False

    def __init__(
        self,
        fs: Overlay,
        loop: RequestLoop,
        *,
        acl: bool = True,
        bounds: Bounds | None = None,
        passthrough: str = "off",
    ) -> None:
        super().__init__(fs, loop)
        self.enable_acl = acl
        bounds = bounds or bounds_of_process(shared=False)
        self._files = OpenFiles(bounds)
        self.snapshots = Snapshots(bounds.names)
        self._listings: dict[int, OpenDirectory] = {}
        self._listed = 0
        self._kept: set[Node] = set()
        slow = [layer for layer in fs.lowers if isinstance(layer, SlowLayer)]
        for layer in slow:
            layer.serve(self._threads.later)
        self._has_slow_lowers = bool(slow)
        fs.upper.later = functools.partial(self._threads.later, 0)
        self._rests = Rests(fs, loop)
        fs.rest_soon = self._rests.soon
        self._sweeping = False
        fs.sweep_soon = self._sweep_soon
        self._no_capability: set[int] = set()
        self._no_default_acl: set[int] = set()
        self._passthrough = Passthrough(fs.upper, passthrough)
        self._unopened = Unopened(fs)
        libfuse.prepare(self._seek, knows_files=self.may_open_nothing(), passthrough=self._passthrough.wanted)
        self._missing = EntryAttributes()  # st_ino 0: the kernel remembers that there is no such name
        self._missing.entry_timeout = FOREVER

    def may_open_nothing(self) -> bool:
        """Whether the kernel may open files by itself: what they cost us then is counted for nobody."""
        return not any(layer.has_descriptors for layer in (self._fs.upper, *self._fs.lowers))

    # --- between the two sides

    def _node(self, ino: int) -> Node:
        node = self._fs.nodes.get(ino)
        if node is None:
            raise FUSEError(errno.ESTALE)
        return node

    def _entry(self, node: Node, attr: Attr) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = node.ino
        entry.generation = node.generation
        entry.entry_timeout = FOREVER
        entry.attr_timeout = 0 if self._passthrough.may_change(node.ino) else FOREVER
        entry.st_mode = attr.st_mode
        entry.st_nlink = self._fs.nlink(node, attr)
        entry.st_uid = attr.st_uid
        entry.st_gid = attr.st_gid
        entry.st_rdev = attr.st_rdev
        entry.st_size = attr.st_size
        entry.st_blocks = attr.st_blocks
        entry.st_blksize = attr.st_blksize
        entry.st_atime_ns = attr.st_atime_ns
        entry.st_mtime_ns = attr.st_mtime_ns
        entry.st_ctime_ns = attr.st_ctime_ns
        return entry

    def _given(self, found: tuple[Node, Attr]) -> EntryAttributes:
        """Return the entry for a node that the kernel refers to once more from now on."""
        node, attr = found
        node.lookups += 1
        return self._entry(node, attr)

    def _writer(self, node: Node, ctx: RequestContext, takes: bool | None) -> Writer:
        """Return who changes a file, or its owner or ACL. What *takes* does not say is in /proc."""
        return self._writer_by(node, ctx.pid, ctx.uid, takes)

    def _writer_by(self, node: Node, pid: int, uid: int, takes: bool | None) -> Writer:
        if not node.mode & SET_ID or takes is False:
            return Writer.PRIVILEGED
        caller = look_at(pid)
        if takes is None and (uid == 0 if caller is None else caller.has("CAP_FSETID")):
            return Writer.PRIVILEGED
        is_member = caller is not None and self._fs.stat(node).st_gid in caller.groups
        return Writer.MEMBER if is_member else Writer.STRANGER

    def _tell(self, node: Node, mode: int) -> None:
        """Tell the kernel if a mode is not *mode* any more and no answer says so: it runs programs by it."""
        if node.mode != mode:
            self._loop.forget_attributes(node.ino)

    def go_on(self) -> None:
        """Go on with what an earlier mount has begun."""
        self._rests.soon()

    def _sweep_soon(self) -> None:
        if not self._sweeping:
            self._sweeping = True
            self._loop.in_trio(lambda: trio.lowlevel.spawn_system_task(self._sweep))

    async def _sweep(self) -> None:
        """Remove what is left of directories; nobody waits for that."""
        try:
            await self._threads.stepwise(self._fs.sweep(), 0, is_urgent=False)
        except Exception:
            log.exception("what was removed is not cleared away before the next mount")
        finally:
            self._sweeping = False

    async def _within_reach(self, directory: Node | None) -> None:
        """Copy up what is above in a deep tree, and the directory itself, before a change that needs it."""
        missing, walk = 0, directory
        while walk is not None and walk.upper is None:
            missing += 1
            walk = walk.parent
        if missing > _DEEP:
            await self._threads.stepwise(self._fs.copy_up_chain(directory), 0)

    async def _look_through(self, parent: Node, name: bytes, uid: int) -> Seen | None:
        """Return what is in a directory that is to go; None for what is no directory, or not known."""
        while True:
            node = self._fs.nodes.child(parent, name) if parent.is_dir else None
            if node is None or not node.is_dir:
                return None
            seen = await self._threads.stepwise(self._fs.look_through(node), uid)
            if seen.holds():
                return seen

    async def _cut(self, node: Node, size: int, uid: int) -> None:
        """Free what a large file has behind its new end, in a thread. A small one's is left to the call that
        sets the size."""
        await self._settled(node)
        if not self._fs.is_long_to_cut(node, size):
            return
        node.copying = done = trio.Event()  # who would change it waits, as for a copy-up
        try:
            async with self._threads.turn(self._threads.copies, uid):
                with closing(self._fs.upper.open(node.upper, os.O_WRONLY)) as file:
                    await self._threads.do(lambda: file.truncate(size))
        finally:
            node.copying = None
            self._loop.tell(done)

    async def _settled(self, node: Node) -> None:
        """Wait while another request copies the node up."""
        while node.copying is not None:
            await self._loop.step_aside()
            if node.copying is None:
                return
            self._loop.waiting += 1
            try:
                await node.copying.wait()
            finally:
                self._loop.waiting -= 1

    def _masked(self, parent: Node, mode: int, ctx: RequestContext) -> int:
        """Return the mode of a new inode: without the umask's bits, unless a default ACL rules (umask(2))."""
        umask = ctx.umask
        if not umask or not libfuse.leaves_umask():
            return mode
        if self.enable_acl and parent.ino not in self._no_default_acl:
            try:
                self._fs.getxattr(parent, DEFAULT_ACL)
                return mode
            except OSError:
                self._no_default_acl.add(parent.ino)
        return mode & ~umask

    def _is_copying(self, parent: Node, name: bytes) -> bool:
        node = self._fs.nodes.child(parent, name)
        return node is not None and node.copying is not None

    async def _name_settled(self, parent: Node, name: bytes) -> None:
        """Wait while what is under this name is being copied up, whatever it is by then."""
        while True:
            node = self._fs.nodes.child(parent, name)
            if node is None or node.copying is None:
                return
            await self._settled(node)

    async def _bring_up(self, node: Node, uid: int, size: int | None = None) -> None:
        """Copy up a large file's data in a thread. A small one's is left to the call that needs it."""
        if node.copying is not None:
            await self._settled(node)
        if not stat.S_ISREG(node.mode) or (node.upper is not None and not node.metacopy):
            return
        fs = self._fs
        wanted = fs.stat(node).st_size
        if size is not None:
            wanted = min(wanted, size)
        waits = fs.data_waits(node)
        if node.partial is None and wanted <= (0 if waits else fs.options.inline_up_to):
            return
        node.copying = done = trio.Event()
        try:
            turns = self._threads.slow_copies if waits else self._threads.copies
            async with self._threads.turn(turns, uid):
                await self._copy_up(node, size, uid)
        finally:
            node.copying = None
            self._loop.tell(done)

    async def _copy_up(self, node: Node, size: int | None, uid: int) -> None:
        """Do it, at the user's turn."""
        with closing(Answers(uid)) as answers, answers.at_hand():
            job = await self._threads.answered(lambda: self._fs.prepare_copy_up(node, size), answers)
        if job is None:
            return
        try:
            if self._fs.data_waits(node):
                await self._threads.patiently(job.run)
            else:
                await self._threads.do(job.run)
        except BaseException:
            job.abort()
            raise
        job.commit()

    # --- names

    @sync
    def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        parent = self._node(parent_inode)
        if name in {b".", b".."}:
            node = parent if name == b"." else parent.parent or parent
            return self._given((node, self._fs.stat(node)))
        found = self._fs.lookup(parent, name)
        return self._missing if found is None else self._given(found)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        end = time.monotonic() + SLICE
        for ino, lookups in inode_list:
            if time.monotonic() > end:  # there may be many thousands
                await self._loop.give_way()
                end = time.monotonic() + SLICE
            node = self._fs.nodes.get(ino)
            if node is not None:
                self._no_capability.discard(ino)
                self._no_default_acl.discard(ino)
                try:
                    if lookups >= node.lookups:
                        self._unopened.forget(node)
                    self._fs.forget(node, lookups)
                    if self._fs.nodes.get(ino) is None:
                        self._passthrough.forget(ino)
                except Exception:
                    log.exception("forgetting inode %d failed", ino)

    @async_
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        owner = Owner(ctx.uid, ctx.gid)
        parent = self._node(parent_inode)
        if parent.upper is None:
            await self._within_reach(parent)
        return self._given(self._fs.mknod(parent, name, self._masked(parent, mode, ctx), rdev, owner))

    @async_
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        parent = self._node(parent_inode)
        if parent.upper is None:
            await self._within_reach(parent)
        owner = Owner(ctx.uid, ctx.gid)
        return self._given(self._fs.mkdir(parent, name, self._masked(parent, mode, ctx), owner))

    @async_
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        parent = self._node(parent_inode)
        if parent.upper is None:
            await self._within_reach(parent)
        return self._given(self._fs.symlink(parent, name, target, Owner(ctx.uid, ctx.gid)))

    @async_
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        node, parent = self._node(inode), self._node(new_parent_inode)
        await self._within_reach(parent)
        await self._within_reach(node.parent)
        await self._bring_up(node, ctx.uid)
        return self._given((node, self._fs.link(node, parent, new_name)))

    @async_
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        parent = self._node(parent_inode)
        if parent.upper is None:
            await self._within_reach(parent)
        await self._name_settled(parent, name)
        size = self._size_of(parent, name)
        self._fs.unlink(parent, name)
        self._removed(size)

    @async_
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        parent = self._node(parent_inode)
        if parent.upper is None:
            await self._within_reach(parent)
        self._fs.rmdir(parent, name, await self._look_through(parent, name, ctx.uid))

    @async_
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        parent, new_parent = self._node(parent_inode_old), self._node(parent_inode_new)
        await self._within_reach(parent)
        await self._within_reach(new_parent)
        while True:
            seen = None if flags else await self._look_through(new_parent, name_new, ctx.uid)
            if not self._is_copying(parent, name_old) and not self._is_copying(new_parent, name_new):
                break
            await self._name_settled(parent, name_old)
            await self._name_settled(new_parent, name_new)
        size = self._size_of(new_parent, name_new)
        self._fs.rename(parent, name_old, new_parent, name_new, flags, seen)
        self._removed(size)

    # --- attributes

    @sync
    def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        node = self._node(inode)
        return self._entry(node, self._fs.stat(node))

    @told
    async def setattr(
        self,
        said: Said,
        inode: int,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        node = self._node(inode)
        takes = said.takes if fields.update_size else None  # a chown always does
        new = NewAttributes(
            mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
            writer=self._writer(node, ctx, takes),
        )
        if node.upper is None:
            await self._within_reach(node.parent)
        if new.size is not None:
            await self._bring_up(node, ctx.uid, new.size)
            await self._cut(node, new.size, ctx.uid)
        elif node.copying is not None:
            await self._settled(node)
        return self._entry(node, self._fs.setattr(node, new))

    @sync
    def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return self._fs.readlink(self._node(inode))

    @async_
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        await self._loop.take_forgets()
        stats = self._fs.statfs()
        data = StatvfsData()
        data.f_bsize = stats.bsize
        data.f_frsize = stats.frsize
        data.f_blocks = stats.blocks
        data.f_bfree = stats.bfree
        data.f_bavail = stats.bavail
        data.f_files = stats.files
        data.f_ffree = stats.ffree
        data.f_favail = stats.favail
        data.f_namemax = stats.namemax
        return data

    @sync
    def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        # The kernel asks for this one before every write.
        if name == _CAPABILITY:
            if inode in self._no_capability:
                raise FUSEError(errno.ENODATA)
            try:
                return self._fs.getxattr(self._node(inode), name)
            except OSError as failure:
                if failure.errno == errno.ENODATA:
                    self._no_capability.add(inode)
                raise
        return self._fs.getxattr(self._node(inode), name)

    @sync
    def listxattr(self, inode: int, ctx: RequestContext) -> list[bytes]:
        names = self._fs.listxattr(self._node(inode))
        if not any(name.startswith(_TRUSTED) for name in names) or may_see_trusted(ctx.pid, ctx.uid):
            return names
        # As xattr(7) says; the kernel leaves it to us.
        return [name for name in names if not name.startswith(_TRUSTED)]

    @async_
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        node = self._node(inode)
        await self._within_reach(node.parent)
        await self._settled(node)
        self._no_capability.discard(inode)
        self._no_default_acl.discard(inode)
        self._fs.setxattr(node, name, value)
        if name == ACCESS_ACL and node.mode & stat.S_ISGID and not node.is_dir:
            self._drop_set_group_id(node, self._writer(node, ctx, None))

    def _drop_set_group_id(self, node: Node, writer: Writer) -> None:
        """Take the bit after a change of the ACL by who is not in the group (posix_acl_update_mode)."""
        mode = self._fs.stat(node).st_mode
        if writer is Writer.STRANGER:
            self._fs.setattr(node, NewAttributes(mode=stat.S_IMODE(mode) & ~stat.S_ISGID))
            self._tell(node, mode)

    @async_
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        node = self._node(inode)
        await self._within_reach(node.parent)
        await self._settled(node)
        self._fs.removexattr(node, name)

    # --- files

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

    def _size_of(self, parent: Node, name: bytes) -> int:
        """Return how many bytes of the store may be freed with a name, if that matters to the kernel."""
        node = self._fs.nodes.child(parent, name) if len(self._passthrough) else None
        if node is None or node.upper is None or node.is_dir:
            return 0
        with suppress(OSError):  # who removes it is told
            return self._fs.stat(node).st_blocks * 512
        return 0

    def _removed(self, size: int) -> None:
        """Free what was removed soon, if somebody may need the room who does not ask us for it."""
        if size and self._passthrough.wants_room(size):
            self._loop.take_forgets_soon()

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
            handle, uid = await self._to_write(self._node(fh ^ libfuse.UNOPENED), said.uid), said.uid
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

    # --- directories

    @sync
    def opendir(self, inode: int, ctx: RequestContext) -> int:
        node = self._node(inode)
        self._files.opened.claim(ctx.uid)
        self._listed += 1
        number = self._listed | libfuse.LISTING
        # What the kernel keeps is for one at a time: it would give a second reader, once past the beginning,
        # what the first was told before the second came.
        if node not in self._kept:
            self._kept.add(node)
            number |= libfuse.KEPT
        self._listings[number] = OpenDirectory(node, ctx.uid)
        return number

    @async_
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        listing = self._listings[fh]
        if not self._has_slow_lowers:
            await self._list(listing, start_id, token, None)
            return
        answers = Answers(listing.opener)
        with answers.at_hand():  # this handler cannot be begun again: it awaits what it needs where it does
            await self._list(listing, start_id, token, answers)

    async def _list(
        self, listing: OpenDirectory, start_id: int, token: pyfuse3.ReaddirToken, answers: Answers | None
    ) -> None:
        fs, node = self._fs, listing.node
        names = listing.names
        end = time.monotonic() + SLICE
        if names is None or start_id == 0:
            listed = (
                fs.listing(node)
                if answers is None
                else await self._threads.answered(lambda: fs.listing(node), answers)
            )
            if callable(listed):
                listed = await self._threads.run(listed, self._threads.reads, listing.opener)
            names = listed
            self.snapshots.keep(listing, names)
        for number in range(start_id, _DOTS):
            this = node if number == 0 else node.parent or node
            if not pyfuse3.readdir_reply(token, b"." * (number + 1), _dot(this), number + 1):
                return
        for place, name in names.after(max(start_id - _DOTS, 0)):
            found = entry = None
            try:
                try:
                    found = fs.lookup(node, name)
                except NotYet:
                    more = [other for _, other in itertools.islice(names.after(place), _AHEAD)]
                    assert answers is not None
                    look = functools.partial(fs.lookup, node, name)
                    found = await self._threads.answered(look, answers, more)
                entry = None if found is None else self._entry(*found)
            except Exception as failure:
                code = errno_of(failure, "readdir")
                log.warning("%r is left out of a listing: %s", name, os.strerror(code))
            if found is None or entry is None:  # removed since the listing began, a whiteout, or damage
                if time.monotonic() > end:  # a reply bounds what is shown, nothing bounds this
                    await self._loop.give_way()
                    end = time.monotonic() + SLICE
                continue
            if not pyfuse3.readdir_reply(token, name, entry, _DOTS + place):
                fs.release(found[0])
                return
            found[0].lookups += 1

    @sync
    def releasedir(self, fh: int) -> None:
        listing = self._listings.pop(fh)
        self.snapshots.drop(listing)
        self._files.opened.give_back(listing.opener)
        if fh & libfuse.KEPT:
            self._kept.discard(listing.node)

    @async_
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        listing = self._listings[fh]
        node = listing.node
        if node.upper is not None:
            async with self._threads.turn(self._threads.syncs, listing.opener):
                with closing(self._fs.upper.open_directory(node.upper)) as directory:
                    await self._synced(directory, datasync)

    # --- for info

    def figures(self) -> dict[str, Any]:
        """Return what the daemon knows of itself, for ``cowfs info``."""
        return {
            "inodes_known": len(self._fs.nodes),
            "open_files": None if libfuse.opens_nothing() else len(self._files),
            "passthrough": {"lent": len(self._passthrough), "why_not": self._passthrough.why_not()},
            **requests.counted(),
        }
