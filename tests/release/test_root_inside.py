"""Programs of root work for a user with `cowfs run` on a whole Debian: apt, dpkg and useradd."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from perf import debian
from tests.support.mounts import cowfs
from tests.support.system import as_nobody_prefix, makes_user_namespaces, needs_fuse, needs_root, run

pytestmark = [needs_root, needs_fuse, pytest.mark.nightly, pytest.mark.slow, pytest.mark.timeout(900)]
CACHE = Path(__file__).parents[2] / ".cache" / "perf"
SCRIPT = """\
set -ex
test "$(id -u)" = 0
cd /tmp
useradd -m tester
test "$(stat -c %U:%G /home/tester)" = tester:tester
cp -a /etc copied
diff -r --no-dereference /etc copied
cp -p /etc/shadow shadow
test "$(stat -c '%a %U:%G' shadow)" = '640 root:shadow'
install -m 4755 -o tester -g games /bin/true installed
test "$(stat -c '%a %U:%G' installed)" = '4755 tester:games'
install -d -m 2775 -g staff made
test "$(stat -c '%a %U:%G' made)" = '2775 root:staff'
tar -C /etc -cf etc.tar .
mkdir unpacked
tar -C unpacked -xpf etc.tar
test "$(stat -c '%a %U:%G' unpacked/shadow)" = '640 root:shadow'
mkdir -p hello/DEBIAN hello/var/lib/hello
printf '%s\\n' 'Package: hello' 'Version: 1' 'Architecture: all' 'Maintainer: x <x@y>' 'Description: x' \\
    > hello/DEBIAN/control
printf '%s\\n' '#!/bin/sh' 'set -e' 'chown daemon:mail /var/lib/hello' 'chmod 2750 /var/lib/hello' \\
    > hello/DEBIAN/postinst
chmod 755 hello/DEBIAN/postinst
dpkg-deb -b hello hello.deb
dpkg -i hello.deb
test "$(stat -c '%a %U:%G' /var/lib/hello)" = '2750 daemon:mail'
dpkg -P hello
apt-get -y install ./hello.deb
apt-get -y purge hello
test ! -e /var/lib/hello
userdel -r tester
test ! -e /home/tester
echo all done
"""


@pytest.mark.parametrize("kind", ["image", "directory"])
def test_programs_of_root(kind: str, nobody_path: Path, many: None) -> None:
    if missing := debian.missing_requirements():
        pytest.skip(missing)
    if not makes_user_namespaces():
        pytest.skip("needs user namespaces")
    CACHE.mkdir(parents=True, exist_ok=True)
    image = nobody_path / "debian"
    shutil.copy(debian.make(CACHE), image)
    image.chmod(0o644)
    run(*as_nobody_prefix(), "mkdir", "-m", "700", nobody_path / "run")
    store, env = nobody_path / "store", {"XDG_RUNTIME_DIR": str(nobody_path / "run")}
    if kind == "image":
        cowfs("create", store, "500", nobody=True, check=True)
    command = ("run", "--root", image, "--store", store, "--", "bash", "-c", SCRIPT)
    done = cowfs(*command, nobody=True, timeout=300, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "all done" in done.stdout
