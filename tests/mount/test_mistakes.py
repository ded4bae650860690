"""Mistakes of people at the command line: one line says what is wrong, and what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs.cli.main import SUBCOMMANDS
from tests.support import tree
from tests.support.mounts import COWFS, Mounted, cowfs, mounted, project_root
from tests.support.system import needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True

pytestmark = needs_fuse


@pytest.fixture
def here(nobody_path: Path) -> Iterator[Mounted]:
    """A union with one change, on an image."""
    tree.build(nobody_path / "lower", {"etc/file": b"x\n"})
    cowfs("create", nobody_path / "store.bs", "16", check=True)
    with mounted(nobody_path / "lower", nobody_path / "mnt", nobody_path / "store.bs") as here:
        (here.path / "new").write_text("new\n")
        yield here


def said(*words: str | os.PathLike[str], code: int, nobody: bool = False) -> str:
    """Run cowfs; it must fail with *code* and one line, which is returned without ``cowfs: ``."""
    done = cowfs(*words, nobody=nobody)
    assert done.returncode == code, done
    assert done.stdout == "" and done.stderr.startswith("cowfs: ") and done.stderr.count("\n") == 1, done
    return done.stderr.removeprefix("cowfs: ").rstrip("\n")


NOT_PIPED = "cannot be standard output (give a name; ./- is a file of this name)"
EMPTY, UNSET = "an empty argument was given for", ": is a shell variable unset?"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mont", "lower", "mnt"], "unknown subcommand 'mont'; did you mean 'mount'?"),
        (["umuont", "mnt"], "unknown subcommand 'umuont'; did you mean 'umount'?"),
        (["difff"], "unknown subcommand 'difff'; did you mean 'diff'?"),
        (["crate", "s.bs", "16"], "unknown subcommand 'crate'; did you mean 'create'?"),
        (
            ["mount", "/usr", "/mnt", "--stroe", "s.bs"],
            "unknown option --stroe; did you mean --store? (see `cowfs mount --help`)",
        ),
        (
            ["mount", "/usr", "/mnt", "s.bs"],
            "too many arguments; to use s.bs as the store, write --store s.bs (see `cowfs mount --help`)",
        ),
        (["create", "64M", "s.bs"], "64M: the store comes before its size (cowfs create s.bs 64M)"),
        (["grow", "+64", "s.bs"], "+64: the store comes before its size (cowfs grow s.bs +64)"),
        (["mount", "/usr", "/mnt", "--store="], f"{EMPTY} --store{UNSET} (see `cowfs mount --help`)"),
        (["umount", ""], f"{EMPTY} MOUNTPOINT{UNSET} (see `cowfs umount --help`)"),
        (["grow", "", "1G"], f"{EMPTY} STORE{UNSET} (see `cowfs grow --help`)"),
        (["umount", "/mnt", ""], f"an empty argument was given{UNSET} (see `cowfs umount --help`)"),
        (["diff", "/mnt", "--store", "s"], "unrecognized arguments: --store s (see `cowfs diff --help`)"),
        (
            ["diff", "/mnt", "--only"],
            "unknown option --only; did you mean --name-only? (see `cowfs diff --help`)",
        ),
        (["/mnt", "diff", "-p"], "diff: the subcommand comes first (cowfs diff /mnt -p)"),
        (["lower", "mnt"], "lower: 'mnt' is neither add nor remove (see `cowfs lower --help`)"),
        (
            ["find", os.fsdecode(b"\xff")],
            "'\\xff' is not off, alldev or the path of a store (write off, alldev, /PATH, or alldev,/PATH)",
        ),
        (["create", "-", "16"], f"-: {NOT_PIPED}"),
        (["backup", "s.bs", "-"], f"-: {NOT_PIPED}"),
        (["restore", "s.bs", "-"], f"-: {NOT_PIPED}"),
        (["persist", "/mnt", "-"], f"-: {NOT_PIPED}"),
        (["run", "--root", "/", "--keep", "-", "--", "true"], f"--keep -: {NOT_PIPED}"),
        (["apply", "s.bs", "/mnt", "--backup", "-"], f"--backup -: {NOT_PIPED}"),
        (["rebase", "s.bs", "--onto", "/", "--conflicts", "-"], f"--conflicts -: {NOT_PIPED}"),
        (["mount", "/etc", "/mnt", "-o", "log=-"], f"log=-: {NOT_PIPED}"),
        (["-q", "difff"], "unknown subcommand 'difff'; did you mean 'diff'?"),
        (["-z", "diff"], "-z: no subcommand before it (cowfs SUBCOMMAND [OPTION]...; see `cowfs --help`)"),
    ],
)
def test_a_mistyped_command_line_says_what_is_wrong(words: list[str], message: str) -> None:
    assert said(*words, code=1) == message


def test_a_word_like_none_is_no_subcommand_and_no_lower() -> None:
    message = said("frobnicate", "x", code=1)
    assert "'frobnicate' is neither a subcommand nor an existing lower" in message


def test_a_lower_with_a_path_is_no_subcommand(tmp_path: Path) -> None:
    assert f"{tmp_path}/mont: no such lower" in said(tmp_path / "mont", tmp_path, code=32)


def test_a_lower_called_lower_needs_a_path(tmp_path: Path) -> None:
    (tmp_path / "lower").mkdir()
    done = cowfs("lower", "mnt", cwd=str(tmp_path))
    message = "lower: 'mnt' is neither add nor remove (write ./lower for a lower of this name)"
    assert (done.returncode, done.stderr) == (1, f"cowfs: {message}\n")


def test_a_store_in_use_names_its_mountpoint(here: Mounted, tmp_path: Path) -> None:
    lower, store = here.path.parent / "lower", here.path.parent / "store.bs"
    message = said("mount", lower, tmp_path, "--store", store, code=32)
    assert f"in use by process {here.pid()}, mounted at {here.path} (cowfs umount {here.path})" in message
    assert f"mounted at {here.path}" in said("check", store, code=8)


@pytest.mark.parametrize("subcommand", ["info", "diff", "grow", "vacuum"])
def test_an_ordinary_directory_is_neither_store_nor_mountpoint(tmp_path: Path, subcommand: str) -> None:
    size = ["64"] if subcommand == "grow" else []
    (tmp_path / "file").touch()
    message = said(subcommand, tmp_path, *size, code=32)
    assert message.startswith(f"{tmp_path}: neither a store nor a cowfs mountpoint (cowfs list "), message


def test_a_directory_in_a_mount_names_the_mount(here: Mounted) -> None:
    (here.path / "directory").mkdir()
    for subcommand in ("info", "du", "umount"):
        message = said(subcommand, here.path / "directory", code=32)
        assert f"(it is inside the mount at {here.path}: give that)" in message
    store = here.path.parent / "store.bs"
    for words in (["lower", "add"], ["persist"]):
        message = said(*words, store, here.path, code=1)
        order = f"cowfs {' '.join(words)} {here.path} {store}"
        assert message == f"{store}: the mountpoint comes first ({order})"
    message = said("umount", store, code=32)
    assert f"(its mountpoint is {here.path}: give that)" in message


def test_an_amount_to_add_says_what_is_wrong_with_the_store(tmp_path: Path) -> None:
    assert "neither a store nor a cowfs mountpoint (" in said("grow", tmp_path, "+16M", code=32)
    assert "/none: no such store" in said("grow", tmp_path / "none", "+16M", code=32)
    shrinks = "-16M: grow makes a store larger (cowfs shrink STORE SIZE makes it smaller)"
    assert said("grow", tmp_path / "none", "-16M", code=1) == shrinks


def test_what_cannot_be_made_names_what_to_do(here: Mounted, tmp_path: Path) -> None:
    lower, missing = here.path.parent / "lower", tmp_path / "no/store"
    hint = "No such file or directory (choose a directory in which you can create it)"
    assert said("mount", lower, tmp_path, "--store", missing, code=32).endswith(f"created: {hint}")


def test_check_of_what_is_no_store(here: Mounted, tmp_path: Path) -> None:
    assert said("check", "", code=16).startswith(f"{EMPTY} STORE")  # 1 would mean that it was repaired
    assert said("check", tmp_path, code=8).startswith(f"{tmp_path}: not a store")
    assert said("check", here.path, code=8).startswith(f"{here.path}: is a mountpoint, not a store")


def test_a_colon_in_the_name_of_a_lower(here: Mounted, tmp_path: Path) -> None:
    name = tmp_path / "co:lon"
    name.mkdir()
    (tmp_path / "other").mkdir()
    for lower in (name, f"{tmp_path / 'other'}:{name}", f"{name}:{tmp_path / 'other'}"):
        message = said("mount", lower, tmp_path / "other", code=1)
        assert message.startswith(f"{name}: a colon separates lowers") and r"co\:lon" in message
    assert r"co\:lon" in said("diff", here.path.parent / "store.bs", "--lower", name, code=1)


@needs_root
def test_a_mount_of_root_is_not_an_ordinary_users_to_unmount(here: Mounted) -> None:
    message = said("umount", here.path, code=32, nobody=True)
    assert message == (
        f"{here.path}: this mount belongs to another user (uid 0) (run this as that user, or as root)"
    )


@needs_root
def test_options_are_advised_in_the_spelling_of_the_caller(tmp_path: Path) -> None:
    tree.build(tmp_path, {"one/file": b"x\n", "two/file": b"y\n", "mnt/x": b""})
    store = tmp_path / "store"
    mount = ["mount", str(tmp_path / "one"), str(tmp_path / "mnt")]
    other = ["mount", str(tmp_path / "two"), str(tmp_path / "mnt")]
    with mounted(tmp_path / "one", tmp_path / "mnt", store):
        pass
    assert "--force-lower" in said(*other, "--store", store, code=32)
    message = said(*other, "-o", f"store={store}", code=32)
    assert "-o force_lower" in message and "--force" not in message
    choices: list[tuple[list[str], str]] = [([], "use --store"), (["-o", ""], "use -o store=FILE")]
    for options, advice in choices:
        done = cowfs(*mount, *options, check=True)
        try:
            assert advice in done.stderr
        finally:
            cowfs("umount", tmp_path / "mnt", check=True)


def test_a_removed_current_directory_is_named(tmp_path: Path) -> None:
    for name in ("lower", "mnt"):
        (tmp_path / name).mkdir()
    absolute = ["mount", f"{tmp_path}/lower", f"{tmp_path}/mnt", "--store", f"{tmp_path}/store"]
    commands = (
        ["info", "x"],
        ["create", "x.bs", "16"],
        ["mount", "x", "y"],
        ["diff", "x"],
        ["check", "x"],
        absolute,
    )
    for words in commands:
        (tmp_path / "gone").mkdir()
        script = 'cd "$0" && rmdir "$0" && exec "$@"'
        done = subprocess.run(
            ["/bin/sh", "-c", script, tmp_path / "gone", *COWFS, *words],
            env={**os.environ, "PYTHONPATH": project_root()},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        lines = [line for line in done.stderr.splitlines() if "getcwd" not in line]
        if words is absolute:
            cowfs("umount", tmp_path / "mnt", check=True)
            assert (done.returncode, lines) == (0, []), done
            continue
        assert done.returncode == (8 if words[0] == "check" else 2) and len(lines) == 1, done
        assert lines[0].startswith("cowfs: the current directory has been removed ("), done


@needs_root
def test_without_proc_that_is_said() -> None:
    script = f'mount -t tmpfs none /proc; exec {sys.executable} -m cowfs.cli.main "$@"'
    done = run("unshare", "-m", "sh", "-c", script, "sh", "list", check=False)
    expected = "cowfs: /proc/self/mountinfo: No such file or directory (is /proc mounted?)\n"
    assert (done.returncode, done.stderr) == (2, expected)


@needs_root
def test_a_removed_current_directory_is_not_needed_in_a_sandbox(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    words = [*COWFS, "run", "--root", "/", "--discard", "--", "pwd"]
    script = 'cd "$0" && rmdir "$0" && exec "$@"'
    env = {**os.environ, "PYTHONPATH": project_root()}
    command = ["/bin/sh", "-c", script, str(tmp_path / "gone"), *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "/\n"), done.stderr


def outcome(line: str, where: str) -> tuple[int, str]:
    """Return the exit code and standard error of cowfs with its standard output sent to *where*."""
    done = subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {where}', "sh", *COWFS, *line.split()],
        env={**os.environ, "PYTHONPATH": project_root()},
        stderr=subprocess.PIPE, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


def test_a_standard_output_that_takes_nothing(here: Mounted) -> None:
    full = "cowfs: cannot write to standard output: No space left on device\n"
    closed = "cowfs: cannot write to standard output: it is closed\n"
    mount, store = here.path, here.path.parent / "store.bs"
    for line in ("info", "info --json", "diff", "diff -p", "diff --stat", "diff --exit-code", "top -n 1"):
        assert outcome(f"{line} {mount}", ">/dev/full") == (2, full), line
    for line in ("--help", "diff --help", "--version"):
        assert outcome(line, ">/dev/full") == (2, full), line
    for line in (f"info {mount}", f"diff {mount}", "--help"):
        assert outcome(line, ">&-") == (2, closed), line
    for line, code in ((f"info {store}.not", 32), ("mount -o stroe=x a b", 1), (f"check {mount}", 8)):
        assert outcome(line, "2>/dev/full") == (code, ""), line
    cowfs("umount", mount, check=True)
    assert outcome(f"check -n {store}", ">/dev/full") == (8, full)
    assert outcome(f"check -n {store}", ">&-") == (8, closed)


def test_closed_descriptors_are_not_given_to_a_store(nobody_path: Path) -> None:
    """The daemon puts /dev/null in place of the first three: its store must not be one of them."""
    tree.build(nobody_path, {"lower/file": b"x\n", "mnt/x": b""})
    places = map(str, (nobody_path / "lower", nobody_path / "mnt", "--store", nobody_path / "s.bs"))
    mount = [*COWFS, "mount", *places]
    cowfs("create", nobody_path / "s.bs", "16", check=True)
    subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *mount],
        env={**os.environ, "PYTHONPATH": project_root()}, timeout=60, check=True,
    )  # fmt: skip
    try:
        (nobody_path / "mnt/new").write_text("new\n")
    finally:
        cowfs("umount", nobody_path / "mnt", check=True)
    assert cowfs("diff", nobody_path / "s.bs", check=True).stdout == "A  new\n"


def test_the_help_fits_a_screen() -> None:
    done = subprocess.run(
        [*COWFS, "--help"],
        env={**os.environ, "PYTHONPATH": project_root(), "COLUMNS": "80"},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80, done.stdout


@pytest.mark.parametrize("name", [name for name in SUBCOMMANDS if name not in {"find", "list"}])
def test_what_is_missing_is_named_with_where_to_read_of_it(name: str) -> None:
    done = cowfs(name)
    assert done.returncode == (16 if name == "check" else 1) and done.stderr.count("\n") == 1, done
    assert done.stderr.endswith(f"(see `cowfs {name} --help`)\n")
    assert ", PATH" not in done.stderr and "|GLOB" not in done.stderr  # they may be left out
