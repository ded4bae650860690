"""``-o blame`` and ``cowfs blame``: who made, wrote, renamed and removed a file, and who may ask."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from cowfs.api import blame, histories
from tests.mount.test_watch import lay
from tests.support.mounts import Mounted, cowfs, eventually, force_umount, is_mounted, mounted
from tests.support.system import NOBODY, as_nobody_prefix, needs_fuse, needs_root, run
from tests.support.watching import watching

DEV_FUSE_AT_NIGHT = True
pytestmark = needs_fuse
_IS_ROOT = os.geteuid() == 0
KINDS = ["image", "directory", "fakeroot", "kernel"]


def store_of(kind: str, place: Path) -> Path:
    """Make a store of some kind."""
    if kind in {"image", "kernel"}:
        if not (place / "s.bs").exists():
            cowfs("create", place / "s.bs", "64", check=True)
        return place / "s.bs"
    (place / "store").mkdir(mode=0o700, exist_ok=True)
    if kind == "fakeroot" and _IS_ROOT:
        os.chown(place / "store", NOBODY, NOBODY)
    return place / "store"


@contextmanager
def recording(kind: str, place: Path, *options: str, **more: Any) -> Iterator[Mounted]:
    """A mount that records, with a store of some kind."""
    lower = place / "lower" if (place / "lower").exists() else lay(place)
    nobody = kind == "fakeroot" and _IS_ROOT
    if kind == "fakeroot":
        options = (*options, "fakeroot")
    more = {"engine": "kernel"} | more if kind == "kernel" else more
    store = store_of(kind, place)
    with mounted(lower, place / "mnt", store, options=["blame", *options], nobody=nobody, **more) as made:
        yield made


def shell(mount: Mounted, script: str) -> str:
    """Run a script in the mount by a shell of its own; return its command line, for a person."""
    command = ["sh", "-euc", script]
    run(*(as_nobody_prefix() if mount.nobody else []), *command, cwd=None if mount.nobody else mount.path)
    return shlex.join(command)


def told(
    *arguments: str | os.PathLike[str], nobody: bool = False, code: int = 0
) -> dict[str, dict[str, Any]]:
    """Return what ``cowfs blame`` prints for one path, by kind."""
    done = cowfs("blame", *arguments, "--json", nobody=nobody)
    assert done.returncode == code, done.stderr
    entries = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(entry["version"] == 1 for entry in entries)
    assert len({entry["path"] for entry in entries}) <= 1
    return {entry["what"]: entry for entry in entries}


def words(deed: dict[str, Any]) -> str:
    """Return the last argument of a command line, by which these tests tell processes apart."""
    return str(deed["process"]["command"][-1])


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[needs_root, pytest.mark.nightly] if kind == "kernel" else ())
        for kind in KINDS
    ],
)
def test_first_and_last_of_each_also_when_unmounted(kind: str, nobody_path: Path) -> None:
    with recording(kind, nobody_path) as mount:
        at = shlex.quote(os.fspath(mount.path))
        first, second, third = (
            f"cd {at}; echo {number} >> etc/hosts; echo {number} >> made"
            for number in ("one", "two", "three")
        )
        for script in (first, second, third, f"cd {at}; exec mv made moved", f"cd {at}; exec rm moved"):
            shell(mount, script)

        def check(*where: str | os.PathLike[str]) -> None:
            hosts = told(*where, "etc/hosts", nobody=mount.nobody)
            assert hosts.keys() == {"written"}
            assert [words(hosts["written"][which]) for which in ("first", "last")] == [first, third]
            moved = told(*where, "moved", nobody=mount.nobody)
            assert moved.keys() == {"made", "written", "renamed", "removed"}
            assert words(moved["made"]["first"]) == first and moved["made"]["first"]["path"] == "made"
            assert [words(moved["written"][which]) for which in ("first", "last")] == [first, third]
            assert moved["renamed"]["last"]["process"]["command"] == ["mv", "made", "moved"]
            assert moved["removed"]["last"]["process"]["command"] == ["rm", "moved"]
            assert moved["removed"]["last"]["process"]["uid"] == (NOBODY if mount.nobody else os.geteuid())
            assert told(*where, "made", nobody=mount.nobody)["renamed"]["last"]["to"] == "moved"
            assert told(*where, "large", nobody=mount.nobody, code=1) == {}

        check(mount.path)
        paths = cowfs(
            "blame", mount.path / "moved", mount.path / "etc/hosts", nobody=mount.nobody, check=True
        ).stdout
        assert re.findall(r"^\S+", paths, re.MULTILINE) == ["moved", "etc/hosts"]
    check(store_of(kind, nobody_path))


def test_data_that_is_written_by_other_calls_than_write(nobody_path: Path) -> None:
    with recording("image", nobody_path) as mount:
        for path, command in (("copy", "cp etc/hosts copy"), ("large", "fallocate -p -l 4096 large")):
            shell(mount, f"exec {command}")
            last = told(mount.path, path)["written"]["last"]
            assert (last["operations"], last["process"]["command"]) == (["write"], command.split())


def test_a_program_that_becomes_another_one(nobody_path: Path) -> None:
    """The same process, and no time in between."""
    with recording("image", nobody_path) as mount:
        shell(mount, "echo a > a; exec sh -c 'echo b > b; exec touch c'")
        made = [told(mount.path, name)["made"]["last"] for name in "abc"]
        assert len({deed["process"]["pid"] for deed in made}) == 1
        assert made[1]["process"]["command"][:2] == ["sh", "-c"]
        assert made[2]["process"]["command"] == ["touch", "c"]


def test_what_goes_on_quickly_is_recorded_too(nobody_path: Path) -> None:
    """A process that changes one file again and again, in different ways, and then another one."""
    script = """
import os
for name in ("a", "b"):
    with open(name, "w") as file:
        file.write("x")
        file.flush()
        os.fchmod(file.fileno(), 0o600)
        os.utime(file.fileno(), (1, 1))
    os.chown("a", 1, 1)
os.rename("b", "c")
os.chmod("c", 0o644)
"""
    with recording("image", nobody_path) as mount:
        subprocess.run([sys.executable, "-c", script], cwd=mount.path, check=True)
        assert told(mount.path, "a")["attributes"]["last"]["operations"] == ["chmod", "chown", "utimes"]
        assert told(mount.path, "a")["written"]["last"]["operations"] == ["write"]
        assert told(mount.path, "b")["attributes"]["last"]["operations"] == ["chmod", "utimes"]
        assert told(mount.path, "c")["attributes"]["last"]["path"] == "c"
        assert told(mount.path, "c")["made"]["last"]["path"] == "b"
    shown = cowfs("blame", nobody_path / "s.bs", "a", "-z", check=True).stdout.split("\0")
    assert shown[:3] == ["a", "made", "first"] and (len(shown) - 1) % 12 == 0


def test_directories_that_were_renamed_and_names_that_were_used_again(nobody_path: Path) -> None:
    with recording("image", nobody_path) as mount:
        shell(mount, "mkdir -p d/e; echo 1 > d/e/f")
        shell(mount, "mv d/e g; echo 2 > g/other; mv g h")
        shell(mount, "mkdir -p d/e; echo 3 > d/e/f; rm d/e/f")
        assert "echo 1" in words(told(mount.path, "h/f")["made"]["first"])
        assert told(mount.path, "h/f")["made"]["first"]["path"] == "d/e/f"
        assert "echo 2" in words(told(mount.path, "h/other")["written"]["last"])
        again = told(mount.path, "d/e/f")
        assert "echo 3" in words(again["written"]["last"]) and "removed" in again

        def paths(*arguments: str | Path) -> list[str]:
            done = cowfs("blame", *arguments, "--json", check=True)
            return list(dict.fromkeys(json.loads(line)["path"] for line in done.stdout.splitlines()))

        shell(mount, "mkdir 'h/a*' h/ab; echo 4 > 'h/a*/new'; mv 'h/a*/new' 'h/a*/f.conf'; touch h/ab/f")
        below = ["h", "h/a*", "h/a*/f.conf", "h/ab", "h/ab/f", "h/f", "h/other"]
        assert paths(mount.path / "h", "-r") == paths(mount.path, "h", "-r") == below
        assert paths(mount.path, "-r") == ["d", "d/e", "d/e/f", *below]  # not what was only renamed
        assert paths(mount.path / "h/a*", "-r") == ["h/a*", "h/a*/f.conf"]
        assert paths(mount.path, "h/a*") == ["h/a*", "h/a*/f.conf", "h/ab", "h/ab/f"]
        assert paths(mount.path, "*.conf") == ["h/a*/f.conf"]
        (conf,) = blame(str(mount.path), [b"*.conf"])[0]
        assert conf.first["made"].path == b"h/a*/new" and conf.last["renamed"].to == b"h/a*/f.conf"
        with patch("cowfs.api._AT_ONCE", 2):
            pieces = [piece for piece, _ in histories(str(mount.path), [b""], recursive=True)]
        assert [len(piece) for piece in pieces] == [2, 2, 2, 2, 2]
        assert [each for piece in pieces for each in piece] == blame(str(mount.path), [b""], recursive=True)[
            0
        ]
        nothing = cowfs("blame", mount.path, "*.none")
        assert (nothing.returncode, nothing.stdout) == (
            1,
            "",
        ) and "nothing is recorded since" in nothing.stderr


def test_a_file_that_an_editor_puts_in_the_place_of_another(nobody_path: Path) -> None:
    with recording("image", nobody_path) as mount:
        shell(mount, "echo 1 > .new; rm .new")  # the name of another file, once
        shell(mount, "echo 2 >> etc/hosts")
        shell(mount, "echo 3 > .new; mv .new etc/hosts")
        hosts = told(mount.path, "etc/hosts")
        assert hosts.keys() == {"made", "written", "renamed"}
        assert "echo 2" in words(hosts["written"]["first"]) and "echo 3" in words(hosts["written"]["last"])
        assert "echo 3" in words(hosts["made"]["first"])


def test_command_lines_that_would_harm(nobody_path: Path) -> None:
    hostile = "\x1b[2J\n\r\tetc/hosts\udcff\u202e" + "x" * 100_000
    with recording("image", nobody_path) as mount:
        for number in range(30):
            command = [sys.executable, "-c", f"open('file{number}', 'w')", hostile + str(number)]
            subprocess.run(command, cwd=mount.path, check=True)
        shown = cowfs("blame", mount.path, "file29", check=True).stdout
        assert len(shown.splitlines()) == 3 and all(line.isprintable() for line in shown.splitlines())
        assert len(shown) < 2000
        process = told(mount.path, "file0")["made"]["last"]["process"]
        assert process["command"][3].startswith("\x1b[2J\n\r\tetc/hosts\ufffd\u202exxx")
        assert len(process["command"][3]) < 4096


def test_records_outlive_the_daemon(nobody_path: Path) -> None:
    with recording("image", nobody_path, quiet=False) as mount:
        (mount.path / "new").mkdir()
        assert told(mount.path, "new").keys() == {"made"}
        os.kill(mount.pid(), signal.SIGKILL)
        eventually(lambda: cowfs("blame", mount.path, "new").returncode == 32, "it has died")
        for asked in (("blame", mount.path, "new"), ("diff", mount.path / "new")):
            assert "daemon is dead" in cowfs(*asked).stderr
        assert "daemon is dead" in cowfs("export", mount.path, nobody_path / "tar", "--to", "tar").stderr
        force_umount(mount.path)
    with recording("image", nobody_path) as mount:
        assert told(mount.path, "new").keys() == {"made"}
        (mount.path / "newer").mkdir()
    with mounted(
        nobody_path / "lower", nobody_path / "mnt", nobody_path / "s.bs"
    ) as mount:  # does not record
        (mount.path / "new").rmdir()
        assert told(mount.path, "newer").keys() == told(mount.path, "new").keys() == {"made"}


@pytest.mark.nightly
def test_a_memory_store_records_while_it_grows(tmp_path: Path) -> None:
    with mounted(lay(tmp_path), tmp_path / "mnt", options=["blame", "size=600M"]) as mount:
        (mount.path / "early").mkdir()
        with open(mount.path / "huge", "wb") as file:
            for _ in range(200):
                file.write(os.urandom(1 << 20))
        (mount.path / "late").mkdir()
        assert told(mount.path, "early").keys() == told(mount.path, "late").keys() == {"made"}


@needs_root
def test_only_the_owner_may_read_them(nobody_path: Path) -> None:
    with recording("directory", nobody_path) as mount:
        (mount.path / "new").mkdir()
        done = cowfs("blame", mount.path, "new", nobody=True)
        assert done.returncode == 32 and "belongs to another user" in done.stderr
    store = nobody_path / "store"
    assert (store / "cowfs/blame").stat().st_mode & 0o7777 == 0o600
    os.chmod(store, 0o755)
    done = cowfs("blame", store, "new", nobody=True)
    assert done.returncode == 32 and done.stderr.count("\n") == 1 and done.stdout == ""
    os.chmod(store / "cowfs/blame", 0o666)
    done = cowfs("mount", nobody_path / "lower", nobody_path / "mnt", "--store", store)
    assert done.returncode == 32 and "write to cowfs/blame" in done.stderr


def test_stores_without_records(nobody_path: Path) -> None:
    lower = lay(nobody_path)
    with mounted(lower, nobody_path / "mnt", nobody_path / "store") as mount:
        (mount.path / "new").mkdir()
        for where in (mount.path, mount.path / "new"):
            done = cowfs("blame", where, *(["new"] if where == mount.path else []))
            assert done.returncode == 32 and "mount with -o blame" in done.stderr, done.stderr
        assert cowfs("blame", mount.path).returncode == 1
    done = cowfs("blame", nobody_path / "store", "new")
    assert done.returncode == 32 and "mount with -o blame" in done.stderr
    done = cowfs("blame", nobody_path / "store")
    assert done.returncode == 1 and "no path given" in done.stderr
    done = cowfs("blame", nobody_path / "missing", "new")
    assert done.returncode == 32 and "no such store" in done.stderr
    done = cowfs("blame", lower / "large", "new")
    assert done.returncode == 32 and done.stderr.count("\n") == 1


def test_damaged_records_are_begun_anew(nobody_path: Path) -> None:
    with recording("directory", nobody_path) as mount:
        (mount.path / "new").mkdir()
    (nobody_path / "store/cowfs/blame").write_bytes(b"no records")
    done = cowfs("blame", nobody_path / "store", "new")
    assert done.returncode == 32 and "damaged" in done.stderr and done.stderr.count("\n") == 1
    with recording("directory", nobody_path) as mount:
        assert "damaged; started a new one" in mount.said
        (mount.path / "newer").mkdir()
        assert told(mount.path, "newer").keys() == {"made"}
        assert "since" in cowfs("blame", mount.path, "new").stderr


def test_a_full_store_is_mounted_and_says_that_nothing_is_recorded(nobody_path: Path) -> None:
    cowfs("create", nobody_path / "s.bs", "16", check=True)
    with (
        mounted(lay(nobody_path), nobody_path / "mnt", nobody_path / "s.bs", quiet=False) as mount,
        pytest.raises(OSError),
        open(mount.path / "huge", "wb", buffering=0) as file,
    ):
        while True:
            file.write(bytes(1 << 16))
    with recording("image", nobody_path, quiet=False) as mount:
        assert "changes are not recorded" in mount.said and "No space left" in mount.said
        (mount.path / "huge").unlink()
        done = cowfs("blame", mount.path, "huge")
        assert done.returncode == 32 and "mount with -o blame" in done.stderr
    (nobody_path / "mnt.log").unlink()
    with recording("image", nobody_path) as mount:  # there is room now
        (mount.path / "new").mkdir()
        assert told(mount.path, "new").keys() == {"made"}


def test_recording_and_watching_at_once(nobody_path: Path, tmp_path: Path) -> None:
    with recording("image", nobody_path) as mount, watching(mount.path, tmp_path) as watch:
        with open(mount.path / "file", "w") as file:
            file.write("x")
            file.flush()
            os.fchmod(file.fileno(), 0o600)
            os.fchmod(file.fileno(), 0o644)
        assert watch.wait_for("chmod", "file")[:2] == [("create", "file"), ("write", "file")]
        eventually(lambda: watch.changes().count(("chmod", "file")) == 2, "each change of the mode")
        watch.process.send_signal(signal.SIGINT)
        assert watch.end()[0] == 0
        (mount.path / "after").mkdir()
        assert told(mount.path, "file").keys() == {"made", "written", "attributes"}
        assert told(mount.path, "after").keys() == {"made"}
    assert not is_mounted(nobody_path / "mnt")
