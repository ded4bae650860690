"""A daemon that another user runs lies about the changes of its mount to root, who asks for them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tests.security.test_control import lying
from tests.support.mounts import cowfs, mounted
from tests.support.system import NOBODY, needs_fuse, needs_root

pytestmark = [needs_root, needs_fuse]

DRIVES = "\x1b]0;title\x07\x1b[31m\n"
SECRET = "a secret of root's"


@pytest.fixture
def lower(nobody_path: Path, tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text(f"{SECRET}\n")
    (nobody_path / "lower").mkdir()
    (nobody_path / "lower/link").symlink_to(tmp_path / "outside")
    return nobody_path / "lower"


def lines(*replies: Any) -> str:
    return "".join(json.dumps(reply) + "\n" for reply in replies)


def change(path: str, **more: Any) -> dict[str, Any]:
    return {"change": {"kind": "A", "path": path, "type": "file", "what": [], "source": None, **more}}


def test_events_are_data(lower: Path, nobody_path: Path) -> None:
    """What a daemon says of an operation and of who did it drives no terminal."""
    process = dict.fromkeys(("pid", "uid", "program", "unit", "cgroup"), DRIVES) | {"command": [DRIVES]}
    event = {"operation": DRIVES, "path": DRIVES, "to": DRIVES, "process": process}
    told = lines({"watching": True}, {"time": "2026-01-01T00:00:00Z", **event}, {"ended": DRIVES})
    with mounted(lower, nobody_path / "mnt", nobody=True, quiet=False) as here:
        with lying(here.path, NOBODY, {"watch": told}):
            done = cowfs("watch", here.path)
        assert "by \\x1b]0;title" in done.stdout, done
        assert (done.stdout + done.stderr).replace("\n", "").isprintable() and done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    "path", ["../outside/secret", "link/../../outside/secret", "/outside/secret", "link/secret"]
)
def test_a_path_leads_nowhere_else(lower: Path, tmp_path: Path, path: str) -> None:
    """A name, or a link that the user has made since, would give root's files away in what root writes."""
    with mounted(lower, tmp_path / "mnt", quiet=False) as here:
        facts = lines(json.loads(cowfs("info", here.path, "--json", check=True).stdout))
        with lying(here.path, 0, {"info": facts, "diff": lines(change(path))}):
            written = tmp_path / "written"
            commands: tuple[list[str | Path], ...] = (
                ["diff", "-p", here.path],
                ["report", here.path, "-O", written],
                ["export", here.path, written, "--to", "patch"],
                ["export", here.path, written, "--to", "tar"],
            )
            for command in commands:
                done = cowfs(*command)
                assert path == "link/secret" or "sent an invalid reply" in done.stderr, done
                assert "Traceback" not in done.stderr and done.returncode < 128, done
                said = done.stdout + (written.read_text(errors="replace") if written.exists() else "")
                assert SECRET not in said, command
                written.unlink(missing_ok=True)


@pytest.mark.parametrize("member", ["type", "what"])
def test_words_are_data(lower: Path, nobody_path: Path, member: str) -> None:
    told = lines(change("new", kind="M", **{member: DRIVES if member == "type" else [DRIVES]}))
    with mounted(lower, nobody_path / "mnt", nobody=True, quiet=False) as here:
        facts = lines(json.loads(cowfs("info", here.path, "--json", check=True).stdout))
        with lying(here.path, NOBODY, {"info": facts, "diff": told}):
            done = cowfs("diff", here.path)
    assert done.returncode == 32 and "sent an invalid reply" in done.stderr and not done.stdout, done


@pytest.mark.parametrize("told", [{}, {"size": 0, "freed": -1}, {"size": "1", "freed": "1"}, {"size": -5}])
def test_sizes_that_nobody_has_set(lower: Path, nobody_path: Path, told: dict[str, Any]) -> None:
    with mounted(lower, nobody_path / "mnt", nobody=True, quiet=False) as here:
        facts = lines(json.loads(cowfs("info", here.path, "--json", check=True).stdout))
        with lying(here.path, NOBODY, {"info": facts, "*": lines(told)}):
            commands: tuple[list[str | Path], ...] = (["grow", here.path, "100G"], ["trim", here.path])
            for command in commands:
                done = cowfs(*command)
                assert done.returncode == 32 and "sent an invalid reply" in done.stderr, done
                assert not done.stdout and "Traceback" not in done.stderr, done
        assert cowfs("grow", here.path, "100G", check=True).stdout.endswith("resized to 100 GiB\n")


def test_sizes_that_no_store_has(lower: Path, nobody_path: Path) -> None:
    with mounted(lower, nobody_path / "mnt", nobody=True, quiet=False) as here:
        facts = lines(json.loads(cowfs("info", here.path, "--json", check=True).stdout))
        for size in (-1, 1 << 70, "1", 1e308, [1]):
            used = {"path": base64.b64encode(b"a").decode(), "reason": "new", "size": size}
            with lying(here.path, NOBODY, {"info": facts, "du": lines(used)}):
                done = cowfs("du", here.path)
            assert done.returncode == 32 and "sent an invalid reply" in done.stderr, done
