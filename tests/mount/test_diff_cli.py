"""`cowfs diff` as it is typed: of a mount, of a store, as JSON, and when something is wrong."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mounts import COWFS, cowfs, mounted, project_root
from tests.support.system import as_nobody_prefix, needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True

pytestmark = needs_fuse

MAKE = r"""
mkdir -p lower/etc lower/usr/lib && cd lower
echo /dev/sda1 >etc/fstab; echo localhost >etc/hosts; echo tool >usr/tool; echo so >usr/lib/so
echo '#!/bin/sh' >script; echo x >untouched; touch -d 2020-01-01 etc/* usr/* script untouched
"""
WORK = r"""
echo more >>etc/fstab; rm etc/hosts; mkdir etc/new; touch etc/new/file "$(printf '\377')"
mv usr bin; rm bin/tool; chmod 755 script; : >>untouched
"""
LINES = [
    "R  usr/ -> bin/",
    "D  bin/tool",
    "M  etc/fstab  (content, times)",
    "D  etc/hosts",
    "A  etc/new/",
    "A  etc/new/file",
    "M  script  (mode)",
    "A  \\377",
]
SUMMARY = "3 added, 2 modified, 2 deleted, 1 renamed\n"


def script(text: str, directory: Path, nobody: bool = False) -> None:
    # A mount of nobody's lets nobody in, not even root, so the shell itself must go there.
    run(*(as_nobody_prefix() if nobody else []), "sh", "-euc", f'cd "$1"\n{text}', "sh", directory)


def told(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert (done.returncode, done.stdout) == (code, ""), done
    assert done.stderr.startswith("cowfs: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A directory store with changes, unmounted."""
    script(MAKE, tmp_path)
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        script(WORK, here.path)
    return tmp_path / "store"


@pytest.mark.parametrize("nobody", [False, True])
def test_a_mount_and_its_store_tell_the_same(nobody_path: Path, nobody: bool) -> None:
    script(MAKE, nobody_path, nobody)
    store = nobody_path / "store"
    with mounted(nobody_path / "lower", nobody_path / "mnt", store, nobody=nobody) as here:
        fresh = cowfs("diff", here.path, nobody=nobody)
        assert (told(fresh), fresh.stderr) == ([], "no changes\n")
        script(WORK, here.path, nobody)
        live = cowfs("diff", here.path, nobody=nobody)
        assert (told(live), live.stderr) == (LINES, SUMMARY)
        refused(cowfs("diff", store, nobody=nobody), 32, str(store))  # it is in use
        refused(cowfs("diff", here.path, "--lower", nobody_path / "lower", nobody=nobody), 1, "--lower")
    later = cowfs("diff", store, nobody=nobody)
    assert (told(later), later.stderr) == (LINES, SUMMARY)


@needs_root
def test_an_image_store(tmp_path: Path) -> None:
    script(MAKE, tmp_path)
    image = tmp_path / "sysrcd.bs"
    assert cowfs("create", image, "16").returncode == 0
    with mounted(tmp_path / "lower", tmp_path / "mnt", image) as here:
        script(WORK, here.path)
    before = image.read_bytes()
    assert told(cowfs("diff", image)) == LINES
    assert image.read_bytes() == before  # reading is all that it does


def test_json(changed: Path) -> None:
    done = cowfs("diff", changed, "--json")
    entries = [json.loads(line) for line in told(done)]
    assert [entry["kind"] for entry in entries] == [line[0] for line in LINES]
    renamed = {"kind": "R", "path": "bin", "type": "directory", "what": [], "source": "usr"}
    assert entries[0] == {"version": 1} | renamed
    assert entries[2]["what"] == ["content", "times"]
    assert entries[-1]["path_b64"] == "/w=="
    assert done.stderr == ""


def test_exit_code(changed: Path, tmp_path: Path) -> None:
    assert cowfs("diff", changed, "--exit-code").returncode == 1
    assert cowfs("diff", changed, "--exit-code", "--json").returncode == 1
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "unchanged"):
        pass
    assert cowfs("diff", tmp_path / "unchanged", "--exit-code").returncode == 0
    shutil.rmtree(tmp_path / "lower")
    refused(cowfs("diff", changed, "--exit-code"), 2)


def test_the_lower_must_be_the_one_it_was_made_on(changed: Path, tmp_path: Path) -> None:
    lower, moved, other = tmp_path / "lower", tmp_path / "moved", tmp_path / "other"
    lower.rename(moved)
    refused(cowfs("diff", changed), 1, str(lower), "--lower")
    assert told(cowfs("diff", changed, "--lower", moved)) == LINES
    shutil.copytree(moved, other)
    refused(cowfs("diff", changed, "--lower", other), 32, str(lower), str(other), "--force-lower")
    assert told(cowfs("diff", changed, "--lower", other, "--force-lower")) == LINES
    other.rename(lower)
    refused(cowfs("diff", changed), 1, "is now a different one", "--lower")
    refused(cowfs("diff", changed, "--lower", tmp_path / "missing"), 32, "missing")
    refused(cowfs("diff", changed, "--lower", ""), 1, "--lower")


def test_a_store_that_never_had_a_lower(tmp_path: Path) -> None:
    script(MAKE, tmp_path)
    for name in ("upper", "work"):
        (tmp_path / "store" / name).mkdir(parents=True)
    (tmp_path / "store/upper/new").touch()
    refused(cowfs("diff", tmp_path / "store"), 1, "--lower")
    assert "A  new" in told(cowfs("diff", tmp_path / "store", "--lower", tmp_path / "lower"))


def test_what_is_neither_a_store_nor_a_mount(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for name in ("text", "empty", "full", "missing", "missing.bs"):
        refused(cowfs("diff", tmp_path / name), 32, name)
    refused(cowfs("diff", "memory"), 1, "mountpoint")
    assert sorted(os.listdir(tmp_path)) == ["empty", "full", "text"]
    assert os.listdir(tmp_path / "empty") == []


def test_several_lowers(tmp_path: Path) -> None:
    script(MAKE, tmp_path)
    top = tmp_path / "top:most"
    (top / "etc").mkdir(parents=True)
    (top / "etc/fstab").write_text("of the top\n")
    escaped = str(top).replace(":", "\\:")
    store = tmp_path / "store"
    with mounted([escaped, tmp_path / "lower"], tmp_path / "mnt", store) as here:
        script("echo x >>etc/fstab; rm etc/hosts", here.path)
    expected = ["M  etc/fstab  (content, times)", "D  etc/hosts"]
    assert told(cowfs("diff", store)) == expected
    assert told(cowfs("diff", store, "--lower", f"{escaped}:{tmp_path / 'lower'}")) == expected
    refused(cowfs("diff", store, "--lower", f"{tmp_path / 'lower'}:{escaped}"), 32)


def test_hard_links_change_together(tmp_path: Path) -> None:
    script(MAKE, tmp_path)
    script("ln lower/script lower/etc/link; ln lower/script lower/usr/lib/link", tmp_path)
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        script("chmod 700 script", here.path)
        expected = ["M  etc/link  (mode)", "M  script  (mode)", "M  usr/lib/link  (mode)"]
        assert told(cowfs("diff", here.path)) == expected
    assert told(cowfs("diff", tmp_path / "store")) == expected


def test_a_reader_that_leaves_is_no_error(changed: Path) -> None:
    many = changed / "upper/many"
    many.mkdir()
    for number in range(5000):
        (many / f"file-{number:04d}-{'x' * 80}").touch()
    command = [*COWFS, "diff", str(changed)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": project_root()},
    ) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_colour_is_for_terminals_alone(changed: Path) -> None:
    def on_a_terminal(**more: str) -> bytes:
        ours, theirs = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": project_root(), "TERM": "xterm", **more}
        environment.pop("NO_COLOR", None) if "NO_COLOR" not in more else None
        command = [sys.executable, *COWFS[1:], "diff", str(changed)]
        with subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL, env=environment) as process:
            os.close(theirs)
            shown = b""
            while True:
                try:
                    chunk = os.read(ours, 65536)
                except OSError:  # EIO: the other side is closed
                    break
                shown += chunk
        os.close(ours)
        assert process.returncode == 0
        return shown

    assert b"\033[31mD  etc/hosts\033[0m\r\n" in on_a_terminal()
    assert b"\033" not in on_a_terminal(NO_COLOR="1")
    assert b"\033" not in on_a_terminal(TERM="dumb")


def test_help_shows_examples() -> None:
    shown = cowfs("diff", "--help")
    assert shown.returncode == 0
    assert "examples:" in shown.stdout and "--lower" in shown.stdout


@needs_root
def test_what_a_user_cannot_read(nobody_path: Path) -> None:
    """Whoever wrote it anew has not read what was there."""
    lower, at = nobody_path / "lower", nobody_path / "m"
    lower.mkdir()
    for name, content in (("empty", ""), ("secret", "secret\n"), ("left", "left\n")):
        (lower / name).write_text(content)
        (lower / name).chmod(0o600)
    with mounted(lower, at, nobody_path / "store", options=["fakeroot"], nobody=True):
        script("touch empty; echo public >secret", at, nobody=True)
        lines = told(cowfs("diff", at, nobody=True))
    assert lines == ["M  empty  (times)", "M  secret  (content, times)"]
    assert told(cowfs("diff", nobody_path / "store", nobody=True)) == lines
