"""``cowfs umount``: unmount, and return when everything is written back and released."""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import subprocess
import sys

from cowfs.cli.client import ask, find_mount
from cowfs.cli.farewell import Farewell
from cowfs.errors import CowfsError, MountFailure, SystemFailure
from cowfs.linux.mounts import mountinfo, parse_mountinfo, umount2, wait_pid_gone

NAME = "umount"
MNT_DETACH = 2
_PATIENCE = 3.0
"""Seconds after which the one who waits wants to know for what."""

_EPILOG = """\
umount(8) returns before the daemon has written everything back and released the store; this does not,
so that afterwards the store can be copied, checked, grown or unplugged.

example:
  cowfs umount /mnt
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the subcommand."""
    parser = subparsers.add_parser(
        NAME,
        help="unmount, and return when the store is written back and released",
        description="Unmount MOUNTPOINT and wait until its store is written back and released.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parser.add_argument(
        "-l", "--lazy", action="store_true", help="detach now, end when nobody uses it any more; do not wait"
    )
    parser.add_argument(
        "--force", action="store_true", help="unmount though what could not be written to the store is lost"
    )
    parser.add_argument(
        "--timeout", type=float, default=600, metavar="SECONDS", help="how long to wait for the daemon"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Unmount and wait."""
    found = find_mount(args.mountpoint)
    if found is None:
        raise MountFailure(f"{args.mountpoint}: no cowfs is mounted here")
    mountpoint = os.fsdecode(found.mountpoint)
    pid = _daemon_of(found.dev)
    farewell = Farewell(found.dev, mountpoint, force=args.force)
    _unmount(mountpoint, lazy=args.lazy)
    if args.lazy or pid is None or any(mount.dev == found.dev for mount in mountinfo()):
        return 0  # it goes on serving where else it is mounted
    if wait_pid_gone(pid, min(_PATIENCE, args.timeout)):
        farewell.hear()
        return 0
    holder = _other_namespace_with(found.dev)
    if holder:
        print(
            f"cowfs: {mountpoint}: still mounted in the mount namespace of {holder}; waiting", file=sys.stderr
        )
    if not wait_pid_gone(pid, args.timeout):
        raise SystemFailure(
            f"{mountpoint}: unmounted, but its daemon (pid {pid}) still writes after {args.timeout:g} s"
        )
    farewell.hear()
    return 0


def _other_namespace_with(dev: str) -> str:
    """Return a process whose mount namespace has this mount, as far as we may look."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/mountinfo", "rb") as table:
                if any(mount.dev == dev for mount in parse_mountinfo(table.read())):
                    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as name:
                        return f"pid {pid} ({name.read().strip()})"
        except OSError:
            continue  # it ended, or is somebody else's
    return ""


def _daemon_of(dev: str) -> int | None:
    """Return the daemon's pid; None when it is dead already."""
    try:
        return int(next(ask(dev, "info"))["pid"])
    except (CowfsError, OSError, StopIteration):
        return None


def _unmount(mountpoint: str, *, lazy: bool) -> None:
    if os.geteuid() == 0:
        try:
            umount2(mountpoint, MNT_DETACH if lazy else 0)
        except OSError as error:
            if error.errno == errno.EBUSY:
                hint = f"fuser -vm {mountpoint} tells by whom; -l detaches it now"
                raise MountFailure(f"{mountpoint}: in use", hint) from None
            raise MountFailure(f"{mountpoint}: {error.strerror}") from None
        return
    program = shutil.which("fusermount3")
    if program is None:
        raise SystemFailure("fusermount3: not found", "apt install fuse3")
    command = [program, "-u", *(["-z"] if lazy else []), "--", mountpoint]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = done.stderr.strip().removeprefix("fusermount3: ") or f"fusermount3 failed ({done.returncode})"
        raise MountFailure(f"{mountpoint}: {why}")
