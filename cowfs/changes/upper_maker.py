"""Make a second upper in a store: with links to the files of the first, or copies if linking fails."""

from __future__ import annotations

import errno
import stat
from contextlib import closing, suppress

from cowfs.changes.compare import Inode, shown_xattrs
from cowfs.layers.acl import ACCESS, DEFAULT
from cowfs.layers.base import File, Key, UpperLayer
from cowfs.overlay.xattr_format import METACOPY, OPAQUE, XattrFormat
from cowfs.store.format import layout
from cowfs.types import Attr

_REFUSED = {errno.EPERM, errno.EOPNOTSUPP, errno.EINVAL}


class UpperMaker:
    """A :class:`cowfs.changes.rebase.Maker`. Blocks; OSError."""

    def __init__(self, layer: UpperLayer, root: Key, xattrs: XattrFormat) -> None:
        """*root* is an empty directory of the layer."""
        self.root = root
        self._layer = layer
        self._xattrs = xattrs
        self._whiteout: Key = None
        self._copies: dict[tuple[int, int, int], Key] = {}
        """Copies of inodes with several names."""

    def directory(
        self, parent: Key, name: bytes, like: Inode, *, opaque: bool = False, redirect: bytes | None = None
    ) -> Key:
        made = self._layer.mkdir(parent, name, 0o700, *layout.owner(self._layer))
        self._set_attributes(made, like)
        if opaque:
            self._layer.setxattr(made, self._xattrs.opaque, OPAQUE)
        if redirect is not None:
            self._layer.setxattr(made, self._xattrs.redirect, redirect)
        return made

    def set_root_attributes(self, like: Inode) -> None:
        """Replace the attributes of the root by those of another directory."""
        for name in self._layer.listxattr(self.root):
            if not self._xattrs.is_own(name):
                with suppress(OSError):
                    self._layer.removexattr(self.root, name)
        self._set_attributes(self.root, like)

    def date(self, directory: Key, attr: Attr) -> None:
        self._layer.utimens(directory, attr.st_atime_ns, attr.st_mtime_ns)

    def link(self, key: Key, parent: Key, name: bytes) -> None:
        self._layer.link(key.places[0][1], parent, name)

    def copy(self, inode: Inode, parent: Key, name: bytes) -> None:
        """Copy an inode with its data. If it has several names and was copied before, make a link."""
        attr = inode.attr
        identity = (id(inode.layer), attr.st_dev, attr.st_ino)
        known = self._copies.get(identity)
        if known is not None:
            self._layer.link(known, parent, name)
            return
        made = self._made(inode, parent, name)
        self._set_attributes(made, inode)
        self.date(made, attr)
        if attr.st_nlink > 1:
            self._copies[identity] = made

    def metacopy(self, like: Inode, redirect: bytes, parent: Key, name: bytes) -> None:
        """Make a metacopy whose data is at *redirect*."""
        made, file = self._layer.create(parent, name, 0o600, *layout.owner(self._layer))
        file.close()
        self._layer.truncate(made, like.attr.st_size)
        self._layer.setxattr(made, self._xattrs.metacopy, METACOPY)
        self._layer.setxattr(made, self._xattrs.redirect, redirect)
        self._set_attributes(made, like)
        self.date(made, like.attr)

    def whiteout(self, parent: Key, name: bytes) -> None:
        if self._whiteout is not None:
            try:
                self._layer.link(self._whiteout, parent, name)
                return
            except OSError as failure:
                if failure.errno not in {errno.EMLINK, errno.EPERM}:
                    raise
        self._whiteout = self._layer.mknod(parent, name, stat.S_IFCHR, 0, *layout.owner(self._layer))

    def rmdir(self, parent: Key, name: bytes) -> None:
        self._layer.rmdir(parent, name, None)

    def _made(self, inode: Inode, parent: Key, name: bytes) -> Key:
        owner, mode = layout.owner(self._layer), inode.attr.st_mode
        if stat.S_ISLNK(mode):
            return self._layer.symlink(parent, name, inode.layer.readlink(inode.key), *owner)
        if not stat.S_ISREG(mode):
            return self._layer.mknod(parent, name, mode, inode.attr.st_rdev, *owner)
        made, file = self._layer.create(parent, name, 0o600, *owner)
        with closing(file), closing(inode.open()) as source:
            _fill(file, source, inode.attr.st_size)
        return made

    def _set_attributes(self, made: Key, like: Inode) -> None:
        """Set owner, xattrs and mode; the owner first, because setting it clears some of the others."""
        layer, attr = self._layer, like.attr
        mode = stat.S_IMODE(attr.st_mode)
        if not stat.S_ISLNK(attr.st_mode):
            for inherited in (ACCESS, DEFAULT):
                with suppress(OSError):
                    layer.removexattr(made, inherited)
        try:
            layer.chown(made, attr.st_uid, attr.st_gid)
        except OSError as failure:
            if failure.errno not in _REFUSED:
                raise
            mode &= ~(stat.S_ISUID | stat.S_ISGID)
        values = {
            self._xattrs.stored(name): value for name, value in shown_xattrs(like, self._xattrs).items()
        }
        with suppress(OSError):
            values[self._xattrs.protattr] = like.layer.getxattr(like.key, self._xattrs.protattr)
        for name, value in values.items():
            try:
                layer.setxattr(made, name, value)
            except OSError as failure:
                if failure.errno not in _REFUSED:
                    raise
        if not stat.S_ISLNK(attr.st_mode):
            layer.chmod(made, mode)


def _fill(file: File, source: File, size: int) -> None:
    source.copy_to(file, size)
    file.fsync(False)
