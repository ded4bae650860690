"""Whatever one user does to something huge, another one is served meanwhile: measured, with two clients.

By itself each look of the other takes about a millisecond; the bounds are for machines that have more to do.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cowfs.formats.squashfs.xattrs import COUNT_MAX
from cowfs.layers.directory import open_directory
from tests.ext3 import images
from tests.support.ext3 import open_ext3
from tests.support.mounts import COWFS, Mounted, eventually, mounted
from tests.support.squashforge import Entry, Forge
from tests.support.system import needs_fuse, needs_root, run
from tests.support.victim import looking

pytestmark = [needs_root, needs_fuse, pytest.mark.nightly, pytest.mark.timeout(900)]

NAMES = 300_000
P99, LONGEST = 0.1, 1.0
"""Seconds. Of few looks the longest alone says something."""
ENOUGH = 100
_LINKS = 30_000
"""Names that one inode may have everywhere."""


@pytest.fixture
def place(nobody_path: Path) -> Iterator[Path]:
    """A directory that everybody may look into, with a lower in which another user's file is."""
    lower = nobody_path / "lower"
    (lower / "theirs").mkdir(parents=True)
    (lower / "theirs/file").write_text("content\n")
    for path in (lower, *lower.rglob("*")):
        path.chmod(0o755)
    yield nobody_path
    run("rm", "-rf", *nobody_path.iterdir(), timeout=300)


def fill(directory: Path, prefix: str = "", count: int = NAMES) -> Path:
    """Make a directory with very many names."""
    directory.mkdir(parents=True)
    first = directory
    for number in range(count):
        name = directory / f"{prefix}{number:06}"
        if number % _LINKS == 0:
            first = name
            name.touch()
        else:
            os.link(first, name)
    return directory


def fill_with_whiteouts(store: Path, name: bytes) -> None:
    """Let upper/NAME of a store hide all names of such a directory."""
    layer: Any = open_ext3(str(store)) if store.is_file() else open_directory(str(store))
    with closing(layer):
        upper = layer.lookup(layer.root, b"upper")[0]
        made = first = layer.mkdir(upper, name, 0o755, 0, 0)
        for number in range(NAMES):
            if number % _LINKS == 0:
                layer.mknod(made, b"%06d" % number, stat.S_IFCHR, 0, 0, 0)
                first = layer.lookup(made, b"%06d" % number)[0]
            else:
                layer.link(first, made, b"%06d" % number)


def make_store(place: Path, kind: str, mib: int = 600) -> Path:
    (place / "tree/upper").mkdir(parents=True)
    (place / "tree/upper").chmod(0o755)
    (place / "tree/work").mkdir()
    if kind == "directory":
        return (place / "tree").rename(place / "store")
    shape = images.Shape(4096 if kind == "image" else 1024, mib=mib, journal=16, inodes=100_000)
    return images.make(place / "store", shape, place / "tree")


@contextmanager
def cowfs(place: Path, lower: list[Path] | Path, store: Path | None) -> Iterator[Mounted]:
    with mounted(lower, place / "at", store, options=["allow_other"]) as here:
        yield here


class Report(list[str]):
    """The operations that were too slow."""

    def watch(self, here: Mounted, what: str, act: Callable[[], object]) -> None:
        """Do something while another user looks at a file."""
        with looking(here.path / "theirs/file") as looks:
            act()
        print(f"{what}: {looks}", flush=True)
        if looks.longest > LONGEST or (looks.count >= ENOUGH and looks.p99 > P99):
            self.append(f"{what}: {looks}")


@pytest.fixture
def report() -> Iterator[Report]:
    slow = Report()
    yield slow
    assert not slow


def in_turn(*calls: Callable[[], object]) -> None:
    for call in calls:
        call()


def swept(here: Mounted, store: Path, before: os.statvfs_result) -> None:
    """Wait until the whiteouts are gone."""
    if store.is_file():
        eventually(lambda: os.statvfs(here.path).f_bfree > before.f_bfree, "there is room again", 120)
    else:
        work = store / "work/work"
        eventually(lambda: os.listdir(work) in ([], ["#whiteout"]), "the work directory is empty", 120)


@pytest.mark.parametrize("kind", ["directory", "image"])
def test_directories_full_of_whiteouts(place: Path, report: Report, kind: str) -> None:
    """Removed, and replaced, though nothing is in them."""
    for name in ("one", "two"):
        fill(place / "lower" / name)
    (place / "lower/dir").mkdir()
    store = make_store(place, kind)
    for hidden in (b"one", b"two"):
        fill_with_whiteouts(store, hidden)
    with cowfs(place, place / "lower", store) as here:

        def then_swept(call: Callable[..., object], *paths: Path) -> Callable[[], object]:
            before = os.statvfs(here.path)
            return lambda: in_turn(lambda: call(*paths), lambda: swept(here, store, before))

        report.watch(here, f"rmdir, {kind}", then_swept(os.rmdir, here.path / "one"))
        report.watch(
            here,
            f"rename over, {kind}",
            then_swept(os.rename, here.path / "dir", here.path / "two"),
        )
        report.watch(here, f"mkdir again, {kind}", lambda: os.mkdir(here.path / "one"))
        assert os.listdir(here.path / "one") == os.listdir(here.path / "two") == []


@pytest.mark.parametrize("kind", ["directory", "image"])
def test_removing_a_directory(place: Path, report: Report, kind: str) -> None:
    """Remove a directory with names of the lower and of the upper."""
    fill(place / "lower/big", count=100_000)
    store = make_store(place, kind)
    with cowfs(place, place / "lower", store) as here:
        report.watch(
            here, f"not empty, {kind}", lambda: in_turn(*[partial(_fails, os.rmdir, here.path / "big")] * 50)
        )
        report.watch(here, f"make, {kind}", lambda: fill(here.path / "new", count=60_000))
        report.watch(
            here, f"rm -rf of the upper's, {kind}", lambda: run("rm", "-rf", here.path / "new", timeout=300)
        )
        report.watch(
            here, f"rm -rf of the lower's, {kind}", lambda: run("rm", "-rf", here.path / "big", timeout=300)
        )


def _fails(call: Callable[[Path], None], path: Path) -> None:
    with pytest.raises(OSError):
        call(path)


def test_listing_merged_directories(place: Path, report: Report) -> None:
    lowers = [place / "lower"]
    for prefix in ("", "b", "c"):
        lowers.append(place / f"lower{prefix}more")
        fill(lowers[-1] / "big", prefix, 200_000)
    with cowfs(place, lowers, make_store(place, "image")) as here:

        def first() -> None:
            with os.scandir(here.path / "big") as found:
                next(found)

        report.watch(here, "first name of a merged directory", first)
        report.watch(here, "again and again", lambda: in_turn(*[first] * 3))
        report.watch(here, "all names", lambda: os.listdir(here.path / "big"))
        report.watch(here, "not empty", lambda: _fails(os.rmdir, here.path / "big"))


@pytest.mark.parametrize("kind", ["squashfs", "directory", "image"])
def test_listing(place: Path, report: Report, kind: str) -> None:
    lowers, store = [place / "lower"], make_store(place, "image" if kind == "image" else "directory")
    if kind == "squashfs":
        fill(place / "tree of it/big")
        run("mksquashfs", place / "tree of it", place / "image", "-quiet", "-no-progress", timeout=300)
        lowers.append(place / "image")
    elif kind == "directory":
        fill(place / "lower/big")
    else:
        fill_with_files(store)
    with cowfs(place, lowers, store) as here:
        report.watch(here, f"a name of {kind}", lambda: os.stat(here.path / "big/000007"))
        report.watch(here, f"all names of {kind}", lambda: os.listdir(here.path / "big"))
        report.watch(
            here, f"names one by one, of {kind}",
            lambda: [os.stat(here.path / f"big/{number:06}") for number in range(0, NAMES, 37)],
        )  # fmt: skip
        report.watch(here, f"changes of {kind}", lambda: run(*COWFS, "diff", here.path, timeout=300))


def fill_with_files(store: Path) -> None:
    with closing(open_ext3(str(store))) as layer:
        upper = layer.lookup(layer.root, b"upper")
        assert upper is not None
        made = first = layer.mkdir(upper[0], b"big", 0o755, 0, 0)
        for number in range(NAMES):
            if number % _LINKS == 0:
                first, file = layer.create(made, b"%06d" % number, 0o644, 0, 0)
                file.close()
            else:
                layer.link(first, made, b"%06d" % number)


SIZE = 16 << 30


def sparse(path: Path) -> None:
    """16 GiB, of which each 4 MiB have a block."""
    with path.open("wb") as out:
        for at in range(0, SIZE, 4 << 20):
            os.pwrite(out.fileno(), b"x", at)
        out.truncate(SIZE)


@pytest.mark.parametrize("kind", ["directory", "image", "fragmented", "dense"])
def test_large_files(place: Path, report: Report, kind: str) -> None:
    """Truncated, removed, replaced, closed when they have no name any more."""
    store = make_store(
        place, "directory" if kind == "directory" else "1k" if kind == "fragmented" else "image", 900
    )
    files = ["cut", "zero", "open", "gone", "last", "over"]
    if kind == "fragmented":
        fragment(store, [os.fsencode(name) for name in files])
    with cowfs(place, place / "lower", store) as here:
        at = here.path
        for name in files if kind in {"directory", "image"} else []:
            sparse(at / name)
        if kind == "dense":
            files = ["zero", "gone"]
            for name in files:
                with (at / name).open("wb") as out:
                    for _ in range(350):
                        out.write(bytes(1 << 20))
        if "cut" in files:
            report.watch(
                here, f"truncate, {kind}", lambda: os.truncate(at / "cut", os.stat(at / "cut").st_size // 2)
            )
            report.watch(here, f"open to write, {kind}", lambda: (at / "open").open("wb").close())
            other = at / "other"
            other.touch()
            report.watch(
                here, f"rename over, {kind}", lambda: settle(here, lambda: os.rename(other, at / "over"))
            )
            with (at / "last").open("rb") as file:
                report.watch(here, f"unlink while it is open, {kind}", lambda: os.unlink(at / "last"))
                report.watch(here, f"last close, {kind}", lambda: settle(here, file.close))
        report.watch(here, f"truncate to nothing, {kind}", lambda: os.truncate(at / "zero", 0))
        report.watch(here, f"unlink, {kind}", lambda: settle(here, lambda: os.unlink(at / "gone")))
        run("sync", "-f", at)
    if store.is_file():
        assert images.unclean(store) is None


def settle(here: Mounted, act: Callable[[], object]) -> None:
    """Do something, and what comes of it."""
    act()
    for _ in range(300):
        os.statvfs(here.path)
    run("sync", here.path / "theirs/file")


def fragment(store: Path, names: list[bytes]) -> None:
    """Files whose blocks alternate."""
    with closing(open_ext3(str(store))) as layer:
        upper = layer.lookup(layer.root, b"upper")
        assert upper is not None
        files = [layer.create(upper[0], name, 0o644, 0, 0)[1] for name in names]
        for number in range(60_000):
            for file in files:
                file.pwrite(b"x", number << 10)
        for file in files:
            file.close()


@pytest.mark.parametrize("kind", ["directory", "image"])
def test_copying_up_many_extents(place: Path, report: Report, kind: str) -> None:
    with (place / "lower/file").open("wb") as out:
        for number in range(50_000):
            os.pwrite(out.fileno(), b"x", number << 13)
    with cowfs(place, place / "lower", make_store(place, kind)) as here:
        report.watch(here, f"50,000 extents, {kind}", lambda: (here.path / "file").open("r+b").close())


def test_attributes_and_links(place: Path, report: Report) -> None:
    names = [b"%06d" % number for number in range(COUNT_MAX)]
    keys = b"".join(struct.pack("<HH", 0, len(name)) + name + struct.pack("<I", 1) + b"x" for name in names)
    forge = Forge(xattr_keys=keys, xattr_sets=[(0, len(names), len(keys))])
    file = forge.large_file(0, 0, b"", 2, xattr=0)
    link = forge.inode(3, struct.pack("<II", 1, 4095) + b"x" * 4095, 3)
    (place / "image").write_bytes(
        forge.finish(forge.directory([Entry(b"file", file), Entry(b"link", link, 3)]))
    )
    with cowfs(place, [place / "lower", place / "image"], make_store(place, "directory")) as here:
        at = here.path
        report.watch(
            here, "list attributes", lambda: in_turn(*[partial(may_fail, os.listxattr, at / "file")] * 20)
        )
        report.watch(here, "readlink", lambda: in_turn(*[partial(may_fail, os.readlink, at / "link")] * 500))
        report.watch(here, "copy attributes up", lambda: may_fail(os.chmod, at / "file", 0o600))
        report.watch(here, "copy a link up", lambda: may_fail(os.link, at / "link", at / "other"))


def may_fail(call: Callable[..., object], *arguments: object) -> None:
    with suppress(OSError):
        call(*arguments)


@pytest.mark.parametrize("kind", ["directory", "image"])
def test_deep_trees(place: Path, report: Report, kind: str) -> None:
    depth = 3000
    top = os.open(place / "lower", os.O_RDONLY)
    bottom(top, depth, make=True)
    for number in range(700):
        (place / f"lower/wide/{number}/in").mkdir(parents=True)
    with cowfs(place, place / "lower", make_store(place, kind)) as here:
        root = os.open(here.path, os.O_RDONLY)
        report.watch(here, f"walk down, {kind}", lambda: os.close(bottom(os.dup(root), depth)))
        low = bottom(os.dup(root), depth)

        def look() -> None:
            for turn in range(3):
                for number in range(700):
                    os.path.exists(here.path / f"wide/{number}/in/absent{turn}")
                os.access(f"absent{turn}", os.F_OK, dir_fd=low)

        report.watch(here, f"look far down, {kind}", look)
        report.watch(here, f"copy up far down, {kind}", lambda: os.mkdir("new", dir_fd=low))
        report.watch(
            here, f"rename at the top, {kind}", lambda: os.rename(here.path / "d", here.path / "moved")
        )
        report.watch(
            here,
            f"rename far down, {kind}",
            lambda: os.rename("new", "newer", src_dir_fd=low, dst_dir_fd=low),
        )
        os.close(low)
        os.close(root)
        report.watch(here, f"remove, {kind}", lambda: run("rm", "-rf", here.path / "moved", timeout=300))


def bottom(fd: int, depth: int, *, make: bool = False) -> int:
    for _ in range(depth):
        if make:
            os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    return fd
