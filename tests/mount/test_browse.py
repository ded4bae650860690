"""``cowfs browse``, in a terminal of 80x24: what is on the screen after each key."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from cowfs.browse.source import Entry
from cowfs.types import Change
from tests.support.mounts import COWFS, cowfs, mounted, project_root
from tests.support.system import needs_fuse

DEV_FUSE_AT_NIGHT = True
pytestmark = needs_fuse
pyte = pytest.importorskip("pyte", reason="needs pyte, a terminal emulator")
pytest.importorskip("textual", reason="needs textual, which draws")

ODD = [b"[red]x", b"\xff\x1b[31m", b"a*", b"new\nline"]
"""Names that would be markup, drive a terminal, match others, and take two lines."""


class Terminal:
    """A command in a terminal of 80x24."""

    def __init__(self, command: Sequence[str]) -> None:
        self.screen = pyte.Screen(80, 24)
        self._stream = pyte.ByteStream(self.screen)
        self._fd, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        self.before = termios.tcgetattr(theirs)
        self._theirs = theirs
        self.process = subprocess.Popen(
            command,
            stdin=theirs, stdout=theirs, stderr=theirs, cwd=project_root(), start_new_session=True,
            env={**os.environ, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"},
        )  # fmt: skip

    @property
    def text(self) -> str:
        return "\n".join(self.screen.display)

    def until(self, condition: Callable[[str], bool], seconds: float = 30) -> str:
        """Read on until what is on the screen is so."""
        end = time.monotonic() + seconds
        while not condition(self.text):
            assert time.monotonic() < end, self.text
            if select.select([self._fd], [], [], 0.2)[0]:
                self._stream.feed(os.read(self._fd, 65536))
        return self.text

    def shows(self, *texts: str) -> str:
        return self.until(lambda shown: all(text in shown for text in texts))

    def says(self, text: str) -> None:
        """Wait for a message, which may go over lines."""
        self.until(lambda _: text in "".join(self.screen.display))

    def lacks(self, text: str) -> str:
        return self.until(lambda shown: text not in shown)

    def keys(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def ended(self) -> int:
        """Read until it ends; return its exit code."""
        end = time.monotonic() + 30
        while self.process.poll() is None:
            assert time.monotonic() < end, self.text
            if select.select([self._fd], [], [], 0.05)[0]:
                self._stream.feed(os.read(self._fd, 65536))
        assert termios.tcgetattr(self._theirs) == self.before
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._fd)
        os.close(self._theirs)


@contextmanager
def terminal(*arguments: object, command: Sequence[str] = COWFS) -> Iterator[Terminal]:
    made = Terminal([*command, *map(str, arguments)])
    try:
        yield made
    finally:
        made.close()


UP, DOWN, RIGHT, END, ENTER, ESCAPE = "\x1b[A", "\x1b[B", "\x1b[C", "\x1b[F", "\r", "\x1b"


def listed(store: Path) -> set[str]:
    return set(cowfs("diff", store, "--name-only", check=True).stdout.splitlines())


def test_walk_look_mark_revert_undo_quit(tmp_path: Path) -> None:
    lower, store = tmp_path / "lower", tmp_path / "store"
    for name in ("dir", "moved"):
        (lower / name).mkdir(parents=True)
    (lower / "dir/text").write_text("the old line\n")
    (lower / "moved/inside").write_text("was here\n")
    with mounted(lower, tmp_path / "mnt", store) as here:
        (here.path / "dir/text").write_text("the new line\n")
        (here.path / "moved").rename(here.path / "now")
        (here.path / "now/inside").write_text("is there\n")
        for odd in ODD:
            with open(os.path.join(os.fsencode(here.path), odd), "wb") as file:
                file.write(b"[blink]\x1b]0;owned\x07 odd\n")
        (here.path / "ab").write_text("not to be touched\n")
        browse_mount(here.path)
    before = listed(store)
    assert {r"\377\033[31m", "[red]x", "a*", "ab", r"new\nline", "now/inside"} <= before
    with terminal("browse", store) as screen:
        first = screen.shows(
            "8 changes", r"\377\033[31m", "A [red]x", "A a*", r"new\nline", "now/", "Space Mark", "q Quit"
        )
        assert "inside" not in first, "a directory is opened when somebody asks"
        screen.keys(DOWN)
        screen.shows(r"+[blink]\x1b]0;owned\x07 odd")
        screen.keys("  ")
        screen.shows("* A [red]x", "* A a*")
        screen.keys("r")
        screen.shows("Revert 2 changes?", "y: yes")
        screen.keys("n")
        screen.lacks("Revert 2 changes?")
        assert listed(store) == before
        screen.keys("r")
        screen.shows("Revert 2 changes?")
        screen.keys("y")
        screen.shows("2 reverted", "6 changes")
        screen.lacks("[red]x")
        screen.keys("u")
        screen.shows("2 brought back", "8 changes", "A [red]x")
        screen.keys("?")
        screen.shows("mark the path and everything below it")
        screen.keys("q")
        screen.lacks("mark the path and everything below it")
        screen.keys("q")
        assert screen.ended() == 0
    assert listed(store) == before


def browse_mount(mountpoint: Path) -> None:
    """Browse from a directory on, while others change files."""
    with terminal("browse", mountpoint / "dir") as screen:
        screen.shows("8 changes", "dir/  (1)", "M text")
        screen.keys(DOWN)
        screen.shows("-the old line", "+the new line")
        screen.keys("e")
        screen.shows("changed in content", "lower 0")
        screen.keys("r")
        screen.shows("Revert 1 change?", "dir/text")
        screen.keys("y")
        screen.shows("1 reverted", "7 changes")
        assert (mountpoint / "dir/text").read_text() == "the old line\n"
        (mountpoint / "another").write_text("x")
        screen.keys("Rd")
        screen.shows("8 changes", "A another")
        for _ in range(10):
            screen.keys(DOWN)
        screen.keys(UP + RIGHT + DOWN)
        screen.shows("M inside", "rename from moved/inside")
        screen.keys(ENTER + END)
        screen.shows("-was here", "+is there")
        screen.keys(ESCAPE)
        screen.process.terminate()
        assert screen.ended() == 0


def test_a_deep_tree_takes_little_memory() -> None:
    root, path, name = Entry(b"", None), b"", b"n" * 255
    tracemalloc.start()
    try:
        for _ in range(1000):
            path = path + b"/" + name if path else name
            root.add(Change("A", path, type="directory"))
        assert tracemalloc.get_traced_memory()[0] < 8 << 20
    finally:
        tracemalloc.stop()
    change = root.find(path).change
    assert change is not None and change.path == path
    assert [each.path for each in root.below()][-1] == path


def test_without_a_terminal_or_textual(tmp_path: Path) -> None:
    done = cowfs("browse", tmp_path)
    assert done.returncode == 1 and "needs a terminal" in done.stderr and done.stderr.count("\n") == 1
    with terminal("browse", tmp_path / "none") as screen:
        assert screen.ended() == 32
        screen.says("no such store or mountpoint")
    program = "import sys; sys.modules['textual'] = None; from cowfs.cli.main import main; sys.exit(main())"
    with terminal("browse", tmp_path, command=[sys.executable, "-c", program]) as screen:
        assert screen.ended() == 2
        screen.says(f"textual, which is not installed (pip --python {sys.executable} install textual)")
