"""Mount cowfs through its command line, as users do, and the kernel's overlayfs for comparison."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support import warm
from tests.support.system import as_nobody_prefix, require_success, run

COWFS = [sys.executable, "-m", "cowfs.cli.main"]
MOUNT_MANY = ("env", "LIBMOUNT_FORCE_MOUNT2=always", "mount")
"""mount(8) for options of more than 255 bytes: fsconfig(2), which util-linux 2.39 calls, takes no more."""
KERNEL_OPTIONS = "redirect_dir=on,metacopy=on,index=on,xino=on"
TROUBLE = re.compile(r"Traceback|\bWARNING\b|\bERROR\b|\bCRITICAL\b|\bwarning:|\berror:")


def make_store(place: Path, kind: str) -> Path:
    """Return the path for a new directory store, or create an image of 16 MiB and return its path."""
    if kind != "image":
        return place / "store"
    cowfs("create", place / "store.bs", "16", check=True)
    return place / "store.bs"


def cowfs(
    *arguments: str | os.PathLike[str],
    nobody: bool = False,
    timeout: float = 60,
    check: bool = False,
    env: dict[str, str] | None = None,
    cwd: str | None = None,
    cold: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a cowfs command and wait for its end; with *cold*, in a new Python process, as users do."""
    environment = {**os.environ, "PYTHONPATH": project_root(), **(env or {})}
    done = None if cold else warm.run(arguments, nobody, environment, cwd, timeout)
    if done is None:
        prefix = as_nobody_prefix() if nobody else []
        return run(*prefix, *COWFS, *arguments, timeout=timeout, check=check, env=environment, cwd=cwd)
    if check:
        require_success(done)
    return done


def project_root() -> str:
    """Return the directory that contains the package cowfs."""
    return str(Path(__file__).resolve().parents[2])


def is_mounted(mountpoint: str | os.PathLike[str]) -> bool:
    """Return whether this is a mountpoint, according to the kernel's list of mounts."""
    wanted = os.path.realpath(os.path.dirname(mountpoint)) + "/" + os.path.basename(mountpoint)
    text = os.fsdecode(Path("/proc/self/mountinfo").read_bytes())
    return any(_unescape(line.split(" ")[4]) == wanted for line in text.split("\n")[:-1])


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def eventually(condition: object, what: str, seconds: float = 10.0) -> None:
    """Wait until *condition* () is true; after *seconds*, raise an AssertionError with *what*."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.01)


@contextmanager
def unchanged(image: str | os.PathLike[str]) -> Iterator[None]:
    """Fail if the block changes any byte of a store, which is an image or a directory."""
    before = _bytes_of(Path(image))
    yield
    after = _bytes_of(Path(image))
    assert after.keys() == before.keys()
    changed = [name for name, was in before.items() if after[name] != was]
    assert not changed, f"bytes of {image} were changed: {changed}"


def _bytes_of(path: Path) -> dict[str, object]:
    if path.is_file():
        return {"": path.read_bytes()}
    found: dict[str, object] = {}
    for file in (path, *path.rglob("*")):
        info = file.lstat()
        facts = info.st_ino, info.st_mode, info.st_uid, info.st_mtime_ns, info.st_ctime_ns
        found[str(file)] = facts, file.read_bytes() if file.is_file() and not file.is_symlink() else b""
    return found


@dataclass
class Mounted:
    """A mounted cowfs."""

    path: Path
    log: Path
    nobody: bool = False
    said: str = ""
    """The output of the mount command."""

    def pid(self) -> int:
        """Return the process ID of the daemon, from ``cowfs info``."""
        shown = cowfs("info", self.path, "--json", nobody=self.nobody, check=True).stdout
        match = re.search(r'"pid":\s*(\d+)', shown)
        assert match, f"cowfs info --json has no pid: {shown}"
        return int(match[1])

    def umount(self) -> None:
        """Run ``cowfs umount``; fail unless it succeeds and the mount is gone."""
        done = cowfs("umount", self.path, nobody=self.nobody)
        assert done.returncode == 0, f"cowfs umount: exit {done.returncode}: {done.stderr}{self.shown_log()}"
        assert not is_mounted(self.path), f"cowfs umount returned, but {self.path} is still mounted"

    def shown_log(self) -> str:
        """Return the daemon's log for a failure message."""
        try:
            text = self.log.read_text(errors="surrogateescape")
        except OSError as error:
            text = f"(no log: {error})"
        return f"\n--- log of {self.path} ---\n{text[-8000:]}"

    def trouble(self) -> list[str]:
        """Return the log's exceptions and warnings, except that the store is nearly full."""
        if not self.log.exists():
            return []
        text = self.log.read_text(errors="surrogateescape")
        lines = [line for line in text.splitlines() if TROUBLE.search(line)]
        return [line for line in lines if "WARNING cowfs.store.served.fullness: " not in line]


def mount_arguments(
    lowers: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    mountpoint: str | os.PathLike[str],
    store: str | os.PathLike[str] | None = None,
    engine: str | None = None,
    options: Sequence[str] = (),
) -> list[str]:
    """Return the arguments of ``cowfs mount``."""
    if isinstance(lowers, (str, os.PathLike)):
        lowers = [lowers]
    arguments = ["mount", ":".join(os.fspath(lower) for lower in lowers), os.fspath(mountpoint)]
    if store is not None:
        arguments += ["--store", os.fspath(store)]
    if engine is not None:
        arguments += ["--engine", engine]
    if options:
        arguments += ["-o", ",".join(options)]
    return arguments


@contextmanager
def mounted(
    lowers: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    mountpoint: str | os.PathLike[str],
    store: str | os.PathLike[str] | None = None,
    *,
    engine: str | None = None,
    options: Sequence[str] = (),
    nobody: bool = False,
    log: Path | None = None,
    quiet: bool = True,
) -> Iterator[Mounted]:
    """Mount cowfs, and unmount it at the end. If *quiet*, fail if the daemon has logged any trouble."""
    path = Path(mountpoint)
    if not path.exists():
        path.mkdir()
        if nobody and os.geteuid() == 0:
            os.chown(path, 65534, 65534)
    log = log or path.with_name(f"{path.name}.log")
    here = Mounted(path, log, nobody)
    done = cowfs(*mount_arguments(lowers, path, store, engine, [*options, f"log={log}"]), nobody=nobody)
    here.said = done.stdout + done.stderr
    if done.returncode != 0:
        raise AssertionError(f"cowfs mount: exit {done.returncode}: {here.said}{here.shown_log()}")
    try:
        yield here
    except BaseException as error:
        if hasattr(error, "add_note"):
            error.add_note(here.shown_log())
        if is_mounted(path):
            force_umount(path)
        raise
    if is_mounted(path):
        here.umount()
    assert not (quiet and here.trouble()), f"the daemon logged {here.trouble()}{here.shown_log()}"


def force_umount(path: str | os.PathLike[str]) -> None:
    """Detach a mount even if its daemon is dead or hangs."""
    subprocess.run(["umount", "-l", os.fspath(path)], capture_output=True, check=False)
    if is_mounted(path):
        subprocess.run(["fusermount3", "-uz", os.fspath(path)], capture_output=True, check=False)


def copy_attributes(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copy the attributes of the lower's root to a new upper, as cowfs does for a new store.

    The root of the kernel's overlayfs has the attributes of the upper, whatever the lower's are.
    """
    st = os.stat(source)
    for name in os.listxattr(source):
        if not name.startswith("trusted.overlay."):
            os.setxattr(target, name, os.getxattr(source, name))
    os.chown(target, st.st_uid, st.st_gid)
    os.chmod(target, st.st_mode & 0o7777)
    os.utime(target, ns=(st.st_atime_ns, st.st_mtime_ns))


@contextmanager
def kernel_overlay(
    lowers: Sequence[str | os.PathLike[str]],
    store: str | os.PathLike[str],
    mountpoint: str | os.PathLike[str],
) -> Iterator[Path]:
    """Mount the kernel's overlayfs on *lowers*, ``store/upper`` and ``store/work``."""
    path = Path(mountpoint)
    path.mkdir(exist_ok=True)
    upper = Path(store, "upper")
    if not upper.exists():
        upper.mkdir(parents=True)
        copy_attributes(lowers[0], upper)
    Path(store, "work").mkdir(exist_ok=True)
    joined = ":".join(os.fspath(lower) for lower in lowers)
    run(
        *MOUNT_MANY, "-t", "overlay", "overlay", path, "-o",
        f"lowerdir={joined},upperdir={store}/upper,workdir={store}/work,{KERNEL_OPTIONS}",
    )  # fmt: skip
    try:
        yield path
    finally:
        run("umount", path)
