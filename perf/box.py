"""The surroundings of one sample: its directories, mounts, daemon, client processes and time limit."""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from perf import machine
from perf.corpus import Corpus

STORE_BYTES = 2 << 30
PROJECT = Path(__file__).parents[1]  # daemons and commands run here, so that `-m cowfs...` finds the package
CLIENT = Path(__file__).with_name("client.py")
ENVIRONMENT = {**os.environ, "LC_ALL": "C", "TZ": "UTC", "GIT_CONFIG_GLOBAL": os.devnull}


def ended(process: subprocess.Popen[bytes], limit: float) -> bool:
    """Whether *process* ends within *limit* seconds, known at once: ``Popen.wait`` looks every 50 ms."""
    pidfd = os.pidfd_open(process.pid)
    try:
        return bool(select.select([pidfd], [], [], limit)[0])
    finally:
        os.close(pidfd)


def start_session(
    argv: list[str], cwd: Path, stdout: IO[bytes], stderr: IO[bytes]
) -> subprocess.Popen[bytes]:
    """Start *argv* in a session of its own, with the priority of this process.

    The scheduler may weigh sessions instead of processes (sched(7), autogroup): a new one begins at 0.
    """
    process = subprocess.Popen(
        argv, cwd=cwd, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
        env=ENVIRONMENT, start_new_session=True,
    )  # fmt: skip
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    if nice:
        with contextlib.suppress(OSError):
            Path(f"/proc/{process.pid}/autogroup").write_text(str(nice))
    return process


class SampleFailed(Exception):
    """A sample failed, so it has no figure. The message says why."""


class WrongResult(SampleFailed):
    """The workload ended with a wrong result."""


@dataclass(slots=True)
class Box:
    """A directory with everything of one sample; removed with all it holds afterwards.

    ``merged`` is where the system under test is mounted. ``lower`` and ``store`` are where the images are
    mounted by the kernel, for the systems that want directories.
    """

    path: Path
    scratch: Path
    """On tmpfs: lists, and what the clients print."""
    corpus: Corpus
    limit: float
    """Seconds that everything together may take."""
    prefix: list[str] = field(default_factory=list)
    """Words before the command that starts a daemon, for example a profiler."""
    user: list[str] = field(default_factory=list)
    """Put before the commands of a system of another user, and of its clients: what makes one that user."""
    daemons: dict[Path, subprocess.Popen[bytes]] = field(default_factory=dict)
    """The running ones, by what they serve."""
    mount_seconds: float | None = None
    state: dict[str, Any] = field(default_factory=dict)
    """Data that a workload passes from set-up to verification."""
    _deadline: float = 0.0
    _watchdog: threading.Timer | None = None
    _mounts: list[Path] = field(default_factory=list)
    _connections: dict[Path, int] = field(default_factory=dict)
    _kept: list[mmap.mmap] = field(default_factory=list)

    @property
    def lower(self) -> Path:
        return self.path / "lower"

    @property
    def image(self) -> Path:
        return self.path / "store.img"

    @property
    def store(self) -> Path:
        return self.path / "store"

    @property
    def merged(self) -> Path:
        return self.path / "merged"

    @property
    def fusectl(self) -> Path:
        """Where the run has mounted the FUSE control filesystem."""
        return self.path.parent / "fusectl"

    @property
    def log(self) -> Path:
        return self.path / "daemon.log"

    def open(self) -> None:
        """Make the directories and start the clock."""
        for directory in (self.lower, self.store, self.merged):
            directory.mkdir(parents=True)
        self._deadline = time.monotonic() + self.limit
        # A client may hang in a system call where no signal reaches it: then the daemon has to go.
        self._watchdog = threading.Timer(self.limit + 5, self.kill_daemons)
        self._watchdog.daemon = True
        self._watchdog.start()

    def close(self) -> None:
        """Unmount everything that is still mounted and end the daemon, in any state."""
        if self._watchdog:
            self._watchdog.cancel()
        self.kill_daemons()
        for target in reversed(self._mounts):
            quiet(["umount", "-l", str(target)])
        for process in self.daemons.values():
            process.wait(10)
        self.daemons.clear()
        self._mounts.clear()
        self._kept.clear()
        self.image.unlink(missing_ok=True)

    def keep_in_cache(self, path: Path) -> None:
        """Read *path* into the page cache, and have it stay there: what is mapped is not dropped."""
        with path.open("rb") as file:
            how = mmap.MAP_SHARED | mmap.MAP_POPULATE
            self._kept.append(mmap.mmap(file.fileno(), 0, flags=how, prot=mmap.PROT_READ))

    # -- mounts

    def mount(self, target: Path, *argv: str) -> None:
        """Run mount(8) with *argv* and *target*."""
        self.check(["mount", *argv, str(target)])
        self._mounts.append(target)

    def unmount(self, target: Path) -> None:
        """Run umount(8); the mount must not be in use."""
        self.check(["umount", str(target)])
        self._mounts.remove(target)

    def mount_lower(self) -> None:
        """Let the kernel mount the lower image at ``lower``."""
        self.mount(self.lower, "-t", "squashfs", "-o", "loop,ro", str(self.corpus.image))

    def make_store(self) -> None:
        """Make an ext3 image, allocated in full, with the options of ``cowfs create``."""
        with self.image.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, STORE_BYTES)
        options = [
            "-t",
            "ext3",
            "-b",
            "4096",
            "-I",
            "256",
            "-m",
            "0",
            "-i",
            "8192",
            "-E",
            "lazy_itable_init=0",
        ]
        self.check(["mke2fs", "-q", "-F", *options, str(self.image)])

    def mount_store(self) -> None:
        """Let the kernel mount the store at ``store``, with directories for upper and work."""
        self.mount(self.store, "-t", "ext3", "-o", "loop", str(self.image))
        for name in ("upper", "work"):
            (self.store / name).mkdir(exist_ok=True)

    # -- the daemon

    def start_daemon(self, argv: list[str]) -> None:
        """Start the FUSE daemon under test, in the foreground; return when ``merged`` answers."""
        self._start([*self.user, *self.prefix, *argv], self.merged)

    def start_helper(self, argv: list[str], target: Path) -> None:
        """Start a FUSE daemon that the one under test stands on; return when *target* answers."""
        self._start([*self.user, *argv], target)

    def _start(self, argv: list[str], target: Path) -> None:
        outside = target.stat().st_dev
        with self.log.open("ab") as log:
            process = start_session(argv, PROJECT, log, log)
        self.daemons[target] = process
        self._mounts.append(target)
        while True:
            with contextlib.suppress(OSError):
                if (device := target.stat().st_dev) != outside:
                    self._connections[target] = os.minor(device)
                    return
            if process.poll() is not None:
                raise SampleFailed(f"{argv[0]} ended with {process.returncode}: {self.last_words()}")
            if time.monotonic() > self._deadline:
                raise SampleFailed(f"{argv[0]} did not mount in time: {self.last_words()}")
            time.sleep(0.002)

    def stop_daemon(self, target: Path, unmount: list[str] | None = None) -> None:
        """Unmount *target*, with the command *unmount* if given, and wait until its daemon has ended."""
        command = unmount or ["umount", str(target)]
        patience = time.monotonic() + 2
        while True:
            try:
                self.check(command)
                break
            except SampleFailed:
                # Busy for a moment: some daemons look at their own mount when it is new.
                if time.monotonic() > patience:
                    raise
        self._mounts.remove(target)
        self._connections.pop(target, None)  # the kernel gives the number to somebody else
        try:
            self.daemons.pop(target).wait(self.remaining())
        except subprocess.TimeoutExpired:
            raise SampleFailed("the daemon did not end after the unmount") from None

    def kill_daemons(self) -> None:
        """End every daemon at once, with the processes it started."""
        for process in self.daemons.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # A daemon that waits for an answer of its own cannot be killed before that (kernel, fuse.rst).
            for connection in self._connections.values():
                with contextlib.suppress(OSError):
                    (self.fusectl / str(connection) / "abort").write_text("1")

    def usage(self) -> machine.Usage | None:
        """Memory and processor time of the daemons; None for the kernel's own filesystems."""
        each = [machine.session_usage(process.pid) for process in list(self.daemons.values())]
        alive = [usage for usage in each if usage]
        return machine.Usage(sum(u.rss for u in alive), sum(u.cpu for u in alive)) if alive else None

    def last_words(self) -> str:
        """The last line of the daemon's log."""
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return lines[-1] if lines else "(it said nothing)"

    # -- clients

    def remaining(self) -> float:
        """Seconds left of the time limit, at least a tenth."""
        return max(0.1, self._deadline - time.monotonic())

    def run(self, argv: list[str], *, stdout: Path | None = None, codes: tuple[int, ...] = (0,)) -> float:
        """Run a client in ``merged`` and return its wall time in seconds; SampleFailed if it fails."""
        argv = [*self.user, *argv]
        out = stdout or self.scratch / "stdout"
        with out.open("wb") as sink, (self.scratch / "stderr").open("w+b") as errors:
            begin = time.perf_counter()
            process = start_session(argv, self.merged, sink, errors)
            if not ended(process, self.remaining()):
                self.kill_daemons()
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise SampleFailed(f"{argv[0]}: not done within {self.limit:.0f} s")
            seconds = time.perf_counter() - begin
            process.wait()
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines()
        if process.returncode not in codes:
            raise SampleFailed(f"{argv[0]} ended with {process.returncode}: {said[0] if said else ''}")
        return seconds

    def client(self, job: str, *args: str, prefix: Sequence[str] = ()) -> tuple[float, str]:
        """Run a job of ``client.py`` in ``merged``; return the seconds it measured and what it found."""
        out = self.scratch / "client"
        self.run([*prefix, machine.python(), "-I", "-S", str(CLIENT), job, *args], stdout=out)
        seconds, _, found = out.read_text().partition(" ")
        return float(seconds), found.strip()

    def check(self, argv: list[str]) -> None:
        """Run a command of the set-up. SampleFailed, with its output, if it fails."""
        try:
            done = subprocess.run(
                argv, stdin=subprocess.DEVNULL, capture_output=True, cwd=PROJECT, env=ENVIRONMENT,
                timeout=self.remaining(), check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise SampleFailed(f"{argv[0]}: not done within {self.limit:.0f} s") from None
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip() or f"exit status {done.returncode}"
            raise SampleFailed(f"{argv[0]}: {said.splitlines()[-1]}")

    def output(self, argv: list[str], where: Path, codes: tuple[int, ...] = (0,)) -> bytes:
        """What a command of the verification prints, run in *where*; WrongResult when it fails."""
        try:
            done = subprocess.run(
                [*self.user, *argv], cwd=where, stdin=subprocess.DEVNULL, capture_output=True,
                env=ENVIRONMENT, timeout=self.remaining(), check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise SampleFailed(f"{argv[0]}: not done within {self.limit:.0f} s") from None
        if done.returncode not in codes:
            said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
            raise WrongResult(f"{argv[0]} ended with {done.returncode}: {said[0] if said else ''}")
        return done.stdout

    def names_file(self, names: list[str]) -> str:
        """Write *names* to a file, NUL between them, and return its path."""
        path = self.scratch / "names"
        path.write_bytes(b"\0".join(os.fsencode(n) for n in names))
        return str(path)


def quiet(argv: list[str]) -> None:
    """Run *argv*, and ignore its result."""
    subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False)
