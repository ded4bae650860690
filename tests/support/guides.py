"""Read the commands of the guides, with the answers below them, and run them as they stand there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
AS_NOBODY = "setpriv --reuid=65534 --regid=65534 --clear-groups"
CAN_CHANGE = {"info", "top", "check", "persist"}
"""Subcommands whose answers have figures of the machine: all but the numbers is compared."""


@dataclass
class Command:
    """A command of a guide, and what stands below it: its answer."""

    line: str
    is_root: bool
    answer: list[str] = field(default_factory=list)

    @property
    def fails(self) -> bool:
        """Whether the guide shows an error message below it."""
        return bool(self.answer and re.match(r"(cowfs|ls|sh): (?!changes are kept)", self.answer[0]))

    def is_answered_by(self, said: list[str]) -> bool:
        """Whether the answer is the guide's, but for what is another on each machine."""
        words = shlex.split(self.line, comments=True)
        if words[0] == "cowfs" and words[1] in CAN_CHANGE:
            return [_shape(line) for line in self.answer] == [
                _shape(line) for line in said[: len(self.answer)]
            ]
        return not self.answer or self.answer == said


def _shape(line: str) -> str:
    """Return a line without its figures: the label of a field, or everything but the numbers."""
    label = re.match(r"[a-z ]+: +", line)
    return label[0].strip() if label else re.sub(r"[\d.,]+", "N", line)


def commands(text: str) -> list[Command]:
    """All commands in the indented blocks of Markdown: a line after a prompt, with those after ``>`` that
    continue it, and below them the answer."""
    found: list[Command] = []
    is_open = False
    for line in text.splitlines():
        if match := re.match(r"    ([#$]) (.*)", line):
            found.append(Command(match[2], match[1] == "#"))
            is_open = True
        elif is_open and found[-1].line.endswith("\\") and line.startswith("    > "):
            found[-1].line = found[-1].line[:-1] + line[6:]
        elif is_open and line.startswith("    "):
            found[-1].answer.append(line[4:])
        elif line:
            is_open = False
    return found


def section(guide: str, first: str, last: str) -> list[Command]:
    """The commands of a guide from the one that begins with *first* to the next that begins with *last*."""
    found = commands((ROOT / guide).read_text())
    start = next(i for i, command in enumerate(found) if command.line.startswith(first))
    end = next(i for i, command in enumerate(found) if i >= start and command.line.startswith(last))
    return found[start : end + 1]


def run(prepare: str, wanted: list[Command], patience: float = 100) -> list[tuple[int, list[str]]]:
    """Run commands in a mount namespace of their own, each by a shell; return their statuses and answers."""
    script = [f"set -e; {prepare}; set +e"]
    for command in wanted:
        shell = f"sh -c {shlex.quote(command.line)}"
        user = shell if command.is_root else f"{AS_NOBODY} {shell}"
        script += [f"{user} 2>&1 </dev/null", r"printf '\0%d\0' $?"]
    # What a guide leaves mounted.
    script += ['for place in $(findmnt -rno TARGET -t fuse.cowfs); do cowfs umount "$place"; done']
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", "\n".join(script)],
        env={
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C.UTF-8",
        },
        capture_output=True,
        text=True,
        timeout=patience,
    )
    parts = done.stdout.split("\0")
    assert len(parts) >= 2 * len(wanted), done.stdout + done.stderr
    assert not parts[-1].strip() and not done.stderr
    return [(int(parts[2 * i + 1]), parts[2 * i].splitlines()) for i in range(len(wanted))]
