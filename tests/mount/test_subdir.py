"""``-o subdir=``: the changes of several systems in one store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.mount.test_diff_patch import script
from tests.support.mounts import cowfs, mounted
from tests.support.system import needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True

pytestmark = needs_fuse


def made(base: Path, name: str, *, nobody: bool = False) -> Path:
    script(f"mkdir -p {name}; echo {name} >{name}/file; mkdir -p mnt other", base, nobody)
    return base / name


def names(store: Path, *, nobody: bool) -> list[str]:
    return cowfs("diff", store, "--name-only", nobody=nobody, check=True).stdout.split()


@needs_root
@pytest.mark.parametrize(
    "kind",
    [
        "image-nobody",
        *(pytest.param(kind, marks=pytest.mark.nightly) for kind in ("image", "directory", "kernel")),
    ],
)
def test_two_systems_in_one_store(tmp_path: Path, nobody_path: Path, kind: str) -> None:
    nobody = kind == "image-nobody"
    base = nobody_path if nobody else tmp_path
    one, two = (made(base, name, nobody=nobody) for name in ("one", "two"))
    store, at = base / ("store" if kind == "directory" else "store.bs"), base / "mnt"
    if kind != "directory":
        cowfs("create", store, "24", nobody=nobody, check=True)
    engine = "kernel" if kind == "kernel" else None
    for name, lower in (("a", one), ("b", two), ("a", one)):
        options = [f"subdir={name}", *(["blame"] if kind != "kernel" else [])]
        with mounted(lower, at, store, engine=engine, options=options, nobody=nobody):
            script(f"echo {name} >>{name}-new; rm -f file", at, nobody)
            facts = json.loads(cowfs("info", at, "--json", nobody=nobody, check=True).stdout)
            assert facts["store"]["path"] == str(store / name)
    for name, lower in (("a", one), ("b", two)):
        part = store / name
        assert names(part, nobody=nobody) == [f"{name}-new", "file"]
        shown = json.loads(cowfs("info", part, "--json", nobody=nobody, check=True).stdout)
        assert [known["path"] for known in shown["lowers"]] == [str(lower)]
        assert "deleted" in cowfs("explain", part, "file", nobody=nobody).stdout
        assert "in all" in cowfs("du", part, nobody=nobody, check=True).stdout
    cowfs("checkpoint", store / "a", "now", nobody=nobody, check=True)
    cowfs("vacuum", store / "a", nobody=nobody, check=True)
    cowfs("revert", store / "b", "--all", nobody=nobody, check=True)
    for command in (["diff"], ["vacuum"], ["info", "--kernel"]):
        done = cowfs(*command, store, nobody=nobody)
        assert done.returncode and f"{store}/a, {store}/b" in done.stderr, done
    if kind != "directory":
        shown = json.loads(cowfs("info", store, "--json", nobody=nobody, check=True).stdout)
        assert shown["stores"] == ["a", "b"]
    assert names(store / "b", nobody=nobody) == [] and names(store / "a", nobody=nobody)
    if kind != "directory":
        assert cowfs("check", store / "a", nobody=nobody).returncode == 0
    if kind.startswith("image"):
        assert "b-new" in cowfs("blame", store / "b", "b-new", nobody=nobody, check=True).stdout
        with mounted(one, at, store, options=["subdir=a"], nobody=nobody):
            refused = cowfs("mount", two, base / "other", "--store", store, "-o", "subdir=b", nobody=nobody)
            assert refused.returncode and "use" in refused.stderr, refused
            for used in (at, store / "a"):  # a shell that reads the commands must not write to it, too
                done = cowfs("info", used, "--kernel", nobody=nobody)
                assert (done.returncode, done.stdout) == (32, "") and "is in use" in done.stderr, done
        commands = cowfs("info", store / "a", "--kernel", check=True).stdout
        inside = f"set -e\nmount -t tmpfs none /run\nexport MOUNTPOINT={at}\n{commands}\nls {at}"
        assert run("unshare", "-m", "sh", "-c", inside).stdout.split() == ["a-new"]
    wrong = cowfs("mount", two, at, "--store", store, "-o", "subdir=a", nobody=nobody)
    assert wrong.returncode and "belongs to" in wrong.stderr, wrong


@pytest.mark.parametrize(
    ("store", "name", "what"),
    [
        ("s.bs", "upper", "not a name for a store"),
        ("s.bs", "../x", "not a name for a store"),
        ("memory", "../x", "not a name for a store"),
        ("s.bs", "a", "no such store"),
    ],
)
def test_names_that_cannot_be(tmp_path: Path, store: str, name: str, what: str) -> None:
    lower = made(tmp_path, "lower")
    given = store if store == "memory" else tmp_path / store
    done = cowfs("mount", lower, tmp_path / "mnt", "--store", given, "-o", f"subdir={name}")
    assert done.returncode in {1, 32} and what in done.stderr and len(done.stderr.splitlines()) == 1, done


def test_changes_in_memory_that_are_kept_in_one_of_several(tmp_path: Path) -> None:
    """Persisted, they are where the next mount with the same subdir finds them."""
    lower, at, store = made(tmp_path, "lower"), tmp_path / "mnt", tmp_path / "s.bs"
    with mounted(lower, at, options=["subdir=a"]) as here:
        script("echo kept >new", here.path)
        cowfs("persist", here.path, store, "128", check=True)
        script("echo later >later", here.path)
        shown = json.loads(cowfs("info", here.path, "--json", check=True).stdout)
        assert shown["store"]["path"] == str(store / "a")
    assert names(store / "a", nobody=False) == ["later", "new"]
    cowfs("check", "-n", store, check=True)
    with mounted(lower, at, store, options=["subdir=a"]) as here:
        assert (here.path / "new").read_text() == "kept\n"
    copy = tmp_path / "copy.bs"
    copy.write_bytes(store.read_bytes())  # of a store that is not in use: it may be anywhere
    with mounted(lower, at, copy, options=["subdir=a"]) as here:
        assert (here.path / "later").exists()


def test_one_that_is_not_there(tmp_path: Path) -> None:
    cowfs("create", tmp_path / "s.bs", "24", check=True)
    for command in ("info", "diff", "du"):
        done = cowfs(command, tmp_path / "s.bs" / "a")
        assert done.returncode in {1, 32} and "no such store in the image" in done.stderr, (command, done)
