"""`cowfs revert`: the lower's version again, mounted and not, and nothing lost."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import tracemalloc
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import pytest

from cowfs.api import open_changes, take_back
from cowfs.errors import UsageError
from tests.mount.test_diff_patch import random_work, script
from tests.support.mounts import COWFS, cowfs, is_mounted, kernel_overlay, make_store, mounted, project_root
from tests.support.squashfs import needs_mksquashfs
from tests.support.system import needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True

pytestmark = needs_fuse

MAKE = r"""
mkdir -p lower/etc/sub lower/usr/lib lower/usr/share/doc/x lower/old lower/empty && cd lower
seq 1 20 >etc/fstab; echo localhost >etc/hosts; ln -s hosts etc/link; echo tool >usr/tool; echo so >usr/lib/so
echo a >usr/share/doc/x/a; echo '#!/bin/sh' >script; echo f >old/f; echo g >old/g; echo one >first
ln first second; head -c 200000 /dev/urandom >big; mkfifo pipe; setfattr -n user.a -v b etc/hosts
touch -d 2020-01-01 etc/* usr/* script first big old/*; touch -d 2019-05-05 . etc usr usr/lib old
"""
WORK = r"""
echo more >>etc/fstab; rm etc/hosts; mkdir -p etc/new/deep; echo n >etc/new/deep/file; rmdir etc/sub
mv usr bin; rm bin/tool; echo more >>bin/lib/so; chmod 755 script; ln -sf fstab etc/link
rm -r old; mkdir old; echo new >old/n; echo new f >old/f; echo two >>second; mv big large
rm pipe; echo file >pipe; mkdir usr; echo y >usr/y; rmdir empty; echo file >empty
touch "$(printf 'new\nline')"
"""


def tree(top: Path) -> dict[str, object]:
    """Everything that a user can see of a tree but access times and sizes of directories."""
    found: dict[str, object] = {}
    for directory, below, names in os.walk(top):
        for name in [".", *below, *names]:
            path = Path(directory, name)
            info = path.lstat()
            mode = info.st_mode
            facts: list[object] = [stat.filemode(mode), info.st_uid, info.st_gid, info.st_mtime_ns]
            if stat.S_ISLNK(mode):
                facts.append(os.readlink(path))
            elif stat.S_ISREG(mode):
                facts += [info.st_nlink, path.read_bytes()]
            xattrs = os.listxattr(path, follow_symlinks=False)
            facts += [(key, os.getxattr(path, key, follow_symlinks=False)) for key in sorted(xattrs)]
            found[os.path.relpath(path, top)] = facts
    return found


def links_of_directories(top: Path) -> dict[str, int]:
    return {os.path.relpath(here, top): os.lstat(here).st_nlink for here, _, _ in os.walk(top)}


def without_directory_times(seen: dict[str, object]) -> dict[str, object]:
    kept: dict[str, object] = {}
    for path, facts in seen.items():
        assert isinstance(facts, list)
        is_directory = str(facts[0]).startswith("d")
        kept[path] = [fact for number, fact in enumerate(facts) if not (is_directory and number == 3)]
    return kept


def reverted(*words: str | Path) -> list[str]:
    done = cowfs("revert", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def lower_of(top: Path, kind: str) -> Path:
    script(MAKE, top)
    (top / "lower/bare").mkdir(0o750)
    os.utime(top / "lower/bare", (1, 1))
    if kind != "image":
        return top / "lower"
    run("mksquashfs", top / "lower", top / "lower.sqsh", "-quiet", "-no-progress")
    return top / "lower.sqsh"


def same_is_told(taken: list[str], brought: list[str]) -> None:
    """What is brought back is what was reverted, by the names it has then."""
    back = [line.replace("brought back", "reverted") for line in brought]
    assert sorted(back) == sorted(taken)


KINDS = pytest.mark.parametrize("kind", ["image", "directory"])


@KINDS
def test_all_of_a_mount_and_back_again(tmp_path: Path, kind: str) -> None:
    lower, store = lower_of(tmp_path, kind), make_store(tmp_path, kind)
    with mounted(lower, tmp_path / "mnt", store) as here:
        before, links = tree(here.path), links_of_directories(here.path)
        script(WORK, here.path)
        script("rmdir bare; mkdir -m 750 bare", here.path)  # differs in its times alone
        changed, links_of_changed = tree(here.path), links_of_directories(here.path)
        taken = reverted(here.path, "--all")
        assert "reverted etc/fstab" in taken
        assert tree(here.path) == before
        assert links_of_directories(here.path) == links
        assert cowfs("diff", here.path).stderr == "no changes\n"
        same_is_told(taken, reverted(here.path, "--undo"))
        assert without_directory_times(tree(here.path)) == without_directory_times(changed)
        assert links_of_directories(here.path) == links_of_changed
        reverted(here.path, "--all")
    with mounted(lower, tmp_path / "mnt", store) as here:
        assert tree(here.path) == before
    assert cowfs("check", store).returncode == 0


@KINDS
def test_all_of_a_store_and_back_again(tmp_path: Path, kind: str) -> None:
    lower, store = lower_of(tmp_path, kind), make_store(tmp_path, kind)
    with mounted(lower, tmp_path / "mnt", store) as here:
        before = tree(here.path)
        script(WORK, here.path)
        changed = tree(here.path)
    reverted(store, "--all")
    with mounted(lower, tmp_path / "mnt", store) as here:
        assert tree(here.path) == before
    reverted(store, "--undo", "-q")
    with mounted(lower, tmp_path / "mnt", store) as here:
        assert without_directory_times(tree(here.path)) == without_directory_times(changed)


@needs_root
def test_the_kernel_shows_the_same_afterwards(tmp_path: Path) -> None:
    script(MAKE, tmp_path)
    store = tmp_path / "store"
    with mounted(tmp_path / "lower", tmp_path / "mnt", store) as here:
        script(WORK, here.path)
        reverted(here.path, "etc", "old", "usr")
        seen = tree(here.path)
    with kernel_overlay([tmp_path / "lower"], store, tmp_path / "kernel") as kernel:
        assert without_directory_times(tree(kernel)) == without_directory_times(seen)


@needs_root
def test_a_directory_that_came_home_before(tmp_path: Path) -> None:
    """It has a redirect that leads to where it is."""
    script(MAKE, tmp_path)
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        before = tree(here.path)
        script("mv usr/lib x; mv x usr/lib; mv usr y; mv y/lib z; mv y usr; mv z usr/lib", here.path)
        script("touch usr/lib/new; chmod 700 usr/lib", here.path)
        reverted(here.path, "--all")
        assert tree(here.path) == before
        reverted(here.path, "--undo")
        assert (here.path / "usr/lib/new").exists()


def test_a_user_does_it(nobody_path: Path) -> None:
    script(MAKE, nobody_path, nobody=True)
    top = nobody_path
    with mounted(top / "lower", top / "mnt", top / "store", nobody=True) as here:
        script(WORK, here.path, nobody=True)
        done = cowfs("revert", here.path, "--all", nobody=True)
        assert done.returncode == 0, done.stderr
        assert cowfs("diff", here.path, nobody=True).stderr == "no changes\n"
        assert cowfs("revert", here.path, "--undo", nobody=True).returncode == 0
    assert cowfs("revert", top / "store", "--all", nobody=True).returncode == 0
    assert cowfs("diff", top / "store", nobody=True).stderr == "no changes\n"


def test_only_what_is_named(tmp_path: Path) -> None:
    script(MAKE, tmp_path)
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        script(WORK, here.path)
        assert reverted(here.path, "etc/fstab") == ["reverted etc/fstab"]
        assert (here.path / "etc/fstab").read_bytes() == (tmp_path / "lower/etc/fstab").read_bytes()
        assert not (here.path / "etc/hosts").exists()
        assert set(reverted(here.path / "etc")) == {
            "reverted etc/hosts", "reverted etc/link", "reverted etc/new", "reverted etc/sub"
        }  # fmt: skip
        assert reverted(here.path, "scri*") == ["reverted script"]
        assert (here.path / "old/n").exists() and (here.path / "bin").exists()
        assert reverted(here.path, "usr")[0] == "reverted bin"  # it was renamed from there
        assert not (here.path / "bin").exists() and (here.path / "usr/tool").exists()
        assert reverted(here.path, "second") == ["reverted second"]  # and its other name with it
        assert (here.path / "first").read_text() == "one\n"


def test_metadata_alone(tmp_path: Path) -> None:
    script(MAKE, tmp_path)
    work = "echo x >>etc/fstab; chmod 600 etc/fstab; chmod 711 etc; setfattr -n user.x -v y script; rm old/f"
    work += "; mv big large; chmod 600 large; mv usr bin; chmod 700 bin bin/lib; touch new"
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        script(work, here.path)
        wanted = {"bin", "bin/lib", "etc", "etc/fstab", "large", "script"}
        dry = reverted(here.path, "--all", "--metadata", "--dry-run", "-z")[0].split("\0")
        assert wanted < set(dry) and not {"old/f", "new"} & set(dry)
        assert set(reverted(here.path, "--all", "--metadata")) == {f"reverted {path}" for path in wanted}
        shown = cowfs("diff", here.path).stdout.splitlines()
        assert shown == [
            *("R  usr/ -> bin/", "M  etc/fstab  (content)", "R  big -> large", "A  new", "D  old/f")
        ]
        assert os.listxattr(here.path / "script") == []
        reverted(here.path, "--undo")
        assert stat.S_IMODE((here.path / "etc/fstab").stat().st_mode) == 0o600
        assert stat.S_IMODE((here.path / "etc").stat().st_mode) == 0o711
        assert os.getxattr(here.path / "script", "user.x") == b"y"
        assert stat.S_IMODE((here.path / "large").stat().st_mode) == 0o600
        taken = reverted(here.path, "bin", "usr", "large")
        assert sorted(taken) == ["reverted big", "reverted bin", "reverted usr/lib"]  # each of them once
        same_is_told(taken, reverted(here.path, "--undo"))


@KINDS
def test_files_that_are_open(tmp_path: Path, kind: str) -> None:
    lower, store = lower_of(tmp_path, kind), make_store(tmp_path, kind)
    with mounted(lower, tmp_path / "mnt", store) as here:
        fstab = here.path / "etc/fstab"
        before = fstab.read_bytes()
        with fstab.open("r+b") as writer, fstab.open("rb") as reader:
            number = fstab.stat().st_ino
            writer.write(b"changed\n")
            writer.flush()
            assert reader.read() != before
            added = here.path / "added"
            with added.open("w+") as file:
                file.write("still here\n")
                file.flush()
                reverted(here.path, "--all")
                assert not added.exists()
                file.seek(0)
                assert file.read() == "still here\n"
                reverted(here.path, "--undo")
                assert added.stat().st_ino == os.fstat(file.fileno()).st_ino
                file.write("and back\n")
                file.flush()
                assert added.read_text() == "still here\nand back\n"
                reverted(here.path, "--all")
                file.seek(0)
                assert file.read() == "still here\nand back\n"
            reader.seek(0)
            assert reader.read() == before == fstab.read_bytes()
            assert fstab.stat().st_ino == number == os.fstat(writer.fileno()).st_ino
            writer.seek(0)
            writer.write(b"again\n")
            writer.flush()
            assert fstab.read_bytes().startswith(b"again\n")
        assert cowfs("diff", here.path).stdout == "M  etc/fstab  (content, times)\n"


@KINDS
def test_undo_keeps_what_was_written_to_an_open_file(tmp_path: Path, kind: str) -> None:
    lower, store = lower_of(tmp_path, kind), make_store(tmp_path, kind)
    with mounted(lower, tmp_path / "mnt", store) as here:
        fstab = here.path / "etc/fstab"
        before = fstab.read_bytes()
        for at, data in ((0, b"first"), (len(before), b"at the end"), (8, b"in the middle")):
            fstab.write_bytes(b"changed\n")
            with fstab.open("r+b", buffering=0) as writer:
                reverted(here.path, "etc/fstab")
                os.pwrite(writer.fileno(), data, at)
                written = fstab.read_bytes()
                done = cowfs("revert", here.path, "--undo")
                assert done.returncode == 32 and "etc/fstab: something else is there now" in done.stderr
                assert fstab.read_bytes() == written == before[:at] + data + before[at + len(data) :]
                reverted(here.path, "etc/fstab")
                assert fstab.read_bytes() == before
                reverted(here.path, "--undo")
                assert fstab.read_bytes() == written
                if kind != "image":  # there, nobody knows that it is open, and undo wants its name to be free
                    os.ftruncate(writer.fileno(), 0)
                    writer.write(before)
                    reverted(here.path, "--undo")
                    assert fstab.read_bytes() == b"changed\n"


def test_attributes_of_what_has_several_names(tmp_path: Path) -> None:
    """A large file, of which the store has the attributes alone, and a symlink."""
    script(MAKE, tmp_path)
    script("ln lower/big lower/large; ln -P lower/etc/link lower/link", tmp_path)
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        before = tree(here.path)
        script("chmod 600 big; chown -h 5:6 link", here.path)
        changed = tree(here.path)
        reverted(here.path, "--all")
        assert tree(here.path) == before
        reverted(here.path, "--undo")
        assert tree(here.path) == changed


@needs_mksquashfs
def test_an_open_file_beside_changed_hard_links(tmp_path: Path) -> None:
    """It shows what its name shows, although names are hidden for a moment."""
    lower, mnt = tmp_path / "lower", tmp_path / "mnt"
    lower.mkdir()
    (lower / "one").write_text("1")
    os.link(lower / "one", lower / "two")
    (lower / "file").write_text("lower\n")
    run("mksquashfs", lower, tmp_path / "image", "-quiet", "-no-progress")
    cowfs("create", tmp_path / "store", "32", check=True)
    for _ in range(2):
        with mounted(tmp_path / "image", mnt, tmp_path / "store"):
            (mnt / "two").write_text("2")
            (mnt / "file").write_text("upper\n")
            with (mnt / "file").open("r+") as file:
                cowfs("revert", mnt / "file", check=True)
                assert (mnt / "file").read_text() == file.read() == "lower\n"
                os.pwrite(file.fileno(), b"again", 0)
                assert (mnt / "file").read_text() == os.pread(file.fileno(), 9, 0).decode() == "again\n"
                cowfs("revert", mnt / "file", check=True)
                assert (mnt / "file").read_text() == os.pread(file.fileno(), 9, 0).decode() == "lower\n"
        cowfs("check", tmp_path / "store", check=True)


def test_names_of_a_hard_link(tmp_path: Path) -> None:
    """What shows or hides a directory, or another file's name, counts the names that go or come with it."""
    script("mkdir -p lower/d/e; cd lower; echo one >first; ln first second; ln first d/e/third", tmp_path)
    work = "mkdir -p new/deep; ln first new/a; ln first new/deep/b; ln first c; ln first d/four; rm -r d"
    parts = [("new", 2), ("d", 5), ("second", 5)]
    lower, store = tmp_path / "lower", tmp_path / "store"
    with mounted(lower, tmp_path / "mnt", store) as here:
        first, before = here.path / "first", tree(here.path)
        script(work + "; rm second; echo other >second", here.path)
        changed = tree(here.path)
        assert first.stat().st_nlink == 4
        for what, count in parts:
            reverted(here.path, what)
            assert (what, first.stat().st_nlink) == (what, count)
            reverted(here.path, "--undo")
            assert tree(here.path)["first"] == changed["first"], what
        assert without_directory_times(tree(here.path)) == without_directory_times(changed)
    reverted(store, "new", "d")
    with mounted(lower, tmp_path / "mnt", store) as here:
        assert (here.path / "first").stat().st_nlink == 3
        reverted(here.path, "--undo")
        assert without_directory_times(tree(here.path)) == without_directory_times(changed)
        script("ln first x; ln first y", here.path)
        reverted(here.path, "new")
        (here.path / "c").unlink()  # which counts by the names that the upper has, those in the trash too
        cowfs("vacuum", here.path, "--trash", check=True)
    with mounted(lower, tmp_path / "mnt", store) as here:
        assert (here.path / "first").stat().st_nlink == 3
        script("echo more >>first; mv y z; rm first x", here.path)  # z is the last name
        reverted(here.path, "--all")  # the lower's second shows again, which another file has replaced
        assert tree(here.path) == before
        reverted(here.path, "--undo")
        script("rm second", here.path)
        reverted(here.path, "--all")
        assert tree(here.path) == before


def refused(*words: str | Path, code: int, word: str) -> None:
    done = cowfs("revert", *words)
    assert (done.returncode, done.stdout) == (code, ""), done
    assert word in done.stderr and done.stderr.count("\n") == 1 and done.stderr.startswith("cowfs: ")


def test_what_cannot_be(tmp_path: Path) -> None:
    script(MAKE, tmp_path)
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        refused(here.path, "--undo", code=32, word="nothing was reverted")
        refused(here.path, "--all", code=1, word="nothing to revert")
        refused(here.path, "--all", "-n", code=1, word="nothing to revert")
        script(WORK, here.path)
        changed = tree(here.path)
        refused(here.path, "old/g", "-n", code=32, word="old was deleted and created again")
        refused(here.path, "old/g", code=32, word="old was deleted and created again")
        refused(here.path, "bin", code=32, word="there is another usr now")
        refused(here.path, code=1, word="--all")
        refused(here.path, "etc", "--all", code=1, word="--all")
        refused(here.path, "", code=1, word="empty path")
        refused(here.path, "etc", "--undo", code=1, word="--undo")
        assert tree(here.path) == changed
        dry = cowfs("revert", here.path, "--dry-run", "--all").stdout
        assert dry == cowfs("diff", here.path).stdout
        assert [done.why_not for done in take_back(str(here.path), "revert", [b"etc"], dry_run=True)] == [""]
        with pytest.raises(UsageError, match="no dry run"):
            list(take_back(str(here.path), "undo", dry_run=True))
        assert tree(here.path) == changed
    (tmp_path / "store/cowfs/trash/1").mkdir(parents=True)  # an undo that was killed at its end leaves this
    done = cowfs("revert", tmp_path / "store", "--undo")
    assert (done.returncode, done.stdout) == (0, "") and "nothing was left to bring back" in done.stderr
    refused(tmp_path / "store", "--undo", code=32, word="nothing was reverted")
    refused(tmp_path / "nothing", "--all", code=32, word="no such store")
    refused(tmp_path / "lower", "--all", code=32, word="neither a store")


def test_a_full_store(tmp_path: Path) -> None:
    """What needs room for its log is refused in a line, and changes nothing; what was deleted makes room."""
    script(MAKE.replace("mkfifo pipe", "touch pipe"), tmp_path)
    store, full = make_store(tmp_path, "image"), "No space left on device (delete files, or make it larger"
    with mounted(tmp_path / "lower", tmp_path / "mnt", store) as here:
        script(WORK, here.path)
        script("dd if=/dev/zero of=fill bs=4096 2>/dev/null || rm -f none", here.path)
        for number in range(2000):
            try:
                (here.path / f"bin/{'long' * 50}{number}").touch()
            except OSError:
                break
        changed = tree(here.path)
        for words in (("etc/fstab",), ("--all",)):
            refused(here.path, *words, code=32, word=full)
        assert tree(here.path) == changed
    refused(store, "--all", code=32, word=full)
    with mounted(tmp_path / "lower", tmp_path / "mnt", store) as here:
        assert tree(here.path) == changed
        (here.path / "fill").unlink()
        reverted(here.path, "--all", "-q")
        assert cowfs("diff", here.path, check=True).stderr == "no changes\n"


def test_undo_spares_what_was_made_since(tmp_path: Path) -> None:
    script(MAKE, tmp_path)
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        script("echo mine >etc/fstab; echo new >added", here.path)
        reverted(here.path, "--all")
        (here.path / "added").write_text("another\n")
        done = cowfs("revert", here.path, "--undo")
        assert done.returncode == 32 and "added: something else is there now" in done.stderr
        assert (here.path / "added").read_text() == "another\n"
        assert (here.path / "etc/fstab").read_text() == "mine\n"
        (here.path / "added").unlink()
        reverted(here.path, "--undo")  # what is left in the trash
        assert (here.path / "added").read_text() == "new\n"


@pytest.mark.parametrize(
    ("seed", "count"),
    [(1, 100), *(pytest.param(seed, 1000, marks=pytest.mark.nightly) for seed in range(2, 12))],
)
@KINDS
def test_after_many_changes(tmp_path: Path, kind: str, seed: int, count: int) -> None:
    script(MAKE.replace("mkfifo pipe", "touch pipe"), tmp_path)  # that nobody waits for its reader
    random_work(tmp_path / "lower", seed + 100, 60)
    store = make_store(tmp_path, kind)
    with mounted(tmp_path / "lower", tmp_path / "mnt", store) as here:
        before = tree(here.path)
        random_work(here.path, seed, count)
        changed = tree(here.path)
        taken = reverted(here.path, "--all")
        assert tree(here.path) == before
        same_is_told(taken, reverted(here.path, "--undo"))
        assert without_directory_times(tree(here.path)) == without_directory_times(changed)
    if kind == "image":
        run("e2fsck", "-fn", store)


IN_THE_WAY = r"""
mv usr bin; mkdir usr; mv bin/lib usr/moved; echo n >usr/moved/n; ln usr/moved/n usr/m; echo y >usr/y
mv etc usr/etc; mkdir etc; echo new >etc/fstab; mv usr/etc/sub etc/same
mv old t; mv empty old; mv t empty; echo more >>empty/f
mv d t; mkdir d; mv t d/t; mv d/t/e d/e; echo more >>d/e/file; chmod 700 d/e
chmod 755 script; rm second; mv big large
"""


def test_a_step_may_be_undone_twice(tmp_path: Path) -> None:
    """As after a kill just before it was noted; with others at the place of renamed directories."""
    script(MAKE + "\nmkdir -p d/e; echo e >d/e/file; chmod 750 d", tmp_path)
    store = tmp_path / "store"
    with mounted(tmp_path / "lower", tmp_path / "mnt", store) as here:
        before = tree(here.path)
        script(IN_THE_WAY, here.path)
        changed = tree(here.path)
        reverted(here.path, "--all")
        assert tree(here.path) == before
    log, names = store / "cowfs/trash/1/log", list[bytes]()
    while log.exists():
        for done in list(islice(take_back(str(store), "undo", None), 2)):  # and give up the store
            assert not done.why_not, done
            names.append(done.path)
        if log.exists():
            *lines, last = log.read_text().splitlines(keepends=True)
            assert "undone" in last
            log.write_text("".join(lines) + last[:9])  # torn, as well
    assert {b"bin", b"usr", b"usr/moved", b"usr/etc", b"etc/same", b"old", b"empty"} < set(names)
    with mounted(tmp_path / "lower", tmp_path / "mnt", store) as here:
        assert without_directory_times(tree(here.path)) == without_directory_times(changed)


@pytest.mark.crash
@pytest.mark.parametrize(
    "seed", [1, 2, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(3, 103))]
)
def test_killed_in_the_middle_nothing_is_lost(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    script(MAKE.replace("mkfifo pipe", "touch pipe"), tmp_path)
    store = make_store(tmp_path, "image" if seed % 2 else "directory")
    with mounted(tmp_path / "lower", tmp_path / "mnt", store, quiet=False) as here:
        script(WORK, here.path)
        random_work(here.path, seed, 40)
        changed = tree(here.path)
        pid = here.pid()
        environment = {**os.environ, "PYTHONPATH": project_root()}
        with subprocess.Popen(
            [*COWFS, "revert", here.path, "--all"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            for _ in range(rng.randrange(1, 25)):
                process.stdout.readline()
            os.kill(pid, signal.SIGKILL)
            process.stdout.read()
        assert cowfs("umount", here.path).returncode == 0
        assert not is_mounted(here.path)
        again = cowfs("mount", tmp_path / "lower", here.path, "--store", store)
        assert again.returncode == 0, again.stderr
        done = cowfs("revert", here.path, "--undo")
        assert done.returncode in {0, 1}, done.stderr  # 1: it came before the first step
        assert without_directory_times(tree(here.path)) == without_directory_times(changed)


# --- many changes


def many_changes(base: Path, count: int) -> Path:
    """A store with so many new files."""
    for number in range(0, count, 100):
        (base / f"lower/d{number // 100}").mkdir(parents=True)
    (base / "mnt").mkdir()
    with mounted(base / "lower", base / "mnt", base / "store"):
        pass
    for number in range(count):
        place = base / "store/upper" / f"d{number // 100}"
        place.mkdir(exist_ok=True)
        (place / f"some new file {number}").touch()
    return base / "store"


@pytest.mark.parametrize("is_mount", [False, True])
def test_what_is_looked_at_is_told_meanwhile(tmp_path: Path, is_mount: bool) -> None:
    store = many_changes(tmp_path, 1100)
    seen: list[tuple[int, int]] = []
    with ExitStack() as stack:
        what = store
        if is_mount:
            what = stack.enter_context(mounted(tmp_path / "lower", tmp_path / "mnt", store)).path
        done = list(take_back(str(what), "revert", tick=lambda *counts: seen.append(counts)))
        assert len(done) == 1100 and not [each for each in done if each.why_not]
        assert seen == [(1000, 0), (1112, 1112), (1000, 0)]  # found, all with the directories, planned
        with open_changes(str(what)) as changes:
            assert list(changes) == []
        assert {each.path for each in take_back(str(what), "undo")} == {each.path for each in done}
        with open_changes(str(what)) as changes:
            assert len(list(changes)) == 1100

        def interrupt(done: int, whole: int) -> None:
            assert whole == 1101  # with the log
            if done:
                raise KeyboardInterrupt

        assert len(list(take_back(str(what), "revert"))) == 1100
        with pytest.raises(KeyboardInterrupt):
            list(take_back(str(what), "trash", tick=interrupt))
        refused(what, "--undo", code=32, word="nothing was reverted")
        assert list(take_back(str(what), "trash")) == []
        assert os.listdir(store / "cowfs/trash") == []


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_many_changes_take_little_memory(tmp_path: Path) -> None:
    """Neither reverting, nor bringing back, nor a vacuum holds them all: that took a KiB of each."""
    peaks = []
    for count in (100, 2000, 12_000):  # with the first, modules are loaded
        store = many_changes(tmp_path / str(count), count)
        for asked in ("revert", "undo", "vacuum"):
            tracemalloc.start()
            for _ in take_back(str(store), asked):
                pass
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    for fewer, more in zip(peaks[3:6], peaks[6:], strict=True):
        assert more - fewer < 100 * 10_000
