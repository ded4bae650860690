"""Stores and lowers that are deleted, renamed, replaced or truncated while mounted are reported."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.mounts import Mounted, cowfs, eventually, is_mounted, mounted
from tests.support.system import as_nobody_prefix, needs_fuse, needs_root, run

pytestmark = [needs_fuse, needs_root]
DEV_FUSE_AT_NIGHT = True


def delete(store: Path) -> None:
    shutil.rmtree(store) if store.is_dir() else store.unlink()


def replace(store: Path) -> None:
    other = store.with_name("other")
    cowfs("create", other, "50", check=True)
    other.rename(store)


def told(mount: Mounted, *words: str) -> None:
    """Info says so at once, the log soon."""
    shown = cowfs("info", mount.path, check=True).stdout
    assert any(word in shown for word in words), shown
    eventually(lambda: any(word in mount.log.read_text() for word in words), f"the log says {words}", 20)


at_night = functools.partial(pytest.param, marks=pytest.mark.nightly)  # they wait 5 s


@pytest.mark.parametrize(
    ("kind", "act", "said"),
    [
        pytest.param("image", delete, "its file was deleted", id="deleted"),
        at_night("image", replace, "its file was deleted", id="replaced"),
        pytest.param("image", lambda store: os.truncate(store, 1 << 20), "truncated", id="truncated"),
        at_night("kernel", delete, "its file was deleted", id="kernel's"),
        at_night("directory", delete, "the directory was deleted", id="directory"),
    ],
)
def test_what_is_lost(tmp_path: Path, kind: str, act: Callable[[Path], object], said: str) -> None:
    (tmp_path / "lower").mkdir()
    store = tmp_path / "store"
    if kind != "directory":
        cowfs("create", store, "50", check=True)
    engine = "kernel" if kind == "kernel" else None
    with mounted(tmp_path / "lower", tmp_path / "mnt", store, engine=engine, quiet=False) as here:
        (here.path / "file").write_text("file")
        act(store)
        told(here, said)
        assert cowfs("umount", here.path).returncode == 32
        assert is_mounted(here.path)
        cowfs("umount", "--force", here.path)
        assert not is_mounted(here.path)
        assert said in here.log.read_text()
    if store.is_file() and act is replace:
        assert run("e2fsck", "-fn", store, check=False).returncode == 0


def rename(store: Path) -> None:
    store.rename(store.with_name("elsewhere"))


def rename_above(store: Path) -> None:
    store.parent.rename(store.parent.with_name("elsewhere"))


def swap(store: Path) -> None:
    """Something else of its kind has its name."""
    rename(store)
    if store.with_name("elsewhere").is_dir():
        store.mkdir()
    else:
        cowfs("create", store, "50", check=True)


def rename_upper(store: Path) -> None:
    (store / "upper").rename(store / "was upper")
    (store / "upper").mkdir()


def rename_work(store: Path) -> None:
    (store / "work").rename(store / "was work")


def content(store: Path) -> dict[str, bytes]:
    files = [store] if store.is_file() else [path for path in store.rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in files}


@pytest.mark.parametrize("nobody", [False, at_night(True)], ids=["root", "nobody"])
@pytest.mark.parametrize(
    ("kind", "act", "said"),
    [
        pytest.param("directory", swap, "the directory was renamed to {}/elsewhere", id="directory"),
        at_night("directory", rename, "the directory was renamed to {}/elsewhere", id="only renamed"),
        at_night("directory", rename_above, "the directory was renamed to {}/elsewhere/store", id="above"),
        at_night(
            "directory", rename_upper, "its upper directory was renamed to {}/store/was upper", id="upper"
        ),
        at_night("directory", rename_work, "its work directory was renamed to {}/store/was work", id="work"),
        at_night("image", swap, "its file was renamed to {}/elsewhere", id="image"),
        at_night("image", rename_above, "its file was renamed to {}/elsewhere/store", id="image above"),
        pytest.param("memory", swap, "its file was renamed to {}/elsewhere", id="persisted"),
        at_night("memory", rename_above, "its file was renamed to {}/elsewhere/store", id="persisted above"),
    ],
)
def test_a_store_elsewhere(
    tmp_path: Path, nobody_path: Path, nobody: bool, kind: str, act: Callable[[Path], object], said: str
) -> None:
    """Everything written goes to the moved store, and nothing to what now has its name."""
    base = nobody_path if nobody else tmp_path
    as_who = as_nobody_prefix() if nobody else []

    def write(file: Path, text: str) -> None:
        run(*as_who, "sh", "-c", 'printf %s "$2" > "$1"', "sh", file, text)

    run(*as_who, "mkdir", base / "lower", base / "in")
    write(base / "lower" / "file", "lower")
    store = base / "in" / "store"
    if kind == "image":
        cowfs("create", store, "50", check=True, nobody=nobody)
    at_first = "memory" if kind == "memory" else store
    with mounted(base / "lower", base / "mnt", at_first, nobody=nobody, quiet=False) as here:
        write(here.path / "file", "before")
        if kind == "memory":
            cowfs("persist", here.path, store, check=True, nobody=nobody)
        assert "MOVED" not in cowfs("info", here.path, check=True, nobody=nobody).stdout
        act(store)
        other = content(store) if store.exists() and act is swap else {}
        write(here.path / "file", "after")
        write(here.path / "new", "new")
        where = base if act is rename_above else base / "in"
        shown = cowfs("info", here.path, check=True, nobody=nobody).stdout
        assert f"MOVED:      {said.format(where)}; the mount continues with what it has open" in shown
        done = cowfs("umount", here.path, nobody=nobody)
        assert (done.returncode, done.stderr) == (
            0,
            f"cowfs: {store}: {said.format(where)}; the mounted file has the changes\n",
        )
    if other:
        assert content(store) == other
    now = base / "elsewhere" / "store" if act is rename_above else base / "in" / "elsewhere"
    if act in {rename_upper, rename_work}:
        now = store
        shutil.rmtree(store / "upper", ignore_errors=True) if act is rename_upper else None
        for part in store.glob("was *"):
            part.rename(store / part.name.removeprefix("was "))
    with mounted(base / "lower", base / "again", now, nobody=nobody) as here:
        assert run(*as_who, "cat", here.path / "file", here.path / "new").stdout == "afternew"


@pytest.mark.nightly
def test_the_log_tells_of_a_store_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "lower").mkdir()
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store", quiet=False) as here:
        (tmp_path / "store").rename(tmp_path / "elsewhere")
        said = f"{tmp_path}/store: the directory was renamed to {tmp_path}/elsewhere; the mount continues"
        eventually(lambda: said in here.log.read_text(), "the log says it", 20)


def test_lowers_elsewhere(tmp_path: Path) -> None:
    """Three lowers, each done something else to; and one that cowfs itself is mounted on is where it was."""
    for name in ("renamed", "replaced", "unmounted", "in place"):
        (tmp_path / name).mkdir()
    run("mount", "-t", "tmpfs", "cowfs-test", tmp_path / "unmounted")
    for name in ("renamed", "replaced", "unmounted", "in place"):
        (tmp_path / name / f"of {name}").write_text(name)
    image = tmp_path / "replaced.sqfs"
    run("mksquashfs", tmp_path / "replaced", image, "-quiet", "-no-progress")
    lowers = [tmp_path / "renamed", image, tmp_path / "unmounted", tmp_path / "in place"]
    with mounted(
        lowers, tmp_path / "in place", tmp_path / "store", log=tmp_path / "log", quiet=False
    ) as here:
        assert "LOST" not in cowfs("info", here.path, check=True).stdout
        (tmp_path / "renamed").rename(tmp_path / "elsewhere")
        (tmp_path / "new").write_bytes(image.read_bytes())
        (tmp_path / "new").rename(image)
        run("umount", "-l", tmp_path / "unmounted")
        said = [line.split(":", 1)[1].strip() for line in shown_lines(here, "LOST")]
        goes_on = "; the mount continues with what it has open"
        assert said == [
            f"{tmp_path}/renamed: the directory was renamed to {tmp_path}/elsewhere{goes_on}",
            f"{image}: its file was deleted or replaced{goes_on}",
            f"{tmp_path}/unmounted: the filesystem that the directory is on was unmounted{goes_on}",
        ]
        for name in ("renamed", "replaced", "unmounted", "in place"):
            assert (here.path / f"of {name}").read_text() == name
        here.umount()


def shown_lines(mount: Mounted, label: str) -> list[str]:
    shown = cowfs("info", mount.path, check=True).stdout
    return [line for line in shown.splitlines() if line.startswith(f"{label}:")]


def test_a_deleted_lower(tmp_path: Path) -> None:
    (tmp_path / "lower").mkdir()
    (tmp_path / "lower" / "file").write_text("file")
    cowfs("create", tmp_path / "store", "50", check=True)
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store", quiet=False) as here:
        shutil.rmtree(tmp_path / "lower")
        told(here, "the directory was deleted")
        (here.path / "new").write_text("new")
        here.umount()
