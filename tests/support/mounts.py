"""Mounting cowfs as users do, through its command line, and the kernel's overlayfs beside it."""

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
KERNEL_OPTIONS = "redirect_dir=on,metacopy=on,index=on,xino=on"
TROUBLE = re.compile(r"Traceback|\bWARNING\b|\bERROR\b|\bCRITICAL\b|\bwarning:|\berror:")


def make_store(place: Path, kind: str) -> Path:
    """Return a place for a store in a directory, or make an image of 16 MiB."""
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
    """Run one command of cowfs to its end; *cold*: in a Python of its own, as users do."""
    environment = {**os.environ, "PYTHONPATH": project_root(), **(env or {})}
    done = None if cold else warm.run(arguments, nobody, environment, cwd, timeout)
    if done is None:
        prefix = as_nobody_prefix() if nobody else []
        return run(*prefix, *COWFS, *arguments, timeout=timeout, check=check, env=environment, cwd=cwd)
    if check:
        require_success(done)
    return done


def project_root() -> str:
    """The directory that the package cowfs is imported from."""
    return str(Path(__file__).resolve().parents[2])


def is_mounted(mountpoint: str | os.PathLike[str]) -> bool:
    """Is something mounted exactly here? Asks the kernel, never the filesystem."""
    wanted = os.path.realpath(os.path.dirname(mountpoint)) + "/" + os.path.basename(mountpoint)
    text = os.fsdecode(Path("/proc/self/mountinfo").read_bytes())
    return any(_unescape(line.split(" ")[4]) == wanted for line in text.split("\n")[:-1])


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def eventually(condition: object, what: str, seconds: float = 10.0) -> None:
    """Wait until *condition* () is true; an assertion error that says *what* otherwise."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.01)


@contextmanager
def unchanged(image: str | os.PathLike[str]) -> Iterator[None]:
    """In this block no byte of a store changes: of an image, or of all that is in a directory."""
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
    for each in (path, *path.rglob("*")):
        info = each.lstat()
        times = info.st_ino, info.st_mode, info.st_uid, info.st_mtime_ns, info.st_ctime_ns
        found[str(each)] = times, each.read_bytes() if each.is_file() and not each.is_symlink() else b""
    return found


@dataclass
class Mounted:
    """A mounted cowfs."""

    path: Path
    log: Path
    nobody: bool = False
    said: str = ""
    """What the mount command printed."""

    def pid(self) -> int:
        """The daemon's process, as ``cowfs info`` tells it."""
        shown = cowfs("info", self.path, "--json", nobody=self.nobody, check=True).stdout
        match = re.search(r'"pid":\s*(\d+)', shown)
        assert match, f"cowfs info --json names no pid: {shown}"
        return int(match[1])

    def umount(self) -> None:
        """``cowfs umount``, which must work and must end the mount."""
        done = cowfs("umount", self.path, nobody=self.nobody)
        assert done.returncode == 0, f"cowfs umount: exit {done.returncode}: {done.stderr}{self.shown_log()}"
        assert not is_mounted(self.path), f"cowfs umount returned, but {self.path} is still mounted"

    def shown_log(self) -> str:
        """The daemon's log, for a failure's message."""
        try:
            text = self.log.read_text(errors="surrogateescape")
        except OSError as error:
            text = f"(no log: {error})"
        return f"\n--- log of {self.path} ---\n{text[-8000:]}"

    def trouble(self) -> list[str]:
        """The lines of the log that tell of an exception or a warning; a store may be nearly full."""
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
    """The arguments of ``cowfs mount`` for this."""
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
    """A cowfs mount, unmounted at the end; *quiet*: fails if the daemon's log shows any trouble."""
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
    assert not (quiet and here.trouble()), f"the daemon complained: {here.trouble()}{here.shown_log()}"


def force_umount(path: str | os.PathLike[str]) -> None:
    """Take a mount away even when its daemon is dead or hangs."""
    subprocess.run(["umount", "-l", os.fspath(path)], capture_output=True, check=False)
    if is_mounted(path):
        subprocess.run(["fusermount3", "-uz", os.fspath(path)], capture_output=True, check=False)


def dress_like(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Give a fresh upper the attributes of the lower's root, as cowfs does for a new store.

    To the kernel's overlayfs the upper is the root, whatever the lower's looks like.
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
    """The kernel's overlayfs over the same layers: ``store/upper`` and ``store/work``."""
    path = Path(mountpoint)
    path.mkdir(exist_ok=True)
    upper = Path(store, "upper")
    if not upper.exists():
        upper.mkdir(parents=True)
        dress_like(lowers[0], upper)
    Path(store, "work").mkdir(exist_ok=True)
    joined = ":".join(os.fspath(lower) for lower in lowers)
    run(
        "mount", "-t", "overlay", "overlay", path, "-o",
        f"lowerdir={joined},upperdir={store}/upper,workdir={store}/work,{KERNEL_OPTIONS}",
    )  # fmt: skip
    try:
        yield path
    finally:
        run("umount", path)
