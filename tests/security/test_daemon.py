"""Root's cowfs runs with little: its own programs and environment, and no privilege that it does not need."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import sys
from pathlib import Path

import pytest

from tests.support.mounts import cowfs, eventually, is_mounted, mounted, project_root
from tests.support.system import as_nobody_prefix, needs_fuse, needs_root, run

pytestmark = [needs_fuse, needs_root]

HELPERS = Path(project_root()) / "mount-helpers"
INSTALLED = Path(sys.executable).parent / "cowfs"


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    made = tmp_path / "lower"
    (made / "dir").mkdir(parents=True)
    (made / "file").write_text("below\n")
    (made / "dir" / "gone").write_text("gone\n")
    return made


@pytest.fixture
def store(tmp_path: Path) -> Path:
    cowfs("create", tmp_path / "store", "16", check=True)
    return tmp_path / "store"


# --- what the caller left lying about


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A directory of programs, and of modules of Python, that all leave ``sprung`` behind."""
    made = tmp_path / "trap"
    (made / "cowfs").mkdir(parents=True)
    for name in ("e2fsck", "mke2fs", "resize2fs", "e2image", "fusermount3", "umount", "cowfs-", "id", "env"):
        (made / name).write_text(f"#!/bin/sh\n: >{made}/sprung\nexit 1\n")
        (made / name).chmod(0o755)
    for name in ("json.py", "argparse.py", "sitecustomize.py", "cowfs/__init__.py"):
        (made / name).write_text(f"open('{made}/sprung', 'w').close()\n")
    return made


def test_no_program_of_the_callers_path(trap: Path, store: Path) -> None:
    env = {"PATH": f"{trap}:{os.environ['PATH']}"}
    cowfs("create", trap.parent / "other", "16", env=env, check=True)
    cowfs("grow", store, "32", env=env, check=True)
    cowfs("check", store, env=env, check=True)
    run(INSTALLED, "create", "third", "16", env={"PATH": f":{os.environ['PATH']}"}, cwd=trap)
    assert not (trap / "sprung").exists()


@pytest.mark.parametrize("name", ["MKE2FS_CONFIG", "E2FSCK_CONFIG", "LD_LIBRARY_PATH", "E2FSPROGS_FAKE_TIME"])
def test_programs_get_no_environment_of_the_callers(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from cowfs.linux import programs
    from cowfs.store.e2fsprogs import tools

    monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(programs, "find", lambda _: "/usr/bin/env")
    assert sorted(tools.run(["e2fsck"]).stdout.split()) == [
        b"LC_ALL=C",
        f"PATH={programs.SAFE_PATH}".encode(),
    ]


def test_a_configuration_of_the_callers_makes_no_other_store(tmp_path: Path) -> None:
    (tmp_path / "conf").write_text(
        "[defaults]\n\tbase_features = sparse_super2,none_such\n\tblocksize = 1024\n"
    )
    cowfs("create", tmp_path / "s", "16", env={"MKE2FS_CONFIG": str(tmp_path / "conf")}, check=True)


def test_nothing_is_imported_from_the_current_directory(trap: Path, lower: Path) -> None:
    clean = {"PATH": os.environ["PATH"]}
    run(INSTALLED, "create", "new", "16", cwd=trap, env=clean)
    run(INSTALLED, "check", "new", cwd=trap, env=clean)
    mountpoint = trap.parent / "mnt"
    mountpoint.mkdir()
    hostile = {"PATH": f"{trap}:{os.environ['PATH']}", "PYTHONPATH": str(trap), "PYTHONHOME": str(trap)}
    run(HELPERS / "mount.cowfs", lower, mountpoint, "-o", "store=memory", cwd=trap, env=hostile)
    try:
        assert (mountpoint / "file").read_text() == "below\n"
    finally:
        run(HELPERS / "umount.cowfs", mountpoint, cwd=trap, env=hostile)
    assert not is_mounted(mountpoint)
    assert not (trap / "sprung").exists()


HOSTILE = [f"PYTHON{name}" for name in ("PATH", "STARTUP", "HOME", "USERBASE", "PLATLIBDIR", "BREAKPOINT")]


@pytest.mark.parametrize("linked", [False, True], ids=["the script", "a link to it"])
def test_the_installed_command_imports_nothing_of_the_callers(
    trap: Path, lower: Path, tmp_path: Path, linked: bool
) -> None:
    """With the environment of `sudo -E cowfs`, no module is the caller's, nor in the daemon."""
    command = INSTALLED
    if linked:
        command = tmp_path / "linked"
        command.symlink_to(INSTALLED)
    for name in ("readlink", "python3", "python", "usercustomize.py", "encodings.py", "trio.py", "cowfs"):
        if not (trap / name).exists():
            shutil.copy(trap / ("id" if "." not in name else "json.py"), trap / name)
    hostile = {"PATH": f"{trap}:{os.environ['PATH']}", "HOME": str(trap), **dict.fromkeys(HOSTILE, str(trap))}
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    assert run(command, "--version", cwd=trap, env=hostile).stdout.startswith("cowfs ")
    run(command, "create", tmp_path / "s.bs", "16", cwd=trap, env=hostile)
    run(command, "mount", lower, mountpoint, "--store", tmp_path / "s.bs", cwd=trap, env=hostile)
    pid = json.loads(run(command, "info", "--json", mountpoint, env=hostile).stdout)["pid"]
    shown = [Path(f"/proc/{each}/environ").read_bytes().strip(b"\0") for each in (pid, *children(pid))]
    run(command, "umount", mountpoint, cwd=trap, env=hostile)
    assert not (trap / "sprung").exists()
    assert len(shown) > 1, "with its helper"
    assert set(shown) == {b"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}


def children(pid: int) -> list[str]:
    """The processes that a process has started."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [child for task in tasks for child in (task / "children").read_text().split()]


def test_libraries_load_nothing_of_the_callers(nobody_path: Path) -> None:
    """Libraries would do so before the first line of Python. Users may load what is theirs."""
    command, python = nobody_path / "bin/cowfs", nobody_path / "bin/python3"
    command.parent.mkdir()
    shutil.copy(Path(project_root()) / "bin/cowfs", command)
    python.write_text("#!/bin/sh\nexec /usr/bin/env\n")
    python.chmod(0o755)
    loaded = {"GCONV_PATH", "LOCPATH", "OPENSSL_CONF", "OPENSSL_ENGINES", "OPENSSL_MODULES"}
    for who, left in (([], set()), (as_nobody_prefix(), loaded)):
        said = run(*who, command, env=dict.fromkeys(loaded, "/tmp"), cwd="/").stdout
        assert {line.partition("=")[0] for line in said.splitlines()} & loaded == left


def test_the_module_imports_nothing_of_the_callers(tmp_path: Path) -> None:
    """`python -m cowfs` has the current directory in its path, until it has looked who runs it."""
    for name in ("json.py", "argparse.py", "email.py", "csv.py", "zipfile.py", "logging.py", "trio.py"):
        (tmp_path / name).write_text(f"open('{tmp_path}/sprung', 'w').close()\n")
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}
    shown = run(sys.executable, "-m", "cowfs", "--version", cwd=tmp_path, env=env)
    assert shown.stdout.startswith("cowfs ")
    assert run(
        sys.executable, "-m", "cowfs", "bogus", "x", "y", cwd=tmp_path, env=env, check=False
    ).returncode
    assert not (tmp_path / "sprung").exists()


def test_users_run_the_same_script(nobody_path: Path) -> None:
    """It imports what they have installed for themselves, but nothing from the current directory."""
    (nobody_path / "json.py").write_text(f"open('{nobody_path}/sprung', 'w').close()\n")
    done = run(*as_nobody_prefix(), INSTALLED, "create", "s", "16", cwd=nobody_path, check=False)
    assert done.returncode == 0, done
    assert (nobody_path / "s").exists() and not (nobody_path / "sprung").exists()


# --- privileges

NEEDED = (0, 1, 2, 3, 4, 21, 24, 27, 31)
"""chown, dac_override, dac_read_search, fowner, fsetid, sys_admin, sys_resource, mknod, setfcap."""


def threads(pid: int) -> list[dict[str, str]]:
    """Return the status of each thread, as the kernel shows it."""
    return [
        dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines())
        for task in Path(f"/proc/{pid}/task").iterdir()
    ]


@pytest.mark.parametrize("kind", ["memory", "image", "directory"])
def test_no_thread_has_more_than_it_needs(tmp_path: Path, lower: Path, store: Path, kind: str) -> None:
    allowed = sum(1 << number for number in NEEDED)
    stores: dict[str, str | Path] = {"memory": "memory", "image": store, "directory": tmp_path / "changes"}
    chosen = stores[kind]
    with mounted(lower, tmp_path / "mnt", chosen) as here:
        (here.path / "new").write_text("x")
        pid = here.pid()
        limits = Path(f"/proc/{pid}/limits").read_text()
        if re.search(r"^Max nice priority +0 +0 ", limits, re.MULTILINE):  # instead of that limit
            allowed |= 1 << 23  # CAP_SYS_NICE
        found = threads(pid)
        assert len(found) > (kind == "image"), "the one that commits, too"
        for thread in found:
            assert thread["NoNewPrivs"] == "1"
            assert thread["Seccomp"] == "2", "a filter"
            assert (int(thread["CapInh"], 16), int(thread["CapAmb"], 16)) == (0, 0)
            for which in ("CapPrm", "CapEff", "CapBnd"):
                assert int(thread[which], 16) & ~allowed == 0, which
        assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)


REFUSED = """
import ctypes, errno, os, socket
from cowfs.linux.privileges import drop
drop()
libc = ctypes.CDLL(None, use_errno=True)
def refused(number, *arguments):
    result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
    assert (result, ctypes.get_errno()) == (-1, errno.EPERM), number
if os.uname().machine == "x86_64":
    # ptrace(PTRACE_TRACEME), keyctl, add_key, kcmp, userfaultfd, personality, io_uring_setup
    refused(101, 0, 0, 0, 0)
    refused(250, 0, 0, 0, 0)
    refused(248, 0, 0, 0, 0)
    refused(312, os.getpid(), os.getpid(), 0, 0)
    refused(323, 1)
    refused(135, 0xffffffff)
    refused(425, 8, 0)
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET):
    try:
        socket.socket(family, socket.SOCK_RAW if family != socket.AF_INET else socket.SOCK_STREAM)
    except PermissionError:
        continue
    raise SystemExit(f"family {family}")
socket.socket(socket.AF_UNIX).close()
assert os.system("true") == 0
"""


def test_calls_that_no_filesystem_makes_are_refused() -> None:
    run(sys.executable, "-c", REFUSED, env={**os.environ, "PYTHONPATH": project_root()})


def test_its_memory_is_shown_to_nobody(tmp_path: Path, lower: Path) -> None:
    """Not even root sees it without CAP_SYS_PTRACE, since the daemon is not dumpable."""
    with mounted(lower, tmp_path / "mnt") as here:
        read = f"exec 3</proc/{here.pid()}/mem"
        assert run("sh", "-c", read).returncode == 0
        bare = ["setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-all", "--"]
        assert run(*bare, "sh", "-c", read, check=False).returncode != 0


def test_a_users_daemon_can_still_unmount(lower: Path, nobody_path: Path) -> None:
    """fusermount3 is set-user-ID: a user's daemon may still gain its privilege."""
    lower.parent.chmod(0o755)
    (nobody_path / "lower").mkdir()
    with mounted(nobody_path / "lower", nobody_path / "mnt", nobody=True) as here:
        assert {thread["NoNewPrivs"] for thread in threads(here.pid())} == {"0"}
        os.kill(here.pid(), signal.SIGTERM)
        eventually(lambda: not is_mounted(here.path), "it is unmounted")


def use(top: Path) -> None:
    """Do what takes privileges: owners, devices, attributes, what others may not read."""
    (top / "dir" / "gone").unlink()
    (top / "file").write_text("above\n")
    os.chown(top / "file", 1234, 4321)
    os.chmod(top / "file", 0o2400)
    assert stat.S_IMODE((top / "file").stat().st_mode) == 0o2400
    os.mknod(top / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.setxattr(top / "file", "trusted.a", b"b")
    os.setxattr(
        top / "file", "security.capability", bytes.fromhex("0100000200040000000000000000000000000000")
    )
    os.mkdir(top / "theirs", 0o700)
    os.chown(top / "theirs", 1234, 4321)
    (top / "theirs" / "x").write_text("x")
    os.rename(top / "dir", top / "moved")
    with open(top / "theirs" / "unlinked", "w+") as file:
        os.unlink(top / "theirs" / "unlinked")
        file.write("lives on")
        file.seek(0)
        assert file.read() == "lives on"


def look(top: Path) -> None:
    info = (top / "file").stat()
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (1234, 4321, 0o2400)
    assert (top / "null").stat().st_rdev == os.makedev(1, 3)
    assert os.getxattr(top / "file", "trusted.a") == b"b"
    assert len(os.getxattr(top / "file", "security.capability")) == 20
    assert (top / "theirs" / "x").read_text() == "x"
    assert os.listdir(top / "moved") == []


@pytest.mark.parametrize("how", ["image process", "image kernel", "directory process"])
def test_all_goes_on_without_them(tmp_path: Path, lower: Path, store: Path, how: str) -> None:
    kind, engine = how.split()
    chosen = store if kind == "image" else tmp_path / "changes"
    with mounted(lower, tmp_path / "mnt", chosen, engine=engine) as here:
        use(here.path)
        look(here.path)
        if how == "image process":
            cowfs("grow", here.path, "32", check=True)
    with mounted(lower, tmp_path / "mnt", chosen, engine=engine) as here:
        look(here.path)
    if kind == "image":
        assert cowfs("check", "-n", store).returncode == 0


def test_a_kernels_squashfs(tmp_path: Path, lower: Path) -> None:
    run("mksquashfs", lower, tmp_path / "image", "-quiet")
    with mounted(tmp_path / "image", tmp_path / "mnt", engine="kernel") as here:
        assert (here.path / "file").read_text() == "below\n"


def test_persist_goes_on_without_them(tmp_path: Path, lower: Path) -> None:
    with mounted(lower, tmp_path / "mnt") as here:
        use(here.path)
        cowfs("persist", here.path, tmp_path / "kept", check=True)
        look(here.path)
    with mounted(lower, tmp_path / "mnt", tmp_path / "kept") as here:
        look(here.path)


_PRIORITY = """
import os, sys
from cowfs.linux import seccomp
getattr(seccomp, sys.argv[1])()
def attempt(call, *arguments):
    try:
        call(*arguments)
        print("done")
    except PermissionError:
        print("refused")
attempt(os.sched_setscheduler, 0, os.SCHED_IDLE, os.sched_param(0))
attempt(os.sched_setscheduler, 0, os.SCHED_OTHER, os.sched_param(0))
for policy in (os.SCHED_FIFO, os.SCHED_RR, os.SCHED_BATCH):
    attempt(os.sched_setscheduler, 0, policy, os.sched_param(policy != os.SCHED_BATCH))
attempt(os.setpriority, os.PRIO_PROCESS, 0, 1)
"""


@pytest.mark.parametrize("filter_", ["refuse_needless_calls", "refuse_all_but_network"])
def test_no_precedence_over_other_programs(filter_: str) -> None:
    """Threads may step back for others, and return, and nothing else."""
    done = run(sys.executable, "-c", _PRIORITY, filter_, cwd=project_root())
    assert done.stdout.split() == ["done"] * 2 + ["refused"] * 4
