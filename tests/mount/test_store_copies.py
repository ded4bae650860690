"""Stores that are directories, copied by the tools that people have: right afterwards, or refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs.errors import StoreError
from cowfs.linux import pids
from cowfs.store.offline.create import create_store
from cowfs.store.served.open import open_store
from tests.support.mounts import cowfs, force_umount, mounted
from tests.support.system import NOBODY, as_nobody_prefix, needs_root, run

DEV_FUSE_AT_NIGHT = True

pytestmark = needs_root

# rsync does not set a symbolic link's time in the second it was made in: it compares seconds. Hence touch -h.
CHANGES = """
cd "$1"
rm gone
rm -r anew; mkdir anew; echo new > anew/new
echo more >> one
ln new.txt other.txt 2>/dev/null; echo text > new.txt; ln new.txt other.txt
ln -s new.txt link; touch -h -d 2020-01-01 link
mv away moved
chmod 600 mode
mkdir empty
"""

SHOW = r"""
cd mnt
find . ! -type d -printf '%p %y %m %U %G %n %s %T@ %l\n' -o -printf '%p %m %U %G\n' | sort
cat one two new.txt anew/new
"""

PACK = "tar -C store {0} -c . | tar -C copy {0} -x"
EVERYTHING = "-p --acls --xattrs --xattrs-include='*'"

RIGHT = {
    "cp -a": "cp -a store/. copy",
    "mv": "cp -a store moved && rmdir copy && mv moved copy",
    "tar": PACK.format(EVERYTHING),
}
ROOTS_RIGHT = {**RIGHT, "rsync": "rsync -aHAX --numeric-ids store/ copy", "tar in a file": """
    tar -C store --acls --xattrs --xattrs-include='*' -cf t.tar . && tar -C copy -p --acls --xattrs \
        --xattrs-include='*' -xf t.tar"""}  # fmt: skip
WRONG = {
    "cp -r": ("cp -r store/. copy", "extended attributes"),
    "cp -p": ("cp -rp store/. copy", "extended attributes and hard links"),
    "cp -rL": ("cp -rL --preserve=all store/. copy", "symbolic links"),
    "cp --preserve": ("cp -r --preserve=xattr,links store/. copy", "times"),
    "rsync -a": ("rsync -a store/ copy", "extended attributes"),
    "rsync -aX": ("rsync -aX store/ copy", "hard links"),
    "rsync --no-D": ("rsync -aHAX --no-D store/ copy", "device nodes"),
    "rsync --no-t": ("rsync -aHAX --no-t store/ copy", "times"),
    "tar": (PACK.format(""), "extended attributes"),
    "zip": (
        "cd store && zip -qry ../z.zip . ; cd ../copy && python3 -m zipfile -e ../z.zip .",
        "device nodes",
    ),
    "cpio": ("cd store && find . -depth | cpio -pdm ../copy", "extended attributes"),
    "git": (
        "cp -r store work && cd work && git init -q . && git add -A . && "
        "git -c user.name=n -c user.email=e commit -qm m && git clone -q . ../clone && mv ../clone/* ../copy",
        "device nodes",
    ),
}
ROOTS_WRONG = {
    **WRONG,
    "rsync --no-o": ("rsync -aHAX --no-o --no-g store/ copy", "owners"),
    "tar --xattrs": (PACK.format("--xattrs"), "extended attributes"),
}


@pytest.fixture(scope="module", params=["root", "nobody"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a lower and a store, which holds one of each kind of change."""
    place = Path(tmp_path_factory.mktemp("copies"))
    nobody = request.param == "nobody"
    if nobody:  # pytest's own directories are root's alone
        place = Path("/tmp", f"cowfs-copies-{os.getpid()}")
        place.mkdir()
    for name in ("anew", "away"):
        (place / "lower" / name).mkdir(parents=True)
        (place / "lower" / name / "old").write_text("old")
    for name in ("gone", "one", "mode"):
        (place / "lower" / name).write_text(name)
    os.link(place / "lower/one", place / "lower/two")
    if nobody:
        run("chown", "-R", f"{NOBODY}:{NOBODY}", place)
    with mounted(place / "lower", place / "mnt", place / "store", nobody=nobody) as mount:
        user(nobody, "sh", "-c", CHANGES, "sh", mount.path)
    yield place
    shutil.rmtree(place)


def user(nobody: bool, *command: str | os.PathLike[str], cwd: Path | None = None) -> str:
    prefix = as_nobody_prefix() if nobody else []
    return run(*prefix, *command, check=False, cwd=cwd, env={**os.environ, "HOME": "/tmp"}).stdout


def needs(how: str) -> None:
    """Skip where the program is missing that is to copy."""
    if shutil.which(how.split()[0]) is None:
        pytest.skip(f"needs {how.split()[0]}")


@pytest.fixture
def place(original: Path) -> Iterator[tuple[Path, bool]]:
    """The place, with an empty directory ``copy`` in it, and whether it is nobody's."""
    nobody = original.stat().st_uid == NOBODY
    before = set(os.listdir(original))
    user(nobody, "mkdir", original / "copy")
    yield original, nobody
    for name in set(os.listdir(original)) - before:
        run("rm", "-rf", original / name)


def shown(place: Path, store: str, nobody: bool) -> str:
    """Everything that a mount of the store shows."""
    with mounted(place / "lower", place / "mnt", place / store, nobody=nobody):
        return user(nobody, "sh", "-c", SHOW, cwd=place)


@pytest.mark.parametrize("how", ROOTS_RIGHT)
def test_a_copy_of_everything_is_the_same_store(place: tuple[Path, bool], how: str) -> None:
    path, nobody = place
    if nobody and how not in RIGHT:
        pytest.skip("for root")
    needs(how)
    user(nobody, "sh", "-c", ROOTS_RIGHT[how], cwd=path)
    assert cowfs("check", "-n", path / "copy", nobody=nobody, check=True).stdout.endswith("copy: clean\n")
    copied = shown(path, "copy", nobody)
    assert len(copied.splitlines()) > 14
    before = _shown.setdefault(str(path), "") or shown(path, "store", nobody)
    _shown[str(path)] = before
    assert copied == before


_shown: dict[str, str] = {}
"""What each original shows."""


@pytest.mark.parametrize("how", ROOTS_WRONG)
def test_a_copy_that_lacks_something_is_refused(place: tuple[Path, bool], how: str) -> None:
    path, nobody = place
    if nobody and how not in WRONG:
        pytest.skip("for root")
    needs(how)
    command, lost = ROOTS_WRONG[how]
    user(nobody, "sh", "-c", f"umask 022; {command}", cwd=path)
    before = facts(path / "copy")
    done = cowfs("mount", path / "lower", path / "mnt", "--store", path / "copy", nobody=nobody)
    refused(done, lost)
    assert "cp -a" in done.stderr
    assert facts(path / "copy") == before


def test_all_commands_tell_it(place: tuple[Path, bool]) -> None:
    path, nobody = place
    user(nobody, "cp", "-r", f"{path}/store/.", path / "copy")
    before = facts(path / "copy")
    refused(cowfs("diff", path / "copy", nobody=nobody), "hard links")
    done = cowfs("check", "-n", path / "copy", nobody=nobody)
    assert (done.returncode, done.stdout.count("a copy without the")) == (4, 1)
    assert "a copy without the" in cowfs("info", path / "copy", nobody=nobody, check=True).stdout
    assert facts(path / "copy") == before


def refused(done: subprocess.CompletedProcess[str], lost: str) -> None:
    assert done.returncode == 32, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1
    assert re.search(rf"a copy without the [^(]*{lost}", done.stderr), done.stderr


def facts(path: Path) -> dict[str, tuple[int, int]]:
    """What changes when something is written anywhere below; but the lock may be made."""
    return {
        str(found): (found.lstat().st_ino, found.lstat().st_mtime_ns)
        for found in path.rglob("*")
        if found.name not in {"cowfs", "lock"}
    }


@pytest.mark.parametrize(("how", "lost"), [("-a", "extended attributes"), ("-aX", "hard links")])
def test_a_copy_that_is_brought_up_to_date_otherwise_is_refused(
    place: tuple[Path, bool], how: str, lost: str
) -> None:
    needs("rsync")
    path, nobody = place
    user(nobody, "cp", "-a", f"{path}/store/.", path / "copy")
    stale = path / "copy/cowfs/header.json"
    os.utime(stale, (1, 1))  # rsync takes a header of the same second for the same
    shown(path, "store", nobody)
    user(nobody, "rsync", how, f"{path}/store/", path / "copy")
    refused(cowfs("diff", path / "copy", nobody=nobody), lost)


# --- copies of stores in use


@pytest.mark.parametrize("how", ["cp -a", "tar"])
def test_a_copy_of_a_store_in_use_is_not_served_unasked(place: tuple[Path, bool], how: str) -> None:
    path, nobody = place
    copy = path / "copy"
    with mounted(path / "lower", path / "mnt", path / "store", nobody=nobody):
        user(nobody, "sh", "-c", RIGHT[how], cwd=path)
    before = facts(copy)
    said = "a copy of a store that was in use; its files may be incomplete"
    done = cowfs("mount", path / "lower", path / "mnt", "--store", copy, nobody=nobody)
    assert (done.returncode, done.stderr.count("\n"), said in done.stderr) == (32, 1, True)
    assert f"cowfs check {copy}" in done.stderr
    assert said in cowfs("info", copy, nobody=nobody, check=True).stdout
    assert said in cowfs("diff", copy, nobody=nobody, check=True).stderr
    assert cowfs("check", "-n", copy, nobody=nobody).returncode == 4
    assert facts(copy) == before
    assert said in cowfs("check", copy, nobody=nobody).stdout
    copied = shown(path, "copy", nobody)
    assert copied == shown(path, "store", nobody)


def test_a_killed_store_is_no_copy(place: tuple[Path, bool]) -> None:
    """Nor is one that is renamed; and a copy that is made when it has been unmounted again is a store."""
    path, nobody = place
    with mounted(path / "lower", path / "mnt", path / "store", nobody=nobody, quiet=False) as mount:
        os.kill(pid := mount.pid(), signal.SIGKILL)
        pids.wait_pid_gone(pid, 20)
        force_umount(mount.path)
    (path / "store").rename(path / "renamed")
    before = shown(path, "renamed", nobody)
    (path / "renamed").rename(path / "store")
    user(nobody, "cp", "-a", f"{path}/store/.", path / "copy")
    assert shown(path, "copy", nobody) == before


# --- stores that have no mark, and other marks


def unmarked(store: Path) -> Path:
    """The store as versions of cowfs left it that made no mark."""
    header = json.loads((store / "cowfs/header.json").read_text())
    shutil.rmtree(store / "cowfs" / header.pop("mark")["name"])
    (store / "cowfs/header.json").write_text(json.dumps(header))
    return store


def test_a_store_of_an_old_version_gets_a_mark(tmp_path: Path) -> None:
    open_store(str(tmp_path / "old")).close()
    old = unmarked(tmp_path / "old")
    open_store(str(old), read_only=True).close()
    open_store(str(old)).close()
    run("cp", "-r", old, tmp_path / "copy")
    with pytest.raises(StoreError, match=r"a copy without the .*cp -a"):
        open_store(str(tmp_path / "copy"))


def test_what_a_filesystem_does_not_keep_is_not_missed(tmp_path: Path) -> None:
    """A store that was made on a filesystem without ACLs; one that root made is told of owners."""
    open_store(str(tmp_path / "s")).close()
    header = json.loads((tmp_path / "s/cowfs/header.json").read_text())
    assert {"xattrs", "whiteouts", "links", "owners"} <= set(header["mark"]["keeps"])
    (tmp_path / "s/cowfs" / header["mark"]["name"] / "acl").unlink()
    with pytest.raises(StoreError, match="without the ACLs of"):
        open_store(str(tmp_path / "s"))
    header["mark"]["keeps"].remove("acls")
    (tmp_path / "s/cowfs/header.json").write_text(json.dumps(header))
    open_store(str(tmp_path / "s")).close()


def test_a_mark_that_was_cut_short_does_not_count(tmp_path: Path) -> None:
    open_store(str(tmp_path)).close()
    left = tmp_path / "cowfs/mark.0000000000000000"
    left.mkdir()
    (left / "file").touch()
    open_store(str(tmp_path)).close()
    assert len(list((tmp_path / "cowfs").glob("mark.*"))) == 1
    assert not left.exists()


def test_the_content_of_an_image_is_a_store_if_it_is_copied_well(tmp_path: Path) -> None:
    create_store(str(tmp_path / "image"), 16 << 20)
    at = tmp_path / "at"
    at.mkdir()
    run("mount", "-o", "loop,ro", tmp_path / "image", at)
    try:
        for name, option in (("good", "-a"), ("bad", "-r")):
            run("cp", option, at, tmp_path / name)
    finally:
        run("umount", at)
    open_store(str(tmp_path / "good")).close()
    with pytest.raises(StoreError, match="a copy without the"):
        open_store(str(tmp_path / "bad"))
