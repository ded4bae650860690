"""Root applies and exports safely to places where others may write, and from what they made."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from cowfs import backups
from cowfs.api import apply, export
from cowfs.errors import CowfsError
from cowfs.exports.apply_root import Root
from cowfs.exports.how import How
from cowfs.linux import files, trust
from cowfs.store.offline.copy_tree import TreeCopy
from cowfs.store.served.open import open_store
from tests.security.test_trust import served_by
from tests.support.mounts import COWFS, cowfs, mounted
from tests.support.system import NOBODY, as_nobody_prefix, needs_fuse, needs_root, run
from tests.support.tree import differences, snapshot

pytestmark = [needs_root, needs_fuse]
PROGRAM = b"#!/bin/sh\n"
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    """Make a lower that all may read, and a store with a program of root's, a device, files of nobody's."""
    with tempfile.TemporaryDirectory(prefix="cowfs-written-") as place:
        os.chmod(place, 0o755)
        yield _make(Path(place))


def _make(top: Path) -> Path:
    (top / "lower").mkdir()
    (top / "lower/program").write_bytes(PROGRAM)
    cowfs("create", top / "store.bs", "16", check=True)
    with mounted(top / "lower", top / "mnt", top / "store.bs") as here:
        tree = here.path
        (tree / "program").chmod(0o4755)
        (tree / "a-new").mkdir()
        os.chown(tree / "a-new", NOBODY, NOBODY)
        (tree / "able").write_bytes(PROGRAM)
        os.setxattr(tree / "able", "security.capability", CAPABILITY)
        os.setxattr(tree / "able", "trusted.mark", b"root's")
        os.mknod(tree / "disk", stat.S_IFBLK | 0o666, os.makedev(7, 250))
        (tree / "shared").mkdir(0o2775)
        (tree / "shared").chmod(0o2775)
        (tree / "z").write_text("z")
    return top


@pytest.fixture
def place(made: Path, nobody_path: Path) -> Path:
    """Give nobody a copy of the lower, with a file of root's in it."""
    copy = nobody_path / "copy"
    shutil.copytree(made / "lower", copy)
    (copy / "secret").write_bytes(b"secret")
    (copy / "secret").chmod(0o600)
    for path in (copy, copy / "program"):
        os.chown(path, NOBODY, NOBODY)
    return copy


@contextmanager
def locked_by_nobody(path: Path) -> Iterator[None]:
    command = [*as_nobody_prefix(), "flock", "--exclusive", str(path), "sh", "-c", "echo; cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        try:
            yield
        finally:
            holder.communicate()


def test_who_reads_a_directory_stops_no_apply(made: Path, place: Path) -> None:
    with locked_by_nobody(place):
        assert cowfs("apply", made / "store.bs", place).returncode == 0
    with closing(Root(str(place))):
        refused = cowfs("apply", made / "store.bs", place)
    assert refused.returncode == 1 and f"another cowfs (pid {os.getpid()})" in refused.stderr
    assert cowfs("apply", made / "store.bs", place).returncode == 0


def test_another_users_link_leads_nowhere(made: Path, nobody_path: Path) -> None:
    """Whoever makes the link could have the files of root's anywhere."""
    outside = made / "outside"
    outside.mkdir()
    (nobody_path / "link").symlink_to(outside)
    os.chown(nobody_path / "link", NOBODY, NOBODY, follow_symlinks=False)
    link = nobody_path / "link"
    commands: tuple[list[str | os.PathLike[str]], ...] = (
        ["apply", made / "store.bs", link, "--force"],
        ["export", made / "store.bs", link / "new", "--to", "tar"],
        ["export", made / "store.bs", link / "new", "--to", "overlayfs"],
        ["report", made / "store.bs", "-o", link / "new"],
        ["backup", made / "store.bs", link / "new"],
        ["create", link / "new", "16"],
        ["mount", made / "lower", link],
    )
    for arguments in commands:
        done = cowfs(*arguments)
        assert done.returncode in {1, 32}, done
        assert "is a symbolic link owned by another user" in done.stderr, arguments
        assert os.listdir(outside) == []
    with mounted(made / "lower", made / "mnt") as here:
        done = cowfs("persist", here.path, link / "new")
    assert done.returncode == 32 and "is a symbolic link owned by another user" in done.stderr, done
    assert os.listdir(outside) == []
    link.unlink()
    link.symlink_to(made / "store.bs")
    os.chown(link, NOBODY, NOBODY, follow_symlinks=False)
    before = (made / "store.bs").stat()
    for command, *options in (["shrink"], ["trim"], ["revert", "--all"]):
        done = cowfs(command, link, *options)
        assert done.returncode and "is a symbolic link owned by another user" in done.stderr, done
    after = (made / "store.bs").stat()
    assert (after.st_ino, after.st_blocks) == (before.st_ino, before.st_blocks)


@pytest.mark.parametrize("moment", ["before it is filled", "when it is made"])
def test_a_directory_that_is_swapped_gets_no_rights(
    made: Path, place: Path, moment: str, monkeypatch: Any
) -> None:
    """New directories belong to nobody in the end; a file of root's that has taken the name does not."""

    def swap(name: str) -> None:
        (place / name).rename(place / "was")
        (place / "secret").rename(place / name)

    real = os.mkdir

    def mkdir(name: bytes, *arguments: Any, **more: Any) -> None:
        real(name, *arguments, **more)
        swap(os.fsdecode(name))

    def tick(path: bytes, _: int) -> None:
        if path == b"z" and (place / "a-new").is_dir():
            swap("a-new")

    if moment == "when it is made":
        monkeypatch.setattr(os, "mkdir", mkdir)
        tick = lambda *_: None  # noqa: E731
    with pytest.raises(OSError) as raised:
        apply(str(made / "store.bs"), str(place), tick=tick)
    assert raised.value.errno in {errno.ESTALE, errno.ENOTDIR}
    found = next(path for path in place.rglob("*") if path.is_file() and path.stat().st_size == 6)
    info = found.stat()
    assert (info.st_uid, info.st_mode & 0o7777) == (0, 0o600)


def test_who_has_a_file_open_does_not_have_it_as_roots(made: Path, place: Path) -> None:
    """The content is right already; but its owner may have it mapped, and could change it later."""
    before = (place / "program").stat()
    assert cowfs("apply", made / "store.bs", place).returncode == 0
    after = (place / "program").stat()
    assert (after.st_uid, after.st_mode & 0o7777) == (0, 0o4755)
    assert after.st_ino != before.st_ino


def test_a_store_of_another_user_gives_nobody_rights(made: Path, nobody_path: Path) -> None:
    store = nobody_path / "store.bs"
    shutil.copy(made / "store.bs", store)
    os.chown(store, NOBODY, NOBODY)
    for how in ((), ("--trust",)):
        top = nobody_path / f"made{len(how)}"
        shutil.copytree(made / "lower", top / "applied")
        done = [
            cowfs("apply", store, top / "applied", *how),
            cowfs("export", store, top / "upper", "--to", "overlayfs", *how),
        ]
        for tree, what in (("applied", done[0]), ("upper", done[1])):
            assert what.returncode == (0 if how else 64), what.stderr
            for says in (
                "set-ID bits and capabilities, because",
                "trusted.*, because",
                "devices left out, because",
            ):
                assert (f"{says} {nobody_path} belongs to uid {NOBODY}" in what.stderr) != bool(how)
            assert (top / tree / "program").stat().st_mode & 0o7777 == (0o4755 if how else 0o755)
            attributes = {"security.capability", "trusted.mark"} if how else set()
            assert set(os.listxattr(top / tree / "able")) == attributes
            assert (top / tree / "disk").exists() == bool(how)
            assert (top / tree / "shared").stat().st_mode & 0o7777 == 0o2775


def test_conflicts_of_another_users_store_give_nobody_rights(made: Path, nobody_path: Path) -> None:
    """A rebase writes them to look at; root would have made them."""
    store, new = nobody_path / "store.bs", made / "newer"
    shutil.copytree(made / "lower", new, dirs_exist_ok=True)
    (new / "program").write_bytes(PROGRAM * 2)
    for uid, mode in ((0, 0o4755), (NOBODY, 0o755)):
        shutil.copy(made / "store.bs", store if uid else made / "own.bs")
        os.chown(store if uid else made / "own.bs", uid, uid)
        look = made / f"look{uid}"
        done = cowfs(
            *("rebase", store if uid else made / "own.bs", "--from", made / "lower", "--onto", new),
            *("--conflicts", look, "--force-lower"),
        )
        assert done.returncode == 65, done
        assert ("set-ID bits and capabilities, because" in done.stderr) == bool(uid), done.stderr
        assert (look / "changed/program").stat().st_mode & 0o7777 == mode


def test_an_export_is_where_it_was_to_be(made: Path, nobody_path: Path, monkeypatch: Any) -> None:
    """The owner of the place puts a link in place of the directory that was made."""
    outside = made / "elsewhere"
    outside.mkdir()
    real = os.mkdir

    def mkdir(name: Any, *arguments: Any, **more: Any) -> None:
        real(name, *arguments, **more)
        if os.fsdecode(name).startswith(".new.cowfs-"):
            os.rmdir(nobody_path / name)
            if kind == "link":
                (nobody_path / name).symlink_to(outside)
            else:
                real(nobody_path / name)
                os.chown(nobody_path / name, NOBODY, NOBODY)

    monkeypatch.setattr(os, "mkdir", mkdir)
    for kind in ("link", "directory"):  # noqa: B007 - mkdir looks at it
        for form in ("overlayfs", "oci"):
            with pytest.raises(CowfsError):
                export(str(made / "store.bs"), str(nobody_path / "new"), How(form))
            assert os.listdir(outside) == []
            assert not (nobody_path / "new").exists()


def test_what_others_leave_beside_an_export(made: Path, nobody_path: Path) -> None:
    """The directory has the name of an export's temporary, and is deeper than programs can go."""
    left = nobody_path / ".new.cowfs-0123456789abcdef"
    command = (
        f"import os\nfor name in ['{left.name}'] + ['d'] * 3000:\n    os.mkdir(name)\n    os.chdir(name)"
    )
    try:
        run(sys.executable, "-c", command, cwd=nobody_path)
        os.chown(left, NOBODY, NOBODY)
        done = cowfs("export", made / "store.bs", nobody_path / "new", "--to", "tar")
        assert (done.returncode, done.stderr) == (0, "")
        assert left.exists(), "it is theirs"
    finally:
        with suppress(AssertionError):
            run("rm", "-r", left)


def test_a_store_of_another_user_shows_nothing_more(made: Path, nobody_path: Path) -> None:
    """The store's maker chose modes for files that the lower keeps from him."""
    store, lower = nobody_path / "store.bs", made / "lower"
    shutil.copy(made / "store.bs", store)
    os.chown(store, NOBODY, NOBODY)
    (lower / "program").chmod(0o600)
    try:
        for command in (["apply", store, lower], ["export", store, nobody_path / "new", "--to", "overlayfs"]):
            done = cowfs(*map(str, command))
            assert done.returncode == 1, done
            assert f"could show others what {lower} keeps from them (use --trust" in done.stderr
            assert not (nobody_path / "new").exists()
        assert cowfs("export", store, nobody_path / "new", "--to", "tar").returncode == 0  # for root alone
        assert (nobody_path / "new").stat().st_mode & 0o777 == 0o600
    finally:
        (lower / "program").chmod(0o644)


def test_what_was_replaced_is_brought_back_from_what_others_made(
    made: Path, place: Path, nobody_path: Path, tmp_path: Path
) -> None:
    os.chown(place / "program", 0, 0)
    (place / "program").chmod(0o4755)
    done = cowfs("apply", made / "store.bs", place, "--backup", tmp_path / "kept")
    assert done.returncode == 0, done.stderr
    run("cp", "-a", tmp_path / "kept", nobody_path / "kept")
    undo = ["apply", "--undo", "--backup", str(nobody_path / "kept"), str(place)]
    done = cowfs(*undo)
    assert done.returncode == 64 and "set-ID bits and capabilities, because" in done.stderr, done
    assert (place / "program").stat().st_mode & 0o7777 == 0o755
    assert cowfs(*undo, "--trust").returncode == 0
    assert (place / "program").stat().st_mode & 0o7777 == 0o4755
    (nobody_path / "outside").write_text("x")
    for absent in (b"../outside\0", b"a/../../outside\0", b"..\0", b"\0"):
        (nobody_path / "kept/absent").write_bytes(absent)
        assert cowfs(*undo).returncode in {1, 2, 64}
        assert (nobody_path / "outside").exists() and (place / "program").exists()
    (nobody_path / "kept/absent").unlink()
    os.mkfifo(nobody_path / "kept/absent")
    assert cowfs(*undo).returncode == 1


def test_what_drives_terminals_goes_to_none(made: Path) -> None:
    terminal, its_end = os.openpty()
    try:
        for form in ("patch", "rsync", "tar"):
            command = [*COWFS, "export", str(made / "store.bs"), "-", "--to", form]
            done = subprocess.run(command, stdout=its_end, stderr=subprocess.PIPE, text=True, check=False)
            assert done.returncode == 1 and "standard output is a terminal" in done.stderr
    finally:
        os.close(its_end)
        os.close(terminal)


def test_a_copy_of_a_store_makes_nothing_roots(
    made: Path, nobody_path: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """The owner swaps a program of root's for his own file, after it was checked."""
    source, target = nobody_path / "source", tmp_path / "target"
    for path in (source, target):
        path.mkdir()
    (source / "program").write_bytes(PROGRAM)
    (source / "program").chmod(0o4755)
    (source / "own").write_bytes(b"evil")
    os.chown(source / "own", NOBODY, NOBODY)
    real = files.stat_beneath

    def stat_and_swap(directory: int, name: bytes) -> os.stat_result:
        found = real(directory, name)
        if name == b"program" and (source / "own").exists():
            (source / "own").rename(source / "program")
        return found

    monkeypatch.setattr(files, "stat_beneath", stat_and_swap)
    fds = [os.open(path, os.O_RDONLY) for path in (source, target)]
    for _ in TreeCopy(*fds).run():
        pass
    monkeypatch.undo()
    for fd in fds:
        os.close(fd)
    assert not (target / "program").exists() or not (target / "program").stat().st_mode & stat.S_ISUID
    store = nobody_path / "store.bs"
    shutil.copy(made / "store.bs", store)
    os.chown(store, NOBODY, NOBODY)
    assert cowfs("backup", store, tmp_path / "copy.bs").returncode == 0
    assert (tmp_path / "copy.bs").stat().st_uid == NOBODY


def test_a_backup_believes_no_filesystem_of_another_user(
    made: Path, nobody_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says that its files are root's, and run as root: mounted in a store, or below it."""
    target = str(nobody_path / "copy")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as there:
        store, image = Path(there) / "store", Path(there) / "store.bs"
        with mounted(made / "lower", made / "mnt", store) as here:
            (here.path / "new").mkdir()
        shutil.copy(made / "store.bs", image)
        with served_by(NOBODY, store / "upper/new"):
            done = cowfs("backup", store, target)
        assert done.returncode == 32 and "upper/new: another filesystem" in done.stderr, done
        dev = store.stat().st_dev
        served = {f"{os.major(dev)}:{os.minor(dev)}": NOBODY}
        monkeypatch.setattr(trust, "_served_by_users", lambda trusted: served)
        for copy in (backups.backup, backups.restore):
            with pytest.raises(CowfsError, match="is on a filesystem served by uid"):
                copy(str(store), target)
        assert os.listdir(nobody_path) == []
        backups.backup(str(image), target)
        assert os.stat(target).st_uid == NOBODY


def test_a_backup_is_of_the_store_that_was_opened(
    made: Path, nobody_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever owns the place of a directory store puts another directory of root's there meanwhile."""
    store, private = nobody_path / "store", nobody_path / "private"
    with mounted(made / "lower", made / "mnt", store):
        pass
    private.mkdir(mode=0o700)
    (private / "secret").write_text("secret")
    real = open_store

    def open_and_swap(*arguments: Any, **more: Any) -> Any:
        opened = real(*arguments, **more)
        store.rename(nobody_path / "was")
        private.rename(store)
        return opened

    monkeypatch.setattr(backups, "open_store", open_and_swap)
    with pytest.raises(CowfsError, match="was replaced by another directory"):
        backups.backup(str(store), str(tmp_path / "copy"))
    assert not (tmp_path / "copy").exists()


def test_a_deep_tree_is_copied_in_one_go(tmp_path: Path) -> None:
    """A deep tree would keep users waiting if each level were copied from the root."""
    source, target = tmp_path / "source", tmp_path / "target"
    for path in (source, target):
        path.mkdir()
    at, depth = os.open(source, os.O_RDONLY), 300
    for _ in range(depth):
        os.mkdir("d", dir_fd=at)
        at, above = os.open("d", os.O_RDONLY, dir_fd=at), at
        os.close(above)
    os.close(at)
    opened = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal opened
        opened += is_on and event == "open" and arguments[0] in {b"d", "d"}

    is_on = True
    sys.addaudithook(count)
    fds = [os.open(path, os.O_RDONLY) for path in (source, target)]
    before = len(os.listdir("/proc/self/fd"))
    for _ in TreeCopy(*fds).run():
        pass
    is_on = False
    assert len(os.listdir("/proc/self/fd")) == before
    for fd in fds:
        os.close(fd)
    assert opened <= 4 * depth
    assert sum(1 for _ in os.walk(target)) == depth + 1


SWAPPER = """
import ctypes, os, random, sys
rename = ctypes.CDLL(None).renameat2
os.chdir(sys.argv[1])
stash = [b"stash/" + os.fsencode(name) for name in os.listdir("stash")]
print("ready", flush=True)
while os.getppid() != 1:
    for name in [os.fsencode(name) for name in os.listdir(".") if name != "stash"]:
        other = random.choice(stash)
        rename(-100, name, -100, other, 2)
        rename(-100, name, -100, other, 2)
"""


def _swapped_for(place: Path, outside: Path) -> None:
    """Make what names are swapped for, of nobody's but for one file that root alone may read."""
    stash = place / "stash"
    stash.mkdir()
    (stash / "link").symlink_to(outside)
    os.mkfifo(stash / "fifo")
    os.mknod(stash / "device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (stash / "directory").mkdir()
    (stash / "file").write_text("theirs")
    for path in (stash, *stash.iterdir()):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    (place / "secret").rename(stash / "secret")


@pytest.mark.nightly
def test_names_that_are_swapped_at_full_speed(made: Path, nobody_path: Path) -> None:
    """Whatever comes of it, nothing outside is touched, and no other file gets rights."""
    outside = made / "beyond"
    (outside / "a-new").mkdir(parents=True)
    (outside / "program").write_text("outside")
    before = snapshot(outside)
    end = time.monotonic() + 40
    while time.monotonic() < end:
        place = nobody_path / "copy"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(made / "lower", place)
        (place / "secret").write_bytes(b"secret")
        (place / "secret").chmod(0o600)
        _swapped_for(place, outside)
        for path in (place, place / "program"):
            os.chown(path, NOBODY, NOBODY)
        command = [*as_nobody_prefix(), "/usr/bin/python3", "-c", SWAPPER, str(place)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as swapper:
            assert swapper.stdout is not None and swapper.stdout.readline() == b"ready\n"
            for _ in range(4):
                start = time.monotonic()
                with suppress(CowfsError, OSError):
                    apply(str(made / "store.bs"), str(place), force=True)
                assert time.monotonic() - start < 20
            swapper.kill()
        for path in place.rglob("*"):
            info = path.lstat()
            if stat.S_ISREG(info.st_mode):
                content = path.read_bytes()
                assert content != b"secret" or (info.st_uid, info.st_mode & 0o7777) == (0, 0o600)
                assert not info.st_mode & 0o6000 or content == PROGRAM
    assert differences(before, snapshot(outside)) == []
