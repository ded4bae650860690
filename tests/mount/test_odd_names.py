"""Names that mean something to a shell, a library or a terminal are only names, in every place of a union."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from cowfs.cli.options import join_lowers, split, split_lowers
from cowfs.errors import UsageError
from cowfs.linux.mount_table import mount_of, parse_mountinfo
from tests.support.mounts import cowfs, mounted, project_root
from tests.support.system import as_nobody_prefix, needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True

NAMES = [
    "a,b", "a:b", "a\\b", "a\\", "\\,:", "-x", "--help", "%s%n%(x)s", "a b", " ", "é",
    os.fsdecode(b"\xff\xfe"),
    "new\nline", "car\rriage", "tab\t", "\x1b[31mred", "\\040", "a=b,suid", "#x", '"q"', "$(x)`y`", "*?[a]",
]  # fmt: skip


def quoted(name: str) -> str:
    """Quote a name for the value of an option."""
    return name.replace("\\", "\\\\").replace(",", "\\,")


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_lists_are_split_as_they_are_joined(name: str) -> None:
    assert split_lowers(join_lowers([name, "x", name])) == (name, "x", name)
    assert split(f"rw,store={quoted(name)},ro") == ["rw", f"store={name}", "ro"]


def test_an_empty_lower_is_refused() -> None:
    for lowers in ("a:", ":a", "a:b:", "::a", "a:::b", "a::b:c"):
        with pytest.raises(UsageError, match=f"{lowers}: "):
            split_lowers(lowers)
    for command in (["mount", "a:", "/nowhere"], ["diff", "--lower", "a:", "/"]):
        done = cowfs(*command)
        assert done.returncode == 1 and done.stderr.startswith("cowfs: a:: an empty lower ("), done


def test_a_backslash_before_anything_else_is_one() -> None:
    assert split_lowers("a\\b:c\\") == ("a\\b", "c\\")
    assert split("store=a\\b,ro") == ["store=a\\b", "ro"]


def test_mountinfo_is_one_line_a_mount() -> None:
    """The kernel escapes only newlines of all that ends lines, and commas only in names."""
    line = (
        b"36 35 98:0 / /mnt/a\rb\x0b\x0c\x85\\012c rw - overlay x\ry rw,upperdir=/a\\054b,workdir=/c\\134d\n"
    )
    (mount,) = parse_mountinfo(line)
    assert mount.mountpoint == b"/mnt/a\rb\x0b\x0c\x85\nc"
    assert mount.super_words == ("rw", "upperdir=/a,b", "workdir=/c\\d")


@needs_fuse
@pytest.mark.parametrize(
    ("name", "nobody"),
    [
        *((name, False) for name in NAMES[::2]),
        *((name, True) for name in NAMES[::8]),
        *(pytest.param(name, False, marks=pytest.mark.nightly) for name in NAMES[1::2]),
        *(pytest.param(name, True, marks=pytest.mark.nightly) for name in NAMES[4::8]),
    ],
    ids=ascii,  # a worker could not report a byte that is no character
)
def test_every_part_of_a_union(nobody_path: Path, nobody: bool, name: str) -> None:
    """A lower, the mountpoint, a directory store and the log, named relative to where we are."""
    if os.geteuid() != 0 and not nobody:
        pytest.skip("needs root")
    lower, at, store, log = (f"{name}{number}" for number in range(4))
    for made in (lower, at):
        (nobody_path / made).mkdir()
    (nobody_path / lower / "file").write_text("x\n")
    run("chown", "-R", f"{65534 if nobody else 0}", nobody_path)

    def here(*arguments: str) -> subprocess.CompletedProcess[str]:
        done = cowfs(*arguments, nobody=nobody, cwd=str(nobody_path), timeout=30)
        assert done.returncode == 0, done.stderr
        said = done.stdout + done.stderr
        assert "Traceback" not in said and not re.search(r"[^\n -~é]", said), said
        return done

    options = f"store={quoted(store)},log={quoted(log)}"
    mounted_with = here("mount", "-o", options, "--", join_lowers([lower]), at)
    assert mounted_with.stderr.count("\n") <= 1  # nosuid,nodev: why
    try:
        found = mount_of(nobody_path / at)
        assert found is not None
        assert found.source == os.fsencode(join_lowers([str(nobody_path / lower)]))
        assert (nobody_path / log).exists()
        run(*(as_nobody_prefix() if nobody else []), "touch", nobody_path / at / name)
        assert here("diff", "--", at).stdout.count("\n") == 1
        lines = here("info", "--", at).stdout.splitlines()
        assert len([line for line in lines if line.startswith(("mounted at:", "lower:", "store:"))]) == 3
        here("info", "--json", "--", at)
    finally:
        here("umount", "--", at)
    assert os.listdir(os.fsencode(nobody_path / store / "upper")) == [os.fsencode(name)]
    for command in ("info", "check", "diff"):
        here(command, "--", store)


@needs_fuse
@needs_root
def test_many_long_lowers(tmp_path: Path) -> None:
    """Their names together are longer than a source may be."""
    lowers = [tmp_path / f"{number:0200}" for number in range(30)]
    for lower in lowers:
        lower.mkdir()
        (lower / lower.name).touch()
    with mounted(lowers, tmp_path / "mnt") as here:
        assert len(os.listdir(here.path)) == 30


@needs_fuse
@needs_root
@pytest.mark.parametrize("name", ["a b", "c,d\\", "-o", "e:f"])
def test_mount_helpers(tmp_path: Path, name: str) -> None:
    """Call the helpers as mount(8) and umount(8) do."""
    helpers = Path(project_root(), "mount-helpers")
    for number in range(2):
        (tmp_path / f"{name}{number}").mkdir()
    lower, at = join_lowers([f"{name}0"]), f"{name}1"
    options = f"rw,store={quoted(name)}2,log={quoted(name)}3"
    run(helpers / "mount.cowfs", lower, at, "-o", options, cwd=tmp_path)
    assert (tmp_path / f"{name}2/upper").is_dir()
    run(helpers / "umount.cowfs", at, cwd=tmp_path)


@needs_root
@pytest.mark.parametrize("name", ["a,b", "a:b", "a\\b", "a b", "a\nb"])
def test_a_store_that_the_kernel_has_mounted(tmp_path: Path, name: str) -> None:
    """The store is found in the options of the mount, which escape its name."""
    store = tmp_path / name
    for made in ("lower", "mnt"):
        (tmp_path / made).mkdir()
    store.mkdir(mode=0o700)
    escaped = re.sub(r"([,:\\])", r"\\\1", str(store))
    (store / "upper").mkdir()
    (store / "work").mkdir()
    options = f"lowerdir={tmp_path}/lower,upperdir={escaped}/upper,workdir={escaped}/work"
    run("mount", "-i", "-t", "overlay", "overlay", tmp_path / "mnt", "-o", options)
    try:
        done = cowfs("check", "-n", store)
        assert done.returncode != 0 and "in use by the overlay" in done.stderr, done.stderr
    finally:
        run("umount", tmp_path / "mnt")
