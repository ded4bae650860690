"""Outputs of a store, with a kill or a full disk at any system call: they are complete or unchanged.

A child of the test does it, and its Nth call that changes a filesystem kills it, or fails; or no file may be
longer than so many bytes.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cowfs import api, backups
from cowfs.errors import CowfsError
from cowfs.exports.how import How
from tests.support.mounts import cowfs, mounted
from tests.support.squashfs import mksquashfs
from tests.support.system import needs_fuse, needs_root, run
from tests.support.tree import Snapshot, snapshot

pytestmark = [needs_root, needs_fuse, pytest.mark.crash, pytest.mark.timeout(900)]

SEED = int(os.environ.get("COWFS_CRASH_SEED", "0")) or random.SystemRandom().randrange(1 << 32)
CALLS = (
    *("pwrite", "write", "mkdir", "symlink", "link", "mknod", "setxattr", "ftruncate", "truncate", "fsync"),
    *("rename", "unlink", "rmdir", "chown", "chmod", "fchown", "fchmod", "utime", "open"),
)
NEEDS_ROOM = {
    "pwrite",
    "write",
    "mkdir",
    "symlink",
    "link",
    "mknod",
    "setxattr",
    "ftruncate",
    "fsync",
    "open",
}
REFUSED, BROKEN, DONE = 3, 4, 0
"""Exit codes of a child: an error for users, another error, success."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lower, stores of both kinds with the same changes, and another store."""
    top = tmp_path_factory.mktemp("outputs")
    for name in ("lower/d/e", "lower/gone/x", "lower/moved"):
        (top / name).mkdir(parents=True)
    for name in ("file", "other", "d/e/f", "gone/x/y", "moved/z"):
        (top / "lower" / name).write_bytes(name.encode() * 2000)
    os.link(top / "lower/file", top / "lower/linked")
    for store in ("store.bs", "store", "old.bs"):
        if store.endswith(".bs"):
            cowfs("create", top / store, "16", check=True)
        with mounted(top / "lower", top / "mnt", top / store) as here:
            (here.path / "new").write_bytes(os.urandom(300_000) if store != "old.bs" else b"old")
            if store == "old.bs":
                continue
            (here.path / "file").write_bytes(b"changed" * 5000)
            os.setxattr(here.path / "other", "user.x", b"y" * 100)
            shutil.rmtree(here.path / "gone")
            (here.path / "moved").rename(here.path / "d/moved")
            (here.path / "made/deep").mkdir(parents=True)
            (here.path / "made/deep/link").symlink_to("../../new")
            os.mknod(here.path / "made/null", 0o020666, os.makedev(1, 3))
            os.link(here.path / "new", here.path / "made/again")
    (top / "disc").mkdir()
    if shutil.which("xorriso"):
        mksquashfs(top / "disc/root.sfs", top / "lower")
        run("xorriso", "-outdev", top / "base.iso", "-map", top / "disc", "/", "-commit")
    return top


def programs_for(*names: str) -> None:
    """Skip the test unless all programs are installed."""
    for name in names:
        if shutil.which(name) is None:
            pytest.skip(f"needs {name}")


@dataclass
class Output:
    """An output: the call that writes it to a place, and what exists there before."""

    write: Callable[[Path, Path], object]
    before: Callable[[Path, Path], object] = lambda made, place: None


def _export(form: str, *, force: bool = False, merged: bool = False) -> Callable[[Path, Path], object]:
    how = How(form, force=force, merged=merged)
    return lambda made, place: api.export(str(made / "store.bs"), str(place / "out"), how)


def _old(_: Path, place: Path) -> None:
    (place / "out").write_bytes(b"old")


OUTPUTS: dict[str, Output] = {
    "tar": Output(_export("tar")),
    "tar in place of another": Output(_export("tar", force=True), _old),
    "gnutar with a list": Output(_export("gnutar")),
    "oci": Output(_export("oci")),
    "overlayfs": Output(_export("overlayfs")),
    "patch": Output(_export("patch", force=True), _old),
    "squashfs": Output(_export("squashfs"), lambda made, place: programs_for("tar2sqfs")),
    "rsync": Output(_export("rsync", force=True), _old),
    "restic": Output(_export("restic")),
    "merged tar": Output(_export("tar", merged=True, force=True), _old),
    "merged oci": Output(_export("oci", merged=True)),
    "merged squashfs": Output(_export("squashfs", merged=True), lambda made, place: programs_for("tar2sqfs")),
    "iso": Output(
        lambda made, place: api.export(
            str(made / "store.bs"), str(place / "out"), How("iso", base=str(made / "base.iso"))
        ),
        lambda made, place: programs_for("xorriso", "tar2sqfs"),
    ),
    "report": Output(lambda made, place: api.report(str(made / "store.bs"), str(place / "out"))),
    "backup": Output(lambda made, place: backups.backup(str(made / "store.bs"), str(place / "out"))),
    "backup of a directory": Output(
        lambda made, place: backups.backup(str(made / "store"), str(place / "out"))
    ),
    "restore": Output(
        lambda made, place: backups.restore(str(made / "store.bs"), str(place / "out"), force=True),
        lambda made, place: shutil.copy(made / "old.bs", place / "out"),
    ),
    "what apply replaces": Output(
        lambda made, place: api.apply(str(made / "store.bs"), str(place / "root"), backup=str(place / "out")),
        lambda made, place: run("cp", "-a", made / "lower", place / "root"),
    ),
}


def _changed(call: str, arguments: tuple[Any, ...]) -> bool:
    if call == "open":
        return bool(arguments[1] & os.O_CREAT) or arguments[1] & os.O_TMPFILE == os.O_TMPFILE
    return True


def _child(work: Callable[[], object], at: int, what: str, tell: int) -> None:
    """Do *work* in this process; call number *at* kills the process or fails. Then exit."""
    count = 0

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal count
            if _changed(name, arguments) and (what != "full" or name in NEEDS_ROOM):
                count += 1
                if count == at:
                    if what == "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **more)

        return call

    real_write = os.write
    code = BROKEN
    try:
        for name in CALLS:
            setattr(os, name, wrapped(name, getattr(os, name)))
        if what == "short":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (at, resource.RLIM_INFINITY))
        work()
        code = DONE
    except (CowfsError, OSError) as error:
        code = REFUSED
        real_write(tell, str(error).encode())
    except BaseException:
        real_write(tell, traceback.format_exc().encode())
    finally:
        real_write(tell, b"\0%d" % count)
        os._exit(code)


def _run(work: Callable[[], object], at: int, what: str) -> tuple[int, str, int]:
    """Run *work* in a child; return its exit code or -signal, its output, and the number of calls."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        _child(work, at, what, write)
    os.close(write)
    with open(read, "rb") as file:
        said, _, count = file.read().partition(b"\0")
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), said.decode(), int(count or 0)


def _seen(place: Path) -> object:
    """Return the content of a place, without what differs between runs."""
    found = {}
    for name in os.listdir(place):
        path = place / name
        if name == "root" or not name.startswith("out"):
            continue
        content = b"" if path.is_dir() else path.read_bytes()
        if content[1080:1082] == b"\x53\xef":  # an image, which has its own UUID
            run("e2fsck", "-fn", path)
            found[name] = _changes(path)
        else:
            found[name] = content or _facts(snapshot(path))
    return found


def _changes(store: Path) -> object:
    with api.open_changes(str(store)) as changes:
        new = changes.after(b"new")
        return [(one.kind, one.path) for one in changes], new and new.read()


def _facts(tree: Snapshot) -> dict[str, object]:
    """Return the facts of a tree that do not depend on its time."""
    known = ("type", "mode", "content", "target", "xattrs")
    return {path: {name: facts.get(name) for name in known} for path, facts in tree.items()}


def _points(count: int, how_many: int, seed: str) -> list[int]:
    chosen = random.Random(seed).choices(range(1, count + 1), k=how_many)
    return sorted(set(chosen) | ({1, count} if how_many > 1 else set()))


def _try(made: Path, top: Path, name: str, how_many: int, seed: int = SEED) -> None:
    output = OUTPUTS[name]

    def fresh() -> Path:
        place = top / "place"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        output.before(made, place)
        return place

    place = fresh()
    before = _seen(place)
    code, said, count = _run(lambda: output.write(made, place), 0, "kill")
    assert code == DONE, said
    whole = _seen(place)
    largest = max((path.stat().st_size for path in place.rglob("*") if path.is_file()), default=0)
    for what, most in (("kill", count), ("full", count), ("short", largest)):
        for at in _points(most, how_many, f"{seed} {name} {what}"):
            told = f"{name}: {what} at {at} of {most} (COWFS_CRASH_SEED={seed})"
            place = fresh()
            code, said, _ = _run(lambda: output.write(made, place), at, what)  # noqa: B023
            assert code in {DONE, REFUSED, -signal.SIGKILL}, f"{told}: {said}"
            now = _seen(place)
            assert now in (before, whole) or name == "gnutar with a list", told
            left = [each for each in os.listdir(place) if each.startswith(".")]
            assert what == "kill" or not left, f"{told}: left {left}"
            with suppress(CowfsError):  # it exists already and is complete
                output.write(made, place)
            assert _seen(place) == whole, told
            assert not [each for each in os.listdir(place) if each.startswith(".")], told


@pytest.mark.parametrize("name", ["tar in place of another", "overlayfs", "report", "restore"])
def test_it_is_whole_or_as_it_was(made: Path, tmp_path: Path, name: str) -> None:
    _try(made, tmp_path, name, 1, seed=1)


@pytest.mark.nightly
@pytest.mark.parametrize("name", OUTPUTS)
def test_it_is_whole_or_as_it_was_at_many_points(made: Path, tmp_path: Path, name: str) -> None:
    _try(made, tmp_path, name, 40)


def _apply(made: Path, top: Path, how_many: int, seed: int = SEED) -> None:
    """Contents are old or new at any end, and the next run completes the work."""
    reference = top / "reference"
    run("cp", "-a", made / "lower", reference)
    old = snapshot(reference)
    _, _, count = _run(lambda: api.apply(str(made / "store.bs"), str(reference)), 0, "kill")
    new = snapshot(reference)
    for what, most in (("kill", count), ("full", count), ("short", 300_000)):
        for at in _points(most, how_many, f"{seed} apply {what}"):
            told = f"{what} at {at} of {most} (COWFS_CRASH_SEED={seed})"
            root = top / "root"
            shutil.rmtree(root, ignore_errors=True)
            run("cp", "-a", made / "lower", root)
            code, said, _ = _run(lambda: api.apply(str(made / "store.bs"), str(root)), at, what)  # noqa: B023
            assert code in {DONE, REFUSED, -signal.SIGKILL}, f"{told}: {said}"
            left = [path for path in root.rglob("*") if ".cowfs-apply-" in path.name]
            assert what == "kill" or not left, f"{told}: left {left}"
            for path, facts in snapshot(root).items():
                if ".cowfs-apply-" not in path and facts.get("content") is not None:
                    known = {tree.get(path, {}).get("content") for tree in (old, new)}
                    assert facts["content"] in known, f"{told}: {path}"
            api.apply(str(made / "store.bs"), str(root))
            assert _facts(snapshot(root)) == _facts(new), told


def test_apply(made: Path, tmp_path: Path) -> None:
    _apply(made, tmp_path, 1, seed=1)


@pytest.mark.nightly
def test_apply_at_many_points(made: Path, tmp_path: Path) -> None:
    _apply(made, tmp_path, 60)
