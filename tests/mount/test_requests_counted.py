"""How many requests an operation takes is what docs/benchmarks.md says: by kind, over each transport."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from perf import counts
from perf.counts import Counter, Row
from perf.operations import OPERATIONS, Operation, versions
from perf.report import DOCUMENT
from tests.support.squashfs import needs_mksquashfs
from tests.support.system import needs_fuse, needs_root

pytestmark = [needs_fuse, needs_root, needs_mksquashfs]
TIMES = 6


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lower for all operations, and beside it what programs need."""
    return counts.prepare(tmp_path_factory.mktemp("counts"), TIMES)


@pytest.fixture(scope="module")
def counter(image: Path, transport: str) -> Iterator[Counter]:
    """A mount whose requests are counted."""
    with counts.mounted(image.parent, image, transport) as merged:
        yield Counter(merged, image.parent / "outside", TIMES)


def in_document() -> tuple[dict[str, str], dict[str, Row]]:
    """With what was counted, and the rows."""
    return counts.read_table(DOCUMENT.read_text())


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.title)
def test_as_many_as_the_document_says(counter: Counter, operation: Operation) -> None:
    known, rows = in_document()
    here = versions()
    for name in filter(None, ("Linux", operation.program)):
        if here[name] != known[name]:
            have = here[name] or "not installed"
            pytest.skip(
                f"the document tells of {name} {known[name]}, which asks otherwise; here it is {have}"
            )
    found = counter.count(operation)
    assert found.kinds == rows[operation.title].kinds, (
        "if this is meant: python -m perf.counts --write, which writes the document anew"
    )


def test_the_document_has_each_operation_and_no_other() -> None:
    assert set(in_document()[1]) == {operation.title for operation in OPERATIONS}
