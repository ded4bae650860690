"""`cowfs run --root`: a command on a tree of its own, and what becomes of what it has changed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from cowfs.commits import Changed, Commit
from cowfs.layers import beneath
from cowfs.layers.beneath import now
from tests.support.commits import one_run_at_a_time  # noqa: F401 - a fixture for all
from tests.support.hung import hung
from tests.support.mounts import COWFS, cowfs, mounted, project_root
from tests.support.system import makes_user_namespaces, needs_fuse, needs_root, run
from tests.support.tree import Snapshot, differences, snapshot

DEV_FUSE_AT_NIGHT = True
pytestmark = [needs_fuse, needs_root]

FAILED = 125
PROGRAMS = ("usr", "bin", "sbin", "lib", "lib64")

MAKE = r"""
umask 022
mkdir -p proc dev run opaque/below gone/sub swap1 swap2 renamed/deep links tmp/kept m.1
echo 1 >opaque/old; echo 2 >opaque/below/old; echo 3 >gone/sub/file; echo 4 >swap1/one; echo 5 >swap2/two
echo 6 >renamed/deep/file; echo 7 >links/a; ln links/a links/b; ln links/a links/c; ln -s gone link
echo 8 >file; echo 9 >'odd
name'; echo 10 >owned; chown 42:43 owned; chmod 4750 owned; mkfifo fifo
truncate -s 1M sparse; echo end >>sparse; echo 11 >tofile; mkdir todir; echo 12 >todir/x
echo a >x1; echo b >x2
"""

CHANGE = r"""
umask 022
rm -r opaque; mkdir opaque; echo new >opaque/new; mkdir opaque/below
rm -r gone; mv swap1 swap3; mv swap2 swap1; mv swap3 swap2
mv renamed/deep moved; echo more >>moved/file; mv moved renamed/again; echo 2 >>links/b; rm links/c
ln links/a another; rm link; mkdir link; echo in >link/in; chmod 700 tmp; rmdir tmp/kept
echo more >>file; mv file 'odd
name'; chown 1:2 owned; chmod 6755 owned; mkfifo fifo2; rm fifo; echo no >fifo; ln -s /etc/passwd sym
rm tofile; mkdir tofile; rm -r todir; echo file >todir; mv x1 x3; mv x2 x1; mv x3 x2
printf x | dd of=sparse bs=1 seek=5000 conv=notrunc 2>/dev/null; touch -d 2001-02-03 dated
setfattr -n user.one -v 1 swap1; mknod null c 1 3
python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("socket")'
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return made(tmp_path / "root")


def made(path: Path) -> Path:
    """Make a directory with a tree, and where the programs of this system can be shown."""
    path.mkdir()
    run("sh", "-euc", MAKE, cwd=path)
    for name in PROGRAMS:
        there = Path("/", name)
        if there.is_symlink():
            (path / name).symlink_to(os.readlink(there))
        elif there.is_dir():
            (path / name).mkdir()
    return path


@contextmanager
def with_programs(root: Path) -> Iterator[None]:
    """Show the programs of this system in a root."""
    with ExitStack() as stack:
        for name in PROGRAMS:
            if (root / name).is_dir() and not (root / name).is_symlink():
                run("mount", "-o", "bind,ro", Path("/", name), root / name)
                stack.callback(run, "umount", root / name)
        yield


def sandbox(root: Path, *arguments: str | Path, script: str = "true") -> subprocess.CompletedProcess[str]:
    with with_programs(root):
        return cowfs("run", "--root", root, *arguments, "--", "sh", "-euc", script)


def test_a_mount_of_a_user_that_hangs_holds_up_nothing(root: Path) -> None:
    script = "while read -r _ _ _ _ at how _; do [ $at != /hung ] || echo $how; done </proc/self/mountinfo"
    with hung(root / "hung", user=65534), with_programs(root):
        done = cowfs("run", "--root", root, "--discard", "--", "sh", "-euc", script, timeout=20)
    assert (done.returncode, done.stdout[:2]) == (0, "ro"), done


def test_the_systems_daemons_keep_their_sockets() -> None:
    """In the merged tree they seem dead: a mount there would remove them, and a commit would do so too."""
    script = "ls -A /run/cowfs; echo 1 >/run/cowfs/new"
    done = cowfs("run", "--root", "/", "--discard", "--", "sh", "-euc", script)
    assert (done.returncode, done.stdout) == (0, ""), done


def test_a_run_in_a_run_changes_what_its_command_changes(tmp_path: Path) -> None:
    """It removes nothing of the run outside, which seems abandoned there."""
    script = "cat one; touch two; rm one"
    script = shlex.join([*COWFS, "run", "--root", "/", "--commit", "--", "sh", "-euc", script])
    place = "$(grep -om1 '/[^ ]*/cowfs-run-[^/ ]*' /proc/$PPID/mountinfo)"
    script = f"echo 1 >one; place={place}; [ -d $place ]; {script}; ls; [ -d $place ]"
    outer = ("run", "--root", "/", "--keep", tmp_path / "store", "--", "sh", "-euc", script)
    done = cowfs(*outer, env={"PYTHONPATH": project_root()}, cwd=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "1\ntwo\n"), done.stderr


def test_a_commit_does_what_the_command_does(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    run("cp", "-a", root, copy)
    run("mount", "-t", "tmpfs", "-o", "mode=755", "cowfs-test", root / "m.1")
    try:
        for top in (root, copy):
            run("sh", "-c", "umask 022; mkdir m.1/in; echo 1 >m.1/in/old; echo 2 >m.1/two", cwd=top)
        change = f"{CHANGE}\nmv m.1/two two; echo 3 >>m.1/in/old; cp dated m.1/dated"
        before = snapshot(root)
        done = sandbox(root, "--discard", "--store", tmp_path / "new", script=change)
        assert (done.returncode, differences(before, snapshot(root))) == (0, []), done.stderr
        assert list(tmp_path.glob("new*")) == []
        done = sandbox(root, "--commit", script=f"{change}\necho out; exit 7")
        assert (done.returncode, done.stdout) == (7, "out\n"), done.stderr
        run("sh", "-euc", change, cwd=copy)
        assert differences(contents(snapshot(copy)), contents(snapshot(root))) == []
        assert (root / "dated").stat().st_mtime == (copy / "dated").stat().st_mtime
        assert (root / "links/a").samefile(root / "another")
        assert os.listdir("/var/lib/cowfs/commits") == []
    finally:
        run("umount", root / "m.1")


KILLED = """
import os, signal, sys
from cowfs.commits import Changed, Commit
from cowfs.layers.beneath import now
mountpoint, root, when, path, times = sys.argv[1:4] + [os.fsencode(sys.argv[4]), int(sys.argv[5])]
def tick(at, size):
    global times
    times -= at == path
    if times == 0:
        os.kill(os.getpid(), signal.SIGKILL)
ticks = {"prepare": lambda *_: None, "make": lambda *_: None, when: tick}
commit = Commit()
commit.prepare([Changed(mountpoint, root)], since=now(), force=False, tell=print, tick=ticks["prepare"])
commit.make(ticks["make"])
"""


def contents(tree: Snapshot) -> Snapshot:
    """What is where, whichever inodes and times it has."""
    fleeting = {"mtime", "ino", "d_ino", "same_dev"}
    return {
        path: {name: value for name, value in facts.items() if name not in fleeting}
        for path, facts in tree.items()
    }


def failing(fd: int) -> None:
    raise OSError(errno.EIO, "fsync")


def renumber_disks() -> None:
    """Let the commit that is prepared have been so before the machine was started anew."""
    (manifest,) = Path("/var/lib/cowfs/commits").glob("*/manifest")
    first, rest = manifest.read_text().split("\n", 1)
    whole = json.loads(first)
    for tree in whole["trees"]:
        tree["dev"] += 1
    manifest.write_text(f"{json.dumps(whole)}\n{rest}")


@pytest.mark.parametrize(
    ("path", "times"),
    [
        ("swap1/two", "1"),
        *(pytest.param(*at, marks=pytest.mark.nightly) for at in (("sparse", "2"), ("gone", "2"))),
    ],
)
def test_a_commit_that_is_killed_is_undone_or_completed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, times: str
) -> None:
    for name in ("mnt", "other", "empty"):
        (tmp_path / name).mkdir()
    the_next = ("run", tmp_path / "empty", tmp_path / "other", "--", "true")
    before = contents(snapshot(root))
    with mounted(root, tmp_path / "mnt") as here:
        run("sh", "-euc", CHANGE, cwd=here.path)
        wanted = contents(snapshot(here.path))

        def killed(*how: str) -> None:
            command: list[str | Path] = [sys.executable, "-c", KILLED, here.path, root, *how]
            assert subprocess.run(command, cwd=project_root(), check=False).returncode == -signal.SIGKILL

        with monkeypatch.context() as patched, pytest.raises(OSError, match="fsync"):
            patched.setattr(os, "fsync", failing)
            Commit().prepare([Changed(str(here.path), str(root))], since=now(), force=False, tell=print)
        killed("prepare", "sparse", "2")
        assert cowfs(*the_next).stderr.count("completed") == 0
        assert contents(snapshot(root)) == before
        killed("make", path, times)
        if path == "swap1/two":
            half = contents(snapshot(root))
            assert half["file"]["content"] == before["file"]["content"]
            assert half["swap2/two"] == before["swap2/two"]
        renumber_disks()
        done = cowfs(*the_next)
        assert f"a commit to {root} that was interrupted has been completed" in done.stderr
        assert differences(wanted, contents(snapshot(root))) == []


def test_a_commit_that_is_completed_overwrites_nothing_newer(root: Path, tmp_path: Path) -> None:
    """What was changed after it was interrupted is named, until it is said what is to become of it."""
    for name in ("mnt", "other", "empty"):
        (tmp_path / name).mkdir()
    run("sh", "-euc", "mkdir -p old/in; echo old >old/in/a; echo 1 >aa; ln aa zz; echo 1 >zzz", cwd=root)
    the_next = ("run", root, tmp_path / "other", "--", "true")
    with mounted(root, tmp_path / "mnt") as here:
        run(
            "sh",
            "-euc",
            "echo 2 >zzz; rm -r old; rm aa; echo 2 >aa; echo 2 >>zz; echo new >zzzz",
            cwd=here.path,
        )
        wanted = contents(snapshot(here.path))
        command: list[str | Path] = [sys.executable, "-c", KILLED, here.path, root, "make", "zz", "1"]
        assert subprocess.run(command, cwd=project_root(), check=False).returncode == -signal.SIGKILL
    assert ((root / "aa").read_text(), (root / "zz").read_text()) == ("2\n", "1\n")
    for name, mine in (("zzz", ""), ("aa", "mine"), ("zzzz", "mine"), ("old/in/more", "mine")):
        there = root / name
        moved = there.rename(tmp_path / "moved") if there.exists() else None
        there.write_text(mine)
        done = cowfs(*the_next)
        assert done.returncode != 0
        assert f"cannot be completed: {there}: has changed meanwhile (move it elsewhere" in done.stderr, (
            done.stderr
        )
        assert (there.read_text(), (root / "zz").read_text()) == (mine, "1\n")
        there.unlink()
        if moved is not None and name == "aa":
            moved.rename(there)
    (root / "zzz").write_text("mine")
    done = cowfs("run", "--force", *the_next[1:])
    assert f"a commit to {root} that was interrupted has been completed" in done.stderr
    assert differences(wanted, contents(snapshot(root))) == []


def test_a_commit_that_finds_no_room_is_completed_when_there_is_some(nobody_path: Path) -> None:
    """Also of a file that is written in place: what others have written to it since stays."""
    if not makes_user_namespaces():
        pytest.skip("needs user namespaces")
    env = {"XDG_STATE_HOME": str(nobody_path)}
    root, mountpoint = nobody_path / "root", nobody_path / "mnt"
    for path in (root, mountpoint):
        path.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=256k,mode=755", "cowfs-test", root)
    try:
        (root / "log").write_text("old\n")
        (root / "sub").mkdir()
        theirs = [root / "sub/theirs", root / "sub/theirs/big"]
        theirs[0].mkdir()
        for name in ("big", "mine", "gone"):
            (theirs[0] / name).write_text("old\n")
        for path in (root / "log", root / "sub", theirs[0] / "mine"):
            os.chown(path, 65534, 65534)
        for path in theirs:
            os.chown(path, 65534, 4)
        inodes = [path.stat().st_ino for path in theirs]
        change = """
        yes | head -c 500000 >log; cd sub; yes no | head -c 50000 >new
        mv theirs its; rm its/gone; yes | head -c 500000 >its/big; echo new >its/mine
        """
        command = ("run", "--commit", root, mountpoint, "--", "sh", "-euc")
        done = cowfs(*command, f"cd {mountpoint}; {change}", nobody=True, env=env)
        assert done.returncode == FAILED
        assert "/log: No space left on device\n" in done.stderr, done.stderr
        assert "the next `cowfs run` completes the commit" in done.stderr
        assert set((root / "log").read_bytes()) <= set(b"y\n\0")
        run("mount", "-o", "remount,size=768k", root)
        torn = (root / "log").read_bytes()
        (root / "log").write_bytes(b"mine" + torn[4:])
        done = cowfs(*command, "true", nobody=True, env=env)
        assert f"cannot be completed: {root}/log: has changed meanwhile (move it elsewhere" in done.stderr
        assert (done.returncode, (root / "sub/new").exists()) == (2, False)
        (root / "log").write_bytes(torn)
        done = cowfs(*command, "true", nobody=True, env=env)
        assert "cannot be completed: /sub/its/big: No space left on device" in done.stderr, done.stderr
        run("mount", "-o", "remount,size=3m", root)
        done = cowfs(*command, "true", nobody=True, env=env)
        assert f"a commit to {root} that was interrupted has been completed" in done.stderr, done.stderr
        assert (root / "log").read_bytes() == b"y\n" * 250000
        assert (root / "sub/new").stat().st_size == 50000
        its = root / "sub/its"
        found = [path.stat() for path in (its, its / "big")]
        assert [(info.st_gid, info.st_ino) for info in found] == [(4, inode) for inode in inodes]
        assert sorted(os.listdir(its)) == ["big", "mine"] and not theirs[0].exists()
        assert ((its / "mine").read_text(), (its / "big").read_bytes()) == ("new\n", b"y\n" * 250000)
        assert not any(is_left_behind(name) for name in (*os.listdir(root), *os.listdir(root / "sub")))
    finally:
        run("umount", root)


def is_left_behind(name: str) -> bool:
    return name.startswith(".cowfs-apply-")


def as_on_fat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be no symbolic links and no sticky bits."""
    chmod = beneath.chmod

    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    def limited(fd: int, mode: int) -> None:
        (refused if mode & 0o1000 else chmod)(fd, mode)

    monkeypatch.setattr(beneath, "make_symlink", refused)
    monkeypatch.setattr(beneath, "chmod", limited)


def test_a_commit_leaves_out_what_cannot_be(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where something is mounted, and what a filesystem does not have: else it could never be completed."""
    (tmp_path / "mnt").mkdir()
    as_on_fat(monkeypatch)
    with mounted(root, tmp_path / "mnt") as here:
        run("sh", "-euc", "rm -r gone; echo new >new; ln -s x new-link; mkdir -m 1777 new-dir", cwd=here.path)
        run("mount", "-t", "tmpfs", "cowfs-test", root / "gone/sub")
        try:
            commit = Commit()
            changed = [Changed(str(here.path), str(root))]
            assert commit.prepare(changed, since=now(), force=False, tell=print)
            commit.make()
        finally:
            run("umount", root / "gone/sub")
    assert [(root / name).exists() for name in ("new", "new-dir", "new-link")] == [True, True, False]
    assert sorted(commit.losses) == [
        "files whose mode the filesystem does not support: 1 (new-dir)",
        "not removed, because something is mounted on it, or in it: 1 (gone)",
        "symbolic links, FIFOs and sockets left out, which the filesystem does not support: 1 (new-link)",
    ]
    assert os.listdir("/var/lib/cowfs/commits") == []


def test_what_was_changed_meanwhile_is_a_conflict(root: Path, tmp_path: Path) -> None:
    """The host's files stay, and the changes are kept."""
    store = tmp_path / "store"
    with with_programs(root):
        command: list[str | Path] = [
            *COWFS,
            "run",
            "--root",
            root,
            "--store",
            store,
            "--commit",
            "--",
            "sh",
            "-euc",
        ]
        process = subprocess.Popen(
            [*command, "echo mine >file; rm -r gone; echo new >new; echo; read x; (sleep 100 &)"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=project_root(),
        )
        assert process.stdout is not None
        process.stdout.readline()
        (root / "file").write_text("host")
        (root / "gone/sub/file").write_text("host")
        said = process.communicate("\n", timeout=60)[1]
    assert process.returncode == FAILED
    for line in ("file was changed in the lower", "gone/sub/file was changed in the lower"):
        assert f"conflict: {line} meanwhile\n" in said
    assert "ended processes that the command left running: " in said
    assert ((root / "file").read_text(), (root / "new").exists()) == ("host", False)
    assert cowfs("diff", store, "--name-only").stdout == "file\ngone\nnew\n"
    done = sandbox(root, "--store", store, "--commit", "--force")
    assert (done.returncode, (root / "file").read_text()) == (0, "mine\n"), done.stderr
    assert not (root / "gone").exists()


def test_what_was_changed_between_two_runs_is_a_conflict(root: Path, tmp_path: Path) -> None:
    """It is told before the command is run; what the store has no changes to may be changed by all."""
    (tmp_path / "mnt").mkdir()
    mountpoint, store = tmp_path / "mnt", tmp_path / "store"
    command = ("run", "--store", store, root, mountpoint, "--commit", "--", "sh", "-euc")
    cowfs(
        "run", "--store", store, root, mountpoint, "--", "sh", "-euc", f"cd {mountpoint}; echo s >file; rm x2"
    )
    (root / "x1").write_text("host")
    done = cowfs("run", *command[1:5], "--", "sh", "-euc", f"echo s >>{mountpoint}/x1; exit 3")
    assert (done.returncode, "changed there after" in done.stderr) == (3, False), done.stderr
    (root / "file").write_text("host")
    (root / "x2").write_text("host")
    done = cowfs(*command, f"cat {mountpoint}/file")
    assert (done.returncode, done.stdout) == (FAILED, "s\n")
    told = f"{root}: file and 1 more: was changed there after the store changed it (the command"
    assert done.stderr.count(told) == 1, done.stderr
    assert "conflict: file was changed in the lower meanwhile\n" in done.stderr
    assert [(root / name).read_text() for name in ("file", "x1", "x2")] == ["host"] * 3
    cowfs("revert", store, "file", "x2", check=True)
    done = cowfs(*command, "true")
    assert (done.returncode, "changed there after" in done.stderr) == (0, False), done.stderr
    assert [(root / name).read_text() for name in ("file", "x1", "x2")] == ["host", "hosts\n", "host"]
    done = cowfs(*command, f"echo more >>{mountpoint}/x1")  # what a commit has changed is no conflict
    assert (done.returncode, (root / "x1").read_text()) == (0, "hosts\nmore\n"), done.stderr


def answering(
    root: Path,
    answers: bytes | signal.Signals,
    script: str,
    *options: str | Path,
    output: int | None = None,
) -> tuple[int, str]:
    """Run a command on a terminal, and answer what is asked; return the exit code and what was shown.

    *answers* are typed when the first question is there: they need not wait to be read, as Ctrl-C does not.
    """
    ours, theirs = pty.openpty()
    with with_programs(root):
        command: list[str | Path] = [*COWFS, "run", "--root", root, *options, "--", "sh", "-euc", script]
        process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs if output is None else output,
            stderr=theirs,
            cwd=project_root(),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - one thread
        )
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 65536):
                shown += piece
                if answers and b"? " in shown:
                    if isinstance(answers, bytes):
                        os.write(ours, answers)
                    else:
                        process.send_signal(answers)
                    answers = b""
        except OSError:  # EIO: all others have closed it
            pass
        os.close(ours)
        return process.wait(60), shown.decode()


def test_it_is_asked_on_a_terminal(root: Path, tmp_path: Path) -> None:
    change = "echo more >>file; rm swap1/one; exit 3"
    old = snapshot(root)
    code, shown = answering(root, b"what\nd\n", change)
    assert (code, differences(old, snapshot(root))) == (3, [])
    assert "M  file  (content, times)\r\nD  swap1/one\r\ncowfs: 1 modified, 1 deleted\r\n" in shown
    assert shown.count("[c]ommit, [k]eep, [d]iscard? ") == 2
    code, shown = answering(root, b"k\n%s\n" % os.fsencode(tmp_path / "kept.bs"), change)
    assert (code, differences(old, snapshot(root))) == (3, []), shown
    assert cowfs("diff", tmp_path / "kept.bs", "--name-only").stdout == "file\nswap1/one\n"
    code, shown = answering(root, b"c\n", "true", "--store", tmp_path / "kept.bs")
    assert (code, (root / "file").read_text(), os.listdir(root / "swap1")) == (0, "8\nmore\n", []), shown
    assert "discard?" not in shown
    assert cowfs("diff", tmp_path / "kept.bs").stdout == ""
    for answer in (b"\3", signal.SIGTERM):
        code, shown = answering(root, answer, "echo more >>file")
        assert (code, rescued(shown.replace("\r", ""))) == (FAILED, "file\n")
    script = "trap : INT; echo more >>file; kill -INT 0; exit 3"  # only the command's, as from Ctrl-C
    code, shown = answering(root, b"d\n", script)
    assert (code, (root / "file").read_text()) == (3, "8\nmore\n"), shown
    code, shown = answering(root, b"\4", "echo more >>file", "--store", tmp_path / "store")
    assert (code, cowfs("diff", tmp_path / "store", "--name-only").stdout) == (0, "file\n"), shown


_TYPES = """
import fcntl, termios
for letter in b"commit\\n":
    fcntl.ioctl(0, termios.TIOCSTI, bytes([letter]))
open("evil", "w")
"""


def test_the_command_does_not_answer(root: Path) -> None:
    """A program that is only tried types the answer to the question whether to keep what it did."""
    typed = f"python3 -c '{_TYPES}' || touch refused"  # Linux 6.2 can refuse it
    code, shown = answering(root, b"d\n", typed)
    assert (code, (root / "evil").exists()) == (0, False), shown


def rescued(said: str) -> str:
    """Return what is in the store that changes were rescued to, and remove that."""
    (path,) = re.findall(r"the changes of / are kept in (/var/lib/cowfs/kept/\S+)", said)
    listed = cowfs("diff", path, "--name-only").stdout
    os.unlink(path)
    return listed


def test_pipes_are_the_commands_and_other_descriptors_are_not(root: Path) -> None:
    script = "cat <&8; [ ! -e /dev/fd/9 ]"
    shell = 'exec 8< <(echo given); exec "$@" sh -euc "$0" 9</'
    with with_programs(root):
        done = run(
            "bash", "-c", shell, script, *COWFS, "run", "--root", root, "--discard", "--",
            env={**os.environ, "PYTHONPATH": project_root()}, check=False,
        )  # fmt: skip
    assert (done.stdout, done.returncode) == ("given\n", 0), done.stderr


def test_what_cannot_be_kept_as_asked_is_not_lost(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = sandbox(root, "--keep", tmp_path / "file/store.bs", script="echo more >>file")
    assert (done.returncode, rescued(done.stderr)) == (FAILED, "file\n")
    gone, closed = os.pipe()
    os.close(gone)  # as with `cowfs run ... | head`
    shown = answering(root, b"", "echo more >>file", output=closed)[1]
    os.close(closed)
    assert rescued(shown.replace("\r", "")) == "file\n"


def test_a_lower_whose_name_has_a_colon_is_changed(tmp_path: Path) -> None:
    for name in ("a:b", "mnt"):
        (tmp_path / name).mkdir()
    escaped = f"{tmp_path}/a\\:b"
    done = cowfs("run", "--commit", escaped, tmp_path / "mnt", "--", "touch", tmp_path / "mnt/new")
    assert (done.returncode, os.listdir(tmp_path / "a:b")) == (0, ["new"]), done.stderr


def test_links_in_a_root_lead_nowhere_else_and_what_is_read_only_stays_so(root: Path, tmp_path: Path) -> None:
    """To mount where links lead would hide our own files from us."""
    (root / "run").rmdir()
    (root / "run").symlink_to(Path(project_root(), "cowfs"))
    (root / "dev").rmdir()
    (root / "dev").symlink_to(Path(project_root(), "cowfs/changes"))
    (tmp_path / "disk").mkdir()
    with ExitStack() as stack:
        run("mount", "-t", "tmpfs", "cowfs-test", tmp_path / "disk")
        stack.callback(run, "umount", tmp_path / "disk")
        run("mount", "--bind", tmp_path / "disk", root / "m.1")
        stack.callback(run, "umount", root / "m.1")
        (tmp_path / "store.mounts").mkdir()
        (tmp_path / "store.mounts/m%2E1").write_text("no store")
        before = snapshot(root)
        done = sandbox(root, "--store", tmp_path / "store", "--commit", script="! touch m.1/new")
        assert (done.returncode, differences(before, snapshot(root))) == (0, []), done.stderr
        assert f"{root}/m.1 is read-only for the command: " in done.stderr
        run("mount", "-o", "remount,ro", tmp_path / "disk")  # the filesystem, and not the mount in the root
        done = sandbox(root, "--commit", script="echo more >>file; ! touch m.1/new")
    assert (done.returncode, (root / "file").read_text()) == (0, "8\nmore\n"), done.stderr


def test_what_does_not_go_together_is_said_before_anything_is_run(root: Path, tmp_path: Path) -> None:
    (tmp_path / "image").touch()
    for arguments, said in (
        (("--root", tmp_path / "image", "--commit"), "is not a directory, so it cannot be changed"),
        (("--root", root, tmp_path / "image", tmp_path), "exclude each other"),
        ((), "no root given"),
        (("--root", tmp_path / "none"), "no such file or directory"),
        (("--root", root, "--keep", tmp_path / "image"), "already exists"),
        (("--root", root, "--keep", "x", "--store", "y"), "both say where"),
        (("--root", root, "--discard", "--store", tmp_path), "keeps its changes"),
    ):
        done = cowfs("run", *arguments, "--", "touch", tmp_path / "done")
        assert (done.returncode, said in done.stderr) == (1, True), done.stderr
    assert not (tmp_path / "done").exists()
