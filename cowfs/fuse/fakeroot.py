"""A mount whose one user is root inside, as under fakeroot(1).

The kernel checks no permissions there (no ``default_permissions``). So we give new files to root, and keep
the set-ID bits that root keeps.

Some things the kernel leaves to a file's owner before it asks us: to set an ACL (set_posix_acl()), which cp,
install and sed do with what they have made, O_NOATIME, chattr. So what was made or changed last is *lent*: it
is the mounting user's to the kernel, and only what stat(2) shows of it is true. For fuse_do_getattr() shows
what is answered to GETATTR, but keeps nothing of it if the inode was invalidated after it asked
(fi->attr_version in fuse_change_attributes_i()).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import trio
from pyfuse3 import EntryAttributes, FileInfo, RequestContext, SetattrFields

from cowfs.fuse import libfuse
from cowfs.fuse.adapter import Adapter
from cowfs.fuse.handlers import sync
from cowfs.layers.acl import ACCESS, DEFAULT
from cowfs.overlay.handle import Writer
from cowfs.overlay.node import Node
from cowfs.types import Attr


class _Root(NamedTuple):
    """A request as if root had made it."""

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
_MOST_LENT = 4096


class FakerootAdapter(Adapter):
    """Take the requests of the user who mounts for root's.

    The kernel is not told that there are ACLs: that would bring its permission checks back (FUSE_POSIX_ACL in
    fs/fuse/inode.c). They are attributes like others to it, which we keep and hand on to new files.
    """

    def __init__(self, *args: Any, acl: bool = True, **more: Any) -> None:
        super().__init__(*args, **more, acl=False)
        self._inherits_acls = acl
        self._own = os.geteuid(), os.getegid()
        self._lent: dict[int, None] = {}
        """What the kernel takes for the user's, the oldest first. It keeps no attributes of that, and so
        learns whose it is after it was dropped from here."""
        self._misjudged: set[int] = set()
        """Files of which the kernel does not know yet that somebody may run them, or that nobody may."""

    def _lend(self, ino: int) -> None:
        """Have an inode be the user's to the kernel from its next answer on."""
        if libfuse.lacks() is not None:
            return  # what the kernel asks for itself cannot be told from stat(2)
        self._lent.pop(ino, None)
        self._lent[ino] = None
        if len(self._lent) > _MOST_LENT:
            del self._lent[next(iter(self._lent))]

    def _entry(self, node: Node, attr: Attr) -> EntryAttributes:
        """Return the entry that the kernel is to keep."""
        entry = super()._entry(node, attr)
        self._misjudged.discard(node.ino)
        return self._lent_entry(entry) if node.ino in self._lent else entry

    def _lent_entry(self, entry: EntryAttributes) -> EntryAttributes:
        entry.st_uid, entry.st_gid = self._own
        entry.attr_timeout = 0
        return entry

    def _made(self, entry: EntryAttributes) -> EntryAttributes:
        """Return the entry of what was just made."""
        self._lend(entry.st_ino)
        return self._lent_entry(entry) if entry.st_ino in self._lent else entry

    def _shown(self, node: Node) -> EntryAttributes:
        """Return the entry that stat(2) is to show. If the inode is lent, the kernel keeps nothing of it.

        But it asks in the same way whether a file may be run, and then goes by what it has kept. So it keeps
        this one time what it does not know. The file is then root's to it, until it looks the name up.
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
        """The kernel checks nothing at open(2) here."""
        return False

    def _said(self) -> Iterable[Any]:
        return (None, *libfuse.request())  # the kernel does not know that he is root here

    def _writer(self, node: Node, ctx: RequestContext, takes: bool | None) -> Writer:
        return Writer.PRIVILEGED if ctx.uid == 0 else super()._writer(node, ctx, takes)

    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        """Allow what root may: all but executing a file that nobody may execute."""
        if not mode & os.X_OK:
            return True
        shown = self._fs.stat(self._node(inode)).st_mode
        return not stat.S_ISREG(shown) or bool(shown & _MAY_RUN)

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        # Who asks for the value, and not only whether there is one (ls), may be about to set it (setfacl).
        size = libfuse.request()[2]
        if name in _ACLS and size and inode not in self._lent:
            await self._lend_now(inode)
        return await super().getxattr(inode, name, ctx)

    async def _lend_now(self, inode: int) -> None:
        node = self._node(inode)
        self._lend(inode)
        if node.parent is not None and not node.dead:
            await self._loop.step_aside()
            await trio.to_thread.run_sync(self._loop.ask_again, node.parent.ino, node.name)

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        mode = self._fs.stat(self._node(inode)).st_mode
        await super().setxattr(inode, name, value, _seen(ctx))
        if name == ACCESS:
            self._judge_again(self._node(inode), mode)

    def _judge_again(self, node: Node, mode: int) -> None:
        """Have the kernel look up a file that had this mode, if whether it may be run has changed."""
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
