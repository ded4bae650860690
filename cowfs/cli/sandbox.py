"""A root for one command: the merged tree of a directory or an image, with /dev, /proc and /sys.

Each filesystem that is mounted in the directory gets its own union and store. Filesystems that do not store
files (/proc, /sys) are shown unchanged, and read-only ones stay read-only. /dev has only the usual devices.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from cowfs.cli import mount
from cowfs.cli.output import warn
from cowfs.errors import CowfsError, SystemFailure, UsageError
from cowfs.exports.target import remove
from cowfs.linux import mounts
from cowfs.linux.mount_table import MountInfo, mountinfo, visible
from cowfs.linux.sockets import control_directories
from cowfs.url.names import is_url

_KERNELS = frozenset(
    (
        *("proc", "sysfs", "cgroup", "cgroup2", "mqueue", "debugfs", "tracefs", "securityfs", "bpf", "nsfs"),
        *("configfs", "fusectl", "pstore", "hugetlbfs", "binfmt_misc", "efivarfs", "rpc_pipefs"),
        *("selinuxfs", "nfsd", "devpts", "devtmpfs"),
    )
)
"""Filesystems that show data of the kernel."""
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "fuse")
_LINKS = (
    *(("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")),
    ("ptmx", "pts/ptmx"),
)
_FOR_APT = "/dev/cowfs/apt.conf"
"""Configuration of apt for a root without other users, where apt cannot become _apt."""
_TMPFS = mounts.MS_NOSUID


@dataclass(frozen=True, slots=True)
class Part:
    """One union of the root."""

    lower: str
    mountpoint: str
    at: bytes
    """Its path in the root, without a leading slash."""
    store: str
    """The path of its store, or ``memory``."""
    is_new: bool
    """Whether the store was created for this run."""


class Sandbox:
    """A root that is being built and used."""

    def __init__(self, args: argparse.Namespace, private: str) -> None:
        """*private* is an empty directory in a private mount namespace. SystemFailure, UsageError."""
        self._args = args
        self._by_url = is_url(args.root)
        self._lower = args.root if self._by_url else os.path.realpath(args.root)
        if not (self._by_url or os.path.exists(self._lower)):
            raise UsageError(f"{args.root}: no such file or directory", "give an image or a directory")
        self._inside = [each for each in visible(mountinfo()) if self._is_inside(each)]
        try:
            mounts.mount("cowfs", private, "tmpfs", _TMPFS, "mode=711")
            self.path = os.path.join(os.path.realpath(private), "root")
            os.mkdir(self.path)
        except OSError as error:
            raise SystemFailure(f"{private}: {error.strerror}") from None
        self.parts: list[Part] = []
        self._mounted: list[tuple[str, bool]] = []
        """The mountpoints, and whether a union is mounted there."""

    @property
    def is_directory(self) -> bool:
        return os.path.isdir(self._lower)

    def build(self) -> None:
        """Mount everything. CowfsError; :attr:`parts` then lists what is already mounted."""
        self._cover(self._lower, "", self._args.store or "memory")
        shown: list[str] = []
        sockets = self._socket_directories()
        for each in self._inside:
            place = os.fsdecode(each.mountpoint)
            at = os.path.relpath(place, self._lower)
            if any(at == above or at.startswith(f"{above}/") for above in ("dev", *shown, *sockets)):
                continue
            if each.fstype in _KERNELS:
                shown.append(at)
            if each.fstype != "autofs" and self._is_there(at):
                self._show(each, place, at)
        for at in ("proc", "sys"):
            if at not in shown and self._is_directory(at):
                self._bind(f"/{at}", at)
        if not self._is_host() and self._is_directory("run"):
            self._mount("run", "tmpfs", "mode=755")
        if self._is_directory("dev"):
            self._bind(self._make_dev(), "dev")
        self._hide_store()
        for at in filter(self._is_directory, sockets):
            self._mount(at, "tmpfs", "mode=700")

    def enter(self) -> None:
        """Make this the root of the process; keep the working directory if it exists in the root."""
        here = ".."
        with suppress(FileNotFoundError):  # it was removed
            here = os.path.relpath(os.getcwd(), self._lower) if self.is_directory else ".."
        mounts.change_root(self.path)
        with suppress(OSError):
            os.chdir(here if here.split("/")[0] != ".." else "/")

    def close(self, unmount: Callable[[str], object]) -> None:
        """Unmount everything, the unions by *unmount*."""
        while self._mounted:
            path, is_union = self._mounted.pop()
            if is_union:
                unmount(path)
            else:
                with suppress(OSError):
                    mounts.umount2(path, mounts.MNT_DETACH)

    def _is_host(self) -> bool:
        return bool(self._lower == "/")

    def _is_there(self, at: str) -> bool:
        """Whether *at* exists in the root without a symbolic link on the way.

        The target of a link is outside the root, and a mount there would hide the system's own files.
        """
        path = os.path.join(self.path, at)
        return os.path.lexists(path) and os.path.realpath(path) == path

    def _is_directory(self, at: str) -> bool:
        return self._is_there(at) and os.path.isdir(os.path.join(self.path, at))

    def _is_inside(self, each: MountInfo) -> bool:
        """Whether the mount is inside the root, and not the root itself."""
        path = os.fsdecode(each.mountpoint)
        return path != self._lower and path.startswith(f"{self._lower.rstrip('/')}/")

    def _show(self, each: MountInfo, place: str, at: str) -> None:
        if each.fstype in _KERNELS:
            self._bind(place, at)
        elif _is_of_another_user(each):  # do not access it, because its user may let it hang
            self._bind(place, at, readonly=True)
        elif not os.path.isdir(place) or "ro" in {*each.options.split(","), *each.super_words}:
            self._bind(place, at, readonly=True)
        elif self._is_directory(at):
            try:
                self._cover(place, at, self._store_of(at))
            except CowfsError as error:
                warn(f"{place} is read-only for the command: {error.message}")
                self._bind(place, at, readonly=True)

    def _store_of(self, at: str) -> str:
        """Return the store of the mount at *at*, which is beside that of the root."""
        if not self._args.store or self._args.store == "memory":
            return "memory"
        beside = f"{os.path.abspath(self._args.store)}.mounts"
        with suppress(OSError):  # opening the store reports it
            os.makedirs(beside, mode=0o700, exist_ok=True)
        return os.path.join(beside, name_of(os.fsencode(at)))

    def _cover(self, lower: str, at: str, store: str) -> None:
        args = argparse.Namespace(**vars(self._args))
        args.lower = lower if is_url(lower) else lower.replace("\\", "\\\\").replace(":", "\\:")
        args.mountpoint = os.path.join(self.path, at).rstrip("/")
        args.store = store
        is_new = store != "memory" and not os.path.lexists(store)
        mount.mounted(args, hides_store=True)
        self._mounted.append((args.mountpoint, True))
        self.parts.append(Part(lower, args.mountpoint, os.fsencode(at), store, is_new))

    def _bind(self, source: str, at: str, *, readonly: bool = False) -> None:
        try:
            mounts.bind(source, os.path.join(self.path, at), readonly=readonly)
            self._mounted.append((os.path.join(self.path, at), False))
        except OSError as error:
            warn(f"{source} is not available to the command: {error.strerror}")

    def _mount(self, at: str, fstype: str, options: str, *, readonly: bool = False) -> None:
        flags = _TMPFS | (mounts.MS_RDONLY if readonly else 0)
        try:
            with mounts.reached(os.path.join(self.path, at)) as place:
                mounts.mount("cowfs", place, fstype, flags, options)
            self._mounted.append((os.path.join(self.path, at), False))
        except OSError as error:
            shown = os.path.normpath(f"/{at}")
            raise SystemFailure(f"{shown}: cannot be mounted for the command: {error.strerror}") from None

    def _make_dev(self) -> str:
        """Make the future /dev outside the root, so that users who can change the root redirect no writes."""
        beside = os.path.join(os.pardir, "dev")
        dev = os.path.join(os.path.dirname(self.path), "dev")
        os.mkdir(dev)
        self._mount(beside, "tmpfs", "mode=755")
        for name in _DEVICES:
            if os.path.exists(f"/dev/{name}"):
                with open(os.path.join(dev, name), "xb"):
                    pass
                self._bind(f"/dev/{name}", os.path.join(beside, name))
        for name, target in _LINKS:
            os.symlink(target, os.path.join(dev, name))
        for name in ("pts", "shm", "cowfs"):
            os.mkdir(os.path.join(dev, name))
        self._mount(os.path.join(beside, "pts"), "devpts", "newinstance,ptmxmode=0666,mode=620")
        self._mount(os.path.join(beside, "shm"), "tmpfs", "mode=1777")
        with suppress(OSError):  # it does not exist
            terminal = os.ttyname(0)
            with open(os.path.join(dev, "console"), "xb"):
                pass
            self._bind(terminal, os.path.join(beside, "console"))
        with open(os.path.join(dev, os.path.relpath(_FOR_APT, "/dev")), "x", encoding="ascii") as file:
            file.write('APT::Sandbox::User "root";\n')
        return dev

    @staticmethod
    def environment(given: dict[bytes, bytes], *, all_there: bool) -> dict[bytes, bytes]:
        """Return the environment for the command; *all_there*: users other than root exist."""
        return given if all_there else {b"APT_CONFIG": _FOR_APT.encode(), **given}

    def _hide_store(self) -> None:
        """Hide the stores from the command, which could otherwise modify them."""
        for path in {os.path.realpath(part.store) for part in self.parts if part.store != "memory"}:
            at = os.path.relpath(path, self._lower)
            there = os.path.join(self.path, at)
            if at.split("/")[0] == ".." or not os.path.lexists(there):
                continue
            if os.path.isdir(there):
                self._mount(at, "tmpfs", "mode=0", readonly=True)
            else:
                self._bind("/dev/null", at)

    def _socket_directories(self) -> list[str]:
        """Return the directories for the sockets of daemons, of which the command gets its own, empty ones.

        In the merged tree the sockets of the system's daemons seem dead. A mount by the command would remove
        them, and a commit would then remove those of the system.
        """
        if not self._is_host():
            return []
        return [os.path.relpath(directory, "/") for directory in control_directories(os.geteuid())]


def _is_of_another_user(each: MountInfo) -> bool:
    """Whether a user other than root and this one serves the mount through FUSE."""
    user = next((word[8:] for word in each.super_words if word.startswith("user_id=")), "0")
    return each.fstype.split(".")[0] in ("fuse", "fuseblk") and user not in ("0", str(os.geteuid()))


def name_of(at: bytes) -> str:
    """Return the file name of the store for the mount at *at*.

    It has no dot, because a name with one would mean a store in an image.
    """
    return os.fsdecode(at).replace("%", "%25").replace("/", "%2F").replace(".", "%2E")


def forget_unused(parts: list[Part], used: set[str]) -> None:
    """Remove the stores that were created but not used. Nothing may be mounted."""
    for part in parts[1:]:
        if part.is_new and part.mountpoint not in used:
            remove(part.store)
            with suppress(OSError):
                os.rmdir(os.path.dirname(part.store))
