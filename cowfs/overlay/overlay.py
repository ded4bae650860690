"""The union of an upper layer and any number of lower ones, with the operations of a filesystem.

Each operation is a function in a module of its own, which takes the shared :class:`OverlayFs`.
"""

from __future__ import annotations

from cowfs.overlay import attr as _attr
from cowfs.overlay import copyup as _copyup
from cowfs.overlay import dir as _dir
from cowfs.overlay import file as _file
from cowfs.overlay import flags as _flags
from cowfs.overlay import lookup as _lookup
from cowfs.overlay import nlink as _nlink
from cowfs.overlay import readdir as _readdir
from cowfs.overlay import rename as _rename
from cowfs.overlay import whiteout as _whiteout
from cowfs.overlay import whole as _whole
from cowfs.overlay import xattrs as _xattrs
from cowfs.overlay.fs import OverlayFs


class Overlay(OverlayFs):
    """The merged tree. See :class:`OverlayFs` for how it is made and which thread may call it.

    ``lookup`` and the calls that create inodes return nodes. The caller counts the references that it gives
    to the kernel in ``node.lookups``, and drops them with ``forget``.
    """

    lookup = _lookup.lookup
    resolve = _lookup.resolve
    readdir = _readdir.readdir
    listing = _readdir.listing
    look_through = _readdir.look_through
    create = _dir.create
    create_unnamed = _dir.create_unnamed
    mkdir = _dir.mkdir
    symlink = _dir.symlink
    mknod = _dir.mknod
    link = _dir.link
    unlink = _dir.unlink
    rmdir = _dir.rmdir
    rename = _rename.rename
    sweep = _whiteout.sweep
    nlink = _nlink.nlink
    setattr = _attr.setattr_
    readlink = _attr.readlink
    was_read = _attr.was_read
    must_be_allowed = _attr.must_be_allowed
    getxattr = _xattrs.getxattr
    listxattr = _xattrs.listxattr
    setxattr = _xattrs.setxattr
    removexattr = _xattrs.removexattr
    getflags = _flags.getflags
    setflags = _flags.setflags
    version = _flags.version
    birth = _flags.birth
    open = _file.open_file
    begin_lazily = _copyup.begin_lazily
    is_long_to_write = staticmethod(_file.is_long_to_write)
    is_long_to_cut = _file.is_long_to_cut
    attach = _file.attach
    write = _file.write
    will_be_written = _file.will_be_written
    seek = _file.seek
    release_handle = _file.release
    copy_up = _copyup.copy_up
    copy_up_chain = _copyup.copy_up_chain
    copy_up_meta = _copyup.copy_up_meta
    prepare_copy_up = _copyup.prepare
    needs_data = _whole.needs_data
