"""Fixtures for every suite. A mount, loop device or process that a test leaves behind fails the run."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import by_day, guard, mounts, system, warm
from tests.support import transport as transports
from tests.support.system import run

transport = transports.transport
ROOT_FIXTURES = {"ext3", "parts"}
"""Fixtures that skip the test unless root runs it."""
_old_io_uring = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Let the kernel offer FUSE over io_uring while the tests run, and Ctrl-C interrupt their commands."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a shell
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):
        config.stash[_old_io_uring] = transports.set_io_uring("Y")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Restore the kernel's old setting."""
    if not hasattr(config, "workerinput"):
        transports.set_io_uring(config.stash.get(_old_io_uring, ""))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need root, because of needs_root or a fixture, and choose the nightly ones."""
    for item in items:
        needs = any(mark is system.needs_root.mark for mark in item.iter_markers("skipif"))
        if needs or not ROOT_FIXTURES.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.root)
    by_day.mark_nightly_combinations(items)


def pytest_report_header() -> str:
    """Return a line about the transports that daemons use."""
    names = " and ".join(transports.available_transports())
    return f"FUSE requests by {names}; {transports.SWITCH} is on during the run"


@pytest.fixture(scope="session", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[guard.Guard]:
    """Isolate the run, mark its processes, and check at the end that nothing is left."""
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
    """Fail a test that leaves a mount, loop device or process behind."""
    watch = guard.Guard(surroundings.mark, surroundings.below)
    yield
    left = watch.left_behind()
    assert not left, "left behind by this test: " + "; ".join(left)


@pytest.fixture
def as_nobody() -> Callable[..., object]:
    """Return a function that runs a command as nobody, without privileges, as subprocess.run does."""

    def call(*command: str | os.PathLike[str], **more: object) -> object:
        return run(*system.as_nobody_prefix(), *command, **more)  # type: ignore[arg-type]

    return call


@pytest.fixture
def nobody_path() -> Iterator[Path]:
    """A directory of nobody's. Only root can access pytest's own directories."""
    made = Path(tempfile.mkdtemp(prefix="cowfs-nobody-"))
    if os.geteuid() == 0:
        os.chown(made, system.NOBODY, system.NOBODY)
    made.chmod(0o755)
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="session")
def ext3(tmp_path_factory: pytest.TempPathFactory, surroundings: guard.Guard) -> Iterator[Path]:
    """The mountpoint of an ext3 image with the options of a store, for upper directories."""
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
    """Give nobody some subordinate user and group IDs."""
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
