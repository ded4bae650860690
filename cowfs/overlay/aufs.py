"""A store of aufs, shown as one of overlayfs, to be read and written.

The root of an aufs branch is the upper itself; aufs keeps its own files under names there that begin with
``.wh..wh.``, and hides these. Our files are in such a directory, too::

    .wh..wh.aufs        the file that whiteouts are links of
    .wh..wh.plnk/       links that aufs kept for hard links of lowers while it was mounted
    .wh..wh.orph/       what was deleted while it was open
    .wh..wh.cowfs/      work/ and cowfs/, as in any store
    everything else     the changes

To who opens the store its root is that directory, with the branch as ``upper`` in it.

A whiteout beats the name beside it, and that makes what is done atomic: who deletes makes the whiteout first,
and who makes a name over a whiteout takes that away last. A rename is two steps, or more; a layer that can do
several at once (an image that we write ourselves) does them so. Elsewhere a rename that is cut short may
leave a deleted lower name shown again, and never takes a file away.

A name beneath a whiteout is what a deletion left that was cut short. It goes before the whiteout does.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace

from cowfs.layers.base import File, Key, NamesJob, UpperLayer, together
from cowfs.linux.files import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from cowfs.overlay.named_whiteouts import META, OPAQUE_NAME, PREFIX, NamedWhiteouts, Whiteout, hidden_by
from cowfs.overlay.xattr_format import XattrFormat, is_whiteout_device
from cowfs.types import Atime, Attr, AttrData, DirEntry, FsStats, own_attr

PRIVATE = b".wh..wh.cowfs"
BASE, LEFT = b".wh..wh.aufs", (b".wh..wh.plnk", b".wh..wh.orph")
UPPER, WORK = b"upper", b"work"
_LOST = b"lost+found"
NAME_MAX = 242
"""Longer names do not exist to aufs: it puts a prefix and a number before some (AUFS_MAX_NAMELEN)."""
_MODE = 0o444
_DEVICE = b"c0:0"


class _Nothing:
    """The key of the root, or of work/, of a store without any of our files yet."""

    __slots__ = ()


class AufsStore(NamedWhiteouts):
    """The branch that *inner* has at its root, as an upper layer with the whiteouts of overlayfs."""

    def __init__(self, inner: UpperLayer) -> None:
        super().__init__(inner, "aufs")
        self.upper = inner
        self.branch: Key = inner.root
        self.temporaries: Key = None
        """The work directory, if known: its contents count only after they have left it."""
        self.fill_unit = 0  # a file that is copied up bit by bit needs notes
        self._base: Key = None
        self._hidden_directories: int | None = None
        self._stored: dict[bytes, bytes] = {}
        self._names_of: XattrFormat | None = None
        self.statfs = self._room
        self.note_reads = inner.note_reads
        self.was_read = inner.was_read
        self.truncate = inner.truncate
        self.chmod = inner.chmod
        self.chown = inner.chown
        self.utimens = inner.utimens
        self.numbered = inner.numbered
        self.open_directory = inner.open_directory
        self.sync = inner.sync
        self.hurry = inner.hurry
        self.relieve = inner.relieve
        found = inner.lookup(self.branch, PRIVATE)
        self.root = self._own = _Nothing() if found is None else found[0]

    def _owner(self) -> tuple[int, int]:
        attr = self.upper.stat(self.branch)
        return attr.st_uid, attr.st_gid

    @property
    def later(self) -> Callable[[Callable[[], None]], None]:
        return self.upper.later

    @later.setter
    def later(self, value: Callable[[Callable[[], None]], None]) -> None:
        self.upper.later = value

    @property
    def pressed(self) -> Sequence[int]:
        return self.upper.pressed

    @pressed.setter
    def pressed(self, value: Sequence[int]) -> None:
        self.upper.pressed = value

    @property
    def atime(self) -> Atime:
        return self.upper.atime

    @atime.setter
    def atime(self, value: Atime) -> None:
        self.upper.atime = value

    def together(self) -> AbstractContextManager[object]:
        """The changes in the block reach the disk together, where the filesystem supports that."""
        return together(self.upper)

    # --- reading

    def lookup(self, directory: Key, name: bytes) -> tuple[Key, Attr] | None:
        if directory is self._own:
            if name == UPPER:
                return self.branch, self._stat_branch()
            found = None if isinstance(directory, _Nothing) else self.upper.lookup(directory, name)
            return (_Nothing(), self.upper.stat(self.branch)) if found is None and name == WORK else found
        if isinstance(directory, _Nothing):
            return None
        if directory == self.branch and name == _LOST:
            return None
        found = super().lookup(directory, name)
        if found is not None and is_whiteout_device(found[1]) and not isinstance(found[0], Whiteout):
            return found[0], _as_file(found[1])
        return found

    def readdir(self, directory: Key) -> list[DirEntry]:
        if directory is self._own:
            below = [] if isinstance(directory, _Nothing) else self.upper.readdir(directory)
            ours = [DirEntry(name, stat.S_IFDIR) for name in (UPPER, WORK)]
            return [*ours, *(entry for entry in below if entry.name != WORK)]
        if isinstance(directory, _Nothing):
            return []
        entries = super().readdir(directory)
        return [one for one in entries if one.name != _LOST] if directory == self.branch else entries

    def names(self, directory: Key) -> list[bytes] | NamesJob:
        if directory == self.branch or directory is self._own:
            return [entry.name for entry in self.readdir(directory)]
        return super().names(directory)

    def stat(self, key: Key) -> Attr:
        if key is self.branch or isinstance(key, _Nothing):
            return self._stat_branch()
        attr = super().stat(key)
        return _as_file(attr) if is_whiteout_device(attr) and not isinstance(key, Whiteout) else attr

    def _stat_branch(self) -> Attr:
        """Return the attributes of the branch without the directories in it that do not show."""
        attr = self.upper.stat(self.branch)
        if self._hidden_directories is None:
            entries = self.upper.readdir(self.branch)
            names = [one.name for one in entries if one.name.startswith(META) or one.name == _LOST]
            found = [self.upper.lookup(self.branch, name) for name in names]
            self._hidden_directories = sum(one is not None and stat.S_ISDIR(one[1].st_mode) for one in found)
        if attr.st_nlink <= 2:  # nobody counts them
            return attr
        if isinstance(attr, AttrData):
            return replace(attr, st_nlink=attr.st_nlink - self._hidden_directories)
        shown = own_attr(attr)
        shown.st_nlink -= self._hidden_directories
        return shown

    def listxattr(self, key: Key) -> list[bytes]:
        if isinstance(key, _Nothing):
            return []
        names = super().listxattr(key)
        if self._is_device(key):
            names = [*names, self.format.device]
        if any(b".cowfs." in name for name in names):
            called = {stored: name for name, stored in self._kept().items()}
            return [called.get(name, name) for name in names]
        return names

    def getxattr(self, key: Key, name: bytes) -> bytes:
        if isinstance(key, _Nothing):
            raise _error(errno.ENODATA)
        if name == self.format.device and self._is_device(key):
            return _DEVICE
        stored = self._kept().get(name)
        if stored is not None and not isinstance(key, Whiteout):
            return self.upper.getxattr(key, stored)
        return super().getxattr(key, name)

    def _is_device(self, key: Key) -> bool:
        """Whether an inode is a device 0:0, which hides nothing here: the union has a file in its place."""
        return not isinstance(key, Whiteout) and is_whiteout_device(self.upper.stat(key))

    def _kept(self) -> dict[bytes, bytes]:
        """Return the names under which the branch keeps those overlayfs attributes that affect only inode
        numbers, link counts while it is mounted here, and the flags i and a of chattr(1).
        """
        known = self.format
        if self._names_of is not known:
            notes = (known.origin, known.layer, known.place, known.links, known.nlink, known.protattr)
            prefix = known.prefix.removesuffix(b"overlay.") + b"cowfs."
            self._stored = {note: prefix + note.rpartition(b".")[2] for note in notes}
            self._names_of = known
        return self._stored

    def forget(self, key: Key) -> None:
        if key is not self.branch and key is not self._own and not isinstance(key, _Nothing):
            super().forget(key)

    def _room(self) -> FsStats:
        return replace(self.upper.statfs(), namemax=NAME_MAX)

    # --- names

    def _must_be_free(self, directory: Key, name: bytes) -> None:
        """EPERM for a name that is not for users, EEXIST where a whiteout is: that stands there."""
        self._must_be_allowed(directory, name)
        if len(name) > NAME_MAX:
            raise _error(errno.ENAMETOOLONG)
        if self._whiteout(directory, name) is not None:
            raise _error(errno.EEXIST)

    def _must_be_allowed(self, directory: Key, name: bytes) -> None:
        """EPERM for a name that is not for users: what stands there would not show, nor hide anything."""
        if name.startswith(PREFIX) or (name == _LOST and directory == self.branch):
            raise _error(errno.EPERM)

    def create(self, directory: Key, name: bytes, mode: int, uid: int, gid: int) -> tuple[Key, File]:
        self._must_be_free(directory, name)
        return self.upper.create(directory, name, mode, uid, gid)

    def mkdir(self, directory: Key, name: bytes, mode: int, uid: int, gid: int) -> Key:
        if isinstance(directory, _Nothing):
            directory = self._begin(uid, gid)
        self._must_be_free(directory, name)
        return self.upper.mkdir(directory, name, mode, uid, gid)

    def _begin(self, uid: int, gid: int) -> Key:
        """Create our own directory if it is missing, and return it."""
        if isinstance(self._own, _Nothing):
            with self._keeping_times():
                self.upper.forget(self.upper.mkdir(self.branch, PRIVATE, 0o755, uid, gid))
            found = self.upper.lookup(self.branch, PRIVATE)
            if found is None:
                raise _error(errno.ENOENT)
            self._hidden_directories = None
            self.root = self._own = found[0]
            self.upper.forget(self.upper.mkdir(self._own, WORK, 0o755, uid, gid))
        return self._own

    def symlink(self, directory: Key, name: bytes, target: bytes, uid: int, gid: int) -> Key:
        self._must_be_free(directory, name)
        return self.upper.symlink(directory, name, target, uid, gid)

    def mknod(self, directory: Key, name: bytes, mode: int, rdev: int, uid: int, gid: int) -> Key:
        if not stat.S_ISCHR(mode) or rdev:
            self._must_be_free(directory, name)
            return self.upper.mknod(directory, name, mode, rdev, uid, gid)
        self._hide_free(directory, name)
        made = self._whiteout(directory, name)
        if made is None:
            raise _error(errno.ENOENT)
        return made[0]

    def link(self, key: Key, directory: Key, name: bytes) -> None:
        if isinstance(key, Whiteout):
            self._hide_free(directory, name)
            return
        self._must_be_free(directory, name)
        self.upper.link(key, directory, name)

    def _hide_free(self, directory: Key, name: bytes) -> None:
        """Make a whiteout. EPERM for a name that is not for users, EEXIST if the name is there."""
        self._must_be_allowed(directory, name)
        found = self.upper.lookup(directory, name)
        if found is not None:
            self.upper.forget(found[0])
            raise _error(errno.EEXIST)
        self._put(directory, PREFIX + name)

    def _put(self, directory: Key, name: bytes) -> None:
        """Make another link to the file of all whiteouts, or to a new one when that has too many."""
        if self._base is None:
            found = self.upper.lookup(self.branch, BASE)
            if found is None:
                with self._keeping_times():
                    self._base = self._make(self.branch, BASE)
            elif stat.S_ISREG(found[1].st_mode):
                self._base = found[0]
        try:
            if self._base is None:
                raise _error(errno.EMLINK)
            self.upper.link(self._base, directory, name)
        except OSError as failure:
            if failure.errno not in _NO_LINK:
                raise
            if self._base is not None:
                self.upper.forget(self._base)
            self._base = self._make(directory, name)  # the next are names of this one

    @contextmanager
    def _keeping_times(self) -> Iterator[None]:
        """Restore the times of the branch after the block: its changes are not for users."""
        before = self.upper.stat(self.branch)
        with self.together():
            yield
            self.upper.utimens(self.branch, before.st_atime_ns, before.st_mtime_ns)

    def _make(self, directory: Key, name: bytes) -> Key:
        key, file = self.upper.create(directory, name, _MODE, *self._owner())
        file.close()
        return key

    def _remove_covered(self, directory: Key, name: bytes) -> None:
        """Remove what a whiteout covers in its own layer, however deep: a deletion that was cut short."""
        waiting: list[tuple[Key, bytes, Key | None]] = [(directory, name, None)]
        while waiting:
            parent, name, emptied = waiting.pop()
            if emptied is not None:
                self.upper.forget(emptied)
                self.upper.rmdir(parent, name, None)
                continue
            found = self.upper.lookup(parent, name)
            if found is None:
                continue
            key, attr = found
            if stat.S_ISDIR(attr.st_mode):
                waiting.append((parent, name, key))
                waiting.extend((key, entry.name, None) for entry in self.upper.readdir(key))
            else:
                self.upper.forget(key)
                self.upper.unlink(parent, name, None)

    def unlink(self, directory: Key, name: bytes, key: Key | None) -> None:
        if self._whiteout(directory, name) is None:
            self.upper.unlink(directory, name, key)
            return
        self._remove_covered(directory, name)
        self.upper.unlink(directory, PREFIX + name, None)

    def rmdir(self, directory: Key, name: bytes, key: Key | None) -> None:
        with self.together():
            self._make_bare(directory, name)
            self.upper.rmdir(directory, name, key)

    def _make_bare(self, directory: Key, name: bytes) -> None:
        """Let nothing be in a directory in which users see nothing, and that is about to go: that it is
        opaque is said by a name, and aufs leaves names in it when it crashes."""
        found = self.upper.lookup(directory, name)
        if found is None:
            return
        key, attr = found
        names = [entry.name for entry in self.upper.readdir(key)] if stat.S_ISDIR(attr.st_mode) else []
        if all(each.startswith(PREFIX) and hidden_by(each) is None for each in names):
            for each in names:
                self._remove_covered(key, each)
        self.upper.forget(key)

    # --- renaming

    def rename(
        self,
        source: tuple[Key, bytes],
        target: tuple[Key, bytes],
        flags: int = 0,
        moved: Key | None = None,
        replaced: Key | None = None,
    ) -> None:
        self._must_be_allowed(*target)
        if len(target[1]) > NAME_MAX:
            raise _error(errno.ENAMETOOLONG)
        with self.together():
            if self._whiteout(*source) is not None:
                self._move_whiteout(source, target, flags, replaced)
            elif self._whiteout(*target) is not None:
                self._move_over_whiteout(source, target, flags, moved)
            else:
                if not flags & (RENAME_EXCHANGE | RENAME_NOREPLACE):
                    self._make_bare(*target)
                self.upper.rename(source, target, flags & ~RENAME_WHITEOUT, moved, replaced)
            if flags & RENAME_WHITEOUT:
                self._put(source[0], PREFIX + source[1])

    def _move_whiteout(
        self, source: tuple[Key, bytes], target: tuple[Key, bytes], flags: int, replaced: Key | None
    ) -> None:
        """Let a name be deleted: what stands there is hidden first, then removed, or exchanged."""
        hidden = self.upper.lookup(*target)
        self.upper.rename(_covering(source), _covering(target))
        if hidden is None:
            return
        self.upper.forget(hidden[0])
        if flags & RENAME_EXCHANGE:
            self.upper.rename(target, source, moved=replaced)
        else:
            self.upper.unlink(*target, replaced)

    def _move_over_whiteout(
        self, source: tuple[Key, bytes], target: tuple[Key, bytes], flags: int, moved: Key | None
    ) -> None:
        if flags & RENAME_NOREPLACE:
            raise _error(errno.EEXIST)
        self._remove_covered(*target)
        is_new = self.temporaries is not None and source[0] == self.temporaries
        if is_new:  # the name is there when the whiteout goes, and not before
            self.upper.rename(source, target, moved=moved)
        self.upper.unlink(target[0], PREFIX + target[1], None)
        if not is_new:
            self.upper.rename(source, target, moved=moved)
        if flags & RENAME_EXCHANGE:
            self._put(source[0], PREFIX + source[1])

    # --- attributes

    def setxattr(self, key: Key, name: bytes, value: bytes, flags: int = 0) -> None:
        """EOPNOTSUPP for what only overlayfs knows: redirects, metacopies."""
        name = self._kept().get(name, name)
        if name not in self.format.notes:
            self.upper.setxattr(key, name, value, flags)
        elif (
            name != self.format.opaque
            or isinstance(key, Whiteout)
            or not stat.S_ISDIR(self.upper.stat(key).st_mode)
        ):
            raise _error(errno.EOPNOTSUPP)
        elif not self.is_opaque(key):
            self._put(key, OPAQUE_NAME)

    def removexattr(self, key: Key, name: bytes) -> None:
        name = self._kept().get(name, name)
        if name not in self.format.notes:
            self.upper.removexattr(key, name)
        elif name == self.format.opaque and self.is_opaque(key):
            self.upper.unlink(key, OPAQUE_NAME, None)
        else:
            raise _error(errno.ENODATA)

    # --- what aufs has left

    def clear_leftovers(self) -> None:
        """Remove what aufs keeps while it is mounted, and leaves if the machine stops meanwhile."""
        for name in LEFT:
            found = self.upper.lookup(self.branch, name)
            if found is not None and stat.S_ISDIR(found[1].st_mode):
                for entry in self.upper.readdir(found[0]):
                    with suppress(OSError):
                        self._remove_covered(found[0], entry.name)


_NO_LINK = {errno.EMLINK, errno.EPERM, errno.ENOENT, errno.ESTALE, errno.EOPNOTSUPP, errno.EXDEV}


def _covering(place: tuple[Key, bytes]) -> tuple[Key, bytes]:
    """Return where the whiteout of a name is."""
    return place[0], PREFIX + place[1]


def _as_file(attr: Attr) -> Attr:
    """Return the attributes of the file that the union has for a device 0:0."""
    file = replace(attr) if isinstance(attr, AttrData) else own_attr(attr)
    file.st_mode = stat.S_IFREG | stat.S_IMODE(attr.st_mode)
    return file


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def sign_of(names: Iterable[bytes]) -> bytes | None:
    """Return which of the names at the root of a filesystem says that aufs has written there, if one does."""
    return min((name for name in names if name.startswith(PREFIX)), key=_rank, default=None)


def _rank(name: bytes) -> tuple[bool, bytes]:
    return not name.startswith(META), name


def written_through(layer: UpperLayer) -> UpperLayer:
    """Return what an aufs store is written to through; another layer itself."""
    return layer.upper if isinstance(layer, AufsStore) else layer
