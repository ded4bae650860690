"""Encrypted stores: a LUKS volume, in a file or on a block device, with the image of the store in it.

cryptsetup(8) opens it as a device of the kernel's device mapper. When its last user closes it or dies, the
kernel removes that device, and with it the loop device that holds the lock on the file.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cowfs.errors import StoreError, SystemFailure
from cowfs.linux import loop_devices, programs, safe_paths
from cowfs.linux.files import is_image, matching, open_ordinary, size_of
from cowfs.store.e2fsprogs import tools
from cowfs.store.e2fsprogs.signals import deferred
from cowfs.store.format.sizes import check_room, format_size
from cowfs.store.format.sniff import LUKS
from cowfs.store.served import lock
from cowfs.store.served.allocate import allocate
from cowfs.store.served.image import open_file

HEADER = 16 << 20
"""Bytes of a LUKS2 volume that its header takes."""
MOST_KEY = 8 << 20
"""Bytes of the largest key file that cryptsetup(8) reads."""

_OURS = "cowfs-"
_MEMORY = "262144"
"""KiB of memory for testing a passphrase. Small machines, which are to open the store too, have that much."""
_NO_KEY = 2
"""The exit code of cryptsetup(8) for a wrong passphrase."""
_TRIES = 3
_MOST_WORK = 600
"""Seconds of processor time for testing a passphrase against all key slots."""
_PATIENCE = 10.0
"""Seconds that the kernel may take to remove a device that nobody uses."""

Key = Callable[[int], bytes | None]
"""Called with the number of the attempt, from 0. Returns the passphrase; None to give up."""


def is_encrypted(path: str) -> bool:
    """Whether *path* is a LUKS volume, in a file or block device that this process may read."""
    if not is_image(path):
        return False
    with suppress(OSError), open(open_ordinary(path, os.O_RDONLY), "rb", buffering=0) as file:
        return file.read(len(LUKS)) == LUKS
    return False


@contextmanager
def opened(path: str, key: Key) -> Iterator[str]:
    """Open the volume at *path*, and yield the path of the device with its contents. Blocks.

    The device exists until the block ends and everyone who opened it in the block has closed it. An open
    volume is used as it is. SystemFailure if not root, without cryptsetup, or without the device mapper;
    StoreError for a wrong passphrase.
    """
    with ExitStack() as stack:
        device = _mapped(path)
        if device is None:
            must_be_possible(path)
            device = _open(path, key, stack)
        else:
            stack.callback(os.close, _held(path, device))
        _remove_when_unused(device)
        yield device


@contextmanager
def formatted(fd: int, path: str, key: bytes) -> Iterator[int]:
    """Make a volume in the file or block device *fd*; yield a descriptor of its contents. Blocks.

    After the block, it is on disk and closed. *path* is for messages.
    """
    with ExitStack() as stack:
        below = _below(fd, path, stack, read_only=False)
        how = ["--type", "luks2", "--batch-mode", "--pbkdf-memory", _MEMORY, "--key-file", "-"]
        code, said = _run(["luksFormat", *how, below], key)
        if code:
            raise StoreError(f"{path}: cryptsetup failed: {said}")
        name = _name(path)
        code, said = _run(["open", "--type", "luks", "--key-file", "-", below, name], key)
        if code:
            raise StoreError(f"{path}: cryptsetup failed: {said}")
        device = _device(name)
        stack.callback(_wait_removed, device)
        inside = _held(path, device, os.O_RDWR)
        stack.callback(os.close, inside)
        _remove_when_unused(device)
        yield inside
        os.fsync(inside)


def extend(path: str, size: int) -> None:
    """Grow the file of an unused volume to *size*, so that its contents can grow. Blocks.

    StoreError if *size* is smaller than the file, or if there is not enough space.
    """
    must_be_possible(path)
    fd = open_file(path)
    try:
        lock.lock(fd, path)
        lock.refuse_mounted_image(fd, path)
        length = size_of(fd)
        if size < length:
            raise StoreError(
                f"{path}: is {format_size(length)}, larger than the requested {format_size(size)}",
                "an encrypted store can only grow",
            )
        if size > length:
            check_room(path, f"/proc/self/fd/{fd}", size, length)
            allocate(fd, path, length, size)
    finally:
        os.close(fd)


def must_be_possible(path: str) -> None:
    """SystemFailure if no volume can be opened. Call it before asking for a passphrase."""
    if os.geteuid() != 0:
        raise SystemFailure(f"{path}: only root can open an encrypted store", "run this as root")
    if programs.find("cryptsetup") is None:
        raise SystemFailure(f"{path}: cryptsetup is not installed", "apt install cryptsetup-bin")
    if not _has_mapper():
        raise SystemFailure(
            f"{path}: this kernel has no device mapper, which opens encrypted volumes", "modprobe dm_crypt"
        )


def _has_mapper() -> bool:
    with suppress(OSError):
        os.close(os.open("/dev/mapper/control", os.O_RDWR | os.O_CLOEXEC))  # loads the module
        return True
    if programs.find("modprobe") is not None:
        tools.run(["modprobe", "dm_crypt"], merge=True)
    with suppress(OSError):
        return bool(re.search(r"\bdevice-mapper$", Path("/proc/misc").read_text(), re.MULTILINE))
    return False


def _open(path: str, key: Key, stack: ExitStack) -> str:
    fd, read_only = _writable(path)
    stack.callback(os.close, fd)
    lock.lock(fd, path, shared=read_only)
    lock.refuse_mounted_image(fd, path)
    below = _below(fd, path, stack, read_only=read_only)
    name = _name(path)
    command = ["open", "--type", "luks", *(["--readonly"] if read_only else []), "--key-file", "-"]
    code, said = _NO_KEY, ""
    for number in range(_TRIES):
        given = key(number)
        if given is None:
            break
        with deferred():
            code, said = _run([*command, below, name], given)
            if code == 0:
                device = _device(name)
                stack.callback(os.close, _held(path, device))
                return device
        if code != _NO_KEY:
            break
    if code == _NO_KEY:
        raise StoreError(f"{path}: wrong passphrase, or wrong key file")
    raise StoreError(f"{path}: cryptsetup cannot open it: {said}", "for details: cryptsetup luksDump FILE")


def _writable(path: str) -> tuple[int, bool]:
    """Return the descriptor of the volume, and whether it is read-only."""
    try:
        return open_file(path), False
    except StoreError:
        return open_file(path, read_only=True), True


def _below(fd: int, path: str, stack: ExitStack, *, read_only: bool) -> str:
    """Return the block device of a volume; a file gets a loop device, which keeps its lock."""
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        return os.path.realpath(path)
    try:
        loop, device = loop_devices.attach_loop(fd, readonly=read_only)
    except OSError as error:
        raise SystemFailure(f"{path}: cannot get a loop device: {error.strerror}", "modprobe loop") from None
    stack.callback(os.close, loop)
    return device


def _run(words: list[str], key: bytes) -> tuple[int, str]:
    """Run cryptsetup. The header is not trusted: it may not name plugins to load or demand endless work."""
    done = tools.run(
        ["cryptsetup", "--disable-external-tokens", *words], data=key, merge=True, work=_MOST_WORK
    )
    if done.returncode < 0:
        return done.returncode, f"stopped after {_MOST_WORK} s of work"
    return done.returncode, tools.last_line(done.stdout)


def _remove_when_unused(device: str) -> None:
    """Make the kernel remove a device once nobody has it open any more."""
    name = Path(f"/sys/class/block/{os.path.basename(device)}/dm/name").read_text().strip()
    if name.startswith(_OURS):
        _run(["close", "--deferred", name], b"")


def _device(name: str) -> str:
    """Return the kernel's name of a device: the other name vanishes when removal is requested."""
    return f"/dev/dm-{os.minor(os.stat(f'/dev/mapper/{name}').st_rdev)}"


def _held(path: str, device: str, flags: int = os.O_RDONLY) -> int:
    try:
        return os.open(device, flags | os.O_CLOEXEC)
    except OSError as error:
        raise StoreError(f"{path}: {device} cannot be opened: {error.strerror}", "try again") from None


def _name(path: str) -> str:
    """Return a unique name for the device."""
    name = _OURS + re.sub(r"[^A-Za-z0-9._-]", "_", os.path.basename(path))[:64]
    taken = {place.read_text().strip() for place in matching("/sys/block", "dm-*/dm/name")}
    return f"{name}-{secrets.token_hex(4)}" if name in taken else name


def _mapped(path: str) -> str | None:
    """Return the device with the volume's contents if it is already open; else None."""
    info = os.stat(path)
    if stat.S_ISBLK(info.st_mode):
        number = f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}"
        below = [Path(f"/sys/dev/block/{number}").resolve().name]
    else:
        below = [os.path.basename(device) for device in safe_paths.loop_users(path)]
    for place in matching("/sys/block", "dm-*"):
        with suppress(OSError):
            used = {entry.name for entry in matching(place / "slaves", "*")}
            if used & set(below) and (place / "dm/uuid").read_text().startswith("CRYPT-"):
                return f"/dev/{place.name}"
    return None


def _wait_removed(device: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        try:
            os.close(os.open(device, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.ENXIO, errno.ENODEV}:
                return
        time.sleep(0.01)
