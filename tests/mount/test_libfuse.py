"""The features of the C module beside pyfuse3, each tested by its effect, so that a silent fallback fails."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounts import cowfs
from tests.support.noted import Noted, noted_mount
from tests.support.squashfs import needs_mksquashfs
from tests.support.system import NOBODY, as_nobody_prefix, needs_fuse, needs_root, run

pytestmark = needs_fuse


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Noted]:
    with noted_mount(tmp_path) as noted:
        yield noted


def test_a_directory_that_was_listed_is_not_read_again(mount: Noted) -> None:
    assert len(os.listdir(mount.path / "d")) == 102
    assert mount.requests("readdir")
    mount.forget()
    assert len(os.listdir(mount.path / "d")) == 102
    assert mount.requests("opendir") and not mount.requests("readdir")


def test_reads_do_not_pass_through_python(mount: Noted) -> None:
    (mount.path / "new").write_bytes(b"above\n" * 1000)
    for name, line in (("file", b"below\n"), ("new", b"above\n")):
        with (mount.path / name).open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert file.read() == line * 1000
    assert mount.requests("write") and not mount.requests("read")


@pytest.fixture
def with_image(tmp_path: Path) -> Iterator[Noted]:
    cowfs("create", tmp_path / "store", "16", check=True)
    with noted_mount(tmp_path) as noted:
        yield noted


def _changes(path: Path) -> tuple[int, ...]:
    """Change a file by name and by descriptor; return what stat(2) shows."""
    with path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"more", 4090)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert file.read()[4088:] == b"xxmore"
        os.fchmod(file.fileno(), 0o601)
    os.chown(path, os.getuid(), os.getgid())
    os.utime(path, ns=(1_000_000_007, 2_000_000_009))
    now = path.stat()
    assert now.st_ctime_ns > 1 << 60
    return now.st_mode, now.st_uid, now.st_size, now.st_atime_ns, now.st_mtime_ns, now.st_nlink


_HANDLED = ("getattr", "setattr", "read", "write")


def test_simple_files_of_an_image_are_changed_without_python(with_image: Noted) -> None:
    path = with_image.path / "new"
    path.write_bytes(b"x" * 4090)
    path.chmod(0o600)
    with_image.forget()
    uid = os.getuid()
    assert _changes(path) == (0o100601, uid, 4094, 1_000_000_007, 2_000_000_009, 1)
    os.truncate(path, 5000)
    assert path.stat().st_mtime_ns > 2_000_000_009
    assert path.read_bytes()[4090:] == b"more" + bytes(906)
    os.truncate(path, 3)
    os.truncate(path, 6)
    assert (path.read_bytes(), path.stat().st_blocks) == (b"xxx" + bytes(3), 8)
    path.write_bytes(b"new")
    assert (path.read_bytes(), path.stat().st_size) == (b"new", 3)
    path.write_bytes(b"")
    assert path.stat().st_blocks == 0
    assert [kind for kind in _HANDLED if with_image.requests(kind)] == []
    path.write_bytes(bytes(1 << 21))
    os.truncate(path, 1)
    assert with_image.requests("setattr") == 1


def test_a_checkpoint_does_not_change_by_open_files(with_image: Noted) -> None:
    path = with_image.path / "new"
    path.write_bytes(b"before")
    path.chmod(0o640)
    with path.open("r+b", buffering=0) as file:
        cowfs("checkpoint", with_image.path, "before", check=True)
        file.write(b"after")
        os.fchmod(file.fileno(), 0o666)
        os.fchown(file.fileno(), os.getuid(), os.getgid())
    cowfs("rollback", with_image.path, "before", check=True)
    assert (path.read_bytes(), path.stat().st_mode) == (b"before", 0o100640)


def test_files_that_were_copied_up_are_too(with_image: Noted) -> None:
    path = with_image.path / "file"
    path.write_bytes(b"x" * 4090)
    with_image.forget()
    assert _changes(path)[0] == 0o100601
    assert [kind for kind in _HANDLED if with_image.requests(kind)] == []


@pytest.mark.parametrize("what", ["acl", "capability", "set-ID", "link", "metacopy", "immutable"])
def test_other_files_of_an_image_are_changed_by_python(with_image: Noted, what: str) -> None:
    path = with_image.path / ("large" if what == "metacopy" else "new")
    if what != "metacopy":
        path.write_bytes(b"x" * 4090)
    path.chmod(0o600)
    if what == "capability" and run("setcap", "cap_net_raw=ep", path, check=False).returncode:
        pytest.skip("needs CAP_SETFCAP")
    if what == "metacopy":
        with_image.forget()
        path.chmod(0o601)
        assert with_image.requests("setattr") and stat.S_IMODE(path.stat().st_mode) == 0o601
        return
    if what == "acl":
        run("setfacl", "-m", f"u:{NOBODY}:rwx", path)
    elif what == "set-ID":
        path.chmod(0o6711)
    elif what == "link":
        os.link(path, with_image.path / "other")
    elif what == "immutable" and run("chattr", "+i", path, check=False).returncode:
        pytest.skip("needs CAP_LINUX_IMMUTABLE")
    with_image.forget()
    if what == "immutable":
        with pytest.raises(PermissionError):
            path.chmod(0o601)
        run("chattr", "-i", path)
        return
    names = 2 if what == "link" else 1
    assert _changes(path)[::5] == (0o100601, names)
    assert with_image.requests("setattr")
    if what == "capability":
        assert run("getcap", path).stdout == ""
    if what == "acl":
        assert "group::---\nmask::---" in run("getfacl", "-c", path).stdout.replace("#effective:---", "")


def test_a_device_that_is_stored_as_a_file_is_changed_as_a_device(with_image: Noted) -> None:
    path = with_image.path / "device"
    os.mknod(path, stat.S_IFCHR | 0o644, 0)
    for mode in (0o600, 0o601):
        path.chmod(mode)
        os.chown(path, os.getuid(), os.getgid())
        os.utime(path, ns=(1_000_000_007, 2_000_000_009))
        now = path.lstat()
        assert (now.st_mode, now.st_mtime_ns) == (stat.S_IFCHR | mode, 2_000_000_009)


@pytest.fixture
def over_squashfs(tmp_path: Path) -> Iterator[Noted]:
    cowfs("create", tmp_path / "store", "16", check=True)
    with noted_mount(tmp_path, packed=True) as noted:
        yield noted


_SHORTCUTS = (
    "_beyond",
    "create",
    "fsyncdir",
    "getxattr",
    "listxattr",
    "lookup",
    "mkdir",
    "mknod",
    "read",
    "readdir",
    "setxattr",
    "unlink",
    "rename",
    "link",
    "symlink",
)


@needs_mksquashfs
@pytest.mark.parametrize("again", [False, True], ids=["", "again"])
def test_attributes_of_lower_files_are_changed_without_python(over_squashfs: Noted, again: bool) -> None:
    """No data is copied, whatever the size; stat(2) shows the blocks of the lower's data all the same."""
    paths = [over_squashfs.path / name for name in ("file", "large", "d/small")]
    before = [path.stat() for path in paths]
    contents = [path.read_bytes() for path in paths]
    (over_squashfs.path / "d").chmod(0o711)
    if again:
        for path in paths:
            path.chmod(0o644)
        over_squashfs.remount()
        assert [path.stat().st_mode for path in paths] == [0o100644] * 3
    over_squashfs.forget()
    for path, known in zip(paths, before, strict=True):
        path.chmod(0o1640)
        os.chown(path, os.getuid(), os.getgid())
        os.utime(path, ns=(1_000_000_007, 2_000_000_009))
        now = path.stat()
        assert (now.st_mode, now.st_atime_ns, now.st_mtime_ns) == (0o101640, 1_000_000_007, 2_000_000_009)
        assert (now.st_ino, now.st_size, now.st_blocks) == (known.st_ino, known.st_size, known.st_blocks)
    for path, content in ((paths[0], contents[0]), (paths[2], contents[2])):
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert file.read() == content
    assert [kind for kind in _HANDLED if over_squashfs.requests(kind)] == []
    assert paths[0].stat().st_atime_ns > 2_000_000_009  # as relatime says
    assert paths[1].read_bytes() == contents[1]
    for path in paths:
        layers = json.loads(cowfs("explain", "--json", path, check=True).stdout)["layers"]
        assert [rule["rule"] for layer in layers for rule in layer["rules"]] == ["metacopy", "data"]
    paths[2] = paths[2].rename(over_squashfs.path / "small")  # which copies the data of small files
    layers = json.loads(cowfs("explain", "--json", paths[2], check=True).stdout)["layers"]
    assert "metacopy" not in [rule["rule"] for layer in layers for rule in layer["rules"]]
    for path, content in zip(paths, contents, strict=True):
        with path.open("ab") as file:
            file.write(b"more")
        assert path.read_bytes() == content + b"more"
    over_squashfs.remount()
    assert [path.read_bytes() for path in paths] == [content + b"more" for content in contents]
    assert {path.stat().st_mode for path in paths} == {0o101640}


@needs_mksquashfs
def test_copying_and_removing_files_needs_no_coroutines(over_squashfs: Noted) -> None:
    top = over_squashfs.path
    target = top / "target"
    target.mkdir()
    os.utime(top / "file", ns=(1, 2))  # which copies it up
    (top / "file").chmod(0o1640)
    over_squashfs.forget()
    (target / "sub").mkdir(mode=0o750)
    (target / "sub/dir").mkdir()
    run("cp", "-a", top / "d/small", top / "d/empty", target / "sub")
    assert (target / "sub/small").read_bytes() == b"small\n"
    assert (target / "sub/small").stat().st_mode == 0o100604
    assert (target / "sub/small").stat().st_mtime == 7
    assert (target / "sub/empty").stat().st_size == 0 == os.stat(target / "sub/empty").st_blocks
    with pytest.raises(FileNotFoundError):
        os.stat(target / "sub/none")
    (target / "sub/small").rename(target / "moved")
    os.link(target / "moved", target / "linked")
    assert os.stat(target / "linked").st_nlink == 2 == os.stat(target / "moved").st_nlink
    (target / "sub/empty").replace(target / "moved")
    assert ((target / "moved").read_bytes(), (target / "linked").read_bytes()) == (b"", b"small\n")
    assert os.stat(target / "linked").st_nlink == 1
    (target / "sub/link").symlink_to("../linked")
    assert (target / "sub/link").read_bytes() == b"small\n"
    (target / "moved").unlink()
    assert sorted(os.listdir(target)) == ["linked", "sub"]
    assert sorted(os.listdir(target / "sub")) == ["dir", "link"]
    assert [kind for kind in _SHORTCUTS if over_squashfs.requests(kind)] == []
    run("cp", "-a", top / "file", top / "large", target)  # one is in the store, one is not little
    assert over_squashfs.requests("_beyond")
    assert (target / "file").stat().st_mode == 0o101640
    assert (target / "large").read_bytes() == b"below\n" * 200_000


@needs_root
@needs_mksquashfs
def test_small_files_are_copied_up_without_coroutines(over_squashfs: Noted) -> None:
    top = over_squashfs.path
    os.utime(top / "d", (8, 8))  # which copies it up
    over_squashfs.forget()
    with (top / "d/small").open("ab") as file:
        file.write(b"more\n")
    os.chown(top / "d/empty", NOBODY, NOBODY)
    assert [kind for kind in (*_HANDLED, "getxattr") if over_squashfs.requests(kind)] == []
    assert (top / "d/small").read_bytes() == b"small\nmore\n"
    assert (top / "d/small").stat().st_mode == 0o100604
    assert (top / "d/empty").stat().st_uid == NOBODY
    assert cowfs("diff", "--name-only", top).stdout.split() == ["d/empty", "d/small"]
    (top / "file").chmod(0o4755)
    os.utime(top / "large", (9, 9))
    assert over_squashfs.requests("setattr") == 1, "of the set-ID bit"
    assert (top / "large").stat().st_blocks * 512 >= 1_200_000


def _see(top: Path) -> dict[str, tuple[int, ...]]:
    """Return what stat(2) says of all names in a directory, which is listed first."""
    return {entry.name: _stat_of(entry) for entry in os.scandir(top)}


def _stat_of(path: Path | os.DirEntry[str]) -> tuple[int, ...]:
    now = path.stat(follow_symlinks=False)
    return (
        now.st_ino, now.st_mode, now.st_nlink, now.st_uid, now.st_rdev, now.st_size, now.st_blocks,
        now.st_atime_ns, now.st_mtime_ns, now.st_ctime_ns,
    )  # fmt: skip


@needs_mksquashfs
def test_files_are_created_without_being_opened(over_squashfs: Noted) -> None:
    top = over_squashfs.path
    (top / "d/first").write_bytes(b"1")
    before = _served(top)
    for number in range(10):
        with open(os.open(top / f"d/{number}.new", os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o400), "rb+") as file:
            file.write(b"new")
            file.seek(0)
            assert file.read() == b"new"
    with pytest.raises(FileExistsError):
        os.open(top / "d/1.new", os.O_CREAT | os.O_EXCL)
    os.close(os.open(top / "d/1.new", os.O_CREAT))
    after = _served(top)
    new = {kind: count - before.get(kind, 0) for kind, count in after.items() if count != before.get(kind, 0)}
    assert new.keys() & {"CREATE", "MKNOD", "OPEN", "RELEASE"} == {"MKNOD"} and new["MKNOD"] == 10
    assert (top / "d/9.new").stat().st_mode == 0o100400


def _served(top: Path) -> dict[str, int]:
    """Return the number of requests of each kind."""
    told = json.loads(cowfs("info", "--json", top, check=True).stdout)
    return {kind: said["count"] for kind, said in told["requests"]["operations"].items()}


@needs_mksquashfs
def test_merged_directories_have_the_right_link_count(over_squashfs: Noted) -> None:
    top = over_squashfs.path
    assert (top / "d").stat().st_nlink == 102
    os.utime(top / "d", (8, 8))
    (top / "d").chmod(0o1750)
    over_squashfs.forget()
    (top / "d/new").mkdir()
    assert (top / "d").stat().st_nlink == 103
    (top / "d/7").rmdir()
    assert (top / "d").stat().st_nlink == 102
    (top / "d/8").rename(top / "8")
    now = (top / "d").stat()
    assert (now.st_nlink, now.st_mode) == (101, 0o41750)
    assert now.st_mtime_ns > 8 * 10**9
    (top / "d/1").rename(top / "d/one")
    (top / "d/new").rename(top / "d/1")
    assert (top / "d").stat().st_nlink == 101
    assert not over_squashfs.requests("getattr")
    over_squashfs.remount()
    assert (top / "d").stat().st_nlink == 101


@needs_mksquashfs
def test_merged_directories_are_listed_without_coroutines(over_squashfs: Noted) -> None:
    top = over_squashfs.path
    (top / "d/new").write_bytes(b"new")
    (top / "d/empty").unlink()
    (top / "d/0").rmdir()
    (top / "file").chmod(0o640)
    names = sorted([*map(str, range(1, 100)), "new", "small"])
    known = {name: _stat_of(top / "d" / name) for name in names}
    over_squashfs.remount()
    assert _see(top / "d") == known
    assert sorted(os.listdir(top)) == ["d", "file", "large", "link"]
    assert os.listdir(top / "d/1") == []
    assert os.readlink(top / "link") == "file"
    assert (top / "file").read_bytes() == b"below\n" * 1000
    kinds = ("lookup", "readdir", "opendir", "releasedir", "readlink")
    assert [kind for kind in kinds if over_squashfs.requests(kind)] == []
    with pytest.raises(NotADirectoryError):
        os.open(top / "file", os.O_DIRECTORY)
    two = [os.scandir(top / "d"), os.scandir(top / "d")]
    assert {entry.name for entry in two[0]} == {entry.name for entry in two[1]} == set(names)


@needs_root
def test_directories_of_an_image_are_listed_with_few_coroutines(with_image: Noted) -> None:
    top = with_image.path / "made"
    (top / "sub").mkdir(parents=True)
    for number in range(600):
        (top / f"{number}").write_bytes(bytes(number))
    with_image.forget()
    plain = _see(top)
    assert len(plain) == 601
    assert not with_image.requests("readdir")
    (top / "link").symlink_to("sub")
    os.link(top / "1", top / "also 1")
    os.setxattr(top / "2", "user.x", b"")
    os.mkfifo(top / "pipe")
    os.mknod(top / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.utime(top / "3", (2**33 + 2**30, -(2**31) + 5))
    run("chattr", "+i", top / "4")
    before = _see(top)
    with_image.remount()
    assert _see(top) == before
    assert with_image.requests("readdir") < 20
    with pytest.raises(PermissionError):
        (top / "4").unlink()
    run("chattr", "-i", top / "4")
    shown = set()
    with os.scandir(top) as entries:
        for place, entry in enumerate(entries):
            shown.add(entry.name)
            if place % 2 and not entry.is_dir(follow_symlinks=False):
                os.unlink(entry)
    assert shown == set(before)
    assert set(os.listdir(top)) < shown
    run("rm", "-rf", top)
    assert not top.exists()


def test_a_directory_that_is_on_disk_is_not_synced_again(with_image: Noted) -> None:
    directory = os.open(with_image.path, os.O_RDONLY)
    try:
        (with_image.path / "new").touch()
        os.fsync(directory)
        with_image.forget()
        os.fsync(directory)
        assert not with_image.requests("fsyncdir")
        (with_image.path / "other").touch()
        os.fsync(directory)
        assert with_image.requests("fsyncdir") == 1
    finally:
        os.close(directory)


@needs_mksquashfs
def test_links_of_files_with_times_that_are_far_off(over_squashfs: Noted) -> None:
    path = over_squashfs.path / "new"
    for second in (2**33 + 2**30, -(2**31) + 5, 7):  # in the years 2276, 1901, 1970
        path.touch()
        os.utime(path, (second, second))
        os.link(path, over_squashfs.path / f"linked {second}")
        (over_squashfs.path / f"linked {second}").rename(over_squashfs.path / "moved")
        now = (over_squashfs.path / "moved").stat()
        assert (now.st_atime, now.st_mtime, now.st_nlink) == (second, second, 2)
        (over_squashfs.path / "moved").unlink()


@needs_root
@needs_mksquashfs
def test_what_a_directory_gives_to_new_files_is_kept(over_squashfs: Noted) -> None:
    top = over_squashfs.path / "made"
    top.mkdir()
    (top / "before").touch()
    os.chown(top, -1, NOBODY)
    top.chmod(0o2755)
    (top / "group").touch()
    (top / "sub").mkdir()
    assert (top / "group").stat().st_gid == NOBODY == (top / "sub").stat().st_gid
    assert (top / "sub").stat().st_mode & stat.S_ISGID
    run("setfacl", "-d", "-m", f"u:{NOBODY}:rwx", top)
    (top / "acl").touch()
    assert f"user:{NOBODY}:rwx" in run("getfacl", "-cn", top / "acl").stdout
    assert "user:" not in run("getfacl", "-cn", top / "before").stdout.replace("user::", "")
    with pytest.raises(FileExistsError):
        (top / "acl").touch(exist_ok=False)
    with pytest.raises(OSError, match="File name too long"):
        (top / ("n" * 256)).touch()
    run("chattr", "+i", top)
    with pytest.raises(PermissionError):
        (top / "immutable").touch()
    with pytest.raises(PermissionError):
        (top / "acl").unlink()
    run("chattr", "-i", top)


@needs_mksquashfs
def test_an_acl_that_says_only_the_mode_changes_the_mode(over_squashfs: Noted) -> None:
    path = over_squashfs.path / "new"
    path.touch()
    path.chmod(0o1600)
    before = path.stat().st_ctime_ns
    run("setfacl", "--set", "u::rwx,g::r,o::x", path)
    changed = path.stat()
    assert changed.st_mode == 0o101741 and changed.st_ctime_ns > before
    run("setfacl", "--set", "u::rwx,g::r,o::x", path)
    assert path.stat().st_ctime_ns == changed.st_ctime_ns
    assert os.listxattr(path) == []
    run("setfacl", "-m", f"u:{NOBODY}:r", path)
    assert os.listxattr(path) == ["system.posix_acl_access"]
    run("setfacl", "--set", "u::rw,g::r,o::-", path)
    assert (os.listxattr(path), path.stat().st_mode) == ([], 0o101640)
    with pytest.raises(OSError) as caught:
        os.setxattr(path, "system.posix_acl_access", bytes.fromhex("02000000") + b"\1" * 24)
    assert caught.value.errno == errno.EINVAL
    for name, error in (("user.", errno.EINVAL), ("user.none", errno.ENODATA)):
        with pytest.raises(OSError) as caught:
            os.getxattr(path, name)
        assert caught.value.errno == error


def test_the_target_of_a_link_is_asked_for_once(mount: Noted) -> None:
    for _ in range(3):
        assert os.readlink(mount.path / "link") == "file"
    assert mount.requests("readlink") == 1


def test_where_there_is_a_default_acl_the_umask_does_not_count(mount: Noted) -> None:
    made = mount.path / "d/made"
    run("setfacl", "-d", "-m", "u::rwx,g::rwx,o::r", mount.path / "d")
    run("sh", "-c", 'umask 077; echo made >"$0"; echo made >"$1"', made, mount.path / "other")
    assert made.stat().st_mode & 0o777 == 0o664
    assert (mount.path / "other").stat().st_mode & 0o777 == 0o600


@needs_root
def test_the_acl_of_the_root_is_asked_for_once(nobody_path: Path) -> None:
    """The kernel asks whenever somebody else walks a path; but a change of the ACL counts at once."""
    with noted_mount(nobody_path, options=("allow_other",)) as mount:
        mount.path.chmod(0o755)

        def reads() -> bool:
            return run(*as_nobody_prefix(), "cat", mount.path / "file", check=False).returncode == 0

        assert reads()
        mount.forget()
        assert all(reads() for _ in range(5))
        assert mount.requests("getxattr", b"system.posix_acl_access") <= 2  # two may ask at the same time
        for _ in range(2):
            run("setfacl", "-m", f"u:{NOBODY}:---", mount.path)
            assert not reads()
            run("setfacl", "-b", mount.path)
            assert reads()
        cowfs("checkpoint", mount.path, "open", check=True)
        run("setfacl", "-m", f"u:{NOBODY}:---", mount.path)
        assert not reads()
        cowfs("rollback", mount.path, "open", check=True)
        assert reads()


def test_writing_does_not_ask_for_capabilities_each_time(mount: Noted) -> None:
    with (mount.path / "file").open("r+b", buffering=0) as file:
        for _ in range(20):
            file.write(b"x")
    assert mount.requests("write") == 20
    assert mount.requests("getxattr", b"security.capability") <= 1


def test_a_change_of_owner_takes_one_request(mount: Noted) -> None:
    (mount.path / "file").chmod(0o4755)
    mount.forget()
    os.chown(mount.path / "file", os.getuid(), os.getgid())
    assert mount.requests("setattr") and not mount.requests("getattr")
    assert stat.S_IMODE((mount.path / "file").stat().st_mode) == 0o755


def test_holes_are_found(mount: Noted) -> None:
    with (mount.path / "sparse").open("wb", buffering=0) as file:
        file.truncate(2 << 20)
        os.pwrite(file.fileno(), b"data", 1 << 20)
        os.fsync(file.fileno())
        assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == 1 << 20
        assert os.lseek(file.fileno(), 1 << 20, os.SEEK_HOLE) < 2 << 20
        with pytest.raises(OSError) as caught:
            os.lseek(file.fileno(), (1 << 20) + (1 << 18), os.SEEK_DATA)
        assert caught.value.errno == errno.ENXIO


def test_that_it_takes_no_part_is_said(tmp_path: Path) -> None:
    with noted_mount(tmp_path, first="import pyfuse3") as mount:
        assert (mount.path / "file").read_bytes() == b"below\n" * 1000
        assert mount.requests("read")
    assert re.search("WARNING .*pyfuse3 was loaded first", mount.log.read_text())
