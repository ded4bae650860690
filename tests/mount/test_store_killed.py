"""Stores whose daemon was killed, and copies of stores in use: what is told of them without mounting them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs.linux import pids, safe_paths
from tests.support.mounts import cowfs, eventually, force_umount, is_mounted, mount_arguments, mounted
from tests.support.system import NOBODY, as_nobody_prefix, needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True
pytestmark = [needs_root, needs_fuse]


class Place:
    """A directory with a lower and an image, of root's or nobody's."""

    def __init__(self, path: Path, *, nobody: bool) -> None:
        self.path = path
        self.nobody = nobody
        self._prefix = as_nobody_prefix() if nobody else []
        self.lower, self.store, self.at = path / "lower", path / "s.bs", path / "mnt"
        (self.lower / "dir").mkdir(parents=True)
        self.at.mkdir()
        for number in range(40):
            (self.lower / "dir" / f"{number}").write_text(f"{number}\n")
        if nobody:
            run("chown", "-R", f"{NOBODY}:{NOBODY}", path)
        self.cowfs("create", self.store, "32", check=True)

    def cowfs(self, *arguments: str | Path, check: bool = False) -> tuple[int, str, str]:
        done = cowfs(*arguments, nobody=self.nobody, check=check)
        return done.returncode, done.stdout, done.stderr

    def mount(self, engine: str = "process", store: Path | None = None) -> None:
        log = [f"log={self.path}/log"]
        self.cowfs(*mount_arguments(self.lower, self.at, store or self.store, engine, log), check=True)

    def change(self) -> None:
        """Delete, change and make files, and let half of that be on disk."""
        script = """
            cd "$1"
            for n in 1 2 3 4 5; do rm dir/$n; echo more >> dir/1$n; mkdir -p new/$n; echo $n > new/$n/f; done
            mv dir/20 dir/moved
            ln -s "$(printf 'x%.0s' $(seq 200))" link
            sync -f .
            dd if=/dev/zero of=synced bs=4k count=30 conv=fsync status=none
            for n in 6 7 8; do rm dir/$n; mkdir -p new/$n; done
        """
        run(*self._prefix, "sh", "-ec", script, "sh", self.at)

    def kill(self) -> None:
        """End the daemon as nothing should, and take its mount away."""
        pid = json.loads(self.cowfs("info", self.at, "--json", check=True)[1])["pid"]
        os.kill(pid, signal.SIGKILL)
        pids.wait_pid_gone(pid, 20)
        force_umount(self.at)
        assert not is_mounted(self.at)
        eventually(lambda: not safe_paths.loop_users(self.store), "the kernel lets go of the image")

    def umount(self) -> None:
        self.cowfs("umount", self.at, check=True)

    def names(self) -> set[str]:
        """Return what the mount has and the lower has not, and the reverse."""
        look = ("-mindepth", "1", "-printf", "%P\\n")
        here, there = (
            set(run(*self._prefix, "find", top, *look).stdout.splitlines()) for top in (self.at, self.lower)
        )
        return here ^ there


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(params=["root", "nobody"])
def place(request: pytest.FixtureRequest, tmp_path: Path, nobody_path: Path) -> Iterator[Place]:
    nobody = request.param == "nobody"
    yield Place(nobody_path if nobody else tmp_path, nobody=nobody)


@pytest.fixture
def roots(tmp_path: Path) -> Place:
    return Place(tmp_path, nobody=False)


def changes(said: str) -> set[str]:
    """The names in a list of changes that were added or deleted."""
    found = [json.loads(line) for line in said.splitlines()]
    return {
        name
        for change in found
        if change["kind"] != "M"
        for name in (change["path"], change["source"])
        if name
    }


@pytest.mark.parametrize("engine", ["process", "kernel"])
def test_nobody_calls_a_killed_store_damaged(place: Place, engine: str) -> None:
    if place.nobody and engine == "kernel":
        pytest.skip("for root")
    place.mount(engine)
    place.change()
    place.kill()
    before = digest(place.store)

    code, said, complaint = place.cowfs("info", place.store, "--json")
    facts = json.loads(said)
    assert (code, complaint, facts["problem"]) == (0, "", None)
    assert facts["state"] == ("clean" if engine == "kernel" else "needs recovery")
    assert facts["lowers"][0]["path"] == str(place.lower)
    code, said, complaint = place.cowfs("check", "-n", place.store)
    assert (code, complaint) == (0, "")
    assert said.endswith(": clean\n")
    assert ("was not cleanly unmounted" in said) == (engine == "process")
    code, said, complaint = place.cowfs("diff", place.store, "--json")
    assert code == 0, complaint
    assert ("was not cleanly unmounted" in complaint) == (engine == "process")
    assert "synced" in changes(said)
    assert digest(place.store) == before, "looking has written something"

    place.mount(engine)
    assert changes(said) == place.names()
    place.umount()
    after = json.loads(place.cowfs("info", place.store, "--json", check=True)[1])
    assert after["state"] == "clean"
    assert abs(after["free_inodes"] - facts["free_inodes"]) < 12, "the journal counts"


@pytest.mark.parametrize("what", ["grown", "kept", "kept and grown"])
def test_nothing_is_lost_after_the_store_was_left_to_others(place: Place, what: str) -> None:
    """While it is grown, or goes from memory to a disk, the daemon is shut in already."""
    if "kept" in what:
        place.store.unlink()
        at_first = mount_arguments(place.lower, place.at, "memory", "process", [f"log={place.path}/log"])
        place.cowfs(*at_first, check=True)
        place.cowfs("persist", place.at, place.store, "128", check=True)
    else:
        place.mount()
    if "grown" in what:
        place.cowfs("grow", place.at, "256", check=True)
    run(*(as_nobody_prefix() if place.nobody else []), "sh", "-ec", 'cd "$0"; mkdir a b c d', place.at)
    place.kill()
    place.mount()
    assert {"a", "b", "c", "d"} <= place.names()
    place.umount()


def test_a_journal_counts_whatever_the_flag_says(roots: Place) -> None:
    roots.mount()
    roots.change()
    roots.kill()
    run("debugfs", "-w", "-R", "feature -needs_recovery", roots.store)
    before = digest(roots.store)
    assert json.loads(roots.cowfs("info", roots.store, "--json")[1])["state"] == "needs recovery"
    code, said, _ = roots.cowfs("check", "-n", roots.store)
    assert (code, "was not cleanly unmounted" in said, said.endswith(": clean\n")) == (0, True, True)
    assert "synced" in changes(roots.cowfs("diff", roots.store, "--json")[1])
    assert digest(roots.store) == before
    code, said, _ = roots.cowfs("check", roots.store)
    assert code in {0, 1}
    run("e2fsck", "-fn", roots.store)
    with mounted(roots.lower, roots.at, roots.store):
        assert (roots.at / "synced").stat().st_size == 30 * 4096


def test_damage_is_seen_behind_the_journal(roots: Place) -> None:
    """check -n of a store that was killed is no empty promise."""
    with mounted(roots.lower, roots.at, roots.store):
        (roots.at / "whole").mkdir()
    run("debugfs", "-w", "-R", "sif upper/whole links_count 9", roots.store)
    roots.mount()
    roots.change()
    roots.kill()
    before = digest(roots.store)
    code, said, _ = roots.cowfs("check", "-n", roots.store)
    assert code == 4
    assert "ref count is 9" in said
    assert digest(roots.store) == before


# --- copies


def copied_in_use(place: Place) -> Path:
    """A copy of the image, made while it is mounted; it is unmounted then."""
    copy = place.path / "copy.bs"
    place.mount()
    place.change()
    run("cp", "-a", place.store, copy)
    place.umount()
    return copy


def test_a_copy_of_an_image_in_use_is_not_served_unasked(place: Place) -> None:
    copy = copied_in_use(place)
    before = digest(copy)
    said = "a copy of a store that was in use; its files may be incomplete"
    for arguments in (("mount", place.lower, place.at, "--store", copy), ("grow", copy, "48")):
        code, _, complaint = place.cowfs(*arguments)
        assert (code, complaint.count("\n")) == (32, 1)
        assert said in complaint
        assert f"cowfs check {copy}" in complaint
    assert said in place.cowfs("info", copy)[1]
    code, listed, complaint = place.cowfs("diff", copy, "--json")
    assert (code, said in complaint, "synced" in changes(listed)) == (0, True, True)
    code, listed, _ = place.cowfs("check", "-n", copy)
    assert (code, said in listed) == (4, True)
    assert digest(copy) == before

    code, listed, _ = place.cowfs("check", copy)
    assert (code, said in listed) == (1, True)
    place.mount(store=copy)
    assert "synced" in place.names()
    place.umount()
    place.mount()
    place.umount()


@pytest.mark.parametrize("cut", [4096, 1 << 20, 16 << 20], ids=str)
@pytest.mark.parametrize("first", ["before", "during"])
def test_a_copy_that_took_as_long_as_a_use_is_whole_or_refused(roots: Place, cut: int, first: str) -> None:
    """The first bytes of one moment, the rest of a later one: what cp reads meanwhile."""
    moments = {}
    with mounted(roots.lower, roots.at, roots.store):
        (roots.at / "kept").write_text("kept")
    moments["before"] = roots.store.read_bytes()
    roots.mount()
    roots.change()
    moments["during"] = roots.store.read_bytes()
    roots.umount()
    moments["after"] = roots.store.read_bytes()
    copy = roots.path / "copy.bs"
    copy.write_bytes(moments[first][:cut] + moments["after"][cut:])
    code, _, complaint = roots.cowfs("mount", roots.lower, roots.at, "--store", copy)
    assert code in {0, 32}, complaint
    if code == 0:
        assert (roots.at / "kept").read_text() == "kept"
        roots.umount()
        run("e2fsck", "-fn", copy)
    else:
        assert re.search(r"a copy of a store that was in use|an incomplete copy", complaint)
    assert code == 32 or (first, cut) != ("before", 1 << 20)


BACK = {
    "cp": "cp {0} {1}",
    "dd": "dd if={0} of={1} conv=notrunc bs=1M status=none",
    "rsync": "rsync --inplace --ignore-times {0} {1}",
}


def put_back(place: Place, copy: Path, how: str) -> None:
    """Write a copy over the original: the file stays the same one."""
    if shutil.which(how) is None:
        pytest.skip(f"needs {how}")
    before = place.store.stat().st_ino
    run(*(as_nobody_prefix() if place.nobody else []), *BACK[how].format(copy, place.store).split())
    assert place.store.stat().st_ino == before and digest(place.store) == digest(copy)


@pytest.mark.parametrize("how", BACK)
def test_a_copy_of_an_image_in_use_is_known_in_the_originals_place(nobody_path: Path, how: str) -> None:
    place = Place(nobody_path, nobody=True)
    put_back(place, copied_in_use(place), how)
    before = digest(place.store)
    said = "a copy of a store that was in use; its files may be incomplete"
    for arguments in (("mount", place.lower, place.at, "--store", place.store), ("grow", place.store, "48")):
        code, _, complaint = place.cowfs(*arguments)
        assert (code, complaint.count("\n"), said in complaint) == (32, 1, True)
    assert said in place.cowfs("info", place.store)[1]
    assert place.cowfs("check", "-n", place.store)[0] == 4
    assert digest(place.store) == before

    assert place.cowfs("check", place.store)[0] == 1
    for _ in range(2):
        place.mount()
        assert "synced" in place.names()
        place.umount()


def test_a_backup_in_the_originals_place_is_the_store(place: Place) -> None:
    """One that was made while the image was not in use, older than what it replaces; then a newer one."""
    copies = {}
    for name in ("old", "new"):
        place.mount()
        run(*(as_nobody_prefix() if place.nobody else []), "touch", place.at / name)
        place.umount()
        copies[name] = place.path / f"{name}.bs"
        shutil.copyfile(place.store, copies[name])
    for copy, names in (("old", {"old"}), ("new", {"old", "new"}), ("old", {"old"})):
        put_back(place, copies[copy], "cp")
        place.mount()
        assert place.names() == names
        place.umount()
    place.mount()
    place.kill()
    place.mount()
    assert place.names() == {"old"}
    place.umount()
    run("e2fsck", "-fn", place.store)


def test_an_image_that_another_program_has_changed_is_a_store_like_any(roots: Place) -> None:
    roots.mount()
    roots.umount()
    at = roots.path / "by the kernel"
    at.mkdir()
    run("mount", "-o", "loop", roots.store, at)
    (at / "upper/file").touch()
    run("umount", at)
    roots.mount()
    assert roots.names() == {"file"}
    roots.umount()


@pytest.mark.parametrize("cut", [4096, 1 << 20])
def test_a_copy_of_two_moments_in_the_originals_place_is_whole_or_refused(roots: Place, cut: int) -> None:
    """The image says that it is clean, and is checked nevertheless."""
    with mounted(roots.lower, roots.at, roots.store):
        (roots.at / "kept").write_text("kept")
    old = roots.store.read_bytes()
    with mounted(roots.lower, roots.at, roots.store):
        roots.change()
    copy = roots.path / "copy.bs"
    copy.write_bytes(old[:cut] + roots.store.read_bytes()[cut:])
    put_back(roots, copy, "cp")
    code, _, complaint = roots.cowfs("mount", roots.lower, roots.at, "--store", roots.store)
    assert code in {0, 32}, complaint
    if code == 0:
        assert (roots.at / "kept").read_text() == "kept"
        roots.umount()
        run("e2fsck", "-fn", roots.store)
    else:
        assert "an incomplete copy" in complaint
    assert code == 32 or cut != 1 << 20


def test_a_copy_of_an_image_that_is_not_in_use_is_a_store_like_any(roots: Place) -> None:
    with mounted(roots.lower, roots.at, roots.store):
        (roots.at / "kept").write_text("kept")
    copy = Path(shutil.copyfile(roots.store, roots.path / "copy.bs"))
    for _ in range(2):
        with mounted(roots.lower, roots.at, copy):
            assert (roots.at / "kept").read_text() == "kept"
    roots.mount(store=copy)
    roots.kill()
    copy = copy.rename(roots.path / "renamed.bs")
    with mounted(roots.lower, roots.at, copy) as again:  # it is the same file still
        assert (roots.at / "kept").read_text() == "kept"
        assert again.said.count("\n") == 1
        assert "was not cleanly unmounted; recovered" in again.said


def test_where_files_cannot_be_known_a_killed_image_is_checked_whole(roots: Place) -> None:
    parts = [roots.path / name for name in ("stick", "below", "upper", "work")]
    for part in parts:
        part.mkdir()
    stick, *layers = parts
    names = ("lowerdir", "upperdir", "workdir")
    options = ",".join(f"{name}={at}" for name, at in zip(names, layers, strict=True))
    run("mount", "-t", "overlay", "-o", options, "overlay", stick)  # which has no handles for files
    try:
        store = Path(shutil.copyfile(roots.store, stick / "s.bs"))
        run("debugfs", "-w", "-R", "sif work links_count 9", store)
        roots.mount(store=store)
        roots.change()
        roots.kill()
        with mounted(roots.lower, roots.at, store) as again:
            assert "was not cleanly unmounted" in again.said
            assert (roots.at / "synced").stat().st_size == 30 * 4096
        run("e2fsck", "-fn", store)
    finally:
        run("umount", stick)
