"""``cowfs.mount``: a mount for as long as a block of Python lasts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import pytest
import trio

import cowfs
from cowfs import api
from cowfs.client import facts_of
from cowfs.errors import CowfsError, MountFailure, SystemFailure, UsageError
from cowfs.store.offline.create import create_store
from cowfs.types import Change
from tests.support.mounts import cowfs as command_of
from tests.support.mounts import is_mounted
from tests.support.system import needs_root, run

DEV_FUSE_AT_NIGHT = True


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    lower = tmp_path / "low:er,\\"
    lower.mkdir()
    (lower / "old").write_text("old")
    return lower


def test_a_tree_is_changed_kept_taken_back_and_gone(lower: Path) -> None:
    with cowfs.mount(lower, size="64M") as tree:
        assert is_mounted(tree.path)
        (tree.path / "new").write_text("new")
        assert tree.diff() == [Change("A", b"new")]
        first, second = tree.snapshot(), tree.snapshot()
        (tree.path / "old").unlink()
        assert [(change.kind, change.path) for change in tree.diff()] == [("A", b"new"), ("D", b"old")]
        with pytest.raises(CowfsError, match="a checkpoint of this name already exists"):
            tree.snapshot(first)
        with (tree.path / "new").open(), pytest.raises(CowfsError, match="new: open"):
            tree.rollback(first)
        tree.rollback(first)
        assert (tree.path / "old").read_text() == "old"
        assert [one.name for one in tree.checkpoints()] == [first, second]
    assert not tree.path.exists()
    assert [path.name for path in lower.iterdir()] == ["old"]


def test_changes_are_taken_elsewhere(tmp_path: Path) -> None:
    """All that the commands do, with the functions that they call."""
    old, new, copy = (tmp_path / name for name in ("old", "new", "copy"))
    for root in (old, new, copy):
        root.mkdir()
        (root / "file").write_text("new" if root == new else "old")
        (root / "gone").touch()
    store, saved = str(tmp_path / "store.bs"), str(tmp_path / "saved.bs")
    create_store(store, 16 << 20)
    with cowfs.mount(old, store) as tree:
        (tree.path / "mine").write_text("mine")
        (tree.path / "gone").unlink()
        tree.snapshot("early")
        (tree.path / "file").write_text("changed")
        api.backup(str(tree.path), saved)
        (tree.path / "mine").unlink()
    copied: list[int] = []
    api.restore(saved, store, force=True, tick=copied.append)
    assert sum(copied) > 0
    assert not list(api.export(store, str(tmp_path / "changes.tar"), api.How("tar")))
    with tarfile.open(tmp_path / "changes.tar") as archive:
        assert {*archive.getnames()} == {".", "file", "mine", ".wh.gone"}
    assert api.apply(store, str(copy))[0] == []
    assert sorted(path.name for path in copy.iterdir()) == ["file", "mine"]
    onto = api.Lowers([str(new)])
    would = api.rebase(store, onto, dry_run=True)
    done = api.rebase(store, onto, api.Lowers([str(old)]))
    assert would.told == done.told
    assert [(one.path, one.why) for one in done.conflicts] == [(b"file", "changed in both")]
    assert [one.name for one in api.checkpoints(store)] == ["early"]
    api.delete_checkpoint(store, "early")
    assert api.convert(store, "aufs").whiteouts == 1
    with api.open_changes(store) as changes:
        assert [(one.kind, one.path) for one in changes] == [("M", b"file"), ("D", b"gone"), ("A", b"mine")]


def test_what_was_just_closed_does_not_stop_a_rollback(lower: Path) -> None:
    with cowfs.mount(lower) as tree:
        (tree.path / "new").write_text("new")
        first = tree.snapshot()
        for _ in range(15):
            opened = [(tree.path / "new").open() for _ in range(100)]
            for file in opened:
                file.close()
            tree.rollback(first)


def command_line(tree: Path) -> bytes:
    """Of the daemon that serves a tree."""
    return Path(f"/proc/{facts_of(device_of(tree))['pid']}/cmdline").read_bytes()


def device_of(tree: Path) -> str:
    dev = tree.stat().st_dev
    return f"{os.major(dev)}:{os.minor(dev)}"


def test_a_process_is_kept_warm(lower: Path) -> None:
    """Commands are forks of it: they get arguments, environment and directory, and fail as others do."""
    with cowfs.warm(), cowfs.mount(lower, fsname="one") as tree:
        assert b"cowfs.cli.zygote" in command_line(tree.path)
        (tree.path / "new").write_text("new")
        with pytest.raises(UsageError, match="unknown option 'bogus=1'"), cowfs.mount(lower, bogus=1):
            raise AssertionError("not reached")
        second = cowfs.mount(lower, mountpoint=tree.path)
        with pytest.raises(MountFailure, match="already mounted here"), second:
            raise AssertionError("not reached")
        assert tree.diff() == [Change("A", b"new")]
    assert not tree.path.exists()
    with cowfs.mount(lower) as tree:
        assert b"zygote" not in command_line(tree.path)


def test_a_daemon_that_is_killed_before_it_is_ready() -> None:
    """The fork of the warm process is the daemon itself."""
    with socket.create_server(("127.0.0.1", 0)) as silent, cowfs.warm(), ThreadPoolExecutor() as pool:
        waiting = pool.submit(cowfs.mount(f"http://127.0.0.1:{silent.getsockname()[1]}/x.sqsh").__enter__)
        with silent.accept()[0]:
            (warm,) = children(os.getpid(), b"cowfs.cli.zygote")
            (daemon,) = children(warm, b"cowfs.cli.zygote")
            os.kill(daemon, signal.SIGKILL)
            with pytest.raises(MountFailure, match="cowfs mount was killed"):
                waiting.result(30)


def children(parent: int, program: bytes) -> list[int]:
    """The children of a process that run a program."""
    of_threads = Path(f"/proc/{parent}/task").glob("*/children")
    pids = [int(pid) for listed in of_threads for pid in listed.read_text().split()]
    return [pid for pid in pids if program in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_each_store_of_a_warm_process_is_one_of_its_own(lower: Path, tmp_path: Path) -> None:
    """They are made of one template, and may be kept."""
    kept = tmp_path / "kept.bs"
    with cowfs.warm(), cowfs.mount(lower) as first, cowfs.mount(lower) as second:
        (first.path / "new").write_text("new")
        command_of("persist", first.path, kept, check=True)
        stores = [facts_of(device_of(tree.path))["store"]["uuid"] for tree in (first, second)]
        assert stores[0] != stores[1]
        assert second.diff() == []
    run("e2fsck", "-fn", kept)
    assert command_of("diff", kept).stdout.startswith("A  new\n")


def test_who_is_interrupted_leaves_no_warm_process(lower: Path) -> None:
    program = (
        "import cowfs, sys\n"
        "with cowfs.warm(), cowfs.mount(sys.argv[1]) as tree:\n"
        "    print(tree.path, flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, lower],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        where = process.stdout.readline().strip()
        assert is_mounted(where)
        process.send_signal(signal.SIGINT)
        process.wait(20)
    assert not is_mounted(where)  # and no process is left, which is looked at after each test


AS_ANOTHER = """
import cowfs, os, sys
with cowfs.warm():
    os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
    with cowfs.mount(sys.argv[1], mountpoint=sys.argv[2]) as tree:
        print([line for line in open("/proc/self/mountinfo") if f" {sys.argv[2]} " in line])
    os.mkdir(sys.argv[2] + "/gone"); os.chdir(sys.argv[2] + "/gone"); os.rmdir(sys.argv[2] + "/gone")
    with cowfs.mount(sys.argv[1], mountpoint=sys.argv[2]) as tree:
        print("again", os.listdir(tree.path))
"""


@needs_root
def test_a_warm_process_mounts_for_nobody_else(nobody_path: Path) -> None:
    """Whoever was root when it was begun, and is not any more, does not mount as root."""
    for name in ("lower", "mnt"):
        (nobody_path / name).mkdir()
        os.chown(nobody_path / name, 65534, 65534)
    done = subprocess.run(
        [sys.executable, "-c", AS_ANOTHER, nobody_path / "lower", nobody_path / "mnt"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "user_id=65534" in done.stdout, done.stderr
    assert "again []" in done.stdout, done.stderr  # absolute paths need no current directory


def test_a_store_keeps_what_an_exception_has_cut_off(lower: Path, tmp_path: Path) -> None:
    store, mountpoint = tmp_path / "store", tmp_path / "mnt"
    mountpoint.mkdir()
    with pytest.raises(ZeroDivisionError) as caught, cowfs.mount(lower, store, mountpoint=mountpoint) as tree:
        assert tree.path == mountpoint
        in_use = (tree.path / "new").open("w")
        raise ZeroDivisionError
    assert "busy" in caught.value.__notes__[0]
    assert not is_mounted(mountpoint)
    in_use.close()
    assert (store / "upper/new").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lower": None}, "lower: None is neither a path nor text"),
        ({"lower": [5]}, "lower: 5 is neither a path nor text"),
        ({"lower": ""}, "lower: '' is empty"),
        ({"lower": "a\0b"}, "lower: .* has a null byte"),
        ({"store": ""}, "store: '' is empty"),
        ({"store": b"/none/store"}, "^/none/store: cannot be created"),
        ({"mountpoint": 3}, "mountpoint: 3 is neither a path nor text"),
        ({"fsname": "a\0b"}, "option fsname: .* has a null byte"),
        ({"size": object()}, "option size: .* is neither a path nor text"),
        ({"size": 1.5}, "1.5 MiB is too small"),
        ({"log": Path("/none/log")}, "/none/log: "),
        ({"fault": [5]}, "fault=5: not a fault"),
    ],
)
def test_a_wrong_argument_is_named(lower: Path, given: dict[str, object], message: str) -> None:
    with pytest.raises(CowfsError, match=message), cowfs.mount(**{"lower": lower, **given}):  # type: ignore[arg-type]
        raise AssertionError("not reached")


async def test_a_removed_current_directory_is_named(
    lower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for way in (cowfs.mount("x"), cowfs.mount(lower, "x"), cowfs.mount(lower, mountpoint="x")):
        with pytest.raises(SystemFailure, match="current directory has been removed"), way:
            raise AssertionError("not reached")
    with pytest.raises(SystemFailure, match="current directory has been removed"):
        async with cowfs.mount_async("x"):
            raise AssertionError("not reached")
    with pytest.raises(SystemFailure, match="current directory has been removed"), api.open_changes("x"):
        raise AssertionError("not reached")


@pytest.mark.parametrize(
    ("options", "error"), [({"nonsense": True}, UsageError), ({"store": "/etc/passwd"}, MountFailure)]
)
def test_what_cannot_be_mounted_is_an_error_of_its_class(
    lower: Path, options: dict[str, bool | str], error: type[Exception]
) -> None:
    with pytest.raises(error, match=r"nonsense|/etc/passwd"), cowfs.mount(lower, **options):  # type: ignore[arg-type]
        pass


async def test_cancelling_unmounts(lower: Path) -> None:
    with trio.CancelScope() as scope:
        async with cowfs.mount_async(lower) as tree:
            assert await tree.snapshot() == "snapshot-1"
            (tree.path / "old").unlink()
            assert [change.kind for change in await tree.diff()] == ["D"]
            await tree.rollback("snapshot-1")
            assert await tree.diff() == []
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert not tree.path.exists()


def test_importing_the_package_imports_nothing_else() -> None:
    """Root's Python is not isolated before that, and would run a module of the current directory."""
    program = "import sys; before = {*sys.modules}; import cowfs; print({*sys.modules} - before)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "{'cowfs'}"


def test_type_checkers_read_the_types_of_the_package() -> None:
    assert (resources.files("cowfs") / "py.typed").is_file()
