"""The commands of the guides, run as they stand there, one after the other, where the guides run them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.system import needs_root

ROOT = Path(__file__).parents[2]
AGED = "-exec touch -hd 2024-01-01 {} +"
AS_NOBODY = "setpriv --reuid=65534 --regid=65534 --clear-groups"
DEV_FUSE_AT_NIGHT = True
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


def run(prepare: str, wanted: list[Command]) -> list[tuple[int, list[str]]]:
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
        timeout=100,
    )
    parts = done.stdout.split("\0")
    assert len(parts) >= 2 * len(wanted), done.stdout + done.stderr
    assert not parts[-1].strip() and not done.stderr
    return [(int(parts[2 * i + 1]), parts[2 * i].splitlines()) for i in range(len(wanted))]


def check(prepare: str, wanted: list[Command]) -> None:
    """Run commands, and compare how they end and what they answer."""
    for command, (status, said) in zip(wanted, run(prepare, wanted), strict=True):
        told = f"{command.line}: exit {status}:\n" + "\n".join(said)
        assert (status != 0) == command.fails, told
        assert command.is_answered_by(said), told + "\nthe guide says:\n" + "\n".join(command.answer)


@needs_root
def test_the_quickstart(tmp_path: Path) -> None:
    wanted = section("docs/quickstart.md", "mksquashfs /etc", "umount kernel")
    # The parameter is the machine's, and the tests' own matter; top runs until Ctrl-C.
    wanted = [c for c in wanted if "enable_uring" not in c.line and not c.line.startswith("cowfs top")]
    assert len(wanted) >= 22
    etc = "passwd group nsswitch.conf ld.so.cache mke2fs.conf fuse.conf"
    prepare = (
        f"cd {tmp_path}; mkdir etc srv; for name in {etc}; do cp /etc/$name etc/ 2>/dev/null || :; done; "
        "mkdir etc/apt etc/cron.daily; echo old >etc/hostname; echo motd >etc/motd; echo deb >etc/apt/list; "
        f"touch etc/services etc/cron.daily/job; find etc {AGED}; "
        "mount --bind etc /etc; mount --bind srv /srv; cd /srv"
    )
    check(prepare, wanted)


@needs_root
def test_the_quickstart_as_an_ordinary_user(tmp_path: Path) -> None:
    wanted = section(
        "docs/quickstart.md", "mkdir -p root/etc", "cowfs mount root.sqsh merged --store changes.bs"
    )
    assert len(wanted) >= 12 and not any(command.is_root for command in wanted)
    prepare = f"mount --bind {tmp_path} /srv; cd /srv; chown 65534:65534 ."
    check(prepare, wanted)


@needs_root
@pytest.mark.parametrize("first, last", [("cowfs create", "cowfs check"), ("cowfs mount", "cowfs persist")])
def test_the_readme(tmp_path: Path, first: str, last: str) -> None:
    wanted = section("README.md", first, last)
    if first == "cowfs mount":  # the second session
        wanted = section("README.md", "cowfs persist", "cowfs persist")
        wanted = [Command("cowfs mount sysrcd.dat /mnt/merged", is_root=True), *wanted]
    prepare = (
        f"mount --bind {tmp_path} /mnt; cd /mnt; mkdir -p merged root/etc/apt root/usr/doc/bash; "
        f"cd root; touch etc/resolv.conf etc/hostname etc/apt/list usr/doc/bash/README; find . {AGED}; "
        "cd ..; mksquashfs root sysrcd.dat -quiet -no-progress"
    )
    check(prepare, wanted)


@needs_root
@pytest.mark.nightly  # the helpers are looked for in /sbin alone: all of that is copied
def test_the_guide_for_rescue_systems(tmp_path: Path) -> None:
    wanted = section(
        "docs/rescue-system.md", "install -m 755 mount-helpers/mount.cowfs", "umount /mnt/system"
    )
    wanted += section("docs/rescue-system.md", "truncate", "cowfs check -n")
    # The sizes that ls prints depend on the filesystem below; the time is that of the guide.
    wanted = [command for command in wanted if not command.line.startswith("ls -lsh")]
    assert len(wanted) >= 12
    prepare = (
        f"cd {tmp_path}; mkdir -p media/stick media/cdrom mnt/system root/etc; cp -a /usr/sbin sbin; "
        f"cp -a /usr/local/bin local; ln -s {Path(sys.executable).parent}/cowfs local/; "
        f"touch root/etc/hostname; find root {AGED}; "
        "mksquashfs root media/cdrom/sysrcd.dat -quiet -no-progress; mount --bind sbin /usr/sbin; "
        f"mount --bind local /usr/local/bin; mount --bind media /media; mount --bind mnt /mnt; cd {ROOT}"
    )
    check(prepare, wanted)
