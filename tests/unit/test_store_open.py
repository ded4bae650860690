"""Opening stores in directories or memory: what is recognised, refused, locked and left behind."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cowfs.errors import CowfsError, StoreBusy, StoreError, UsageError, WrongLower
from cowfs.store.format import layout
from cowfs.store.offline.create import create_store
from cowfs.store.served.open import open_store
from cowfs.store.served.store import Store
from cowfs.types import Identity
from tests.support.mounts import project_root
from tests.support.system import as_nobody_prefix, needs_root, run

LOWER = Identity("directory", "aa", "directory on ext4, inode 2", "/lower")
OTHER = Identity("directory", "bb", "directory on ext4, inode 3", "/other")

HOLD = """
import sys
from cowfs.store.served.open import open_store
store = open_store(sys.argv[1])
print(store.layer.name, flush=True)
sys.stdin.read()
store.close()
"""


def make_dir(store: Store, name: bytes) -> None:
    store.layer.mkdir(store.upper, name, 0o755, os.geteuid(), os.getegid())


def names(store: Store) -> set[bytes]:
    return {entry.name for entry in store.layer.readdir(store.upper)}


def header_of(path: Path) -> dict[str, object]:
    content = json.loads((path / "cowfs/header.json").read_text())
    assert isinstance(content, dict)
    return content


@pytest.mark.parametrize("there", [False, True], ids=["missing", "empty"])
def test_a_directory_becomes_a_store_and_is_one_ever_after(tmp_path: Path, there: bool) -> None:
    path = tmp_path / "store"
    if there:
        path.mkdir()
    store = open_store(str(path), lowers=[LOWER])
    assert (store.kind, store.path, store.read_only) == ("directory", str(path), False)
    assert store.bind([LOWER]), "the first lower: the root's attributes are to be copied"
    assert not store.bind([LOWER])
    make_dir(store, b"kept")
    store.layer.mkdir(store.work, b"temporary", 0o755, os.geteuid(), os.getegid())
    assert 0 < store.free <= store.size
    store.close()
    store.close()
    assert set(os.listdir(path)) == {"upper", "work", "cowfs"}
    assert set(os.listdir(path / "work")) == {"work", "index"}

    again = open_store(str(path), lowers=[LOWER])
    assert names(again) == {b"kept"}
    assert again.header == store.header
    assert again.header.lowers == (LOWER,)
    assert again.layer.readdir(again.work) == [], "temporaries of the last mount are gone"
    assert not again.bind([LOWER])
    again.close()


def test_a_store_is_for_its_lower(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    store = open_store(path, lowers=[LOWER])
    store.bind([LOWER])
    store.close()
    with pytest.raises(WrongLower, match=r"/lower \(directory on ext4, inode 2\), not to /other"):
        open_store(path, lowers=[OTHER])
    forced = open_store(path, lowers=[OTHER], force_lower=True)
    assert not forced.bind([OTHER]), "it has a history: its root keeps its attributes"
    forced.close()
    assert header_of(tmp_path / "store")["lowers"][0]["fingerprint"] == "bb"  # type: ignore[index]
    with pytest.raises(WrongLower):
        open_store(path, lowers=[LOWER])
    open_store(path).close()


def test_a_lower_that_was_moved_is_known_by_its_new_place(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    moved = Identity(LOWER.kind, LOWER.fingerprint, LOWER.description, "/new/place")
    for lower in (LOWER, moved):
        store = open_store(path, lowers=[lower])
        store.bind([lower])
        store.close()
    assert header_of(tmp_path / "store")["lowers"][0]["path"] == "/new/place"  # type: ignore[index]


def test_a_store_of_the_kernels_is_adopted(tmp_path: Path) -> None:
    for name in ("upper/there", "work/work/left/over", "work/index"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "work/work/left/over").chmod(0)
    (tmp_path / "work/work").chmod(0)
    store = open_store(str(tmp_path), lowers=[LOWER])
    assert names(store) == {b"there"}
    assert store.layer.readdir(store.work) == []
    assert not store.bind([LOWER]), "its root has attributes of its own"
    assert store.header.adopted
    store.close()
    open_store(str(tmp_path), lowers=[LOWER]).close()
    with pytest.raises(WrongLower):
        open_store(str(tmp_path), lowers=[OTHER])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (["file"], "not a store: it contains file"),
        (["upper/x", "work/y", "zfile", "afile"], "an overlayfs pair, and afile beside it"),
        (["upper/x"], "not a store: it contains upper|work is missing|an incomplete store"),
        (["cowfs/header.json"], "an incomplete store: upper is missing"),
        (["cowfs/foreign", "upper/x", "work/x"], "an incomplete store"),
    ],
)
def test_what_is_no_store_is_refused_and_left_alone(tmp_path: Path, content: list[str], said: str) -> None:
    for name in content:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreError, match=said):
        open_store(str(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_making_cut_short_is_made_again(tmp_path: Path) -> None:
    for name in ("cowfs", "upper", "work"):
        (tmp_path / name).mkdir(exist_ok=True)
        store = open_store(str(tmp_path))
        assert store.bind([LOWER]), "still a new store"
        store.close()
        (tmp_path / "cowfs/header.json").rename(tmp_path / "cowfs/header.json.new")
        for made in ("work/work", "work/index", "work", "upper"):
            (tmp_path / made).rmdir()


@needs_root
def test_what_a_kill_left_of_trying_the_filesystem_is_no_fault_of_it(tmp_path: Path) -> None:
    open_store(str(tmp_path / "store")).close()
    os.mknod(tmp_path / "store/work/#cowfs-probe", stat.S_IFCHR | 0o600, 0)
    open_store(str(tmp_path / "store")).close()
    assert not (tmp_path / "store/work/#cowfs-probe").exists()


def test_a_damaged_header_is_not_guessed_around(tmp_path: Path) -> None:
    open_store(str(tmp_path)).close()
    (tmp_path / "cowfs/header.json").write_text("{")
    with pytest.raises(StoreError, match="header is damaged"):
        open_store(str(tmp_path))


def test_a_volatile_mount_of_the_kernels_is_refused(tmp_path: Path) -> None:
    (tmp_path / "upper").mkdir()
    (tmp_path / "work/work/incompat/volatile").mkdir(parents=True)
    with pytest.raises(StoreError, match="volatile"):
        open_store(str(tmp_path))
    assert (tmp_path / "work/work/incompat/volatile").is_dir()


def volatile(path: Path) -> None:
    (path / "upper").mkdir(parents=True)
    (path / "work/work/incompat/volatile").mkdir(parents=True)


def damaged_header(path: Path) -> None:
    open_store(str(path)).close()
    (path / "cowfs/header.json").write_text("{")


def of_another_lower(path: Path) -> None:
    store = open_store(str(path), lowers=[OTHER])
    store.bind([OTHER])
    store.close()


def ext2(path: Path) -> None:
    run("mke2fs", "-q", "-t", "ext2", path, "16M")


def damaged_superblock(path: Path) -> None:
    run("mke2fs", "-q", "-t", "ext3", path, "16M")
    with path.open("r+b") as file:
        file.seek(1024 + 24)
        file.write(b"\xff\xff\xff\xff")


def damaged(path: Path) -> None:
    create_store(str(path), 16 << 20)
    run("debugfs", "-w", "-R", "clri <2>", path)
    run("debugfs", "-w", "-R", "ssv state 2", path)


@pytest.mark.parametrize(
    "make", [volatile, damaged_header, of_another_lower, ext2, damaged_superblock, damaged]
)
def test_no_advice_loses_anything(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "store")
    with pytest.raises(CowfsError) as refused:
        open_store(str(tmp_path / "store"), lowers=[LOWER])
    assert "copy" in refused.value.hint
    assert not re.search(r"\brm\b|remove|-y\b", refused.value.hint)


_INTERRUPTED = """
import os, signal, sys
from contextlib import ExitStack
from cowfs.layers import ext3
from cowfs.store.served.image import open_layer

class Interrupted(ext3.Ext3Layer):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        signal.raise_signal(signal.SIGINT)

    def close(self):
        print("closed")
        super().close()

ext3.Ext3Layer = Interrupted
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with ExitStack() as stack:
        open_layer(os.open(sys.argv[1], os.O_RDWR), sys.argv[1], stack)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_leaves_no_image_open(tmp_path: Path) -> None:
    create_store(str(tmp_path / "store"), 16 << 20)
    said = run(sys.executable, "-c", _INTERRUPTED, tmp_path / "store", cwd=project_root()).stdout
    assert said.split() == ["closed", "interrupted"]


def test_one_at_a_time(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    with hold(path) as holder:
        for read_only in (False, True):
            with pytest.raises(StoreBusy, match=rf"in use by process {holder.pid} \(.*python"):
                open_store(path, read_only=read_only)
        holder.kill()
        holder.wait()
        open_store(path).close()
    first = open_store(path, read_only=True)
    second = open_store(path, read_only=True)
    with pytest.raises(StoreBusy):
        open_store(path)
    first.close()
    second.close()


def hold(path: str, *prefix: str) -> subprocess.Popen[str]:
    """Open a store in another process; return when it is open."""
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", HOLD, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": project_root()},
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def test_reading_a_store_changes_nothing(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be opened"):
        open_store(str(tmp_path / "missing"), read_only=True)
    store = open_store(str(tmp_path))
    make_dir(store, b"kept")
    store.close()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    reader = open_store(str(tmp_path), read_only=True)
    assert names(reader) == {b"kept"}
    assert reader.work is None
    assert not reader.bind([LOWER])
    reader.close()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_name_with_an_extension_is_not_taken_for_a_directory(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no such store .cowfs create"):
        open_store(str(tmp_path / "sysrcd.bs"))
    with pytest.raises(StoreError, match="cannot be created"):
        open_store(str(tmp_path / "no/parent"))
    assert os.listdir(tmp_path) == []


def test_a_fifo_is_no_store(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(StoreError, match="neither a file, a block device nor a directory"):
        open_store(str(tmp_path / "fifo"))


@pytest.mark.parametrize("call", ["setxattr", "mknod"])
def test_a_filesystem_without_what_it_takes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(
        StoreError, match=r"the filesystem does not support (extended|whiteouts).*cowfs create"
    ):
        open_store(str(tmp_path))


def test_a_failing_disk_is_told_at_close_and_the_store_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))

    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(store.layer, "sync", fail)
    with pytest.raises(StoreError, match="last changes could not be written: Input/output error"):
        store.close()
    open_store(str(tmp_path)).close()


def test_emptying_takes_any_tree_away(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    deep = os.open(tmp_path / "work/work", os.O_RDONLY)
    for _ in range(1500):
        os.mkdir(b"d" * 100, 0o755, dir_fd=deep)
        next_fd = os.open(b"d" * 100, os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = next_fd
    os.close(deep)
    os.mknod(tmp_path / "work/work/whiteout", stat.S_IFCHR | 0o000, 0)
    os.symlink("nowhere", tmp_path / "work/work/link")
    (tmp_path / "work/work/shut").mkdir()
    (tmp_path / "work/work/shut/inner").mkdir()
    (tmp_path / "work/work/shut").chmod(0)
    layout.empty(store.layer, store.work)
    assert store.layer.readdir(store.work) == []
    store.close()


# --- the user makes the difference


@needs_root
def test_roots_stores_are_in_the_kernels_own_attributes(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert store.xattr_prefix == b"trusted.overlay."
    store.close()


@needs_root
def test_a_store_in_use_by_the_kernel_is_refused(tmp_path: Path) -> None:
    for name in ("upper", "work", "lower", "merged"):
        (tmp_path / "s" / name if name in ("upper", "work") else tmp_path / name).mkdir(parents=True)
    s, merged = tmp_path / "s", tmp_path / "merged"
    options = f"lowerdir={tmp_path}/lower,upperdir={s}/upper,workdir={s}/work"
    run("mount", "-t", "overlay", "overlay", "-o", options, merged)
    try:
        with pytest.raises(StoreBusy, match=f"overlay mounted on {merged}"):
            open_store(str(s))
    finally:
        run("umount", merged)
    open_store(str(s)).close()


@needs_root
def test_read_only_media_are_named(tmp_path: Path) -> None:
    run("mount", "-t", "tmpfs", "-o", "ro,mode=755", "tmpfs", tmp_path)
    try:
        with pytest.raises(StoreError, match="read-only media"):
            open_store(str(tmp_path))
        with pytest.raises(StoreError, match="cannot be created: Read-only"):
            open_store(str(tmp_path / "new"))
    finally:
        run("umount", tmp_path)


def as_nobody(script: str, *arguments: object, **env: str) -> str:
    done = run(
        *as_nobody_prefix(),
        sys.executable,
        "-c",
        script,
        *map(str, arguments),
        env={**os.environ, "PYTHONPATH": project_root(), **env},
        check=False,
    )
    return done.stdout + done.stderr


OPEN = """
import sys
from cowfs.errors import CowfsError
from cowfs.store.served.open import open_store
try:
    store = open_store(sys.argv[1])
    print(store.kind, store.xattr_prefix.decode(), store.header.adopted)
    store.close()
except CowfsError as error:
    print(type(error).__name__, error)
"""


def test_without_root_the_store_is_in_user_attributes(nobody_path: Path) -> None:
    path = nobody_path / "store"
    for _ in range(2):
        assert as_nobody(OPEN, path) == "directory user.overlay. False\n"
    if os.geteuid() == 0:
        store = open_store(str(path), read_only=True)
        assert store.xattr_prefix == b"user.overlay."
        store.close()
        with pytest.raises(StoreError, match=r"belongs to another user \(uid 65534\) \(mount as"):
            open_store(str(path))
        assert as_nobody(OPEN, path) == "directory user.overlay. False\n", "root has left it as it was"


def test_directories_that_the_kernel_has_shut_are_opened_by_their_owner(nobody_path: Path) -> None:
    """overlayfs creates work/work and work/index with mode 0."""
    path = nobody_path / "store"
    as_nobody(OPEN, path)
    for name in ("work/work", "work/index"):
        (path / name).chmod(0)
    for option in ("read_only=True", "read_only=False"):
        script = OPEN.replace("sys.argv[1])", f"sys.argv[1], {option})")
        assert as_nobody(script, path) == "directory user.overlay. False\n"
    assert stat.S_IMODE((path / "work/work").stat().st_mode) == 0o700
    (path / "work/work/incompat/volatile").mkdir(parents=True)
    (path / "work/work").chmod(0)
    assert "volatile" in as_nobody(OPEN, path)


@needs_root
def test_a_store_that_is_not_ours_is_refused(nobody_path: Path) -> None:
    path = nobody_path / "store"
    open_store(str(path)).close()
    assert "cannot be opened: Permission denied" in as_nobody(OPEN, path)
    path.chmod(0o755)
    assert "only root can read its whiteouts" in as_nobody(OPEN, path)
    (nobody_path / "shut").mkdir(0o700)
    assert "cannot be opened: Permission denied" in as_nobody(OPEN, nobody_path / "shut")
    (nobody_path / "roots").mkdir(0o755)
    assert "no permission to use it as a store" in as_nobody(OPEN, nobody_path / "roots")


def test_without_root_an_image_is_opened_in_process(nobody_path: Path) -> None:
    """It has root's attributes, because writing them to an image needs no privilege."""
    run("mke2fs", "-q", "-t", "ext3", nobody_path / "image", "16M")
    (nobody_path / "image").chmod(0o666)
    for _ in range(2):
        assert as_nobody(OPEN, nobody_path / "image") == "image trusted.overlay. False\n"
    run("e2fsck", "-fn", nobody_path / "image")
    script = OPEN.replace("sys.argv[1])", "sys.argv[1], engine='kernel')")
    assert "only root can use the kernel" in as_nobody(script, nobody_path / "image")


@needs_root
def test_a_store_of_the_kernels_in_user_attributes_is_adopted_as_such(tmp_path: Path) -> None:
    (tmp_path / "upper").mkdir()
    (tmp_path / "work").mkdir()
    os.setxattr(tmp_path / "upper", "user.overlay.impure", b"y")
    store = open_store(str(tmp_path))
    assert store.xattr_prefix == b"user.overlay."
    store.close()


# --- memory


def test_memory_is_empty_and_gone_afterwards() -> None:
    store = open_store("memory", lowers=[LOWER], memory_size=64 << 20)
    assert (store.kind, store.path) == ("memory", "memory")
    assert store.bind([LOWER])
    make_dir(store, b"dir")
    assert store.size == pytest.approx(64 << 20, rel=0.15), "the filesystem takes its part"
    second = open_store("memory")
    assert names(second) == set()
    store.close()
    second.close()


def test_without_root_memory_is_an_image_that_is_nowhere() -> None:
    """It supports everything that root's store does, takes only the requested memory, and leaves nothing."""
    script = OPEN.replace(
        "store.close()", "print(store.path, store.size >> 20, store.free >> 20)\n    store.close()"
    )
    script = script.replace("open_store(sys.argv[1])", "open_store('memory', memory_size=64 << 20)")
    assert as_nobody(script).splitlines() == ["memory trusted.overlay. False", "memory 55 55"]


def test_memory_that_is_too_small_for_an_image_is_refused() -> None:
    script = OPEN.replace("open_store(sys.argv[1])", "open_store('memory', memory_size=1 << 20)")
    assert as_nobody(script).startswith("UsageError memory: 1 MiB is too small for a store")


def test_an_empty_image_in_memory_uses_little_of_it() -> None:
    store = open_store("memory", engine="process", memory_size=8 << 30)
    files = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    used = {os.stat(fd).st_blocks * 512 for fd in files if "memfd:cowfs" in os.path.realpath(fd)}
    assert store.free > 7 << 30
    assert max(used) < 8 << 20
    store.close()


def test_a_size_is_for_memory_alone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"size= applies only to a store in memory.*cowfs grow"):
        open_store(str(tmp_path / "store"), memory_size=1 << 20)
    assert os.listdir(tmp_path) == []
