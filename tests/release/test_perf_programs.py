"""The programs that perf runs in a Debian: their verification accepts their result, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from perf import corpus, debian
from perf.bench import Workload, programs
from perf.box import Box, SampleFailed, WrongResult
from tests.support.mounts import kernel_overlay
from tests.support.system import needs_root, run

pytestmark = [needs_root, pytest.mark.nightly, pytest.mark.slow, pytest.mark.timeout(900)]
CACHE = Path(__file__).parents[2] / ".cache" / "perf"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return where the Debian is mounted."""
    if missing := debian.missing_requirements():
        pytest.skip(missing)
    CACHE.mkdir(parents=True, exist_ok=True)
    image, at = debian.make(CACHE), tmp_path_factory.mktemp("debian")
    run("mount", "-t", "squashfs", "-o", "loop,ro", image, at)
    yield at
    run("umount", at)


@pytest.fixture
def box(tmp_path: Path, reference: Path, ext3: Path) -> Iterator[Box]:
    """A box whose merged tree is mounted by the kernel's overlayfs."""
    scratch, store = tmp_path / "scratch", ext3 / tmp_path.name
    scratch.mkdir()
    (store / "upper").mkdir(parents=True)
    data = corpus.Corpus(Path(), Path(), Path(), reference, corpus.scan(reference), [], {})
    box = Box(tmp_path / "box", scratch, data, limit=120)
    box.open()
    with kernel_overlay([reference], store, box.merged):
        yield box
        box.close()


@pytest.mark.parametrize("program", programs.WORKLOADS, ids=lambda program: program.name)
def test_verification_accepts_only_the_programs_result(program: Workload, box: Box) -> None:
    program.setup(box)
    box.state["said"] = ""
    with pytest.raises((WrongResult, SampleFailed, FileNotFoundError)):
        program.verify(box)
    assert program.run(box) > 0
    program.verify(box)
