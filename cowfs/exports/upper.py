"""Write an upper directory, for the kernel's overlayfs or a store of cowfs."""

from __future__ import annotations

import errno
import os
import stat

from cowfs.exports.entries import Entry, Tick, copy, data_runs, opened, target_of
from cowfs.exports.losses import Losses
from cowfs.layers.kernel_file import KernelFile
from cowfs.overlay.xattr_format import TRUSTED, XattrFormat

_REFUSED = {errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.EINVAL}
_MADE = {errno.EPERM, errno.EINVAL}
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Upper:
    """A :class:`cowfs.exports.entries.Sink` that fills an empty directory; :meth:`close` ends it."""

    def __init__(self, root: int, losses: Losses, tick: Tick, *, whole: bool) -> None:
        """*root* is a descriptor of the directory, which the caller closes; *whole*: a tree, not a layer."""
        self._whole = whole
        self._losses = losses
        self._tick = tick
        self._xattrs = XattrFormat(TRUSTED)
        self._way: list[tuple[bytes, int, Entry | None]] = [(b"", os.dup(root), None)]
        """The directories that are being filled. Their attributes are set after that."""
        self._root = root
        self._names: dict[bytes, bytes] = {}

    def add(self, entry: Entry) -> None:
        if not entry.path:
            self._way[0] = b"", self._way[0][1], entry
            return
        parent, name = self._parent(entry.path)
        if entry.same_as is not None:
            self._link(entry, parent, name)
        elif stat.S_ISDIR(entry.mode):
            os.mkdir(name, 0o700, dir_fd=parent)
            self._way.append((entry.path, os.open(name, _DIRECTORY, dir_fd=parent), entry))
        elif stat.S_ISREG(entry.mode):
            self._file(entry, parent, name)
        elif stat.S_ISLNK(entry.mode):
            os.symlink(target_of(entry), name, dir_fd=parent)
            self._finish(entry, parent, name)
        elif stat.S_ISCHR(entry.mode) and not entry.node.attr.st_rdev and not self._whole:
            self._losses.add("devices 0:0 left out, which would be taken for whiteouts", entry.path)
        else:
            try:
                os.mknod(name, stat.S_IFMT(entry.mode) | 0o600, entry.node.attr.st_rdev, dir_fd=parent)
            except OSError as error:
                if error.errno not in _MADE:
                    raise
                self._losses.add("devices left out, which only root can create", entry.path)
                return
            self._finish(entry, parent, name)

    def whiteout(self, path: bytes) -> None:
        parent, name = self._parent(path)
        os.mknod(name, stat.S_IFCHR, 0, dir_fd=parent)
        os.utime(name, ns=(0, 0), dir_fd=parent, follow_symlinks=False)

    def close(self) -> None:
        """Finish all directories."""
        while self._way:
            self._leave()

    def _parent(self, path: bytes) -> tuple[int, bytes]:
        directory, _, name = path.rpartition(b"/")
        while self._way[-1][0] != directory:
            self._leave()
        return self._way[-1][1], name

    def _leave(self) -> None:
        _, fd, entry = self._way.pop()
        try:
            if entry is not None:
                self._finish(entry, fd, b".")
        finally:
            os.close(fd)

    def _link(self, entry: Entry, parent: int, name: bytes) -> None:
        assert entry.same_as is not None
        try:
            os.link(entry.same_as, name, src_dir_fd=self._root, dst_dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            self._losses.add("hard links left out whose first name was", entry.path)

    def _file(self, entry: Entry, parent: int, name: bytes) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        target = KernelFile(os.open(name, flags, 0o600, dir_fd=parent))
        try:
            with opened(entry) as file:
                target.truncate(entry.size)
                copy(entry, file, data_runs(file, entry.size), target.pwrite, self._losses, self._tick)
        finally:
            target.close()
        self._finish(entry, parent, name)

    def _finish(self, entry: Entry, parent: int, name: bytes) -> None:
        """Set the attributes, the owner first, because chown(2) clears set-ID bits and capabilities."""
        attr, mode = entry.node.attr, stat.S_IMODE(entry.mode)
        try:
            os.chown(name, attr.st_uid, attr.st_gid, dir_fd=parent, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            self._losses.add("files that now belong to you, as only root can change the owner", entry.path)
            mode &= ~(stat.S_ISUID | stat.S_ISGID)  # it would run as the wrong user
        place = b"/proc/self/fd/%d/%s" % (parent, name)
        for shown, value in entry.xattrs.items():
            stored = shown if self._whole else self._xattrs.stored(shown)
            try:
                os.setxattr(place, stored, value, follow_symlinks=False)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                self._losses.add("files without some of their extended attributes", entry.path)
        if not stat.S_ISLNK(entry.mode):
            os.chmod(name, mode, dir_fd=parent)
        os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=parent, follow_symlinks=False)
