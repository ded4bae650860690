"""The environment of the tests: a private mount namespace, another user, privileges."""

from __future__ import annotations

import ctypes
import functools
import os
import stat
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

CLONE_NEWNS = 0x00020000
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
NOBODY = 65534
CONTROL = {0: "/run/cowfs", NOBODY: f"/tmp/cowfs-{NOBODY}"}
"""Where the daemons of root and nobody have their control sockets."""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts, device nodes, other owners")
needs_fuse = pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="needs /dev/fuse (modprobe fuse)")


def isolate(scratch: Path) -> None:
    """Move this process to a private mount namespace, with a /dev/fuse that every user can open.

    Mounts of tests are invisible outside, and disappear with the last process of the run. So do the control
    sockets of daemons, which other runs neither use nor remove. Does nothing unless root runs it.
    """
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    if libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None) != 0:
        raise OSError(ctypes.get_errno(), "mount --make-rprivate /")
    if os.path.exists("/dev/fuse") and stat.S_IMODE(os.stat("/dev/fuse").st_mode) != 0o666:
        # udev sets this mode; in a container without udev it is 0600.
        node = scratch / "dev-fuse"
        os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(10, 229))
        os.chmod(node, 0o666)
        _bind(libc, node, "/dev/fuse")
    for uid, place in CONTROL.items():
        own = scratch / f"control-{uid}"
        for directory in (Path(place), own):
            with suppress(FileExistsError):
                directory.mkdir(mode=0o700)
                os.chown(directory, uid, uid, follow_symlinks=False)
        _bind(libc, own, place)


def _bind(libc: ctypes.CDLL, source: Path, target: str) -> None:
    if libc.mount(os.fsencode(source), os.fsencode(target), None, MS_BIND, None) != 0:
        raise OSError(ctypes.get_errno(), f"mount --bind {target}")


@functools.cache
def makes_user_namespaces() -> bool:
    """Return whether root and nobody can create user namespaces, which is impossible in a chroot."""
    tried = [["unshare", "--user", "true"], [*as_nobody_prefix(), "unshare", "--user", "true"]]
    return all(run(*command, check=False).returncode == 0 for command in tried)


def as_nobody_prefix() -> list[str]:
    """Return the words to put before a command to run it as nobody, without privileges."""
    if os.geteuid() != 0:
        return []
    ids = [f"--reuid={NOBODY}", f"--regid={NOBODY}"]
    return ["setpriv", *ids, "--clear-groups", "--inh-caps=-all", "--"]


def run(
    *command: str | bytes | os.PathLike[str], timeout: float = 60, check: bool = True, **more: object
) -> subprocess.CompletedProcess[str]:
    """Run a command and capture its output as text; if *check*, fail with the output if the command fails."""
    done = subprocess.run(  # type: ignore[call-overload]
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=timeout,
        **more,
    )
    if check:
        require_success(done)
    return done  # type: ignore[no-any-return]


def require_success(done: subprocess.CompletedProcess[str]) -> None:
    """Raise an AssertionError with the output unless the command's exit status is 0."""
    if done.returncode != 0:
        shown = " ".join(os.fsdecode(part) for part in done.args)
        raise AssertionError(f"{shown}: exit {done.returncode}\n{done.stdout}{done.stderr}")
