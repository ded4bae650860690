"""The same machine on an image that is read and written in-process, and mounted by the kernel in the end."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from cowfs import assemble
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
def in_process() -> Iterator[None]:
    """Root asks the kernel otherwise."""
    place = Path(tempfile.mkdtemp(prefix="cowfs-model-", dir="/dev/shm"))
    ImageMachine.empty = ext3.make(place / "empty", size=16 << 20)
    before = assemble.open_store
    with pytest.MonkeyPatch.context() as patch:

        @functools.wraps(before)
        def open_store(spec: str, **how: object) -> object:
            return before(spec, **{**how, "engine": "process"})  # type: ignore[arg-type]

        patch.setattr(assemble, "open_store", open_store)
        yield
    shutil.rmtree(place)


ImageMachine.TestCase.settings = settings(UnionMachine.TestCase.settings, max_examples=max(EXAMPLES // 3, 1))
TestModel = pytest.mark.timeout(600)(
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the kernel mounts the store")(
        ImageMachine.TestCase
    )
)
