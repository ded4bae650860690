"""Carry changes onto a directory: a file's content is old or new at any moment, and a second run completes
it.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Protocol

from cowfs.changes.paths import join
from cowfs.changes.version import Node, Tree
from cowfs.errors import UsageError
from cowfs.exports.entries import CAPABILITY, Entry, Tick, Withheld, copy, data_runs, feed, opened, target_of
from cowfs.exports.losses import Losses
from cowfs.exports.plan import Item, Plan
from cowfs.layers import beneath
from cowfs.layers.kernel_file import KernelFile
from cowfs.linux import files, locks, user_namespace
from cowfs.linux.sockets import open_control_directory
from cowfs.linux.trust import who_can_redirect

_PIECE = 1 << 20
_PREFIX, _RANDOM = b".cowfs-apply-", 16
"""For names of files that are not yet, or no longer, in their place."""
_LOCK = "applying"
"""In the directory of our sockets."""
_REFUSED = {errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.EINVAL}
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR}
MOUNTED = {errno.EBUSY, errno.EXDEV}
_NOT_HAD = "symbolic links, FIFOs and sockets left out, which the filesystem does not support"


class Root:
    """The directory to which changes are applied. No link and no mount leads out of it."""

    def __init__(self, path: str) -> None:
        """Raises OSError; UsageError if it is already in use in this way, or if another user controls the
        path.
        """
        self.path = path
        with ExitStack() as stack:
            self._given = beneath.open_given(path, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, self._given)
            reason = who_can_redirect(path, self._given)
            if reason is not None:
                raise UsageError(f"{path}: {reason}", "give the directory itself")
            stack.enter_context(_alone(path, self._given))
            self._root, self._ways = beneath.enclosed(self._given)
            if self._root != self._given:
                stack.callback(os.close, self._root)
            self._release = stack.pop_all()
        self.magic = files.fs_magic(self._given)
        self._way: list[tuple[bytes, int]] = []
        """The directories on the way to the last path."""

    def close(self) -> None:
        """Let other processes use it."""
        self._leave_to(0)
        self._release.close()

    def stat(self) -> os.stat_result:
        """Return the attributes of the directory itself."""
        return os.fstat(self._given)

    def fsid(self) -> int | None:
        """Return what its filesystem calls itself (statfs(2)); None if it has no name."""
        return os.fstatvfs(self._given).f_fsid or None

    def sync(self) -> None:
        """Return when all is on disk."""
        files.syncfs(self._given)

    def directory(self, path: bytes) -> int:
        """Return a descriptor (O_PATH) of a directory, valid until the next call. ENOENT, ENOTDIR, EXDEV."""
        names = path.split(b"/") if path else []
        same = 0
        while same < min(len(names), len(self._way)) and self._way[same][0] == names[same]:
            same += 1
        self._leave_to(same)
        for name in names[same:]:
            beneath.check_name(name)
            above = self._way[-1][1] if self._way else self._root
            try:
                fd = self._ways.open(above, name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
            except OSError as error:
                code = errno.ENOTDIR if error.errno == errno.ELOOP else error.errno
                raise OSError(code, os.strerror(code or 0), b"/" + path) from None
            self._way.append((name, fd))
        return self._way[-1][1] if self._way else self._root

    def forget(self, path: bytes) -> None:
        """Look up again what is below *path*, which is about to be replaced."""
        self._leave_to(path.count(b"/"))

    def open(self, path: bytes) -> int | None:
        """Return a descriptor (O_PATH) of what is at *path*, for the caller to close; None if nothing is."""
        if not path:
            return os.dup(self._root)
        try:
            return self._ways.open(*self.place(path), os.O_PATH)
        except OSError as error:
            if error.errno in _NOT_THERE:
                return None
            raise OSError(error.errno, error.strerror, b"/" + path) from None

    def place(self, path: bytes) -> tuple[int, bytes]:
        """Return the directory that contains *path*, valid until the next call, and the name in it.

        The root contains itself, as ``.``. EINVAL for a path that leads out of the root.
        """
        if not path:
            return self._root, b"."
        above, _, name = path.rpartition(b"/")
        beneath.check_name(name)
        return self.directory(above), name

    def stat_in(self, directory: int, name: bytes) -> os.stat_result | None:
        """Return the attributes of a name; None if it is not there."""
        try:
            return self._ways.stat(directory, name)
        except FileNotFoundError:
            return None

    def enter(self, directory: int, name: bytes, flags: int) -> int:
        """Open a name of a directory without following it."""
        return self._ways.open(directory, name, flags)

    def remove(self, directory: int, name: bytes) -> None:
        """Remove a name of a directory, and everything below it."""
        beneath.remove_tree(directory, name, self._ways)

    def _leave_to(self, depth: int) -> None:
        while len(self._way) > depth:
            os.close(self._way.pop()[1])


@contextmanager
def _alone(path: str, fd: int) -> Iterator[None]:
    """Keep other processes of this user from applying changes to the directory *fd*.

    The lock is on a file that other users cannot open, so nobody else can make us wait.
    """
    info = os.fstat(fd)
    place = locks.place_of(info.st_dev, info.st_ino)
    directory = open_control_directory()
    try:
        lock = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
    finally:
        os.close(directory)
    try:
        if not locks.take_place(lock, place):
            who = locks.who_has_place(lock, place)
            by = "" if who is None else f" (pid {who})"
            raise UsageError(f"{path}: another cowfs{by} applies changes there", "wait until it ends")
        yield
    finally:
        os.close(lock)


def is_ours(name: bytes) -> bool:
    """Whether a name was left by an interrupted apply."""
    random = name.removeprefix(_PREFIX)
    return random != name and len(random) == _RANDOM and not random.strip(b"0123456789abcdef")


# --- whether the directory is what the changes were made to


def conflicts(items: Plan, root: Root, before: Tree, after: Tree) -> Iterator[tuple[bytes, str]]:
    """Yield each path where *root* has neither what the lowers had nor the new version, and what is wrong.

    Blocks; OSError. UsageError if *root* is the lower itself: it would change while we read it.
    """
    for path, item in items.items():
        was = before.node(path)
        to_be = None if item is Item.WHITEOUT else after.node(path)
        yield from _conflict(path, root, was, to_be)
        if was is not None and was.is_dir and (to_be is None or not to_be.is_dir):
            yield from _in_removed(path, root, before)


def _conflict(path: bytes, root: Root, was: Node | None, to_be: Node | None) -> Iterator[tuple[bytes, str]]:
    fd = root.open(path)
    if fd is None:
        if was is not None and to_be is not None:
            yield path, "is missing"
        return
    try:
        info = os.fstat(fd)
        if was is not None and was.is_dir and stat.S_ISDIR(info.st_mode):
            if (info.st_dev, info.st_ino) == (was.attr.st_dev, was.attr.st_ino):
                raise UsageError(
                    f"{root.path}: is the lower itself, on which the changes are based",
                    "apply them to a copy of it",
                )
        if to_be is not None and is_same(fd, info, to_be):
            return
        if was is None:
            yield path, "exists, but did not in the lower"
        elif stat.S_IFMT(info.st_mode) != stat.S_IFMT(was.attr.st_mode):
            yield path, "has another type than in the lower"
        elif not is_same(fd, info, was):
            yield path, "has another content than in the lower"
    finally:
        os.close(fd)


def _in_removed(top: bytes, root: Root, before: Tree) -> Iterator[tuple[bytes, str]]:
    """The same for everything in a directory that will be removed."""
    waiting = [top]
    while waiting:
        path = waiting.pop()
        try:
            names = beneath.entries(root.directory(path))
        except OSError as error:
            if error.errno in _NOT_THERE:
                continue
            raise
        for name in sorted(entry.name for entry in names):
            below = join(path, name)
            if is_ours(name):
                continue
            was = before.node(below)
            yield from _conflict(below, root, was, None)
            if was is not None and was.is_dir:
                waiting.append(below)


def is_same(fd: int, info: os.stat_result, node: Node) -> bool:
    """Whether type and content are equal: attributes cause no conflict."""
    mode = info.st_mode
    if stat.S_IFMT(mode) != stat.S_IFMT(node.attr.st_mode):
        return False
    if stat.S_ISLNK(mode):
        return beneath.readlink(fd) == node.target()
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        return info.st_rdev == node.attr.st_rdev
    if not stat.S_ISREG(mode):
        return True
    if info.st_size != node.attr.st_size:
        return False
    with closing(KernelFile(beneath.reopen(fd, os.O_RDONLY))) as there, closing(node.open()) as file:
        for position in range(0, info.st_size, _PIECE):
            size = min(_PIECE, info.st_size - position)
            if there.pread(size, position) != file.pread(size, position):
                return False
    return True


# --- the changes themselves


class Known(Protocol):
    """What is known of the changes."""

    def differs(self, entry: Entry) -> bool:
        """Return whether more than the time of a directory was changed."""

    def keeps_owner(self, path: bytes) -> bool:
        """Return whether what is there already has the intended owner."""


class Compared:
    """What is known of the changes, from the version before them."""

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


class Apply:
    """A :class:`cowfs.exports.entries.Sink` that changes a directory.

    Blocks; OSError with the path. It adds and changes first, and syncs that before it removes anything.
    """

    def __init__(self, root: Root, known: Known, losses: Losses, tick: Tick) -> None:
        self._root = root
        self._known = known
        self._losses = losses
        self._tick = tick
        self._gone: list[bytes] = []
        self._directories: list[tuple[Entry, bool, tuple[int, int]]] = []
        """Their attributes are set in the end; whether all of them are to be set; and which inode that is."""
        self._first: dict[bytes, tuple[int, int]] = {}
        """Where the first name of an inode is, and which inode that is."""

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
        if there is not None and stat.S_ISDIR(there.st_mode):
            self._directories.append((entry, self._known.differs(entry), _inode(there)))
            self._sweep(path)
            return
        since, temporary = beneath.now(), _temporary()
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
        first = self._first.get(entry.same_as) if entry.same_as is not None else None
        if first is not None and entry.same_as is not None:
            if there is None or _inode(there) != first:
                self._link(entry.path, entry.same_as, first)
            return
        owner = self._owner(entry, there)
        if (
            there is not None
            and _may_stay(there, entry, owner)
            and self._in_place(entry, parent, name, owner)
        ):
            return
        since, temporary = beneath.now(), _temporary()
        try:
            fd = self._made(entry, parent, temporary, since)
        except OSError as error:
            if stat.S_ISREG(entry.mode) or error.errno != errno.EPERM:
                raise
            is_device = stat.S_ISCHR(entry.mode) or stat.S_ISBLK(entry.mode)
            # FAT has no links, FIFOs and sockets
            what = "devices left out, which only root can make" if is_device else _NOT_HAD
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

    def _made(self, entry: Entry, parent: int, name: bytes, since: int) -> int:
        """Make a file with a temporary name; return its descriptor."""
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
        """Return the owner that an entry gets."""
        if there is not None and self._known.keeps_owner(entry.path):
            return there.st_uid, there.st_gid
        return entry.node.attr.st_uid, entry.node.attr.st_gid

    def _in_place(self, entry: Entry, parent: int, name: bytes, owner: tuple[int, int]) -> bool:
        """Set only the attributes if the rest is right already. Write into a file that cannot be made anew,
        because its owner has no number here or its directory is not writable.
        """
        fd = self._root.enter(parent, name, os.O_PATH)
        try:
            info = os.fstat(fd)
            if not _may_stay(info, entry, owner):
                return False
            if not is_same(fd, info, entry.node):
                if not stat.S_ISREG(entry.mode) or not self._known.keeps_owner(entry.path):
                    return False
                if is_replaced(info, parent):
                    return False
                with closing(KernelFile(beneath.reopen(fd, os.O_WRONLY | os.O_TRUNC))) as file:
                    self._fill(entry, file)
                    file.fsync(datasync=False)
            self._set_attributes(fd, entry, is_whole=True, owner=owner)
            self._note_first(entry, info)
            return True
        finally:
            os.close(fd)

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
            temporary = _temporary()
            beneath.link(fd, parent, temporary)
            self._put(parent, temporary, name, self._root.stat_in(parent, name))
        finally:
            os.close(fd)

    def _put(self, parent: int, temporary: bytes, name: bytes, there: os.stat_result | None) -> None:
        """Put something in its place, and remove what was there."""
        made = self._root.stat_in(parent, temporary)
        if made is None:
            raise beneath.stale(name)
        if there is None or not (stat.S_ISDIR(made.st_mode) or stat.S_ISDIR(there.st_mode)):
            files.rename(parent, temporary, parent, name, 0)
            return
        files.rename(parent, temporary, parent, name, files.RENAME_EXCHANGE)
        self._root.remove(parent, temporary)

    def _sweep(self, path: bytes) -> None:
        """Remove what an interrupted apply left in a directory."""
        directory = self._root.directory(path)
        try:
            here = beneath.open_directory(directory)
        except PermissionError:
            return  # we may not write there now, and could not before
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
                self._losses.add("left there, for something is mounted on it, or in it", path)
            elif error.errno not in _NOT_THERE:
                raise OSError(error.errno, error.strerror, b"/" + path) from None

    # --- attributes

    def _set_attributes(self, fd: int, entry: Entry, *, is_whole: bool, owner: tuple[int, int]) -> None:
        """Set the attributes: the owner first, since that clears others."""
        if is_whole:
            info, mode = os.fstat(fd), entry.mode
            if (info.st_uid, info.st_gid) != owner:
                try:
                    beneath.chown(fd, *owner)
                except OSError as error:
                    self._lose(error, "files whose owner only root can set", entry)
                    mode &= ~(stat.S_ISUID | stat.S_ISGID)  # it would run as another user than intended
            self._set_xattrs(fd, entry)
            if not stat.S_ISLNK(entry.mode) and os.fstat(fd).st_mode != mode:
                try:
                    beneath.chmod(fd, mode)
                except OSError as error:  # FAT has no set-ID bits
                    self._lose(error, "files whose mode their filesystem does not have", entry)
        if os.fstat(fd).st_mtime_ns != entry.mtime_ns:
            try:
                beneath.utimens(fd, entry.mtime_ns, entry.mtime_ns)
            except PermissionError:
                if not stat.S_ISDIR(entry.mode):
                    self._losses.add("times that only the owner can set", entry.path, exact=False)

    def _set_xattrs(self, fd: int, entry: Entry) -> None:
        try:
            there = {name: beneath.getxattr(fd, name) for name in beneath.listxattr(fd)}
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            there = {}
        try:
            for name in there.keys() - entry.xattrs.keys():
                beneath.removexattr(fd, name)
            for name, value in entry.xattrs.items():
                if there.get(name) != value:
                    beneath.setxattr(fd, name, value, 0)
        except OSError as error:
            self._lose(error, "files without some of their extended attributes", entry)

    def _lose(self, error: OSError, what: str, entry: Entry) -> None:
        if error.errno not in _REFUSED:
            raise error
        self._losses.add(what, entry.path)


def _inode(info: os.stat_result) -> tuple[int, int]:
    return info.st_dev, info.st_ino


def is_replaced(info: os.stat_result, directory: int) -> bool:
    """Whether a file in *directory* gets its content by a new one in its place; else it is written to."""
    return beneath.may_change(directory) and not user_namespace.lacks(info.st_uid, info.st_gid)


def _may_stay(info: os.stat_result, entry: Entry, owner: tuple[int, int]) -> bool:
    """Whether setting the attributes is enough, if the file has the right content.

    A process that has the file open or mapped can still change it. So it must not get an owner, or a right to
    run as one, that its creator does not have.
    """
    if (info.st_uid, info.st_gid) != owner or info.st_nlink != 1:
        return False
    gains = entry.mode & (stat.S_ISUID | stat.S_ISGID) or entry.xattrs.get(CAPABILITY) is not None
    return stat.S_ISREG(info.st_mode) and not gains


def _temporary() -> bytes:
    return _PREFIX + secrets.token_hex(_RANDOM // 2).encode()
