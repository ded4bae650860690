"""``cowfs info`` as people read it, of stores and of mounts; and what a user's stores have special."""

from __future__ import annotations

import json
import os
import re
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from cowfs.store.format.identity import identify_lower
from cowfs.store.served.open import open_store
from tests.support.mounts import cowfs, is_mounted, mounted
from tests.support.system import as_nobody_prefix, makes_user_namespaces, needs_root, run

DEV_FUSE_AT_NIGHT = True

ROOM = re.compile(r"[\d.]+ [KMGT]iB on its filesystem")


def info(what: Path, *, nobody: bool = False) -> dict[str, str]:
    """What ``cowfs info`` prints, by the words before the colons."""
    lines = cowfs("info", what, nobody=nobody, check=True).stdout.splitlines()
    return {key: value.strip() for key, value in (line.split(":", 1) for line in lines)}


def facts(what: Path, *, nobody: bool = False) -> dict[str, object]:
    shown = json.loads(cowfs("info", what, "--json", nobody=nobody, check=True).stdout)
    assert isinstance(shown, dict)
    return shown


@pytest.fixture
def base(nobody_path: Path) -> Path:
    """A place with a lower and a mountpoint, all of it the unprivileged user's."""
    (nobody_path / "lower/etc").mkdir(parents=True)
    (nobody_path / "lower/etc/conf").write_text("old\n")
    (nobody_path / "mnt").mkdir()
    if os.geteuid() == 0:
        run("chown", "-R", "65534:65534", nobody_path)
    return nobody_path


def test_an_image_has_a_size_for_people_and_bytes_for_programs(tmp_path: Path) -> None:
    cowfs("create", tmp_path / "s.bs", "32", check=True)
    shown = info(tmp_path / "s.bs")
    assert re.fullmatch(r"[\d.]+ KiB of 2\d\.\d MiB \(0 %\)", shown["used"]), shown["used"]
    assert shown["size"] == "32 MiB"
    assert re.fullmatch(r"\d+ of 8192 are free", shown["inodes"])
    assert facts(tmp_path / "s.bs")["size"] == 32 << 20


def test_times_are_local(base: Path) -> None:
    with mounted(base / "lower", base / "mnt", base / "s"):
        cowfs("checkpoint", base / "mnt", "one", check=True)
    zone = {"TZ": "XXX-05:30"}
    created = datetime.fromisoformat(str(facts(base / "s")["created"])) + timedelta(hours=5.5)
    shown = cowfs("info", base / "s", env=zone, cold=True, check=True).stdout
    assert f"created:     {created:%Y-%m-%d %H:%M:%S}\n" in shown
    told = json.loads(cowfs("checkpoints", base / "s", "--json", check=True).stdout)["checkpoints"]
    taken = datetime.fromisoformat(told[0]["taken"]) + timedelta(hours=5.5)
    listed = cowfs("checkpoints", base / "s", env=zone, cold=True, check=True).stdout
    assert listed == f"* {taken:%Y-%m-%d %H:%M:%S}  one\n"


def test_a_lower_is_told_as_path_and_description(tmp_path: Path) -> None:
    (tmp_path / "lower").mkdir()
    lower = identify_lower(str(tmp_path / "lower"))
    store = open_store(str(tmp_path / "dir"), lowers=[lower])
    store.bind([lower])
    store.close()
    shown = info(tmp_path / "dir")
    assert shown["lower"] == f"{tmp_path}/lower ({lower.description})"
    assert lower.fingerprint not in str(shown)
    assert lower.fingerprint in json.dumps(facts(tmp_path / "dir"))


def test_of_a_directory_it_tells_what_is_free_the_same_for_store_and_mount(base: Path) -> None:
    with mounted(base / "lower", base / "mnt", base / "store", nobody=True) as mount:
        of_mount, of_store = info(mount.path, nobody=True), info(base / "store", nobody=True)
    for shown in (of_mount, of_store):
        assert ROOM.fullmatch(shown["free"]), shown
        assert "used" not in shown
        assert shown["lower"].startswith(f"{base}/lower (directory on ")
    # Others write to the disk meanwhile: the first digits must do.
    assert of_mount["free"].split()[1:] == of_store["free"].split()[1:]
    assert facts(base / "store")["used"] is None


@needs_root
def test_roots_store_in_memory_has_a_size(base: Path) -> None:
    with mounted(base / "lower", base / "mnt", engine="kernel", options=["size=8M"]) as mount:
        shown = info(mount.path)
    assert re.fullmatch(r"\d+ KiB of 8 MiB \(0 %\)", shown["used"]), shown["used"]
    assert shown["store"] == "in memory (lost at the unmount)"


def test_a_users_store_in_memory_has_a_size_too(base: Path) -> None:
    with mounted(base / "lower", base / "mnt", options=["size=32M"], nobody=True) as mount:
        shown = info(mount.path, nobody=True)
    assert re.fullmatch(r"[\d.]+ (KiB|MiB) of \d+(\.\d)? MiB \(\d+ %\)", shown["used"]), shown["used"]
    assert shown["store"] == "in memory (lost at the unmount)"


def test_a_size_that_nobody_would_keep_is_refused(base: Path) -> None:
    done = cowfs("mount", base / "lower", base / "mnt", "-o", "size=1M", nobody=True)
    assert done.returncode == 1
    assert "memory: 1 MiB is too small for a store" in done.stderr
    done = cowfs("mount", base / "lower", base / "mnt", "-o", f"size=1M,store={base}/store", nobody=True)
    assert done.returncode == 1
    assert "size= applies only to a store in memory" in done.stderr
    assert not is_mounted(base / "mnt")
    assert sorted(os.listdir(base)) == ["lower", "mnt"]


def test_a_users_store_goes_to_the_kernel_and_back(base: Path) -> None:
    """In a user namespace the kernel mounts it with userxattr, and leaves work directories with mode 0."""
    if not makes_user_namespaces():
        pytest.skip("no namespace of users can be made here")
    with mounted(base / "lower", base / "mnt", base / "store", nobody=True):
        pass
    (base / "kernel").write_text(
        "mount -t overlay overlay mnt -o "
        "lowerdir=lower,upperdir=store/upper,workdir=store/work,userxattr,index=on && echo new >mnt/etc/conf"
    )
    done = run(
        *as_nobody_prefix(), "unshare", "--map-root-user", "--mount", "sh", "kernel", cwd=base, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (base / "store/work/work").stat().st_mode & 0o777 == 0, "or this tests nothing"
    done = cowfs("diff", base / "store", nobody=True)
    assert done.returncode == 0, done.stderr
    assert "etc/conf" in done.stdout
    with mounted(base / "lower", base / "mnt", base / "store", nobody=True) as mount:
        done = run(*as_nobody_prefix(), "cat", mount.path / "etc/conf")
    assert done.stdout == "new\n"


def test_a_text_file_is_no_lower(base: Path) -> None:
    done = cowfs("mount", base / "lower/etc/conf", base / "mnt", nobody=True)
    assert done.returncode == 32
    assert f"{base}/lower/etc/conf: not a squashfs image but a text file" in done.stderr
