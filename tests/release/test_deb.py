"""The Debian packages: their content, and tests with lintian and on a bare Debian. Nightly."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.release.test_bare_debian import CACHE, Bare
from tests.support.mounts import project_root
from tests.support.system import needs_fuse, needs_root, run

pytestmark = [needs_root, needs_fuse, pytest.mark.nightly, pytest.mark.timeout(2 * 3600)]

PROJECT = Path(project_root())
_USED = """
set -e
ln -sf /proc/self/mounts /etc/mtab
find / -xdev ! -path '/var/*' ! -path '/tmp/*' ! -path '/src*' | sort > /tmp/before
apt-get update; DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends /tmp/cowfs*.deb
mount -t tmpfs t /mnt; chmod 1777 /mnt; cd /mnt; mkdir lower m; echo hi > lower/a
cowfs create s.bs 16
mount -t cowfs -o store=/mnt/s.bs /mnt/lower /mnt/m; echo two > m/b
cowfs diff m; umount m; fsck.cowfs -n s.bs
mkdir up work; cowfs-overlay -o lowerdir=lower,upperdir=up,workdir=work m; echo x > m/over; umount m
cat up/over
test -e /usr/share/man/man1/cowfs-diff.1.gz
setpriv --reuid=65534 --regid=65534 --clear-groups \
    sh -c 'mkdir u um; cowfs mount u um; echo x > um/of-nobody; cowfs diff um; cowfs umount um'
cd /; umount /mnt
apt-get purge -y cowfs cowfs-boot
find / -xdev ! -path '/var/*' ! -path '/tmp/*' ! -path '/src*' | sort > /tmp/after
! grep -i cowfs /tmp/after
"""


@pytest.fixture(scope="module")
def packages() -> list[Path]:
    return [PROJECT / name for name in run(PROJECT / "scripts/deb", timeout=400).stdout.split()]


def test_what_is_in_them(packages: list[Path]) -> None:
    program, boot = (run("dpkg-deb", "-c", package).stdout for package in packages)
    for name in ("bin/cowfs", "sbin/mount.cowfs", "sbin/fsck.cowfs", "share/man/man1/cowfs.1.gz"):
        assert f" ./usr/{name}" in program
    assert "__pycache__" not in program and "initramfs-tools/hooks/cowfs" in boot


@pytest.mark.skipif(shutil.which("lintian") is None, reason="needs lintian")
def test_lintian_finds_nothing(packages: list[Path]) -> None:
    said = run("lintian", "--allow-root", *packages, check=False, timeout=300).stdout
    assert [line for line in said.splitlines() if line.startswith(("E:", "W:"))] == []


@pytest.mark.skipif(shutil.which("debootstrap") is None, reason="needs debootstrap (scripts/setup --boot)")
@pytest.mark.parametrize("suite", ["bookworm", "trixie"])
def test_made_on_one_bare_system_and_used_on_another(suite: str) -> None:
    """``make deb`` on each release; the packages bring everything that a bare system needs."""
    made = CACHE / f"{suite}.packages"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    maker = Bare(suite)
    maker.run("make deb")
    packages = list((maker.root / "src/dist").glob("*.deb"))
    assert len(packages) == 2
    for package in packages:
        shutil.copy(package, made)
    maker.remove()
    user = Bare(suite)
    shutil.rmtree(user.root / "src")
    (user.root / "src").mkdir()
    for package in made.glob("*.deb"):
        shutil.copy(package, user.root / "tmp")
    (user.root / "tmp/used.sh").write_text(_USED)
    user.run("sh /tmp/used.sh")
    said = user.log.read_text()
    assert "A  b\n" in said and "A  of-nobody\n" in said
    user.remove()
