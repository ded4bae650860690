"""Read and write the store of an aufs as if it were one of overlayfs.

The root of an aufs branch is the upper itself; aufs keeps its own files under names there that begin with
``.wh..wh.``, and hides them. The files of cowfs are in such a directory, too::

    .wh..wh.aufs        the file that all whiteouts are links to
    .wh..wh.plnk/       links that aufs kept for hard links of lowers while it was mounted
    .wh..wh.orph/       what was deleted while it was open
    .wh..wh.cowfs/      work/ and cowfs/, as in any store
    everything else     the changes

Code that opens the store sees that directory as its root, with the branch in it as ``upper``.

If a name exists beside its whiteout, the whiteout wins. That makes operations atomic: a deletion creates the
whiteout first, and a creation over a whiteout removes the whiteout last. A rename takes two steps or more. A
layer that can combine several steps (an image that cowfs writes itself) does them at once. Elsewhere, an
interrupted rename may make a deleted lower name visible again, but never removes a file.

A name beneath a whiteout is left over from an interrupted deletion. It is removed before the whiteout is.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace

from cowfs.errors import os_error
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
    """The key of the root, or of work/, of a store that has no files of cowfs yet."""

    __slots__ = ()


class AufsStore(NamedWhiteouts):
    """The branch that *inner* has at its root, as an upper layer with the whiteouts of overlayfs."""

    def __init__(self, inner: UpperLayer) -> None:
        super().__init__(inner, "aufs")
        self.upper = inner
        self.branch: Key = inner.root
        self.temporaries: Key = None
        """The work directory, if known: its contents become visible only when they leave it."""
        self.fill_unit = 0  # a lazy copy-up needs notes
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
        """Write the changes in the block to disk together, if the filesystem supports that."""
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
        """Return the attributes of the branch, not counting the directories in it that are hidden."""
        attr = self.upper.stat(self.branch)
        if self._hidden_directories is None:
            entries = self.upper.readdir(self.branch)
            names = [one.name for one in entries if one.name.startswith(META) or one.name == _LOST]
            found = [self.upper.lookup(self.branch, name) for name in names]
            self._hidden_directories = sum(one is not None and stat.S_ISDIR(one[1].st_mode) for one in found)
        if attr.st_nlink <= 2:  # this filesystem does not count them
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
            raise os_error(errno.ENODATA)
        if name == self.format.device and self._is_device(key):
            return _DEVICE
        stored = self._kept().get(name)
        if stored is not None and not isinstance(key, Whiteout):
            return self.upper.getxattr(key, stored)
        return super().getxattr(key, name)

    def _is_device(self, key: Key) -> bool:
        """Whether an inode is a device 0:0. It hides nothing here: the union shows a file in its place."""
        return not isinstance(key, Whiteout) and is_whiteout_device(self.upper.stat(key))

    def _kept(self) -> dict[bytes, bytes]:
        """Return the names under which the branch stores some of overlayfs's attributes.

        They affect only inode numbers, link counts while cowfs has it mounted, and the flags i and a of
        chattr(1).
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
        """EPERM for a name that users may not create, EEXIST if there is a whiteout."""
        self._must_be_allowed(directory, name)
        if len(name) > NAME_MAX:
            raise os_error(errno.ENAMETOOLONG)
        if self._whiteout(directory, name) is not None:
            raise os_error(errno.EEXIST)

    def _must_be_allowed(self, directory: Key, name: bytes) -> None:
        """EPERM for a name that users may not create: it would be hidden, and would hide nothing."""
        if name.startswith(PREFIX) or (name == _LOST and directory == self.branch):
            raise os_error(errno.EPERM)

    def create(self, directory: Key, name: bytes, mode: int, uid: int, gid: int) -> tuple[Key, File]:
        self._must_be_free(directory, name)
        return self.upper.create(directory, name, mode, uid, gid)

    def mkdir(self, directory: Key, name: bytes, mode: int, uid: int, gid: int) -> Key:
        if isinstance(directory, _Nothing):
            directory = self._begin(uid, gid)
        self._must_be_free(directory, name)
        return self.upper.mkdir(directory, name, mode, uid, gid)

    def _begin(self, uid: int, gid: int) -> Key:
        """Create the directory of cowfs if it is missing, and return it."""
        if isinstance(self._own, _Nothing):
            with self._keeping_times():
                self.upper.forget(self.upper.mkdir(self.branch, PRIVATE, 0o755, uid, gid))
            found = self.upper.lookup(self.branch, PRIVATE)
            if found is None:
                raise os_error(errno.ENOENT)
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
            raise os_error(errno.ENOENT)
        return made[0]

    def link(self, key: Key, directory: Key, name: bytes) -> None:
        if isinstance(key, Whiteout):
            self._hide_free(directory, name)
            return
        self._must_be_free(directory, name)
        self.upper.link(key, directory, name)

    def _hide_free(self, directory: Key, name: bytes) -> None:
        """Create a whiteout. EPERM for a name that users may not create, EEXIST if the name exists."""
        self._must_be_allowed(directory, name)
        found = self.upper.lookup(directory, name)
        if found is not None:
            self.upper.forget(found[0])
            raise os_error(errno.EEXIST)
        self._put(directory, PREFIX + name)

    def _put(self, directory: Key, name: bytes) -> None:
        """Link *name* to the file of all whiteouts, or to a new file if that one has too many links."""
        if self._base is None:
            found = self.upper.lookup(self.branch, BASE)
            if found is None:
                with self._keeping_times():
                    self._base = self._make(self.branch, BASE)
            elif stat.S_ISREG(found[1].st_mode):
                self._base = found[0]
        try:
            if self._base is None:
                raise os_error(errno.EMLINK)
            self.upper.link(self._base, directory, name)
        except OSError as failure:
            if failure.errno not in _NO_LINK:
                raise
            if self._base is not None:
                self.upper.forget(self._base)
            self._base = self._make(directory, name)  # the next whiteouts link to this one

    @contextmanager
    def _keeping_times(self) -> Iterator[None]:
        """Restore the times of the branch after the block: users do not see its changes."""
        before = self.upper.stat(self.branch)
        with self.together():
            yield
            self.upper.utimens(self.branch, before.st_atime_ns, before.st_mtime_ns)

    def _make(self, directory: Key, name: bytes) -> Key:
        key, file = self.upper.create(directory, name, _MODE, *self._owner())
        file.close()
        return key

    def _remove_covered(self, directory: Key, name: bytes) -> None:
        """Remove a tree, such as what a whiteout covers in its layer: the rest of an interrupted deletion."""
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
        self._remove_covered(directory, PREFIX + name)  # which may be a directory

    def rmdir(self, directory: Key, name: bytes, key: Key | None) -> None:
        with self.together():
            self._make_bare(directory, name)
            self.upper.rmdir(directory, name, key)

    def _make_bare(self, directory: Key, name: bytes) -> None:
        """Remove the hidden names from a directory that is to be removed and that users see as empty.

        The mark that it is opaque is a name, and aufs leaves names in it when it crashes.
        """
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
            raise os_error(errno.ENAMETOOLONG)
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
        """Delete a name: first hide what is there, then remove or exchange it."""
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
            raise os_error(errno.EEXIST)
        self._remove_covered(*target)
        is_new = self.temporaries is not None and source[0] == self.temporaries
        if is_new:  # the name appears when the whiteout is removed, not before
            self.upper.rename(source, target, moved=moved)
        self._remove_covered(target[0], PREFIX + target[1])
        if not is_new:
            self.upper.rename(source, target, moved=moved)
        if flags & RENAME_EXCHANGE:
            self._put(source[0], PREFIX + source[1])

    # --- attributes

    def setxattr(self, key: Key, name: bytes, value: bytes, flags: int = 0) -> None:
        """Set an xattr. EOPNOTSUPP for those that only overlayfs has: redirects, metacopies."""
        name = self._kept().get(name, name)
        if name not in self.format.notes:
            self.upper.setxattr(key, name, value, flags)
        elif (
            name != self.format.opaque
            or isinstance(key, Whiteout)
            or not stat.S_ISDIR(self.upper.stat(key).st_mode)
        ):
            raise os_error(errno.EOPNOTSUPP)
        elif not self.is_opaque(key):
            self._put(key, OPAQUE_NAME)

    def removexattr(self, key: Key, name: bytes) -> None:
        name = self._kept().get(name, name)
        if name not in self.format.notes:
            self.upper.removexattr(key, name)
        elif name == self.format.opaque and self.is_opaque(key):
            self._remove_covered(key, OPAQUE_NAME)
        else:
            raise os_error(errno.ENODATA)

    # --- leftovers of aufs

    def clear_leftovers(self) -> None:
        """Remove the files that aufs keeps while it is mounted, and leaves behind after a crash."""
        for name in LEFT:
            found = self.upper.lookup(self.branch, name)
            if found is not None and stat.S_ISDIR(found[1].st_mode):
                for entry in self.upper.readdir(found[0]):
                    with suppress(OSError):
                        self._remove_covered(found[0], entry.name)


_NO_LINK = {errno.EMLINK, errno.EPERM, errno.ENOENT, errno.ESTALE, errno.EOPNOTSUPP, errno.EXDEV}


def _covering(place: tuple[Key, bytes]) -> tuple[Key, bytes]:
    """Return the directory and name of a name's whiteout."""
    return place[0], PREFIX + place[1]


def _as_file(attr: Attr) -> Attr:
    """Return the attributes of the file that the union shows for a device 0:0."""
    file = replace(attr) if isinstance(attr, AttrData) else own_attr(attr)
    file.st_mode = stat.S_IFREG | stat.S_IMODE(attr.st_mode)
    return file


def sign_of(names: Iterable[bytes]) -> bytes | None:
    """Return the name, of those at the root of a filesystem, that shows that aufs wrote there; None if
    none."""
    return min((name for name in names if name.startswith(PREFIX)), key=_rank, default=None)


def _rank(name: bytes) -> tuple[bool, bytes]:
    return not name.startswith(META), name


def written_through(layer: UpperLayer) -> UpperLayer:
    """Return the layer through which an aufs store is written; for any other layer, return it as it is."""
    return layer.upper if isinstance(layer, AufsStore) else layer
