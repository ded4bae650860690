"""From a bare Debian with only git and make to the demo, an installation, and the checks."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import debian
from tests.support.mounts import project_root
from tests.support.system import needs_fuse, needs_root, run

pytestmark = [needs_root, needs_fuse, pytest.mark.nightly, pytest.mark.timeout(4 * 3600)]

PROJECT = Path(project_root())
CACHE = PROJECT / ".cache" / "release"
BARE = ("git", "make")
"""The packages that README asks for."""
PATIENCE = 3 * 3600.0

_APART = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
# A system of its own: mounts, processes, and a process 1 that takes in orphans. Goes with the one who waits.
_ENTER = """
set -e
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount --bind "$archives" "$root/var/cache/apt/archives"
for directory in $seen; do
    mkdir -p "$root$directory"
    mount --bind -o ro "$directory" "$root$directory"
done
cd "$root"
pivot_root . .  # not chroot: in one, nobody may make a namespace of users
umount -l .
cd /src
sh -c "$command" && exit 0
exit 1
"""


class Bare:
    """A Debian from debootstrap, with the source of cowfs in /src."""

    def __init__(self, suite: str) -> None:
        self.root = CACHE / suite
        self.log = CACHE / f"{suite}.log"
        self._archives = CACHE / f"{suite}.debs"
        (self._archives / "partial").mkdir(parents=True, exist_ok=True)
        kept = CACHE / f"{suite}.tar"
        if not kept.exists():
            debian.bootstrap(suite, CACHE / f"{suite}.tree", BARE)
            run(
                "tar",
                "-C",
                CACHE / f"{suite}.tree",
                "--one-file-system",
                "-cf",
                f"{kept}.new",
                ".",
                timeout=600,
            )
            shutil.rmtree(CACHE / f"{suite}.tree")
            Path(f"{kept}.new").rename(kept)
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()
        run("tar", "-C", self.root, "--numeric-owner", "-xpf", kept, timeout=600)
        self._seen = debian.surroundings(self.root)
        self.log.unlink(missing_ok=True)
        self._copy_source()

    def _copy_source(self) -> None:
        """Copy all files that git tracks or would add to a repository: make lint asks git for names."""
        listed = subprocess.run(
            ["git", "-c", "safe.directory=*", "ls-files", "-coz", "--exclude-standard"],
            cwd=PROJECT, capture_output=True, check=True,
        ).stdout  # fmt: skip
        names = b"\0".join(
            name for name in listed.split(b"\0") if name and (PROJECT / os.fsdecode(name)).exists()
        )
        (self.root / "src").mkdir()
        packed = subprocess.run(
            ["tar", "--null", "-T", "-", "--owner=0", "--group=0", "-cf", "-"],
            cwd=PROJECT, input=names, capture_output=True, check=True,
        ).stdout  # fmt: skip
        subprocess.run(["tar", "-C", self.root / "src", "-xf", "-"], input=packed, check=True)
        self.run("git init -q && git add -A")

    def run(self, command: str) -> None:
        """Run a shell command in /src. Its output goes to the log, and the end of it to a failure message."""
        environment = {
            **debian.environment(),
            "HOME": "/root",
            "TERM": "dumb",
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        }
        inside = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
        with self.log.open("ab") as log:
            log.write(f"\n$ {command}\n".encode())
            log.flush()
            done = subprocess.run(
                [*_APART, "bash", "-c", _ENTER],
                env={
                    **os.environ,
                    "root": str(self.root),
                    "archives": str(self._archives),
                    "seen": " ".join(map(str, self._seen)),
                    "command": f"exec env -i {inside} sh -c {shlex.quote(command)}",
                },
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, timeout=PATIENCE,
            )  # fmt: skip
        end = "\n".join(self.log.read_text(errors="replace").splitlines()[-60:])
        assert done.returncode == 0, f"{command}: failed; all of it is in {self.log}\n{end}"

    def remove(self) -> None:
        """Remove the tree, unless a test has failed."""
        shutil.rmtree(self.root)


def _made(suite: str) -> Bare:
    if shutil.which("debootstrap") is None:
        pytest.skip("needs debootstrap")
    CACHE.mkdir(parents=True, exist_ok=True)
    return Bare(suite)


@pytest.fixture
def bare(request: pytest.FixtureRequest) -> Bare:
    """A new one, of the test's suite."""
    return _made(request.param)


@pytest.fixture(scope="module")
def ready(request: pytest.FixtureRequest) -> Iterator[Bare]:
    """One of that suite for several tests, with everything that the checks need."""
    made = _made(request.param)
    made.run("scripts/setup --test")
    yield made
    if not request.session.testsfailed:
        made.remove()


BOTH = pytest.mark.parametrize("bare", ["bookworm", "trixie"], indirect=True)

_AS_USER = """\
useradd -m tester
cp -r /src /home/tester/cowfs; rm -rf /home/tester/cowfs/.venv; chown -R tester: /home/tester/cowfs
cd /home/tester/cowfs
exec setpriv --reuid=tester --regid=tester --init-groups env HOME=/home/tester make demo
"""


@BOTH
def test_make_demo(bare: Bare) -> None:
    bare.run("make demo")
    bare.run(_AS_USER)
    bare.remove()


@BOTH
def test_make_install_and_uninstall(bare: Bare) -> None:
    """The installed files are those in packaging/files, and uninstalling removes all."""
    bare.run("tests/release/installed.sh")
    bare.remove()


@BOTH
def test_pipx(bare: Bare) -> None:
    """Each error names the missing packages; with them, pipx install works."""
    bare.run("tests/release/by_pipx.sh")
    bare.remove()


PARTS = (
    "tests/unit tests/contract tests/model tests/parity tests/faults tests/security",
    "tests/ext3 tests/release/test_old_stores.py",
    "tests/fuse tests/crash",
    "tests/mount",
)
"""The day's tests in parts: each ends within its time, and what fails is known. The virtual machines of
tests/boot and make lint are not among them: they say the same wherever they run.
"""


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("ready", ["bookworm", "trixie"], indirect=True, scope="module")
def test_make_test(ready: Bare, part: str) -> None:
    """Run the checks of the day."""
    ready.run(f"make test PYTEST_ARGS='-n 2 --dist worksteal {part}'")


@pytest.mark.parametrize("bare", ["trixie"], indirect=True)
def test_the_libfuse_to_come(bare: Bare) -> None:
    """Debian unstable's Python, with the rest of Debian 13."""
    source = f"deb {debian.mirror()} sid main"
    pinned = "Package: *\\nPin: release n=sid\\nPin-Priority: 50\\n"
    bare.run("scripts/setup --test")  # what is not to come from there
    bare.run(
        f"echo '{source}' >/etc/apt/sources.list.d/sid.list; printf '{pinned}' >/etc/apt/preferences.d/sid"
    )
    bare.run("apt-get -o Acquire::Check-Valid-Until=false update")  # some mirrors are behind
    bare.run("apt-get install -y --no-install-recommends -t sid fuse3 libfuse3-dev")
    bare.run("rm -r .venv && scripts/setup --test")
    bare.run(
        "pkg-config --modversion fuse3; .venv/bin/python -m pytest tests/mount/test_libfuse.py tests/fuse"
    )
    bare.remove()
