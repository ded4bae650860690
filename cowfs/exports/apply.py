"""Apply changes to a directory.

At any moment each file has its old content or its new one, and a second run completes an interrupted one.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import closing, suppress
from dataclasses import replace
from typing import Protocol

from cowfs.changes.version import Tree
from cowfs.exports.apply_root import NOT_THERE, Root, is_ours, new_name
from cowfs.exports.conflicts import is_same
from cowfs.exports.entries import CAPABILITY, Entry, Tick, Withheld, copy, data_runs, feed, opened, target_of
from cowfs.exports.losses import Losses
from cowfs.exports.plan import Plan
from cowfs.layers import beneath
from cowfs.layers.acl import ACCESS, DEFAULT, has_unknown, same_names
from cowfs.layers.kernel_file import KernelFile
from cowfs.linux import files, user_namespace

_PIECE = 1 << 20
_REFUSED = {errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.EINVAL}
MOUNTED = {errno.EBUSY, errno.EXDEV}
_WITHOUT_XATTRS = "files without some of their extended attributes"
_NOT_HAD = "symbolic links, FIFOs and sockets left out, which the filesystem does not support"


class Known(Protocol):
    """Facts about the changes that the new version alone does not show."""

    def differs(self, entry: Entry) -> bool:
        """Return whether more of a directory has changed than its time."""

    def keeps_owner(self, path: bytes) -> bool:
        """Return whether the change leaves the owner at *path* as it is."""

    def keeps_acls(self, path: bytes) -> bool:
        """Return whether the new version may lack an ACL only because its store could not have it."""

    def source(self, path: bytes) -> bytes | None:
        """Return the path from which the directory's own inode should be renamed to *path*, if any."""


class Compared:
    """The facts that follow from the version before the changes."""

    def __init__(self, before: Tree) -> None:
        self._before = before

    def differs(self, entry: Entry) -> bool:
        was = self._before.node(entry.path)
        if was is None or not was.is_dir:
            return True
        one, other = was.attr, entry.node.attr
        same = (one.st_mode, one.st_uid, one.st_gid) == (other.st_mode, other.st_uid, other.st_gid)
        return not same or dict(sorted(was.xattrs().items())) != entry.xattrs

    def keeps_owner(self, path: bytes) -> bool:
        return False

    def keeps_acls(self, path: bytes) -> bool:
        return False

    def source(self, path: bytes) -> bytes | None:
        return None


class Apply:
    """A :class:`cowfs.exports.entries.Sink` that changes a directory.

    Blocks; OSError with the path. It adds and changes first, and syncs that before it removes files.
    """

    def __init__(self, root: Root, known: Known, losses: Losses, tick: Tick) -> None:
        self._root = root
        self._known = known
        self._losses = losses
        self._tick = tick
        self._gone: list[bytes] = []
        self._directories: list[tuple[Entry, bool, tuple[int, int]]] = []
        """Directories whose attributes are set at the end; whether to set all of these; and their inodes."""
        self._first: dict[bytes, tuple[int, int]] = {}
        """The path of the first name of a file with hard links, and its inode."""

    def run(self, items: Plan, after: Tree, withheld: Withheld) -> None:
        """Apply everything except what is *withheld*."""
        feed(items.items(), after, self, self._losses, self._tick, None, withheld)
        self._root.sync()
        for path in self._gone:
            self._remove(path)
        for entry, is_whole, inode in reversed(self._directories):
            fd = self._root.open(entry.path)
            if fd is not None:
                try:
                    if _inode(os.fstat(fd)) != inode:
                        raise beneath.stale(b"/" + entry.path)
                    self._set_attributes(fd, entry, is_whole=is_whole, owner=self._owner(entry, os.fstat(fd)))
                finally:
                    os.close(fd)
        self._root.sync()

    def whiteout(self, path: bytes) -> None:
        self._gone.append(path)

    def add(self, entry: Entry) -> None:
        try:
            if stat.S_ISDIR(entry.mode):
                self._directory(entry)
            else:
                self._other(entry)
        except OSError as error:
            if error.filename is not None and os.fsencode(error.filename).startswith(b"/"):
                raise
            raise OSError(error.errno, error.strerror, b"/" + entry.path) from None

    def _directory(self, entry: Entry) -> None:
        path = entry.path
        parent, name = self._root.place(path)
        there = self._root.stat_in(parent, name)
        if there is None:
            there = self._renamed(entry)
            parent, name = self._root.place(path)
        if there is not None and stat.S_ISDIR(there.st_mode):
            self._directories.append((entry, self._known.differs(entry), _inode(there)))
            self._sweep(path)
            return
        since, temporary = beneath.now(), new_name()
        beneath.make_directory(parent, temporary, 0o700)
        fd = self._root.enter(parent, temporary, os.O_RDONLY | os.O_DIRECTORY)
        try:
            info = os.fstat(fd)
            if not beneath.is_new(fd, info, since, self._root.magic):
                raise beneath.stale(temporary)
        finally:
            os.close(fd)
        self._put(parent, temporary, name, there)
        self._directories.append((entry, True, _inode(info)))

    def _other(self, entry: Entry) -> None:
        parent, name = self._root.place(entry.path)
        there = self._root.stat_in(parent, name)
        if there is None:
            there = self._renamed(entry)
            parent, name = self._root.place(entry.path)
        first = self._first.get(entry.same_as) if entry.same_as is not None else None
        if first is not None and entry.same_as is not None:
            if there is None or _inode(there) != first:
                self._link(entry.path, entry.same_as, first)
            return
        owner = self._owner(entry, there)
        if (
            there is not None
            and self._may_stay(there, entry, owner)
            and self._in_place(entry, parent, name, owner)
        ):
            return
        if there is not None and stat.S_ISREG(there.st_mode):
            entry = self._without_fixed_acls(entry, parent, name)
        since, temporary = beneath.now(), new_name()
        try:
            fd = self._made(entry, parent, temporary, since)
        except OSError as error:
            if stat.S_ISREG(entry.mode) or error.errno != errno.EPERM:
                raise
            is_device = stat.S_ISCHR(entry.mode) or stat.S_ISBLK(entry.mode)
            # FAT has no links, FIFOs and sockets
            what = "devices left out, which only root can create" if is_device else _NOT_HAD
            self._losses.add(what, entry.path)
            return
        try:
            self._set_attributes(fd, entry, is_whole=True, owner=owner)
            if stat.S_ISREG(entry.mode):
                os.fsync(fd)
            self._put(parent, temporary, name, there)
            self._note_first(entry, os.fstat(fd))
        except BaseException:
            with suppress(OSError):
                beneath.unlink(parent, temporary)
            raise
        finally:
            os.close(fd)

    def _renamed(self, entry: Entry) -> os.stat_result | None:
        """Rename what the directory has under an old path to the path of *entry*; return its attributes.

        None if that is not wanted, or not possible. Then it must be copied.
        """
        source = self._known.source(entry.path)
        if source is None or not self._known.keeps_owner(entry.path):
            return None
        if not stat.S_ISDIR(entry.mode) and _gains(entry):
            return None
        parent, name = self._root.place(entry.path)
        parent = os.dup(parent)
        try:
            old_parent, old_name = self._root.place(source)
            there = self._root.stat_in(old_parent, old_name)
            if there is None or stat.S_IFMT(there.st_mode) != stat.S_IFMT(entry.mode):
                return None
            files.rename(old_parent, old_name, parent, name, files.RENAME_NOREPLACE)
            self._root.forget(source)
            return self._root.stat_in(parent, name)
        except OSError:
            return None
        finally:
            os.close(parent)

    def _may_stay(self, info: os.stat_result, entry: Entry, owner: tuple[int, int]) -> bool:
        """Whether the existing file may stay if its content is right, or can be written to it.

        A process that has it open or mapped can still change it. So the file must not get another owner,
        set-ID bits or capabilities. One that was renamed stays, because nobody here can make another.
        """
        if (info.st_uid, info.st_gid) != owner or _gains(entry):
            return False
        if self._known.source(entry.path) is not None:
            return stat.S_IFMT(info.st_mode) == stat.S_IFMT(entry.mode)
        return stat.S_ISREG(info.st_mode) and info.st_nlink == 1

    def _made(self, entry: Entry, parent: int, name: bytes, since: int) -> int:
        """Create a file with a temporary name; return its descriptor."""
        if stat.S_ISREG(entry.mode):
            file = KernelFile(beneath.make_file(parent, name, 0o600))
            try:
                self._fill(entry, file)
                return os.dup(file.fileno())
            except BaseException:
                beneath.unlink(parent, name)
                raise
            finally:
                file.close()
        if stat.S_ISLNK(entry.mode):
            beneath.make_symlink(parent, name, target_of(entry))
        else:
            beneath.make_node(parent, name, stat.S_IFMT(entry.mode) | 0o600, entry.node.attr.st_rdev)
        fd = self._root.enter(parent, name, os.O_PATH)
        info = os.fstat(fd)
        is_ours = stat.S_IFMT(info.st_mode) == stat.S_IFMT(entry.mode)
        if not is_ours or not beneath.is_new(fd, info, since, self._root.magic):
            os.close(fd)
            raise beneath.stale(name)
        return fd

    def _fill(self, entry: Entry, file: KernelFile) -> None:
        with opened(entry) as data:
            file.truncate(entry.size)
            copy(entry, data, data_runs(data, entry.size), file.pwrite, self._losses, self._tick)

    def _owner(self, entry: Entry, there: os.stat_result | None) -> tuple[int, int]:
        """Return the user and group that an entry gets."""
        if there is not None and self._known.keeps_owner(entry.path):
            return there.st_uid, there.st_gid
        return entry.node.attr.st_uid, entry.node.attr.st_gid

    def _in_place(self, entry: Entry, parent: int, name: bytes, owner: tuple[int, int]) -> bool:
        """Update the existing file; False if it must be replaced.

        Sets only the attributes if the content is already right. Otherwise it writes to the file, if this
        cannot be replaced because its owner is not mapped here or its directory is not writable.
        """
        fd = self._root.enter(parent, name, os.O_PATH)
        try:
            info = os.fstat(fd)
            if not self._may_stay(info, entry, owner):
                return False
            if not is_same(fd, info, entry.node):
                if not stat.S_ISREG(entry.mode) or not self._known.keeps_owner(entry.path):
                    return False
                if is_replaced(fd, info, parent):
                    return False
                with closing(KernelFile(beneath.reopen(fd, os.O_WRONLY | os.O_TRUNC))) as file:
                    self._fill(entry, file)
                    file.fsync(datasync=False)
            self._set_attributes(fd, entry, is_whole=True, owner=owner)
            self._note_first(entry, info)
            return True
        finally:
            os.close(fd)

    def _without_fixed_acls(self, entry: Entry, parent: int, name: bytes) -> Entry:
        """Return the entry without the ACLs of the file at *name* that a new file cannot get."""
        fd = self._root.enter(parent, name, os.O_PATH)
        try:
            fixed = _fixed_acls(_xattrs(fd))
        finally:
            os.close(fd)
        if not fixed or not (fixed & entry.xattrs.keys() or self._known.keeps_acls(entry.path)):
            return entry
        self._losses.add(_WITHOUT_XATTRS, entry.path)
        return replace(entry, xattrs={key: value for key, value in entry.xattrs.items() if key not in fixed})

    def _note_first(self, entry: Entry, info: os.stat_result) -> None:
        if entry.node.attr.st_nlink > 1:
            self._first[entry.path] = _inode(info)

    def _link(self, path: bytes, source: bytes, inode: tuple[int, int]) -> None:
        fd = self._root.open(source)
        if fd is None:
            raise beneath.stale(source)
        try:
            info = os.fstat(fd)
            if _inode(info) != inode:
                raise beneath.stale(source)
            parent, name = self._root.place(path)
            temporary = new_name()
            beneath.link(fd, parent, temporary)
            self._put(parent, temporary, name, self._root.stat_in(parent, name))
        finally:
            os.close(fd)

    def _put(self, parent: int, temporary: bytes, name: bytes, there: os.stat_result | None) -> None:
        """Rename a new file to *name*, and remove the one that it replaces."""
        made = self._root.stat_in(parent, temporary)
        if made is None:
            raise beneath.stale(name)
        if there is None or not (stat.S_ISDIR(made.st_mode) or stat.S_ISDIR(there.st_mode)):
            files.rename(parent, temporary, parent, name, 0)
            return
        files.rename(parent, temporary, parent, name, files.RENAME_EXCHANGE)
        self._root.remove(parent, temporary)

    def _sweep(self, path: bytes) -> None:
        """Remove the files that an interrupted apply left in a directory."""
        directory = self._root.directory(path)
        try:
            here = beneath.open_directory(directory)
        except PermissionError:
            return  # not writable, so an earlier apply has left nothing there
        try:
            for name in map(os.fsencode, os.listdir(here)):
                if is_ours(name):
                    self._root.remove(directory, name)
        finally:
            os.close(here)

    def _remove(self, path: bytes) -> None:
        self._tick(path, 0)
        try:
            parent, name = self._root.place(path)
            self._root.forget(path)
            self._root.remove(parent, name)
        except OSError as error:
            if error.errno in MOUNTED:
                self._losses.add("not removed, because something is mounted on it, or in it", path)
            elif error.errno not in NOT_THERE:
                raise OSError(error.errno, error.strerror, b"/" + path) from None

    # --- attributes

    def _set_attributes(self, fd: int, entry: Entry, *, is_whole: bool, owner: tuple[int, int]) -> None:
        """Set the attributes, the owner first, because chown(2) clears set-ID bits and capabilities."""
        if is_whole:
            info, mode = os.fstat(fd), entry.mode
            if (info.st_uid, info.st_gid) != owner:
                try:
                    beneath.chown(fd, *owner)
                except OSError as error:
                    self._lose(error, "files whose owner only root can set", entry)
                    mode &= ~(stat.S_ISUID | stat.S_ISGID)  # it would run as the wrong user
            self._set_xattrs(fd, entry)
            if not stat.S_ISLNK(entry.mode) and os.fstat(fd).st_mode != mode:
                try:
                    beneath.chmod(fd, mode)
                except OSError as error:  # FAT has no set-ID bits
                    self._lose(error, "files whose mode the filesystem does not support", entry)
        if os.fstat(fd).st_mtime_ns != entry.mtime_ns:
            try:
                beneath.utimens(fd, entry.mtime_ns, entry.mtime_ns)
            except PermissionError:
                if not stat.S_ISDIR(entry.mode):
                    self._losses.add("times that only the owner can set", entry.path, exact=False)

    def _set_xattrs(self, fd: int, entry: Entry) -> None:
        there = _xattrs(fd)
        fixed = _fixed_acls(there)  # chmod(2) sets their mask
        try:
            kept = fixed if self._known.keeps_acls(entry.path) else set()
            for name in there.keys() - entry.xattrs.keys() - kept:
                beneath.removexattr(fd, name)
            for name, value in entry.xattrs.items():
                if name in fixed:
                    if not same_names(there[name], value):
                        self._losses.add(_WITHOUT_XATTRS, entry.path)
                elif there.get(name) != value:
                    beneath.setxattr(fd, name, value, 0)
        except OSError as error:
            self._lose(error, _WITHOUT_XATTRS, entry)

    def _lose(self, error: OSError, what: str, entry: Entry) -> None:
        if error.errno not in _REFUSED:
            raise error
        self._losses.add(what, entry.path)


def _inode(info: os.stat_result) -> tuple[int, int]:
    return info.st_dev, info.st_ino


def _xattrs(fd: int) -> dict[bytes, bytes]:
    try:
        return {name: beneath.getxattr(fd, name) for name in beneath.listxattr(fd)}
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        return {}


def is_replaced(fd: int, info: os.stat_result, directory: int) -> bool:
    """Whether a new file can replace one in *directory*; otherwise cowfs writes to the existing file."""
    if user_namespace.lacks(info.st_uid, info.st_gid) or not beneath.may_change(directory):
        return False
    return not _fixed_acls(_xattrs(fd))


def _fixed_acls(there: dict[bytes, bytes]) -> set[bytes]:
    """Return the names of the ACLs that only the kernel can copy or change, because they name users or groups
    that have no number in this user namespace."""
    return {name for name in (ACCESS, DEFAULT) if name in there and has_unknown(there[name])}


def _gains(entry: Entry) -> bool:
    """Whether who executes a file gains rights."""
    return bool(entry.mode & (stat.S_ISUID | stat.S_ISGID)) or entry.xattrs.get(CAPABILITY) is not None
