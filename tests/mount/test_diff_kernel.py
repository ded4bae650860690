"""`diff` of stores that the kernel's own overlayfs wrote, against what really differs."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cowfs.changes.diff import diff
from cowfs.changes.render import render
from cowfs.layers.directory import open_directory
from cowfs.linux.files import RENAME_EXCHANGE, renameat2
from cowfs.types import Change
from tests.support.mounts import kernel_overlay
from tests.support.system import needs_root, run

pytestmark = [needs_root, pytest.mark.root]

OLD = 1_500_000_000_123_456_789
ALL_ON = "redirect_dir=on,metacopy=on,index=on,xino=on"


def changes(store: Path, lowers: Sequence[Path], within: Sequence[bytes] = ()) -> list[Change]:
    """Return the changes that `diff` finds in a store, or at least those within some paths."""
    upper = open_directory(str(store))
    layers = [open_directory(str(lower)) for lower in lowers]
    descriptors = len(os.listdir("/proc/self/fd"))
    try:
        root = upper.lookup(upper.root, b"upper")
        work = upper.lookup(upper.root, b"work")
        assert root and work
        index = upper.lookup(work[0], b"index")
        links = index[0] if index else None
        return list(diff(upper, root[0], layers, b"trusted.overlay.", links, within=within))
    finally:
        upper.close()
        for layer in layers:
            layer.close()
        assert len(os.listdir("/proc/self/fd")) <= descriptors


def lines(store: Path, *lowers: Path) -> list[str]:
    return list(render(changes(store, lowers)))


def age(top: Path) -> None:
    """Give everything an old mtime that no test sets by accident."""
    for folder, names, files in os.walk(top, topdown=False):
        for name in names + files:
            os.utime(os.path.join(folder, name), ns=(OLD, OLD), follow_symlinks=False)
    os.utime(top, ns=(OLD, OLD))


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    top = tmp_path / "lower"
    for name in ("etc", "usr/share/doc/pkg", "var/log", "empty", "old/deep"):
        (top / name).mkdir(parents=True)
    (top / "etc/fstab").write_text("/dev/sda1 / ext3\n")
    (top / "etc/hosts").write_text("localhost\n")
    (top / "usr/share/doc/pkg/README").write_text("read me\n")
    (top / "usr/share/doc/NEWS").write_text("news\n")
    (top / "big").write_bytes(os.urandom(3 << 20))
    (top / "old/inside").write_text("inside\n")
    (top / "old/deep/er").write_text("er\n")
    (top / "link").symlink_to("etc/fstab")
    (top / "one").write_text("linked\n")
    os.link(top / "one", top / "etc/two")
    os.link(top / "one", top / "old/deep/three")
    os.mknod(top / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    age(top)
    return top


@pytest.fixture
def edit(tmp_path: Path, lower: Path) -> Callable[..., list[str]]:
    """Run a function on the merged tree of the kernel, unmount, and return the lines of `diff`."""

    def call(work: Callable[[Path], object]) -> list[str]:
        with kernel_overlay([lower], tmp_path / "store", tmp_path / "merged") as merged:
            work(merged)
        return lines(tmp_path / "store", lower)

    return call


def test_nothing(edit: Any) -> None:
    assert edit(lambda m: None) == []


def test_a_copy_up_is_no_change_and_neither_are_its_directories(edit: Any) -> None:
    def work(m: Path) -> None:
        for path in (m / "usr/share/doc/pkg/README", m / "etc/fstab"):
            with path.open("r+"):
                pass
        os.chmod(m / "big", 0o600)
        os.chmod(m / "big", 0o644)

    assert edit(work) == []


def test_added(edit: Any) -> None:
    def work(m: Path) -> None:
        (m / "etc/new.d/sub").mkdir(parents=True)
        (m / "etc/new.d/a.conf").write_text("a")
        (m / "etc/ptr").symlink_to("nowhere")
        os.mkfifo(m / "etc/pipe")

    assert edit(work) == [
        "A  etc/new.d/",
        "A  etc/new.d/a.conf",
        "A  etc/new.d/sub/",
        "A  etc/pipe",
        "A  etc/ptr",
    ]


def test_each_way_to_modify(edit: Any) -> None:
    def work(m: Path) -> None:
        with (m / "etc/fstab").open("a") as out:
            out.write("more")
        (m / "etc/hosts").write_text("LOCALHOST\n")  # the same size
        os.utime(m / "etc/hosts", ns=(OLD, OLD))
        os.utime(m / "usr/share/doc/NEWS", ns=(OLD, OLD + 1))
        os.chmod(m / "usr", 0o700)
        os.chown(m / "big", 12, 34)
        os.setxattr(m / "big", "user.comment", b"x")
        os.unlink(m / "link")
        os.symlink("etc/hosts", m / "link")
        os.utime(m / "link", ns=(OLD, OLD), follow_symlinks=False)
        os.unlink(m / "null")
        os.mknod(m / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 5))
        os.chmod(m / "null", stat.S_IMODE(0o666 & ~0o022))
        os.utime(m / "null", ns=(OLD, OLD))
        shutil.rmtree(m / "old")
        (m / "old").write_text("a file now")
        os.unlink(m / "usr/share/doc/pkg/README")
        (m / "usr/share/doc/pkg/README").mkdir()

    assert edit(work) == [
        "M  big  (owner, xattrs user.comment)",
        "M  etc/fstab  (content, times)",
        "M  etc/hosts  (content)",
        "M  link  (target)",
        "M  null  (device)",
        "M  old  (type)",
        "M  usr/  (mode)",
        "M  usr/share/doc/NEWS  (times)",
        "M  usr/share/doc/pkg/README/  (type)",
    ]


def test_the_last_byte_of_a_large_file_counts(edit: Any) -> None:
    def work(m: Path) -> None:
        with (m / "big").open("r+b") as out:
            out.seek(-1, os.SEEK_END)
            last = out.read(1)
            out.seek(-1, os.SEEK_END)
            out.write(bytes([last[0] ^ 1]))
        os.utime(m / "big", ns=(OLD, OLD))

    assert edit(work) == ["M  big  (content)"]


def test_holes_are_compared_as_zeros(edit: Any, lower: Path) -> None:
    for name in ("sparse", "other"):
        with (lower / name).open("wb") as out:
            out.truncate(1 << 40)  # reading it would take hours
            out.seek(5 << 20)
            out.write(b"island")
    age(lower)

    def work(m: Path) -> None:
        for name in ("sparse", "other"):
            with (m / name).open("r+b") as out:
                out.seek((1 << 40) - 9)
                out.write(b"x" if name == "other" else b"\0")
            os.utime(m / name, ns=(OLD, OLD))

    assert edit(work) == ["M  other  (content)"]


def test_deleted_directories_are_one_line(edit: Any) -> None:
    def work(m: Path) -> None:
        shutil.rmtree(m / "usr/share/doc")
        os.unlink(m / "etc/hosts")

    assert edit(work) == ["D  etc/hosts", "D  usr/share/doc/"]


def test_a_directory_made_anew(edit: Any) -> None:
    def work(m: Path) -> None:
        shutil.rmtree(m / "usr/share/doc")
        (m / "usr/share/doc").mkdir()
        (m / "usr/share/doc/NEWS").write_text("news\n")
        os.utime(m / "usr/share/doc/NEWS", ns=(OLD, OLD))
        (m / "usr/share/doc/more").touch()

    assert edit(work) == ["A  usr/share/doc/more", "D  usr/share/doc/pkg/"]


def test_directories_in_a_directory_made_anew(edit: Any) -> None:
    """The kernel marks only the topmost as opaque: what is in it shows nothing of the lower either."""

    def work(m: Path) -> None:
        shutil.rmtree(m / "usr")
        (m / "usr/share/doc").mkdir(parents=True)

    assert edit(work) == ["D  usr/share/doc/NEWS", "D  usr/share/doc/pkg/"]


def test_a_directory_returns_to_where_another_took_the_place_of_its_parent(edit: Any) -> None:
    def work(m: Path) -> None:
        os.rename(m / "old", m / "new")
        (m / "old").mkdir()
        os.rename(m / "new/deep", m / "old/deep")

    # `old` is `new` now, so seen from there `deep` did move.
    assert edit(work) == ["R  old/ -> new/", "A  old/", "R  old/deep/ -> old/deep/"]


def test_a_renamed_directory_explains_itself(edit: Any) -> None:
    def work(m: Path) -> None:
        os.rename(m / "old", m / "new")
        (m / "new/inside").write_text("changed\n")
        os.unlink(m / "new/deep/er")
        os.rename(m / "new/deep", m / "etc/depth")
        os.chmod(m / "etc/depth", 0o700)
        (m / "old").mkdir()

    assert edit(work) == [
        "R  old/deep/ -> etc/depth/  (mode)",
        "D  etc/depth/er",
        "R  old/ -> new/",
        "M  new/inside  (content, times)",
        "A  old/",
    ]


def test_renamed_within_its_directory_and_back(edit: Any) -> None:
    def work(m: Path) -> None:
        os.rename(m / "old/deep", m / "old/shallow")
        os.rename(m / "usr/share", m / "usr/elsewhere")
        os.rename(m / "usr/elsewhere", m / "usr/share")

    assert edit(work) == ["R  old/deep/ -> old/shallow/"]


def test_a_renamed_directory_returns_to_one_made_anew(edit: Any) -> None:
    def work(m: Path) -> None:
        os.rename(m / "old/deep", m / "aside")
        shutil.rmtree(m / "old")
        (m / "old").mkdir()
        os.rename(m / "aside", m / "old/deep")

    assert edit(work) == ["D  old/inside"]


def test_exchanged(edit: Any) -> None:
    def work(m: Path) -> None:
        fd = os.open(m, os.O_RDONLY)
        renameat2(fd, b"old", fd, b"etc", RENAME_EXCHANGE)
        os.close(fd)

    assert edit(work) == ["R  old/ -> etc/", "R  etc/ -> old/"]


def test_a_rename_over_another(edit: Any) -> None:
    def work(m: Path) -> None:
        os.rename(m / "old", m / "empty")
        os.rename(m / "big", m / "etc/hosts")

    assert edit(work) == [
        "D  empty/",
        "R  old/ -> empty/",
        "D  etc/hosts",
        "R  big -> etc/hosts",
    ]


def test_a_renamed_file(edit: Any) -> None:
    def work(m: Path) -> None:
        os.rename(m / "big", m / "huge")
        os.chmod(m / "huge", 0o600)
        os.rename(m / "etc/hosts", m / "etc/guests")
        with (m / "etc/guests").open("a") as out:  # brings the data up: nothing tells any more
            out.write("x")

    assert edit(work) == ["A  etc/guests", "D  etc/hosts", "R  big -> huge  (mode)"]


def test_a_second_name_is_no_rename(edit: Any) -> None:
    def work(m: Path) -> None:
        os.link(m / "big", m / "another")

    assert edit(work) == ["A  another"]


def test_all_names_of_a_hard_link_change(edit: Any) -> None:
    assert edit(lambda m: os.chmod(m / "one", 0o600)) == [
        "M  etc/two  (mode)",
        "M  old/deep/three  (mode)",
        "M  one  (mode)",
    ]


def test_hard_links_below_a_renamed_directory(edit: Any) -> None:
    def work(m: Path) -> None:
        os.rename(m / "old", m / "new")
        (m / "one").write_text("LINKED\n")
        os.unlink(m / "etc/two")

    assert edit(work) == [
        "D  etc/two",
        "R  old/ -> new/",
        "M  new/deep/three  (content, times)",
        "M  one  (content, times)",
    ]


def test_names_that_are_not_text(edit: Any) -> None:
    def work(m: Path) -> None:
        (m / "two\nlines").touch()
        with open(os.fsencode(m) + b"/\xff\x01", "w"):
            pass
        (m / ("n" * 255)).touch()

    assert edit(work) == ["A  " + "n" * 255, "A  two\\nlines", "A  \\377\\001"]


def test_deeper_than_a_path_can_be(edit: Any, tmp_path: Path) -> None:
    depth = 1200  # more than the interpreter's stack, too

    def work(m: Path) -> None:
        here = os.open(m, os.O_RDONLY)
        for _ in range(depth):
            os.mkdir("deep-down", dir_fd=here)
            there = os.open("deep-down", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = there
        os.close(here)

    try:
        assert len(edit(work)) == depth
    finally:
        run("rm", "-rf", tmp_path / "store")  # pytest's own clean-up would drown in it


def test_modes_of_the_root_itself(edit: Any, lower: Path) -> None:
    os.chmod(lower, 0o711)
    assert edit(lambda m: os.chmod(m, 0o755)) == ["M  /  (mode)"]


def test_an_upper_that_knows_whole_seconds_only(tmp_path: Path, lower: Path) -> None:
    """On ext3 with inodes of 128 bytes a copy-up loses the nanoseconds: that is no change."""
    image, place = tmp_path / "image", tmp_path / "mnt"
    place.mkdir()
    with image.open("wb") as out:
        out.truncate(16 << 20)
    run("mke2fs", "-q", "-t", "ext3", "-I", "128", image)
    run("mount", "-o", "loop", image, place)
    try:
        with kernel_overlay([lower], place / "store", tmp_path / "merged") as merged:
            os.chmod(merged / "etc/fstab", 0o600)
            os.utime(merged / "etc/hosts", ns=(OLD, OLD + 2_000_000_000))
        assert lines(place / "store", lower) == ["M  etc/fstab  (mode)", "M  etc/hosts  (times)"]
    finally:
        run("umount", place)
