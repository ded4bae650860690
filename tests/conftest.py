"""Fixtures for every suite, and the watch: a mount, loop device or process left behind fails the run."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import by_day, guard, mounts, system, warm
from tests.support import transport as transports
from tests.support.system import run

transport = transports.transport
ROOTS_FIXTURES = {"ext3", "parts"}
"""Fixtures that skip for all others whatever asks for them."""
_before = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Have the kernel offer FUSE over io_uring while the tests run."""
    if not hasattr(config, "workerinput"):
        config.stash[_before] = transports.turn("Y")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave that as it was."""
    if not hasattr(config, "workerinput"):
        transports.turn(config.stash.get(_before, ""))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what only root can run: by needs_root, or by a fixture that is root's."""
    for item in items:
        needs = any(mark is system.needs_root.mark for mark in item.iter_markers("skipif"))
        if needs or not ROOTS_FIXTURES.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.root)
    by_day.leave_to_the_night(items)


def pytest_report_header() -> str:
    """Say what daemons use."""
    return f"requests by {' and '.join(transports.ways())}; {transports.SWITCH} is on during the run"


@pytest.fixture(scope="session", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[guard.Guard]:
    """Isolate the run, mark its processes, and look at the end whether anything is left."""
    mark = guard.mark_run()
    base = tmp_path_factory.getbasetemp()
    system.isolate(base)
    watch = guard.Guard(mark, base)
    with warm.forkers(mounts.project_root()):
        yield watch
    left = watch.left_behind()
    assert not left, "left behind by the tests: " + "; ".join(left)


@pytest.fixture(autouse=True)
def nothing_left_behind(surroundings: guard.Guard) -> Iterator[None]:
    """Each test must take away what it mounted and started; the one that does not is named."""
    watch = guard.Guard(surroundings.mark, surroundings.below)
    yield
    left = watch.left_behind()
    assert not left, "left behind by this test: " + "; ".join(left)


@pytest.fixture
def as_nobody() -> Callable[..., object]:
    """Run a command as the user nobody, without privileges; its result as subprocess.run gives it."""

    def call(*command: str | os.PathLike[str], **more: object) -> object:
        return run(*system.as_nobody_prefix(), *command, **more)  # type: ignore[arg-type]

    return call


@pytest.fixture
def nobody_path() -> Iterator[Path]:
    """A directory that belongs to nobody and that nobody can reach (pytest's own are root's alone)."""
    made = Path(tempfile.mkdtemp(prefix="cowfs-nobody-"))
    if os.geteuid() == 0:
        os.chown(made, system.NOBODY, system.NOBODY)
    made.chmod(0o755)
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="session")
def ext3(tmp_path_factory: pytest.TempPathFactory, surroundings: guard.Guard) -> Iterator[Path]:
    """A mounted ext3 image as mke2fs makes it for a store, to hold upper directories."""
    if os.geteuid() != 0:
        pytest.skip("needs root: a loop-mounted ext3")
    place = tmp_path_factory.mktemp("ext3")
    image, at = place / "image", place / "mnt"
    at.mkdir()
    with image.open("wb") as out:
        out.truncate(512 << 20)
    run("mke2fs", "-q", "-t", "ext3", "-b", "4096", "-I", "256", "-m", "0", "-i", "8192", image)
    run("mount", "-o", "loop", image, at)
    yield at
    run("umount", at)
    image.unlink()


@pytest.fixture
def many(tmp_path: Path) -> Iterator[None]:
    """Let nobody give out some users and groups."""
    if shutil.which("newuidmap") is None:
        pytest.skip("needs newuidmap (apt install uidmap)")
    given = tmp_path / "given"
    given.write_text("nobody:100000:65536\n")
    places = [Path("/etc/subuid"), Path("/etc/subgid")]
    for place in places:
        place.touch()
        run("mount", "--bind", given, place)
    yield
    for place in places:
        run("umount", place)
