"""Commits of root's onto directories whose owners change them meanwhile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from cowfs.commits import Changed, Commit
from cowfs.errors import CowfsError, SystemFailure
from cowfs.exports import commit as commits
from cowfs.exports.apply_root import Root
from cowfs.layers.beneath import now
from tests.support.commits import one_run_at_a_time  # noqa: F401
from tests.support.mounts import mounted
from tests.support.system import NOBODY, needs_fuse, needs_root

pytestmark = [needs_root, needs_fuse]


@pytest.fixture
def lower(nobody_path: Path) -> Path:
    lower = nobody_path / "lower"
    lower.mkdir()
    (lower / "program").write_bytes(b"good")
    for path in (lower, lower / "program"):
        os.chown(path, NOBODY, NOBODY)
    return lower


def test_what_root_has_looked_at_is_what_becomes_roots(lower: Path, tmp_path: Path) -> None:
    """Root has let a program run as root, which its owner exchanges once nobody looks for conflicts."""
    since = now()

    def exchange(path: bytes, _: int) -> None:
        before = (lower / "program").stat()
        if path == b"program" and before.st_uid == NOBODY:
            (lower / "program").write_bytes(b"evil")
            os.utime(lower / "program", ns=(before.st_atime_ns, before.st_mtime_ns))

    commit = Commit()
    with mounted(lower, tmp_path / "mnt") as here:
        os.chown(here.path / "program", 0, 0)
        (here.path / "program").chmod(0o4755)
        what = Changed(str(here.path), str(lower))
        done = commit.prepare([what], since=since, force=False, tell=lambda _: None, tick=exchange)
        commit.forget()
    assert not done and commit.conflicts == [(b"program", "was changed in the lower meanwhile")]
    info = (lower / "program").stat()
    assert (info.st_uid, info.st_mode & 0o6000) == (NOBODY, 0)


def test_another_directory_in_its_place_gets_nothing(
    lower: Path, nobody_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner of the place puts another there at the last moment."""
    other = nobody_path / "other"
    other.mkdir()
    since = now()
    real = Root

    def swap_and_open(path: str) -> Any:
        lower.rename(nobody_path / "was")
        other.rename(lower)
        return real(path)

    commit = Commit()
    with mounted(lower, tmp_path / "mnt") as here:
        (here.path / "new").write_text("x")
        what = Changed(str(here.path), str(lower))
        assert commit.prepare([what], since=since, force=False, tell=lambda _: None)
    monkeypatch.setattr(commits, "Root", swap_and_open)
    stage = commit._stage
    try:
        with pytest.raises(CowfsError, match="another directory is at"):
            commit.make()
        assert os.listdir(lower) == [] and sorted(os.listdir(nobody_path / "was")) == ["program"]
    finally:
        assert stage is not None
        monkeypatch.undo()
        os.unlink(os.path.join(stage.path, "manifest"))
        for _ in commits.resume(os.path.dirname(stage.path), commit.losses, lambda *_: None):
            pass


@pytest.mark.parametrize("how", ["a stranger's", "open to all"])
def test_a_commit_that_a_stranger_has_left(
    lower: Path, nobody_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """XDG_STATE_HOME, which su(1) keeps, names a directory of another user's."""
    place = nobody_path / "commits"
    monkeypatch.setattr("cowfs.commits.place", lambda: str(place))
    commit = Commit()
    with mounted(lower, tmp_path / "mnt") as here:
        (here.path / "program").write_bytes(b"evil")
        assert commit.prepare([Changed(str(here.path), str(lower))], since=now(), force=True, tell=print)
    assert commit._stage is not None
    commit._stage.close()  # as if it was interrupted
    if how == "a stranger's":
        os.chown(place, NOBODY, NOBODY)
    else:
        place.chmod(0o777)
    assert [*commits.resume(str(place), commit.losses, lambda *_: None)] == []
    assert (lower / "program").read_bytes() == b"good"
    with pytest.raises(SystemFailure, match="others can write there"):
        commits.Stage(str(place))
    os.chown(place, 0, 0)
    place.chmod(0o700)
    assert [why for _, _, why in commits.resume(str(place), commit.losses, lambda *_: None)] == [""]
