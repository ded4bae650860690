"""FIFOs and other special files where a regular file is expected: cowfs does not wait for them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounts import COWFS, cowfs, force_umount, is_mounted, mounted, project_root
from tests.support.system import NOBODY, needs_fuse, needs_root, run

pytestmark = needs_fuse


@pytest.fixture
def base(nobody_path: Path) -> Iterator[Path]:
    (nobody_path / "lower").mkdir()
    (nobody_path / "lower" / "file").write_text("x\n")
    (nobody_path / "mnt").mkdir()
    os.mkfifo(nobody_path / "fifo")
    yield nobody_path


def test_a_log_that_nobody_reads(base: Path) -> None:
    done = cowfs("mount", base / "lower", base / "mnt", "-o", f"log={base}/fifo", timeout=20)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done
    assert f"{base}/fifo" in done.stderr and not is_mounted(base / "mnt")


@needs_root
@pytest.mark.parametrize("how", ["a link", "a link that leads nowhere", "a link on the way", "a second name"])
def test_a_log_that_a_user_leads_elsewhere(base: Path, how: str) -> None:
    """The log is in a directory for all; fs.protected_symlinks and protected_hardlinks do not matter."""
    elsewhere, shared = base / "elsewhere", base / "shared"
    elsewhere.mkdir()
    shared.mkdir()
    os.chown(shared, 0, 0)
    shared.chmod(0o1777)
    target, log = elsewhere / "log", shared / "log"
    if how != "a link that leads nowhere":
        target.write_text("as it was\n")
    if how == "a second name":
        os.link(target, log)
    elif how == "a link on the way":
        (shared / "way").symlink_to(elsewhere)
        os.chown(shared / "way", NOBODY, NOBODY, follow_symlinks=False)
        log = shared / "way/log"
    else:
        log.symlink_to(target)
        os.chown(log, NOBODY, NOBODY, follow_symlinks=False)
    done = cowfs("mount", base / "lower", base / "mnt", "-o", f"log={log}", timeout=20)
    if is_mounted(base / "mnt"):
        force_umount(base / "mnt")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and str(log) in done.stderr, done
    assert not target.exists() if how == "a link that leads nowhere" else target.read_text() == "as it was\n"


@needs_root
def test_a_log_behind_roots_own_link(base: Path) -> None:
    (base / "log").symlink_to(base / "real")
    with mounted(base / "lower", base / "mnt2", log=base / "log"):
        pass
    assert (base / "real").exists()


def test_a_log_whose_reader_stops_reading(base: Path) -> None:
    """Log lines are lost then, and the mount continues."""
    reader = os.open(base / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with mounted(base / "lower", base / "mnt2", log=base / "fifo", quiet=False) as here:
            full = os.open(base / "fifo", os.O_WRONLY | os.O_NONBLOCK)
            try:
                while True:
                    os.write(full, b"x" * 4096)
            except BlockingIOError:
                pass
            finally:
                os.close(full)
            env = {**os.environ, "PYTHONPATH": project_root()}
            done = run(*COWFS, "grow", here.path, "16", timeout=20, check=False, env=env)  # it logs a refusal
            assert done.returncode == 32
            assert (here.path / "file").read_text() == "x\n"
            here.umount()
    finally:
        os.close(reader)


@needs_root
@pytest.mark.parametrize(
    "edits",
    [["sif / mode 0100777"], ["unlink /cowfs", "link /upper /cowfs"], ["sif /work mode 0100777"]],
    ids=["the root is a file", "a directory has two names", "work is a file"],
)
def test_what_a_store_is_made_of(base: Path, edits: list[str]) -> None:
    """A mount is refused in one line, as damage of the store, and no fault of ours."""
    image = base / "image"
    cowfs("create", image, "16", check=True)
    with mounted(base / "lower", base / "mnt2", image) as here:
        (here.path / "new").write_text("x")
    for edit in edits:
        run("debugfs", "-w", "-R", edit, image)
    done = cowfs("mount", base / "lower", base / "mnt", "--store", image)
    assert done.returncode == 32 and done.stderr.count("\n") == 1, done
    assert str(image) in done.stderr and "(" in done.stderr, done
    assert not is_mounted(base / "mnt")
