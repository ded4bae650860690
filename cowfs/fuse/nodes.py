"""Nodes and the answers about them, and what to await before a node changes."""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
from contextlib import closing

import trio
from pyfuse3 import EntryAttributes, FUSEError, RequestContext

from cowfs.fuse import libfuse
from cowfs.fuse.crowd import Crowd
from cowfs.fuse.handlers import Handlers
from cowfs.fuse.lazy_copier import LazyCopier
from cowfs.fuse.loop import RequestLoop
from cowfs.fuse.owners import OwnerMap, owners
from cowfs.fuse.passthrough import Passthrough
from cowfs.fuse.shortcuts import Directories, Shortcuts
from cowfs.layers.acl import DEFAULT as DEFAULT_ACL
from cowfs.layers.ext3 import Ext3Layer
from cowfs.layers.slow import Answers, SlowLayer
from cowfs.linux.callers import look_at
from cowfs.overlay import protect
from cowfs.overlay.dir import Owner
from cowfs.overlay.file import SET_ID
from cowfs.overlay.find import Places, at_place, see_all
from cowfs.overlay.handle import Writer
from cowfs.overlay.node import APART, Node
from cowfs.overlay.overlay import Overlay
from cowfs.overlay.readdir import Seen
from cowfs.types import Attr

log = logging.getLogger(__name__)

FOREVER = 10.0**9
"""Seconds for which the kernel may cache names and attributes: only this daemon changes them."""
_REMEMBERED = 60.0
"""How many seconds the places of all inodes are remembered."""
_DEEP = 16
"""How many directories are copied up at once; if more are needed, others have a turn."""


class NodeHandlers(Handlers):
    """The base of the handlers of names, attributes, files and directories."""

    def __init__(
        self, fs: Overlay, loop: RequestLoop, *, acl: bool, passthrough: str, owner_map: OwnerMap | None
    ) -> None:
        super().__init__(fs, loop)
        self.enable_acl = self._inherits_acls = acl
        slow = [layer for layer in fs.lowers if isinstance(layer, SlowLayer)]
        for layer in slow:
            layer.serve(self._threads.later)
        self._has_slow_lowers = bool(slow)
        for union in fs.unions():
            union.upper.later = functools.partial(self._threads.later, 0)
        self._lazy_copier = LazyCopier(fs, loop)
        fs.host.rest_soon = self._lazy_copier.soon
        self._sweeping = False
        fs.host.sweep_soon = self._sweep_soon
        self._no_default_acl: set[int] = set()
        self._capability_removed: set[int] = set()
        self._owners = owners(owner_map)
        self._passthrough = Passthrough(fs.upper, passthrough)
        self.supports_dot_lookup = fs.exports
        self._places: Places = {}
        self._finding = trio.Lock()

    def lend(self, *, wanted: bool) -> None:
        """Set whether files may be lent to the kernel, which then reads and writes them itself."""
        self._passthrough.pauses = not wanted

    def lends(self, node: Node) -> bool:
        """Whether the kernel itself reads and writes a file."""
        return node in self._passthrough

    def serve_inodes(self) -> None:
        """Let C serve the inodes of the store's image, if it is read here."""
        upper = self._fs.upper
        if self._owners is None and type(upper) is Ext3Layer:  # of a class derived from it, each call is seen
            when = upper.atime
            atime = 0 if not when.files else 2 if when.always else 1
            libfuse.serve_inodes(self._inode_of, upper.image.calls(), atime)
            libfuse.take_shortcuts(self._shortcuts(upper))

    def _shortcuts(self, upper: Ext3Layer) -> Shortcuts:
        return Shortcuts(
            self._fs, upper, self._masked, self._loop.is_quiet, self._directories(), self._capability_removed
        )

    def _directories(self) -> Directories:
        """Return what the shortcuts call for open directories."""
        raise NotImplementedError

    def _inode_of(self, ino: int) -> int:
        """Return the inode in the store's image that has all of a file or directory; 0 if there is none.

        The result is negative if it may only be read, since the inode may be protected. A device may be
        stored as a file, and what C sees there is not what users see.

        For a merged directory, the result is that of the upper directory, negative, with the number of
        directories that only the lowers have, plus 1, in the bits from 32 on.
        """
        node = self._fs.nodes.get(ino)
        if (
            node is None
            or node.upper is None
            or node.metacopy
            or node.copying is not None
            or node.indexed is not None
            or node.dead
            or ino & APART
            or (node.children is None and not stat.S_ISREG(node.mode))
        ):
            return 0
        if node.children is not None and node.below != ():
            below = self._fs.below.get(node)
            return 0 if below is None else -(node.upper | below + 1 << 32)
        return int(node.upper) if node.protection == 0 else -node.upper

    def _node(self, ino: int) -> Node:
        node = self._fs.nodes.get(ino)
        if node is None:
            raise FUSEError(errno.ESTALE)
        return node

    async def _node_of_handle(self, ino: int, uid: int) -> Node:
        """Return the node of a number from a file handle, which perhaps neither the kernel nor cowfs knows.

        If it is not known, search the whole union, and keep the result for a while. ESTALE if it does not
        exist.
        """
        node = self._fs.nodes.get(ino)
        if node is not None and not node.dead:
            return node
        await self._loop.step_aside()
        async with self._finding:
            node = at_place(self._fs, ino, self._places)
            if node is None:
                await self._threads.stepwise(see_all(self._fs, self._places), uid)
                self._loop.in_trio(self._forget_places_later)
                node = at_place(self._fs, ino, self._places)
        if node is None:
            raise FUSEError(errno.ESTALE)
        return node

    def _forget_places_later(self) -> None:
        async def wait() -> None:
            await trio.sleep(_REMEMBERED)
            self._places = {}

        trio.lowlevel.spawn_system_task(wait)

    def _entry(self, node: Node, attr: Attr) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = node.ino
        entry.generation = node.generation
        entry.entry_timeout = FOREVER
        entry.attr_timeout = 0 if self._passthrough.may_change(node.ino) else FOREVER
        entry.st_mode = attr.st_mode
        entry.st_nlink = self._fs.nlink(node, attr)
        entry.st_uid, entry.st_gid = attr.st_uid, attr.st_gid
        if self._owners is not None:
            entry.st_uid, entry.st_gid = self._owners.shown(attr)
        entry.st_rdev = attr.st_rdev
        entry.st_size = attr.st_size
        entry.st_blocks = attr.st_blocks
        entry.st_blksize = attr.st_blksize
        entry.st_atime_ns = attr.st_atime_ns
        entry.st_mtime_ns = attr.st_mtime_ns
        entry.st_ctime_ns = attr.st_ctime_ns
        return entry

    def _shown(self, node: Node) -> EntryAttributes:
        """Return the entry with the attributes that stat(2) shows."""
        return self._entry(node, self._fs.stat(node))

    def _given(self, found: tuple[Node, Attr]) -> EntryAttributes:
        """Return the entry for a node, and count the kernel's reference to it."""
        node, attr = found
        node.lookups += 1
        return self._entry(node, attr)

    def _owner(self, ctx: RequestContext) -> Owner:
        """Return the owner, in the store, of an inode that a request creates."""
        if self._owners is None:
            return Owner(ctx.uid, ctx.gid)
        return Owner(self._owners.stored_user(ctx.uid), self._owners.stored_group(ctx.gid))

    def _writer(self, node: Node, ctx: RequestContext, clears: bool | None) -> Writer:
        """Return the kind of writer that changes a file, its owner or its ACL. If *clears* is None, ask
        /proc."""
        return self._writer_by(node, ctx.pid, ctx.uid, clears)

    def _writer_by(self, node: Node, pid: int, uid: int, clears: bool | None) -> Writer:
        if not node.mode & SET_ID or clears is False:
            return Writer.PRIVILEGED
        caller = look_at(pid)
        if clears is None and (
            uid in {0, libfuse.KERNEL_UID} if caller is None else caller.has("CAP_FSETID")
        ):
            return Writer.PRIVILEGED
        group = self._fs.stat(node).st_gid
        if self._owners is not None:
            group = self._owners.group(group)
        is_member = caller is not None and group in caller.groups
        return Writer.MEMBER if is_member else Writer.STRANGER

    def _may_not_clear(self, node: Node, writer: Writer, ctx: RequestContext) -> bool:
        """Whether the caller asks to clear set-ID bits, but has no permission to.

        This happens if the caller uses chown(2), without a new owner, on another user's file.

        The kernel sends the same request before any user's write through a descriptor (file_remove_privs()).
        """
        if writer is Writer.PRIVILEGED or self._owners is not None or node.is_dir:
            return False
        if not libfuse.opens_nothing() and any(handle.writable for handle in node.handles or ()):
            return False
        attr, caller = self._fs.stat(node), look_at(ctx.pid)
        both = attr.st_mode & stat.S_IXGRP or writer is Writer.STRANGER
        drops = SET_ID if both else stat.S_ISUID
        may = attr.st_uid == ctx.uid or caller is None or caller.has("CAP_FOWNER")
        return not may and bool(attr.st_mode & drops)

    def _tell(self, node: Node, mode: int) -> None:
        """Tell the kernel if a mode is no longer *mode* and no answer says so: it decides about exec by
        it."""
        if node.mode != mode:
            self._loop.forget_attributes(node.ino)

    def go_on(self) -> None:
        """Continue the work that an earlier mount began."""
        self._lazy_copier.soon()

    def _sweep_soon(self) -> None:
        if not self._sweeping:
            self._sweeping = True
            self._loop.in_trio(lambda: trio.lowlevel.spawn_system_task(self._sweep))

    async def _sweep(self) -> None:
        """Remove the remains of directories in the background."""
        try:
            await self._threads.stepwise(self._fs.sweep(), 0, is_urgent=False)
        except Exception:
            log.exception("removed files keep their space in the store until the next mount")
        finally:
            self._sweeping = False

    async def _within_reach(self, directory: Node | None) -> None:
        """In a deep tree, copy up a directory and those above it, before a change that needs it."""
        missing, walk = 0, directory
        while walk is not None and walk.upper is None:
            missing += 1
            walk = walk.parent
        if missing > _DEEP:
            await self._threads.stepwise(self._fs.copy_up_chain(directory), 0)

    async def _look_through(self, parent: Node, name: bytes, uid: int) -> Seen | None:
        """Return what is in a directory that is to be removed; None if it is no directory, or not known."""
        while True:
            node = self._fs.nodes.child(parent, name) if parent.is_dir else None
            if node is None or not node.is_dir:
                return None
            seen = await self._threads.stepwise(self._fs.look_through(node), uid)
            if seen.holds():
                return seen

    async def _cut(self, node: Node, size: int, uid: int) -> None:
        """Free the data of a large file beyond its new end, in a thread.

        For a small file, the call that sets the size does it.
        """
        await self._settled(node)
        if not self._fs.is_long_to_cut(node, size):
            return
        node.copying = done = Crowd()  # other changes of it wait, as for a copy-up
        try:
            async with self._threads.turn(self._threads.copies, uid):
                with closing(self._fs.union_of(node).upper.open(node.upper, os.O_WRONLY)) as file:
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

    def _masked(self, parent: Node, mode: int, umask: int) -> int:
        """Return the mode of a new inode: without the umask's bits, unless a default ACL rules (umask(2))."""
        if not umask or not libfuse.leaves_umask():
            return mode
        if self._inherits_acls and parent.ino not in self._no_default_acl:
            try:
                self._fs.getxattr(parent, DEFAULT_ACL)
                return mode
            except OSError:
                self._no_default_acl.add(parent.ino)
        return mode & ~umask

    async def _in_step(self, node: Node, uid: int) -> None:
        """Write a changed inode of the store to disk if it is synchronous (the flags S and D of chattr(1)).

        A failure is noted, not raised, because the change has been made. ext4_create() ignores it, too.
        """
        union = self._fs.union_of(node)
        if node.protection == 0 or not protect.is_synchronous(union, node):
            return
        try:
            if node.is_dir:
                file = union.upper.open_directory(node.upper)
            else:
                file = union.upper.open(node.upper, os.O_RDONLY)
            with closing(file):
                await self._threads.run(lambda: file.fsync(datasync=False), self._threads.syncs, uid)
        except OSError as failure:
            self._fs.host.not_saved(failure)

    def _is_copying(self, parent: Node, name: bytes) -> bool:
        node = self._fs.nodes.child(parent, name)
        return node is not None and node.copying is not None

    async def _name_settled(self, parent: Node, name: bytes) -> None:
        """Wait while the node of this name is being copied up."""
        while True:
            node = self._fs.nodes.child(parent, name)
            if node is None or node.copying is None:
                return
            await self._settled(node)

    async def _with_data(self, node: Node, uid: int, *, in_place: bool = False) -> None:
        """Copy up a file before a change of something other than its data, if that copies the data, too.

        *in_place*: only owner, mode or times change.
        """
        fs = self._fs
        if node.dead or (node.upper is not None and fs.options.metacopy and (in_place or not node.metacopy)):
            return
        if not fs.options.metacopy or fs.needs_data(node, fs.stat(node), in_place=in_place):
            await self._bring_up(node, uid)

    async def _without_name(self, parent: Node, name: bytes, uid: int) -> None:
        """Copy up a file before it loses a name, if others are left and it keeps count of them."""
        node, fs = self._fs.nodes.child(parent, name), self._fs
        if node is not None and node.upper is None and not node.is_dir and fs.index is not None:
            if fs.stat(node).st_nlink > 1:
                await self._with_data(node, uid)

    async def _bring_up(self, node: Node, uid: int, size: int | None = None) -> None:
        """Copy up a file's data in a thread if that takes long; else the call that needs it does it."""
        if node.copying is not None:
            await self._settled(node)
        if not stat.S_ISREG(node.mode) or (node.upper is not None and not node.metacopy):
            return
        fs = self._fs
        wanted = fs.stat(node).st_size
        if size is not None:
            wanted = min(wanted, size)
        waits = fs.data_waits(node)
        # A disk makes the copy wait much longer than a thread does.
        at_once = 0 if waits or fs.options.sync_copy_up else fs.options.inline_up_to
        if node.partial is None and wanted <= at_once:
            return
        node.copying = done = Crowd()
        try:
            turns = self._threads.slow_copies if waits else self._threads.copies
            async with self._threads.turn(turns, uid):
                await self._copy_up(node, size, uid)
        finally:
            node.copying = None
            self._loop.tell(done)

    async def _copy_up(self, node: Node, size: int | None, uid: int) -> None:
        """Copy up a large file's data, at the user's turn."""
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
