"""``cowfs umount``: unmount, and wait until all changes are written and the store is released."""

from __future__ import annotations

import argparse
import errno
import os
import subprocess
import threading
import time
from contextlib import suppress
from typing import Any

from cowfs.cli import options
from cowfs.cli.output import warn
from cowfs.cli.unmount_request import UnmountRequest
from cowfs.client import Silent, facts_of, owner_of, the_mount
from cowfs.errors import CowfsError, MountFailure, SystemFailure, UsageError
from cowfs.linux import mounts, programs
from cowfs.linux.mount_table import MountInfo, mountinfo
from cowfs.linux.namespaces import mounted_elsewhere
from cowfs.linux.pids import wait_pid_gone

NAME = "umount"
MNT_DETACH = 2
_PATIENCE = 3.0
"""After so many seconds, a message says what cowfs waits for."""
_LONG = 60.0
"""The time limit for an answer of the daemon, in seconds."""
_QUIET = 10.0
"""After so many seconds, another message lists the current other mounts, because namespaces come and go."""
_NAMED = 3
"""How many other mounts a message names."""

_EPILOG = """\
umount(8) returns before the daemon has written all changes and released the store. This command waits for
that, so that afterwards the store can be copied, checked, resized or unplugged. If the tree is also mounted
elsewhere (by a bind mount, or in another mount namespace), it prints where, and waits for that unmount.

example:
  cowfs umount /mnt
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand's parser."""
    parser = options.add_subcommand(
        subparsers,
        NAME,
        "unmount, and wait until all changes are written",
        "Unmount MOUNTPOINT, and wait until all changes are written and the store is released.",
        _EPILOG,
    )
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parser.add_argument(
        "-l", "--lazy", action="store_true", help="detach now, finish when no longer in use; do not wait"
    )
    parser.add_argument(
        "--force", action="store_true", help="unmount even if changes that cannot be written are lost"
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=600,
        metavar="SECONDS",
        help="how long to wait before and after the unmount (default: 600)",
    )
    parser.set_defaults(run=run)


def _seconds(given: str) -> float:
    with suppress(ValueError):
        if 0 <= (seconds := float(given)) <= threading.TIMEOUT_MAX:
            return seconds
    raise UsageError(f"--timeout: {given!r} is not a number of seconds", "give 0 or more")


def run(args: argparse.Namespace) -> int:
    """Unmount, and wait."""
    found = the_mount(args.mountpoint)
    mountpoint = os.fsdecode(found.mountpoint)
    owner = owner_of(found.dev)
    if os.geteuid() not in {0, owner}:
        _unmount_of_another(mountpoint, owner, lazy=args.lazy)
        return 0
    daemon, silence = _daemon_of(found.dev, min(args.timeout, _LONG))
    if isinstance(silence, Silent) and not (args.lazy or args.force):
        raise _not_unmounted(silence)
    own = os.fsencode(daemon["mountpoint"]) if daemon else b""
    if own != found.mountpoint and any(own == mount.mountpoint for mount in _mounts(found)):
        _unmount(mountpoint, lazy=args.lazy)
        _say(f"{mountpoint}: unmounted; the store is still in use by the mount at {os.fsdecode(own)}")
        return 0
    dead = daemon is None and not args.lazy and _is_dead(mountpoint)
    try:
        request = UnmountRequest(found.dev, mountpoint, args.timeout, force=args.force, lazy=args.lazy)
    except Silent as error:
        raise _not_unmounted(error) from None
    _unmount(mountpoint, lazy=args.lazy)
    if args.lazy or dead:
        return 0
    if daemon is None:
        raise SystemFailure(
            f"{mountpoint}: unmounted, but cannot tell whether the store is released: {silence}",
            "cowfs info STORE shows who uses it",
        )
    _wait(mountpoint, found, daemon["pid"], args.timeout, request)
    request.finish()
    moved = daemon["store"].get("moved")
    if moved:
        warn(f"{daemon['store']['path']}: {moved.partition(';')[0]}; the mounted file has the changes")
    return 0


def _wait(mountpoint: str, found: MountInfo, pid: int, timeout: float, request: UnmountRequest) -> None:
    """Wait until the daemon *pid* has released the store; SystemFailure after *timeout* seconds.

    If that takes long, or cannot end by itself, prints what it waits for. Afterwards the daemon has ended,
    unless it waits for a lower that does not answer.
    """
    deadline = time.monotonic() + timeout
    said, again = "", 0.0
    while True:
        patience = 0.1 if _mounts(found) else _PATIENCE
        left = deadline - time.monotonic()
        if wait_pid_gone(pid, max(min(patience, left), 0)):
            return
        if request.has_answered():
            if wait_pid_gone(pid, _PATIENCE):  # it only has to exit
                return
            _say(f"{mountpoint}: unmounted; the daemon (pid {pid}) exits when a lower that hangs answers")
            return
        why = _where(found)
        if left <= patience:
            break
        news = why != said and time.monotonic() >= again
        if news and (why or patience == _PATIENCE):  # otherwise it has just been unmounted there
            _say(f"{mountpoint}: unmounted, but {why or f'the daemon (pid {pid}) is still writing'}; waiting")
            said, again = why, time.monotonic() + _QUIET
    hint = "unmount it there too" if why else ""
    why = why or f"the daemon (pid {pid}) is still writing"
    raise SystemFailure(
        f"{mountpoint}: unmounted, but {why} after {timeout:g} s; the store is still in use", hint
    )


def _say_hung(silence: Silent) -> None:
    _say(f"{silence.message}; waiting")


def _say(what: str) -> None:
    warn(what)


def _is_same(mount: MountInfo, other: MountInfo) -> bool:
    """Whether two mounts show the same filesystem. Equal device numbers are not enough: they are reused."""
    return mount.dev == other.dev and mount.source == other.source and mount.fstype == other.fstype


def _mounts(found: MountInfo) -> list[MountInfo]:
    return [mount for mount in mountinfo() if _is_same(mount, found)]


def _where(found: MountInfo) -> str:
    """Return where else this filesystem is mounted, as far as visible; "" if nowhere."""
    from cowfs.changes.render import escape

    places = [escape(mount.mountpoint) for mount in _mounts(found)]
    for pid, theirs in mounted_elsewhere():
        there = [mount for mount in theirs if _is_same(mount, found)]
        with suppress(OSError):  # it has ended
            who = f"in the mount namespace of pid {pid} ({escape(_name(pid))})" if there else ""
            places += [f"{escape(mount.mountpoint)} {who}" for mount in there]
    if not places:
        return ""
    more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
    return f"still mounted at {', '.join(places[:_NAMED])}{more}"


def _name(pid: int) -> bytes:
    with open(f"/proc/{pid}/comm", "rb") as name:
        return name.read().rstrip()


def _daemon_of(dev: str, timeout: float) -> tuple[dict[str, Any] | None, Exception | None]:
    """Return the daemon's answer within *timeout* seconds; or None, and why there is none."""
    try:
        return facts_of(dev, timeout, _say_hung), None
    except (CowfsError, OSError) as error:
        return None, error


def _not_unmounted(silence: Silent) -> MountFailure:
    return MountFailure(f"not unmounted: {silence.message}", f"{silence.hint}; -l unmounts it now")


def _is_dead(mountpoint: str) -> bool:
    """Whether the daemon of a mount has ended. A slow one has not."""
    dead = []

    def look() -> None:
        try:
            os.statvfs(mountpoint)
        except OSError as error:
            dead.append(error.errno in {errno.ENOTCONN, errno.ECONNABORTED, errno.ECANCELED})

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return dead == [True]


def _unmount(mountpoint: str, *, lazy: bool) -> None:
    if os.geteuid() == 0:
        try:
            mounts.unmount(mountpoint, MNT_DETACH if lazy else 0)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise _busy(mountpoint) from None
            raise MountFailure(f"{mountpoint}: {error.strerror}") from None
        return
    program = programs.find("fusermount3")
    if program is None:
        raise SystemFailure("fusermount3: not found", "apt install fuse3")
    command = [program, "-u", *(["-z"] if lazy else []), "--", mountpoint]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=programs.environment())
    if done.returncode:
        if done.stderr.rstrip().endswith(os.strerror(errno.EBUSY)):
            raise _busy(mountpoint)
        why = done.stderr.strip().removeprefix("fusermount3: ") or f"fusermount3 failed ({done.returncode})"
        raise MountFailure(f"{mountpoint}: {why}")


def _unmount_of_another(mountpoint: str, owner: int, *, lazy: bool) -> None:
    """Unmount what /etc/fstab lets every user unmount (``users``), by umount(8), which asks no helper then.

    Only the owner and root learn when the store is released. MountFailure if it is not allowed.
    """
    program = programs.find("umount")
    command = [program or "", "-i", *(["-l"] if lazy else []), "--", mountpoint]
    done = None
    if program is not None:
        done = subprocess.run(command, capture_output=True, check=False, env=programs.environment())
    if done is None or done.returncode:
        raise MountFailure(
            f"{mountpoint}: this mount belongs to another user (uid {owner})",
            "run this as that user, or as root",
        )


def _busy(mountpoint: str) -> MountFailure:
    return MountFailure(
        f"{mountpoint}: busy", f"fuser -vm {mountpoint} shows who uses it; -l detaches it now"
    )
