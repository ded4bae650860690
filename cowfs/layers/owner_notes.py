"""Notes of an unprivileged directory layer about the attributes that it cannot give to an inode.

The xattr ``user.overlay.cowfs.owner`` of a file or directory is ``UID:GID``, ``UID:GID:MODE`` or
``UID:GID:MODE:MAJOR:MINOR``; MODE is all of st_mode in octal. The mode is noted if the real one has more
bits, which lets the layer read a file that nobody may read, and if the inode has another type: an inode that
can have no xattr, or that only root can create, is stored as a regular file (for a symlink, with its target
in it).

The xattr ``user.overlay.cowfs.user`` of the layer's root is ``UID:GID``, the owner to show for inodes
without a note that really belong to the user of the layer.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, Protocol

from cowfs.errors import os_error
from cowfs.layers import acl
from cowfs.layers.base import Key
from cowfs.linux import files
from cowfs.types import Attr, own_attr

OWNER_XATTR = b"user.overlay.cowfs.owner"
USER_XATTR = b"user.overlay.cowfs.user"


class Note(NamedTuple):
    """The attributes to show for an inode instead of its real ones."""

    uid: int
    gid: int
    mode: int | None = None
    """All of st_mode; None for the real one."""
    rdev: int = 0


_FORM = re.compile(rb"(\d{1,10}):(\d{1,10})(?::([0-7]{5,6})(?::(\d{1,4}):(\d{1,7}))?)?")
_LAST_ID = (1 << 32) - 2
"""The largest user or group number. The next one means -1, no change, to chown(2)."""
_MAJORS, _MINORS = 1 << 12, 1 << 20
"""How many the kernel has (MINORBITS in linux/kdev_t.h)."""
_PERMISSIONS = 0o777
_SPECIAL = {stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK}
"""The types that a regular file can represent."""


def parse(value: bytes, real: int) -> Note:
    """Read a note on an inode of the mode *real*.

    ValueError for an invalid note. Anyone who can write to the inode can write the note, so do not trust it.
    """
    found = _FORM.fullmatch(value)
    if found is None:
        raise ValueError("no note")
    uid, gid, octal, major, minor = found.groups()
    note = Note(int(uid), int(gid))
    if max(note.uid, note.gid) > _LAST_ID:
        raise ValueError("nobody has such a number")
    if octal is None:
        return note
    mode, rdev = int(octal, 8), 0
    if (major is not None) != (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)):
        raise ValueError("a device without numbers, or numbers of no device")
    if major is not None:
        if int(major) >= _MAJORS or int(minor) >= _MINORS:
            raise ValueError("there is no such device")
        rdev = os.makedev(int(major), int(minor))
        if stat.S_ISCHR(mode) and not rdev:
            raise ValueError("a whiteout, which is no note's business")
    kind = stat.S_IFMT(mode)
    if kind != stat.S_IFMT(real) and not (stat.S_ISREG(real) and kind in _SPECIAL):
        raise ValueError("it cannot be of this type")
    return note._replace(mode=mode, rdev=rdev)


def to_bytes(note: Note) -> bytes:
    """Return the xattr value of a note."""
    text = f"{note.uid}:{note.gid}"
    if note.mode is not None:
        text += f":{note.mode:o}"
        if stat.S_ISCHR(note.mode) or stat.S_ISBLK(note.mode):
            text += f":{os.major(note.rdev)}:{os.minor(note.rdev)}"
    return text.encode()


def can_be_noted(mode: int) -> bool:
    """Whether an inode of this type can have user.* xattrs (xattr(7))."""
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def needed(mode: int) -> int:
    """Return the permissions that the layer itself needs."""
    if stat.S_ISDIR(mode):
        return stat.S_IRWXU
    return stat.S_IRUSR if stat.S_ISREG(mode) else 0


def shown(attr: Attr, note: Note) -> Attr:
    """Return *attr*, changed as the note says."""
    seen = own_attr(attr)
    seen.st_uid, seen.st_gid = note.uid, note.gid
    if note.mode is not None:
        seen.st_mode = note.mode
        if stat.S_IFMT(note.mode) != stat.S_IFMT(attr.st_mode):
            seen.st_rdev, seen.st_blocks = note.rdev, 0
    return seen


class Plain(Protocol):
    """The layer that has the notes: access to its real attributes."""

    root: Key

    def plain_stat(self, key: Key) -> Attr: ...
    def plain_chmod(self, key: Key, mode: int) -> None: ...
    def plain_chown(self, key: Key, uid: int, gid: int) -> None: ...
    def plain_write(self, directory: Key, name: bytes, content: bytes) -> Key: ...
    def become(self, key: Key, other: Key) -> None: ...
    def place(self, key: Key) -> tuple[Key, bytes] | None: ...
    def readlink(self, key: Key) -> bytes: ...
    def getxattr(self, key: Key, name: bytes) -> bytes: ...
    def setxattr(self, key: Key, name: bytes, value: bytes, flags: int = 0) -> None: ...
    def removexattr(self, key: Key, name: bytes) -> None: ...
    def utimens(self, key: Key, atime_ns: int, mtime_ns: int) -> None: ...
    def rename(
        self, source: tuple[Key, bytes], target: tuple[Key, bytes], flags: int = 0, moved: Key | None = None
    ) -> None: ...
    def unlink(self, directory: Key, name: bytes, key: Key | None) -> None: ...


_UNKNOWN = {errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.ENOENT}


class OwnerNotes:
    """Reads and writes the notes of a layer. All methods raise OSError as the layer does."""

    def __init__(self, layer: Plain) -> None:
        self._layer = layer
        self._me = os.geteuid()
        self._spare: Key | None = None
        self._numbers = itertools.count()
        self._user: Note | None = None
        self.owner: Callable[[int, int], tuple[int, int]] | None = None
        """Translates the real owner of an inode without a note, if the store has other numbers."""
        with suppress(OSError, ValueError):
            self._user = parse(layer.getxattr(layer.root, USER_XATTR), stat.S_IFDIR)

    def act_as_root(self, spare: Key, *, anew: bool) -> None:
        """From now on, keep every owner and every type, with stand-in files where a note is impossible.

        Create these in the directory *spare*; files left there may be removed. With *anew*, for an empty
        layer, files without a note belong to root.
        """
        self._spare = spare
        if anew and self._user is None:
            self._user = Note(0, 0)
            self._layer.setxattr(self._layer.root, USER_XATTR, to_bytes(self._user))

    def shown(self, key: Key, attr: Attr) -> Attr:
        """Return the attributes to show for an inode with the real attributes *attr*."""
        note = self._read(key, attr) or self._unnoted(attr)
        return attr if note is None else shown(attr, note)

    def _read(self, key: Key, attr: Attr) -> Note | None:
        if not can_be_noted(attr.st_mode):
            return None
        try:
            return parse(self._layer.getxattr(key, OWNER_XATTR), attr.st_mode)
        except ValueError:
            return None
        except OSError as failure:
            if failure.errno not in _UNKNOWN:
                raise
            return None

    def _unnoted(self, attr: Attr) -> Note | None:
        if self._user is not None and attr.st_uid == self._me:
            return self._user
        return None if self.owner is None else Note(*self.owner(attr.st_uid, attr.st_gid))

    def chmod(self, key: Key, mode: int) -> None:
        """Change the mode of an inode, but keep the real permissions that the layer needs."""
        real = self._layer.plain_stat(key)
        note = self._read(key, real)
        now = shown(real, note or self._unnoted(real) or Note(real.st_uid, real.st_gid))
        mode = stat.S_IFMT(now.st_mode) | stat.S_IMODE(mode)
        if stat.S_IFMT(mode) == stat.S_IFMT(real.st_mode):  # not a stand-in, whose real mode does not matter
            self._layer.plain_chmod(key, mode | needed(mode))
            real = self._layer.plain_stat(key)
        self._write(key, real, note is not None, Note(now.st_uid, now.st_gid, mode, now.st_rdev))

    def chown(self, key: Key, uid: int, gid: int) -> None:
        """Change the owner of an inode; -1 leaves the user or group unchanged."""
        real = self._layer.plain_stat(key)
        note = self._read(key, real)
        now = shown(real, note or self._unnoted(real) or Note(real.st_uid, real.st_gid))
        uid = now.st_uid if uid < 0 else uid
        gid = now.st_gid if gid < 0 else gid
        if (uid, gid) == (now.st_uid, now.st_gid):
            self._touch(key, real)
            return
        real = self._try_chown(key, real, uid, gid)
        self._write(key, real, note is not None, Note(uid, gid, now.st_mode, now.st_rdev))

    def _touch(self, key: Key, real: Attr) -> None:
        """Change nothing but the ctime."""
        if stat.S_ISLNK(real.st_mode):
            self._layer.plain_chown(key, real.st_uid, real.st_gid)
        else:
            self._layer.plain_chmod(key, real.st_mode)

    def shown_acl(self, key: Key, value: bytes) -> bytes:
        """Return the access ACL to show for a real one: the real mode can be another than the shown one."""
        note = self._read(key, self._layer.plain_stat(key))
        if note is None or note.mode is None:
            return value
        return acl.build(acl.with_mode(acl.parse(value), note.mode))

    def set_acl(self, key: Key, value: bytes, call: Callable[[], None]) -> None:
        """Set the access ACL *value* with *call*, which changes the real mode, and show that mode."""
        real = self._layer.plain_stat(key)
        note = self._read(key, real)
        now = shown(real, note or self._unnoted(real) or Note(real.st_uid, real.st_gid))
        call()
        real = self._layer.plain_stat(key)
        mode = real.st_mode
        if needed(mode) & ~mode:
            self._layer.plain_chmod(key, mode | needed(mode))
            real = self._layer.plain_stat(key)
        if stat.S_IFMT(now.st_mode) != stat.S_IFMT(mode):  # a stand-in
            entries = acl.parse(value)
            given = acl.mode_of(entries)[0] if entries else stat.S_IMODE(now.st_mode) & _PERMISSIONS
            mode = now.st_mode & ~_PERMISSIONS | given
        self._write(key, real, note is not None, Note(now.st_uid, now.st_gid, mode, now.st_rdev))

    def give(self, key: Key, parent: Key, real: Attr, uid: int, gid: int, added: int) -> None:
        """Give a new inode to *uid* and *gid*, or to the group of its set-group-ID directory.

        *real* are its attributes; *added* are permissions among them that it should not show.
        """
        if self._user is None and not added and (real.st_uid, real.st_gid) == (uid, gid):
            return
        gid = self._inherited(parent, gid)
        mode = real.st_mode & ~added
        real = self._try_chown(key, real, uid, gid)
        self._write(key, real, False, Note(uid, gid, mode, real.st_rdev))

    def _inherited(self, parent: Key, gid: int) -> int:
        above = self._layer.plain_stat(parent)
        return self.shown(parent, above).st_gid if above.st_mode & stat.S_ISGID else gid

    def _try_chown(self, key: Key, real: Attr, uid: int, gid: int) -> Attr:
        """Change the real owner if possible, that is, to another group of this process."""
        if self._user is not None or (real.st_uid, real.st_gid) == (uid, gid):
            return real
        try:
            self._layer.plain_chown(key, uid, gid)
        except OSError as failure:
            if failure.errno not in {errno.EPERM, errno.EINVAL}:  # EINVAL: not in the user namespace
                raise
            return real
        if real.st_mode & (stat.S_ISUID | stat.S_ISGID) and not stat.S_ISLNK(real.st_mode):
            self._layer.plain_chmod(key, real.st_mode)  # chown(2) cleared these bits
        return self._layer.plain_stat(key)

    def _write(self, key: Key, real: Attr, noted: bool, wanted: Note) -> None:
        """Note what differs from the real attributes; remove the note if nothing does."""
        natural = self._unnoted(real) or Note(real.st_uid, real.st_gid)
        if wanted.mode == real.st_mode:
            wanted = wanted._replace(mode=None)
        if wanted.mode is None and wanted[:2] == natural[:2]:
            if noted:
                self._layer.removexattr(key, OWNER_XATTR)
        elif can_be_noted(real.st_mode):
            self._layer.setxattr(key, OWNER_XATTR, to_bytes(wanted))
        elif self._spare is not None and not (stat.S_ISCHR(real.st_mode) and real.st_rdev == 0):
            self._replace(key, real, wanted._replace(mode=real.st_mode, rdev=real.st_rdev))
        # Else it shows the real owner: it is a whiteout, or other owners are not kept (docs/semantics.md).

    # --- stand-ins

    def stand_in(self, key: Key) -> None:
        """Replace an inode that can have no note by a stand-in. Call it while the inode has only one name."""
        real = self._layer.plain_stat(key)
        is_whiteout = stat.S_ISCHR(real.st_mode) and real.st_rdev == 0
        if self._spare is None or can_be_noted(real.st_mode) or is_whiteout or real.st_nlink != 1:
            return
        now = self.shown(key, real)
        self._replace(key, real, Note(now.st_uid, now.st_gid, real.st_mode, real.st_rdev))

    def special(self, directory: Key, name: bytes, mode: int, rdev: int, uid: int, gid: int) -> Key | None:
        """Create a stand-in for a device, which only root may create; None if the caller should try to create
        the device itself."""
        device = stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and rdev != 0)
        if self._spare is None or not device:
            return None
        note = Note(uid, self._inherited(directory, gid), mode, rdev)
        return self._install_stand_in(note, (directory, name), files.RENAME_NOREPLACE)

    def _replace(self, key: Key, real: Attr, note: Note) -> None:
        """Replace an inode that can have no note by a stand-in."""
        place = self._layer.place(key)
        if place is None:
            return  # its last name is removed, so nobody sees it
        if real.st_nlink > 1:
            raise os_error(errno.EPERM, place[1])
        content = self._layer.readlink(key) if stat.S_ISLNK(real.st_mode) else b""
        self._layer.become(key, self._install_stand_in(note, place, 0, content, real))

    def _install_stand_in(
        self,
        note: Note,
        place: tuple[Key, bytes],
        flags: int,
        content: bytes = b"",
        times: Attr | None = None,
    ) -> Key:
        """Create a stand-in and put it into place; return its key."""
        name = b"#special%x" % next(self._numbers)
        layer, spare = self._layer, self._spare
        made = layer.plain_write(spare, name, content)
        try:
            layer.setxattr(made, OWNER_XATTR, to_bytes(note))
            if times is not None:
                layer.utimens(made, times.st_atime_ns, times.st_mtime_ns)
            layer.rename((spare, name), place, flags, made)
        except OSError:
            with suppress(OSError):
                layer.unlink(spare, name, None)
            raise
        return made
