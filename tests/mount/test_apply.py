"""`cowfs apply`: a copy of the lower becomes the merged tree."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mount.test_export import CHANGE, MAKE, script, seen
from tests.support.mounts import COWFS, cowfs, eventually, mounted, project_root, unchanged
from tests.support.system import needs_fuse, needs_root, run
from tests.support.tree import Snapshot, differences, snapshot

DEV_FUSE_AT_NIGHT = True

pytestmark = needs_fuse

CONFLICTS = 65

KILLED = """
import os, signal, sys
from cowfs.api import apply
path, times = os.fsencode(sys.argv[3]), int(sys.argv[4])
def tick(at, size):
    global times
    times -= at == path
    if times == 0:
        os.kill(os.getpid(), signal.SIGKILL)
apply(sys.argv[1], sys.argv[2], tick=tick)
"""

HELD = """
import sys
from cowfs import api
from cowfs.cli.main import main
apply = api.apply
def tick(at, size):
    print("at work", flush=True)
    sys.stdin.read()
api.apply = lambda *arguments, **more: apply(*arguments, **more | {"tick": tick})
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Snapshot]:
    return make(tmp_path_factory.mktemp("apply"))


def make(top: Path, more: str = "") -> tuple[Path, Snapshot]:
    """Fill a directory with a lower and a store; return it, and what the merged tree was."""
    script(MAKE, top)
    cowfs("create", top / "store.bs", "32", check=True)
    with mounted(top / "lower", top / "mnt", top / "store.bs") as here:
        script(CHANGE + more, here.path)
        return top, seen(here.path)


def copy_of(top: Path, target: Path) -> Path:
    run("cp", "-a", top / "lower", target)
    return target


def contents(tree: Snapshot) -> dict[str, object]:
    return {path: (facts["type"], facts.get("content")) for path, facts in tree.items()}


def test_a_copy_of_the_lower_becomes_the_merged_tree(made: tuple[Path, Snapshot], tmp_path: Path) -> None:
    top, tree = made
    copy = copy_of(top, tmp_path / "copy")
    old = seen(copy)
    listed = cowfs("apply", top / "store.bs", copy, "--dry-run")
    assert listed.stdout == cowfs("diff", top / "store.bs").stdout
    assert (listed.returncode, differences(old, seen(copy))) == (0, [])
    for _ in range(2):  # the second time there is nothing to do
        done = cowfs("apply", top / "store.bs", copy)
        assert (done.returncode, done.stderr) == (0, "")
        assert differences(tree, seen(copy)) == []
    refused = cowfs("apply", top / "store.bs", top / "lower")
    assert refused.returncode == 1
    assert "is the lower itself" in refused.stderr


def test_what_is_killed_is_completed_by_the_next(made: tuple[Path, Snapshot], tmp_path: Path) -> None:
    top, tree = made
    copy = copy_of(top, tmp_path / "copy")
    old, new = contents(seen(copy)), contents(tree)
    # In the middle of its data; before it is made; before what is gone, or its other name, is removed.
    for path, time in (("etc/fstab", "2"), ("linked", "1"), ("gone", "2"), ("renamed", "2")):
        command: list[str | Path] = [sys.executable, "-c", KILLED, top / "store.bs", copy, path, time]
        killed = subprocess.run(command, cwd=project_root(), check=False)
        assert killed.returncode == -signal.SIGKILL
        now = contents(seen(copy))
        for path, what in now.items():
            assert what in {old.get(path), new.get(path)} or ".cowfs-apply-" in path, path
        for path in old.keys() & new.keys():
            assert path in now
    assert cowfs("apply", top / "store.bs", copy).returncode == 0
    assert differences(tree, seen(copy)) == []


def test_conflicts_are_named_and_links_lead_nowhere(made: tuple[Path, Snapshot], tmp_path: Path) -> None:
    top, tree = made
    copy, outside = copy_of(top, tmp_path / "copy"), tmp_path / "outside"
    run("cp", "-a", top / "lower/etc", outside)
    (outside / "g").write_text("g")
    script("echo mine >old/new; rm -r etc gone/sub touched big; echo z >z1/one", copy)
    for name in ("etc", "gone/sub"):
        (copy / name).symlink_to(outside)
    (copy / "touched").symlink_to(outside / "hosts")
    (copy / "unconcerned").write_text("mine")
    there, before = snapshot(outside), snapshot(copy)
    done = cowfs("apply", top / "store.bs", copy)
    assert done.returncode == CONFLICTS
    for line in (
        "old/new exists, but did not in the lower",
        "etc has another type than in the lower",
        "gone/sub has another type than in the lower",
        "touched has another type than in the lower",
        "z1/one has other content than in the lower",
        "big is missing",
    ):
        assert f"conflict: {line}\n" in done.stderr
    assert differences(before, snapshot(copy)) == []
    assert cowfs("apply", top / "store.bs", copy, "--force").returncode == 0
    assert differences(there, snapshot(outside)) == []
    assert (copy / "unconcerned").read_text() == "mine"
    (copy / "unconcerned").unlink()
    now, wanted = contents(seen(copy)), contents(tree)
    differ = {path for path in now.keys() | wanted.keys() if now.get(path) != wanted.get(path)}
    assert differ == {"etc/link"}  # which was not changed in the store, and has gone from the copy
    assert not os.path.lexists(copy / "gone")


def test_an_ordinary_user_has_the_files_then(nobody_path: Path) -> None:
    top, tree = make(nobody_path, "\necho of root > setid; chmod 6755 setid\n")
    run("cp", "-r", "--preserve=links,xattr", top / "lower", top / "copy")
    if os.geteuid() == 0:
        run("chown", "65534:65534", top / "store.bs")
        done = cowfs("apply", top / "store.bs", top / "copy", nobody=True)
        told = done.stderr
        assert done.returncode == 2, told
        assert told.startswith(f"cowfs: {top}/copy: not all changes were made: /"), told
        assert "the same command completes it" in told and told.count("\n") == 1
        run("chown", "-R", "65534:65534", top / "copy")
    done = cowfs("apply", top / "store.bs", top / "copy", nobody=True)
    if os.geteuid() == 0:
        assert (top / "copy/setid").stat().st_mode & 0o7777 == 0o755, "it would run as somebody else now"
        cowfs("export", top / "store.bs", "--to", "overlayfs", top / "upper", nobody=True)
        assert (top / "upper/setid").stat().st_mode & 0o7777 == 0o755
    new, now = contents(tree), contents(snapshot(top / "copy"))
    differ = {path for path in new.keys() | now.keys() if new.get(path) != now.get(path)}
    if os.geteuid() == 0:  # who made the store
        assert done.returncode == 64, done.stderr
        assert "devices left out, which only root can create: 1 (null)" in done.stderr
        assert "files whose owner only root can set" in done.stderr
        assert differ == {"null"}
    else:
        assert (done.returncode, differ) == (0, set())


@needs_root
def test_what_was_replaced_comes_back(made: tuple[Path, Snapshot], tmp_path: Path) -> None:
    top, tree = made
    copy, kept = copy_of(top, tmp_path / "copy"), tmp_path / "kept"
    (copy / "etc/fstab").write_text("in conflict")
    (copy / "z1/mine").mkdir(parents=True)
    before = seen(copy)
    done = cowfs("apply", top / "store.bs", copy, "--backup", kept)
    assert (done.returncode, kept.exists()) == (CONFLICTS, False)
    assert cowfs("apply", top / "store.bs", copy, "--backup", kept, "--force").returncode == 0
    assert contents(seen(copy)).items() >= contents(tree).items()
    assert cowfs("apply", top / "store.bs", copy, "--backup", kept, "--force").returncode == 1
    other = cowfs("apply", "--undo", "--backup", kept, top / "mnt")
    assert (other.returncode, f"is a backup of {copy}, not of" in other.stderr) == (1, True)
    for _ in range(2):
        done = cowfs("apply", "--undo", "--backup", kept, copy)
        assert (done.returncode, done.stderr) == (0, "")
        assert differences(before, seen(copy)) == []


@needs_root
def test_without_room_each_path_is_old_or_new(made: tuple[Path, Snapshot], tmp_path: Path) -> None:
    top, tree = made
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=2m", "cowfs-test", disk)
    try:
        copy = copy_of(top, disk / "copy")
        old, new = contents(seen(copy)), contents(tree)
        room = os.statvfs(disk)
        (disk / "fill").write_bytes(bytes((room.f_bavail - 3) * room.f_frsize))
        done = cowfs("apply", top / "store.bs", copy, "--backup", kept)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert done.stderr.startswith(f"cowfs: {copy}/")
        assert done.stderr.endswith(
            "No space left on device; each path has its old or its new content"
            " (free space there, and complete it with the same command, without --backup)\n"
        )
        now = contents(seen(copy))
        assert now.keys() >= old.keys() & new.keys()
        assert all(what in {old.get(path), new.get(path)} for path, what in now.items())
        again = cowfs("apply", top / "store.bs", copy, "--backup", kept)
        assert (again.returncode, "is the backup of an earlier apply" in again.stderr) == (1, True)
        (disk / "fill").unlink()
        assert cowfs("apply", top / "store.bs", copy).returncode == 0
        assert differences(tree, seen(copy)) == []
        assert cowfs("apply", "--undo", "--backup", kept, copy).returncode == 0
        assert contents(seen(copy)) == old
    finally:
        run("umount", disk)


@needs_root
def test_asked_for_each(made: tuple[Path, Snapshot], tmp_path: Path) -> None:
    top, tree = made
    copy = copy_of(top, tmp_path / "copy")
    (copy / "etc/fstab").write_text("in conflict")
    before = contents(seen(copy))

    def answered(answers: str) -> subprocess.CompletedProcess[str]:
        command = [*COWFS, "apply", str(top / "store.bs"), str(copy), "--interactive"]
        env = {**os.environ, "PYTHONPATH": project_root()}
        return subprocess.run(command, input=answers, capture_output=True, text=True, check=False, env=env)

    for answers in ("q\n", "y\n", "y\nx\nq\n"):  # whoever answers no more has not agreed
        assert answered(answers).returncode == 1
        assert contents(seen(copy)) == before
    assert "etc/fstab  conflict: has other content than in the lower" in answered("n\n" * 300).stderr
    (copy / "z1").chmod(0o711)
    before = contents(seen(copy))
    assert answered("d\n").returncode == 0
    assert contents(seen(copy)) == before
    done = answered("n\n" * 3 + "a\n")
    asked = [line.split("  ")[:2] for line in done.stderr.splitlines() if "[y,n" in line]
    assert (done.returncode, len(asked)) == (0, 4)
    now = contents(seen(copy))
    refused = [path for _, path in asked[:3]]
    for path in now.keys() | tree.keys():
        if any(f"{path}/".startswith(f"{one}/") for one in refused):
            assert now.get(path) == before.get(path), path
        elif path in tree and path.isprintable() and not any(one.startswith(f"{path}/") for one in refused):
            assert now[path] == contents(tree)[path], path


@needs_root
@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_killed_it_leaves_no_store_mounted(made: tuple[Path, Snapshot], tmp_path: Path, by: int) -> None:
    top, _ = made
    other = tmp_path / "other.bs"
    cowfs("create", other, "16", check=True)
    with mounted(top / "lower", tmp_path / "mnt", other):
        pass
    before = mountpoints()
    with subprocess.Popen(
        [sys.executable, "-c", HELD, "apply", str(top / "store.bs"), str(other)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": project_root()},
    ) as applying:
        assert applying.stdout is not None
        assert applying.stdout.readline() == b"at work\n"
        (place,) = mountpoints() - before
        applying.send_signal(by)
    eventually(lambda: not os.path.lexists(place), "the store is unmounted, and the directory is gone")
    with mounted(top / "lower", tmp_path / "mnt", other):
        pass


def mountpoints() -> set[str]:
    return {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}


@needs_root
def test_into_another_store(made: tuple[Path, Snapshot], tmp_path: Path) -> None:
    top, tree = made
    other, kept = tmp_path / "other.bs", tmp_path / "kept"
    cowfs("create", other, "32", check=True)
    refused = cowfs("apply", top / "store.bs", other, "--lower", top / "lower")
    assert refused.stderr.endswith("(mount it with its lower, and give the mountpoint)\n")
    with mounted(top / "lower", tmp_path / "mnt", other):
        (tmp_path / "mnt/own").write_text("mine")
        script("echo mine >old/new; echo z >z1/one; rm big", tmp_path / "mnt")
        refused = cowfs("apply", top / "store.bs", other)
        assert (refused.returncode, "is mounted (give its mountpoint)" in refused.stderr) == (1, True)
        (tmp_path / "link").symlink_to("mnt")
        for root in (tmp_path / "mnt", tmp_path / "link"):
            refused = cowfs("apply", tmp_path / "mnt", root)
            assert refused.returncode == 1 and "is in the mount whose changes are meant" in refused.stderr
    with unchanged(other):
        refused = cowfs("apply", other, other)
        assert refused.returncode == 1 and "is the store whose changes are meant" in refused.stderr
        for option in ([], ["--dry-run"]):
            refused = cowfs("apply", top / "store.bs", other, *option)
            assert refused.returncode == CONFLICTS
            for line in (
                "old/new exists, but did not in the lower",
                "z1/one has other content than in the lower",
                "big is missing",
            ):
                assert f"conflict: {line}\n" in refused.stderr
        refused = cowfs("apply", "--undo", "--backup", kept, other)
        assert refused.returncode == 1 and "cannot be read" in refused.stderr
    with mounted(top / "lower", tmp_path / "mnt", other):
        mine = contents(seen(tmp_path / "mnt"))
    with (
        mounted(top / "lower", tmp_path / "mnt", other),
        pytest.raises(OSError, match="No space left"),
        (tmp_path / "mnt/fill").open("wb", 0) as file,
    ):
        while True:
            file.write(bytes(1 << 16))
    refused = cowfs("apply", top / "store.bs", other, "--force", "--backup", kept)
    assert refused.returncode == 2 and f"cowfs: {other}: /" in refused.stderr, refused
    assert f"cowfs grow {other} SIZE, and complete it" in refused.stderr
    with mounted(top / "lower", tmp_path / "mnt", other):
        (tmp_path / "mnt/fill").unlink()
    done = cowfs("apply", top / "store.bs", other, "--force")
    assert done.returncode == 0, done
    with mounted(top / "lower", tmp_path / "mnt", other):
        now = contents(seen(tmp_path / "mnt"))
        assert now.pop("own")
        assert now == contents(tree)
    with unchanged(other):
        refused = cowfs("apply", "--undo", "--backup", kept, tmp_path)
        assert refused.returncode == 1 and f"give {other}" in refused.stderr
    done = cowfs("apply", "--undo", "--backup", kept, other)
    assert (done.returncode, done.stderr) == (0, "")
    with mounted(top / "lower", tmp_path / "mnt", other):
        assert contents(seen(tmp_path / "mnt")) == mine


def test_holes_are_not_read(tmp_path: Path) -> None:
    """A file that holds nothing is compared at once, however large: reading this one would take minutes."""
    (tmp_path / "lower").mkdir()
    (tmp_path / "lower/huge").touch()
    os.truncate(tmp_path / "lower/huge", 4 << 40)
    copy = copy_of(tmp_path, tmp_path / "copy")
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        (here.path / "huge").chmod(0o600)
    cowfs("apply", tmp_path / "store", copy, check=True)
    assert (copy / "huge").stat().st_mode & 0o777 == 0o600
