"""The disk that a store is on refuses what it had promised, as a thin volume does that is full."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.mount.test_host_full import Files, info, whole
from tests.support.hosts import MIB, fill, host, lower_and_store, sparse_copy
from tests.support.mounts import COWFS, Mounted, cowfs, eventually, is_mounted, mounted, project_root
from tests.support.system import needs_fuse, needs_root, run
from tests.support.worker import script, worker

DEV_FUSE_AT_NIGHT = True
pytestmark = [needs_fuse, needs_root]


@pytest.fixture
def base(nobody_path: Path) -> Path:
    return lower_and_store(nobody_path)


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
    """The data is lost, so the store stays as the last commit left it, and the log names the files."""
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
    """Start another mount of the store, which waits; yield a call that tells whether it succeeded."""
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
    """A commit in the background fails: the log, info, diff and umount report it, and it is retried."""
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
