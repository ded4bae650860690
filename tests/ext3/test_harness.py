"""Test the tools of these tests with the kernel: the load, the model and the reader."""

from __future__ import annotations

from pathlib import Path

import pytest

from cowfs.layers.directory import open_directory
from tests.ext3 import images
from tests.ext3.images import MIDDLE, MODERN, OLD, SMALL, Shape
from tests.ext3.load import Load
from tests.ext3.model import Promises, judge
from tests.ext3.reader import Image
from tests.support.system import needs_root


@needs_root
@pytest.mark.parametrize("shape", [MODERN, MIDDLE, SMALL, OLD], ids=str)
def test_the_model_is_what_the_kernel_does(place: Path, shape: Shape) -> None:
    path = images.make(place / "image", shape)
    empty = Image(path.read_bytes())
    with images.kernel_mounted(path, place / "mnt"):
        layer = open_directory(str(place / "mnt"))
        load = Load(layer, empty, 1)
        load.run(600)
        load.check()
        load.release()
        layer.close()
    assert images.unclean(path) is None
    number = load.model.operation
    assert judge(load.model.states, Promises(number, number), Image(path.read_bytes())) is None
