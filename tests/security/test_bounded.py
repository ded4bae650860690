"""What an image says never costs more time or memory than it should: walks end, and say why."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

import pytest

from cowfs.layers.ext3 import Ext3Layer, open_ext3
from cowfs.overlay.node import Node
from tests.ext3 import images
from tests.support.direct import Direct
from tests.support.mounts import cowfs, mounted
from tests.support.system import needs_fuse, needs_root, run

pytestmark = pytest.mark.timeout(60)

# -- directories that are in two places


def tree(top: Path) -> Path:
    """What is in the image: a store of the kernel's overlayfs."""
    for name in ("upper/a/b/c", "upper/x", "upper/y", "upper/big", "work"):
        (top / name).mkdir(parents=True)
    (top / "upper/a/file").write_text("text")
    return top


def debugfs(image: Path, *requests: str) -> None:
    for request in requests:
        run("debugfs", "-w", "-R", request, image)


LOOPS: dict[str, tuple[tuple[str, ...], str]] = {
    "itself": (("ln /upper/a /upper/a/again",), "upper/a/again"),
    "above": (("ln /upper/a /upper/a/b/c/again",), "upper/a/b/c/again"),
    "the root": (("ln / /upper/a/again",), "upper/a/again"),
    "the root in itself": (("ln / /again",), "again"),
    "elsewhere": (("ln /upper/a /upper/x/again",), "upper/x/again"),
    "twice in one": (("ln /upper/a/b /upper/a/again",), "upper/a/again"),
    "each in the other": (
        ("ln /upper/x /upper/y/x", "ln /upper/y /upper/x/y", "unlink /upper/y"),
        "upper/x/y",
    ),
}
"""What is done to the image, and which name then leads to what is elsewhere."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bounded")
    return images.make(place / "image", images.Shape(1024, mib=20, journal=4), tree(place / "tree"))


@pytest.fixture
def image(original: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "image"
    run("cp", "--sparse=always", original, copy)
    return copy


def walk(layer: Ext3Layer, most: int = 1000) -> tuple[int, list[tuple[str, int]]]:
    """Look at every name: how many there were, and which of them failed with what."""
    failed, count, waiting = [], 0, [(layer.root, "")]
    while waiting:
        directory, path = waiting.pop()
        for name, _ in layer.readdir(directory):
            count += 1
            assert count < most, "the walk does not end"
            here = f"{path}/{os.fsdecode(name)}".lstrip("/")
            try:
                found = layer.lookup(directory, name)
            except OSError as error:
                failed.append((here, error.errno or 0))
                continue
            if found is not None and stat.S_ISDIR(found[1].st_mode):
                waiting.append((found[0], here))
    return count, failed


@pytest.mark.parametrize("kind", LOOPS)
def test_a_directory_is_in_one_place(image: Path, kind: str) -> None:
    requests, name = LOOPS[kind]
    debugfs(image, *requests)
    layer = open_ext3(str(image), read_only=True)
    try:
        _, failed = walk(layer)
    finally:
        layer.close()
    assert (name, errno.EUCLEAN) in failed
    assert {code for _, code in failed} == {errno.EUCLEAN}
    assert len(failed) <= 2


@needs_root
@pytest.mark.parametrize("kind", LOOPS)
def test_diff_of_a_loop_ends_and_says_why(image: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "lower").mkdir()
    debugfs(image, *LOOPS[kind][0])
    done = cowfs("diff", image, "--lower", tmp_path / "lower", timeout=20)
    if kind == "the root in itself":  # which is no store then
        assert done.returncode
        return
    assert done.returncode == 2, done
    assert f"{image}: damaged: directory " in done.stderr
    assert done.stderr.count("\n") == 1


@needs_root
@needs_fuse
@pytest.mark.parametrize("kind", ["itself", "elsewhere", "twice in one", "the root"])
def test_a_mounted_loop_is_an_error_there_alone(image: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "lower").mkdir()
    requests, name = LOOPS[kind]
    debugfs(image, *requests)
    with mounted(tmp_path / "lower", tmp_path / "at", image, quiet=False) as here:
        name = name.removeprefix("upper/")
        with pytest.raises(OSError) as caught:
            os.stat(here.path / name)
        assert caught.value.errno == errno.EUCLEAN
        found = run("find", here.path, timeout=20, check=False)
        assert found.stdout.count("\n") < 20
        run("du", "-s", here.path, timeout=20, check=False)
        os.rename(here.path / "x", here.path / "a/x" if kind != "elsewhere" else here.path / "y/x")
        assert (here.path / "a/file").read_text() == "text"
        for _ in range(100):
            os.listdir(here.path / "a")
        assert here.log.read_text().count(" ERROR ") == 1
        assert here.log.read_text().count("\n") < 10


def test_who_moves_directories_in_a_lower_makes_no_circle(tmp_path: Path) -> None:
    """Its owner may, while it is mounted: each of two in the other, one after the other."""
    lower = tmp_path / "lower"
    (lower / "a/b").mkdir(parents=True)
    (tmp_path / "store").mkdir()
    union = Direct(str(tmp_path / "store"), [str(lower)])
    try:
        union.mkdir("made")
        a, b = union.find("a"), union.find("a/b")
        union.fs.readdir(b)
        for _ in range(3):
            os.rename(lower / "a/b", lower / "b")
            os.rename(lower / "a", lower / "b/a")
            a = look_up(union, b, b"a") or a
            os.rename(lower / "b/a", lower / "a")
            os.rename(lower / "b", lower / "a/b")
            b = look_up(union, a, b"b") or b
        for node in (a, b):
            steps, walk = 0, node
            while walk.parent is not None:
                steps, walk = steps + 1, walk.parent
                assert steps < 20, "it is above itself"
        with suppress(OSError):
            union.fs.rename(union.fs.root, b"made", b, b"made")
    finally:
        union.close()


def look_up(union: Direct, directory: Node, name: bytes) -> Node | None:
    try:
        found = union.fs.lookup(directory, name)
    except OSError:
        return None
    if found is None:
        return None
    union.fs.readdir(found[0])  # so that the layer holds on to it
    return union.take(found[0])
