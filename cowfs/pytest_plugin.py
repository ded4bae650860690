"""The pytest plugin: throw-away trees for tests, and what a test has changed in one.

pytest loads it whenever cowfs is installed beside it: what takes time is imported when a test asks for it.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cowfs.api import MountedTree
    from cowfs.types import Change

Name = str | bytes | os.PathLike[str]
_KINDS = {"A": "added", "M": "modified", "D": "deleted", "R": "renamed"}


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line(
        "markers",
        "cowfs(lower, ..., store=None, **options): mount cowfs_tree on these lowers, the topmost first;"
        " relative ones are beside the file of the test",
    )


@pytest.fixture(scope="session")
def _cowfs_warm() -> Iterator[None]:
    """A process that mounts quickly, for all tests of a run."""
    from cowfs.command import warm

    with warm():
        yield


@pytest.fixture
def cowfs_tree(
    request: pytest.FixtureRequest, _cowfs_warm: None
) -> Iterator[MountedTree | Callable[..., MountedTree]]:
    """With the marker cowfs: a writable tree over its lowers. Without: a function that mounts one for a
    lower, as cowfs.mount does. They are unmounted after the test.
    """
    from cowfs.api import mount

    with ExitStack() as stack:

        def make(*lowers: str | os.PathLike[str], **how: str | int | bool | None) -> MountedTree:
            return stack.enter_context(mount(lowers, **how))  # type: ignore[arg-type]

        marker = request.node.get_closest_marker("cowfs")
        if marker is None:
            yield make
        else:
            if not marker.args:
                pytest.fail('the marker cowfs names no lower (@pytest.mark.cowfs("root"))', pytrace=False)
            beside = request.path.parent
            yield make(*[beside / lower for lower in marker.args], **marker.kwargs)
        gc.collect()  # files that nobody holds any more keep a tree busy


@pytest.fixture
def cowfs_store(tmp_path: Path) -> Path:
    """The path for a store that is a directory, which the first mount makes: for tests that mount again."""
    return tmp_path / "cowfs-store"


@pytest.fixture(name="assert_changes")
def _assert_changes() -> Callable[..., None]:
    """The function assert_changes(tree, added=…, modified=…, deleted=…, renamed=…)."""
    return assert_changes


def assert_changes(
    tree: MountedTree,
    *,
    added: Iterable[Name] = (),
    modified: Iterable[Name] = (),
    deleted: Iterable[Name] = (),
    renamed: Mapping[Name, Name] | None = None,
) -> None:
    """Fail unless exactly this differs from the lowers; paths are relative to the tree.

    *renamed* maps the old path of a directory to its new one. What counts as a change is what `cowfs diff`
    lists: each path in a directory that was added, but no directory of which times alone differ.
    """
    __tracebackhide__ = True
    expected = {("A", _plain(path), b"") for path in added}
    expected |= {("M", _plain(path), b"") for path in modified}
    expected |= {("D", _plain(path), b"") for path in deleted}
    expected |= {("R", _plain(new), _plain(old)) for old, new in (renamed or {}).items()}
    changes = {(one.kind, one.path, one.source or b""): one for one in tree.diff()}
    lines = [f"  not expected: {_said(key, changes[key])}" for key in sorted(changes.keys() - expected)]
    lines += [f"  did not happen: {_said(key)}" for key in sorted(expected - changes.keys())]
    if lines:
        raise AssertionError("the tree has other changes than expected:\n" + "\n".join(lines))


def _plain(path: Name) -> bytes:
    return os.fsencode(path).strip(b"/")


def _said(key: tuple[str, bytes, bytes], change: Change | None = None) -> str:
    from cowfs.errors import printable

    kind, path, source = key
    said = f"{_KINDS[kind]} {printable(os.fsdecode(path))}"
    if source:
        said += f" (was {printable(os.fsdecode(source))})"
    if change is not None and change.what:
        said += f" ({', '.join(change.what)})"
    return said
