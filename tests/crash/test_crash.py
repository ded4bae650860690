"""SIGKILL at random points of a workload; then unmount, and mount the store again.

The kill comes after a random step, and a random moment later, so that it hits within operations too.
"""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.crash import workloads
from tests.crash.workloads import FILES, MARK, STEPS, content, fresh, named_after
from tests.support import tree, upper
from tests.support.mounts import COWFS, Mounted, cowfs, eventually, is_mounted, mounted
from tests.support.system import NOBODY, as_nobody_prefix, needs_fuse, needs_root, run

pytestmark = [needs_fuse, pytest.mark.crash, pytest.mark.timeout(180)]
ROUNDS = int(os.environ.get("COWFS_CRASH_ROUNDS", "1"))


def rounds(ordinary: int) -> list[Any]:
    """Return the seeds: this number by day, ten at night."""
    return [
        pytest.param(seed, marks=[] if seed < ordinary else [pytest.mark.nightly])
        for seed in range(max(ordinary, 10))
    ]


@dataclass
class Place:
    """A lower, a store and a mountpoint."""

    base: Path
    image: bool
    nobody: bool = False
    engine: str | None = None
    finished: int = -1
    """The last acknowledged step."""

    def __post_init__(self) -> None:
        tree.build(
            self.base / "lower",
            {f"d{n % 9}/f{n}": tree.Node(data=content(n), mode=0o644, uid=self.owner, gid=self.owner)
             for n in range(FILES)} | {f"d{n}": tree.directory(0o755, uid=self.owner, gid=self.owner)
                                       for n in range(9)},
        )  # fmt: skip
        if self.nobody:
            os.chown(self.base / "lower", NOBODY, NOBODY)
        if self.image:
            done = cowfs("create", self.store, "96", nobody=self.nobody)
            assert done.returncode == 0, done.stderr

    @property
    def owner(self) -> int:
        return NOBODY if self.nobody else 0

    @property
    def store(self) -> Path:
        return self.base / ("store.bs" if self.image else "store")

    @contextmanager
    def mounted(self, quiet: bool = True) -> Iterator[Mounted]:
        """Mount the store."""
        with mounted(
            self.base / "lower", self.base / "mnt", self.store,
            nobody=self.nobody, engine=self.engine, quiet=quiet,
        ) as it:  # fmt: skip
            yield it

    def run_and_kill(self, workload: str, seed: int) -> None:
        """Run *workload* on a new mount, kill the daemon during it, and remove the dead mount."""
        chance = random.Random(seed)
        kill_at, later = chance.randrange(STEPS[workload]), chance.uniform(0, 0.02)
        with self.mounted(quiet=False) as mount:
            pid = mount.pid()
            prefix = as_nobody_prefix() if self.nobody else []
            command = [*prefix, sys.executable, "-S", workloads.__file__, workload, str(mount.path)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
                assert child.stdout
                for line in child.stdout:
                    kind, _, number = line.strip().partition(" ")
                    if kind == "over":
                        break
                    self.finished = int(number)
                    if self.finished == kill_at:
                        time.sleep(later)  # a random moment, not a wait for something
                        os.kill(pid, signal.SIGKILL)
                assert child.wait(30) == 0
            clear_away(mount)
            eventually(lambda: not Path(f"/proc/{pid}").exists(), "the killed daemon is gone")

    def verify(self, what: str) -> list[str]:
        """Mount the store again, and return what a check as its owner prints."""
        prefix = as_nobody_prefix() if self.nobody else []
        with self.mounted() as mount:
            command = [*prefix, sys.executable, "-S", workloads.__file__, what, str(mount.path)]
            return run(*command).stdout.splitlines()

    def check_image(self) -> None:
        """Fail unless e2fsck finds no error in the image."""
        if self.image:
            eventually(lambda: not in_use(self.store), "the kernel lets go of the image")
            done = run("e2fsck", "-fn", self.store, check=False)
            assert done.returncode == 0, done.stdout

    def check_leftovers(self, where: Path) -> None:
        """Fail if temporaries are left in the store after a clean unmount."""
        if not self.image:
            prefix = "user.overlay." if self.nobody else "trusted.overlay."
            assert upper.leftovers(str(self.store), prefix) == []
            return
        where.mkdir()
        run("mount", "-o", "loop,ro", self.store, where)
        try:
            assert upper.leftovers(str(where)) == []
        finally:
            run("umount", where)


def in_use(image: Path) -> bool:
    """Return whether a loop device uses the image."""
    return bool(run("losetup", "-j", image).stdout)


def clear_away(mount: Mounted) -> None:
    """Remove a mount whose daemon is dead, like a user."""
    if mount.nobody:
        run(*as_nobody_prefix(), "fusermount3", "-uz", mount.path)
    else:
        run("umount", "-l", mount.path)
    assert not is_mounted(mount.path)


KINDS = ["image", "image of nobody", "image by the kernel", "directory", "directory of nobody"]


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path, nobody_path: Path) -> Place:
    """A store of each persistent kind."""
    if os.geteuid() != 0:
        pytest.skip("needs root: to mount, and to act as nobody")
    kind = request.param
    nobody = kind.endswith("of nobody")
    engine = "kernel" if kind.endswith("by the kernel") else None
    return Place(nobody_path if nobody else tmp_path, kind.startswith("image"), nobody, engine)


def files_of(mount: Mounted) -> dict[str, tuple[bytes, int]]:
    """Return all files with content and mode, read by the owner of the mount."""
    prefix = as_nobody_prefix() if mount.nobody else []
    done = subprocess.run(
        [*prefix, "tar", "-C", mount.path, "-cf", "-", "."], stdout=subprocess.PIPE, check=True, timeout=60
    )
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        return {
            member.name.removeprefix("./"): (archive.extractfile(member).read(), member.mode)  # type: ignore[union-attr]
            for member in archive
            if member.isreg()
        }


def lower_path(number: int) -> str:
    """Return the path of file *number* in the lower."""
    return f"d{number % 9}/f{number}"


@pytest.mark.parametrize("seed", rounds(ROUNDS))
def test_append(place: Place, seed: int) -> None:
    """Each file is copied up or not, appended to or not; nothing is lost."""
    place.run_and_kill("append", seed)
    with place.mounted() as mount:
        files = files_of(mount)
    assert files.keys() == {lower_path(number) for number in range(FILES)}
    for number in range(FILES):
        data, old = files[lower_path(number)][0], content(number)
        assert data in {old, old + MARK}, f"file {number}: {len(data)} bytes, was {len(old)}"
        assert data == old + MARK or number > place.finished, f"file {number} was appended to"
    place.check_image()
    place.check_leftovers(place.base / "look")


@pytest.mark.parametrize("seed", rounds(ROUNDS))
def test_untar(place: Place, seed: int) -> None:
    """A new file has the data written so far; a closed file is complete."""
    place.run_and_kill("untar", 100 + seed)
    with place.mounted() as mount:
        files = files_of(mount)
    for number in range(FILES):
        data = files.get(f"new/n{number % 7}/f{number}", (b"", 0))[0]
        assert fresh(number).startswith(data), f"file {number}"
        assert data == fresh(number) or number > place.finished, f"file {number} was written"
        assert files[lower_path(number)][0] == content(number)
    place.check_leftovers(place.base / "look")


@pytest.mark.parametrize("seed", rounds(ROUNDS))
def test_replace(place: Place, seed: int) -> None:
    """After write, fsync and rename, each name has the old or the complete new content."""
    place.run_and_kill("replace", 200 + seed)
    with place.mounted() as mount:
        files = files_of(mount)
    for number in range(FILES):
        data = files[lower_path(number)][0]
        assert data in {content(number), fresh(number)}, f"file {number}"
        assert data == fresh(number) or number > place.finished, f"file {number} is old"


@pytest.mark.parametrize("seed", rounds(ROUNDS))
def test_shuffle(place: Place, seed: int) -> None:
    """Each name is removed, renamed, changed, or unchanged; acknowledged operations remain."""
    place.run_and_kill("shuffle", 300 + seed)
    with place.mounted() as mount:
        files = files_of(mount)
    done = []
    for number in range(FILES):
        folder, name = lower_path(number).split("/")
        places = [
            f"{where}/{what}" for where in (folder, f"m{folder[1:]}") for what in (name, f"moved{name[1:]}")
        ]
        there = [path for path in places if path in files]
        if number % 3 == 0:
            assert len(there) <= 1, f"file {number} is at {there}"
            done.append(not there)
            continue
        assert len(there) == 1, f"file {number} is at {there}"
        data, mode = files[there[0]]
        same = data == content(number)
        assert same, f"file {number} has other bytes"
        done.append("moved" in there[0] if number % 3 == 1 else mode == 0o600)
    # Every third directory loses all its files.
    done += [any(path.startswith(f"m{number}/") for path in files) for number in range(9) if number % 3]
    assert done == sorted(done, reverse=True), "something is there, and what came before it is not"
    assert all(done[: min(place.finished + 1, FILES)])
    place.check_image()
    place.check_leftovers(place.base / "look")


@pytest.mark.parametrize("seed", rounds(1))
def test_names(place: Place, seed: int) -> None:
    """Without any fsync, all acknowledged operations remain, and at most one more."""
    place.run_and_kill("names", 400 + seed)
    found = set(place.verify("verify-names"))
    assert found in (named_after(place.finished), named_after(place.finished + 1))
    place.check_image()


@pytest.mark.parametrize("seed", rounds(1))
def test_git(place: Place, seed: int) -> None:
    """All commits exist, and git fsck finds no error."""
    place.run_and_kill("git", 500 + seed)
    (count,) = place.verify("verify-git")
    assert int(count) in {place.finished + 1, place.finished + 2}
    place.check_image()


@pytest.mark.parametrize("synchronous", ["full", "normal"])
@pytest.mark.parametrize("seed", rounds(1))
def test_sqlite(place: Place, seed: int, synchronous: str) -> None:
    """All transactions exist, including those that sqlite did not sync."""
    place.run_and_kill(f"sqlite-{synchronous}", 600 + seed)
    (count,) = place.verify("verify-sqlite")
    assert int(count) in {place.finished + 1, place.finished + 2}
    place.check_image()


@needs_root
@pytest.mark.parametrize("seed", range(ROUNDS * 2))
def test_large_copy_up(tmp_path: Path, seed: int) -> None:
    """Kill the daemon while it copies a large file up."""
    big = random.Random(1).randbytes(1 << 20) * 40
    tree.build(tmp_path / "lower", {"big": big})
    assert cowfs("create", tmp_path / "store.bs", "96").returncode == 0
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store.bs", quiet=False) as mount:
        pid = mount.pid()
        code = "import os,sys; print('go', flush=True); os.write(os.open(sys.argv[1], 2), b'X')"
        command = [sys.executable, "-S", "-c", code, str(mount.path / "big")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
            assert child.stdout
            assert child.stdout.readline() == "go\n"
            time.sleep(random.Random(seed).uniform(0, 0.06))  # a random moment of the copy
            os.kill(pid, signal.SIGKILL)
            child.wait(30)
        clear_away(mount)
    eventually(lambda: not in_use(tmp_path / "store.bs"), "the kernel lets go of the image")
    assert run("e2fsck", "-fn", tmp_path / "store.bs", check=False).returncode == 0
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store.bs") as mount:
        assert (mount.path / "big").read_bytes() in {big, b"X" + big[1:]}
        with open(mount.path / "big", "r+b") as file:
            file.write(b"again")
        assert (mount.path / "big").read_bytes() == b"again" + big[5:]


@needs_root
def test_a_dead_mount_is_cleared_away_by_umount(tmp_path: Path) -> None:
    """``cowfs umount`` works on a mount with a dead daemon, and the store can be used at once."""
    tree.build(tmp_path / "lower", {"file": b"x"})
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store", quiet=False) as mount:
        os.kill(mount.pid(), signal.SIGKILL)
        done = run(*COWFS, "umount", mount.path, check=False, env={**os.environ})
        assert done.returncode == 0, done.stderr
        assert not is_mounted(mount.path)
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as mount:
        assert os.listdir(mount.path) == ["file"]
