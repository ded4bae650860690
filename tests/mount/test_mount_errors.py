"""Whatever is wrong: one clear line, the exit code of mount(8), and nothing has been changed."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import tree
from tests.support.mounts import COWFS, cowfs, is_mounted, mounted, project_root
from tests.support.system import as_nobody_prefix, needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True

pytestmark = needs_fuse


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A lower, a mountpoint and some files that are no layers."""
    tree.build(tmp_path / "lower", {"file": b"x\n", "dir/y": b"y\n"})
    tree.build(tmp_path / "other", {"file": b"another\n", "more": b"m\n"})
    (tmp_path / "mnt").mkdir()
    (tmp_path / "text").write_text("this is no image\n" * 1000)
    (tmp_path / "empty").touch()
    return tmp_path


@pytest.fixture(scope="session")
def squashfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good image."""
    place = tmp_path_factory.mktemp("squashfs")
    tree.build(place / "tree", {"file": os.urandom(300_000), "dir/y": b"y\n"})
    run("mksquashfs", place / "tree", place / "good.squashfs", "-quiet", "-no-progress")
    return place / "good.squashfs"


def picture(base: Path) -> dict[str, object]:
    """Everything below a place, to see whether it was touched."""
    found: dict[str, object] = {}
    for folder, names, files in os.walk(base):
        for name in [*names, *files]:
            path = os.path.join(folder, name)
            if path.endswith("/cowfs/lock"):  # says who has it
                continue
            st = os.lstat(path)
            content = b""
            if stat.S_ISREG(st.st_mode):
                content = hashlib.sha256(Path(path).read_bytes()).digest()
            found[path] = (st.st_mode, st.st_uid, st.st_mtime_ns, st.st_size, content)
    return found


def refused(
    base: Path, code: int, *words: str, arguments: list[str], command: list[str] | None = None, **more: str
) -> str:
    """Run ``cowfs mount`` with *arguments*; it must say one line with all *words*, and change nothing."""
    before = picture(base)
    env = {**os.environ, "PYTHONPATH": project_root(), **more}
    done = subprocess.run(
        [*(command or []), *COWFS, "mount", *arguments],
        env=env, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    said = done.stderr
    assert done.returncode == code, f"exit {done.returncode}: {said}"
    assert done.stdout == ""
    assert said.startswith("cowfs: ") and said.count("\n") == 1, f"not one line: {said!r}"
    for word in words:
        assert word in said, f"{word!r} is not in {said!r}"
    assert not is_mounted(base / "mnt")
    assert picture(base) == before, "something was changed"
    return said


def test_a_log_that_cannot_be_written(base: Path) -> None:
    refused(
        base, 2, "/proc/none", "cannot write the log",
        arguments=[str(base / "lower"), str(base / "mnt"), "-o", "log=/proc/none"],
    )  # fmt: skip


def test_a_log_that_nobody_reads(base: Path) -> None:
    os.mkfifo(base / "fifo")
    refused(
        base, 2, "cannot write the log", "start the program that reads it",
        arguments=[str(base / "lower"), str(base / "mnt"), "-o", f"log={base}/fifo"],
    )  # fmt: skip


def test_no_arguments(base: Path) -> None:
    for arguments in ([], [str(base / "lower")]):
        refused(base, 1, "required", arguments=arguments)


def test_unknown_option(base: Path) -> None:
    store = str(base / "store")
    for option in ("stroe=x", "nonsense", "engine=fast", "store=", "size=lots"):
        refused(
            base,
            1,
            option.partition("=")[0],
            arguments=[str(base / "lower"), str(base / "mnt"), "-o", option],
        )
    refused(base, 1, "--stroe", arguments=[str(base / "lower"), str(base / "mnt"), "--stroe", store])
    refused(base, 1, "fast", arguments=[str(base / "lower"), str(base / "mnt"), "--engine", "fast"])


LOWERS: dict[str, tuple[Callable[[Path, Path], str], list[str]]] = {
    "missing": (lambda base, good: str(base / "missing"), ["missing", "no such"]),
    "missing among others": (lambda base, good: f"{base / 'lower'}:{base / 'gone'}", ["gone"]),
    "empty file": (lambda base, good: str(base / "empty"), ["empty"]),
    "text": (lambda base, good: str(base / "text"), ["text"]),
    "device": (lambda base, good: "/dev/null", ["/dev/null"]),
    "nothing": (lambda base, good: ":", ["lower"]),
    "truncated": (lambda base, good: cut(base / "cut.squashfs", good, 0.5), ["cut.squashfs"]),
    "truncated to the superblock": (lambda base, good: cut(base / "cut.squashfs", good, 0), ["cut.squashfs"]),
    "corrupt": (lambda base, good: damaged(base / "bad.squashfs", good), ["bad.squashfs"]),
    "a store for a lower": (lambda base, good: ext3(base / "store.img"), ["store.img"]),
}


def cut(path: Path, good: Path, part: float) -> str:
    """The beginning of a good image."""
    data = good.read_bytes()
    path.write_bytes(data[: max(96, int(len(data) * part))])
    return str(path)


def damaged(path: Path, good: Path) -> str:
    """An image whose tables are overwritten."""
    data = bytearray(good.read_bytes())
    data[-3000:] = b"\xa5" * 3000
    path.write_bytes(data)
    return str(path)


def ext3(path: Path) -> str:
    """An ext3 image."""
    with path.open("wb") as out:
        out.truncate(20 << 20)
    run("mke2fs", "-q", "-t", "ext3", "-b", "4096", path)
    return str(path)


@needs_root
@pytest.mark.parametrize("what", LOWERS)
def test_bad_lower(base: Path, squashfs: Path, what: str) -> None:
    make, words = LOWERS[what]
    lower = make(base, squashfs)
    code = 1 if what == "nothing" else 32
    refused(base, code, *words, arguments=[lower, str(base / "mnt"), "--store", str(base / "store")])
    assert not (base / "store").exists(), "a store was begun"


STORES: dict[str, tuple[Callable[[Path], str], list[str]]] = {
    "missing image": (lambda base: str(base / "missing.bs"), ["missing.bs", "cowfs create"]),
    "missing directory above": (lambda base: str(base / "no/store"), ["no"]),
    "empty file": (lambda base: str(base / "empty"), ["empty"]),
    "text": (lambda base: str(base / "text"), ["text"]),
    "device": (lambda base: "/dev/null", ["/dev/null"]),
    "directory with other things": (lambda base: str(base / "other"), ["other", "not a store"]),
    "truncated": (lambda base: short(base / "short.bs"), ["short.bs"]),
    "corrupt": (lambda base: zeroed(base / "zeroed.bs"), ["zeroed.bs"]),
    "too small": (lambda base: tiny(base / "tiny.bs"), ["tiny.bs", "16"]),
}


def short(path: Path) -> str:
    """A store that lost its second half."""
    ext3(path)
    os.truncate(path, 8 << 20)
    return str(path)


def zeroed(path: Path) -> str:
    """A store whose superblock is fine and whose first group is not."""
    ext3(path)
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (1 << 20))
    return str(path)


def tiny(path: Path) -> str:
    """A store of 4 MiB."""
    with path.open("wb") as out:
        out.truncate(4 << 20)
    run("mke2fs", "-q", "-t", "ext3", "-b", "1024", path)
    return str(path)


@needs_root
@pytest.mark.parametrize("what", STORES)
def test_bad_store(base: Path, what: str) -> None:
    make, words = STORES[what]
    arguments = [str(base / "lower"), str(base / "mnt"), "--store", make(base)]
    refused(base, 32, *words, arguments=arguments)


@needs_root
def test_store_in_use(base: Path) -> None:
    """By a second mount: told by whom. By a loop mount of somebody else's: told too."""
    assert cowfs("create", base / "image.bs", "16").returncode == 0
    for store in (base / "store", base / "image.bs"):
        with mounted(base / "lower", base / "busy", store) as mount:
            pid = str(mount.pid())
            done = cowfs("mount", base / "lower", base / "mnt", "--store", store)
            assert (done.returncode, done.stdout) == (32, "")
            assert done.stderr.count("\n") == 1
            assert str(store) in done.stderr and pid in done.stderr, done.stderr
            assert not is_mounted(base / "mnt")
            assert (mount.path / "file").read_text() == "x\n"
    (base / "look").mkdir()
    run("mount", "-o", "loop", base / "image.bs", base / "look")
    try:
        done = cowfs("mount", base / "lower", base / "mnt", "--store", base / "image.bs")
        assert done.returncode == 32
        assert done.stderr.count("\n") == 1 and str(base / "look") in done.stderr
    finally:
        run("umount", base / "look")


@needs_root
def test_store_on_read_only_media(base: Path) -> None:
    (base / "media").mkdir()
    run("mount", "-t", "tmpfs", "none", base / "media")
    try:
        (base / "media" / "store").mkdir()
        assert cowfs("create", base / "media" / "image.bs", "16").returncode == 0
        run("mount", "-o", "remount,ro", base / "media")
        for name in ("store", "image.bs"):
            store = str(base / "media" / name)
            refused(
                base,
                32,
                store,
                "read-only",
                arguments=[str(base / "lower"), str(base / "mnt"), "--store", store],
            )
    finally:
        run("umount", base / "media")


def test_another_lower(base: Path) -> None:
    """Both identities are named; --force-lower mounts it all the same."""
    with mounted(base / "lower", base / "mnt", base / "store"):
        pass
    arguments = [str(base / "other"), str(base / "mnt"), "--store", str(base / "store")]
    refused(base, 32, str(base / "other"), str(base / "lower"), "force-lower", arguments=arguments)
    done = cowfs("mount", *arguments, "--force-lower", "-o", f"log={base / 'log'}")
    assert done.returncode == 0, done.stderr
    assert (base / "mnt" / "file").read_text() == "another\n"
    assert cowfs("umount", base / "mnt").returncode == 0


def made(path: Path) -> Path:
    """A directory in a directory."""
    (path / "at").mkdir(parents=True)
    return path / "at"


MOUNTPOINTS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "missing": (lambda base: base / "nowhere", ["nowhere"]),
    "a file": (lambda base: base / "text", ["text", "not a directory", "cowfs mount LOWER MOUNTPOINT"]),
    "inside the store": (lambda base: made(base / "store"), ["store", "inside"]),
}


@pytest.mark.parametrize("what", MOUNTPOINTS)
def test_bad_mountpoint(base: Path, what: str) -> None:
    make, words = MOUNTPOINTS[what]
    arguments = [str(base / "lower"), str(make(base)), "--store", str(base / "store")]
    refused(base, 32, *words, arguments=arguments)


def test_a_lower_in_use_is_not_taken_for_a_store(base: Path, squashfs: Path) -> None:
    assert cowfs("mount", squashfs, base / "mnt").returncode == 0
    done = cowfs("diff", squashfs)
    assert (done.returncode, done.stderr.count("\n")) == (32, 1)
    assert f"{squashfs}: in use as a lower of the mount at {base / 'mnt'}" in done.stderr
    assert cowfs("umount", base / "mnt").returncode == 0


@needs_root
def test_bound_into_the_lower(base: Path) -> None:
    """A bind mount of a directory in the lower can be the mountpoint."""
    (base / "bound").mkdir()
    run("mount", "--bind", base / "lower" / "dir", base / "bound")
    try:
        done = cowfs("mount", base / "lower", base / "bound", "--store", base / "store")
        assert done.returncode == 0, done.stderr
        assert cowfs("umount", base / "bound").returncode == 0
    finally:
        run("umount", base / "bound")


# -- what the system lacks -------------------------------------------------------------------------


def without(setup: str) -> list[str]:
    """Return a prefix that runs a command as nobody, in its own mount namespace changed by *setup*."""
    return ["unshare", "-m", "sh", "-euc", f'{setup}\nexec "$@"', "sh", *as_nobody_prefix()]


@pytest.fixture
def nobodys(nobody_path: Path) -> Path:
    """A lower and a mountpoint of nobody's."""
    tree.build(nobody_path / "lower", {"file": b"x\n"})
    (nobody_path / "mnt").mkdir()
    if os.geteuid() == 0:
        run("chown", "-R", "nobody:nogroup", nobody_path)
    return nobody_path


def usual(base: Path) -> list[str]:
    """Arguments that are right."""
    return [str(base / "lower"), str(base / "mnt"), "--store", str(base / "store")]


@needs_root
def test_no_permission_on_dev_fuse(nobodys: Path, tmp_path: Path) -> None:
    os.mknod(tmp_path / "node", stat.S_IFCHR | 0o600, os.makedev(10, 229))
    setup = f"mount --bind {tmp_path}/node /dev/fuse"
    refused(nobodys, 2, "/dev/fuse", "Permission denied", arguments=usual(nobodys), command=without(setup))


@needs_root
def test_no_dev_fuse(nobodys: Path) -> None:
    setup = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3"
    refused(nobodys, 2, "/dev/fuse", "modprobe fuse", arguments=usual(nobodys), command=without(setup))


@needs_root
def test_no_fusermount3(nobodys: Path) -> None:
    setup = "mount --bind /dev/null $(command -v fusermount3)"
    refused(nobodys, 2, "fusermount3", "apt install fuse3", arguments=usual(nobodys), command=without(setup))


@needs_root
def test_no_mtab(nobodys: Path, tmp_path: Path) -> None:
    shutil.copytree("/etc", tmp_path / "etc", symlinks=True, ignore=shutil.ignore_patterns("mtab"))
    setup = f"mount --bind {tmp_path}/etc /etc"
    refused(nobodys, 2, "/etc/mtab", "ln -s", arguments=usual(nobodys), command=without(setup))


@needs_root
def test_an_image_without_root(nobodys: Path, squashfs: Path) -> None:
    """Told what to do about it, where the engine that it takes needs root."""
    shutil.copy(squashfs, nobodys / "good.squashfs")
    os.chmod(nobodys / "good.squashfs", 0o644)
    arguments = [
        str(nobodys / "good.squashfs"),
        str(nobodys / "mnt"),
        "--store",
        str(nobodys / "store"),
        "--engine",
        "kernel",
    ]
    refused(nobodys, 2, "root", arguments=arguments, command=as_nobody_prefix())


@needs_root
def test_a_lower_that_may_not_be_read(nobodys: Path) -> None:
    os.chown(nobodys / "lower", 0, 0)
    os.chmod(nobodys / "lower", 0o700)
    said = refused(nobodys, 32, "lower", arguments=usual(nobodys), command=as_nobody_prefix())
    assert "ermission" in said


@needs_root
def test_a_mountpoint_of_somebody_elses(nobodys: Path) -> None:
    os.chown(nobodys / "mnt", 0, 0)
    refused(nobodys, 32, str(nobodys / "mnt"), arguments=usual(nobodys), command=as_nobody_prefix())


@needs_root
def test_allow_other_without_leave(nobodys: Path) -> None:
    """If fuse.conf does not allow it, the message says what to write there."""
    setup = 'echo > "$1"/fuse.conf; mount --bind "$1"/fuse.conf /etc/fuse.conf; shift'
    command = ["unshare", "-m", "sh", "-euc", f'{setup}\nexec "$@"', "sh", "/run", *as_nobody_prefix()]
    try:
        refused(
            nobodys, 32, "user_allow_other", "/etc/fuse.conf",
            arguments=[*usual(nobodys), "-o", "allow_other"], command=command,
        )  # fmt: skip
    finally:
        Path("/run/fuse.conf").unlink(missing_ok=True)
