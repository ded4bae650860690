"""Translate the FUSE protocol to calls of the union. The only semantics here is when to await.

The union is synchronous and used only from this thread, so code between two awaits needs no lock. Handlers
await the data of large copy-ups, fsync, syncs, and the answers of slow lowers. A handler that changes or
removes a file also awaits another request's copy-up of that file.
"""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import os
import stat
import time
from array import array
from collections.abc import Sequence
from contextlib import closing, suppress
from typing import Any

import pyfuse3
from pyfuse3 import EntryAttributes, FUSEError, RequestContext, SetattrFields, StatvfsData

from cowfs.fuse import libfuse, requests
from cowfs.fuse.beyond import BeyondHandlers
from cowfs.fuse.failure import errno_of
from cowfs.fuse.handlers import Said, async_, changing, sync, told
from cowfs.fuse.inode_limit import prune
from cowfs.fuse.loop import RequestLoop
from cowfs.fuse.nodes import FOREVER
from cowfs.fuse.open_directories import DOTS, OpenDirectories, OpenDirectory
from cowfs.fuse.owners import OwnerMap
from cowfs.fuse.quotas import Bounds
from cowfs.fuse.quotas import bounds as bounds_of_process
from cowfs.fuse.shortcuts import Directories
from cowfs.fuse.threads import SLICE
from cowfs.layers.acl import ACCESS as ACCESS_ACL
from cowfs.layers.acl import DEFAULT as DEFAULT_ACL
from cowfs.layers.slow import Answers, NotYet
from cowfs.linux.callers import may_be_in_write, may_see_trusted
from cowfs.linux.files import RENAME_EXCHANGE
from cowfs.overlay.attr import NewAttributes
from cowfs.overlay.file import SET_ID, clears_set_id
from cowfs.overlay.handle import Writer
from cowfs.overlay.node import Node
from cowfs.overlay.overlay import Overlay
from cowfs.overlay.readdir import Listing
from cowfs.types import Attr

log = logging.getLogger(__name__)

_CAPABILITY = b"security.capability"
_TRUSTED = b"trusted."
_ACLS = {ACCESS_ACL, DEFAULT_ACL}
_ATIME_NOW, _MTIME_NOW = 1 << 7, 1 << 8  # FATTR_ATIME_NOW, FATTR_MTIME_NOW (linux/fuse.h)
_BOTH_NOW = _ATIME_NOW | _MTIME_NOW
_AHEAD = 24
"""So many names after the one that is listed are looked up along with it in a slow lower: a page of them."""


def _dot(node: Node) -> EntryAttributes:
    """Return the entry for . or .., with only what the kernel uses of it (fuse_direntplus_link())."""
    entry = EntryAttributes()
    entry.st_ino = node.ino
    entry.st_mode = node.mode
    return entry


class Adapter(BeyondHandlers):
    """Answers the kernel's requests from an :class:`Overlay`."""

    def __init__(
        self,
        fs: Overlay,
        loop: RequestLoop,
        *,
        acl: bool = True,
        bounds: Bounds | None = None,
        passthrough: str = "off",
        owner_map: OwnerMap | None = None,
        sees_all: bool = False,
    ) -> None:
        bounds = bounds or bounds_of_process(shared=False)
        super().__init__(
            fs,
            loop,
            acl=acl,
            passthrough=passthrough,
            bounds=bounds,
            owner_map=owner_map,
            sees_all=sees_all,
        )
        fs.host.rolled_back = self.rolled_back
        fs.host.opened = self._opened_nodes
        fs.host.lent = self._lent_nodes
        fs.host.prune = self._prune_lent
        self.directories = OpenDirectories(self._files.opened, bounds.names)
        self._missing = EntryAttributes()  # st_ino 0: the kernel caches that the name does not exist
        self._missing.entry_timeout = FOREVER

    # --- names

    @async_
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        if name in {b".", b".."}:
            node = await self._node_of_handle(parent_inode, ctx.uid)
            if name == b"..":
                node = self._fs.above(node)
            return self._given((node, self._fs.stat(node)))
        parent = self._node(parent_inode)
        found = self._fs.lookup(parent, name)
        return self._missing if found is None else self._given(found)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        end = time.monotonic() + SLICE
        for ino, lookups in inode_list:
            if time.monotonic() > end:  # there may be many thousands
                await self._loop.yield_turn()
                end = time.monotonic() + SLICE
            node = self._fs.nodes.get(ino)
            if node is not None:
                self._no_capability.discard(ino)
                self._no_default_acl.discard(ino)
                self._capability_removed.discard(ino)
                try:
                    if lookups >= node.lookups:
                        self._unopened.forget(node)
                    self._fs.forget(node, lookups)
                    if self._fs.nodes.get(ino) is None:
                        self._passthrough.forget(ino)
                except Exception:
                    log.exception("forgetting inode %d failed", ino)

    @changing
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        owner = self._owner(ctx)
        parent = self._node(parent_inode)
        if parent.upper is None:
            await self._within_reach(parent)
        made = self._fs.mknod(parent, name, self._masked(parent, mode, ctx.umask), rdev, owner)
        if stat.S_ISREG(mode):
            self._no_capability.add(made[0].ino)
        return await self._when_made(made, parent, ctx.uid)

    @changing
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        parent = self._node(parent_inode)
        if parent.upper is None:
            await self._within_reach(parent)
        owner = self._owner(ctx)
        made = self._fs.mkdir(parent, name, self._masked(parent, mode, ctx.umask), owner)
        return await self._when_made(made, parent, ctx.uid)

    @changing
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        parent = self._node(parent_inode)
        if parent.upper is None:
            await self._within_reach(parent)
        made = self._fs.symlink(parent, name, target, self._owner(ctx))
        return await self._when_made(made, parent, ctx.uid)

    async def _when_made(self, made: tuple[Node, Attr], parent: Node, uid: int) -> EntryAttributes:
        """Return the entry for a new node, once it is on disk if *parent* is synchronous."""
        entry = self._given(made)
        await self._in_step(parent, uid)
        return entry

    @changing
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        node, parent = self._node(inode), self._node(new_parent_inode)
        await self._within_reach(parent)
        await self._within_reach(node.parent)
        await self._bring_up(node, ctx.uid)
        attr = self._fs.link(node, parent, new_name)
        if parent.protection:
            await self._in_step(parent, ctx.uid)
            attr = self._fs.stat(node)
        return self._given((node, attr))

    @changing
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        parent = self._node(parent_inode)
        if parent.upper is None:
            await self._within_reach(parent)
        await self._without_name(parent, name, ctx.uid)
        await self._name_settled(parent, name)
        size = self._size_of(parent, name)
        self._fs.unlink(parent, name)
        self._removed(size)
        await self._in_step(parent, ctx.uid)

    @changing
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        parent = self._node(parent_inode)
        if parent.upper is None:
            await self._within_reach(parent)
        self._fs.rmdir(parent, name, await self._look_through(parent, name, ctx.uid))
        await self._in_step(parent, ctx.uid)

    @changing
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
        node = self._fs.nodes.child(parent, name_old)
        if node is not None:
            await self._with_data(node, ctx.uid)
        target = self._fs.nodes.child(new_parent, name_new)
        if target is not None and flags & RENAME_EXCHANGE:
            await self._with_data(target, ctx.uid)
        else:
            await self._without_name(new_parent, name_new, ctx.uid)
        while True:
            seen = None if flags else await self._look_through(new_parent, name_new, ctx.uid)
            if not self._is_copying(parent, name_old) and not self._is_copying(new_parent, name_new):
                break
            await self._name_settled(parent, name_old)
            await self._name_settled(new_parent, name_new)
        size = self._size_of(new_parent, name_new)
        self._fs.rename(parent, name_old, new_parent, name_new, flags, seen, self._owner(ctx))
        self._removed(size)
        await self._in_step(parent, ctx.uid)
        await self._in_step(new_parent, ctx.uid)

    def _size_of(self, parent: Node, name: bytes) -> int:
        """Return how many bytes of the store removing a name may free, if the kernel needs them."""
        node = self._fs.nodes.child(parent, name) if len(self._passthrough) else None
        if node is None or node.upper is None or node.is_dir:
            return 0
        with suppress(OSError):  # the removal reports it
            return self._fs.stat(node).st_blocks * 512
        return 0

    def _removed(self, size: int) -> None:
        """Free the data of a removed file soon, if the kernel may need the space without asking."""
        if size and self._passthrough.wants_room(size):
            self._loop.take_forgets_soon()

    # --- attributes

    @sync
    def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self._shown(self._node(inode))

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
        clears = said.clears if fields.update_size else None  # a chown always clears them
        uid, gid = attr.st_uid, attr.st_gid
        if self._owners is not None:
            uid, gid = self._owners.stored_user(uid), self._owners.stored_group(gid)
        new = NewAttributes(
            mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
            uid=uid if fields.update_uid else None,
            gid=gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
            writer=self._writer(node, ctx, clears),
            is_touch=said.flags & _BOTH_NOW == _BOTH_NOW,
        )
        if said.flags & _BOTH_NOW and not self._fs.union_of(node).upper.has_descriptors:
            self._by_own_clock(new, said.flags)
        if not node.mode & SET_ID:
            pass  # most files have none
        elif new.is_nothing and new.writer is Writer.PRIVILEGED and not self._was_removed(inode):
            new.writer = Writer.MEMBER  # chown(2) without an owner clears the bits of anyone's file
        elif new.is_nothing and self._may_not_clear(node, new.writer, ctx):
            if not libfuse.opens_nothing():
                raise FUSEError(errno.EPERM)
            return self._entry(node, self._fs.stat(node))  # before a write, which itself clears the bits
        self._fs.must_be_allowed(node, new)  # before a copy-up drops the end of the file
        if node.upper is None:
            await self._within_reach(node.parent)
        if new.size is not None:
            await self._bring_up(node, ctx.uid, new.size)
            await self._cut(node, new.size, ctx.uid)
        elif node.copying is not None:
            await self._settled(node)
        else:
            await self._with_data(node, ctx.uid, in_place=True)
        now = self._fs.setattr(node, new)
        if new.size is not None and node.protection:
            await self._in_step(node, ctx.uid)
            now = self._fs.stat(node)
        return self._entry(node, now)

    @staticmethod
    def _by_own_clock(new: NewAttributes, flags: int) -> None:
        """Set times to now by the clock of all other times in the store.

        The kernel's is up to 10 ms behind: a touch would set a time before that of the file's creation.
        """
        now = time.time_ns()
        if flags & _ATIME_NOW:
            new.atime_ns = now
        if flags & _MTIME_NOW:
            new.mtime_ns = now

    @sync
    def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return self._fs.readlink(self._node(inode))

    @async_
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        inode = libfuse.inode()
        await self._loop.take_forgets()
        stats = self._fs.room_of(inode)
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
        # The kernel asks for this xattr before it writes. no_capability.c answers most of the time.
        if name == _CAPABILITY:
            if self._capability_removed:
                self._capability_removed.discard(inode)
            if inode in self._no_capability:
                raise FUSEError(errno.ENODATA)
            try:
                return self._fs.getxattr(self._node(inode), name)
            except OSError as failure:
                if failure.errno == errno.ENODATA:
                    self._no_capability.add(inode)
                if failure.errno == errno.EINVAL and libfuse.clears_set_id() is not None:
                    return b""  # pyfuse3 wants CREATE or REPLACE: it exists, and is invalid
                raise
        value = self._fs.getxattr(self._node(inode), name)
        return self._owners.shown_acl(value) if self._owners is not None and name in _ACLS else value

    @sync
    def listxattr(self, inode: int, ctx: RequestContext) -> list[bytes]:
        names = self._fs.listxattr(self._node(inode))
        if not any(name.startswith(_TRUSTED) for name in names) or may_see_trusted(ctx.pid, ctx.uid):
            return names
        # As xattr(7) says; the kernel does not check it.
        return [name for name in names if not name.startswith(_TRUSTED)]

    @told
    async def setxattr(self, said: Said, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        node = self._node(inode)
        await self._within_reach(node.parent)
        await self._settled(node)
        await self._with_data(node, ctx.uid)
        self._no_capability.discard(inode)
        self._no_default_acl.discard(inode)
        if self._owners is not None and name in _ACLS:
            value = self._owners.stored_acl(value)
        self._fs.setxattr(node, name, value)
        if name == ACCESS_ACL and node.mode & stat.S_ISGID:
            clears = self._writer(node, ctx, None) is Writer.STRANGER if said.clears is None else said.clears
            if clears:
                self._drop_set_group_id(node)
        await self._in_step(node, ctx.uid)

    def _drop_set_group_id(self, node: Node) -> None:
        """Clear set-group-ID after a non-member of the group changed the ACL (posix_acl_update_mode())."""
        mode = self._fs.stat(node).st_mode
        self._fs.setattr(node, NewAttributes(mode=stat.S_IMODE(mode) & ~stat.S_ISGID))
        self._tell(node, mode)

    @changing
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        node = self._node(inode)
        await self._within_reach(node.parent)
        await self._settled(node)
        if self._has_xattr(node, name):
            await self._with_data(node, ctx.uid)
        try:
            self._fs.removexattr(node, name, appends=name == _CAPABILITY and self._is_to_append(node, ctx))
        except OSError as failure:
            if failure.errno != errno.ENODATA or name not in _ACLS:  # no error on ext3
                raise
        if name == _CAPABILITY:
            self._no_capability.discard(inode)  # the next request for it comes here
            self._capability_removed.add(inode)
        await self._in_step(node, ctx.uid)

    def _is_to_append(self, node: Node, ctx: RequestContext) -> bool:
        """Whether the kernel may ask on behalf of a write, which an append-only file allows.

        On ext3 it does not allow one that would also clear set-ID bits.
        """
        if not node.protection or not may_be_in_write(ctx.pid):
            return False
        return not clears_set_id(node.mode, self._writer(node, ctx, None))

    def _has_xattr(self, node: Node, name: bytes) -> bool:
        try:
            self._fs.getxattr(node, name)
        except OSError as failure:
            return failure.errno == errno.EINVAL  # an invalid security.capability
        return True

    def _was_removed(self, inode: int) -> bool:
        """Whether the last request about ``security.capability`` was to remove it.

        The kernel removes it before a writer with CAP_FSETID writes or changes an owner. Then it sends a
        SETATTR that sets nothing: for a write only if there was a capability, for an owner always
        (__remove_privs() in fs/inode.c).
        """
        if inode not in self._capability_removed:
            return False
        self._capability_removed.discard(inode)
        return True

    # --- directories

    @sync
    def opendir(self, inode: int, ctx: RequestContext) -> int:
        return self._open_directory(inode, ctx.uid)

    def _open_directory(self, inode: int, uid: int) -> int:
        cache = not self._fs.upper.atime.always  # strictatime needs each read
        return self.directories.open(self._node(inode), uid, cache=cache)

    @async_
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        listing = self.directories[fh]
        if not self._has_slow_lowers:
            await self._list(listing, start_id, token, None)
            return
        answers = Answers(listing.opener)
        with answers.at_hand():  # this handler cannot restart: it awaits in place
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
            self._begin(listing, listed)
            names = listed
        for number in range(start_id, DOTS):
            this = node if number == 0 else fs.above(node)
            if not pyfuse3.readdir_reply(token, b"." * (number + 1), _dot(this), number + 1):
                return
        for place, name in names.after(max(start_id - DOTS, 0)):
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
                log.warning("%r is missing from a listing: %s", name, os.strerror(code))
            if found is None or entry is None:  # removed since the listing began, a whiteout, or damage
                if time.monotonic() > end:  # the reply limits what is shown; nothing limits this
                    await self._loop.yield_turn()
                    end = time.monotonic() + SLICE
                continue
            if not pyfuse3.readdir_reply(token, name, entry, DOTS + place):
                fs.release(found[0])
                return
            found[0].lookups += 1

    def _begin(self, listing: OpenDirectory, names: Listing) -> None:
        self._fs.was_read(listing.node)
        self.directories.snapshots.keep(listing, names)

    def _directories(self) -> Directories:
        return Directories(self._open_directory, self.directories.close, self._listed_at_once)

    def _listed_at_once(self, number: int, start: int) -> Listing | None:
        """Return the names to list in an open directory from the place *start* on; None if it takes long."""
        listing = self.directories[number]
        if listing.names is None or start == 0:
            names = self._fs.listing(listing.node)
            if callable(names):
                return None
            self._begin(listing, names)
        return listing.names

    @sync
    def releasedir(self, fh: int) -> None:
        self.directories.close(fh)

    @async_
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        listing = self.directories[fh]
        node = listing.node
        stored = self._fs.stored(node)
        if stored is not None:
            async with self._threads.turn(self._threads.syncs, listing.opener):
                with closing(self._fs.union_of(node).upper.open_directory(stored)) as directory:
                    await self._synced(directory, datasync)

    def changed_within(self, ino: int) -> None:
        """Note that an inode changed without a request."""
        self._no_capability.discard(ino)
        self._no_default_acl.discard(ino)

    def _lent_nodes(self) -> list[Node]:
        mapped = map(self._fs.nodes.get, self._passthrough.written_by())
        return list({*self._passthrough.lent(), *(node for node in mapped if node is not None)})

    def _prune_lent(self) -> None:
        inodes = array("Q", self._passthrough.written_by())
        with suppress(OSError):  # an older kernel keeps them as long as it likes
            if inodes:
                prune(self._loop.connection(), inodes)

    def _opened_nodes(self) -> list[Node]:
        return [*self._files.nodes(), *self.directories.nodes()]

    def rolled_back(self) -> None:
        """Note that the whole tree was replaced."""
        self._no_capability.clear()
        self._no_default_acl.clear()
        self._capability_removed.clear()
        self._places = {}

    # --- for info

    def figures(self) -> dict[str, Any]:
        """Return the daemon's figures about itself, for ``cowfs info``."""
        return {
            "inodes_known": len(self._fs.nodes),
            "open_files": None if libfuse.opens_nothing() else len(self._files),
            "passthrough": {"lent": len(self._passthrough), "why_not": self._passthrough.why_not()},
            **requests.counted(),
        }
