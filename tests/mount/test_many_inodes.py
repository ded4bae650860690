"""However many inodes somebody looks at: those that nobody uses are forgotten, those in use are not."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cowfs.fuse.inode_limit import A_NODE
from tests.mount.test_memory import memory_of
from tests.support.mounts import Mounted, cowfs, eventually, is_mounted, mount_arguments, project_root
from tests.support.system import as_nobody_prefix, needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True

pytestmark = needs_fuse

MOST = 1 << 13
_BOUNDED = """
import errno, os, sys
from cowfs.cli.main import main
from cowfs.fuse import inode_limit
from cowfs.linux import limits
limits.memory = lambda: int(sys.argv[2])
if sys.argv[1] == "reconfigure":
    def unknown(fd, inodes):
        raise OSError(errno.EINVAL, "no such request")
    inode_limit.prune = unknown
sys.exit(main(sys.argv[3:]))
"""
"""A daemon on a machine with little memory, and with an old kernel if wanted."""


def prunes() -> bool:
    """Whether the kernel takes lists of inodes to forget."""
    return tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) >= (6, 18)


def linux_tree(lower: Path, directories: int, names: int) -> None:
    """A tree with so many directories, and so many names in each."""
    for number in range(directories):
        place = lower / f"{number % 10}" / f"{number}"
        place.mkdir(parents=True)
        for name in range(names):
            os.close(os.open(place / f"{name}", os.O_CREAT | os.O_WRONLY))


@contextmanager
def bounded(place: Path, way: str, most: int, nobody: bool = False) -> Iterator[Mounted]:
    """A mount whose daemon shall know *most* inodes."""
    at = place / "mnt"
    at.mkdir()
    if nobody and os.geteuid() == 0:
        os.chown(at, 65534, 65534)
    arguments = mount_arguments(place / "lower", at, place / "store", None, [f"log={place / 'log'}"])
    prefix = as_nobody_prefix() if nobody else []
    environment = {**os.environ, "PYTHONPATH": project_root()}
    run(*prefix, sys.executable, "-c", _BOUNDED, way, f"{most * A_NODE * 16}", *arguments, env=environment)
    here = Mounted(at, place / "log", nobody)
    try:
        yield here
    finally:
        if is_mounted(at):
            here.umount()
    assert here.trouble() == []


def known(mount: Mounted) -> int:
    """Return how many inodes the daemon knows."""
    shown = json.loads(cowfs("info", mount.path, "--json", nobody=mount.nobody, check=True).stdout)
    return int(shown["inodes_known"])


def walk(path: Path) -> int:
    """Walk a tree and return how many inodes it has."""
    return int(run("sh", "-c", "find $0 -size -1000000 | wc -l", path, timeout=7200).stdout)


@pytest.mark.parametrize(
    ("way", "nobody"),
    [
        pytest.param("prune", False, marks=[needs_root, pytest.mark.nightly]),
        ("prune", True),
        pytest.param("reconfigure", False, marks=needs_root),
    ],
)
def test_what_is_not_used_is_forgotten(nobody_path: Path, way: str, nobody: bool) -> None:
    if way == "prune" and not prunes():
        pytest.skip("needs Linux 6.18: FUSE_NOTIFY_PRUNE")
    lower = nobody_path / "lower"
    linux_tree(lower, 100, 200)
    (lower / "used" / "below").mkdir(parents=True)
    for name in ("open", "by path", "mapped", "below/x"):
        (lower / "used" / name).write_text("text\n")
    if nobody and os.geteuid() == 0:
        run("chown", "-R", "65534:65534", nobody_path)
    with bounded(nobody_path, way, MOST, nobody) as mount:
        prefix = as_nobody_prefix() if nobody else []
        done = run(*prefix, sys.executable, "-c", _USES, mount.path, timeout=100)
        assert done.stdout == "as it was\n"
        eventually(lambda: known(mount) <= MOST, "the kernel has forgotten")


_USES = f"""
import mmap, os, sys
at = sys.argv[1]
os.chdir(f"{{at}}/used/below")
opened, by_path = os.open("../open", os.O_RDWR), os.open("../by path", os.O_PATH)
mapped = os.open("../mapped", os.O_RDWR)
memory = mmap.mmap(mapped, 5)
os.close(mapped)
removed = os.open("x", os.O_RDWR)
os.unlink("x")
numbers = [os.fstat(fd).st_ino for fd in (opened, by_path, removed)]
for _ in range(2):
    seen = sum(len(folders) + len(files) for _, folders, files in os.walk(at))
    for place, folders, files in os.walk(at):
        for name in files:
            os.stat(f"{{place}}/{{name}}")
    assert seen > 2 * {MOST}, seen
assert os.getcwd() == f"{{at}}/used/below"
assert os.readlink(f"/proc/self/fd/{{by_path}}") == f"{{at}}/used/by path"
assert os.readlink(f"/proc/self/fd/{{opened}}") == f"{{at}}/used/open"
assert numbers == [os.fstat(fd).st_ino for fd in (opened, by_path, removed)]
os.pwrite(opened, b"TEXT", 0)
memory[:4] = b"TEXT"
memory.flush()
assert os.pread(removed, 9, 0) == b"text\\n"
assert open("../open").read() == open("../mapped").read() == "TEXT\\n"
print("as it was")
"""


@needs_root
@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("store", ["directory", "image"])
def test_a_million_names(nobody_path: Path, store: str) -> None:
    """The memory grows by what a node is said to take, to the bound; a second million adds little."""
    linux_tree(nobody_path / "lower", 1000, 1000)
    most = 200_000
    if store == "image":
        run("mksquashfs", nobody_path / "lower", nobody_path / "sfs", "-quiet", "-no-progress", timeout=600)
        run("rm", "-rf", nobody_path / "lower")
        (nobody_path / "sfs").rename(nobody_path / "lower")
        cowfs("create", nobody_path / "store", "64", check=True)
    with bounded(nobody_path, "prune" if prunes() else "reconfigure", most) as mount:
        pid = mount.pid()
        before = memory_of(pid)
        seen = [before]
        for folder in [*range(10), *range(10)]:
            walk(mount.path / f"{folder}")
            seen.append(memory_of(pid))
        print(
            "MiB at the start, and after each 100,000 names:", [size >> 20 for size in seen], file=sys.stderr
        )
        assert max(seen) - before < most * A_NODE
        # The table of nodes, 10 MiB, is made anew now and then. 26 bytes that stay of each name are too many.
        assert max(seen[11:]) - max(seen[:11]) < most * A_NODE // 8
        assert known(mount) <= most
