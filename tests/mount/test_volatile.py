"""``-o volatile=``: what is changed below some directories is in memory, and gone at the unmount."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.support.mounts import cowfs, eventually, is_mounted, mounted
from tests.support.system import as_nobody_prefix, needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True

pytestmark = [needs_fuse, needs_root]

VOLATILE = "volatile=/tmp/:/var/cache:/var/cache/apt"
LOWER = """
mkdir -p tmp/old tmp/full/of var/cache/apt var/lib home
echo low >tmp/f; echo cached >var/cache/apt/list; echo mine >home/mine; echo lib >var/lib/lib
ln -s nowhere tmp/symlink; ln -s tmp link; ln tmp/f home/same
chmod 1777 tmp
"""
WORK = """
echo new >tmp/new; echo more >>tmp/f; mv tmp/old tmp/older; rm -r tmp/full; mkdir tmp/full
touch -hd @1000 tmp/symlink; mv tmp/symlink tmp/another; ln -s elsewhere tmp/symlink; ln tmp/f tmp/g
mkdir -p var/cache/a/b; echo x >var/cache/a/b/c; rm var/cache/apt/list; chmod 700 var/cache/apt
truncate -s 3M tmp/large; mv tmp/older tmp/new var/cache; echo kept >home/kept; rm var/lib/lib
"""
SHOW = """
cat tmp/f tmp/g var/cache/a/b/c var/cache/new; readlink tmp/symlink tmp/another
ls -A tmp tmp/full var var/cache
stat -c %a tmp var/cache/apt; cat home/same home/kept
"""
SHOWN = """low more low more x new elsewhere nowhere
tmp: another f full g large symlink tmp/full: var: cache lib var/cache: a apt new older 1777 700 low kept"""
AROUND = """
import errno, os
def refused(call, *names):
    try:
        call(*names)
    except OSError as error:
        return errno.errorcode[error.errno]
    return None
for one, other in (("tmp/f", "home/f"), ("home/mine", "tmp/mine"), ("home", "tmp/home")):
    assert refused(os.rename, one, other) == "EXDEV", one
assert refused(os.link, "tmp/f", "home/f") == refused(os.link, "home/mine", "var/cache/mine") == "EXDEV"
for name in ("var", "tmp", "var/cache"):
    assert refused(os.rename, name, "home/there") == "EBUSY", name
assert refused(os.rename, "var/lib", "var/cache") == refused(os.rmdir, "tmp") == "EBUSY"
assert refused(os.mkdir, "tmp") == "EEXIST"
top, tmp, above = (os.stat(name) for name in (".", "tmp", "tmp/.."))
assert above.st_ino == top.st_ino and tmp.st_dev == top.st_dev
entries = {entry.name: entry.inode() for entry in os.scandir(".")}
assert entries["tmp"] == tmp.st_ino
room, below = os.statvfs("home"), os.statvfs("tmp")
assert below.f_blocks * below.f_frsize <= 64 << 20 and below.f_blocks != room.f_blocks
with open("tmp/large", "wb", buffering=0) as file:
    file.write(b"1")
    os.fsync(file.fileno())
    assert os.fstat(file.fileno()).st_size == 1
    assert refused(lambda: [file.write(bytes(1 << 20)) for _ in range(64)]) == "ENOSPC"
os.unlink("tmp/large")
"""


def said(at: Path, *command: str, nobody: bool) -> str:
    """Return what a command prints there, run as the owner: root cannot enter another user's mount."""
    there = ["sh", "-c", 'cd "$0" && exec "$@"', str(at), *command]
    return run(*(as_nobody_prefix() if nobody else []), *there).stdout


def script(at: Path, text: str, *, nobody: bool = False) -> str:
    return said(at, "sh", "-ec", text, nobody=nobody)


def prepared(base: Path, *, nobody: bool = False) -> Path:
    script(base, f"mkdir lower mnt; cd lower; {LOWER}", nobody=nobody)
    return base / "lower"


@pytest.mark.parametrize("kind", ["image", "directory"])
def test_what_is_below_goes_with_the_mount(tmp_path: Path, nobody_path: Path, kind: str) -> None:
    nobody = kind == "directory"
    base = nobody_path if nobody else tmp_path
    lower, store, at = prepared(base, nobody=nobody), base / "store", base / "mnt"
    if kind == "image":
        cowfs("create", store, "24", check=True)
    with mounted(lower, at, store, options=[VOLATILE, "size=64M", "blame"], nobody=nobody):
        script(at, WORK, nobody=nobody)
        assert script(at, SHOW, nobody=nobody).split() == SHOWN.split()
        said(at, sys.executable, "-c", AROUND, nobody=nobody)

        for command, *words in (["diff"], ["du"], ["report", "-O", "-"]):
            done = cowfs(command, at, *words, nobody=nobody, check=True)
            assert done.stderr.count("/tmp, /var/cache") == 1 and "volatile" in done.stderr, done
        listed = cowfs("diff", at, "--name-only", nobody=nobody, check=True).stdout.split()
        assert listed == ["home/kept", "var/lib/lib"]
        explained = json.loads(cowfs("explain", at, "tmp/f", "--json", nobody=nobody, check=True).stdout)
        assert explained["volatile"] == "/tmp"
        facts = json.loads(cowfs("info", at, "--json", nobody=nobody, check=True).stdout)
        assert facts["volatile"]["paths"] == ["/tmp", "/var/cache"]
        cowfs("revert", at, "--all", nobody=nobody, check=True)
        assert script(at, "cat var/lib/lib tmp/f; ls home", nobody=nobody).split() == [
            *("lib", "low", "more", "mine", "same")
        ]
        assert "home/kept" in cowfs("blame", at, "home/kept", nobody=nobody, check=True).stdout
        assert "var/cache/a/b/c" not in cowfs("blame", at, "var/cache/a/b/c", nobody=nobody).stdout

    # What the store remembers needs no option.
    assert cowfs("info", store, nobody=nobody, check=True).stdout.count("/var/cache") == 1
    tree = "find . -printf '%P %y %m %s %l\\n' | sort; cat tmp/f"
    with mounted(lower, at, store, nobody=nobody) as mount:
        assert script(at, tree, nobody=nobody) == script(lower, tree)
        script(at, WORK, nobody=nobody)
        os.kill(mount.pid(), signal.SIGKILL)
        cowfs("umount", at, nobody=nobody)
        eventually(lambda: not is_mounted(at), "unmounted")
        with mounted(lower, at, store, options=["volatile=none"], nobody=nobody):
            below = "find tmp var/cache -printf '%p %y %m %s %l\\n' | sort; cat tmp/f"
            assert script(at, below, nobody=nobody) == script(lower, below)
            assert script(at, "cat home/kept; echo >tmp/stays", nobody=nobody) == "kept\n"
            mount.umount()
            left = cowfs("diff", store, nobody=nobody, check=True)
            assert "tmp/stays" in left.stdout and left.stderr.count("volatile") == 0
            cowfs("mount", lower, at, "--store", store, nobody=nobody, check=True)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ("/link", "volatile=/link: Not a directory"),
        ("/nowhere/x", "volatile=/nowhere/x: No such file"),
        ("../x", "not an absolute path"),
        ("/tmp/../etc", "has .. in it"),
        ("/tmp:/", "keep nothing"),
    ],
)
def test_paths_that_cannot_be(tmp_path: Path, given: str, what: str) -> None:
    done = cowfs(
        "mount", prepared(tmp_path), tmp_path / "mnt", "--store", tmp_path / "s", "-o", f"volatile={given}"
    )
    assert done.returncode == 1 and what in done.stderr and len(done.stderr.splitlines()) == 1, done


def test_the_kernel_shows_the_store_as_before(tmp_path: Path) -> None:
    """Earlier changes below the directories stay in the store and are visible, but cannot be reverted."""
    lower, store, at = prepared(tmp_path), tmp_path / "store", tmp_path / "mnt"
    with mounted(lower, at, store):
        script(
            at, "echo before >tmp/before; mv var/lib var/moved; rm var/cache/apt/list; mv tmp/old tmp/renamed"
        )
    with mounted(lower, at, store, options=[VOLATILE]):
        assert (
            script(at, "cat tmp/before; ls var/cache/apt tmp/renamed")
            == "before\ntmp/renamed:\n\nvar/cache/apt:\n"
        )
        script(
            at, "echo after >tmp/before; mv tmp/renamed tmp/again; rmdir tmp/full/of tmp/full; echo >home/one"
        )
        done = cowfs("revert", at, "tmp/before", "home/one", "-n")
        assert (done.returncode, "volatile" in done.stderr) == (32, True), done
        done = cowfs("revert", at, "tmp/before", "home/one")
        assert "volatile" in done.stderr + done.stdout, done
        assert script(at, "cat tmp/before; ls home") == "after\nmine\nsame\n"
        cowfs("vacuum", at, check=True)
    layers = f"lowerdir={lower},upperdir={store}/upper,workdir={store}/work"
    run("mount", "-t", "overlay", "-o", f"{layers},redirect_dir=on", "o", at)
    try:
        assert script(at, "cat tmp/before; ls tmp var var/cache/apt") == (
            "before\ntmp:\nbefore\nf\nfull\nrenamed\nsymlink\n\nvar:\ncache\nmoved\n\nvar/cache/apt:\n"
        )
    finally:
        run("umount", at)
    cowfs("revert", store, "tmp/before", check=True)
    assert "tmp/before" not in cowfs("diff", store, "--name-only", check=True).stdout
    cowfs("checkpoint", store, "now", check=True)
    with mounted(lower, at, store):
        script(at, "echo twice >tmp/f; echo x >home/later; mv tmp/renamed var/cache/again")
        assert script(at, "cat tmp/f; ls home var/cache") == (
            "twice\nhome:\nlater\nmine\nsame\n\nvar/cache:\nagain\napt\n"
        )
        for command in ("checkpoint", "rollback"):
            done = cowfs(command, at, "more" if command == "checkpoint" else "now")
            assert done.returncode and "volatile" in done.stderr, done
    cowfs("rollback", store, "now", check=True)
