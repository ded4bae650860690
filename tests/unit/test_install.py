"""``make install`` and ``make uninstall``: packaging/files lists all files; and shell completion."""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from argcomplete.shell_integration import shellcode

from cowfs.cli.main import SUBCOMMANDS
from tests.support.mounts import COWFS, project_root
from tests.support.system import run

ROOT = Path(project_root())


def install(tree: Path, *arguments: str, prefix: str = "/usr") -> str:
    done = subprocess.run(
        [ROOT / "scripts/install", *arguments],
        env={**os.environ, "DESTDIR": str(tree), "PREFIX": prefix},
        capture_output=True, text=True, timeout=380,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def there(tree: Path) -> set[str]:
    """Return all files, without the virtual environment and the list of created directories."""
    return {
        f"/{path.relative_to(tree)}"
        for path in tree.rglob("*")
        if (path.is_symlink() or not path.is_dir())
        and not {"venv", "made-directories"} & set(path.relative_to(tree).parts)
    }


def listed(parts: str) -> set[str]:
    """Return the files that packaging/files lists for these parts, parsed independently; PREFIX is /usr."""
    lines = re.findall(
        rf"^(?:{parts}) +\S+ +\S+ +(\S+)$", (ROOT / "packaging/files").read_text(), re.MULTILINE
    )
    places = {"$prefix": "/usr", "$sbin": "/sbin", "$etc": "/etc"}
    found = {places[first] + "/" + rest for first, _, rest in (line.partition("/") for line in lines)}
    every = {line for line in found if "SUBCOMMAND" in line}
    return found - every | {line.replace("SUBCOMMAND", name) for line in every for name in SUBCOMMANDS}


@pytest.fixture
def static_busybox() -> None:
    busybox = shutil.which("busybox")
    if busybox is None or subprocess.run(["ldd", busybox], capture_output=True).returncode == 0:
        pytest.skip("needs a static busybox (Debian: busybox-static)")


@pytest.mark.usefixtures("static_busybox")
def test_what_boots_is_installed_and_removed(tmp_path: Path) -> None:
    (tmp_path / "tree/usr/share").mkdir(parents=True)
    install(tmp_path / "tree", "boot")
    assert there(tmp_path / "tree") == listed("boot")
    install(tmp_path / "tree", "boot")
    install(tmp_path / "tree", "--remove")
    assert sorted(path.name for path in (tmp_path / "tree").rglob("*")) == ["share", "usr"], (
        "those were there"
    )


@pytest.mark.usefixtures("static_busybox")
def test_what_is_installed_finds_the_rest(tmp_path: Path) -> None:
    install(tmp_path, "boot", prefix="/opt/cow")
    unit = (tmp_path / "opt/cow/lib/systemd/system/cowfs@.service").read_text()
    assert "ExecStart=/opt/cow/bin/cowfs mount" in unit and "/usr/bin" not in unit
    hook = (tmp_path / "opt/cow/share/initramfs-tools/hooks/cowfs").read_text()
    assert "library=/opt/cow/lib/cowfs\n" in hook


def test_every_file_to_install_is_there() -> None:
    for line in (ROOT / "packaging/files").read_text().splitlines():
        if line and not line.startswith("#"):
            _part, mode, source, _target = line.split()
            assert mode == "link" or source.startswith("@") or (ROOT / source).is_file(), line


@pytest.mark.parametrize(
    ("prefix", "python", "why"),
    [
        ("/opt/my cow", "/usr/bin/python3", "absolute paths without spaces"),
        ("opt", "/usr/bin/python3", "absolute paths without spaces"),
        ("/opt/cow", "/bin/false", "needs Python 3.11"),
    ],
)
def test_what_cannot_be_installed_leaves_nothing(tmp_path: Path, prefix: str, python: str, why: str) -> None:
    done = subprocess.run(
        [ROOT / "scripts/install", "program"],
        env={**os.environ, "DESTDIR": str(tmp_path), "PREFIX": prefix, "PYTHON": python},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("install: ") and why in done.stderr
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.nightly
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("static_busybox")
def test_the_whole_program_is_installed_runs_and_is_removed(tmp_path: Path) -> None:
    tree = tmp_path / "the tree"
    install(tree, "program")
    install(tree, "boot")
    assert there(tree) == listed("program|boot")
    assert not subprocess.run(["grep", "-rIlF", str(tree), tree], capture_output=True, text=True).stdout
    said = subprocess.run([tree / "usr/bin/cowfs", "--version"], cwd="/", capture_output=True, text=True)
    assert re.fullmatch(r"cowfs \d+\.\d+\.\d+\S*\n", said.stdout), said
    assert said.stdout.split()[1] in (ROOT / "pyproject.toml").read_text()
    said = subprocess.run(
        [tree / "usr/bin/cowfs-overlay", "--version"], cwd="/", capture_output=True, text=True
    )
    assert said.stdout.startswith("cowfs-overlay: version "), said
    install(tree, "--remove")
    assert list(tree.iterdir()) == []


# --- fsck.cowfs ---------------------------------------------------------------------------------------------


@pytest.fixture
def fsck(tmp_path: Path) -> Iterator[tuple[Path, list[list[str]]]]:
    """Install the helper beside a fake cowfs that prints its arguments."""
    (tmp_path / "helpers").mkdir()
    shutil.copy(ROOT / "mount-helpers/fsck.cowfs", tmp_path / "helpers")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/cowfs").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 4\n')
    (tmp_path / ".venv/bin/cowfs").chmod(0o755)
    (tmp_path / "fstab").write_text(
        "# /a.sqsh  /mnt  cowfs  store=/wrong 0 0\n"
        "/a.sqsh  /mnt  cowfs  rw,store=/live/of\\040a.bs,nofail  0 2\n"
        "/a.sqsh  /else  squashfs  loop  0 0\n"
        "/b\\040c.sqsh  /m  fuse.cowfs  store=/live/b.bs  0 2\n"
        "/none.sqsh  /m  cowfs  ro,nofail  0 2\n"
        "/two.sqsh  /m  cowfs  store=/1.bs  0 2\n"
        "/two.sqsh  /m2  cowfs  ro  0 2\n"
        "/two.sqsh  /m3  cowfs  store=/2.bs,key_file=/k  0 2\n"
        "/two.sqsh  /m4  cowfs  store=/1.bs,ro  0 2\n"
        "/memory.sqsh  /m  cowfs  store=memory  0 2\n"
        "/secret.sqsh  /m  cowfs  store=/s.luks,key_file=/a\\040key  0 2\n"
        "/comma.sqsh  /m  cowfs  store=/one,store=/a\\134\\054b\\,c\\\\,ro  0 2\n"
    )
    yield tmp_path, []


@pytest.mark.parametrize(
    ("arguments", "called"),
    [
        (["-a", "-C3", "/s.bs"], ["check", "--", "/s.bs"]),
        (["-n", "/s.bs"], ["check", "-n", "--", "/s.bs"]),
        (["-p", "/a.sqsh"], ["check", "--", "/live/of a.bs"]),
        (["-fy", "/b c.sqsh"], ["check", "-y", "--", "/live/b.bs"]),
        (["/secret.sqsh"], ["check", "--key-file", "/a key", "--", "/s.luks"]),
        (["/comma.sqsh"], ["check", "--", "/a,b,c\\"]),
        (["/two.sqsh"], ["check", "--", "/1.bs", "check", "--key-file", "/k", "--", "/2.bs"]),
    ],
)
def test_fsck(fsck: tuple[Path, object], arguments: list[str], called: list[str]) -> None:
    here = fsck[0]
    done = subprocess.run(
        [here / "helpers/fsck.cowfs", *arguments],
        env={"FSTAB": str(here / "fstab")},
        capture_output=True,
        text=True,
    )
    assert (done.stdout.splitlines(), done.returncode) == (called, 4), done.stderr


def test_fsck_of_what_is_in_memory(fsck: tuple[Path, object]) -> None:
    for lower in ("/none.sqsh", "/memory.sqsh"):
        done = subprocess.run(
            [fsck[0] / "helpers/fsck.cowfs", "-a", lower],
            env={"FSTAB": str(fsck[0] / "fstab")},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == f"{lower}: keeps changes in memory: there is nothing to check\n"


def test_fsck_wrongly_called(fsck: tuple[Path, object]) -> None:
    for arguments in ([], ["-Q", "/s.bs"], ["/a", "/b"]):
        done = subprocess.run([fsck[0] / "helpers/fsck.cowfs", *arguments], capture_output=True, text=True)
        assert done.returncode == 16 and done.stderr.splitlines()[-1].startswith("usage: fsck.cowfs"), done


# --- completion ---------------------------------------------------------------------------------------------


def offered(typed: str, cwd: Path) -> list[str]:
    """Return what a shell would offer after *typed*."""
    asked = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" 8>&1 9>&2 1>/dev/null', "sh", *COWFS],
        env={
            **os.environ, "PYTHONPATH": project_root(), "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n",
            "_ARGCOMPLETE_SUPPRESS_SPACE": "1", "COMP_LINE": typed, "COMP_POINT": str(len(typed)),
        },
        cwd=cwd, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert asked.stderr == ""
    return asked.stdout.splitlines()


def test_completion(tmp_path: Path) -> None:
    (tmp_path / "sysrcd.bs").write_text("")
    assert offered("cowfs mou", tmp_path) == ["mount"]
    assert {"diff", "revert", "umount"} <= set(offered("cowfs ", tmp_path))
    assert "--stat" in offered("cowfs diff --", tmp_path)
    assert "--store" not in offered("cowfs diff --", tmp_path)
    assert offered("cowfs diff sys", tmp_path) == ["sysrcd.bs"]  # no store, but the only file
    (tmp_path / "a.bs").write_bytes(bytes(1080) + b"\x53\xef")
    (tmp_path / "directory/upper").mkdir(parents=True)
    for typed in ("check ", "mount a b --store "):
        assert [name for name in offered(f"cowfs {typed}", tmp_path) if name[0] != "-"] == [
            "a.bs",
            "directory/",
        ]
    assert [name for name in offered("cowfs top ", tmp_path) if name[0] != "-" and "/" not in name] == []
    assert offered("cowfs mount -o ro,sto", tmp_path) == ["ro,store="]
    assert "ro,ro" not in offered("cowfs mount -o ro,r", tmp_path)
    for words in (["create", "c.bs", "16"], ["checkpoint", "c.bs", "clean", "--lower", "directory"]):
        run(*COWFS, *words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": project_root()})
    assert offered("cowfs rollback c.bs c", tmp_path) == ["clean"]
    assert offered("cowfs rollback nowhere c", tmp_path) == []


TYPED = {
    "cowfs mou": "mount",
    "cowfs diff --st": "--stat",
    "cowfs diff sys": "sysrcd.bs",
    "cowfs mount -o ro,sto": "ro,store=",
}
"""What the user types, and how the shell completes the last word."""


@pytest.fixture
def shell(tmp_path: Path) -> Path:
    """A directory with a store and a cowfs, and the completion of each shell."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work/sysrcd.bs").touch()
    command = tmp_path / "cowfs"
    command.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {" ".join(COWFS)} "$@"\n')
    command.chmod(0o755)
    for name in ("zsh", "fish"):
        (tmp_path / name).write_text(shellcode(["cowfs"], shell=name))
    return tmp_path


@pytest.mark.skipif(not shutil.which("fish"), reason="needs fish")
def test_fish_completes(shell: Path) -> None:
    asked = "; ".join(f"complete -C {shlex.quote(typed)}; echo end" for typed in TYPED)
    done = subprocess.run(
        ["fish", "--no-config", "-c", f"source {shell}/fish; {asked}"],
        cwd=shell / "work",
        env={**os.environ, "PATH": f"{shell}:{os.environ['PATH']}", "HOME": str(shell)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    answers = [[line.split("\t")[0] for line in part.split()] for part in done.stdout.split("end\n")[:-1]]
    assert [answer[0] for answer in answers] == list(TYPED.values())


@pytest.mark.nightly
@pytest.mark.skipif(not shutil.which("zsh"), reason="needs zsh")
def test_zsh_completes(shell: Path) -> None:
    """Run the shell on a terminal, and press Tab."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(shell / "work")
        os.environ.update(PS1="ready> ", TERM="dumb", PATH=f"{shell}:{os.environ['PATH']}", HOME=str(shell))
        os.execvp("zsh", ["zsh", "-f", "-i"])
    seen = b""

    def wait_for(text: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + 30
        while text not in seen:
            assert time.monotonic() < deadline, f"{text!r} does not come, but {seen!r}"
            if select.select([terminal], [], [], 0.1)[0]:
                seen += os.read(terminal, 65536)
        seen = b""

    try:
        wait_for(b"ready> ")
        os.write(
            terminal, f"autoload -Uz compinit; compinit -u -D; source {shell}/zsh; echo do''ne\n".encode()
        )
        wait_for(b"done\r\n")
        for typed, word in TYPED.items():
            before, _, _ = typed.rpartition(" ")
            os.write(terminal, typed.encode() + b"\t")
            wait_for(f"{before} {word}".encode())
            os.write(terminal, b"\x15")  # Ctrl-U
        os.write(terminal, b"exit\n")
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)
