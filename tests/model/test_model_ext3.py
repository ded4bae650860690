"""The same state machine on an image that cowfs reads and writes itself; the kernel mounts it at the end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.model.test_model import EXAMPLES, UnionMachine
from tests.support import ext3
from tests.support.system import run


class ImageMachine(UnionMachine):
    """The store is a copy of an empty image."""

    empty: Path

    def __init__(self) -> None:
        super().__init__()
        run("cp", "--sparse=always", self.empty, self.place / "store")

    def by_the_kernel(self) -> None:
        image = self.place / "image"
        (self.place / "store").rename(image)
        ext3.sound(image)
        (self.place / "store").mkdir()
        run("mount", "-o", "loop", image, self.place / "store")
        try:
            super().by_the_kernel()
        finally:
            run("umount", self.place / "store")


@pytest.fixture(scope="module", autouse=True)
def empty(tmp_path_factory: pytest.TempPathFactory) -> None:
    """An image to copy, because making one takes longer than most runs."""
    ImageMachine.empty = ext3.make(tmp_path_factory.mktemp("model") / "empty", size=16 << 20)


ImageMachine.TestCase.settings = settings(UnionMachine.TestCase.settings, max_examples=max(EXAMPLES // 3, 1))
TestModel = pytest.mark.timeout(600)(
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the kernel mounts the store")(
        ImageMachine.TestCase
    )
)
