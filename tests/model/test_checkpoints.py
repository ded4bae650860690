"""As test_model.py, with checkpoints between the operations, and ways back to them.

Nothing that is seen changes with a checkpoint, numbers of inodes and open files included. The way back shows
what was seen when it was taken, and the kernel's overlayfs sees the same tree in the layers.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from cowfs.api import checkpoints
from cowfs.changes import checkpoint
from cowfs.overlay.fs import done_at_once
from cowfs.store.offline.info import store_info
from tests.model.test_model import LAYER, STEPS, UnionMachine
from tests.model.tree import Model
from tests.support import tree
from tests.support.direct import Direct

EXAMPLES = int(os.environ.get("COWFS_CHECKPOINT_EXAMPLES", "25"))


class CheckpointMachine(UnionMachine):
    """Every rule does the same to the union and the model; a checkpoint is a copy of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Model] = {}
        self.made = 0
        self.deleted = False

    @initialize(top=LAYER, bottom=LAYER, two=st.booleans(), caching=st.booleans(), slow=st.just(False))
    def build(
        self, top: dict[str, tree.Node], bottom: dict[str, tree.Node], two: bool, caching: bool, slow: bool
    ) -> None:
        super().build(top, bottom, two, caching, slow)

    @rule()
    def checkpoint(self) -> None:
        assume(len(self.kept) < 6)
        name = f"checkpoint {self.made}"
        self.made += 1
        union = self.fs.union
        done_at_once(checkpoint.take(union.store, union.overlay, name))
        self.kept[name] = copy.deepcopy(self.model)
        self.look()

    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        """Delete a checkpoint. The next open of the store merges its layer with the one above."""
        assume(self.kept)
        name = data.draw(st.sampled_from(sorted(self.kept)))
        union = self.fs.union
        done_at_once(checkpoint.delete(union.store, union.overlay, name))
        del self.kept[name]
        self.deleted = True
        self.look()

    @rule()
    def remount(self) -> None:
        if self.deleted:  # merged directories without a lower have other numbers
            self.inos.clear()
        self.deleted = False
        super().remount()

    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        assume(self.kept)
        name = data.draw(st.sampled_from(sorted(self.kept)))
        for handle, _inode in self.handles:
            self.fs.fs.release_handle(handle)
        self.handles.clear()
        self.fs.forget()
        union = self.fs.union
        done_at_once(checkpoint.go_back(union.store, union.overlay, name, lambda _: None))
        self.model = copy.deepcopy(self.kept[name])
        self.look()

    def layers(self) -> list[str]:
        store = self.place / "store"
        assert {one.name for one in checkpoints(str(store))} == set(self.kept)
        return [str(store / "cowfs" / "layers" / str(number)) for number in store_info(str(store))["layers"]]


def _settings(examples: int) -> Any:
    return settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        deadline=None,
        print_blob=True,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )


CheckpointMachine.TestCase.settings = _settings(EXAMPLES)
TestCheckpoints = pytest.mark.timeout(600)(
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: whiteouts, owners, trusted xattrs")(
        CheckpointMachine.TestCase
    )
)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: whiteouts, owners, trusted xattrs")
def test_a_directory_of_the_root_that_went_below_another(tmp_path: Path) -> None:
    """It still belongs to the lower in the merged layer, although both places have the same name."""
    tree.build(tmp_path / "lower", {"a/x": b"x", "e/f": b"f"})
    fs = Direct(str(tmp_path / "store"), [str(tmp_path / "lower")])
    fs.rename("a", "e/a")
    union = fs.union
    done_at_once(checkpoint.take(union.store, union.overlay, "one"))
    fs.create("e/a/y", b"y")
    done_at_once(checkpoint.take(union.store, union.overlay, "two"))
    done_at_once(checkpoint.delete(union.store, union.overlay, "one"))
    fs.remount()
    assert len(fs.union.store.frozen) == 1
    assert (fs.read("e/a/x"), fs.read("e/a/y")) == (b"x", b"y")
    fs.close()
