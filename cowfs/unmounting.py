"""Unmount, and wait until all changes are written and the store is released."""

from __future__ import annotations

import errno
import json
import os
import select
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from cowfs.client import Silent, ask, facts_of, owner_of, the_mount
from cowfs.errors import CowfsError, MountFailure, StoreError, SystemFailure
from cowfs.linux import mounts, programs
from cowfs.linux.mount_table import MountInfo, mountinfo
from cowfs.linux.namespaces import mounted_elsewhere
from cowfs.linux.pids import wait_pid_gone

MNT_DETACH = 2
_PATIENCE = 3.0
"""After so many seconds, a message says what cowfs waits for."""
_LONG = 60.0
"""The time limit for an answer of the daemon, in seconds."""
_QUIET = 10.0
"""After so many seconds, another message lists the current other mounts, because namespaces come and go."""
_NAMED = 3
"""How many other mounts a message names."""


def unmount(
    where: str,
    *,
    lazy: bool = False,
    force: bool = False,
    timeout: float = 600,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Unmount, and wait until the daemon has written everything and released the store; with *lazy*, only
    detach.

    Blocks, for *timeout* seconds before and after the unmount. *say* is told what it waits for, and warnings.
    MountFailure if it is not unmounted; StoreError if something was not saved, unless *force*; SystemFailure
    if the store is not known to be released.
    """
    found = the_mount(where)
    mountpoint = os.fsdecode(found.mountpoint)
    owner = owner_of(found.dev)
    if os.geteuid() not in {0, owner}:
        _unmount_of_another(mountpoint, owner, lazy=lazy)
        return
    daemon, silence = _daemon_of(found.dev, min(timeout, _LONG), say)
    if isinstance(silence, Silent) and not (lazy or force):
        raise _not_unmounted(silence)
    own = os.fsencode(daemon["mountpoint"]) if daemon else b""
    if own != found.mountpoint and any(own == mount.mountpoint for mount in _mounts(found)):
        _unmount(mountpoint, lazy=lazy)
        say(f"{mountpoint}: unmounted; the store is still in use by the mount at {os.fsdecode(own)}")
        return
    dead = daemon is None and not lazy and _is_dead(mountpoint)
    try:
        request = _Request(found.dev, mountpoint, timeout, force=force, lazy=lazy)
    except Silent as error:
        raise _not_unmounted(error) from None
    _unmount(mountpoint, lazy=lazy)
    if lazy or dead:
        return
    if daemon is None:
        raise SystemFailure(
            f"{mountpoint}: unmounted, but cannot tell whether the store is released: {silence}",
            "cowfs info STORE shows who uses it",
        )
    _wait(mountpoint, found, daemon["pid"], timeout, request, say)
    request.finish(say)
    moved = daemon["store"].get("moved")
    if moved:
        say(f"{daemon['store']['path']}: {moved.partition(';')[0]}; the mounted file has the changes")


def _wait(
    mountpoint: str,
    found: MountInfo,
    pid: int,
    timeout: float,
    request: _Request,
    say: Callable[[str], None],
) -> None:
    """Wait until the daemon *pid* has released the store; SystemFailure after *timeout* seconds.

    If that takes long, or cannot end by itself, tells what it waits for. Afterwards the daemon has ended,
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
            say(f"{mountpoint}: unmounted; the daemon (pid {pid}) exits when a lower that hangs answers")
            return
        why = _where(found)
        if left <= patience:
            break
        news = why != said and time.monotonic() >= again
        if news and (why or patience == _PATIENCE):  # otherwise it has just been unmounted there
            say(f"{mountpoint}: unmounted, but {why or f'the daemon (pid {pid}) is still writing'}; waiting")
            said, again = why, time.monotonic() + _QUIET
    hint = "unmount it there too" if why else ""
    why = why or f"the daemon (pid {pid}) is still writing"
    raise SystemFailure(
        f"{mountpoint}: unmounted, but {why} after {timeout:g} s; the store is still in use", hint
    )


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


def _daemon_of(
    dev: str, timeout: float, say: Callable[[str], None]
) -> tuple[dict[str, Any] | None, Exception | None]:
    """Return the daemon's answer within *timeout* seconds; or None, and why there is none."""
    try:
        return facts_of(dev, timeout, lambda silence: say(f"{silence.message}; waiting")), None
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


class _Request:
    """A pipe through which the daemon reports how it released the store, after it has closed its socket."""

    def __init__(self, dev: str, mountpoint: str, timeout: float, *, force: bool, lazy: bool = False) -> None:
        """Make the daemon write everything to disk.

        Blocks. With *lazy*, it gives up requests that hang. MountFailure if the disk refuses a write, unless
        *force*. Silent if it takes more than *timeout* seconds, unless *force* or *lazy*. A dead daemon, one
        of an older cowfs, and one of another user, which gets no pipe, report nothing.
        """
        self._mountpoint = mountpoint
        self._force = force
        self._answers = False
        self._answer = b""
        self._reading, writing = os.pipe()
        try:
            ours = owner_of(dev) == os.geteuid()
            for reply in ask(dev, "leave", timeout, writing if ours else -1, _go_on, force=force, lazy=lazy):
                if "unsaved" in reply:
                    raise _Refused(reply["unsaved"])
                self._answers = ours
        except Silent:
            if not (force or lazy):
                raise
        except (CowfsError, OSError):
            pass
        except _Refused as refused:
            raise MountFailure(
                f"{mountpoint}: not unmounted, because some changes could not be saved: {refused}",
                "fix the cause, such as a full disk, and unmount again; --force discards what is not saved",
            ) from None
        finally:
            os.close(writing)

    def has_answered(self) -> bool:
        """Whether the daemon has reported how the store was released. Does not block."""
        if not self._answer and select.select([self._reading], [], [], 0)[0]:
            self._answer = os.read(self._reading, 65536)
        return bool(self._answer)

    def finish(self, say: Callable[[str], None]) -> None:
        """Call it when the daemon has ended or reported.

        StoreError if something was not saved, unless *force*.
        """
        if not self._answers:
            return
        said = self._answer or os.read(self._reading, 65536)
        failure = json.loads(said).get("error") if said else "the daemon exited before everything was saved"
        if failure and self._force:
            say(f"{self._mountpoint}: unmounted, but: {failure}")
        elif failure:
            raise StoreError(f"{self._mountpoint}: unmounted, but: {failure}")


class _Refused(Exception):
    pass


def _go_on(_: Silent) -> None:
    """Wait on for a daemon that seems to hang: it answered a moment ago."""
