"""What takes long shows on a terminal how fast it is, and the time left."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.mounts import COWFS, cowfs, make_store, mounted, project_root
from tests.support.system import needs_fuse

pytestmark = needs_fuse

FILES = 400
TRANSPORT = "dev_fuse"


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stores there have many files."""
    top = tmp_path_factory.mktemp("progress")
    (top / "lower").mkdir()
    cowfs("create", top / "image", "32M", check=True)
    with mounted(top / "lower", top / "mnt", top / "image") as here:
        for number in range(FILES):
            (here.path / f"{number:0200}").write_text("x" * 3000)
    with mounted(top / "lower", top / "mnt", top / "directory"):
        pass
    cowfs("apply", top / "image", top / "directory", check=True)
    cowfs("backup", top / "directory", top / "other", check=True)
    return top


AT_ONCE = "from cowfs.cli import main, output; output._PAUSE = -1; raise SystemExit(main.main())"
"""A cowfs that shows each step."""


def _shown(*arguments: str | Path, program: Sequence[str] = COWFS[1:]) -> bytes:
    """Return what is on the terminal of a command whose output nobody reads for a second."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, *program, *arguments],
        stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "PYTHONPATH": project_root()},
    ) as process:  # fmt: skip
        os.close(theirs)
        assert process.stdout is not None
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
        assert select.select([process.stdout], [], [], 60)[0]
        begun, shown, from_both = time.monotonic(), b"", [ours]
        while from_both:
            ready, _, _ = select.select(from_both, [], [], 0.1)
            if from_both == [ours] and not ready and time.monotonic() > begun + 1:
                from_both = [ours, process.stdout.fileno()]
            for fd in ready:
                try:
                    data = os.read(fd, 65536)
                except OSError:  # EIO: the other side of the terminal is closed
                    data = b""
                shown += data if fd == ours else b""
                if not data and fd in from_both:
                    from_both.remove(fd)
    os.close(ours)
    assert process.returncode == 0, shown
    return shown


@pytest.mark.parametrize(
    ("command", "store"),
    (
        *(("export", "image"), ("changes", "image")),
        *(("diff", "directory"), ("du", "image"), ("revert", "other")),
    ),
)
def test_the_time_left(top: Path, command: str, store: str) -> None:
    options, what = {
        "export": (("-", "--merged", "--to", "tar"), rb"paths"),
        "changes": (("-", "--to", "tar"), rb"paths"),
        "diff": ((), rb"changes"),
        "du": (("--json",), rb"files"),
        "revert": (("--all", "--json"), rb"reverted"),
    }[command]
    command = command.replace("changes", "export")
    shown = _shown(command, top / store, *options)
    assert re.search(rb"[0-9]+ %s, [0-9]+/s(, [0-9]+ MiB, [0-9]+ MiB/s)?, [0-9]+ s left" % what, shown), shown
    if command == "diff":
        assert _shown("-q", command, top / store, *options) == b"%d added\r\n" % FILES


def test_what_apply_has_done(top: Path, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    store, root, old, program = top / "image", tmp_path / "root", tmp_path / "old", ("-c", AT_ONCE)
    shown = _shown("apply", store, root, "--backup", old, program=program)
    assert re.search(rb"\x1b\[K4[0-9][0-9] paths, [0-9]+/s, 1 MiB", shown), shown
    assert re.search(
        rb"\x1b\[K4[0-9][0-9] paths", _shown("apply", "--undo", "--backup", old, root, program=program)
    )
    assert os.listdir(root) == []


@pytest.mark.parametrize("kind", ["image", "directory"])
def test_what_of_a_checkpoint_is_merged_or_removed(tmp_path: Path, kind: str) -> None:
    store, program = make_store(tmp_path, kind), ("-c", AT_ONCE)
    (tmp_path / "lower").mkdir()
    with mounted(tmp_path / "lower", tmp_path / "mnt", store) as here:
        cowfs("checkpoint", here.path, "empty", check=True)
        for number in range(70):
            (here.path / f"{number}").touch()
    cowfs("checkpoint", store, "full", check=True)
    cowfs("checkpoint", store, "same", check=True)
    shown = _shown("checkpoint", "--delete", store, "full", program=program)
    assert re.search(rb"\x1b\[K[1-9][0-9]{1,2} names, [0-9]+/s", shown), shown
    cowfs("checkpoint", store, "--delete", "same", check=True)
    shown = _shown("rollback", store, "empty", program=program)
    assert re.search(rb"\x1b\[K[7-9][0-9] names, [0-9]+/s", shown), shown
    assert cowfs("diff", store, check=True).stdout == ""


def test_what_the_programs_of_e2fsprogs_have_done(top: Path, tmp_path: Path) -> None:
    """They tell how far they are; the store is what it is without a terminal."""
    store, program = tmp_path / "image", ("-c", AT_ONCE)
    shown = _shown("create", store, "32M", program=program)
    assert re.search(rb"\x1b\[Kmke2fs: [0-9]+ %\r\x1b\[K$", shown), shown
    cowfs("backup", top / "image", store, "--force", check=True)
    cowfs("grow", store, "300M", check=True)  # resize2fs tells nothing of a single block group
    shown = _shown("check", store, program=program)
    steps = rb".*".join(rb"\x1b\[Ke2fsck: pass %d of 5, 100 %%" % number for number in (1, 2, 3, 5))
    assert re.search(steps + rb".*\x1b\[K4[0-9][0-9] names", shown, re.DOTALL), shown
    assert re.search(steps + rb"\r\x1b\[K$", _shown("trim", store, program=program), re.DOTALL)
    shown = _shown("shrink", store, "16M", program=program)
    moved = rb".*\x1b\[Kresize2fs: pass [0-9], 100 %\r\x1b\[K$"
    assert re.search(rb"\x1b\[K[0-9]+ MiB.*" + steps + moved, shown, re.DOTALL), shown
    assert store.stat().st_size == 16 << 20
    assert cowfs("check", "-n", store).returncode == 0
    assert _shown("-q", "check", store, program=program) == b""
