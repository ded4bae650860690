"""Modules that others made, loaded into root's mounts: nobody gains rights by them."""

from __future__ import annotations

import os
import stat
from contextlib import closing
from pathlib import Path

import pytest

from tests.security.test_swaps import Watch
from tests.support.mounts import cowfs, mounted
from tests.support.system import NOBODY, needs_fuse, needs_root, run

pytestmark = [needs_root, needs_fuse]


@pytest.fixture
def module(nobody_path: Path) -> Path:
    """A user's image with a program that would run as root, and a directory that is open to all."""
    top = nobody_path / "module"
    (top / "closed").mkdir(parents=True)
    (top / "closed").chmod(0o777)
    (top / "program").write_bytes(b"#!/bin/sh\n")
    (top / "program").chmod(0o4755)
    image = nobody_path / "evil.sb"
    run("mksquashfs", top, image, "-quiet", "-all-root")
    os.chown(image, NOBODY, NOBODY)
    return image


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    (tmp_path / "lower/closed").mkdir(parents=True)
    (tmp_path / "lower/closed/secret").write_text("secret")
    (tmp_path / "lower/closed").chmod(0o700)
    return tmp_path / "lower"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ((), "the mount allows set-user-ID"),
        (("nosuid", "nodev"), "keeps"),
    ],
)
def test_a_users_module_gives_nobody_rights(
    lower: Path, module: Path, tmp_path: Path, options: tuple[str, ...], why: str
) -> None:
    with mounted(lower, tmp_path / "mnt", tmp_path / "store", options=[*options, "allow_other"]) as here:
        done = cowfs("lower", "add", here.path, module)
        assert done.returncode == 32 and done.stderr.count("\n") == 1, done
        assert f"belongs to uid {NOBODY}" in done.stderr and why in done.stderr, done
        assert (
            not (here.path / "program").exists() and here.path.joinpath("closed").stat().st_mode & 0o77 == 0
        )
        copy = tmp_path / "own.sb"
        copy.write_bytes(module.read_bytes())
        cowfs("lower", "add", here.path, copy, check=True)
        assert (here.path / "program").stat().st_mode & 0o7777 == 0o4755


@pytest.mark.nightly
def test_a_module_that_root_trusts(lower: Path, module: Path, tmp_path: Path) -> None:
    with mounted(lower, tmp_path / "mnt", tmp_path / "store") as here:
        cowfs("lower", "add", "--trust", here.path, module, check=True)
        assert (here.path / "program").exists()
        cowfs("lower", "remove", here.path, module, check=True)
    with mounted(lower, tmp_path / "mnt", tmp_path / "store", options=["noallow_other,nosuid,nodev"]) as here:
        cowfs("lower", "add", here.path, module, check=True)


def test_a_link_of_anothers_to_a_module(lower: Path, module: Path, nobody_path: Path, tmp_path: Path) -> None:
    (tmp_path / "own.sb").write_bytes(module.read_bytes())
    link = nobody_path / "link"
    link.symlink_to(tmp_path / "own.sb")
    os.chown(link, NOBODY, NOBODY, follow_symlinks=False)
    with mounted(lower, tmp_path / "mnt", tmp_path / "store") as here:
        done = cowfs("lower", "add", here.path, link)
        assert done.returncode == 32 and f"belongs to uid {NOBODY}" in done.stderr, done


def test_nobody_else_loads_modules(lower: Path, module: Path, nobody_path: Path, tmp_path: Path) -> None:
    with mounted(lower, nobody_path / "mnt", tmp_path / "store", options=["allow_other"]) as here:
        done = cowfs("lower", "add", here.path, module, nobody=True)
        assert done.returncode and not (here.path / "program").exists(), done
        cowfs("lower", "add", "--trust", here.path, module, check=True)
        done = cowfs("lower", "remove", here.path, module, nobody=True)
        assert done.returncode and "belongs to" in done.stderr, done
        assert (here.path / "program").exists()


def test_a_device_is_not_opened(lower: Path, nobody_path: Path, tmp_path: Path) -> None:
    """A user's link leads to a watchdog: to open it is to restart the machine."""
    device = tmp_path / "device"
    os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    (nobody_path / "link.sb").symlink_to(device)
    with mounted(lower, tmp_path / "mnt", tmp_path / "store") as here, closing(Watch()) as watch:
        watch.add(device)
        for what in ("add", "remove"):
            done = cowfs("lower", what, here.path, nobody_path / "link.sb")
            assert done.returncode and done.stderr.count("\n") == 1, done
        assert watch.seen() == []
