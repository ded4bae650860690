"""The kernel, the initramfs and the root image of all boots, made once per run."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.boot import images
from tests.boot.machine import QEMU, Machine
from tests.boot.root import Root
from tests.support.mounts import cowfs, force_umount

LOGS = images.CACHE / "logs"


@dataclass(frozen=True)
class Parts:
    """The files that a machine boots from."""

    kernel: Path
    initramfs: Path
    image: Path


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """The kernel, an initramfs and a root image. The first test process that needs them makes them."""
    if os.geteuid() != 0:
        pytest.skip("needs root: the files in a root image belong to root")
    for program in (QEMU, "mksquashfs", "mkfs.vfat", "mcopy", "xorriso", "cpio", "depmod"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program} (scripts/setup --boot)")
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    place = base / "boot"
    place.mkdir(exist_ok=True)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = Parts(images.kernel()[0], place / "initramfs", place / "sysrcd.dat")
        if not made.image.exists():
            images.initramfs(made.initramfs)
            tree = images.root_tree(place / "tree")
            images.root_image(tree, place / "new.dat")
            shutil.rmtree(tree)
            (place / "new.dat").rename(made.image)
    return made


@pytest.fixture
def boot(parts: Parts, request: pytest.FixtureRequest) -> Callable[..., Machine]:
    """Return a function that starts a machine. Its serial log is .cache/boot/logs/TEST.N.log.

    Its argument *initramfs* replaces the usual initramfs.
    """
    LOGS.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", request.node.name).strip("-")
    for old in LOGS.glob(f"{name}.*"):
        old.unlink()
    count = 0

    def switch_on(
        options: str = "",
        *,
        kernel: Path | None = parts.kernel,
        initramfs: Path = parts.initramfs,
        **more: object,
    ) -> Machine:
        nonlocal count
        count += 1
        log = LOGS / f"{name}.{count}.log"
        return Machine(kernel, initramfs, log, options=options, **more)  # type: ignore[arg-type]

    return switch_on


@pytest.fixture
def image_disk(parts: Parts, tmp_path: Path) -> Path:
    """A hard disk with only the root image."""
    content = tmp_path / "image_disk"
    content.mkdir()
    os.link(parts.image, content / "sysrcd.dat")
    disk = images.ext4_disk(tmp_path / "image_disk.img", content, 64)
    shutil.rmtree(content)
    return disk


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Root]:
    """A root daemon and its directories. It is stopped at the end."""
    made = Root(tmp_path)
    yield made
    made.stop()
    for place in (made.root, made.shown, *(made.top / "below").glob("*")):
        force_umount(place)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A new store, with a space and an umlaut in its name."""
    path = tmp_path / "my störe.bs"
    cowfs("create", path, "16", check=True)
    return path
