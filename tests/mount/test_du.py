"""`cowfs du`: what fills a store, by reason; its sum is what df tells."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.mount.test_diff_patch import script
from tests.mount.test_revert import MAKE, WORK
from tests.support.mounts import cowfs, make_store, mounted
from tests.support.system import needs_fuse

DEV_FUSE_AT_NIGHT = True

pytestmark = needs_fuse


def usage(what: Path) -> list[dict[str, object]]:
    done = cowfs("du", what, "--json", check=True)
    entries = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(entry.pop("version") == 1 for entry in entries)
    assert set(entries.pop()) == {"reclaimable"}
    return entries


def _sizes(shown: str) -> list[tuple[int, str]]:
    """The lines with paths."""
    units = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20}
    lines = shown.partition("in all\n")[2].splitlines()
    return [(int(float(size) * units[unit]), path) for size, unit, path in (line.split() for line in lines)]


def reasons(entries: list[dict[str, object]]) -> dict[object, object]:
    return {entry["path"]: entry["reason"] for entry in entries if entry["reason"] != "overhead"}


def total(entries: list[dict[str, object]]) -> int:
    return sum(int(str(entry["size"])) for entry in entries)


@pytest.mark.parametrize("kind", ["image", "directory"])
def test_each_thing_has_its_reason(tmp_path: Path, kind: str) -> None:
    script(MAKE, tmp_path)
    store = make_store(tmp_path, kind)
    with mounted(tmp_path / "lower", tmp_path / "mnt", store, options=["blame"]) as here:
        script(WORK, here.path)
        (here.path / "large").chmod(0o600)
        told = usage(here.path)
        found = reasons(told)
        assert found["etc/fstab"] == found["bin/lib/so"] == found["old/f"] == "changed"
        assert found["etc/hosts"] == found["bin/tool"] == "whiteouts"
        assert found["etc/new/deep/file"] == found["etc/new"] == found["old/n"] == found["usr"] == "new"
        assert found["large"] == "metadata" and found["bin"] == found["etc"] == "directories"
        if kind == "image":
            room = os.statvfs(here.path)
            assert total(told) == (room.f_blocks - room.f_bfree) * room.f_frsize
        shown = cowfs("du", here.path, "--top", "2", check=True).stdout.splitlines()
        assert shown[-3].endswith("in all")
        top = {path: size for size, path in _sizes(cowfs("du", here.path, "--top", "100", check=True).stdout)}
        for path in ("etc/new", "bin"):
            inside = [entry for entry in told if f"{entry['path']}/".startswith(f"{path}/")]
            assert top[path] == total(inside)
        programs = cowfs("du", here.path, "--programs", check=True).stdout
        assert {"by sh", "by mkdir"} <= {line.split(maxsplit=2)[2] for line in programs.splitlines()}
    later = usage(store)
    assert reasons(later) == found
    if kind == "image":
        assert json.loads(cowfs("info", store, "--json", check=True).stdout)["used"] == total(later)
    back = cowfs("revert", store, "--all", "--json", check=True)
    lines = [json.loads(line) for line in back.stdout.splitlines()]
    assert {"version": 1, "path": "etc/hosts", "kind": "", "size": 0, "why_not": None} in lines
    assert back.stderr == ""
    assert {entry["reason"] for entry in usage(store)} >= {"trash"}


@pytest.mark.parametrize("kind", ["image", "directory"])
def test_what_could_be_reclaimed_is_what_vacuum_frees(tmp_path: Path, kind: str) -> None:
    script(MAKE, tmp_path)
    store = make_store(tmp_path, kind)
    with mounted(tmp_path / "lower", tmp_path / "mnt", store) as here:
        below = (tmp_path / "lower/etc/fstab").stat()
        script("cp etc/fstab was; echo x >>etc/fstab; cat was >etc/fstab; rm was script", here.path)
        os.utime(here.path / "etc/fstab", ns=(0, below.st_mtime_ns))
        (here.path / "copy").write_bytes(b"x" * 300_000)
        cowfs("revert", here.path, "copy", check=True)
        told = reclaimable(here.path)
        free = os.statvfs(here.path).f_bfree
        lines = cowfs("vacuum", here.path, "--dry-run", "--json", check=True).stdout.splitlines()
        assert told["vacuum"] == sum(json.loads(line)["size"] for line in lines) > 0
        assert told["trash"] > 300_000
        shown = cowfs("du", here.path, check=True).stdout
        assert "of this cowfs vacuum would free" in shown and "of this cowfs vacuum --trash would" in shown
        if kind == "directory":
            return
        cowfs("vacuum", here.path, check=True)
        freed = (os.statvfs(here.path).f_bfree - free) * os.statvfs(here.path).f_frsize
        assert freed == told["vacuum"]
        cowfs("vacuum", here.path, "--trash", check=True)
    assert reclaimable(store) == {"vacuum": 0, "trash": 0}
    assert "would free" not in cowfs("du", store, check=True).stdout


def reclaimable(what: Path) -> dict[str, int]:
    last = json.loads(cowfs("du", what, "--json", check=True).stdout.splitlines()[-1])
    found: dict[str, int] = last["reclaimable"]
    return found


@pytest.mark.parametrize("kind", ["image", "directory"])
def test_checkpoints_that_the_tree_is_not_based_on(tmp_path: Path, kind: str) -> None:
    """After the way back, what was later counts as such. Two names of a file count once, in the trash too."""
    script(MAKE, tmp_path)
    store = make_store(tmp_path, kind)
    with mounted(tmp_path / "lower", tmp_path / "mnt", store) as here:
        cowfs("checkpoint", here.path, "one", check=True)
        before = sizes_by_reason(here.path)
        (here.path / "later").write_bytes(b"x" * 300_000)
        os.link(here.path / "later", here.path / "again")
        cowfs("checkpoint", here.path, "two", check=True)
        cowfs("rollback", here.path, "one", check=True)
        (here.path / "taken").write_bytes(b"x" * 200_000)
        os.link(here.path / "taken", here.path / "twice")
        cowfs("revert", here.path, "--all", check=True)
        live = sizes_by_reason(here.path)
    for told in live, sizes_by_reason(store):
        assert 300_000 <= told["checkpoints"] < 400_000
        assert 200_000 <= told["trash"] < 300_000
        assert told.get("overhead", 0) <= before.get("overhead", 0) + 50_000
    assert "checkpoints that the present tree is not based on" in cowfs("du", store, check=True).stdout


def sizes_by_reason(what: Path) -> dict[str, int]:
    found: Counter[str] = Counter()
    for entry in usage(what):
        found[str(entry["reason"])] += int(str(entry["size"]))
    return found


def test_the_treemap_is_a_picture(tmp_path: Path) -> None:
    script(MAKE, tmp_path)
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        script("head -c 100000 /dev/zero | tr '\\0' x >'<big>&'; mkdir d; cp etc/fstab d/small", here.path)
        (tmp_path / "map.svg").write_text("mine")
        refused = cowfs("du", here.path, "--treemap", tmp_path / "map.svg")
        assert (refused.returncode, refused.stdout) == (1, "") and "--force" in refused.stderr
        assert (tmp_path / "map.svg").read_text() == "mine"
        cowfs("du", here.path, "--json", "--treemap", tmp_path / "map.svg", "--force", check=True)
        piped = cowfs("du", here.path, "--treemap", "-", check=True)
        assert (piped.stdout, piped.stderr) == ((tmp_path / "map.svg").read_text(), "")
    root = ElementTree.parse(tmp_path / "map.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    areas = {}
    for rect in root.iter(f"{space}rect"):
        title = rect.find(f"{space}title")
        if title is not None and title.text:
            areas[title.text.partition(": ")[0]] = float(rect.get("width", 0)) * float(rect.get("height", 0))
    assert areas["/"] > areas["<big>&"] > 10 * areas["d"] > 0


def test_what_cannot_be(tmp_path: Path) -> None:
    script(MAKE, tmp_path)
    for words, code, word in (
        (["nothing"], 32, "no such store"),
        (["lower"], 32, "neither a store"),
        (["lower", "--top", "x"], 1, "--top"),
        (["lower", "--force"], 1, "--treemap"),
        (["lower", "--treemap", "-", "--json"], 1, "--treemap -"),
        (["lower", "--treemap", "-", "-z"], 1, "--treemap -"),
    ):
        done = cowfs("du", tmp_path / words[0], *words[1:])
        assert (done.returncode, done.stdout) == (code, "") and word in done.stderr, done
