"""Strings of images, stores and names reach terminals and logs without control characters."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from cowfs.errors import CowfsError, printable
from tests.support import tree
from tests.support.mounts import COWFS, cowfs, mounted, project_root
from tests.support.system import needs_fuse, needs_root, run

EVIL = "\x1b]0;owned\x07\x9b31m\r\u202e"
"""Sets a terminal's title, colours it, goes back to the beginning of the line, and turns the direction."""


def harmless(text: str) -> bool:
    return text.replace("\n", "").isprintable()


def test_printable() -> None:
    assert printable("plain é ü 中") == "plain é ü 中"
    assert printable(f"a\nb\t{EVIL}") == "a\\nb\\t\\x1b]0;owned\\x07\\x9b31m\\r\\u202e"
    assert printable(os.fsdecode(b"\xff\x80\xc3\xa9")) == "\\xff\\x80é"
    assert printable("\ud800\U000e0001") == "\\ud800\\U000e0001"
    assert str(CowfsError(f"x\n{EVIL}", "a\nhint")).isprintable()


@needs_fuse
@pytest.mark.parametrize("kind", ["directory", "image"])
def test_what_a_header_says(tmp_path: Path, kind: str) -> None:
    """Made by somebody else: all that is shown of it is printable, by each command that shows it."""
    tree.build(tmp_path / "lower", {"file": b"x"})
    tree.build(tmp_path / "other", {"file": b"y"})
    store = tmp_path / f"store{'.bs' if kind == 'image' else ''}"
    if kind == "image":
        assert cowfs("create", store, "16").returncode == 0
    with mounted(tmp_path / "lower", tmp_path / "mnt", store):
        pass
    _forge(store)
    for arguments in (["info"], ["check", "-n"], ["diff"]):
        done = cowfs(*arguments, store)
        assert harmless(done.stdout) and harmless(done.stderr), (done.stdout, done.stderr)
    done = cowfs("mount", tmp_path / "other", tmp_path / "mnt", "--store", store)
    assert done.returncode == 32 and done.stderr.count("\n") == 1 and harmless(done.stderr), done.stderr
    assert "owned" in done.stderr + cowfs("info", store).stdout, "or nothing was shown"


def _forge(store: Path) -> None:
    header = store / "cowfs/header.json"
    if store.is_dir():
        header.write_text(_evil(header.read_text()))
        return
    text = run("debugfs", "-R", "cat cowfs/header.json", store).stdout
    forged = store.with_name("forged")
    forged.write_text(_evil(text))
    for command in ("rm cowfs/header.json", f"write {forged} cowfs/header.json"):
        run("debugfs", "-w", "-R", command, store)
    run("tune2fs", "-L", "\x1b]0;owned\x07", store)


def _evil(text: str) -> str:
    facts = json.loads(text)
    facts["created_by"] = EVIL
    for lower in facts["lowers"]:
        lower["path"] += EVIL
        lower["description"] += f"\n{EVIL}"
    return json.dumps(facts)


@needs_root
@needs_fuse
def test_other_mountpoints_may_have_any_name(tmp_path: Path) -> None:
    """Somebody's mountpoint with an odd name must not keep cowfs from finding mounts."""
    for end in ("\r", "\v", "\f", "\x1c", "\x85", "\u2028"):
        odd = tmp_path / f"odd{end}odd"
        odd.mkdir()
        run("mount", "-t", "tmpfs", "tmpfs", odd)
    tree.build(tmp_path / "lower", {"file": b"x"})
    with mounted(tmp_path / "lower", tmp_path / "mnt") as here:
        assert here.pid() > 0
    for odd in tmp_path.glob("odd*"):
        run("umount", odd)


@needs_root
@needs_fuse
def test_names_in_messages_and_logs(tmp_path: Path) -> None:
    """The lower, the store and the mountpoint have such names, as the shell passes them."""
    place = tmp_path / f"p\n{EVIL}"
    tree.build(place / "lower", {"file": b"x"})
    for arguments in (
        ["mount", place / "none", tmp_path],
        ["info", place],
        ["check", place / "none"],
        ["umount", place],
        ["create", place / "lower", "16"],
        [f"mou{EVIL}nt"],
    ):
        done = cowfs(*arguments)
        assert done.returncode and harmless(done.stdout + done.stderr), (done.stdout, done.stderr)
        assert done.stderr.count("\n") <= 1
    with mounted(place / "lower", place / "mnt", place / "store", log=tmp_path / "log", quiet=False) as here:
        shown = cowfs("info", here.path, check=True).stdout
        assert harmless(shown) and f"{printable(str(place))}/store" in shown
        (here.path / f"new{EVIL}").touch()
        assert harmless(cowfs("diff", here.path, check=True).stdout)
    assert harmless((tmp_path / "log").read_text())


def on_a_terminal(*arguments: str | os.PathLike[str]) -> bytes:
    """Return what a command writes to a terminal."""
    terminal, its_end = os.openpty()
    environment = {**os.environ, "TERM": "dumb", "PYTHONPATH": project_root()}
    try:
        with subprocess.Popen(
            [*COWFS, *arguments], stdout=its_end, stderr=its_end, env=environment
        ) as process:
            os.close(its_end)
            said = b""
            with suppress(OSError):  # EIO: it is closed
                while more := os.read(terminal, 4096):
                    said += more
        assert process.returncode == 0, said
        return said.replace(b"\r\n", b"\n")
    finally:
        os.close(terminal)


@needs_root
@needs_fuse
def test_contents_in_a_patch(tmp_path: Path) -> None:
    """Files and targets of links are made by others; a patch for a program is as they are."""
    text = f"a\tb{EVIL}\x1b[2J\n".encode("utf-8", "surrogateescape")
    tree.build(tmp_path / "lower", {"file": b"x\n"})
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        (here.path / "file").write_bytes(text)
        (here.path / "link").symlink_to(EVIL)
        (here.path / f"name{EVIL}").write_text("x\n")
        said = on_a_terminal("diff", here.path, "-p").decode()
        assert harmless(said.replace("\t", "")) and "+a\tb\\x1b]0;owned\\x07" in said, said
        for form in ("--stat", "--json", "--name-only"):
            assert harmless(on_a_terminal("diff", here.path, form).decode()), form
        patch = subprocess.run([*COWFS, "diff", here.path, "-p"], capture_output=True, check=True).stdout
        assert b"\n+" + text in patch
