"""Real programs on a mount: what they do works, and is there again at the next mount."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import tree
from tests.support.mounts import Mounted, mounted
from tests.support.system import needs_fuse, needs_root, run
from tests.support.tree import Node

pytestmark = [needs_fuse, needs_root, pytest.mark.timeout(180)]

LOWER: tree.Tree = {
    "src/hello.c": b'#include <stdio.h>\nint main(void) { puts("hello"); return 0; }\n',
    "src/Makefile": b"hello: hello.c\n\tgcc -O0 -o hello hello.c\n",
    **{f"data/{n // 20}/{n}": Node(data=b"%d\n" % n * (n % 50)) for n in range(200)},
    "text": b"one\ntwo\nthree\n",
    "db/placeholder": b"",
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A lower."""
    tree.build(tmp_path / "lower", LOWER)
    return tmp_path


@pytest.fixture
def mount(base: Path) -> Iterator[Mounted]:
    """Mount the tree of programs with a directory store."""
    with mounted(base / "lower", base / "mnt", base / "store") as it:
        yield it


def needs(program: str) -> pytest.MarkDecorator:
    """Skip where a program is missing."""
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"needs {program}")


def in_mount(mount: Mounted, text: str) -> str:
    """Run a shell script in the mount's root."""
    return run("sh", "-euc", text, cwd=mount.path, timeout=120).stdout


@needs("tar")
def test_tar(base: Path, mount: Mounted) -> None:
    """Packed and unpacked again it is the same, over itself too."""
    in_mount(
        mount,
        f"""
        tar --format=pax -cf {base}/all.tar .
        mkdir copy; tar -C copy -xpf {base}/all.tar
        diff -r data copy/data
        tar -xpf {base}/all.tar
        tar -df {base}/all.tar
        rm -rf data
        tar -xpf {base}/all.tar ./data
        tar -df {base}/all.tar
        """,
    )
    assert (
        tree.differences(
            tree.stable(tree.snapshot(base / "lower" / "data")),
            tree.stable(tree.snapshot(mount.path / "data")),
        )
        == []
    )


@needs("git")
def test_git(base: Path) -> None:
    env = (
        "export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b HOME=$PWD"
    )
    with mounted(base / "lower", base / "mnt", base / "store") as mount:
        in_mount(
            mount,
            f"""
            {env}
            git init -q repo; cd repo
            cp -r ../data .; git add .; git commit -q -m one
            echo more >> data/1/21; git mv data/2 data/two; git commit -q -am two
            git checkout -q -b other HEAD~1; git rm -q -r data/3; git commit -q -m three
            git checkout -q -
            git gc -q
            git fsck --strict
            test -z "$(git status --porcelain)"
            """,
        )
    with mounted(base / "lower", base / "mnt", base / "store") as mount:
        in_mount(
            mount,
            f'{env}; cd repo; git fsck --strict; test -z "$(git status --porcelain)"; git log --stat >../log',
        )


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_sqlite(base: Path, journal: str) -> None:
    """Locks, mmap (the WAL's index), fsync and truncation."""
    with mounted(base / "lower", base / "mnt", base / "store") as mount:
        path = mount.path / "db" / "file.db"
        one, two = sqlite3.connect(path), sqlite3.connect(path, timeout=0.1)
        assert one.execute(f"pragma journal_mode={journal}").fetchone() == (journal,)
        one.execute("create table t (n integer primary key, s text)")
        for start in range(0, 1000, 100):
            with one:
                one.executemany(
                    "insert into t values (?, ?)", [(n, "x" * n) for n in range(start, start + 100)]
                )
        assert two.execute("select count(*), sum(length(s)) from t").fetchone() == (1000, 499500)
        one.execute("begin immediate")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            two.execute("begin immediate")
        one.rollback()
        with one:
            one.execute("delete from t where n % 2")
        one.execute("vacuum")
        one.close()
        two.close()
    with mounted(base / "lower", base / "mnt", base / "store") as mount:
        again = sqlite3.connect(mount.path / "db" / "file.db")
        assert again.execute("pragma integrity_check").fetchone() == ("ok",)
        assert again.execute("select count(*) from t").fetchone() == (500,)
        again.close()


@needs("gcc")
@needs("make")
def test_gcc(mount: Mounted) -> None:
    said = in_mount(mount, "cd src; make; ./hello; touch hello.c; make; ./hello; make -q")
    assert said.count("hello\n") == 2


@needs("rsync")
def test_rsync(base: Path, mount: Mounted) -> None:
    in_mount(
        mount,
        f"""
        rsync -aHAX {base}/lower/ copy/
        test -z "$(rsync -aHAXi --delete {base}/lower/ copy/)"
        rsync -a --delete --inplace {base}/lower/src/ data/
        diff -r {base}/lower/src data
        """,
    )


@needs("dpkg-deb")
def test_dpkg_deb(mount: Mounted) -> None:
    in_mount(
        mount,
        """
        mkdir -p pkg/DEBIAN pkg/usr/share/thing
        printf 'Package: thing\\nVersion: 1\\nArchitecture: all\\nMaintainer: x <x@y>\\nDescription: x\\n' \\
            > pkg/DEBIAN/control
        cp -r data pkg/usr/share/thing/
        dpkg-deb --build pkg thing.deb
        dpkg-deb -x thing.deb out
        diff -r data out/usr/share/thing/data
        mkdir -p root/var/lib/dpkg/info root/var/lib/dpkg/updates; touch root/var/lib/dpkg/status
        dpkg --root=$PWD/root --force-not-root --force-script-chrootless --log=/dev/null -i thing.deb
        test -e root/usr/share/thing/data/1/21
        dpkg --root=$PWD/root --force-not-root --force-script-chrootless --log=/dev/null -r thing
        test ! -e root/usr/share/thing
        """,
    )


@needs("vim")
def test_vim(mount: Mounted) -> None:
    """Editors rename the old file and write a new one, or write in place. (vim's backupskip= has /tmp.)"""
    vim = "vim -Nes -u NONE -c 'set backupskip= backupcopy={}' -c '{}' -c wq text < /dev/null"
    before = os.stat(mount.path / "text").st_ino
    in_mount(mount, vim.format("no", "%s/two/2/"))
    assert (mount.path / "text").read_text() == "one\n2\nthree\n"
    renamed = os.stat(mount.path / "text").st_ino
    assert renamed != before
    in_mount(mount, vim.format("yes", "%s/2/zwei/"))
    assert (mount.path / "text").read_text() == "one\nzwei\nthree\n"
    assert os.stat(mount.path / "text").st_ino == renamed
    assert sorted(os.listdir(mount.path)) == ["data", "db", "src", "text"]


def test_a_chroot_into_the_merged_root(base: Path) -> None:
    """Programs run from inside, with their libraries."""
    root = base / "root"
    shell = shutil.which("dash") or "/bin/sh"
    for file in [shell, *libraries(shell)]:
        target = root / os.path.realpath(file).lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(os.path.realpath(file), target)
        if not (root / file.lstrip("/")).exists():
            (root / file.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(os.path.realpath(file), root / file.lstrip("/"))
    (root / "etc").mkdir()
    with mounted(root, base / "mnt", base / "store") as mount:
        run("chroot", mount.path, shell, "-euc", "echo inside > /etc/motd")
    with mounted(root, base / "mnt", base / "store") as mount:
        assert run("chroot", mount.path, shell, "-c", "read x < /etc/motd; echo $x").stdout == "inside\n"


def libraries(program: str) -> list[str]:
    """Return the libraries of a program, as ldd lists them."""
    shown = run("ldd", program).stdout.split()
    return [word for word in shown if word.startswith("/")]


# -- several at a time ------------------------------------------------------------------------------


CLIENT = r"""
set -eu
cd "$1"; i=0
while [ $i -lt 25 ]; do
    i=$((i + 1))
    mkdir -p "shared/$2"
    echo "$2 $i" > "shared/$2/$i"; echo "$2" >> "shared/log.$2"
    ls -lR shared > /dev/null 2>&1 || true
    echo x >> "data/$((i % 10))/$((i % 10 * 20 + i % 7))" 2> /dev/null || true
    mv "shared/$2/$i" "shared/$2/moved" ; cat "shared/$2/moved" > /dev/null
    rm -rf "shared/$2"
    touch "common" ; rm -f "common"
    find data -type f > /dev/null 2>&1 || true
done
"""


def test_eight_clients(base: Path) -> None:
    """They list, make and remove the same things all at once: nobody fails who should not, nothing stays."""
    with mounted(base / "lower", base / "mnt", base / "store") as mount:
        os.mkdir(mount.path / "shared")
        clients = [
            subprocess.Popen(
                ["sh", "-c", CLIENT, "sh", str(mount.path), f"c{number}"], stderr=subprocess.PIPE
            )
            for number in range(8)
        ]
        for client in clients:
            _out, said = client.communicate(timeout=120)
            assert client.returncode == 0, said.decode()
        assert sorted(os.listdir(mount.path / "shared")) == [f"log.c{number}" for number in range(8)]
        for number in range(8):
            assert (mount.path / "shared" / f"log.c{number}").read_text() == f"c{number}\n" * 25
        assert not (mount.path / "common").exists()


def test_a_large_copy_up_holds_up_nobody(tmp_path: Path) -> None:
    """While one client waits for a copy-up, others are answered; who wants the same file waits for it."""
    big = os.urandom(1 << 20) * 150
    tree.build(tmp_path / "lower", {"big": big, "small": b"s\n"})
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as mount:
        done: list[float] = []

        def append() -> None:
            with open(mount.path / "big", "ab") as file:
                file.write(b"tail")
            done.append(time.monotonic())

        writers = [threading.Thread(target=append) for _ in range(2)]
        for writer in writers:
            writer.start()
        during = 0
        while not done:
            (mount.path / f"new{during}").write_text("x")
            os.rename(mount.path / f"new{during}", mount.path / "renamed")
            during += 1
        for writer in writers:
            writer.join(60)
        assert (mount.path / "big").read_bytes() == big + b"tail" * 2
        assert during > 3, f"only {during} files were made while the large one was copied"


def test_removed_while_it_is_copied_up(tmp_path: Path) -> None:
    """Unlink, rename and chmod of a file that is being copied up wait for it and then do their work."""
    big = os.urandom(1 << 20) * 60
    tree.build(tmp_path / "lower", {f"big{number}": big for number in range(3)})
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as mount:
        files = []

        def append(number: int) -> None:
            file = open(mount.path / f"big{number}", "r+b")
            file.write(b"HEAD")
            files.append(file)

        writers = [threading.Thread(target=append, args=(number,)) for number in range(3)]
        for writer in writers:
            writer.start()
        work = tmp_path / "store" / "work" / "work"
        deadline = time.monotonic() + 30
        while len(os.listdir(work)) + len(files) < 3:  # each is being copied up, or open already
            assert time.monotonic() < deadline
        os.unlink(mount.path / "big0")
        os.rename(mount.path / "big1", mount.path / "moved")
        os.chmod(mount.path / "big2", 0o600)
        for writer in writers:
            writer.join(60)
        for file in files:
            file.close()
        left = sorted(os.listdir(mount.path))
        assert "moved" in left and "big2" in left
        assert os.stat(mount.path / "big2").st_mode & 0o777 == 0o600
        for name in left:
            assert (mount.path / name).read_bytes() in {big, b"HEAD" + big[4:]}
