"""The store of a running root, shown raw, read-only, and always with what the union has written."""

from __future__ import annotations

import errno
import json
import os
import random
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from cowfs.linux import mount_table, mounts
from cowfs.linux.files import RENAME_EXCHANGE, renameat2
from cowfs.linux.mount_table import mount_of
from tests.boot.root import Root
from tests.support.mounts import TROUBLE, cowfs, eventually
from tests.support.system import NOBODY, needs_fuse, needs_root, run

pytestmark = [needs_root, needs_fuse]

_BIG = 5_000_003
_MS_REMOUNT = 32


@pytest.fixture(params=["image", "memory"])
def shown(root: Root, store: Path, request: pytest.FixtureRequest) -> Iterator[Root]:
    """A root whose store is shown, in an image and in memory."""
    yield from _started(root, store if request.param == "image" else "memory")


@pytest.fixture
def in_image(root: Root, store: Path) -> Iterator[Root]:
    """A root whose store is shown, in an image."""
    yield from _started(root, store)


@pytest.fixture
def in_memory(root: Root) -> Iterator[Root]:
    """A root whose store is shown, in memory."""
    yield from _started(root, "memory")


def _started(root: Root, store: Path | str) -> Iterator[Root]:
    code, said = root.start(store)
    assert (code, "WARNING" in said) == (0, False), said
    yield root
    root.stop()
    assert mount_of(root.shown) is None
    log = (root.top / "log").read_text()
    assert not TROUBLE.search(log), log


@contextmanager
def opened(path: Path | str, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        with suppress(OSError):  # ENOTCONN
            os.close(fd)


@contextmanager
def refused(code: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == code, caught.value


def test_what_is_written_is_seen_at_once(shown: Root) -> None:
    name, raw = shown.root / "new", shown.shown / "upper/new"
    data = random.Random(1).randbytes(_BIG)
    name.write_bytes(data)
    assert raw.read_bytes() == data
    with name.open("ab") as file:
        file.write(b"more")
    assert raw.read_bytes() == data + b"more"
    os.truncate(name, 1_000_001)
    assert raw.read_bytes() == data[:1_000_001]
    os.truncate(name, _BIG)
    assert raw.read_bytes() == data[:1_000_001] + bytes(_BIG - 1_000_001)
    name.rename(name.with_name("renamed"))
    assert not raw.exists()
    assert raw.with_name("renamed").stat().st_size == _BIG
    name.with_name("renamed").unlink()
    assert sorted(os.listdir(shown.shown / "upper")) == []


def test_open_files_are_read_anew(shown: Root) -> None:
    """Open files show each change at once, even in the same second and with the same size."""
    name = shown.root / "new"
    name.write_bytes(b"old")
    with opened(name, os.O_WRONLY) as writing, opened(shown.shown / "upper/new") as reading:
        for number in range(100):
            os.pwrite(writing, b"%03d" % number, 0)
            assert os.pread(reading, 3, 0) == b"%03d" % number
        for number in range(100):
            os.pwrite(writing, b"%d" % number, 5000 + 100 * number)
            assert os.pread(reading, 10, 5000 + 100 * number) == b"%d" % number
            assert os.fstat(reading).st_size == os.fstat(writing).st_size


def test_raw(shown: Root) -> None:
    """Whiteouts, the overlay's attributes, the header, and the store's directories."""
    (shown.root / "gone").unlink()
    (shown.root / "file").chmod(0o4750)
    (shown.root / "link").symlink_to("to/nowhere")
    os.mknod(shown.root / "device", stat.S_IFBLK | 0o600, os.makedev(7, 300))
    os.utime(shown.root / "link", ns=(-1_500_000_000, 1_234_567_890_123_456_789), follow_symlinks=False)
    upper = shown.shown / "upper"
    gone = (upper / "gone").lstat()
    assert (stat.S_ISCHR(gone.st_mode), gone.st_rdev) == (True, 0)
    assert os.getxattr(upper / "file", "trusted.overlay.origin")
    assert "trusted.overlay.origin" in os.listxattr(upper / "file")
    assert "trusted.overlay.origin" not in os.listxattr(shown.root / "file")
    for name in ("file", "link", "device"):
        there, here = (upper / name).lstat(), (shown.root / name).lstat()
        for what in ("mode", "size", "uid", "gid", "rdev", "mtime_ns", "atime_ns", "ctime_ns", "nlink"):
            assert getattr(there, f"st_{what}") == getattr(here, f"st_{what}"), (name, what)
    assert os.readlink(upper / "link") == "to/nowhere"
    assert json.loads((shown.shown / "cowfs/header.json").read_text())["lowers"]
    assert {"upper", "work", "cowfs", "lost+found"} == set(os.listdir(shown.shown))


def test_is_a_filesystem_of_its_own(shown: Root) -> None:
    devices = {os.stat(place).st_dev for place in (shown.root, shown.shown, shown.top)}
    assert len(devices) == 3
    here = mount_of(shown.shown)
    assert here is not None
    assert (here.fstype, here.super_options[:2]) == ("fuse.cowfs-store", "ro")
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(here.options.split(","))
    room, ours = os.statvfs(shown.shown), os.statvfs(shown.root)
    assert room.f_blocks > 1000
    assert (room.f_blocks, room.f_bfree, room.f_files) == (ours.f_blocks, ours.f_bfree, ours.f_files)


def _link(upper: Path) -> None:
    os.link(upper / "new", upper / "x")


CHANGES: dict[str, Callable[[Path], object]] = {
    "create": lambda upper: (upper / "x").touch(),
    "open": lambda upper: os.open(upper / "new", os.O_WRONLY),
    "truncate": lambda upper: os.truncate(upper / "new", 0),
    "unlink": lambda upper: (upper / "new").unlink(),
    "mkdir": lambda upper: (upper / "x").mkdir(),
    "rmdir": lambda upper: (upper / "dir").rmdir(),
    "symlink": lambda upper: (upper / "x").symlink_to("y"),
    "link": _link,
    "mknod": lambda upper: os.mknod(upper / "x", stat.S_IFIFO),
    "rename": lambda upper: (upper / "new").rename(upper / "x"),
    "exchange": lambda upper: renameat2(
        -100, os.fsencode(upper / "new"), -100, os.fsencode(upper / "dir"), RENAME_EXCHANGE
    ),
    "chmod": lambda upper: (upper / "new").chmod(0o600),
    "chown": lambda upper: os.chown(upper / "new", 1, 1),
    "utime": lambda upper: os.utime(upper / "new"),
    "setxattr": lambda upper: os.setxattr(upper / "new", "user.x", b"y"),
    "removexattr": lambda upper: os.removexattr(upper / "new", "user.there"),
}


@pytest.mark.parametrize("how", ["as mounted", "remounted"])
def test_read_only(in_memory: Root, how: str) -> None:
    """Not only because of the mount flag: the store has one writer."""
    (in_memory.root / "new").write_text("x")
    (in_memory.root / "dir").mkdir()
    os.setxattr(in_memory.root / "new", "user.there", b"y")
    if how == "remounted":
        flags = _MS_REMOUNT | mounts.MS_NOSUID | mounts.MS_NODEV
        mounts.mount("cowfs-store", os.fspath(in_memory.shown), "fuse.cowfs-store", flags, "")
    upper = in_memory.shown / "upper"
    for what, change in CHANGES.items():
        with pytest.raises(OSError) as caught:
            change(upper)
        assert caught.value.errno == errno.EROFS, (what, caught.value)
    assert sorted(os.listdir(upper)) == ["dir", "new"]
    assert (upper / "new").read_text() == "x"


def test_large_directory(in_memory: Root) -> None:
    """A listing has each name once, even if other names change during the listing."""
    names = [f"{number:04}-{'x' * (number % 200)}" for number in range(1500)]
    (in_memory.root / "dir").mkdir()
    for name in names:
        (in_memory.root / "dir" / name).touch()
    there = in_memory.shown / "upper/dir"
    assert sorted(os.listdir(there)) == names
    with os.scandir(there) as entries:
        seen = [next(entries).name]
        for name in names[1::2]:
            (in_memory.root / "dir" / name).unlink()
        (in_memory.root / "dir/later").touch()
        more = list(entries)
    seen += [entry.name for entry in more]
    assert len(set(seen)) == len(seen)
    assert set(names[::2]) <= set(seen)
    for entry in os.scandir(there):
        assert (entry.inode(), entry.is_file()) == (os.stat(entry.path).st_ino, True)


def test_others_see_what_the_modes_let_them(in_memory: Root) -> None:
    """ACLs apply too: the mode alone would let the file's group read."""
    secret, by_acl = in_memory.root / "secret", in_memory.root / "acl"
    secret.write_text("x")
    secret.chmod(0o600)
    by_acl.write_text("x")
    os.chown(by_acl, 0, NOBODY)
    entries = ((1, 6, -1), (2, 6, 1234), (4, 0, -1), (0x10, 6, -1), (0x20, 0, -1))
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    os.setxattr(by_acl, "system.posix_acl_access", acl)
    (in_memory.root / "open").write_text("x")
    for name in ("trusted.mine", "user.mine"):
        os.setxattr(in_memory.root / "open", name, b"y")
    upper = in_memory.shown / "upper"
    for name, seen in (("secret", False), ("acl", False), ("open", True)):
        done = as_nobody(upper, "cat", name)
        assert (done == "x") == seen, (name, done)
    listed = as_nobody(upper, "/usr/bin/python3", "-Ic", "import os; print(os.listxattr('open'))")
    assert listed.strip() == "['user.mine']"
    assert sorted(os.listxattr(upper / "open")) == ["trusted.mine", "user.mine"]
    assert os.getxattr(upper / "acl", "system.posix_acl_access") == acl


def as_nobody(place: Path, *command: str) -> str:
    """Return the output of a command of nobody's at *place*, whose parents nobody cannot access."""
    become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    return run(*become, *command, cwd=place, check=False).stdout


def test_gone_while_it_is_known(shown: Root) -> None:
    """Another file has its number by then: its data must not be visible."""
    names = [shown.root / f"{number}" for number in range(8)]
    for name in names:
        name.write_text(f"old {name.name}")
    directory = shown.root / "dir"
    directory.mkdir()
    upper = shown.shown / "upper"
    with opened(upper / "3", os.O_PATH) as known, opened(upper / "dir") as listed:
        numbers = {(upper / "3").stat().st_ino, (upper / "dir").stat().st_ino}
        names[3].unlink()
        directory.rmdir()

        def is_reused() -> bool:
            for number in range(50):
                (shown.root / f"later-{number}").unlink(missing_ok=True)
            for number in range(50):
                (shown.root / f"later-{number}").write_text("other data")
            return numbers <= {(upper / name).stat().st_ino for name in os.listdir(upper)}

        eventually(is_reused, "the numbers of the inodes are used again")
        for call in (
            lambda: os.fstat(known),
            lambda: os.open(f"/proc/self/fd/{known}", os.O_RDONLY),
            lambda: os.listdir(listed),
            lambda: os.fstat(listed),
            lambda: os.stat("x", dir_fd=listed),
        ):
            with refused(errno.ESTALE):
                call()
    with refused(errno.ENOENT):
        os.stat(upper / "3")


def test_open_while_it_is_removed(shown: Root) -> None:
    data = random.Random(2).randbytes(300_000)
    (shown.root / "new").write_bytes(data)
    (shown.root / "replaced").write_bytes(data)
    upper = shown.shown / "upper"
    with opened(upper / "new") as one, opened(upper / "replaced") as other:
        (shown.root / "new").unlink()
        (shown.root / "by").write_bytes(b"z" * 300_000)
        (shown.root / "by").rename(shown.root / "replaced")
        for number in range(20):
            (shown.root / f"later-{number}").write_bytes(b"z" * 300_000)
        for fd in (one, other):
            assert os.pread(fd, 600_000, 0) == data
            assert (os.fstat(fd).st_nlink, os.fstat(fd).st_size) == (0, 300_000)
        assert (upper / "replaced").read_bytes() == b"z" * 300_000


def test_changes_while_many_look(in_memory: Root) -> None:
    """A file that is replaced always has complete content, and earlier writes are visible."""
    here, upper = in_memory.root, in_memory.shown / "upper"
    (here / "file").write_bytes(b"\0" * 50_000)
    done = threading.Event()
    wrong: list[object] = []
    looks = [0, 0]

    def look(which: int) -> None:
        while not done.is_set() and not wrong:
            try:
                data = (upper / "file").read_bytes()
                if len(data) != 50_000 or data.count(data[:1]) != 50_000:
                    wrong.append(data[:100])
                for name in os.listdir(upper):
                    try:
                        (upper / name).lstat()
                    except FileNotFoundError:
                        pass
                looks[which] += 1
            except OSError as error:
                wrong.append(error)

    threads = [threading.Thread(target=look, args=[which]) for which in range(2)]
    for thread in threads:
        thread.start()
    try:
        number = 0
        while (min(looks) < 50 or number < 150) and not wrong:
            (here / "next").write_bytes(bytes([number % 256]) * 50_000)
            (here / "next").rename(here / "file")
            (here / f"d{number % 7}").mkdir(exist_ok=True)
            if number % 7 == 6:
                (here / "d3").rmdir()
            text = str(number) * (number % 50)
            (here / "text").write_text(text)
            assert (upper / "text").read_text() == text
            assert (upper / "d3").exists() == (here / "d3").exists()
            number += 1
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not wrong


def test_grow_with_files_open(in_image: Root, store: Path) -> None:
    data = random.Random(3).randbytes(3_000_000)
    (in_image.root / "kept").write_bytes(data)
    (in_image.root / "removed").write_bytes(data)
    upper = in_image.shown / "upper"
    with opened(upper / "kept") as kept, opened(upper / "removed") as removed, os.scandir(upper) as listing:
        first = next(listing).name
        (in_image.root / "removed").unlink()
        cowfs("grow", store, "40", check=True)
        (in_image.root / "more").write_bytes(data[::-1])
        assert os.pread(kept, _BIG, 0) == os.pread(removed, _BIG, 0) == data
        assert {"kept"} <= {first, *(entry.name for entry in listing)} <= {"kept", "removed"}
        assert (upper / "more").read_bytes() == data[::-1]
        assert os.statvfs(upper).f_blocks * os.statvfs(upper).f_frsize > 30 << 20
        assert not (upper / "removed").exists()
    in_image.stop()
    assert cowfs("check", "-n", store).returncode == 0


def test_persist_with_files_open(in_memory: Root) -> None:
    data = random.Random(4).randbytes(3_000_000)
    (in_memory.root / "kept").write_bytes(data)
    (in_memory.root / "removed").write_bytes(data)
    upper, image = in_memory.shown / "upper", in_memory.top / "kept.bs"
    with opened(upper / "kept") as kept, opened(upper / "removed") as removed:
        (in_memory.root / "removed").unlink()
        cowfs("persist", in_memory.root, image, check=True)
        (in_memory.root / "more").write_bytes(data[::-1])
        assert os.pread(kept, _BIG, 0) == os.pread(removed, _BIG, 0) == data
        assert (upper / "more").read_bytes() == data[::-1]
        with opened(in_memory.root / "kept", os.O_WRONLY) as writing:
            os.pwrite(writing, b"changed", 0)
        assert os.pread(kept, 7, 0) == b"changed"
    assert (upper / "kept").read_bytes() == b"changed" + data[7:]
    in_memory.stop()
    assert mount_of(in_memory.shown) is None
    assert run("debugfs", "-R", "stat /upper/more", image).stdout.count("Size: 3000000") == 1
    assert cowfs("check", "-n", image).returncode == 0


def test_persist_into_itself_is_refused(in_memory: Root) -> None:
    """The daemon would request the directory from itself, and wait forever."""
    done = cowfs("persist", in_memory.root, in_memory.shown / "upper/kept.bs", timeout=20)
    assert done.returncode == 32
    assert "is inside the mount whose changes it would hold" in done.stderr
    assert sorted(os.listdir(in_memory.shown / "upper")) == []


def test_union_ends_while_it_is_looked_at(in_image: Root, store: Path) -> None:
    """In use by an open file without a name, by a working directory, and by a second mount."""
    (in_image.root / "new").write_text("x")
    second = in_image.top / "second"
    second.mkdir()
    run("mount", "--bind", in_image.shown, second)
    try:
        with opened(in_image.shown / "upper/new") as fd, opened(second / "upper") as directory:
            (in_image.root / "new").unlink()
            in_image.stop()
            assert mount_of(in_image.shown) is None
            for call in (lambda: os.pread(fd, 1, 0), lambda: os.listdir(directory), lambda: os.stat(second)):
                with refused(errno.ENOTCONN):
                    call()
    finally:
        umounted = run("umount", second, check=False)
    assert umounted.returncode == 0
    assert cowfs("check", "-n", store).returncode == 0  # no inode without a name is left


def test_unmounted_while_the_union_goes_on(in_image: Root) -> None:
    (in_image.root / "new").write_text("x")
    assert (in_image.shown / "upper/new").read_text() == "x"
    run("umount", in_image.shown)
    (in_image.root / "after").write_text("y")
    assert (in_image.root / "new").read_text() == "x"
    in_image.stop()


def test_unmounted_and_another_mounted_there(in_image: Root) -> None:
    """The daemon removes only its own mount."""
    second = in_image.top / "second"
    second.mkdir()
    run("mount", "--bind", in_image.shown, second)
    run("umount", in_image.shown)
    run("mount", "-t", "tmpfs", "mine", in_image.shown)
    try:
        (in_image.shown / "kept").touch()
        assert connections_of(in_image) == 2
        run("umount", second)
        eventually(lambda: connections_of(in_image) == 1, "the daemon lets go of the view")
        assert (in_image.shown / "kept").exists()
    finally:
        run("umount", in_image.shown)


def connections_of(root: Root) -> int:
    """Return how many FUSE connections the daemon has."""
    open_files = Path(f"/proc/{root.pid()}/fd")
    count = 0
    for number in os.listdir(open_files):
        with suppress(FileNotFoundError):  # closed meanwhile
            count += os.readlink(open_files / number) == "/dev/fuse"
    return count


def test_connection_is_cut(in_image: Root) -> None:
    """An administrator aborts the connection (fusectl): the union continues."""
    here = mount_of(in_image.shown)
    assert here is not None
    connections = in_image.top / "connections"
    connections.mkdir()
    run("mount", "-t", "fusectl", "fusectl", connections)
    try:
        (connections / here.dev.split(":")[1] / "abort").write_text("1")
    finally:
        run("umount", connections)
    with pytest.raises(OSError):
        os.stat(in_image.shown / "upper")
    (in_image.root / "after").write_text("y")
    eventually(lambda: mount_of(in_image.shown) is None, "the dead mount is taken away")


def test_cannot_be_shown(root: Root, store: Path) -> None:
    root.shown.rmdir()
    code, said = root.start(store)
    assert code == 0
    assert "WARNING: the store cannot be shown: " in said
    (root.root / "new").write_text("x")
    root.stop()


def test_is_no_union(in_image: Root) -> None:
    """Commands that find a union by its mountpoint or store find only the union."""
    assert cowfs("umount", in_image.shown).returncode != 0
    assert "my störe.bs" in cowfs("info", in_image.root, check=True).stdout
    with closing(socket.socket(socket.AF_UNIX)) as connection, refused(errno.ECONNREFUSED):
        here = mount_of(in_image.shown)
        assert here is not None
        connection.connect(b"\0cowfs-" + here.dev.encode())
    types = [mount.fstype for mount in mount_table.mountinfo() if mount.fstype.startswith("fuse.cowfs")]
    assert sorted(types)[0] == "fuse.cowfs" and types.count("fuse.cowfs") == 1
