"""What a daemon reports about itself: --debug, SIGUSR1, and unexpected failures."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mounts import cowfs, eventually, is_mounted, mounted, project_root
from tests.support.system import needs_fuse, run

DEV_FUSE_AT_NIGHT = True

pytestmark = needs_fuse


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    (tmp_path / "lower/etc").mkdir(parents=True)
    (tmp_path / "lower/etc/fstab").write_text("first\n")
    (tmp_path / "lower/etc/gone").write_text("x")
    image = tmp_path / "root.sqsh"
    run("mksquashfs", tmp_path / "lower", image, "-quiet", "-no-progress")
    return image


def work(top: Path) -> None:
    with (top / "etc/fstab").open("a") as file:
        file.write("more\n")
    (top / "etc/gone").unlink(missing_ok=True)
    assert not (top / "nothing").exists()


def log_of(lower: Path, tmp_path: Path, *options: str) -> str:
    log = tmp_path / "log"
    log.unlink(missing_ok=True)
    with mounted(lower, tmp_path / "mnt", tmp_path / "store", options=options, log=log, quiet=False) as here:
        work(here.path)
    return log.read_text()


def test_each_topic_tells_its_part(lower: Path, tmp_path: Path) -> None:
    told = log_of(lower, tmp_path, "debug=requests")
    assert "requests: lookup / name=nothing by pid" in told and ": no such name (" in told
    assert "requests: unlink /etc name=gone" in told and ": done (" in told
    assert "debug.store" not in told and "debug.overlay" not in told and "debug.cache" not in told

    told = log_of(lower, tmp_path, "debug=overlay:store:cache")
    assert f"overlay: lookup /etc: store + lower 0 ({lower})" in told
    assert "overlay: lookup /nothing: " in told
    assert f"cache: {lower}: reads a metadata block, " in told
    assert "store: mknod " not in told  # that was in the first mount
    assert "debug.requests" not in told

    (tmp_path / "other").mkdir()
    told = log_of(lower, tmp_path / "other", "debug=store")
    assert "store: create " in told and "store: mknod " in told
    assert "debug" not in log_of(lower, tmp_path)


def test_a_copy_in_one_step_is_told_too(lower: Path, tmp_path: Path) -> None:
    cowfs("create", tmp_path / "store", "16", check=True)
    told = log_of(lower, tmp_path, "debug=store")
    assert re.search(r"store: copy_in \d+ fstab ", told) and "store: mknod " in told


def test_a_topic_that_is_none(lower: Path, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    for words in (["--debug", "requests,nonsense"], ["-o", "debug=nonsense"]):
        done = cowfs("mount", lower, tmp_path / "mnt", *words)
        assert done.returncode == 1
        assert done.stderr.startswith("cowfs: unknown debug topic 'nonsense'") and "overlay" in done.stderr
    assert not is_mounted(tmp_path / "mnt")


def test_sigusr1_tells_what_it_is_doing(lower: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with mounted(lower, tmp_path / "mnt", tmp_path / "store", log=log, quiet=False) as here:
        os.kill(here.pid(), signal.SIGUSR1)
        eventually(lambda: "_serve_control" in log.read_text(), "the log lists the tasks")
        told = log.read_text()
        assert "thread 0x" in told and "daemon.py" in told
        work(here.path)


def test_sigusr1_ends_no_mount(lower: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with mounted(lower, tmp_path / "mnt", tmp_path / "store", log=log, quiet=False) as here:
        pid = here.pid()
        for number in range(300):
            os.kill(pid, signal.SIGUSR1)
            (here.path / f"new-{number % 20}").write_bytes(b"x" * 10_000)
        assert here.pid() == pid
    assert "Fatal" not in log.read_text()


BROKEN = """
import sys
from cowfs.overlay.overlay import Overlay
def broken(self, node):
    raise ZeroDivisionError("a bug")
Overlay.readlink = broken
from cowfs.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def broken(*args: object) -> list[str]:
    return [sys.executable, "-c", BROKEN, *map(str, args)]


def test_a_failure_that_nobody_expected(lower: Path, tmp_path: Path) -> None:
    mnt, log = tmp_path / "mnt", tmp_path / "log"
    mnt.mkdir()
    run(*broken("mount", lower, mnt, "-o", f"log={log}"), env={**os.environ, "PYTHONPATH": project_root()})
    try:
        (mnt / "link").symlink_to("target")
        facts = json.loads(cowfs("info", mnt, "--json").stdout)
        assert facts["log"] == {
            "place": str(log), "failures": 0, "last_failure": None, "last_failure_at": None
        }  # fmt: skip
        with pytest.raises(OSError, match="Input/output error"):
            os.readlink(mnt / "link")
        assert "ZeroDivisionError: a bug" in log.read_text() and "Traceback" in log.read_text()
        said = cowfs("info", mnt).stdout
        assert "FAILED:" in said and "readlink" in said and str(log) in said
    finally:
        assert cowfs("umount", mnt).returncode == 0


def test_the_foreground_shows_failures(lower: Path, tmp_path: Path) -> None:
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    with subprocess.Popen(
        broken("mount", "-f", lower, mnt), stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": project_root()},
    ) as daemon:  # fmt: skip
        eventually(lambda: is_mounted(mnt), "it is mounted")
        (mnt / "link").symlink_to("target")
        with pytest.raises(OSError, match="Input/output error"):
            os.readlink(mnt / "link")
        assert cowfs("umount", mnt).returncode == 0
        _, said = daemon.communicate(timeout=30)
    assert "Traceback" in said and "ZeroDivisionError: a bug" in said
