"""The extended attributes of overlayfs: the one place that parses and makes their names and values.

They tell what an inode of a layer means for the layers below. The names begin with ``trusted.overlay.``,
or with ``user.overlay.`` where trusted.* is not allowed (the kernel's *userxattr*). The kernel's own are
those of ``enum ovl_xattr`` in fs/overlayfs/overlayfs.h; cowfs adds some that begin with ``cowfs.``. All
functions here are pure; other modules read and write layers.
"""

from __future__ import annotations

import errno
import re
import stat
import struct
import sys
from collections.abc import Mapping
from typing import NamedTuple

from cowfs.types import Attr, FileHandle, own_attr

NAME_MAX = 255
TRUSTED, USER = b"trusted.overlay.", b"user.overlay."
"""How the names begin: of root's stores and all images, and of a user's directories."""

OPAQUE = b"y"
IMPURE = b"y"
METACOPY = b""

Notes = Mapping[bytes, bytes]
"""The overlay's own attributes of an inode, by full name."""


class XattrFormat:
    """The attributes with one prefix: their full names, and what they mean."""

    __slots__ = (
        "device",
        "escaped",
        "first",
        "impure",
        "layer",
        "links",
        "metacopy",
        "nlink",
        "notes",
        "opaque",
        "origin",
        "partial",
        "place",
        "prefix",
        "protattr",
        "redirect",
        "whiteout",
    )

    def __init__(self, prefix: bytes) -> None:
        self.prefix = prefix
        self.escaped = prefix + b"overlay."
        """The prefix of a name that an overlay inside ours uses, as our layers store it."""
        self.opaque = prefix + b"opaque"
        self.redirect = prefix + b"redirect"
        self.metacopy = prefix + b"metacopy"
        self.origin = prefix + b"origin"
        self.impure = prefix + b"impure"
        self.nlink = prefix + b"nlink"
        self.whiteout = prefix + b"whiteout"
        """On an empty file: it is a whiteout, as in a layer of an overlay that is in a layer of another."""
        self.protattr = prefix + b"protattr"
        """Which of the flags i and a of chattr(1) the inode has."""
        # The following are cowfs's own.
        self.links = prefix + b"cowfs.links"
        """The nlink of the lower inode that a hard link was."""
        self.place = prefix + b"cowfs.place"
        """Which of the inodes with the handle of the origin it was."""
        self.layer = prefix + b"cowfs.layer"
        """Which lower an origin means, if not the first."""
        self.first = prefix + b"cowfs.first"
        """On what was copied up from an upper that was frozen: the origin that it had there."""
        self.device = prefix + b"cowfs.device"
        """On an empty file: it is shown as a character device 0:0, which would itself be a whiteout."""
        self.partial = prefix + b"cowfs.partial"
        """On a file: a :class:`Partial`. On the directory of the store's own files: the list of these."""
        self.notes = frozenset(
            getattr(self, name) for name in {*self.__slots__} - {"escaped", "notes", "prefix"}
        )
        """All of these."""

    # --- names

    def is_own(self, name: bytes) -> bool:
        """Whether an attribute of a layer belongs to the overlay, and is hidden from users."""
        return name.startswith(self.prefix) and not name.startswith(self.escaped)

    def shown(self, name: bytes) -> bytes | None:
        """Return the name under which users see an attribute of a layer; None if it is hidden from them."""
        if name.startswith(self.escaped):
            return self.prefix + name[len(self.escaped) :]
        return None if name.startswith(self.prefix) else name

    def stored(self, name: bytes) -> bytes:
        """Return the name under which a layer stores the attribute *name* of users
        (ovl_xattr_escape_name())."""
        return self.escaped + name[len(self.prefix) :] if name.startswith(self.prefix) else name

    # --- what the attributes of an inode mean

    def seen(self, notes: Notes, attr: Attr) -> Attr:
        """Return the attributes that users see of an upper inode with these notes."""
        return as_device(attr) if self.device in notes and stat.S_ISREG(attr.st_mode) else attr

    def is_opaque(self, notes: Notes) -> bool:
        """Whether a directory hides everything below it."""
        return notes.get(self.opaque) == OPAQUE

    def is_metacopy(self, notes: Notes, attr: Attr) -> bool:
        """Whether a file has its attributes here and its data in a layer further down."""
        return self.metacopy in notes and stat.S_ISREG(attr.st_mode)

    def redirect_of(self, notes: Notes, *, is_upper: bool = False) -> bytes | None:
        """Return where the layers below have an inode (:func:`parse_redirect`); None: under its own name.

        A partial file is an error except in an upper layer: nothing else can combine its data.
        """
        if is_upper and self.partial in notes and self.metacopy in notes:
            return parse_partial(notes[self.partial]).path
        value = notes.get(self.redirect)
        return None if value is None else parse_redirect(value)

    def partial_of(self, notes: Notes) -> Partial | None:
        """Return which of its data a metacopy contains; None if it contains none."""
        value = notes.get(self.partial)
        return None if value is None else parse_partial(value)


def is_whiteout_device(attr: Attr) -> bool:
    """Whether an entry is a character device 0:0, which hides its name in the layers below.

    See also :func:`cowfs.overlay.stack.is_whiteout`.
    """
    return attr.st_rdev == 0 and stat.S_ISCHR(attr.st_mode)


def as_device(attr: Attr) -> Attr:
    """Return the attributes of the character device 0:0 that an empty file of the upper represents."""
    device = own_attr(attr)
    device.st_mode = stat.S_IFCHR | stat.S_IMODE(attr.st_mode)
    device.st_rdev = device.st_size = 0
    device.st_gen = getattr(attr, "st_gen", 0)
    return device


# --- redirects


class RedirectError(OSError):
    """A redirect that cannot be followed."""

    def __init__(self, code: int, value: bytes) -> None:
        super().__init__(code, f"invalid redirect: {value[:NAME_MAX]!r}")
        self.value = value


def parse_redirect(value: bytes) -> bytes:
    """Return a redirect: a name in the same directory, or a path from the root, with a leading slash.

    EINVAL (:class:`RedirectError`) if it is empty, has empty parts, or a slash in a name. As in the kernel,
    it ends before the first NUL (ovl_get_redirect_xattr() in fs/overlayfs/namei.c).
    """
    redirect = value.partition(b"\0")[0]
    parts = redirect[1:].split(b"/") if redirect.startswith(b"/") else [redirect]
    if not value or (b"" in parts and redirect) or (parts == [redirect] and b"/" in redirect):
        raise RedirectError(errno.EINVAL, value)
    return redirect


def names_of_redirect(redirect: bytes) -> tuple[bytes, ...]:
    """Return the names in a redirect. A leading slash means that it starts at the root."""
    return tuple(redirect[1:].split(b"/")) if redirect.startswith(b"/") else (redirect,)


def may_exist(name: bytes) -> bool:
    """Whether a name can be looked up. EACCES for "", ``.`` and ``..`` (lookup_one() in fs/namei.c)."""
    if name in _NO_NAMES:
        raise RedirectError(errno.EACCES, name)
    return len(name) <= NAME_MAX


def leads_somewhere(value: bytes) -> bool:
    """Whether a redirect can be followed."""
    try:
        parts = names_of_redirect(parse_redirect(value))
    except RedirectError:
        return False
    return not _NO_NAMES.intersection(parts)


_NO_NAMES = frozenset({b"", b".", b".."})


# --- origins
#
# The format is struct ovl_fh / ovl_fb of fs/overlayfs/overlayfs.h: version 0, magic 0xfb, the total length,
# flags, the type of the file handle, the filesystem's UUID, and the handle itself.

_HEAD = struct.Struct("<BBBBB16s")  # version, magic, len, flags, type, uuid
_VERSION, _MAGIC = 0, 0xFB
_BIG_ENDIAN = 1  # OVL_FH_FLAG_BIG_ENDIAN
_CPU = _BIG_ENDIAN if sys.byteorder == "big" else 0


def make_origin(handle: FileHandle) -> bytes:
    """Return the value that records that an inode was copied up from the one with this handle."""
    size = _HEAD.size + len(handle.data)
    return _HEAD.pack(_VERSION, _MAGIC, size, _CPU, handle.type, handle.uuid) + handle.data


def parse_origin(value: bytes) -> FileHandle | None:
    """Return the handle in an origin; None if its form is unknown, or if it is empty.

    An empty origin means that the inode was copied up from a filesystem without handles.
    """
    if len(value) < _HEAD.size:
        return None
    version, magic, size, flags, kind, uuid = _HEAD.unpack_from(value)
    if version != _VERSION or magic != _MAGIC or size != len(value) or flags & _BIG_ENDIAN != _CPU:
        return None
    return FileHandle(kind, value[_HEAD.size :], uuid)


def index_name(origin: bytes) -> bytes:
    """Return the name that a hard-linked inode with this origin has in the index."""
    return origin.hex().encode()


# --- link counts

_NLINK = re.compile(rb"([LU])([+-]\d{1,9})")


def make_nlink(base: bytes, difference: int) -> bytes:
    """Return the note for a link count of *difference* more than that of *base*, ``U``pper or ``L``ower."""
    return b"%c%+d" % (base, difference)


def parse_nlink(value: bytes) -> tuple[bytes, int] | None:
    """Return the base and the difference in a note of :func:`make_nlink`; None for an invalid one."""
    found = _NLINK.fullmatch(value)
    return None if found is None else (found[1], int(found[2]))


def parse_count(value: bytes) -> int | None:
    """Return the number in a note; None if it is invalid or too large."""
    return int(value) if value.isdigit() and len(value) < 10 else None


# --- partial files (cowfs.overlay.partial)

PARTIAL_METACOPY = b"\x01"
"""Too short to be one: EIO (ovl_check_metacopy_xattr() in fs/overlayfs/util.c, since Linux 6.6)."""
PARTIAL_REDIRECT = b"not whole yet/mount it with cowfs"
"""No name, for the slash, and no path from the root either: EINVAL (ovl_get_redirect_xattr(), since 4.19)."""


class Partial(NamedTuple):
    """The contents of the note that makes a file partial."""

    end: int
    """This many bytes of the lower show."""
    mtime_ns: int
    """When the lower was last written to."""
    path: bytes
    """Where it is in the lowers, from their root, with a leading slash."""

    def is_of(self, attr: Attr) -> bool:
        """Whether a lower file is unchanged since the copy-up began."""
        return attr.st_size >= self.end and attr.st_mtime_ns == self.mtime_ns


def make_partial(partial: Partial) -> bytes:
    """Return the value of the attribute."""
    return b"%d:%d:%s" % partial


def parse_partial(value: bytes) -> Partial:
    """Return the contents of the attribute. EINVAL if it is invalid."""
    end, _, rest = value.partition(b":")
    mtime, colon, path = rest.partition(b":")
    if not (end.isdigit() and mtime.removeprefix(b"-").isdigit() and colon and len(end) < 20 > len(mtime)):
        raise OSError(errno.EINVAL, "no note of a partial file")
    if not path.startswith(b"/"):
        raise OSError(errno.EINVAL, "no note of a partial file")
    return Partial(int(end), int(mtime), parse_redirect(path))
