"""Stores on block devices, and encrypted ones as far as this machine's kernel goes (the rest: tests/boot)."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.mounts import cowfs, mounted
from tests.support.system import needs_root, run

pytestmark = needs_root


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 MiB with nothing on it."""
    backing = tmp_path / "disk"
    with backing.open("wb") as out:
        out.truncate(32 << 20)
    path = Path(run("losetup", "-f", "--show", backing).stdout.strip())
    yield path
    run("blockdev", "--setrw", path)  # it stays as it is for the next disk
    run("losetup", "-d", path)


@pytest.mark.matrix
@pytest.mark.parametrize("engine", ["process", "kernel"])
def test_a_store_takes_a_device(device: Path, tmp_path: Path, engine: str) -> None:
    lower, at, copy = (tmp_path / name for name in ("lower", "at", "copy.bs"))
    lower.mkdir()
    (lower / "old").write_text("lower\n")
    assert cowfs("create", device, check=True).stdout == f"{device}: created an empty 32 MiB store\n"
    assert_refused(("create", device), "holds an ext2, ext3 or ext4 filesystem")
    with mounted(lower, at, device, engine=engine) as here:
        (at / "new").write_bytes(b"n" * (5 << 20))
        (at / "old").unlink()
        assert_refused(("mount", lower, tmp_path, "--store", device), "in use by process")
        if engine == "process":
            assert run("mount", device, lower, check=False).returncode == 32
            cowfs("backup", at, copy, check=True)
            assert_refused(("trim", at), "keeps its size")
        else:
            assert_refused(("grow", at), "the kernel has it mounted")
    if engine == "process":
        assert "A  new" in cowfs("diff", copy, "--lower", lower, check=True).stdout
    run("mount", device, at)
    try:
        for command in ("mount", lower, tmp_path, "--store", device), ("check", device), ("grow", device):
            assert_refused(command, "mounted on")
    finally:
        run("umount", at)
    with (tmp_path / "disk").open("r+b") as out:
        out.truncate(48 << 20)
    run("losetup", "-c", device)
    assert_refused(("grow", device, "64"), "the device has only 48 MiB")
    assert "48 MiB" in cowfs("grow", device, check=True).stdout
    assert_refused(("shrink", device), "keeps its size")
    with mounted(lower, at, device, engine=engine) as here:
        assert os.listdir(here.path) == ["new"]
        assert (at / "new").stat().st_size == 5 << 20
    assert "clean" in cowfs("check", "-n", device, check=True).stdout
    run("blockdev", "--setro", device)
    assert_refused(("mount", lower, at, "--store", device), f"{device}: is on read-only media")
    with mounted(lower, at, device, engine=engine, options=["ro"]) as here:
        assert os.listdir(here.path) == ["new"]


def assert_refused(command: Sequence[str | Path], why: str) -> None:
    done = cowfs(*command)
    assert done.returncode != 0, done
    assert why in done.stderr, done


def test_a_device_is_found_by_its_label(device: Path, tmp_path: Path) -> None:
    label = f"cow{secrets.token_hex(6)}"  # blkid(8) remembers which device had which
    run("mke2fs", "-q", "-t", "ext3", "-L", label, device)
    lower = tmp_path / "lower"
    lower.mkdir()
    with mounted(lower, tmp_path / "at", f"LABEL={label}") as here:
        assert f"store:      {device}" in cowfs("info", here.path, check=True).stdout
    missing = cowfs("mount", lower, tmp_path, "--store", "LABEL=no-such-thing")
    assert (missing.returncode, "no such device" in missing.stderr) == (32, True)


@pytest.mark.skipif(shutil.which("cryptsetup") is None, reason="needs cryptsetup (cryptsetup-bin)")
def test_who_cannot_open_an_encrypted_store_is_told_why(nobody_path: Path) -> None:
    store, lower, key = (nobody_path / name for name in ("secret.bs", "lower", "key"))
    lower.mkdir()
    key.write_text("secret")
    with store.open("wb") as out:
        out.truncate(32 << 20)
    run("cryptsetup", "luksFormat", "-q", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", store, key)
    store.chmod(0o666)
    told = cowfs("mount", lower, nobody_path, "--store", store, "--key-file", key, nobody=True).stderr
    assert "only root can open an encrypted store" in told
    assert store.read_bytes()[:4] == b"LUKS"
    if "device-mapper" not in Path("/proc/misc").read_text():
        for command in (
            ("mount", lower, nobody_path, "-o", f"store={store},key_file={key}"),
            ("check", store),
            ("create", "--luks", nobody_path / "new.bs", "64", "--key-file", key),
        ):
            refused = cowfs(*command)
            assert "this kernel has no device mapper" in refused.stderr
            assert refused.returncode == (8 if command[0] == "check" else 2)
        assert not (nobody_path / "new.bs").exists()
