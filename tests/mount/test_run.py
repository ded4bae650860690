"""`cowfs run`: real programs that want to be root, run by an ordinary user."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.commits import one_run_at_a_time  # noqa: F401 - a fixture for all
from tests.support.mounts import COWFS, cowfs, eventually, is_mounted, mounted, project_root
from tests.support.squashfs import mksquashfs, needs_mksquashfs
from tests.support.system import as_nobody_prefix, makes_user_namespaces, needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True
pytestmark = [needs_fuse, needs_root, needs_mksquashfs]

SYSTEM = (  # for mksquashfs -p
    "etc d 755 0 0",
    "etc/shadow f 640 0 42 echo secret",
    "etc/other f 600 42 42 echo other",
    "var d 755 0 0",
    "var/mail d 2775 0 8",
    "var/mail/user f 660 1000 8 echo mail",
)

PROGRAMS = r"""
cd "$1"
[ "$(id -u)" = 0 ]
mkdir source && echo text >source/file && ln -s file source/link && chmod 4755 source/file
cp -a source copied && cp -p source/file etc/
install -m 600 source/file installed && install -d -m 2750 directory
chmod 600 etc/other && touch etc/other && echo more >>etc/other && mv etc/other etc/moved
ln source/link hard && ln etc/moved etc/hard
tar -cpf - -C source . | tar -xpf - -C directory
rm -r var/mail
cat etc/shadow
"""


@pytest.fixture
def base(nobody_path: Path) -> Path:
    """A directory of nobody's with a system's image, and a place to mount it."""
    if not makes_user_namespaces():
        pytest.skip("needs user namespaces")
    run(*as_nobody_prefix(), "mkdir", nobody_path / "empty", nobody_path / "mnt")
    pseudo = tuple(word for line in SYSTEM for word in ("-p", line))
    mksquashfs(nobody_path / "image", nobody_path / "empty", options=pseudo)
    return nobody_path


def running(base: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    return cowfs("run", "--store", base / "store", base / "image", base / "mnt", "--", *command, nobody=True)


def test_programs_are_root(base: Path) -> None:
    """With nobody else there; what belongs to others goes on belonging to them in the store."""
    done = running(
        base,
        "sh",
        "-euc",
        f"{PROGRAMS}\nchown 42:42 source/file\nstat -c %u:%g etc/moved",
        "sh",
        base / "mnt",
    )
    assert (done.returncode, done.stdout) == (0, "secret\n0:0\n"), done.stderr
    assert not is_mounted(base / "mnt")
    with mounted(base / "image", base / "mnt", base / "store", nobody=True):
        names = [
            base / "mnt" / name for name in ("etc/moved", "etc/hard", "copied/file", "installed", "directory")
        ]
        shown = run(*as_nobody_prefix(), "stat", "-c", "%u:%g %a %h", *names).stdout.splitlines()
        assert shown[:2] == ["42:42 600 2"] * 2
        assert [line.split(" ")[1] for line in shown[2:]] == ["4755", "600", "755"]


@pytest.mark.usefixtures("many")
def test_others_are_there_with_subordinate_users(base: Path) -> None:
    script = f"""{PROGRAMS}
    stat -c %u:%g etc/moved
    chown 42:43 source/file && chown -h 44:45 source/link hard && cp -a source again
    stat -c '%u:%g' again/file again/link source/link
    install -o 1 -g 2 -m 640 /dev/null owned && stat -c '%u:%g %a' owned
    setpriv --reuid=42 --regid=42 --clear-groups sh -c 'cat etc/hard; ! cat installed' 2>/dev/null
    """
    done = running(base, "sh", "-euc", script, "sh", base / "mnt")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        *("secret", "42:42", "42:43", "44:45", "44:45", "1:2 640", "other", "more")
    ]  # fmt: skip
    again = running(base, "stat", "-c", "%u:%g", base / "mnt" / "again" / "link", base / "mnt" / "owned")
    assert again.stdout.split() == ["44:45", "1:2"]


def test_the_exit_code_is_the_commands(base: Path) -> None:
    assert running(base, "sh", "-c", "exit 7").returncode == 7
    assert running(base, "sh", "-c", "kill -TERM $$").returncode == 128 + signal.SIGTERM
    missing = running(base, "/no/such/program")
    assert missing.returncode == 127
    assert "No such file or directory" in missing.stderr
    (base / "closed").mkdir(mode=0o700)
    words = ("run", base / "image", base / "mnt", "--", "no-such-program")
    missing = cowfs(*words, nobody=True, env={"PATH": f"{base / 'closed'}:/usr/bin:/bin"})
    assert (missing.returncode, "No such file" in missing.stderr) == (127, True), missing.stderr
    (base / "closed" / "no-such-program").touch()
    (base / "closed").chmod(0o755)
    cannot = cowfs(*words, nobody=True, env={"PATH": f"{base / 'closed'}:/usr/bin:/bin"})
    assert (cannot.returncode, "Permission denied" in cannot.stderr) == (126, True), cannot.stderr
    assert "no command" in cowfs("run", base / "image", base / "mnt", nobody=True).stderr


def test_it_says_nothing_of_its_own(base: Path) -> None:
    """Of root in its namespace the mount need not warn: there it is the user."""
    assert running(base, "true").stderr == ""
    os.chown(base / "image", 65534, 65534)
    (base / "image").chmod(0o600)  # and there is nobody from whom to keep it
    assert running(base, "true").stderr == ""


def test_others_do_not_see_the_mount_and_the_store_is_in_use(base: Path) -> None:
    arguments: list[str | Path] = [
        "run",
        "--store",
        base / "store",
        base / "image",
        base / "mnt",
        "--",
        "sh",
        "-c",
        "echo; read wait",
    ]
    command = [*as_nobody_prefix(), *COWFS, *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=project_root()
    ) as process:
        assert process.stdout and process.stdin
        process.stdout.readline()
        assert not is_mounted(base / "mnt")
        assert "in use by process" in running(base, "true").stderr
        process.stdin.close()
        assert process.wait() == 1, "read(1) has come to the end"
    eventually(lambda: running(base, "true").returncode == 0, "the store is released")


def test_a_signal_that_asks_to_end_is_the_commands(base: Path) -> None:
    script = "trap 'echo got; exit 5' TERM; echo; while :; do sleep 0.05; done"
    command: list[str | Path] = [*COWFS, "run", base / "image", base / "mnt", "--", "sh", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=project_root()) as process:
        assert process.stdout
        process.stdout.readline()
        process.terminate()
        try:
            assert process.communicate(timeout=20)[0] == "got\n"
        finally:
            process.kill()
    assert process.returncode == 5


def test_root_has_no_need_of_a_user_namespace(base: Path) -> None:
    done = cowfs("run", base / "image", base / "mnt", "--", "sh", "-c", f"stat -c %u:%g {base}/mnt/etc/other")
    assert done.stdout == "42:42\n"
    assert not is_mounted(base / "mnt")
