"""Mounts, loop devices and locks: what the kernel is asked for, and what it tells about them.

Little here touches a mount namespace: :func:`detached_mount` yields a mount that only its descriptor
leads to, and a loop device detaches itself with its last user. When the process dies, however it dies,
the kernel takes both away. Needs Linux 5.8 (LOOP_CONFIGURE) and CAP_SYS_ADMIN, where not said otherwise.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import select
import stat
import struct
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8  # include/uapi/linux/mount.h
MNT_FORCE = 1
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

# include/uapi/linux/mount.h
_MS_RDONLY, _MS_REMOUNT, _MS_NOATIME = 1, 0x20, 0x400

# The same on all architectures but alpha: include/uapi/asm-generic/unistd.h
_SYS_OPEN_TREE, _SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT, _SYS_MOUNT_SETATTR = 428, 430, 431, 432, 442
_SYS_FSPICK = 433
_SYS_MOVE_MOUNT = 429
_MOVE_MOUNT_F_EMPTY_PATH = 4
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
_AT_EMPTY_PATH = 0x1000
_MS_REC, _MS_PRIVATE, _MS_SLAVE = 1 << 14, 1 << 18, 1 << 19
_CLONE_NEWNS = 0x20000  # include/uapi/linux/sched.h
_MOUNT_ATTR_ATIME = 0x70  # MOUNT_ATTR__ATIME: all that says when times of access are kept
_MOUNT_ATTR = struct.Struct("=QQQQ")  # struct mount_attr: attr_set, attr_clr, propagation, userns_fd
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV, _MOUNT_ATTR_NOATIME = 1, 2, 4, 0x10
_MOUNT_ATTR_NOEXEC, _MOUNT_ATTR_NOSYMFOLLOW = 8, 0x200000

# include/uapi/linux/loop.h
_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LOOP_GET_STATUS64 = 0x4C05
_LO_FLAGS_READ_ONLY, _LO_FLAGS_AUTOCLEAR = 1, 4
# struct loop_info64: device, inode, rdevice, offset, sizelimit; number, encrypt_type, key_size, flags;
# file_name[64], crypt_name[64], encrypt_key[32]; init[2]
_LOOP_INFO64 = struct.Struct("=5Q4I64s64s32s2Q")
_LOOP_CONFIG_HEAD = struct.Struct("=II")  # struct loop_config: fd, block_size; info; reserved[8]
_LOOP_CONFIG_RESERVED = bytes(64)
_LOOP_TRIES = 64

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    """Call the kernel by number. Raises OSError; releases the GIL."""
    words = [ctypes.c_long(word) if isinstance(word, int) else ctypes.c_char_p(word) for word in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *words))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


# --- mounting


def detached_mount(
    fstype: str,
    source: str | bytes,
    options: Mapping[str, str | None],
    *,
    readonly: bool = False,
    noatime: bool = True,
) -> int:
    """Mount a filesystem that is in no namespace and return an O_PATH descriptor of its root.

    *options* are the filesystem's own; None as value makes a flag of one. The mount is nosuid and
    nodev, and ends when the descriptor and everything opened through it are closed (the kernel may
    need a moment more; loop_backing() tells). Blocks as mount(2) does. Raises OSError with the kernel's
    own words, where it has some (fsopen(2), fsconfig(2)).
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
    """Return what the kernel has logged in a filesystem context, errors and warnings, in one line."""
    lines = []
    with suppress(OSError):  # ENODATA after the last one
        while line := os.read(context, 4096):
            lines.append(line.decode(errors="replace").strip())
    # Each line starts with its level and a space: "e ", "w ", "i ".
    return "; ".join(line[2:] for line in lines if line[:2] in {"e ", "w "})


def private_clone(directory: int) -> int:
    """Return the same directory in a mount of its own that is in no namespace (open_tree(2)).

    What is mounted inside the directory, now or later, is not in there: neither can it be waited for. That is
    how the kernel's overlayfs has its layers (clone_private_mount()). *directory* is an open descriptor; the
    new one is O_PATH. Raises OSError: EPERM without CAP_SYS_ADMIN, EINVAL where a user namespace hides
    things by mounts.
    """
    clone = _syscall(_SYS_OPEN_TREE, directory, b"", _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_EMPTY_PATH)
    # Private: since Linux 6.15 what is mounted on a shared mount comes to its clones. Before 5.12 there is no
    # mount_setattr(2), and nothing comes.
    with suppress(OSError):
        wanted = _MOUNT_ATTR_NOATIME | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV | _MOUNT_ATTR_NOEXEC
        how = _MOUNT_ATTR.pack(wanted, _MOUNT_ATTR_ATIME, _MS_PRIVATE, 0)
        _syscall(_SYS_MOUNT_SETATTR, clone, b"", _AT_EMPTY_PATH, how, _MOUNT_ATTR.size)
    return clone


def private_clone_of(path: str) -> int:
    """Return the same of the directory at *path*."""
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return private_clone(fd)
    finally:
        os.close(fd)


def processes() -> int:
    """Mount a proc filesystem that shows processes alone, read-only, and by which nobody reaches what they
    have open or where they are: no link in it is followed (Linux 5.14). See detached_mount."""
    fd = detached_mount("proc", "proc", {"subset": "pid"}, readonly=True)
    with suppress(OSError):  # then the kernel asks for more capabilities than a daemon has: ptrace(2)
        wanted = _MOUNT_ATTR.pack(_MOUNT_ATTR_NOSYMFOLLOW | _MOUNT_ATTR_NOEXEC, 0, 0, 0)
        _syscall(_SYS_MOUNT_SETATTR, fd, b"", _AT_EMPTY_PATH, wanted, _MOUNT_ATTR.size)
    return fd


def tmpfs(size: int | None = None, mode: int = 0o755) -> int:
    """Mount a fresh tmpfs of at most *size* bytes (half of the memory if None); see detached_mount."""
    options: dict[str, str | None] = {"mode": f"{mode:o}"}
    if size is not None:
        options["size"] = str(size)
    return detached_mount("tmpfs", "cowfs", options)


def mount(source: str, path: str | bytes, fstype: str, flags: int, options: str) -> None:
    """Mount a filesystem at *path* (mount(2)); *flags* are MS_*. Releases the GIL."""
    target = os.fsencode(path)
    if _libc.mount(os.fsencode(source), target, fstype.encode(), flags, os.fsencode(options)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)


def umount2(path: str | bytes, flags: int = 0) -> None:
    """Unmount what is mounted at *path* (umount2(2)). Blocks unless MNT_DETACH; releases the GIL."""
    if _libc.umount2(os.fsencode(path), flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)


def leave(mountpoint: str) -> None:
    """Take a mount away for this process alone: from now on it sees what is below. Raises OSError."""
    if _libc.unshare(_CLONE_NEWNS) or _libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), mountpoint)
    umount2(mountpoint, MNT_DETACH)


def drop_unused(path: str, dev: str) -> None:
    """Let the kernel drop the names and inodes of the filesystem mounted at *path* that nobody uses.

    Writes back first, and blocks. ENXIO if what is mounted there is not *dev*, EPERM without CAP_SYS_ADMIN.
    """
    place = os.open(path, os.O_PATH | os.O_DIRECTORY)
    try:
        number = os.fstat(place).st_dev
        if f"{os.major(number)}:{os.minor(number)}" != dev:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), path)
        context = _syscall(_SYS_FSPICK, place, b"", _FSPICK_CLOEXEC | _FSPICK_EMPTY_PATH)
    finally:
        os.close(place)
    try:
        _syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_RECONFIGURE, None, None, 0)
    finally:
        os.close(context)


def unshare_slave() -> None:
    """Give this process mounts of its own, to which the others' changes come, and back nothing. OSError."""
    if _libc.unshare(_CLONE_NEWNS) or _libc.mount(None, b"/", None, _MS_REC | _MS_SLAVE, None):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def exchange_root(root: int, bound: Iterable[tuple[int, str]]) -> None:
    """Make a detached mount the root of this process and of all its threads, and let go of the mounts that it
    has seen. Other detached mounts are attached to directories in it first. It cannot be written to.

    Raises OSError, EINVAL where the root is none that pivot_root(2) takes; then the root is the old one.
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


def _attach(mount: int, place: str) -> None:
    target = os.fsencode(place)
    _syscall(_SYS_MOVE_MOUNT, mount, b"", _AT_FDCWD, target, _MOVE_MOUNT_F_EMPTY_PATH)


def remount(path: str | bytes, *, readonly: bool) -> None:
    """Let the filesystem that is mounted at *path* be written to, or not any more; noatime. Raises OSError:
    EBUSY for a file in it that is open to write, EROFS or EACCES for a disk that cannot be written to."""
    flags = _MS_REMOUNT | _MS_NOATIME | (_MS_RDONLY if readonly else 0)
    if _libc.mount(None, os.fsencode(path), None, flags, None):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)


# --- loop devices


def attach_loop(
    image: str | bytes | os.PathLike[str] | int, *, readonly: bool = False, offset: int = 0
) -> tuple[int, str]:
    """Attach a file to a free loop device; return a descriptor of the device, and its path.

    *image* is a path or an open descriptor, whose open file description (with any flock(2) on it) the
    kernel then keeps until the device is detached. That happens by itself when the last user of the
    device, at first the descriptor returned, is gone. *offset* is in bytes. Raises OSError.
    """
    if not isinstance(image, int):
        flags = os.O_RDONLY if readonly else os.O_RDWR
        fd = os.open(image, flags | os.O_CLOEXEC | os.O_NONBLOCK)  # it may be a fifo by now
        try:
            return attach_loop(fd, readonly=readonly, offset=offset)
        finally:
            os.close(fd)
    for _ in range(_LOOP_TRIES):
        device = _free_loop()
        fd = os.open(device, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _LOOP_CONFIGURE, _loop_config(image, readonly, offset))
        except OSError as error:
            os.close(fd)
            if error.errno != errno.EBUSY:  # somebody else was faster: take the next one
                raise
        else:
            return fd, device
    raise OSError(errno.EBUSY, "no loop device could be had, others were faster each time")


def _free_loop() -> str:
    """Return the path of a loop device that nobody uses at the moment."""
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        # ioctl(2) answers with the number itself, so it must not be taken for an error.
        number = int(fcntl.ioctl(control, _LOOP_CTL_GET_FREE))
    finally:
        os.close(control)
    device = f"/dev/loop{number}"
    if not os.path.exists(device):  # no devtmpfs, or udev is late
        major, minor = Path(f"/sys/class/block/loop{number}/dev").read_text().split(":")
        with suppress(FileExistsError):
            os.mknod(device, stat.S_IFBLK | 0o600, os.makedev(int(major), int(minor)))
    return device


def _loop_config(image_fd: int, readonly: bool, offset: int) -> bytes:
    flags = _LO_FLAGS_AUTOCLEAR | (_LO_FLAGS_READ_ONLY if readonly else 0)
    name = os.readlink(b"/proc/self/fd/%d" % image_fd)[:63]
    info = _LOOP_INFO64.pack(0, 0, 0, offset, 0, 0, 0, 0, flags, name, b"", b"", 0, 0)
    return _LOOP_CONFIG_HEAD.pack(image_fd, 0) + info + _LOOP_CONFIG_RESERVED


def loop_users(path: str | bytes | os.PathLike[str]) -> list[str]:
    """Return the loop devices that stand on the file *path*, under whatever name they opened it.

    Works without privilege, but for files that were opened under a name that is gone by now.
    """
    wanted = os.stat(path)
    found = []
    for entry in Path("/sys/block").glob("loop*"):
        device = f"/dev/{entry.name}"
        backing = loop_backing(device)
        if backing is None:
            continue
        try:
            same = os.path.samestat(os.stat(backing), wanted)
        except OSError:
            # "NAME (deleted)", or a name of another mount namespace: only the device itself can tell.
            same = _loop_inode(device) == (wanted.st_dev, wanted.st_ino)
        if same:
            found.append(device)
    return sorted(found)


def loop_backing(device: str) -> bytes | None:
    """Return the name of the file behind a loop device as the kernel tells it; None when detached."""
    try:
        name = Path(f"/sys/block/{os.path.basename(device)}/loop/backing_file").read_bytes()
    except OSError:
        return None
    return name.rstrip(b"\n")


def _loop_inode(device: str) -> tuple[int, int] | None:
    buffer = bytearray(_LOOP_INFO64.size)
    try:
        with closing(open(device, "rb", buffering=0)) as file:
            fcntl.ioctl(file, _LOOP_GET_STATUS64, buffer, True)
    except OSError:
        return None
    device_number, inode = struct.unpack_from("=QQ", buffer)
    return device_number, inode


# --- what is mounted


@dataclass(frozen=True, slots=True)
class MountInfo:
    """One line of /proc/PID/mountinfo (proc_pid_mountinfo(5)), its octal escapes decoded."""

    id: int
    parent: int
    dev: str
    """``major:minor`` of the st_dev of its files."""
    root: bytes
    """The directory of the filesystem that is mounted here."""
    mountpoint: bytes
    options: str
    fstype: str
    source: bytes
    super_options: str
    super_words: tuple[str, ...]
    """The same, split at the commas that no name brought in."""


_ESCAPE = re.compile(rb"\\([0-7]{3})")


def _unescape(text: bytes) -> bytes:
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), text)


def parse_mountinfo(text: bytes) -> list[MountInfo]:
    """Return the mounts that a mountinfo file lists, in its order."""
    mounts = []
    for line in filter(None, text.split(b"\n")):  # a mountpoint may have any other kind of line end in it
        fields = line.split(b" ")
        dash = fields.index(b"-", 6)  # after a number of optional fields
        fstype, source, super_options = fields[dash + 1 : dash + 4]
        mounts.append(
            MountInfo(
                id=int(fields[0]),
                parent=int(fields[1]),
                dev=fields[2].decode(),
                root=_unescape(fields[3]),
                mountpoint=_unescape(fields[4]),
                options=fields[5].decode(),
                fstype=_unescape(fstype).decode(errors="replace"),
                source=_unescape(source),
                super_options=os.fsdecode(_unescape(super_options)),
                super_words=tuple(os.fsdecode(_unescape(word)) for word in super_options.split(b",")),
            )
        )
    return mounts


def mountinfo() -> list[MountInfo]:
    """Return the mounts of our namespace, oldest first. Needs no privilege."""
    return parse_mountinfo(Path("/proc/self/mountinfo").read_bytes())


def mount_of(path: str | bytes | os.PathLike[str]) -> MountInfo | None:
    """Return the topmost mount whose mountpoint is just *path* (made absolute, not resolved)."""
    wanted = os.fsencode(os.path.abspath(path))
    found = [mount for mount in mountinfo() if mount.mountpoint == wanted]
    return found[-1] if found else None


def mount_id(fd: int) -> int:
    """Return the number of the mount that *fd* was opened in: ``id`` of its MountInfo, if it has one."""
    text = Path(f"/proc/self/fdinfo/{fd}").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("mnt_id:"))


def where_is(fd: int) -> tuple[str, bytes]:
    """Return the filesystem (``major:minor``) that *fd* is on, and its path there: that from the root of the
    filesystem, whatever mount it was opened by."""
    path, at = os.readlink(b"/proc/self/fd/%d" % fd), mount_id(fd)
    for mount in mountinfo():
        if mount.id == at:
            return mount.dev, mount.root.rstrip(b"/") + path[len(mount.mountpoint.rstrip(b"/")) :]
    device = os.fstat(fd).st_dev
    return f"{os.major(device)}:{os.minor(device)}", path


# --- locks and processes


def who_locks(path: str | bytes | os.PathLike[str]) -> int | None:
    """Return the process that holds a flock(2) on *path*; None when nobody does that we can see.

    /proc/locks names the process that took the lock. When that one is gone (a daemon's parent; then a PID
    namespace shows no line at all), the one that has it open now is looked for, which only root can do for
    the processes of others.
    """
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        inode = os.fstat(fd).st_ino
        device = _device_of(fd)
    finally:
        os.close(fd)
    pids = []
    # 1: FLOCK  ADVISORY  WRITE 1234 fe:00:123456 0 EOF     ("1: -> FLOCK" waits for it)
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if len(fields) < 6 or fields[1] != "FLOCK":
            continue
        major, minor, number = fields[5].split(":")
        if (int(major, 16), int(minor, 16), int(number)) == (*device, inode):
            pids.append(int(fields[4]))
    for pid in pids:
        if pid > 0 and os.path.exists(f"/proc/{pid}"):
            return pid
    return _who_has_locked(inode, device)


def _device_of(fd: int) -> tuple[int, int]:
    """Return the device of the filesystem of *fd*: not st_dev, which btrfs makes up per subvolume."""
    at = mount_id(fd)
    for mount in mountinfo():
        if mount.id == at:
            major, minor = mount.dev.split(":")
            return int(major), int(minor)
    device = os.fstat(fd).st_dev
    return os.major(device), os.minor(device)


def _who_has_locked(inode: int, device: tuple[int, int]) -> int | None:
    lock = f"{device[0]:02x}:{device[1]:02x}:{inode} "
    for entry in Path("/proc").glob("[0-9]*/fdinfo/*"):
        with suppress(OSError):
            if any(line.startswith("lock:") and lock in line for line in entry.read_text().splitlines()):
                return int(entry.parts[2])
    return None


def wait_pid_gone(pid: int, timeout: float) -> bool:
    """Wait until process *pid* has ended, at most *timeout* seconds; say whether it has. Blocks."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(timeout * 1000))
    finally:
        os.close(fd)
