"""Opening stores that are ext3 images, mounted by the kernel or read in-process: as root."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cowfs.errors import StoreBusy, StoreError, SystemFailure, WrongLower
from cowfs.linux import loop_devices, mount_table, safe_paths
from cowfs.store.offline.check import check_store
from cowfs.store.offline.create import create_store
from cowfs.store.offline.grow import grow_open_store, grow_store
from cowfs.store.offline.info import store_info
from cowfs.store.served.image import open_image
from cowfs.store.served.open import open_store
from cowfs.store.served.presence import Whereabouts
from cowfs.store.served.store import Store, Wanted
from tests.support.mounts import KERNEL_OPTIONS, eventually
from tests.support.system import needs_root, run
from tests.unit.test_store_open import LOWER, OTHER, hold, make_dir, names

pytestmark = [needs_root, pytest.mark.matrix]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "sysrcd.bs"
    create_store(str(path), 16 << 20)
    return path


@pytest.fixture(params=["kernel", "process"])
def engine(request: pytest.FixtureRequest) -> str:
    """Both of those who can read and write an image."""
    return str(request.param)


@pytest.fixture
def at(tmp_path: Path) -> Iterator[Path]:
    """A mountpoint, empty again at the end."""
    path = tmp_path / "at"
    path.mkdir()
    yield path
    if mount_table.mount_of(path):
        run("umount", path)


def put(image: Path, at: Path, *content: str) -> None:
    """Let the image hold these files."""
    run("mount", "-o", "loop", image, at)
    for name in content:
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).touch()
    run("umount", at)


def read(image: Path, path: str) -> bytes:
    return run("debugfs", "-R", f"cat {path}", image).stdout.encode()


def write(store: Store, name: bytes, data: bytes) -> None:
    _, file = store.layer.create(store.upper, name, 0o644, 0, 0)
    file.pwrite(data, 0)
    file.close()


def test_what_is_written_is_there_again(image: Path, engine: str) -> None:
    before = mount_table.mountinfo()
    store = open_store(str(image), engine=engine, lowers=[LOWER])
    assert mount_table.mountinfo() == before, "mounted where nobody sees it"
    assert (store.kind, store.path, store.xattr_prefix) == ("image", str(image), b"trusted.overlay.")
    assert store.bind([LOWER])
    assert 0 < store.free < store.size < 16 << 20
    write(store, b"file", b"content")
    uuid = store.header.uuid
    store.close()
    assert not safe_paths.loop_users(image), "close returns when the kernel has let go"
    assert run("e2fsck", "-fn", image).returncode == 0
    assert read(image, "upper/file") == b"content"

    again = open_store(str(image), engine=engine, lowers=[LOWER])
    assert (names(again), again.header.uuid, again.header.lowers) == ({b"file"}, uuid, (LOWER,))
    again.close()
    with pytest.raises(WrongLower):
        open_store(str(image), engine=engine, lowers=[OTHER])
    assert not safe_paths.loop_users(image)


def test_the_kernel_mounts_the_same_store(image: Path, at: Path, tmp_path: Path, engine: str) -> None:
    store = open_store(str(image), engine=engine)
    make_dir(store, b"ours")
    store.layer.mknod(store.upper, b"hidden", stat.S_IFCHR, 0, 0, 0)
    store.close()
    (tmp_path / "lower").mkdir()
    (tmp_path / "lower/hidden").touch()
    merged = tmp_path / "merged"
    merged.mkdir()
    run("mount", "-o", "loop", image, at)
    options = f"lowerdir={tmp_path}/lower,upperdir={at}/upper,workdir={at}/work,{KERNEL_OPTIONS}"
    run("mount", "-t", "overlay", "-o", options, "overlay", merged)
    assert os.listdir(merged) == ["ours"]
    (merged / "theirs").mkdir()
    run("umount", merged)
    run("umount", at)
    again = open_store(str(image), engine=engine)
    assert names(again) == {b"ours", b"theirs", b"hidden"}
    again.close()


def test_an_image_of_mke2fs_becomes_a_store(tmp_path: Path, engine: str) -> None:
    path = tmp_path / "image"
    run("mke2fs", "-q", "-t", "ext3", path, "16M")
    with pytest.raises(StoreError, match="without a store in it"):
        open_store(str(path), engine=engine, read_only=True)
    store = open_store(str(path), engine=engine)
    assert store.bind([LOWER])
    assert store.header.uuid == run("blkid", "-p", "-s", "UUID", "-o", "value", path).stdout.strip()
    store.close()
    assert store_info(str(path))["format"] == "overlayfs"


def test_a_store_of_the_kernels_is_adopted(tmp_path: Path, at: Path, engine: str) -> None:
    path = tmp_path / "image"
    run("mke2fs", "-q", "-t", "ext3", path, "16M")
    put(path, at, "upper/theirs", "work/work/rest")
    assert open_and_close(path, engine, read_only=True) == {b"theirs"}
    store = open_store(str(path), engine=engine)
    assert not store.bind([LOWER])
    assert store.layer.readdir(store.work) == []
    store.close()
    assert store_info(str(path))["lowers"][0]["path"] == "/lower"


def open_and_close(path: Path, engine: str = "kernel", *, read_only: bool = False) -> set[bytes]:
    store = open_store(str(path), engine=engine, read_only=read_only)
    found = names(store)
    store.close()
    return found


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (["etc/passwd"], "not a store: it contains etc"),
        (["upper/x", "etc/passwd"], "not a store: it contains etc"),
        (["upper/x", "work/work/incompat/volatile"], "volatile"),
    ],
)
def test_an_image_with_something_else_is_refused(
    tmp_path: Path, at: Path, content: list[str], said: str, engine: str
) -> None:
    path = tmp_path / "image"
    run("mke2fs", "-q", "-t", "ext3", path, "16M")
    put(path, at, *content)
    with pytest.raises(StoreError, match=said):
        open_store(str(path), engine=engine)
    assert not safe_paths.loop_users(path)


# --- in use


def test_a_second_one_is_told_who_has_it(image: Path) -> None:
    with hold(str(image)) as holder:
        for read_only in (False, True):
            with pytest.raises(StoreBusy, match=f"in use by process {holder.pid} "):
                open_store(str(image), read_only=read_only)
        assert f"process {holder.pid} " in store_info(str(image))["in_use_by"]
        holder.communicate("")
    assert store_info(str(image))["in_use_by"] is None


def test_a_killed_one_does_not_stand_in_the_way(image: Path) -> None:
    for _ in range(5):
        with hold(str(image)) as holder:
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            open_store(str(image)).close()  # perhaps while the kernel still unmounts for the dead
            assert holder.stdin is not None


def test_the_lock_outlives_the_one_who_is_killed_until_the_kernel_is_done(image: Path) -> None:
    store = open_store(str(image), engine="kernel")
    (device,) = safe_paths.loop_users(image)
    with image.open("rb") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    store.close()
    assert loop_devices.loop_backing(device) != os.fsencode(image)


def test_a_mounted_image_is_refused_naming_where(image: Path, at: Path, engine: str) -> None:
    run("mount", "-o", "loop", image, at)
    (device,) = safe_paths.loop_users(image)
    with pytest.raises(StoreBusy, match=f"loop device {device}, mounted on {at}"):
        open_store(str(image), engine=engine)
    assert device in store_info(str(image))["in_use_by"]
    run("umount", at)
    eventually(lambda: not safe_paths.loop_users(image), "the loop device is detached")
    open_store(str(image), engine=engine).close()


def test_an_attached_image_is_refused_too(image: Path, engine: str) -> None:
    device = run("losetup", "--find", "--show", image).stdout.strip()
    try:
        with pytest.raises(StoreBusy, match=rf"loop device {device} .losetup -d {device}"):
            open_store(str(image), engine=engine)
    finally:
        run("losetup", "-d", device)
    eventually(lambda: not safe_paths.loop_users(image), "the loop device is detached")


def test_an_image_mounted_by_fuse2fs_is_refused(image: Path, at: Path, engine: str) -> None:
    run("fuse2fs", image, at)
    try:
        with pytest.raises(StoreBusy, match=f"mounted on {at} as fuse"):
            open_store(str(image), engine=engine)
    finally:
        run("umount", at)

    def is_free() -> bool:
        try:
            open_store(str(image), engine=engine).close()
        except (StoreBusy, StoreError):
            return False
        return True

    eventually(is_free, "fuse2fs has written back")


# --- growing


def grow(store: Store, size: int | None, said: list[str] | None = None) -> int:
    """Do all steps of it."""
    steps = grow_open_store(store, size)
    try:
        while True:
            step = next(steps)
            if not isinstance(step, str):
                step()
            elif said is not None:
                said.append(step)
    except StopIteration as end:
        return int(end.value)


def test_an_open_store_grows(image: Path) -> None:
    store = open_store(str(image), engine="process")
    write(store, b"file", b"content")
    before = store.free
    kept, file = store.layer.create(store.upper, b"open", 0o600, 0, 0)
    store.layer.unlink(store.upper, b"open", kept)
    said: list[str] = []
    assert grow(store, 48 << 20, said) == 48 << 20
    assert said == [f"extending {image} from 16 MiB to 48 MiB"]
    assert store.free > before + (28 << 20)
    assert file.pwrite(bytes(30 << 20), 0) == 30 << 20
    file.close()
    assert store.layer.readdir(store.work) == []
    assert names(store) == {b"file"}
    with pytest.raises(StoreError, match="can only grow"):
        grow(store, 20 << 20)
    assert grow(store, None) == 48 << 20
    assert names(store) == {b"file"}
    store.close()
    run("e2fsck", "-fn", image)


def test_only_what_we_read_ourselves_grows_while_it_is_open(image: Path, tmp_path: Path) -> None:
    store = open_store(str(image), engine="kernel")
    with pytest.raises(StoreError, match=r"while the kernel has it.*unmount it first"):
        grow(store, 48 << 20)
    store.close()
    store = open_store(str(image), engine="process")
    whereabouts = Whereabouts(store, [], [])
    store.is_in_place = whereabouts.is_in_place
    image.rename(tmp_path / "moved")
    create_store(str(image), 16 << 20)
    with pytest.raises(StoreError, match="not the file that was mounted"):
        grow(store, 48 << 20)
    assert image.stat().st_size == 16 << 20
    write(store, b"still", b"works")
    whereabouts.close()
    store.close()


# --- damage


def test_a_store_that_was_not_unmounted_is_recovered_with_one_line(image: Path) -> None:
    store = open_store(str(image))
    write(store, b"before", b"")
    store.close()
    store = open_store(str(image), engine="kernel")
    write(store, b"synced", b"there")
    store.layer.sync()
    dirty = died(store, image)
    assert store_info(str(dirty))["state"] == "needs recovery"
    said: list[str] = []
    reader = open_store(str(dirty), read_only=True, progress=said.append)
    reader.close()
    assert store_info(str(dirty))["state"] == "needs recovery", "reading changes nothing"
    assert len(said) == 1
    assert "not cleanly unmounted" in said[0]
    said.clear()
    again = open_store(str(dirty), progress=said.append)
    assert names(again) == {b"before", b"synced"}
    again.close()
    assert read(dirty, "upper/synced") == b"there"
    assert said == [f"{dirty}: was not cleanly unmounted; recovered"]


@pytest.mark.parametrize("engine", ["process", "kernel"])
def test_a_killed_store_shows_everything_and_stays_as_it_is(image: Path, engine: str) -> None:
    """For reading: what is in the journal, and what was not even committed."""
    dirty = killed(image)
    before = dirty.read_bytes()
    said: list[str] = []
    reader = open_store(str(dirty), engine=engine, read_only=True, progress=said.append)
    assert names(reader) == {b"synced", b"written"}
    reader.close()
    assert dirty.read_bytes() == before
    assert len(said) == 1
    assert "not cleanly unmounted" in said[0]


def died(store: Store, image: Path) -> Path:
    """Close a store, and let its image be as if the process that had it had ended instead."""
    content = image.read_bytes()
    store.close()
    image.write_bytes(content)  # a copy would be known as one
    os.removexattr(image, "user.cowfs.closed")  # and so would this, put back into its file
    return image


def killed(image: Path) -> Path:
    """An image as the death of its daemon leaves it."""
    store = open_store(str(image), engine="process")
    write(store, b"synced", b"there")
    store.layer.sync()
    write(store, b"written", b"too")
    return died(store, image)


@pytest.mark.parametrize(
    "how", ["mount", "mount by the kernel", "check", "check -n", "grow", "mount damaged"]
)
def test_whatever_comes_after_a_kill_keeps_everything(image: Path, how: str) -> None:
    dirty = killed(image)
    said: list[str] = []
    if how.startswith("mount"):
        if how == "mount damaged":
            run("debugfs", "-w", "-R", "ssv state 2", dirty)
        engine = "kernel" if how == "mount by the kernel" else "process"
        again = open_store(str(dirty), engine=engine, progress=said.append)
        assert names(again) == {b"synced", b"written"}
        again.close()
        assert said == [f"{dirty}: was not cleanly unmounted; recovered"]
    elif how == "grow":
        grow_store(str(dirty), 48 << 20)
    else:
        assert check_store(str(dirty), read_only=how == "check -n").code == 0
    reader = open_store(str(dirty), read_only=True)
    assert names(reader) == {b"synced", b"written"}
    reader.close()
    if how != "check -n":
        assert run("e2fsck", "-fn", dirty, check=False).returncode == 0


@pytest.mark.parametrize("other", ["lower", "aufs", "full"])
def test_a_refused_image_is_not_touched(image: Path, other: str) -> None:
    if other == "aufs":
        run("mke2fs", "-q", "-F", "-t", "ext3", image)
        run("debugfs", "-w", "-R", "mkdir .wh..wh.aufs", image)
    store = open_store(str(image), lowers=[LOWER])
    store.bind([LOWER])
    store.close()
    if other == "full":
        for name in ("upper", "work", "cowfs"):
            run("debugfs", "-w", "-R", f"unlink {name}", image)
        run("debugfs", "-w", "-R", "mkdir home", image)
        run("e2fsck", "-fy", image, check=False)
    before = image.read_bytes()
    with pytest.raises((StoreError, WrongLower)):
        open_store(str(image), engine="process", lowers=[OTHER])
    assert image.read_bytes() == before


def test_the_engines_take_turns(image: Path) -> None:
    for number in range(4):
        store = open_store(str(image), engine=("kernel", "process")[number % 2])
        assert len(names(store)) == number
        make_dir(store, b"%d" % number)
        store.close()
    assert run("e2fsck", "-fn", image).returncode == 0


def test_an_engine_that_was_not_built_is_named(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cowfs.formats.ext3.image", None)
    with pytest.raises(SystemFailure, match=r"without the ext3 engine.*libext2fs-dev"):
        open_store(str(image), engine="process")


def test_a_store_that_cannot_be_repaired_is_refused(image: Path, engine: str) -> None:
    run("debugfs", "-w", "-R", "clri <2>", image)
    run("debugfs", "-w", "-R", "ssv state 2", image)
    with pytest.raises(StoreError, match=r"needs manual repair: .*oot inode.*e2fsck -f"):
        open_store(str(image), engine=engine)


def test_a_store_that_the_kernel_cannot_mount_is_refused(image: Path) -> None:
    run("debugfs", "-w", "-R", "clri <2>", image)  # with a clean superblock: nobody has noticed yet
    with pytest.raises(StoreError, match=r"the kernel cannot mount it.*cowfs check"):
        open_store(str(image), engine="kernel")
    assert not safe_paths.loop_users(image)


@pytest.mark.parametrize("damage", ["text", "empty", "truncated", "ext4"])
def test_what_is_no_image_is_refused_untouched(tmp_path: Path, damage: str, engine: str) -> None:
    path = tmp_path / "sysrcd.bs"

    def truncated() -> None:
        create_store(str(path), 32 << 20)
        os.truncate(path, 20 << 20)

    make: dict[str, Callable[[], object]] = {
        "text": lambda: path.write_text("my store\n"),
        "empty": path.touch,
        "truncated": truncated,
        "ext4": lambda: run("mke2fs", "-q", "-t", "ext4", path, "32M"),
    }
    make[damage]()
    before = path.read_bytes()
    with pytest.raises(StoreError, match=rf"{damage}"):
        open_store(str(path), engine=engine)
    assert path.read_bytes() == before


# --- places and engines


def test_read_only_media_are_named(tmp_path: Path) -> None:
    media = tmp_path / "cd"
    media.mkdir()
    run("mount", "-t", "tmpfs", "tmpfs", media)
    try:
        create_store(str(media / "s"), 16 << 20)
        store = open_store(str(media / "s"))
        make_dir(store, b"kept")
        store.close()
        run("mount", "-o", "remount,ro", media)
        with pytest.raises(StoreError, match="read-only media"):
            open_store(str(media / "s"))
        assert open_and_close(media / "s", read_only=True) == {b"kept"}
    finally:
        run("umount", media)


def test_a_missing_loop_driver_is_told(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/dev/loop-control")

    monkeypatch.setattr(loop_devices, "attach_loop", none)
    with pytest.raises(SystemFailure, match="modprobe loop"):
        open_image(str(image), Wanted(engine="kernel"))
    with image.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_full_store_says_enospc_and_stays_whole(image: Path, engine: str) -> None:
    store = open_store(str(image), engine=engine)
    _, file = store.layer.create(store.upper, b"big", 0o644, 0, 0)
    with pytest.raises(OSError) as caught:
        for block in range(32):
            file.pwrite(bytes(1 << 20), block << 20)
    assert caught.value.errno == errno.ENOSPC
    file.close()
    store.close()
    assert run("e2fsck", "-fn", image).returncode == 0


def test_a_damage_that_is_met_is_marked_for_the_next_check(image: Path) -> None:
    """The image is given up, as by errors=remount-ro, and all of it is checked before it is used again."""
    store = open_store(str(image), engine="process")
    write(store, b"file", b"content")
    directory = store.layer.mkdir(store.upper, b"directory", 0o755, 0, 0)
    store.layer.mkdir(directory, b"below", 0o755, 0, 0)
    store.close()
    blocks = run("debugfs", "-R", "blocks upper/directory", image).stdout.split()
    with image.open("r+b") as file:
        file.seek(int(blocks[-1]) * 4096 + 24 + 4)  # of what stands behind . and ..
        file.write(b"\1\0")  # the length of an entry, which is a multiple of four
    assert store_info(str(image))["state"] == "clean"
    store = open_store(str(image), engine="process")
    found = store.layer.lookup(store.upper, b"directory")
    assert found is not None
    write(store, b"more", b"content")
    store.layer.sync()
    with pytest.raises(OSError) as caught:
        store.layer.rmdir(store.upper, b"directory", None)
    assert caught.value.errno == errno.EUCLEAN
    with suppress(StoreError):
        store.close()
    assert store_info(str(image))["state"] == "has errors"
    with pytest.raises(StoreError, match="damaged and needs manual repair"):
        open_store(str(image))
    assert run("e2fsck", "-fy", image, check=False).returncode == 1
    store = open_store(str(image))
    assert {b"file", b"more"} <= names(store)
    store.close()
    assert store_info(str(image))["state"] == "clean"
