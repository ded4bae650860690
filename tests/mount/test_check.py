"""cowfs check, through the command line."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from cowfs.linux import safe_paths
from cowfs.store.offline.check import Listener, check_store
from cowfs.store.served.open import open_store
from tests.mount.test_store_cli import refused
from tests.support.mounts import cowfs, eventually, mounted, project_root
from tests.support.programs import replaced
from tests.support.system import needs_root, run

DEV_FUSE_AT_NIGHT = True


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "sysrcd.bs"
    cowfs("create", path, "32", check=True)
    return path


def test_check_of_a_good_store(store: Path) -> None:
    before = store.read_bytes()
    done = cowfs("check", "-n", store)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"{store}: clean\n")
    assert re.search(r"^\d+ of 8192 inodes, \d+ of 8192 blocks in use$", done.stdout, re.MULTILINE)
    assert store.read_bytes() == before
    done = cowfs("check", store)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 2)


def test_check_repairs_what_is_safe_and_says_so(store: Path) -> None:
    run("debugfs", "-w", "-R", "set_super_value free_blocks_count 5", store)
    run("debugfs", "-w", "-R", "sif upper links_count 9", store)
    assert cowfs("check", "-n", store).returncode == 4
    done = cowfs("check", store)
    assert done.returncode == 1, done.stdout
    assert done.stdout.endswith(f"{store}: repaired\n")
    assert "cowfs: " not in done.stdout, "the label, which e2fsck puts first, looks like a complaint of ours"
    assert "Inode 12 ref count is 9, should be 2.  FIXED.\n" in done.stdout
    assert cowfs("check", store).returncode == 0


def test_check_of_what_cannot_be_repaired(store: Path) -> None:
    run("debugfs", "-w", "-R", "clri <2>", store)
    done = cowfs("check", store)
    assert done.returncode & 4
    assert "cowfs: " not in done.stdout
    assert "not checked (copy the file, then run on the copy: e2fsck -f FILE)\n" in done.stdout
    assert "fsck MANUALLY" not in done.stdout and "\\t" not in done.stdout
    assert "(cowfs check without -n repairs what is safe" in cowfs("check", "-n", store).stdout
    assert "ERRORS REMAIN" in done.stdout


def test_check_repairs_all_if_asked(store: Path) -> None:
    """As e2fsck -y; fsck.cowfs passes it on, except with -n."""
    run("debugfs", "-w", "-R", f"write {__file__} victim", store)
    run("debugfs", "-w", "-R", "sif victim block[0] 99999999", store)
    before = store.read_bytes()
    command = (Path(project_root()) / "mount-helpers/fsck.cowfs", "-a", "-C", "0")
    assert run(*command, store, check=False).returncode & 4
    assert run(*command, "-y", "-n", store, check=False).returncode & 4
    assert cowfs("check", "-n", "-y", store).returncode == 16
    done = run(*command, "-y", store, check=False)
    assert done.returncode == 1, done.stdout
    assert run("e2fsck", "-fn", store, check=False).returncode == 0
    assert store.read_bytes() != before


def test_check_tells_how_far_it_is(store: Path, tmp_path: Path) -> None:
    """In percent of each pass of e2fsck, and then in names: the command shows both on a terminal."""
    (tmp_path / "lower").mkdir()
    with mounted(tmp_path / "lower", tmp_path / "mnt", store) as here:
        for name in "abc":
            (here.path / name).touch()
    shown: list[str] = []
    names: list[None] = []
    shares: list[float] = []

    def show(text: str, share: float) -> None:
        shown.append(text)
        shares.append(share)

    check_store(str(store), listener=Listener(show=show, tick=lambda: names.append(None)))
    assert shares == sorted(shares) and shares[-1] == 1
    assert {f"e2fsck: pass {number} of 5, 100 %" for number in (1, 2, 3, 5)} <= set(shown)
    assert len(names) == 3


def test_check_of_nothing_is_not_a_clean_store(tmp_path: Path) -> None:
    refused(cowfs("check", tmp_path / "s"), "no such store", 8)
    (tmp_path / "s").write_text("text")
    refused(cowfs("check", tmp_path / "s"), "text file", 8)
    assert cowfs("check").returncode == 16, "1 would mean that errors were corrected"


def test_check_does_not_call_clean_what_it_cannot_judge(store: Path) -> None:
    run("debugfs", "-w", "-R", "mkdir .wh..wh.aufs", store)
    done = cowfs("check", "-n", store)
    assert (done.returncode, done.stderr) == (4, "")
    assert "a store of overlayfs, and aufs has written to it, too (.wh..wh.aufs)" in done.stdout
    assert not done.stdout.endswith(": clean\n")


def test_check_that_failed_is_no_repair(store: Path, tmp_path: Path) -> None:
    with replaced(tmp_path / "bin", e2fsck="echo no memory; exit 8"):
        done = cowfs("check", store)
    assert done.returncode == 8
    assert done.stdout.splitlines()[-1] == f"{store}: NOT CHECKED"


def test_check_says_in_its_help_that_codes_add_up() -> None:
    assert "add" in cowfs("check", "--help", check=True).stdout.split("Exit codes")[1]


def break_rules(upper: Path) -> list[str]:
    """Write what no overlay writes; return the lines that must be said of it."""
    prefix = "trusted.overlay." if os.geteuid() == 0 else "user.overlay."
    for name in ("opaque", "merged", "away", "up", "dots", "fine"):
        (upper / name).mkdir()
    os.mknod(upper / "opaque/hidden", stat.S_IFCHR)
    os.mknod(upper / "merged/hidden", stat.S_IFCHR)
    os.setxattr(upper / "opaque", prefix + "opaque", b"y")
    for name, value in (("away", b"a/b"), ("up", b"/a/../b"), ("dots", b"..")):
        os.setxattr(upper / name, prefix + "redirect", value)
    os.setxattr(upper / "fine", prefix + "redirect", b"/some/where")
    for name in ("meta", "moved\nmeta", "opaque/lost\nmeta", "opaque/led"):
        (upper / name).touch()
        os.setxattr(upper / name, prefix + "metacopy", b"")
    os.setxattr(upper / "meta", prefix + "origin", b"\0\xfb\x1d\0\1")
    os.setxattr(upper / "opaque/led", prefix + "redirect", b"/there")
    return [
        "away: redirects to a/b, not a valid path in a lower",
        "dots: redirects to .., not a valid path in a lower",
        "opaque/hidden: a whiteout inside an opaque directory",
        r"opaque/lost\nmeta: marked as having its data in a lower (metacopy), but its directory is opaque",
        "up: redirects to /a/../b, not a valid path in a lower",
    ]


@needs_root
def test_check_names_every_broken_rule_in_an_image(store: Path, tmp_path: Path) -> None:
    at = tmp_path / "at"
    at.mkdir()
    run("mount", "-o", "loop", store, at)
    expected = break_rules(at / "upper")
    run("umount", at)
    eventually(lambda: not safe_paths.loop_users(store), "the loop device is detached")
    store.chmod(0o644)
    done = cowfs("check", "-n", store)
    assert done.returncode == 4
    assert (
        sorted(line for line in done.stdout.splitlines() if "lower" in line or "opaque" in line) == expected
    )


@needs_root
@pytest.mark.parametrize("engine", ["kernel", "process"])
def test_check_reads_long_attributes(store: Path, tmp_path: Path, engine: str) -> None:
    """Beside the inode and in it, and longer than what e2fsprogs' listing shows of a value."""
    good, bad = b"/" + b"/".join([b"d" * 200] * 15), b"/" + b"e" * 250 + b"/../" + b"f" * 250
    opened = open_store(str(store), engine=engine)
    for name, redirect in ((b"fine", good), (b"fair", b"/" + b"x" * 100), (b"away", bad)):
        key = opened.layer.mkdir(opened.upper, name, 0o755, 0, 0)
        opened.layer.setxattr(key, b"trusted.overlay.redirect", redirect)
    opened.close()
    done = cowfs("check", "-n", store)
    assert [line for line in done.stdout.splitlines() if "redirects" in line] == [
        f"away: redirects to {bad.decode()}, not a valid path in a lower"
    ]
    assert done.returncode == 4


@pytest.mark.parametrize("name", ["header.json", "lock"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "directory"])
def test_nobody_waits_for_what_is_no_file(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    store, lower, at = tmp_path / "store", tmp_path / "lower", tmp_path / "at"
    lower.mkdir()
    at.mkdir()
    open_store(str(store)).close()
    (store / "cowfs" / name).unlink()
    make(store / "cowfs" / name)
    said = f"cowfs/{name} is not a regular file"
    refused(cowfs("diff", store, "--lower", lower, timeout=20), said)
    refused(cowfs("mount", lower, at, "--store", store, timeout=20), said)
    done = cowfs("check", "-n", store, timeout=20)
    assert said in done.stdout + done.stderr
    assert done.returncode & 12
    done = cowfs("info", store, timeout=20)
    assert name == "lock" or said in done.stderr


def test_check_names_every_broken_rule_in_a_directory(tmp_path: Path) -> None:
    open_store(str(tmp_path / "s")).close()
    expected = break_rules(tmp_path / "s/upper")
    done = cowfs("check", tmp_path / "s")
    assert done.returncode == 4
    assert sorted(done.stdout.splitlines()[:-1]) == expected


@pytest.mark.parametrize(
    ("requests", "said"),
    [
        (["rm cowfs/header.json"], "has no header"),
        (["rm cowfs/header.json", "write {bad} cowfs/header.json"], "header is damaged"),
        (["rm cowfs/header.json", "write {newer} cowfs/header.json"], "format version 7"),
        (["rmdir upper"], "upper/ is missing"),
        (["mkdir .wh..wh.orph"], "aufs has written to it, too (.wh..wh.orph)"),
    ],
)
def test_check_and_info_look_at_the_layout(
    store: Path, tmp_path: Path, requests: list[str], said: str
) -> None:
    (tmp_path / "bad").write_text("{")
    (tmp_path / "newer").write_text('{"version": 7}')
    for request in requests:
        run("debugfs", "-w", "-R", request.format(bad=tmp_path / "bad", newer=tmp_path / "newer"), store)
    done = cowfs("check", "-n", store)
    assert said in done.stdout
    assert done.returncode == (0 if "has no header" in said else 4)
    info = cowfs("info", store)
    if "header is" in said or "version" in said:
        refused(info, said)
    else:
        assert info.returncode == 0
