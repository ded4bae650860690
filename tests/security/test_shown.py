"""The maker of a store or layer cannot show others what only root may read below it."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest

from cowfs.linux import trust
from cowfs.linux.trust import is_public
from tests.support.ext3 import open_ext3
from tests.support.mounts import Mounted, cowfs, mounted
from tests.support.system import NOBODY, as_nobody_prefix, needs_fuse, needs_root, run

pytestmark = [needs_fuse, needs_root]

SECRET = b"for root alone"
FORGED = ["data", "directory", "mode"]
"""Each is a way in the merged tree to the secret: a metacopy, a redirect, another mode."""


@pytest.fixture
def lower(roots: Path) -> Path:
    (roots / "lower/etc").mkdir(parents=True)
    (roots / "lower/etc/shadow").write_bytes(SECRET)
    (roots / "lower/etc/shadow").chmod(0o600)
    for name in ("private", "other"):
        (roots / "lower" / name).mkdir()
        (roots / "lower" / name / "note").write_bytes(SECRET)
        (roots / "lower" / name).chmod(0o700)
    return roots / "lower"


@pytest.fixture
def store(roots: Path) -> Path:
    """A store in an image, which a user has made as no cowfs makes it."""
    image = roots / "store"
    cowfs("create", image, "16", check=True)
    (roots / "nothing").mkdir()
    with mounted(roots / "nothing", roots / "mnt", image, options=["force_lower"]):
        pass
    with closing(open_ext3(str(image))) as layer:
        found = layer.lookup(layer.root, b"upper")
        assert found is not None
        upper = found[0]
        key, file = layer.create(upper, b"data", 0o644, NOBODY, NOBODY)
        file.truncate(len(SECRET))
        file.close()
        layer.setxattr(key, b"trusted.overlay.metacopy", b"")
        layer.setxattr(key, b"trusted.overlay.redirect", b"/etc/shadow")
        key = layer.mkdir(upper, b"directory", 0o755, NOBODY, NOBODY)
        layer.setxattr(key, b"trusted.overlay.redirect", b"/private")
        layer.mkdir(upper, b"other", 0o755, NOBODY, NOBODY)
    return image


def is_shown(here: Mounted, how: str) -> bool:
    """Whether another user comes to the secret."""
    path = {"data": "data", "directory": "directory/note", "mode": "other/note"}[how]
    return run(*as_nobody_prefix(), "cat", here.path / path, check=False).stdout == SECRET.decode()


def test_a_store_of_another_users(roots: Path, lower: Path, store: Path) -> None:
    os.chown(store, NOBODY, NOBODY)
    with mounted(lower, roots / "mnt", store, options=["force_lower"]) as here:
        assert [how for how in FORGED if is_shown(here, how)] == []
        assert "for root alone" in here.said and f"uid {NOBODY}" in here.said
        assert (here.path / "data").read_bytes() == SECRET, "root sees all of it"


def test_who_says_so_lets_others_in(roots: Path, lower: Path, store: Path) -> None:
    os.chown(store, NOBODY, NOBODY)
    with mounted(lower, roots / "mnt", store, options=["force_lower", "allow_other"]) as here:
        assert [how for how in FORGED if is_shown(here, how)] == FORGED


def test_a_store_of_roots(roots: Path, lower: Path, store: Path) -> None:
    """Root has made it so."""
    with mounted(lower, roots / "mnt", store, options=["force_lower"]) as here:
        assert [how for how in FORGED if is_shown(here, how)] == FORGED


def test_an_image_that_everybody_can_read(roots: Path, lower: Path, store: Path) -> None:
    os.chown(store, NOBODY, NOBODY)
    image = roots / "image"
    run("mksquashfs", lower, image, "-quiet", "-no-progress")
    image.chmod(0o644)
    with mounted(image, roots / "mnt", store, options=["force_lower"]) as here:
        assert [how for how in FORGED if is_shown(here, how)] == FORGED
    image.chmod(0o600)
    with mounted(image, roots / "mnt", store, options=["force_lower"]) as here:
        assert [how for how in FORGED if is_shown(here, how)] == []


def test_a_layer_of_another_users(roots: Path, lower: Path) -> None:
    """The layer has other modes for files below it."""
    (roots / "above/other").mkdir(parents=True)
    run("mksquashfs", roots / "above", roots / "image", "-quiet", "-no-progress")
    with mounted([roots / "image", lower], roots / "mnt", "memory") as here:
        assert is_shown(here, "mode")
    os.chown(roots / "image", NOBODY, NOBODY)
    with mounted([roots / "image", lower], roots / "mnt", "memory") as here:
        assert not is_shown(here, "mode") and "for root alone" in here.said
    with mounted([lower, roots / "image"], roots / "mnt", "memory") as here:
        assert "for root alone" not in here.said, "it is the lowest"


def test_a_directory_that_everybody_can_read(roots: Path, lower: Path, store: Path) -> None:
    os.chown(store, NOBODY, NOBODY)
    for path in ("etc/shadow", "private", "other"):
        (lower / path).chmod(0o755)
    with mounted(lower, roots / "mnt", store, options=["force_lower"]) as here:
        assert [how for how in FORGED if is_shown(here, how)] == FORGED


def test_what_is_public(roots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    way = roots / "way"
    (way / "deep").mkdir(parents=True)
    file = way / "deep/file"
    file.touch()
    (way / "gone").symlink_to("/root/nothing")
    link = roots / "link"
    link.symlink_to(file)

    def public() -> list[bool]:
        return [is_public(str(path)) for path in (file, link, way)]

    assert public() == [True, True, True]
    with monkeypatch.context() as patch:
        patch.setattr(trust, "_MOST_SEEN", 2)
        assert public() == [True, True, False]
    file.chmod(0o640)
    assert public() == [False, False, False]
    file.chmod(0o644)
    (way / "deep").chmod(0o711)
    assert public() == [True, True, False], "it cannot be listed"
    (way / "deep").chmod(0o755)
    way.chmod(0o700)
    assert public() == [False, False, False]
    way.chmod(0o755)
    (way / "secret").touch(0o600)
    assert [is_public(f"{way}/{path}") for path in ("deep", "deep/..")] == [True, False]
    assert not is_public(f"{way}/removed/meanwhile")
