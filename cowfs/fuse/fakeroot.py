"""A mount whose only user is root inside, as under fakeroot(1).

The kernel checks no permissions there (no ``default_permissions``). So cowfs gives new files to root, and
keeps the set-ID bits that root keeps.

The kernel lets only a file's owner do some things, before it asks cowfs: set an ACL (set_posix_acl()), which
cp, install and sed do with files that they create; O_NOATIME; chattr. So the files that were created or
changed last are *lent*: the kernel is told that they belong to the mounting user, and only stat(2) shows the
true owner. That works because fuse_do_getattr() shows the answer to GETATTR, but caches nothing if the inode
was invalidated after the request (fi->attr_version in fuse_change_attributes_i()).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import trio
from pyfuse3 import EntryAttributes, FileInfo, RequestContext, SetattrFields

from cowfs.fuse import libfuse
from cowfs.fuse.adapter import Adapter
from cowfs.fuse.handlers import sync
from cowfs.layers.acl import ACCESS, DEFAULT
from cowfs.linux.callers import asks_for_a_size
from cowfs.overlay.handle import Writer
from cowfs.overlay.node import Node
from cowfs.types import Attr


class _Root(NamedTuple):
    """The context of a request as if root had made it."""

    pid: int
    umask: int
    uid: int = 0
    gid: int = 0


def _seen(ctx: RequestContext) -> RequestContext:
    """Return root's context for a request of the user who mounts, and any other context unchanged."""
    return cast(RequestContext, _Root(ctx.pid, ctx.umask)) if ctx.uid == os.geteuid() else ctx


_BY_FILE = 1  # FUSE_GETATTR_FH (linux/fuse.h): the kernel asks for itself; stat(2) never names a file
_MAY_RUN = 0o111
_ACLS = {ACCESS, DEFAULT}
_MOST_LENT = 128
"""Programs set the ACL of a file right after they created or changed it. Each stat(2) of a lent inode costs a
request and a notice, because the kernel caches no attributes of it."""


class FakerootAdapter(Adapter):
    """Treats the requests of the mounting user as root's.

    The kernel is not told that there are ACLs, because then it would check permissions again (FUSE_POSIX_ACL
    in fs/fuse/inode.c). It treats them as ordinary xattrs; cowfs stores them, and new files inherit them
    from cowfs.
    """

    def __init__(self, *args: Any, acl: bool = True, **more: Any) -> None:
        super().__init__(*args, **more, acl=False)
        self._inherits_acls = acl
        self._own = os.geteuid(), os.getegid()
        self._lent: dict[int, None] = {}
        """The inodes that the kernel believes to be the user's, the oldest first. It caches no attributes of
        them, so it learns the true owner after an inode was dropped from here."""
        self._misjudged: set[int] = set()
        """Files that became executable, or ceased to be, and that the kernel has not looked up since."""

    def _lend(self, ino: int) -> None:
        """From its next answer on, tell the kernel that an inode belongs to the user."""
        if libfuse.lacks() is not None:
            return  # the kernel's own requests cannot be told from stat(2)
        self._lent.pop(ino, None)
        self._lent[ino] = None
        if len(self._lent) > _MOST_LENT:
            del self._lent[next(iter(self._lent))]

    def _entry(self, node: Node, attr: Attr) -> EntryAttributes:
        """Return the entry that the kernel may cache."""
        entry = super()._entry(node, attr)
        self._misjudged.discard(node.ino)
        return self._lent_entry(entry) if node.ino in self._lent else entry

    def _lent_entry(self, entry: EntryAttributes) -> EntryAttributes:
        entry.st_uid, entry.st_gid = self._own
        entry.attr_timeout = 0
        return entry

    def _made(self, entry: EntryAttributes) -> EntryAttributes:
        """Return the entry of an inode that was just created."""
        self._lend(entry.st_ino)
        return self._lent_entry(entry) if entry.st_ino in self._lent else entry

    def _shown(self, node: Node) -> EntryAttributes:
        """Return the entry that stat(2) should show. If the inode is lent, the kernel does not cache it.

        But before it executes a file, the kernel makes the same request, and then uses what it has cached.
        So it may cache an entry that it does not have this one time. It then takes the file for root's until
        it looks the name up again.
        """
        entry = super()._entry(node, self._fs.stat(node))
        if node.ino in self._lent:
            entry.attr_timeout = 0
            if node.ino in self._misjudged:
                self._misjudged.discard(node.ino)
            else:
                self._loop.forget_attributes(node.ino)
        return entry

    @sync
    def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        node = self._node(inode)
        if libfuse.request()[2] & _BY_FILE:
            return self._entry(node, self._fs.stat(node))
        return self._shown(node)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        await super().forget(inode_list)
        for ino, _ in inode_list:
            if self._fs.nodes.get(ino) is None:
                self._lent.pop(ino, None)
                self._misjudged.discard(ino)

    def may_open_nothing(self) -> bool:
        """Return whether files may be opened without a request: the kernel does not check open(2) here."""
        return False

    def _said(self) -> Iterable[Any]:
        return (None, *libfuse.request())  # the kernel does not know that this user is root

    def _writer(self, node: Node, ctx: RequestContext, clears: bool | None) -> Writer:
        return Writer.PRIVILEGED if ctx.uid == 0 else super()._writer(node, ctx, clears)

    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        """Allow what root may do: everything except executing a file that nobody may execute."""
        if not mode & os.X_OK:
            return True
        shown = self._fs.stat(self._node(inode)).st_mode
        return not stat.S_ISREG(shown) or bool(shown & _MAY_RUN)

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        # A caller that reads the value may be about to set it (setfacl). Since Linux 6.2 the kernel reads the
        # value even for a caller that only asks for its size, as ls does (__fuse_get_acl()).
        size = libfuse.request()[2]
        if name in _ACLS and size and inode not in self._lent and not asks_for_a_size(ctx.pid):
            await self._lend_now(inode)
        return await super().getxattr(inode, name, ctx)

    async def _lend_now(self, inode: int) -> None:
        node = self._node(inode)
        self._lend(inode)
        if node.parent is not None and not node.dead:
            look_up = partial(self._loop.look_up_again, node.parent.ino, node.name)
            if self._loop.may_work():
                await self._loop.work(look_up)
            else:
                await self._loop.step_aside()
                await trio.to_thread.run_sync(look_up)

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        mode = self._fs.stat(self._node(inode)).st_mode
        await super().setxattr(inode, name, value, _seen(ctx))
        if name == ACCESS:
            self._judge_again(self._node(inode), mode)

    def _judge_again(self, node: Node, mode: int) -> None:
        """Make the kernel look up a file again that had this mode, if the file became executable or ceased
        to."""
        if not stat.S_ISREG(mode) or bool(mode & _MAY_RUN) == bool(self._fs.stat(node).st_mode & _MAY_RUN):
            return
        self._misjudged.add(node.ino)
        if node.parent is not None:
            self._loop.ask_again_soon(node.parent.ino, node.name)

    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        return self._made(await super().mknod(parent_inode, name, mode, rdev, _seen(ctx)))

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        return self._made(await super().mkdir(parent_inode, name, mode, _seen(ctx)))

    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        return await super().symlink(parent_inode, name, target, _seen(ctx))

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        info, entry = await super().create(parent_inode, name, mode, flags, _seen(ctx))
        return info, self._made(entry)

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        return await super().open(inode, flags, _seen(ctx))

    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        self._lend(inode)
        return await super().setattr(inode, attr, fields, fh, _seen(ctx))
