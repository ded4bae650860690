"""cowfs-overlay is the mount_program of buildah: images are built on it, as root and as an ordinary user."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.system import needs_fuse, needs_root

pytestmark = [
    needs_fuse,
    needs_root,
    pytest.mark.nightly,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not (shutil.which("buildah") and shutil.which("newuidmap")), reason="needs buildah and uidmap"
    ),
]
TRANSPORT = "io_uring"
PROGRAM = Path(sys.executable).parent / "cowfs-overlay"
USER = 4242

BUILD = r"""
set -eu
cd "$1"
mkdir run; chmod 700 run
cat >storage.conf <<END
[storage]
driver = "overlay"
graphroot = "$1/root"
runroot = "$1/runroot"
[storage.options.overlay]
mount_program = "$1/program"
END
printf '#!/bin/sh\necho "$*" >>"%s/called"\nexec "%s" "$@"\n' "$1" "$2" >program
chmod 755 program
echo '{"default":[{"type":"insecureAcceptAnything"}]}' >policy.json
export XDG_RUNTIME_DIR="$1/run" CONTAINERS_STORAGE_CONF="$1/storage.conf" STORAGE_DRIVER=overlay
export CONTAINERS_REGISTRIES_CONF=/dev/null BUILDAH_ISOLATION=chroot
from() { buildah --signature-policy policy.json from --pull-never "$1"; }
commit() { buildah --signature-policy policy.json commit -q --rm "$1" "$2" >&2; }

c=$(from scratch)
buildah copy -q "$c" /bin/busybox /bin/busybox >&2
buildah run "$c" /bin/busybox sh -euc '
    /bin/busybox --install -s /bin
    mkdir -p /etc /data/sub /old
    echo one >/etc/one; echo two >/etc/two; echo x >/data/sub/x; echo x >/old/x
    ln /etc/two /etc/link
    chown 12:13 /etc/two /old/x; chmod 4755 /old/x; chmod 000 /data/sub/x'
commit "$c" first
c=$(from first)
buildah run "$c" /bin/sh -euc '
    rm /etc/one; rm -r /data; mkdir /data; echo new >/data/new
    mv /old /renamed; mv /etc/two /etc/three; echo more >>/etc/link'
commit "$c" second
c=$(from second)
buildah run "$c" /bin/sh -euc '
    for path in /etc/one /etc/two /data/sub /old; do
        if [ -e $path ]; then echo "$path is back"; fi
    done
    find /data /renamed -type f
    stat -c "%n %a %u:%g" /etc/three /renamed/x
    cat /etc/three'
buildah rm "$c" >&2
buildah rmi --all >&2
"""

BUILT = """\
/data/new
/renamed/x
/etc/three 644 12:13
/renamed/x 4755 12:13
two
more
"""


def built(place: Path, *prefix: str | Path) -> str:
    done = subprocess.run(
        [*prefix, "sh", "-c", BUILD, "sh", place, PROGRAM],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env={**os.environ, "HOME": str(place)},
    )
    assert done.returncode == 0, done.stderr
    assert "upperdir=" in (place / "called").read_text(), "it was cowfs that mounted"
    return done.stdout


@pytest.fixture
def bare_etc(tmp_path: Path) -> list[str | Path]:
    """A command prefix: in a mount namespace where somebody has numbers to give to his containers."""
    for name in ("passwd", "group", "subuid", "subgid"):
        there = Path("/etc") / name
        (tmp_path / name).write_text(there.read_text() if there.exists() else "")
    for name, line in {
        "passwd": f"cowt:x:{USER}:{USER}::/:/bin/sh",
        "group": f"cowt:x:{USER}:",
        "subuid": "cowt:200000:65536",
        "subgid": "cowt:200000:65536",
    }.items():
        with open(tmp_path / name, "a") as file:
            file.write(line + "\n")
    binds = "; ".join(
        f"[ -e /etc/{name} ] || : >/etc/{name}; mount --bind {tmp_path}/{name} /etc/{name}"
        for name in ("passwd", "group", "subuid", "subgid")
    )
    user = f"setpriv --reuid={USER} --regid={USER} --clear-groups"
    return ["unshare", "-m", "sh", "-euc", f'{binds}; exec {user} "$@"', "sh"]


def test_root_builds_images(tmp_path: Path) -> None:
    assert built(tmp_path, "unshare", "-m") == BUILT


def test_a_user_builds_images(nobody_path: Path, bare_etc: list[str | Path]) -> None:
    os.chown(nobody_path, USER, USER)
    assert built(nobody_path, *bare_etc) == BUILT
