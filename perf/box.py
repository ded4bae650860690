"""The environment of one sample: its directories, mounts, daemons, client processes and time limit."""

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
PROJECT = Path(__file__).parents[1]  # where daemons and commands run, so that `-m cowfs...` finds the package
CLIENT = Path(__file__).with_name("client.py")
ENVIRONMENT = {**os.environ, "LC_ALL": "C", "TZ": "UTC", "GIT_CONFIG_GLOBAL": os.devnull}


def wait_for_exit(process: subprocess.Popen[bytes], timeout: float) -> bool:
    """Wait until *process* exits, at most *timeout* seconds; return whether it did.

    Returns at once when it exits; ``Popen.wait`` with a timeout polls every 50 ms.
    """
    pidfd = os.pidfd_open(process.pid)
    try:
        return bool(select.select([pidfd], [], [], timeout)[0])
    finally:
        os.close(pidfd)


def start_session(
    argv: list[str], cwd: Path, stdout: IO[bytes], stderr: IO[bytes]
) -> subprocess.Popen[bytes]:
    """Start *argv* in a new session, with the priority of this process.

    With autogroups (sched(7)), the scheduler applies priorities to sessions, and a new session begins with 0.
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
    """A sample failed and has no figure. The message says why."""


class WrongResult(SampleFailed):
    """The result of a workload is wrong."""


@dataclass(slots=True)
class Box:
    """A directory with everything of one sample.

    The system under test is mounted at ``merged``. For systems that need directories, the kernel mounts the
    images at ``lower`` and ``store``.
    """

    path: Path
    scratch: Path
    """A directory on tmpfs for lists and for the output of clients."""
    corpus: Corpus
    limit: float
    """Seconds that the whole sample may take."""
    prefix: list[str] = field(default_factory=list)
    """Words to put before the command that starts a daemon, for example a profiler."""
    user: list[str] = field(default_factory=list)
    """Words to put before the commands of daemons and clients, to run them as another user."""
    daemons: dict[Path, subprocess.Popen[bytes]] = field(default_factory=dict)
    """The running daemons, by mountpoint."""
    mount_seconds: float | None = None
    state: dict[str, Any] = field(default_factory=dict)
    """Data that a workload passes from set-up to verification."""
    _deadline: float = 0.0
    _watchdog: threading.Timer | None = None
    _mounts: list[Path] = field(default_factory=list)
    _connections: dict[Path, int] = field(default_factory=dict)
    _mappings: list[mmap.mmap] = field(default_factory=list)

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
        """Return where the run has mounted the FUSE control filesystem."""
        return self.path.parent / "fusectl"

    @property
    def log(self) -> Path:
        return self.path / "daemon.log"

    def open(self) -> None:
        """Create the directories and start the time limit."""
        for directory in (self.lower, self.store, self.merged):
            directory.mkdir(parents=True)
        self._deadline = time.monotonic() + self.limit
        # A client may hang in a system call that no signal interrupts: killing the daemon ends the call.
        self._watchdog = threading.Timer(self.limit + 5, self.kill_daemons)
        self._watchdog.daemon = True
        self._watchdog.start()

    def close(self) -> None:
        """Kill the daemons, unmount what is still mounted, and remove the store's image."""
        if self._watchdog:
            self._watchdog.cancel()
        self.kill_daemons()
        for target in reversed(self._mounts):
            run_ignoring_errors(["umount", "-l", str(target)])
        for process in self.daemons.values():
            process.wait(10)
        self.daemons.clear()
        self._mounts.clear()
        self._mappings.clear()
        self.image.unlink(missing_ok=True)

    def keep_in_cache(self, path: Path) -> None:
        """Read *path* into the page cache and keep it there: the kernel does not drop mapped pages."""
        with path.open("rb") as file:
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            self._mappings.append(mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ))

    # -- mounts

    def mount(self, target: Path, *argv: str) -> None:
        """Run mount(8) with *argv* and *target*."""
        self.check(["mount", *argv, str(target)])
        self._mounts.append(target)

    def unmount(self, target: Path) -> None:
        """Run umount(8). SampleFailed if the mount is in use."""
        self.check(["umount", str(target)])
        self._mounts.remove(target)

    def mount_lower(self) -> None:
        """Mount the lower image at ``lower`` with the kernel's squashfs."""
        self.mount(self.lower, "-t", "squashfs", "-o", "loop,ro", str(self.corpus.image))

    def make_store(self) -> None:
        """Create an ext3 image with all its space allocated, and the options of ``cowfs create``."""
        with self.image.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, STORE_BYTES)
        options = [
            "-q", "-F", "-t", "ext3", "-b", "4096", "-I", "256", "-m", "0", "-i", "8192",
            "-E", "lazy_itable_init=0",
        ]  # fmt: skip
        self.check(["mke2fs", *options, str(self.image)])

    def mount_store(self) -> None:
        """Mount the store at ``store`` with the kernel's ext3, and create upper and work in it."""
        self.mount(self.store, "-t", "ext3", "-o", "loop", str(self.image))
        for name in ("upper", "work"):
            (self.store / name).mkdir(exist_ok=True)

    # -- the daemon

    def start_daemon(self, argv: list[str]) -> None:
        """Start the FUSE daemon under test, in the foreground; return when ``merged`` answers."""
        self._start([*self.user, *self.prefix, *argv], self.merged)

    def start_helper(self, argv: list[str], target: Path) -> None:
        """Start a FUSE daemon that provides a layer; return when *target* answers."""
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
                raise SampleFailed(f"{argv[0]} exited with {process.returncode}: {self.last_log_line()}")
            if time.monotonic() > self._deadline:
                raise SampleFailed(f"{argv[0]} did not mount in time: {self.last_log_line()}")
            time.sleep(0.002)

    def stop_daemon(self, target: Path, unmount: list[str] | None = None) -> None:
        """Unmount *target* with *unmount* (by default umount(8)), and wait until its daemon has exited."""
        command = unmount or ["umount", str(target)]
        retry_until = time.monotonic() + 2
        while True:
            try:
                self.check(command)
                break
            except SampleFailed:
                # It may be busy for a moment: some daemons access their own new mount.
                if time.monotonic() > retry_until:
                    raise
        self._mounts.remove(target)
        self._connections.pop(target, None)  # the kernel may reuse the number
        try:
            self.daemons.pop(target).wait(self.remaining())
        except subprocess.TimeoutExpired:
            raise SampleFailed("the daemon did not exit after the unmount") from None

    def kill_daemons(self) -> None:
        """Kill every daemon and the processes it started."""
        for process in self.daemons.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # A daemon that waits for a reply to a request of its own dies only if it gets one (kernel,
            # fuse.rst).
            for connection in self._connections.values():
                with contextlib.suppress(OSError):
                    (self.fusectl / str(connection) / "abort").write_text("1")

    def usage(self) -> machine.Usage | None:
        """Return the memory and processor time of the daemons; None if there are none."""
        usages = [machine.session_usage(process.pid) for process in list(self.daemons.values())]
        alive = [usage for usage in usages if usage]
        return machine.Usage(sum(u.rss for u in alive), sum(u.cpu for u in alive)) if alive else None

    def last_log_line(self) -> str:
        """Return the last line that a daemon has printed."""
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return lines[-1] if lines else "(no output)"

    # -- clients

    def remaining(self) -> float:
        """Return the seconds left of the time limit, at least 0.1."""
        return max(0.1, self._deadline - time.monotonic())

    def run(self, argv: list[str], *, stdout: Path | None = None, codes: tuple[int, ...] = (0,)) -> float:
        """Run a client in ``merged``; return its wall time in seconds. SampleFailed if it fails."""
        argv = [*self.user, *argv]
        out = stdout or self.scratch / "stdout"
        with out.open("wb") as sink, (self.scratch / "stderr").open("w+b") as errors:
            begin = time.perf_counter()
            process = start_session(argv, self.merged, sink, errors)
            if not wait_for_exit(process, self.remaining()):
                self.kill_daemons()
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise SampleFailed(f"{argv[0]}: not done within {self.limit:.0f} s")
            seconds = time.perf_counter() - begin
            process.wait()
            errors.seek(0)
            message = first_line(errors.read())
        if process.returncode not in codes:
            raise SampleFailed(f"{argv[0]} exited with {process.returncode}: {message}")
        return seconds

    def client(self, job: str, *args: str, prefix: Sequence[str] = ()) -> tuple[float, str]:
        """Run a job of ``client.py`` in ``merged``; return the seconds it took and the result it printed."""
        out = self.scratch / "client"
        self.run([*prefix, machine.python(), "-I", "-S", str(CLIENT), job, *args], stdout=out)
        seconds, _, result = out.read_text().partition(" ")
        return float(seconds), result.strip()

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
            message = done.stderr.decode(errors="replace").strip() or f"exit status {done.returncode}"
            raise SampleFailed(f"{argv[0]}: {message.splitlines()[-1]}")

    def output(self, argv: list[str], cwd: Path, codes: tuple[int, ...] = (0,)) -> bytes:
        """Run a command of the verification in *cwd*; return what it prints. WrongResult if it fails."""
        try:
            done = subprocess.run(
                [*self.user, *argv], cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True,
                env=ENVIRONMENT, timeout=self.remaining(), check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise SampleFailed(f"{argv[0]}: not done within {self.limit:.0f} s") from None
        if done.returncode not in codes:
            message = first_line(done.stderr or done.stdout)
            raise WrongResult(f"{argv[0]} exited with {done.returncode}: {message}")
        return done.stdout

    def names_file(self, names: list[str]) -> str:
        """Write *names* to a file, separated by NUL, and return its path."""
        path = self.scratch / "names"
        path.write_bytes(b"\0".join(os.fsencode(n) for n in names))
        return str(path)


def first_line(output: bytes) -> str:
    """Return the first line of *output* that is not empty, or ""."""
    return (output.decode(errors="replace").strip().splitlines() or [""])[0]


def run_ignoring_errors(argv: list[str]) -> None:
    """Run *argv*, and ignore its output and exit status."""
    subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False)
