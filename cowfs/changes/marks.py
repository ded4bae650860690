"""The overlay's own notes in a layer, as the kernel's overlayfs writes them (its namei.c, util.c)."""

from __future__ import annotations

import errno
import stat

from cowfs.layers.base import Key, LowerLayer
from cowfs.overlay import partial, redirect
from cowfs.types import Attr

_NO_XATTRS = {errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES}

_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


def type_name(mode: int) -> str:
    """Return the word of :class:`cowfs.types.Change` for a file type."""
    return _TYPES.get(stat.S_IFMT(mode), "file")


def is_whiteout(attr: Attr) -> bool:
    """Whether an entry of a layer hides the name below: a character device 0:0."""
    return attr.st_rdev == 0 and stat.S_ISCHR(attr.st_mode)


class Marks:
    """Reads the notes that are kept in xattrs under *prefix*, and those that users see beside them."""

    __slots__ = ("_escaped", "_metacopy", "_opaque", "_partial", "_prefix", "_redirect")

    def __init__(self, prefix: bytes) -> None:
        self._prefix = prefix
        self._escaped = prefix + b"overlay."
        self._opaque = prefix + b"opaque"
        self._redirect = prefix + b"redirect"
        self._metacopy = prefix + b"metacopy"
        self._partial = prefix + b"cowfs.partial"

    def opaque(self, layer: LowerLayer, key: Key) -> bool:
        """Whether a directory hides everything below it."""
        return _get(layer, key, self._opaque) == b"y"

    def metacopy(self, layer: LowerLayer, key: Key) -> bool:
        """Whether a file has its attributes here and its data in a layer further down."""
        return _get(layer, key, self._metacopy) is not None

    def partial(self, layer: LowerLayer, key: Key) -> partial.Note | None:
        """What is noted of a file with some of its data here and the rest in a layer below, or None."""
        value = _get(layer, key, self._partial) if self.metacopy(layer, key) else None
        return None if value is None else partial.decode(value)

    def redirect(self, layer: LowerLayer, key: Key) -> bytes | None:
        """Return where an inode is found in the layers below: ``/from/the/root`` or ``another-name``.

        Raises EINVAL for a value that is neither.
        """
        note = self.partial(layer, key)
        value = _get(layer, key, self._redirect) if note is None else note.path
        if value is None:
            return None
        path = redirect.parse(value)
        if any(map(redirect.leads_out, redirect.names(path))):
            raise redirect.refused(errno.EINVAL, value)
        return path

    def shown_xattrs(self, layer: LowerLayer, key: Key) -> dict[bytes, bytes]:
        """Return the xattrs that the merged tree shows, empty where the layer has none.

        The overlay's own are hidden. Escaped ones (``PREFIXoverlay.NAME``, shown as ``PREFIXNAME``) are
        users', and are returned under the names that they have in the layer.
        """
        try:
            names = layer.listxattr(key)
        except OSError as error:
            if error.errno in _NO_XATTRS:
                return {}
            raise
        found = {}
        for name in names:
            if name.startswith(self._prefix) and not name.startswith(self._escaped):
                continue
            value = _get(layer, key, name)
            if value is not None:
                found[name] = value
        return found


def _get(layer: LowerLayer, key: Key, name: bytes) -> bytes | None:
    try:
        return layer.getxattr(key, name)
    except OSError as error:
        if error.errno in _NO_XATTRS:
            return None
        raise


def below(base: bytes, redirect: bytes) -> bytes:
    """Return the path in the lowers that *redirect* means, for a child of the directory *base*."""
    return redirect[1:] if redirect.startswith(b"/") else join(base, redirect)


def join(directory: bytes, name: bytes) -> bytes:
    """Return the path of *name* in a directory; the root is the empty path."""
    return directory + b"/" + name if directory else name
