"""System calls that mount and unmount.

Most functions do not touch the mount namespace: :func:`detached_mount` returns a mount that only its
descriptor leads to, and that ends with the process. They need CAP_SYS_ADMIN unless stated otherwise.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from cowfs.errors import os_error
from cowfs.types import Atime

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8  # include/uapi/linux/mount.h
MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8  # include/linux/fs.h

# include/uapi/linux/mount.h
_MS_RDONLY, MS_REMOUNT, _MS_NOATIME = 1, 0x20, 0x400

# The same on all architectures but alpha: include/uapi/asm-generic/unistd.h
_SYS_OPEN_TREE, _SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT, _SYS_MOUNT_SETATTR = 428, 430, 431, 432, 442
_SYS_FSPICK = 433
_SYS_MOVE_MOUNT = 429
_MOVE_MOUNT_F_EMPTY_PATH, _MOVE_MOUNT_T_SYMLINKS = 4, 0x10
_AT_FDCWD = -100
_SYS_PIVOT_ROOT = {"x86_64": 155, "i686": 217, "armv7l": 218, "ppc64le": 203, "s390x": 217}
_SYS_PIVOT_ROOT_ELSEWHERE = 41  # include/uapi/asm-generic/unistd.h

# include/uapi/linux/mount.h
_FSOPEN_CLOEXEC = 1
_FSMOUNT_CLOEXEC = 1
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_FSCONFIG_CMD_RECONFIGURE = 7
_FSPICK_CLOEXEC, _FSPICK_EMPTY_PATH = 1, 8
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_AT_EMPTY_PATH, _AT_RECURSIVE = 0x1000, 0x8000
_MS_REC, _MS_PRIVATE, _MS_SLAVE = 1 << 14, 1 << 18, 1 << 19
_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000  # include/uapi/linux/sched.h
_MS_BIND = 1 << 12
_MOUNT_ATTR_ATIME = 0x70  # MOUNT_ATTR__ATIME: the bits that choose when atime is updated
_MOUNT_ATTR = struct.Struct("=QQQQ")  # struct mount_attr: attr_set, attr_clr, propagation, userns_fd
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV, _MOUNT_ATTR_NOATIME = 1, 2, 4, 0x10
_MOUNT_ATTR_NOEXEC, _MOUNT_ATTR_NOSYMFOLLOW = 8, 0x200000
_MOUNT_ATTR_STRICTATIME, _MOUNT_ATTR_NODIRATIME = 0x20, 0x80

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    """Make a system call by number. OSError. Releases the GIL."""
    words = [ctypes.c_long(word) if isinstance(word, int) else ctypes.c_char_p(word) for word in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *words))
    if result < 0:
        raise os_error(ctypes.get_errno())
    return result


def detached_mount(
    fstype: str,
    source: str | bytes,
    options: Mapping[str, str | None],
    *,
    readonly: bool = False,
    noatime: bool = True,
) -> int:
    """Mount a filesystem outside all namespaces; return an O_PATH descriptor of its root.

    *options* are the filesystem's own; the value None makes an option a flag. The mount is nosuid and nodev,
    and ends when the descriptor and everything opened through it are closed (the kernel may need a moment
    more; see loop_backing()). Blocks as mount(2) does. OSError, with the kernel's own message if it has one
    (fsopen(2), fsconfig(2)).
    """
    context = _syscall(_SYS_FSOPEN, fstype.encode(), _FSOPEN_CLOEXEC)
    try:
        _set(context, "source", os.fsencode(source))
        for key, value in options.items():
            _set(context, key, None if value is None else os.fsencode(value))
        if readonly:
            _set(context, "ro", None)
        _syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        attributes = _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV
        attributes |= _MOUNT_ATTR_RDONLY if readonly else 0
        attributes |= _MOUNT_ATTR_NOATIME if noatime else 0
        return _syscall(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, attributes)
    except OSError as error:
        said = _messages(context)
        if not said:
            raise
        raise OSError(error.errno, f"{error.strerror}: {said}") from None
    finally:
        os.close(context)


def _set(context: int, key: str, value: bytes | None) -> None:
    command = _FSCONFIG_SET_FLAG if value is None else _FSCONFIG_SET_STRING
    _syscall(_SYS_FSCONFIG, context, command, key.encode(), value, 0)


def _messages(context: int) -> str:
    """Return the errors and warnings that the kernel has logged in a filesystem context, in one line."""
    lines = []
    with suppress(OSError):  # ENODATA after the last one
        while line := os.read(context, 4096):
            lines.append(line.decode(errors="replace").strip())
    # Each line starts with its level and a space: "e ", "w ", "i ".
    return "; ".join(line[2:] for line in lines if line[:2] in {"e ", "w "})


def private_clone(directory: int) -> int:
    """Clone the mount of a directory outside all namespaces (open_tree(2)). Both descriptors may be O_PATH.

    The clone does not contain what is mounted inside the directory, now or later, so nothing waits for those
    filesystems. The kernel's overlayfs clones its layers in the same way (clone_private_mount()). OSError:
    EPERM without CAP_SYS_ADMIN, EINVAL if mounts in a user namespace hide part of the directory.
    """
    clone = _syscall(_SYS_OPEN_TREE, directory, b"", _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_EMPTY_PATH)
    # Private: since Linux 6.15 a new mount on a shared mount propagates to its clones. Before 5.12 there is
    # no mount_setattr(2), and no such propagation.
    with suppress(OSError):
        wanted = _MOUNT_ATTR_NOATIME | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV | _MOUNT_ATTR_NOEXEC
        how = _MOUNT_ATTR.pack(wanted, _MOUNT_ATTR_ATIME, _MS_PRIVATE, 0)
        _syscall(_SYS_MOUNT_SETATTR, clone, b"", _AT_EMPTY_PATH, how, _MOUNT_ATTR.size)
    return clone


def note_reads(fd: int, when: Atime) -> None:
    """Set when the mount that *fd* (O_PATH) is on updates atime. Needs Linux 5.12; ignores errors."""
    attributes = 0 if when.files else _MOUNT_ATTR_NOATIME  # 0: relatime
    if when.files and when.always:
        attributes = _MOUNT_ATTR_STRICTATIME
    attributes |= 0 if when.directories else _MOUNT_ATTR_NODIRATIME
    with suppress(OSError):
        how = _MOUNT_ATTR.pack(attributes, _MOUNT_ATTR_ATIME | _MOUNT_ATTR_NODIRATIME, 0, 0)
        _syscall(_SYS_MOUNT_SETATTR, fd, b"", _AT_EMPTY_PATH, how, _MOUNT_ATTR.size)


def private_clone_of(path: str) -> int:
    """Return a :func:`private_clone` of the directory at *path*."""
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return private_clone(fd)
    finally:
        os.close(fd)


def processes() -> int:
    """Mount a read-only proc filesystem that shows only processes; see detached_mount.

    Its symbolic links are not followed (Linux 5.14), so it gives no access to what processes have open.
    """
    fd = detached_mount("proc", "proc", {"subset": "pid"}, readonly=True)
    with suppress(OSError):  # on older kernels ptrace(2)'s check keeps the daemon from following them
        wanted = _MOUNT_ATTR.pack(_MOUNT_ATTR_NOSYMFOLLOW | _MOUNT_ATTR_NOEXEC, 0, 0, 0)
        _syscall(_SYS_MOUNT_SETATTR, fd, b"", _AT_EMPTY_PATH, wanted, _MOUNT_ATTR.size)
    return fd


def tmpfs(size: int | None = None, mode: int = 0o755) -> int:
    """Mount a new tmpfs of at most *size* bytes (half of the memory if None); see detached_mount."""
    options: dict[str, str | None] = {"mode": f"{mode:o}"}
    if size is not None:
        options["size"] = str(size)
    return detached_mount("tmpfs", "cowfs", options)


def mount(source: str, path: str | bytes, fstype: str, flags: int, options: str) -> None:
    """Mount a filesystem at *path* (mount(2)); *flags* are MS_*. Releases the GIL."""
    target = os.fsencode(path)
    if _libc.mount(os.fsencode(source), target, fstype.encode(), flags, os.fsencode(options)):
        raise os_error(ctypes.get_errno(), path)


@contextmanager
def reached(path: str | bytes) -> Iterator[str]:
    """Yield a path in /proc that leads to what is at *path* now, whoever renames directories meanwhile.

    Asks no filesystem at *path*, which may hang. OSError: ELOOP if a symbolic link is there, or on the way.
    """
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        there = os.readlink(b"/proc/self/fd/%d" % fd)
        if there != os.path.abspath(os.fsencode(path)) or _is_link(fd):
            raise OSError(errno.ELOOP, "its path leads elsewhere now", path)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _is_link(fd: int) -> bool:
    try:
        os.readlink(b"", dir_fd=fd)
    except OSError:
        return False
    return True


def bind(source: str | int, path: str, *, readonly: bool = False) -> None:
    """Bind *source*, a path or descriptor, with all its current mounts to *path*. OSError.

    Follows no symbolic link at *path*, or on the way; see :func:`reached`.
    """
    if isinstance(source, int):
        source = f"/proc/self/fd/{source}"
    how = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_RECURSIVE
    clone = _syscall(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(source), how)
    try:
        attributes = _MOUNT_ATTR.pack(_MOUNT_ATTR_RDONLY if readonly else 0, 0, _MS_PRIVATE, 0)
        try:
            empty = _AT_EMPTY_PATH | _AT_RECURSIVE
            _syscall(_SYS_MOUNT_SETATTR, clone, b"", empty, attributes, _MOUNT_ATTR.size)
        except OSError:  # ENOSYS before Linux 5.12
            if readonly:
                raise
        with reached(path) as place:
            _attach(clone, place, _MOVE_MOUNT_T_SYMLINKS)
    finally:
        os.close(clone)


def change_root(root: str) -> None:
    """Make the mountpoint *root* the root of this process in a new mount namespace, without the old root.

    For a process with one thread. OSError.
    """
    unshare_slave()
    os.chdir(root)
    number = _SYS_PIVOT_ROOT.get(os.uname().machine, _SYS_PIVOT_ROOT_ELSEWHERE)
    _syscall(number, b".", b".")
    umount2(".", MNT_DETACH)
    os.chdir("/")


def umount2(path: str | bytes, flags: int = 0) -> None:
    """Unmount *path* (umount2(2)). Blocks unless MNT_DETACH; releases the GIL."""
    if _libc.umount2(os.fsencode(path), flags):
        raise os_error(ctypes.get_errno(), path)


def unmount(mountpoint: str | bytes, flags: int = 0) -> None:
    """Unmount what is at *mountpoint*, as :func:`umount2` does, but through no symbolic link. OSError.

    Nobody can rename a mountpoint, but others may be able to rename the directories above it.
    """
    above, name = os.path.split(os.fsencode(mountpoint))
    if not name:
        umount2(mountpoint, flags)
        return
    with reached(above) as place:
        umount2(os.path.join(os.fsencode(place), name), flags | _UMOUNT_NOFOLLOW)


def leave(mountpoint: str) -> None:
    """Detach a mount for this process alone, which from now on sees the directory below it. OSError."""
    if _libc.unshare(_CLONE_NEWNS) or _libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None):
        raise os_error(ctypes.get_errno(), mountpoint)
    umount2(mountpoint, MNT_DETACH)


def enter_user_namespace(user: int, group: int) -> None:
    """Enter a user namespace that has only this user and group, with all capabilities in it. OSError.

    For a process with one thread. *user* and *group* are its own.
    """
    unshare_users()
    map_user(user, group)


def unshare_users() -> None:
    """Enter a user namespace without users, with all capabilities in it. For a process with one thread."""
    if _libc.unshare(_CLONE_NEWUSER):
        raise os_error(ctypes.get_errno())


def map_user(user: int, group: int, inside: int | None = None) -> None:
    """Map only this user and group into this process's user namespace, as the number *inside* if given."""
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user if inside is None else inside} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group if inside is None else inside} {group} 1")


def hide_table() -> None:
    """Hide all mounts in /proc/mounts from this process and the program that it executes.

    OSError if it may not have a mount namespace of its own; a user needs a user namespace for that.
    """
    namespaces = _CLONE_NEWNS | (0 if os.geteuid() == 0 else _CLONE_NEWUSER)
    if (
        _libc.unshare(namespaces)
        or _libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None)
        or _libc.mount(b"/dev/null", b"/proc/self/mounts", None, _MS_BIND, None)
    ):
        raise os_error(ctypes.get_errno(), "/proc/mounts")


def drop_unused(path: str, dev: str) -> None:
    """Make the kernel drop the unused names and inodes of the filesystem mounted at *path*.

    Writes back first. Blocks. ENXIO if that filesystem is not *dev*, EPERM without CAP_SYS_ADMIN.
    """
    place = os.open(path, os.O_PATH | os.O_DIRECTORY)
    try:
        number = os.fstat(place).st_dev
        if f"{os.major(number)}:{os.minor(number)}" != dev:
            raise os_error(errno.ENXIO, path)
        context = _syscall(_SYS_FSPICK, place, b"", _FSPICK_CLOEXEC | _FSPICK_EMPTY_PATH)
    finally:
        os.close(place)
    try:
        _syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_RECONFIGURE, None, None, 0)
    finally:
        os.close(context)


def unshare_slave() -> None:
    """Enter a new mount namespace, whose mounts receive the changes of others and send none. OSError."""
    if _libc.unshare(_CLONE_NEWNS) or _libc.mount(None, b"/", None, _MS_REC | _MS_SLAVE, None):
        raise os_error(ctypes.get_errno())


def exchange_root(root: int, bound: Iterable[tuple[int, str]]) -> None:
    """Make a detached mount the read-only root of this process and all its threads; unmount all others.

    The detached mounts of *bound* are first attached to directories in it. OSError: EINVAL if pivot_root(2)
    does not accept the current root. If it fails, the root does not change.
    """
    os.fchdir(root)
    _attach(root, "/")
    try:
        for mount, place in bound:
            _attach(mount, place)
            os.close(mount)
        read_only = _MOUNT_ATTR.pack(_MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOEXEC, 0, 0, 0)
        _syscall(_SYS_MOUNT_SETATTR, root, b"", _AT_EMPTY_PATH, read_only, _MOUNT_ATTR.size)
        number = _SYS_PIVOT_ROOT.get(os.uname().machine, _SYS_PIVOT_ROOT_ELSEWHERE)
        _syscall(number, b".", b".")
    except OSError:
        os.chdir("/")
        umount2(f"/proc/self/fd/{root}", MNT_DETACH)
        raise
    umount2(".", MNT_DETACH)
    os.chdir("/")


def _attach(mount: int, place: str, flags: int = 0) -> None:
    target = os.fsencode(place)
    _syscall(_SYS_MOVE_MOUNT, mount, b"", _AT_FDCWD, target, _MOVE_MOUNT_F_EMPTY_PATH | flags)


def remount(path: str | bytes, *, readonly: bool) -> None:
    """Remount the filesystem at *path* writable or read-only, with noatime.

    OSError: EBUSY if a file in it is open for writing, EROFS or EACCES if the disk is not writable.
    """
    flags = MS_REMOUNT | _MS_NOATIME | (_MS_RDONLY if readonly else 0)
    if _libc.mount(None, os.fsencode(path), None, flags, None):
        raise os_error(ctypes.get_errno(), path)
