"""A mount whose one user is root inside, as under fakeroot(1).

The kernel checks no permissions there (no ``default_permissions``). So we only have to give new files to
root, and to keep the set-ID bits that root keeps.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields

from cowfs.fuse import libfuse
from cowfs.fuse.adapter import Adapter
from cowfs.overlay.handle import Writer
from cowfs.overlay.node import Node


class _Root(NamedTuple):
    """A request as if root had made it."""

    pid: int
    umask: int
    uid: int = 0
    gid: int = 0


def _seen(ctx: RequestContext) -> RequestContext:
    """Return the context of a request by the mounting user as root's, of anybody else unchanged."""
    return cast(RequestContext, _Root(ctx.pid, ctx.umask)) if ctx.uid == os.geteuid() else ctx


_ACLS = b"system.posix_acl_"


def _refuse_acl(name: bytes) -> None:
    """Say that there are no ACLs: programs that copy a mode as an ACL (cp, install) call chmod then."""
    if name.startswith(_ACLS):
        raise FUSEError(errno.EOPNOTSUPP)


class FakerootAdapter(Adapter):
    """Take the requests of the user who mounts for root's. POSIX ACLs are not served: they would bring
    the kernel's permission checks back (FUSE_POSIX_ACL in fs/fuse/inode.c)."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **{**more, "acl": False})

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
        shown = (await self.getattr(inode, ctx)).st_mode
        return not stat.S_ISREG(shown) or bool(shown & 0o111)

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        _refuse_acl(name)
        return await super().getxattr(inode, name, ctx)

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        _refuse_acl(name)
        await super().setxattr(inode, name, value, ctx)

    async def listxattr(self, inode: int, ctx: RequestContext) -> list[bytes]:
        return [name for name in await super().listxattr(inode, ctx) if not name.startswith(_ACLS)]

    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        return await super().mknod(parent_inode, name, mode, rdev, _seen(ctx))

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        return await super().mkdir(parent_inode, name, mode, _seen(ctx))

    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        return await super().symlink(parent_inode, name, target, _seen(ctx))

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        return await super().create(parent_inode, name, mode, flags, _seen(ctx))

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        return await super().open(inode, flags, _seen(ctx))

    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        return await super().setattr(inode, attr, fields, fh, _seen(ctx))
