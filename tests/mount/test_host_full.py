"""The disk that a store is on fills up to the last byte, in ten ways: what was acknowledged is there."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.hosts import MIB, fill, free, host, sparse_copy
from tests.support.mounts import COWFS, Mounted, cowfs, eventually, is_mounted, mounted, project_root
from tests.support.system import needs_fuse, needs_root, run
from tests.support.worker import Worker, script, worker

DEV_FUSE_AT_NIGHT = True
pytestmark = [needs_fuse, needs_root]


def on(*kinds: str) -> pytest.MarkDecorator:
    """The filesystems to be full: what differs among them is told at :func:`host`."""
    return pytest.mark.parametrize("kind", kinds)


@pytest.fixture
def base(nobody_path: Path) -> Iterator[Path]:
    """A lower, and a store that is allocated as a whole."""
    (nobody_path / "lower/many").mkdir(parents=True)
    (nobody_path / "lower/big").write_bytes(bytes(range(256)) * 4096 * 12)
    for number in range(300):
        (nobody_path / f"lower/many/{number}").write_text("lower")
    cowfs("create", nobody_path / "whole", "96", check=True)
    yield nobody_path


def info(what: Path) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(cowfs("info", what, "--json", check=True).stdout)
    return shown


class Files:
    """Small files, made and fsynced until that is refused: which of them are promised to be there."""

    def __init__(self, work: Worker) -> None:
        self._work = work
        self.kept: list[str] = []
        self.refused: set[int] = set()

    def make(self, names: list[str]) -> None:
        for name in names:
            fd = self._work(f"os.open({name!r}, os.O_CREAT | os.O_WRONLY)")
            if fd < 0:
                self.refused.add(-fd)
                continue
            written, synced = (
                self._work(f"os.write({fd}, {name!r}.encode() * 500)"),
                self._work(f"os.fsync({fd})"),
            )
            self._work(f"os.close({fd})")
            if written == 500 * len(name) and synced is None:
                self.kept.append(name)
            else:
                self.refused |= {-code for code in (written, synced) if code is not None and code < 0}

    def check(self, here: Mounted) -> None:
        for name in self.kept:
            content = script(f"cat -- '{name}'", here)
            assert content == name * 500, f"{name} was fsynced"


def whole(store: Path) -> None:
    """e2fsck has nothing to say about it."""
    done = run("e2fsck", "-fn", store, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# --- 1, 2, 3, 4: file data, somebody else's data, copy-up, names


@on("tmpfs", "ext3", "ext4")
def test_filled_by_the_mount_itself(base: Path, kind: str) -> None:
    """ENOSPC at the write; what was fsynced before and after is there, and removing something else helps."""
    with host(kind, base / "host", 48) as at:
        store = sparse_copy(base / "whole", at / "store")
        other = fill(at, 10 * MIB)
        with (
            mounted(base / "lower", base / "mnt", store, quiet=False) as here,
            worker(here) as work,
        ):
            files = Files(work)
            files.make([f"before{number}" for number in range(5)])
            fd = work("os.open('data', os.O_CREAT | os.O_WRONLY)")
            sizes = [work(f"os.write({fd}, b'd' * (128 << 10))") for _ in range(100)]
            assert -errno.ENOSPC in sizes and sum(size for size in sizes if size > 0) > MIB
            assert set(sizes) <= {128 << 10, -errno.ENOSPC} or kind != "tmpfs"
            assert work(f"os.fsync({fd})") is None, "what was written has its place"
            size = work(f"os.fstat({fd}).st_size")
            files.make([f"full{number}" for number in range(300)])
            assert files.refused <= {errno.ENOSPC}
            assert free(here.path) < 4 * MIB
            other.unlink()
            files.make([f"after{number}" for number in range(5)])
            assert files.kept[-1] == "after4"
            assert work(f"os.close({fd})") is None
        whole(store)
        with mounted(base / "lower", base / "mnt", store, quiet=False) as here:
            files.check(here)
            assert int(script("tr -d d < data | wc -c; stat -c %s data", here).split()[1]) == size
            assert script("tr -d d < data | wc -c", here).strip() == "0"


@on("tmpfs", "ext3", "ext4")
def test_filled_by_somebody_else(base: Path, kind: str) -> None:
    """Whatever is refused is refused with ENOSPC, by the call itself; the warning comes before, in info."""
    with host(kind, base / "host", 48) as at:
        store = sparse_copy(base / "whole", at / "store")
        with (
            mounted(base / "lower", base / "mnt", store, quiet=False) as here,
            worker(here) as work,
        ):
            files = Files(work)
            shown = info(here.path)["store"]
            assert shown["disk"]["missing"] > 48 * MIB and shown["disk"]["free"] == free(at)
            assert "its disk has" in shown["hint"] and "free space there" in shown["hint"]
            room = os.statvfs(here.path)
            assert abs(room.f_bavail * room.f_frsize - free(at)) < 8 * MIB, "df says what can be written"
            files.make(["before"])
            other = fill(at)
            files.make([f"full{number}" for number in range(400)])
            assert files.refused == {errno.ENOSPC}
            assert " free; the store's file may still need " in cowfs("info", here.path).stdout
            assert "before" in os.listdir(here.path) and len(files.kept) < 401
            other.unlink()
            files.make(["after"])
            assert files.kept[-1] == "after"
        whole(store)
        with mounted(base / "lower", base / "mnt", store, quiet=False) as here:
            files.check(here)


@on("ext4")
def test_filled_while_a_file_is_copied_up(base: Path, kind: str) -> None:
    """The lower's file is shown as before, and no temporary stays."""
    with host(kind, base / "host", 48) as at:
        store = sparse_copy(base / "whole", at / "store")
        other = fill(at, 5 * MIB)
        with (
            mounted(base / "lower", base / "mnt", store, quiet=False) as here,
            worker(here) as work,
        ):
            assert work("os.open('big', os.O_WRONLY | os.O_APPEND)") == -errno.ENOSPC
            run("cmp", here.path / "big", base / "lower/big")
            assert work("os.stat('big').st_nlink") == 1
            other.unlink()
            fd = work("os.open('big', os.O_WRONLY | os.O_APPEND)")
            assert work(f"os.write({fd}, b'end')") == 3
            assert work(f"os.fsync({fd})") is None
        whole(store)
        with mounted(base / "lower", base / "mnt", store, quiet=False) as here:
            assert script("tail -c 3 big", here) == "end"


STORM = r"""
import os, sys
os.chdir(sys.argv[1])
refused = 0
def listing():
    return set(os.listdir(".") + ["many/" + name for name in os.listdir("many")])
expected = listing()
def attempt(call, *names):
    global refused
    try:
        call(*names)
        return True
    except OSError as error:
        assert error.errno == 28, error
        refused += 1
        return False
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    old, new, gone = f"many/{number}", f"many/moved{number}", f"many/{299 - number}"
    made = f"{number}" + "x" * 200
    if attempt(os.mkdir, made):
        expected.add(made)
    if attempt(os.rename, old, new):
        expected = expected - {old} | {new}
    if attempt(os.unlink, gone):
        expected.remove(gone)
    assert listing() == expected, number
os.fsync(os.open(".", os.O_RDONLY))
print(refused, *sorted(expected))
"""


@on("tmpfs", "ext3")
def test_filled_in_a_storm_of_names(base: Path, kind: str) -> None:
    """mkdir, rename and unlink write no data: each of them is refused, or is there."""
    with host(kind, base / "host", 48) as at:
        store = sparse_copy(base / "whole", at / "store")
        with mounted(base / "lower", base / "mnt", store, quiet=False) as here:
            other = fill(at, 64 << 10)
            command: list[str | Path] = [sys.executable, "-c", STORM, here.path]
            refused, *_ = run(*command, "0", "120").stdout.split()
            assert int(refused) > 50
            other.unlink()
            refused, *names = run(*command, "120", "140").stdout.split()
            assert refused == "0"
        whole(store)
        with mounted(base / "lower", base / "mnt", store, quiet=False) as here:
            shown = os.listdir(here.path) + [f"many/{name}" for name in os.listdir(here.path / "many")]
            assert sorted(shown) == names


@on("tmpfs", "ext3")
def test_full_already(base: Path, kind: str) -> None:
    """A store whose journal has no room is refused and left alone; so is one that cannot be used for that."""
    with host(kind, base / "host", 48) as at:
        store = sparse_copy(base / "whole", at / "store")
        other = fill(at)
        before = store.read_bytes()
        (base / "mnt").mkdir()
        command: list[str | Path] = ["mount", base / "lower", base / "mnt", "--store", store]
        refused = cowfs(*command)
        assert refused.returncode == 32
        assert (
            "its disk has no space for the journal" in refused.stderr and "free space there" in refused.stderr
        )
        assert store.read_bytes() == before
        os.truncate(other, other.stat().st_size - 4 * MIB)
        refused = cowfs(*command)
        assert refused.returncode in {0, 32}
        if refused.returncode:
            assert "space" in refused.stderr and "Traceback" not in refused.stderr
        else:
            cowfs("umount", base / "mnt", check=True)
        other.unlink()
        with mounted(base / "lower", base / "mnt", store, quiet=False) as here:
            (here.path / "file").write_text("content")
        whole(store)


# --- 5, 6: a disk that refuses what it had promised: a thin volume


@pytest.fixture
def thin(base: Path) -> Iterator[tuple[Path, Path]]:
    """A store on ext4 on a volume whose blocks come from a tmpfs, which may be full: and that tmpfs."""
    with host("tmpfs", base / "pool", 120) as pool:
        with (pool / "volume").open("wb") as out:
            out.truncate(300 * MIB)
        run("mkfs.ext4", "-q", "-O", "^has_journal", "-E", "lazy_itable_init=0", pool / "volume")
        at = base / "host"
        at.mkdir()
        run("mount", "-o", "loop", pool / "volume", at)
        at.chmod(0o1777)
        try:
            yield at, pool
        finally:
            run("umount", at)


def drop_pages(store: Path) -> None:
    """Let the kernel forget what it takes for written, as it does when memory is short."""
    fd = os.open(store, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def refuse_early(store: Path) -> None:
    """Let the kernel write the pages of a store back, be refused, and forget them."""
    fd = os.open(store, os.O_RDWR)
    with suppress(OSError):
        os.fsync(fd)
    os.close(fd)
    drop_pages(store)


def test_a_thin_volume_that_is_full_is_told_by_fsync(base: Path, thin: tuple[Path, Path]) -> None:
    """File data that it has taken, and refuses, is in memory until it has space; then all goes on."""
    at, pool = thin
    store = sparse_copy(base / "whole", at / "store")
    run("sync", "-f", store)
    with mounted(base / "lower", base / "mnt", store, quiet=False) as here, worker(here) as work:
        files = Files(work)
        files.make(["before"])
        other = fill(pool)
        fd = work("os.open('data', os.O_CREAT | os.O_RDWR)")
        big = work("os.open('big', os.O_RDWR)")  # is copied up
        for number in range(16):
            assert work(f"os.write({fd}, b'%x' % {number} * (1 << 20))") == MIB, "the volume takes it"
        assert work(f"os.pwrite({big}, b'changed', 100_000)") == 7
        assert work(f"os.fsync({fd})") == -errno.ENOSPC
        assert work("os.open('later', os.O_CREAT | os.O_WRONLY)") == -errno.ENOSPC
        assert work(f"os.write({fd}, b'more')") == -errno.ENOSPC
        assert work(f"os.fsync({big})") == -errno.ENOSPC
        assert info(here.path)["store"]["unsaved"]["waits"]
        assert "UNSAVED:" in cowfs("info", here.path).stdout
        assert "changes are refused until it has space" in here.log.read_text()
        assert "in memory until its disk has space" in cowfs("diff", here.path).stderr
        drop_pages(store)
        drop_pages(here.path / "data")
        assert work(f"[os.pread({fd}, 1, n << 20) for n in range(16)] == [b'%x' % n for n in range(16)]")
        work("os.chdir('/')")
        refused = cowfs("umount", here.path)
        assert refused.returncode == 32 and "not unmounted" in refused.stderr and "--force" in refused.stderr
        drop_pages(store)
        other.unlink()
        assert work(f"os.fsync({fd})") is None, "there is room again"
        assert work(f"os.pwrite({fd}, b'more', 16 << 20)") == 4
        work("os.closerange(3, 9)")
    whole(store)
    with mounted(base / "lower", base / "mnt", store, quiet=False) as here:
        files.check(here)
        data = (here.path / "data").read_bytes()
        assert data == b"".join(b"%x" % number * MIB for number in range(16)) + b"more"
        lower = (base / "lower/big").read_bytes()
        assert (here.path / "big").read_bytes() == lower[:100_000] + b"changed" + lower[100_007:]


def test_what_a_thin_volume_refused_and_the_kernel_forgot(base: Path, thin: tuple[Path, Path]) -> None:
    """Nobody has it any more: so the store stays as the last commit left it, and the log names the files."""
    at, pool = thin
    store = sparse_copy(base / "whole", at / "store")
    run("sync", "-f", store)
    with mounted(base / "lower", base / "mnt", store, quiet=False) as here, worker(here) as work:
        files = Files(work)
        files.make(["before"])
        other = fill(pool)
        work("os.mkdir('new')")
        fd = work("os.open('new/data', os.O_CREAT | os.O_WRONLY)")
        for _ in range(16):
            assert work(f"os.write({fd}, b'd' * (1 << 20))") == MIB, "the volume takes it"
        refuse_early(store)
        assert work(f"os.fsync({fd})") == -errno.EIO
        assert work("os.open('later', os.O_CREAT | os.O_WRONLY)") == -errno.EROFS
        assert work("os.path.getsize('new/data')") == 16 * MIB
        shown = info(here.path)["store"]["unsaved"]
        assert not shown["waits"]
        assert "UNSAVED:" in cowfs("info", here.path).stdout
        assert "is read-only from now on" in here.log.read_text()
        eventually(lambda: "is lost: upper/new/data" in here.log.read_text(), "the log names the file")
        assert "lost when it is unmounted" in cowfs("diff", here.path).stderr
        work("[os.closerange(3, 9), os.chdir('/')]")
        refused = cowfs("umount", here.path)
        assert refused.returncode == 32 and "not unmounted" in refused.stderr and "--force" in refused.stderr
        assert is_mounted(here.path)
        forced = cowfs("umount", "--force", here.path)
        assert forced.returncode == 0 and "unmounted, but" in forced.stderr
        assert not is_mounted(here.path)
    other.unlink()
    with mounted(base / "lower", base / "mnt", store, quiet=False) as here:
        files.check(here)
    whole(store)


def test_a_thin_volume_that_takes_no_names_is_waited_for(base: Path, thin: tuple[Path, Path]) -> None:
    """Nothing is lost but what is in memory still: it is written when there is room."""
    at, pool = thin
    store = sparse_copy(base / "whole", at / "store")
    run("sync", "-f", store)
    with mounted(base / "lower", base / "mnt", store, quiet=False) as here, worker(here) as work:
        work("os.fsync(os.open('.', os.O_RDONLY))")
        other = fill(pool)
        made = [f"{number:03}" + "n" * 200 for number in range(60)]
        assert {work(f"os.mkdir({name!r})") for name in made} == {None}
        assert work("os.fsync(os.open('.', os.O_RDONLY))") in {-errno.ENOSPC, -errno.EIO}
        assert info(here.path)["store"]["unsaved"]["waits"]
        assert work("os.mkdir('later')") == -errno.ENOSPC
        assert work(f"os.rmdir({made[0]!r})") == -errno.ENOSPC
        assert set(made) < set(os.listdir(here.path))
        work("[os.closerange(3, 9), os.chdir('/')]")
        assert cowfs("umount", here.path).returncode == 32
        other.unlink()
        here.umount()
    with mounted(base / "lower", base / "mnt", store, quiet=False) as here:
        assert set(made) < set(os.listdir(here.path))
    whole(store)


# --- 7, 8, 9: refused in the background, and when it is to end


def stalled(here: Mounted) -> bool:
    lost = info(here.path)["store"]["unsaved"]
    return bool(lost and lost["waits"])


@contextmanager
def refused_names(base: Path, thin: tuple[Path, Path]) -> Iterator[tuple[Mounted, Path]]:
    """A mount in which ``lost`` was made, and that cannot put that on disk as long as a file is there."""
    at, pool = thin
    store = sparse_copy(base / "whole", at / "store")
    run("sync", "-f", store)
    with mounted(base / "lower", base / "mnt", store, quiet=False) as here:
        (here.path / "before").touch()
        script("sync before", here)
        other = fill(pool)
        for number in range(40):
            (here.path / ("lost" if not number else f"{number}" + "n" * 200)).mkdir()
        yield here, other


@contextmanager
def next_mount(base: Path, thin: tuple[Path, Path], mountpoint: Path) -> Iterator[Callable[[], bool]]:
    """Who wants the store next, and waits for it by now; yields whether that has ended, and well."""
    said = base / "next.said"
    with (
        said.open("wb") as stream,
        subprocess.Popen(
            [*COWFS, "mount", base / "lower", mountpoint, "--store", thin[0] / "store"],
            stdout=stream, stderr=stream, env={**os.environ, "PYTHONPATH": project_root()},
        ) as process,
    ):  # fmt: skip
        eventually(lambda: "waiting for" in said.read_text(), "it says what it waits for")

        def ended() -> bool:
            code = process.poll()
            assert code in {None, 0}, said.read_text()
            return code == 0

        yield ended


@pytest.mark.slow
def test_refused_in_the_background(base: Path, thin: tuple[Path, Path]) -> None:
    """Nobody asks for the commit: the log, info, diff and umount tell, and it goes on without being asked."""
    with refused_names(base, thin) as (here, other), worker(here) as work:
        eventually(lambda: stalled(here), "the commit every five seconds has failed")
        assert work("os.mkdir('later')") == -errno.ENOSPC
        assert work("os.rename('lost', 'renamed')") == -errno.ENOSPC
        assert work("os.open('data', os.O_CREAT | os.O_WRONLY)") == -errno.ENOSPC
        assert work("os.fsync(os.open('.', os.O_RDONLY))") == -errno.ENOSPC
        assert {"before", "lost"} < set(os.listdir(here.path))
        assert (
            "ERROR" in here.log.read_text()
            and "changes are refused until it has space" in here.log.read_text()
        )
        said = "in memory until its disk has space"
        assert said in cowfs("info", here.path).stdout
        shown = cowfs("diff", here.path)
        assert said in shown.stderr and "A  lost/" in shown.stdout
        work("[os.closerange(3, 9), os.chdir('/')]")
        refused = cowfs("umount", here.path)
        assert refused.returncode == 32
        assert "not unmounted" in refused.stderr and said in refused.stderr and "--force" in refused.stderr
        assert cowfs("umount", "-l", here.path).returncode == 32
        assert is_mounted(here.path)
        other.unlink()
        eventually(lambda: not stalled(here), "it goes on by itself")
        assert "has space again" in here.log.read_text()
        (here.path / "later").mkdir()
    with mounted(base / "lower", base / "mnt", thin[0] / "store", quiet=False) as here:
        assert {"before", "later", "lost"} < set(os.listdir(here.path))
    whole(thin[0] / "store")


@pytest.mark.parametrize("how", ["umount2", "SIGTERM"])
def test_who_is_not_asked_waits_for_room_at_the_end(base: Path, thin: tuple[Path, Path], how: str) -> None:
    """The kernel's umount(2), and a signal, are not refused: the daemon keeps what it has for a minute."""
    with refused_names(base, thin) as (here, other):
        pid = here.pid()
        if how == "SIGTERM":
            os.kill(pid, signal.SIGTERM)
        else:
            run("umount", "-i", here.path)
        eventually(lambda: not is_mounted(here.path), "it is unmounted")
        eventually(lambda: "cannot write to its disk" in here.log.read_text(), "it is told")
        assert os.path.exists(f"/proc/{pid}")
        with next_mount(base, thin, here.path) as ended:
            other.unlink()
            eventually(lambda: not os.path.exists(f"/proc/{pid}"), "all is saved")
            eventually(ended, "the next one has the store", 30)
        assert cowfs("umount", here.path).returncode == 0
    with mounted(base / "lower", base / "mnt", thin[0] / "store", quiet=False) as here:
        assert (here.path / "lost").is_dir()
    whole(thin[0] / "store")


def test_asked_twice_it_gives_up(base: Path, thin: tuple[Path, Path]) -> None:
    """The second SIGTERM while it waits for room ends it; the store is as it was committed last."""
    with refused_names(base, thin) as (here, other):
        pid = here.pid()
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGTERM)  # while it still writes: changes nothing
        eventually(lambda: not is_mounted(here.path), "it is unmounted")
        eventually(lambda: "cannot write to its disk" in here.log.read_text(), "it is told")

        assert os.path.exists(f"/proc/{pid}"), "it waits"

        def is_gone_when_asked() -> bool:
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                return True
            return False

        eventually(is_gone_when_asked, "it gives up", 20)
        assert "the last changes could not be written" in here.log.read_text()
    other.unlink()
    with mounted(base / "lower", base / "mnt", thin[0] / "store", quiet=False) as here:
        assert "before" in os.listdir(here.path)
    whole(thin[0] / "store")


def test_given_up_by_force(base: Path, thin: tuple[Path, Path]) -> None:
    """Exit 0, at once, with what is lost on the terminal; the store is at least as it was committed last."""
    with refused_names(base, thin) as (here, other):
        assert cowfs("umount", here.path).returncode == 32
        forced = cowfs("umount", "--force", here.path, timeout=20)
        assert forced.returncode == 0
        assert "unmounted, but: " in forced.stderr and "could not be written" in forced.stderr
    other.unlink()
    with mounted(base / "lower", base / "mnt", thin[0] / "store", quiet=False) as here:
        assert "before" in os.listdir(here.path)
    whole(thin[0] / "store")


def test_killed_while_it_waits_for_room(base: Path, thin: tuple[Path, Path]) -> None:
    with refused_names(base, thin) as (here, other):
        assert cowfs("umount", here.path).returncode == 32
        os.kill(here.pid(), signal.SIGKILL)
        cowfs("umount", here.path, check=True)
    other.unlink()
    with mounted(base / "lower", base / "mnt", thin[0] / "store", quiet=False) as here:
        assert "before" in os.listdir(here.path)
    whole(thin[0] / "store")


def test_a_limit_is_told_by_the_calls(base: Path) -> None:
    """As ulimit -f and quotas are: nothing is acknowledged that cannot be kept."""
    with mounted(base / "lower", base / "mnt", base / "whole", quiet=False) as here, worker(here) as work:
        run("prlimit", f"--pid={here.pid()}", "--fsize=65536:unlimited")  # its log is not so long
        assert work("os.mkdir('lost')") == -errno.EFBIG
        assert work("os.open('data', os.O_CREAT | os.O_WRONLY)") == -errno.EFBIG
        assert set(work("os.listdir('.')")) == {"big", "many"}
        run("prlimit", f"--pid={here.pid()}", "--fsize=unlimited")
        assert work("os.mkdir('made')") is None
    whole(base / "whole")


# --- 10: the kernel's engine, directories, persist


@on("tmpfs", "ext3")
def test_the_kernel_gets_a_store_that_cannot_run_out_of_its_disk(base: Path, kind: str) -> None:
    """It would lose what it could not write, and tell nobody: a sparse store gets its blocks first."""
    with host(kind, base / "host", 128) as at:
        store = sparse_copy(base / "whole", at / "store")
        other = fill(at, 40 * MIB)
        (base / "mnt").mkdir()
        refused = cowfs("mount", base / "lower", base / "mnt", "--store", store, "--engine", "kernel")
        assert refused.returncode == 32
        assert "free space there" in refused.stderr and "--engine process" in refused.stderr
        assert free(at) > 30 * MIB, "none was taken"
        other.unlink()
        with (
            mounted(base / "lower", base / "mnt", store, engine="kernel", quiet=False) as here,
            worker(here) as work,
        ):
            fill(at)
            assert free(at) < 8192
            files = Files(work)
            files.make([f"name{number}" for number in range(50)])
            assert len(files.kept) == 50
            assert info(here.path)["store"]["disk"] == {"free": free(at), "missing": 0}
            fd = work("os.open('data', os.O_CREAT | os.O_WRONLY)")
            sizes = [work(f"os.write({fd}, b'd' * (1 << 20))") for _ in range(100)]
            assert -errno.ENOSPC in sizes and sizes.count(MIB) > 70, "the store's own end, not the disk's"
            assert work(f"os.fsync({fd})") is None
        whole(store)
        with mounted(base / "lower", base / "mnt", store, quiet=False) as here:
            files.check(here)


@on("ext4")
def test_a_directory_store_says_it_itself(base: Path, kind: str) -> None:
    with host(kind, base / "host", 48) as at:
        with mounted(base / "lower", base / "mnt", at / "dir", quiet=False) as here, worker(here) as work:
            files = Files(work)
            files.make(["before"])
            other = fill(at)
            assert "its disk has" in info(here.path)["store"]["hint"]
            fd = work("os.open('before', os.O_WRONLY | os.O_APPEND)")
            assert -errno.ENOSPC in [work(f"os.write({fd}, b'd' * 8192)") for _ in range(40)]
            assert work("os.open('big', os.O_WRONLY | os.O_APPEND)") == -errno.ENOSPC
            run("cmp", here.path / "big", base / "lower/big")
            other.unlink()
            files.make(["after"])
            assert files.kept[-1] == "after"
            files.kept.remove("before")  # it has got more since
        with mounted(base / "lower", base / "mnt", at / "dir", quiet=False) as here:
            files.check(here)


@on("tmpfs", "ext3")
def test_persist_into_a_disk_that_fills_up(base: Path, kind: str) -> None:
    """No file, the changes in memory as before; and then, with room, all is kept."""
    with (
        host(kind, base / "host", 200) as at,
        mounted(base / "lower", base / "mnt", "memory", quiet=False) as here,
    ):
        (here.path / "file").write_text("content")
        script("dd if=/dev/urandom of=data bs=1M count=60 status=none", here)
        other = fill(at, 100 * MIB)
        refused = cowfs("persist", here.path, at / "kept.bs")
        assert refused.returncode == 32 and "MiB more, but only" in refused.stderr
        assert set(os.listdir(at)) - {"lost+found"} == {"ballast"}
        assert free(at) > 90 * MIB
        (here.path / "file").write_text("more")
        other.unlink()
        cowfs("persist", here.path, at / "kept.bs", check=True)
        fill(at)
        (here.path / "later").write_text("later")
        script("sync -d later file data", here)
        assert info(here.path)["store"]["disk"]["free"] < 8192
        here.umount()
        whole(at / "kept.bs")
        with mounted(base / "lower", base / "mnt", at / "kept.bs", quiet=False) as here:
            assert (here.path / "file").read_text() == "more" and (here.path / "later").read_text() == "later"


def test_the_kernel_loses_what_a_thin_volume_refuses_and_umount_says_so(
    base: Path, thin: tuple[Path, Path]
) -> None:
    at, pool = thin
    store = sparse_copy(base / "whole", at / "store")
    with (
        mounted(base / "lower", base / "mnt", store, engine="kernel", quiet=False) as here,
        worker(here) as work,
    ):
        other = fill(pool)
        fd = work("os.open('data', os.O_CREAT | os.O_WRONLY)")
        assert work(f"os.write({fd}, b'd' * (16 << 20))") == 16 * MIB
        assert work(f"os.fsync({fd})") in {-errno.ENOSPC, -errno.EIO, -errno.EROFS}
        work("[os.closerange(3, 9), os.chdir('/')]")
        refused = cowfs("umount", here.path)
        assert refused.returncode == 32 and "lost when it is unmounted" in refused.stderr
        assert "UNSAVED" in cowfs("info", here.path).stdout
        assert cowfs("umount", here.path).returncode == 32, "not only once"
        assert cowfs("umount", "--force", here.path).returncode == 0
    other.unlink()


def test_grow_under_users_into_a_disk_that_is_full(base: Path) -> None:
    """Nothing is lost, nothing is left of it, and the mount goes on."""
    with host("tmpfs", base / "host", 160) as at:
        store = at / "store"
        run("cp", "--sparse=never", base / "whole", store)
        with mounted(base / "lower", base / "mnt", store, quiet=False) as here:
            (here.path / "before").write_text("before")
            refused = cowfs("grow", here.path, "200")
            assert refused.returncode == 32 and "MiB more, but only" in refused.stderr
            run("prlimit", f"--pid={here.pid()}", f"--fsize={110 << 20}:unlimited")
            refused = cowfs("grow", here.path, "120")
            assert refused.returncode == 32 and "MiB: File too large" in refused.stderr
            assert store.stat().st_size == 96 * MIB
            (here.path / "after").write_text("after")
            run("prlimit", f"--pid={here.pid()}", "--fsize=unlimited")
            cowfs("grow", here.path, "120", check=True)
        whole(store)
        with mounted(base / "lower", base / "mnt", store, quiet=False) as here:
            assert (here.path / "before").read_text() == "before"
            assert (here.path / "after").read_text() == "after"
