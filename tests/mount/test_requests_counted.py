"""The number of requests of each operation is the one in docs/benchmarks.md, over each transport."""

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
    """An image for all operations, with the files that programs read beside it."""
    return counts.prepare(tmp_path_factory.mktemp("counts"), TIMES)


@pytest.fixture(scope="module")
def counter(image: Path, transport: str) -> Iterator[Counter]:
    """A mount whose requests are counted."""
    with counts.mounted(image.parent, image, transport) as merged:
        yield Counter(merged, image.parent / "outside", TIMES)


def read_document() -> tuple[dict[str, str], dict[str, Row]]:
    """Return the versions and the rows in the document."""
    return counts.read_table(DOCUMENT.read_text())


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.title)
def test_the_document_has_the_right_counts(counter: Counter, operation: Operation) -> None:
    documented, rows = read_document()
    installed = versions()
    for name in filter(None, ("Linux", operation.program)):
        if installed[name] != documented[name]:
            version = installed[name] or "not installed"
            pytest.skip(f"the document is about {name} {documented[name]}; this machine has {version}")
    row = counter.count(operation)
    assert row.kinds == rows[operation.title].kinds, (
        "if the change is intended, update the document: python -m perf.counts --write"
    )


def test_the_document_has_each_operation_and_no_other() -> None:
    assert set(read_document()[1]) == {operation.title for operation in OPERATIONS}
