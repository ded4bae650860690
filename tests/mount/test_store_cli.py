"""cowfs create, grow, check and info on stores, through the command line."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs.linux import safe_paths
from cowfs.store.served.open import open_store
from tests.support.mounts import COWFS, cowfs, eventually, project_root
from tests.support.programs import replaced
from tests.support.system import as_nobody_prefix, needs_root, run

DEV_FUSE_AT_NIGHT = True

MIB = 1 << 20


def refused(done: subprocess.CompletedProcess[str], said: str, code: int = 32) -> None:
    """The command failed with this exit code and with one line that says this."""
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("cowfs: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert said in done.stderr


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "sysrcd.bs"
    cowfs("create", path, "32", check=True)
    return path


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 48 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", place)
    yield place
    run("umount", place)


# --- create


@pytest.mark.parametrize(("text", "size"), [("16", 16), ("20M", 20), ("32768K", 32)])
def test_create_makes_a_whole_ext3(tmp_path: Path, text: str, size: int) -> None:
    path = tmp_path / "sysrcd.bs"
    done = cowfs("create", path, text)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{size} MiB" in done.stdout
    found = path.stat()
    assert found.st_size == size * MIB
    assert found.st_blocks * 512 >= size * MIB, "it is all allocated"
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert run("e2fsck", "-fn", path).returncode == 0
    assert run("blkid", "-p", "-s", "TYPE", "-o", "value", path).stdout == "ext3\n"
    for name in ("upper", "work", "cowfs"):
        shown = run("debugfs", "-R", f"stat {name}", path).stdout
        assert "Type: directory" in shown
        assert "User:     0   Group:     0" in shown
    assert os.listdir(tmp_path) == ["sysrcd.bs"]


def test_anybody_can_create_and_the_content_is_roots(nobody_path: Path) -> None:
    path = nobody_path / "s"
    assert cowfs("create", path, "16", nobody=True).returncode == 0
    assert path.stat().st_uid == (65534 if os.geteuid() == 0 else os.geteuid())
    for name in ("/", "upper", "work", "cowfs", "cowfs/header.json"):
        assert "User:     0   Group:     0" in run("debugfs", "-R", f"stat {name}", path).stdout
    shown = json.loads(cowfs("info", path, "--json", nobody=True, check=True).stdout)
    assert (shown["kind"], shown["size"], shown["state"]) == ("image", 16 * MIB, "clean")
    assert shown["in_use_by"] is None
    done = cowfs("grow", path, "20", nobody=True)
    assert done.returncode == 0, done.stderr
    assert cowfs("check", path, nobody=True).returncode == 0


def test_a_small_store_has_inodes_for_when_it_is_large(tmp_path: Path) -> None:
    cowfs("create", tmp_path / "s", "64", check=True)
    shown = json.loads(cowfs("info", tmp_path / "s", "--json", check=True).stdout)
    assert shown["inodes"] >= 16_000


@pytest.mark.parametrize(
    ("size", "said", "code"),
    [
        ("15", "15 MiB is too small", 1),
        ("x", "is not a size", 1),
        ("-5", "'-5' is negative", 1),
        ("-1.5G", "'-1.5G' is negative", 1),
        ("16T", "too large for ext3", 1),
        ("15T", "are free", 32),
    ],
)
def test_create_refuses_a_size(tmp_path: Path, size: str, said: str, code: int) -> None:
    refused(cowfs("create", tmp_path / "s", size), said, code)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("what", ["file", "directory", "dangling"])
def test_create_replaces_nothing(tmp_path: Path, what: str) -> None:
    path = tmp_path / "s"
    if what == "file":
        path.write_text("mine")
    elif what == "directory":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    hints = {
        "file": "(cowfs grow",
        "directory": "and is a directory (give",
        "dangling": "(give the path of a new file)",
    }
    refused(cowfs("create", path, "16"), f"already exists {hints[what]}")
    assert os.listdir(tmp_path) == ["s"]
    assert what != "file" or path.read_text() == "mine"


def test_create_needs_the_directory(tmp_path: Path) -> None:
    refused(cowfs("create", tmp_path / "no" / "s", "16"), f"the directory {tmp_path}/no does not exist")


@needs_root
def test_create_without_room_leaves_nothing(small: Path, nobody_path: Path) -> None:
    refused(cowfs("create", small / "s", "64"), "needs 64 MiB more, but only 48 MiB are free")
    assert os.listdir(small) == []
    refused(cowfs("create", nobody_path / "no/s", "16", nobody=True), "does not exist")
    nobody_path.chmod(0o555)
    os.chown(nobody_path, 0, 0)
    refused(cowfs("create", nobody_path / "s", "16", nobody=True), "Permission denied")


def test_create_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    with replaced(tmp_path / "bin", mke2fs="echo mke2fs: no luck >&2; exit 1"):
        refused(cowfs("create", place / "s", "16"), "mke2fs")
    assert os.listdir(place) == []


def test_create_names_the_missing_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cowfs.errors import SystemFailure
    from cowfs.store.e2fsprogs import tools as store_tools

    monkeypatch.setattr("shutil.which", lambda name, path: None)
    with pytest.raises(SystemFailure, match=r"mke2fs is not installed .apt install e2fsprogs"):
        store_tools.program("mke2fs")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_create_that_is_stopped_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    place = tmp_path / "place"
    place.mkdir()
    # A shell's background jobs ignore SIGINT, and so would what is started from here then.
    with (
        replaced(tmp_path / "bin", mke2fs=f"touch {tmp_path}/started; exec sleep 60"),
        subprocess.Popen(
            ["env", "--default-signal=INT", *COWFS, "create", place / "s", "16"],
            env={**os.environ, "PYTHONPATH": project_root()},
            stderr=subprocess.DEVNULL,
        ) as process,
    ):
        eventually((tmp_path / "started").exists, "mke2fs was started")
        process.send_signal(number)
        assert process.wait(20) != 0
    assert os.listdir(place) == []


def test_create_without_o_tmpfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAT has no nameless files and no hard links."""
    from cowfs.errors import StoreError
    from cowfs.linux import files
    from cowfs.store.offline.create import create_store

    real_open = os.open

    def fat_open(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "Operation not supported")
        return real_open(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", fat_open)
    create_store(str(tmp_path / "one"), 16 * MIB)
    assert os.listdir(tmp_path) == ["one"]

    def no_flags(*_: object) -> None:
        (tmp_path / "two").touch()
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(files, "renameat2", no_flags)
    with pytest.raises(StoreError, match="already exists"):
        create_store(str(tmp_path / "two"), 16 * MIB)
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]
    assert (tmp_path / "two").stat().st_size == 0
    monkeypatch.setattr(files, "renameat2", lambda *_: (_ for _ in ()).throw(OSError(22, "Invalid")))
    create_store(str(tmp_path / "three"), 16 * MIB)
    assert (tmp_path / "three").stat().st_size == 16 * MIB


def test_zeros_that_are_written_to_allocate_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on FAT and NFS 3, where that takes long."""
    from cowfs.linux import files
    from cowfs.store.offline.create import create_store

    def refused(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(files, "fallocate", refused)
    written: list[int] = []
    create_store(str(tmp_path / "store"), 16 * MIB, tick=written.append)
    assert sum(written) == 16 * MIB
    assert len(written) > 1


def test_mke2fs_fails(tmp_path: Path) -> None:
    """Its last line says why, also while it tells how far it is."""
    with replaced(
        tmp_path / "bin",
        mke2fs='case " $* " in *" -q "*) exit 2;; esac; printf 1/2; echo; echo no luck; exit 1',
    ):
        refused(cowfs("create", tmp_path / "store", "16"), "mke2fs failed: no luck")
    assert not (tmp_path / "store").exists()


# --- grow


def content_of(path: Path) -> str:
    return run("debugfs", "-R", "cat upper/kept", path).stdout


def keep(path: Path) -> None:
    """Put a file into the store."""
    source = path.with_name("source")
    source.write_text("kept")
    run("debugfs", "-w", "-R", f"write {source} upper/kept", path)
    source.unlink()


def filesystem_of(path: Path) -> int:
    return int(json.loads(cowfs("info", path, "--json", check=True).stdout)["size"])


def test_grow_keeps_what_is_there(store: Path) -> None:
    keep(store)
    done = cowfs("grow", store, "300M")
    assert (done.returncode, done.stderr) == (0, "")
    assert "resized to 300 MiB" in done.stdout
    assert (store.stat().st_size, filesystem_of(store)) == (300 * MIB, 300 * MIB)
    assert store.stat().st_blocks * 512 >= 300 * MIB
    assert run("e2fsck", "-fn", store).returncode == 0
    assert content_of(store) == "kept"


def test_grow_by_an_amount(store: Path) -> None:
    assert cowfs("grow", store, "+16M", check=True).stdout == f"{store}: resized to 48 MiB\n"
    refused = cowfs("grow", store, "+none")
    assert (refused.returncode, refused.stderr.count("'none' is not a size")) == (1, 1)


def test_grow_to_the_size_it_has_is_no_error(store: Path) -> None:
    for size in ("32", "32M", None):
        done = cowfs("grow", store, *([size] if size else []))
        assert (done.returncode, done.stdout) == (0, f"{store}: resized to 32 MiB\n")


def test_grow_refuses_a_smaller_size(store: Path) -> None:
    refused(cowfs("grow", store, "16"), "is 32 MiB, larger than the requested 16 MiB")
    assert store.stat().st_size == 32 * MIB


def test_grow_takes_the_size_from_the_filesystem_not_from_what_a_sparse_file_uses(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    run("mke2fs", "-q", "-t", "ext3", path, "64M")
    assert path.stat().st_blocks * 512 < 16 * MIB
    refused(cowfs("grow", path, "32"), "is 64 MiB")
    assert cowfs("grow", path, "80").returncode == 0
    assert filesystem_of(path) == 80 * MIB


def test_grow_fills_a_file_that_was_extended_by_hand(store: Path) -> None:
    os.truncate(store, 48 * MIB + 5)
    refused(cowfs("grow", store, "40"), "the file already has 48.0 MiB, its filesystem 32 MiB")
    assert cowfs("grow", store).returncode == 0
    assert (filesystem_of(store), run("e2fsck", "-fn", store).returncode) == (48 * MIB, 0)
    assert store.stat().st_blocks * 512 >= 48 * MIB


@pytest.mark.parametrize("how", ["exit 8", "kill -9 $$"])
@pytest.mark.parametrize("step", ["e2fsck", "resize2fs"])
def test_grow_can_be_repeated_after_a_failure(store: Path, tmp_path: Path, step: str, how: str) -> None:
    keep(store)
    with replaced(tmp_path / "bin", **{step: f"echo {step}: no luck >&2; {how}"}):
        refused(cowfs("grow", store, "48"), step)
    assert store.stat().st_size == (32 if step == "e2fsck" else 48) * MIB
    assert content_of(store) == "kept"
    assert cowfs("check", "-n", store).returncode == 0, "usable as before"
    assert cowfs("grow", store, "48").returncode == 0
    assert (filesystem_of(store), content_of(store)) == (48 * MIB, "kept")


def test_grow_takes_corrected_errors_for_no_failure(store: Path, tmp_path: Path) -> None:
    with replaced(tmp_path / "bin", e2fsck='$real "$@"; exit 1'):
        assert cowfs("grow", store, "48").returncode == 0
    assert filesystem_of(store) == 48 * MIB


def test_grow_where_the_clock_was_ahead(store: Path, tmp_path: Path) -> None:
    """e2fsck may leave the last mount in the future (e2fsck.conf(5)); resize2fs takes that for unchecked."""
    run("debugfs", "-w", "-R", f"set_super_value mtime @{int(time.time()) + 7200}", store)
    (tmp_path / "conf").write_text("[options]\nbroken_system_clock = true\n")
    with replaced(tmp_path / "bin", e2fsck=f'E2FSCK_CONFIG={tmp_path}/conf exec "$real" "$@"'):
        grown = cowfs("grow", store, "64")
    assert (grown.returncode, grown.stderr) == (0, "")


def test_grow_finishes_what_must_not_be_stopped(store: Path, tmp_path: Path) -> None:
    started, go_on = tmp_path / "started", tmp_path / "go-on"
    os.mkfifo(go_on)
    with (
        replaced(tmp_path / "bin", resize2fs=f'touch {started}; read x <{go_on}; exec $real "$@"'),
        subprocess.Popen(
            [*COWFS, "grow", store, "48"],
            env={**os.environ, "PYTHONPATH": project_root()},
            stdout=subprocess.DEVNULL,
        ) as process,
    ):
        eventually(started.exists, "resize2fs was started")
        process.send_signal(signal.SIGTERM)
        go_on.write_text("on\n")
        assert process.wait(20) == 128 + signal.SIGTERM
    assert filesystem_of(store) == 48 * MIB
    assert run("e2fsck", "-fn", store).returncode == 0


@needs_root
def test_grow_without_room_changes_nothing(small: Path) -> None:
    store = small / "s"
    cowfs("create", store, "32", check=True)
    refused(cowfs("grow", store, "64"), "needs 32 MiB more, but only 16 MiB are free")
    assert store.stat().st_size == 32 * MIB
    assert cowfs("grow", store, "40").returncode == 0


def test_grow_that_runs_out_of_room_after_all_cuts_the_file_back(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cowfs.errors import StoreError
    from cowfs.linux import files
    from cowfs.store.offline.grow import grow_store

    def fail(fd: int, start: int, length: int) -> None:
        os.ftruncate(fd, start + length // 2)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "fallocate", fail)
    with pytest.raises(StoreError, match="cannot allocate 32 MiB: No space left"):
        grow_store(str(store), 64 * MIB)
    assert store.stat().st_size == 32 * MIB


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "no such store"),
        (lambda path: path.write_text("text"), "not a store but a text file"),
        (lambda path: path.touch(), "not a store but an empty file"),
        (lambda path: path.mkdir(), "neither a store nor a cowfs mountpoint"),
        (lambda path: (path / "upper").mkdir(parents=True), "a directory store has no size"),
        (lambda path: run("mke2fs", "-q", "-t", "ext4", path, "16M"), "an ext4 filesystem"),
    ],
)
def test_grow_refuses_what_is_no_image(tmp_path: Path, make: object, said: str) -> None:
    assert callable(make)
    path = tmp_path / "s"
    make(path)
    refused(cowfs("grow", path, "64"), said)


def test_grow_makes_a_store_of_one_that_is_too_small(tmp_path: Path) -> None:
    path = tmp_path / "s"
    run("mke2fs", "-q", "-t", "ext3", path, "12M")
    assert cowfs("grow", path, "20").returncode == 0
    assert filesystem_of(path) == 20 * MIB


@needs_root
def test_nothing_is_done_to_a_store_in_use(store: Path, tmp_path: Path) -> None:
    from cowfs.store.served.open import open_store

    opened = open_store(str(store))
    refused(cowfs("grow", store, "48"), f"in use by process {os.getpid()}")
    refused(cowfs("check", store), f"in use by process {os.getpid()}", 8)
    refused(cowfs("check", "-n", store), f"in use by process {os.getpid()}", 8)
    assert "in use" in cowfs("info", store).stdout
    opened.close()
    at = tmp_path / "at"
    at.mkdir()
    run("mount", "-o", "loop", store, at)
    refused(cowfs("grow", store, "48"), f"mounted on {at}")
    run("umount", at)
    eventually(lambda: not safe_paths.loop_users(store), "the loop device is detached")
    assert cowfs("grow", store, "48").returncode == 0


# --- info


def test_info_of_an_image(store: Path) -> None:
    shown = json.loads(cowfs("info", store, "--json", check=True).stdout)
    assert shown["path"] == str(store)
    assert (shown["format"], shown["version"], shown["lowers"]) == ("overlayfs", 1, [])
    assert shown["used"] + shown["free"] < shown["size"] == 32 * MIB
    assert 0 < shown["free_inodes"] < shown["inodes"]
    assert shown["created_by"].startswith("cowfs ")


def test_info_of_a_directory(nobody_path: Path) -> None:
    path = nobody_path / "s"
    opened = open_store(str(path))
    path.chmod(0o755)
    shown = json.loads(cowfs("info", path, "--json", nobody=True, check=True).stdout)
    assert (shown["kind"], shown["format"], shown["state"]) == ("directory", "overlayfs", "in use")
    assert f"process {os.getpid()}" in shown["in_use_by"]
    opened.close()
    assert json.loads(cowfs("info", path, "--json", check=True).stdout)["in_use_by"] is None
    refused(cowfs("info", nobody_path), "neither a store nor a cowfs mountpoint")


def test_info_tells_other_formats(tmp_path: Path) -> None:
    path = tmp_path / "s"
    run("mke2fs", "-q", "-t", "ext3", path, "16M")
    for request, told in (("quit", "none yet"), ("mkdir etc", "foreign"), ("mkdir .wh..wh.aufs", "aufs")):
        run("debugfs", "-w", "-R", request, path)
        assert json.loads(cowfs("info", path, "--json", check=True).stdout)["format"] == told


@needs_root
def test_what_we_may_not_read_is_named(store: Path, nobody_path: Path) -> None:
    copy = nobody_path / "s"
    copy.write_bytes(store.read_bytes())
    copy.chmod(0o600)
    refused(cowfs("info", copy, nobody=True), "cannot be read: Permission denied")
    refused(cowfs("grow", copy, "48", nobody=True), "no permission")
    refused(cowfs("check", copy, nobody=True), "no permission", 8)
    copy.chmod(0o644)
    assert cowfs("check", "-n", copy, nobody=True).returncode == 0
    assert as_nobody_prefix()
    os.chown(copy, 65534, 65534)
    nobody_path.chmod(0o755)
    os.chown(nobody_path, 0, 0)
    done = cowfs("shrink", copy, nobody=True)
    refused(done, f"cannot be written: Permission denied (it needs a new file in {nobody_path})", 2)


@pytest.mark.parametrize("command", ["create", "grow", "check"])
def test_help_has_an_example(command: str) -> None:
    shown = cowfs(command, "--help", check=True).stdout
    assert f"cowfs {command} " in shown.split("example")[1]


def test_check_says_it_in_json(store: Path) -> None:
    done = cowfs("check", "-n", "--json", store)
    assert json.loads(done.stdout) == {
        "version": 1,
        "store": str(store),
        "state": "clean",
        "exit_code": 0,
        "contents_checked": True,
        "problems": [],
    }


def test_quiet_commands_say_nothing_but_what_is_wrong(tmp_path: Path) -> None:
    store = tmp_path / "s"
    commands: list[list[str | Path]] = [
        ["create", store, "32"],
        ["grow", "-q", store, "48"],
        ["check", store],
    ]
    for arguments in commands:
        done = cowfs(*arguments, "--quiet", check=True)
        assert done.stdout + done.stderr == ""
    refused(cowfs("create", "--quiet", store, "32"), "s: ")
