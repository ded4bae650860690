"""Find the stores that a boot would find: on the same devices, in the same order, with the same name.

The rules are those of mount-helpers/boot, see cowfs-boot(7). The mounts made here are not visible to other
processes.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cowfs.errors import CowfsError, UsageError
from cowfs.linux.files import matching
from cowfs.store.disks.block_device import DEFAULT, is_raid_member, look, mounts_of
from cowfs.store.offline.info import store_info
from cowfs.store.served import luks

_NO_DISKS = re.compile(r"(loop|ram|zram)\d*|fd\d+")
_READ_ONLY = {"iso9660", "udf", "squashfs"}


@dataclass(frozen=True, slots=True)
class Wanted:
    """The value of ``backstore=``."""

    path: str = DEFAULT
    scope: str = "removable"
    """``removable``, ``all`` or ``off``."""


@dataclass(slots=True)
class Found:
    """A file with the right name on a device that a boot examines, or why the device cannot be examined."""

    device: str
    """``/dev/NAME``."""
    path: str
    """The path on the filesystem of the device."""
    where: str = ""
    """Where the filesystem is mounted now; "" if it is not."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The result of :func:`store_info`; empty if there is a *problem*."""
    writable: bool = True
    problem: str = ""
    encrypted: bool = False
    """Whether the store is a LUKS volume, whose contents are not known."""
    taken: bool = False
    why: str = ""


_WAYS = "write off, alldev, /PATH, or alldev,/PATH"


def parse_wanted(text: str) -> Wanted:
    """Parse the value of ``backstore=``. UsageError if a boot would warn about it."""
    path, scope = "", "removable"
    for item in filter(None, text.removeprefix("backstore=").split(",")):
        if item in {"off", "alldev"}:
            scope = "off" if "off" in {item, scope} else "all"
        elif not item.startswith("/") or item.endswith("/") or {".", ".."} & set(item.split("/")):
            raise UsageError(f"{item!r} is not off, alldev or the path of a store", _WAYS)
        elif path:
            raise UsageError(f"more than one path: {path}, {item}", _WAYS)
        else:
            path = re.sub("//+", "/", item)
    if scope == "off" and path:
        raise UsageError(f"off and {path} exclude each other", _WAYS)
    return Wanted(path or DEFAULT, scope)


def devices(scope: str, sys: Path = Path("/sys")) -> Iterator[str]:
    """Yield the names of the block devices that a boot examines, in its order."""
    for disk in sorted((sys / "block").iterdir()):
        if _NO_DISKS.fullmatch(disk.name) or _fact(disk / "size") == "0":
            continue
        if _fact(disk / "dm/suspended") == "1":
            continue  # reading it would block
        if scope != "all" and not is_removable(disk):
            continue
        parts = [part for part in matching(disk, f"{disk.name}*") if (part / "partition").exists()]
        for place in [*sorted(parts, key=lambda part: int(_fact(part / "partition"))), disk]:
            if not matching(place / "holders", "*"):
                yield place.name


def is_removable(disk: Path) -> bool:
    """Whether a disk, a directory below /sys/block, is removable: a stick, card, disc or USB disk."""
    real = disk.resolve()
    if _fact(disk / "removable") == "1" or _fact(disk / "device/type") == "SD":
        return True
    if any(re.match(r"usb\d", part) for part in real.parts):
        return True
    for slave in matching(disk / "slaves", "*"):
        below = slave.resolve()
        return is_removable(below.parent if (below / "partition").exists() else below)
    return False


def _fact(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def find_stores(wanted: Wanted, *, fingerprint: str = "", first: str = "") -> list[Found]:
    """Return the stores that a boot with the parameter *wanted* would find, in its order.

    *fingerprint* is that of the root image, if known; *first* is the device that the image is on. Each result
    says whether the boot would use it. Root also examines devices that are not mounted. Blocks.
    """
    if wanted.scope == "off":
        return []
    names = list(devices(wanted.scope))
    names.sort(key=lambda name: name != first)
    found = [thing for name in names for thing in _look(name, wanted.path)]
    found.sort(key=lambda thing: not thing.writable)
    _judge(found, fingerprint)
    return found


def _look(name: str, path: str) -> Iterator[Found]:
    """Yield the store at *path* on one device, if there is one."""
    device = "/dev/" + name.replace("!", "/")
    with ExitStack() as stack:
        found = Found(device, path)
        try:
            here = mounts_of(device)
        except OSError:
            return
        if here:
            shown = min(here, key=lambda mount: len(mount.mountpoint))  # the one that users know
            found.where = os.fsdecode(shown.mountpoint)
            root, fstype = found.where, shown.fstype
        elif os.geteuid() != 0:
            return
        else:
            mounted = look(device)
            if mounted is None:
                return
            fd, fstype = mounted
            stack.callback(os.close, fd)
            root = f"/proc/{os.getpid()}/fd/{fd}"  # a path that also works in child processes
        found.writable = fstype not in _READ_ONLY and _fact(Path("/sys/class/block", name, "ro")) != "1"
        found.writable = found.writable and not is_raid_member(device)
        if os.path.lexists(root + path):
            _ask(found, root + path)
            yield found


def _ask(found: Found, place: str) -> None:
    mode = os.lstat(place).st_mode
    if not stat.S_ISREG(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "a directory" if stat.S_ISDIR(mode) else "no file"
        found.problem = f"is {kind}, not a store"
        return
    if luks.is_encrypted(place):
        found.encrypted = True
        return
    try:
        found.facts = store_info(place)
        found.facts["path"] = found.path
    except CowfsError as error:
        found.problem = error.message.removeprefix(f"{place}: ")


def _judge(found: list[Found], fingerprint: str) -> None:
    """Set whether a boot would use each store, and why."""
    taken = None
    for thing in found:
        facts = thing.facts
        lowers = [lower["fingerprint"] for lower in facts.get("lowers", ())]
        if thing.problem:
            thing.why = thing.problem
        elif thing.encrypted and taken is not None:
            thing.why = f"{taken.device} takes precedence"
        elif thing.encrypted:
            thing.taken, taken = True, thing
            thing.why = "the first one; it is encrypted, so a boot asks for the passphrase before it looks"
        elif facts["format"] not in {"overlayfs", "none yet"}:
            thing.why = f"has the format {facts['format']}, which cannot be used"
        elif fingerprint and lowers and lowers[-1] != fingerprint:
            thing.why = "belongs to another root image"
        elif not thing.writable and not lowers:
            thing.why = "is empty, and is not writable"
        elif taken:
            thing.why = f"{taken.device} takes precedence"
        else:
            thing.taken, taken = True, thing
            thing.why = "the first usable store"
            if not thing.writable:
                thing.why += "; it cannot be written to: changes will be in memory"
            if len(lowers) > 1:
                thing.why += ", with the stores on read-only media that it stands on"
            if not fingerprint and lowers:
                thing.why += ", if its lower is the root image"
