"""One user does what they can against the others on a mount, and nobody notices much."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.mount.test_memory import memory_of
from tests.support.attacks import ATTACKS, BIG_FILES, FILES
from tests.support.mounts import Mounted, cowfs, eventually, mounted
from tests.support.system import needs_fuse, needs_root, run

pytestmark = [needs_fuse, needs_root]

ATTACKER, VICTIM = 65533, 65534
ATTACKERS = 8
SECONDS = 10.0
P99 = 0.100
"""Seconds that 99 of 100 calls of the victim's take at most."""
MORE = 160 << 20
"""Bytes that the daemon's memory may grow by, whatever is done."""

_VICTIM = """
import json, os, select, sys, time
at = sys.argv[1]
seconds = []
def timed(call, *arguments):
    begun = time.monotonic()
    result = call(*arguments)
    seconds.append(time.monotonic() - begun)
    return result
print("started", flush=True)
number = 0
while not select.select([0], [], [], 0.002)[0] or number < 20:
    number += 1
    name = f"{at}/victims/{number}"
    timed(os.stat, f"{at}/victims")
    fd = timed(os.open, name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    timed(os.pwrite, fd, b"text", 0)
    assert timed(os.pread, fd, 9, 0) == b"text"
    os.close(fd)
    timed(os.unlink, name)
    fd = timed(os.open, f"{at}/victims.txt", os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert timed(os.pread, fd, 9, 0) == b"theirs\\n"
    os.close(fd)
    try:
        timed(os.stat, f"{at}/absent-{number}")
    except FileNotFoundError:
        pass
seconds.sort()
print(json.dumps([number, seconds[len(seconds) * 99 // 100], seconds[-1]]), flush=True)
"""


def as_user(uid: int) -> list[str]:
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--"]


@contextmanager
def victim(at: Path) -> Iterator[list[float]]:
    """Let somebody work; in the end: how many rounds, and how long 99 % of the calls took, the longest."""
    figures: list[float] = []
    command: list[str | Path] = [*as_user(VICTIM), sys.executable, "-c", _VICTIM, at]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "started\n"
        try:
            yield figures
        except BaseException:
            process.kill()
            raise
        figures += json.loads(process.communicate("end\n", timeout=60)[0])


def make_tree(lower: Path) -> None:
    for name in ("attackers", "victims", "big", "files", "links", "folders"):
        (lower / name).mkdir(parents=True)
    for number in range(BIG_FILES):
        (lower / "big" / f"{number}").write_bytes(os.urandom(1 << 20))
    for number in range(FILES):
        (lower / "files" / f"{number}").write_text(f"{number}\n")
        if number % 4 == 0:
            (lower / "links" / f"{number}").write_text(f"{number}\n")
        else:
            os.link(lower / "links" / f"{number // 4 * 4}", lower / "links" / f"{number}")
    for number in range(ATTACKERS):
        (lower / "folders" / f"{number}").mkdir()
        (lower / "folders" / f"{number}" / "file").touch()
    (lower / "victims.txt").write_text("theirs\n")
    for top in ("attackers", "big", "files", "links", "folders"):
        for place, _, names in os.walk(lower / top):
            for name in (".", *names):
                os.chown(Path(place) / name, ATTACKER, ATTACKER)
    os.chown(lower / "victims", VICTIM, VICTIM)


@pytest.fixture(scope="module")
def lowers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tree, as a directory and as an image."""
    place = tmp_path_factory.mktemp("lowers")
    make_tree(place / "directory")
    run("mksquashfs", place / "directory", place / "image", "-quiet", "-no-progress", timeout=60)
    return {"images": place / "image", "directories": place / "directory"}


@pytest.fixture(params=["images", "directories"])
def mount(request: pytest.FixtureRequest, lowers: dict[str, Path], nobody_path: Path) -> Iterator[Mounted]:
    store = nobody_path / "store"
    if request.param == "images":
        cowfs("create", store, "512", check=True)
    with mounted(lowers[request.param], nobody_path / "mnt", store, options=["allow_other"]) as here:
        yield here
    if request.param == "images":
        run("e2fsck", "-fn", store)
    cowfs("check", store, check=True)


def descriptors(pid: int) -> list[str]:
    """Return where the daemon's descriptors lead, except to directories, which layers keep open."""
    found = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        place = os.readlink(f"/proc/{pid}/fd/{number}")
        if not os.path.isdir(f"/proc/{pid}/fd/{number}"):
            found.append(place)
    return sorted(found)


@pytest.mark.nightly
@pytest.mark.timeout(300)
@pytest.mark.parametrize("attack", ATTACKS)
def test_attack(mount: Mounted, attack: str) -> None:
    pid = mount.pid()
    script = Path(__file__).parents[1] / "support" / "attacks.py"
    with victim(mount.path) as warm:
        pass
    assert warm
    before, memory = descriptors(pid), memory_of(pid)
    largest = memory
    with victim(mount.path) as figures, ExitStack() as stack:
        attackers = [
            stack.enter_context(
                subprocess.Popen(
                    [
                        *as_user(ATTACKER),
                        sys.executable,
                        script,
                        attack,
                        mount.path,
                        f"{number}",
                        f"{SECONDS}",
                    ],
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for number in range(ATTACKERS)
        ]
        rounds = 0
        for process in attackers:
            said = ""
            while True:
                try:
                    said, _ = process.communicate(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    largest = max(largest, memory_of(pid))
            assert process.returncode == 0, f"the attack failed: {process.returncode}"
            rounds += int(said)
    count, p99, longest = figures
    print(
        f"\n{attack}: {rounds} rounds; victim {count} rounds, p99 {p99 * 1000:.1f} ms, longest "
        f"{longest * 1000:.0f} ms; memory {memory >> 20} MiB, at most {largest >> 20} MiB",
        file=sys.stderr,
    )
    assert p99 < P99 and count > 10
    assert largest - memory < MORE
    run("ls", "-R", mount.path)
    # Fewer than before are right: what set it up may have been forgotten since.
    eventually(lambda: not Counter(descriptors(pid)) - Counter(before), "all files are closed", 20)
