"""Extended attributes (the kernel's xattrs.c).

The union's own (``trusted.overlay.*`` or ``user.overlay.*``) are hidden. Somebody who sets one of that
name, an overlay inside ours say, has it kept under an escaped name, as the kernel does since 6.7:
``trusted.overlay.x`` is stored as ``trusted.overlay.overlay.x``.
"""

from __future__ import annotations

import errno

from cowfs.layers.base import Key, LowerLayer
from cowfs.overlay.copyup import copy_up_meta
from cowfs.overlay.node import Node
from cowfs.overlay.state import State, error

_ACLS = b"system.posix_acl_"


def getxattr(fs: State, node: Node, name: bytes) -> bytes:
    """Return an attribute's value; ENODATA when there is none."""
    layer, key = _top(fs, node)
    try:
        return layer.getxattr(key, _stored(fs, name))
    except OSError as failure:
        # The kernel reads the ACL to check permissions, and takes any errno but ENODATA for the result.
        if failure.errno == errno.EOPNOTSUPP and name.startswith(_ACLS):
            raise error(errno.ENODATA, node.name) from None
        raise


def listxattr(fs: State, node: Node) -> list[bytes]:
    """Return the names of all attributes but the union's own."""
    layer, key = _top(fs, node)
    prefix = fs.options.xattr_prefix
    names = []
    for name in layer.listxattr(key):
        if name.startswith(fs.escaped):
            names.append(prefix + name[len(fs.escaped) :])
        elif not name.startswith(prefix):
            names.append(name)
    return names


def setxattr(fs: State, node: Node, name: bytes, value: bytes, flags: int = 0) -> None:
    """Set an attribute. *flags*: XATTR_CREATE, XATTR_REPLACE."""
    copy_up_meta(fs, node)
    fs.upper.setxattr(node.upper, _stored(fs, name), value, flags)


def removexattr(fs: State, node: Node, name: bytes) -> None:
    """Remove an attribute; ENODATA, and no copy-up, when there is none."""
    getxattr(fs, node, name)
    copy_up_meta(fs, node)
    fs.upper.removexattr(node.upper, _stored(fs, name))


def _stored(fs: State, name: bytes) -> bytes:
    prefix = fs.options.xattr_prefix
    return fs.escaped + name[len(prefix) :] if name.startswith(prefix) else name


def _top(fs: State, node: Node) -> tuple[LowerLayer, Key]:
    if node.upper is not None:
        return fs.upper, node.upper
    if not node.lowers:
        raise error(errno.ESTALE, node.name)
    layer, key = node.lowers[0]
    return fs.lowers[layer], key
