"""``cowfs find`` shows the same store and devices that the boot library would use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cowfs.cli.main import main
from cowfs.errors import UsageError
from cowfs.linux.loop_devices import attach_loop
from cowfs.linux.mounts import umount2
from cowfs.store.disks import find
from cowfs.store.disks.block_device import DEFAULT
from tests.boot import images
from tests.boot.test_options import DEVICES, OPTIONS, System
from tests.support.mounts import cowfs, mounted
from tests.support.system import needs_root, run


@pytest.mark.parametrize("case", DEVICES)
@pytest.mark.parametrize("scope", ["removable", "all"])
def test_devices_are_those_of_the_boot_library(tmp_path: Path, case: str, scope: str) -> None:
    disks, removable, everything = DEVICES[case]
    system = System(tmp_path / "system", disks)
    expected = removable if scope == "removable" else everything
    assert list(find.devices(scope, system.top / "sys")) == expected.split()


PLAIN = [line for line in OPTIONS if line.startswith("backstore=") and not {'"', " "} & set(line)]


@pytest.mark.parametrize("line", PLAIN)
def test_options_are_those_of_the_boot_library(line: str) -> None:
    scope, named, _, _ = OPTIONS[line].split("|")
    assert find.parse_wanted(line) == find.Wanted(named or DEFAULT, scope)


@pytest.mark.parametrize("value", ["nonsense", "/", "/a/", "/../a", "/a,/b", "off,/a", "alldev,x"])
def test_garbage_is_refused(value: str) -> None:
    with pytest.raises(UsageError):
        find.parse_wanted(value)


@pytest.fixture
def sticks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Loop devices: a text, a store of another image, two good stores, and an empty one."""
    other, lower = tmp_path / "other", tmp_path / "lower"
    for directory in (other, lower):
        directory.mkdir()
        (directory / directory.name).touch()
        run("mksquashfs", directory, directory.with_suffix(".dat"), "-quiet", "-no-progress")
    stores = [tmp_path / f"{name}.bs" for name in ("foreign", "good", "second")]
    for store, image in zip(stores, ("other.dat", "lower.dat", "lower.dat"), strict=True):
        cowfs("create", store, "16", check=True)
        with mounted(tmp_path / image, store.with_suffix(".mnt"), store):
            pass
    (tmp_path / "text").write_text("no store\n" * 1000)
    names = []
    with ExitStack() as stack:
        for number, file in enumerate([tmp_path / "text", *stores, None]):
            content = tmp_path / f"content{number}"
            content.mkdir()
            if file:
                os.link(file, content / "sysrcd.bs")
            disk = images.ext4_disk(tmp_path / f"disk{number}", content, 24)
            fd, device = attach_loop(disk)
            stack.callback(os.close, fd)
            names.append(os.path.basename(device))
        monkeypatch.setattr(find, "devices", lambda scope: iter(names))
        yield names


@needs_root
def test_the_first_that_can_be_used_is_taken(
    sticks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mountpoint = tmp_path / "here"
    mountpoint.mkdir()
    run("mount", "-o", "ro", f"/dev/{sticks[1]}", mountpoint)
    try:
        assert main(["find", "--image", str(tmp_path / "lower.dat")]) == 0
    finally:
        umount2(str(mountpoint))
    said = capsys.readouterr().out
    blocks = ("\n" + said.strip()).split("\n/dev/")[1:]
    assert [block.split()[0] for block in blocks] == sticks[:4]
    assert "not selected: not a store but a text file" in blocks[0]
    assert "not selected: belongs to another root image" in blocks[1]
    assert f"mounted on {mountpoint}" in blocks[1]
    assert "SELECTED: the first usable store" in blocks[2]
    assert "16 MiB used, format: overlayfs, clean" in blocks[2]
    assert "lower.dat" in blocks[2]
    assert f"not selected: /dev/{sticks[2]} takes precedence" in blocks[3]


@needs_root
def test_nothing_is_found(
    sticks: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["find", "/nowhere.bs"]) == 1
    assert "no store would be used (/nowhere.bs, removable disks)" in capsys.readouterr().out
    assert main(["find", "off", "--json"]) == 1
    assert capsys.readouterr().out == "[]\n"
