"""A store on a thin volume of device-mapper, whose pool fills up and is extended. Nightly."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from tests.boot import images
from tests.boot.machine import hard_disk
from tests.boot.test_boot import PLAIN, Boot
from tests.support.system import needs_root

pytestmark = [needs_root, pytest.mark.nightly, pytest.mark.timeout(900)]

_MIB = 1 << 20
_SMALL, _LARGE = 24 << 11, 56 << 11
"""The size of the pool in sectors, before and after it is extended."""

_GUEST = f"""
mkdir /run/tools && mount -t ext4 -o ro /dev/vdb /run/tools
dm() {{
    LD_LIBRARY_PATH=$(echo /run/tools/usr/lib/* /run/tools/lib/* | tr ' ' :) \\
        /run/tools/usr/sbin/dmsetup --noudevsync --noudevrules "$@"
}}
pool() {{ echo "0 $1 thin-pool /dev/dm-0 /dev/dm-1 128 0 1 error_if_no_space"; }}
extend() {{
    dm suspend data && dm reload data --table "0 {_LARGE} linear /dev/vdc 8192" && dm resume data &&
        dm suspend pool && dm reload pool --table "$(pool {_LARGE})" && dm resume pool
}}
dm create meta --table "0 8192 linear /dev/vdc 0"
dm create data --table "0 {_SMALL} linear /dev/vdc 8192"
dm create pool --table "$(pool {_SMALL})"
dm message pool 0 "create_thin 0"
dm create thin --table "0 {200 << 11} thin /dev/dm-2 0"
/usr/sbin/mke2fs -q -t ext4 -O ^has_journal -E lazy_itable_init=0,nodiscard /dev/dm-3 && out "made: yes"
mkdir /run/thin /run/lower /run/mnt && mount -t ext4 /dev/dm-3 /run/thin
cowfs create /run/thin/store 64
cowfs mount /run/lower /run/mnt --store /run/thin/store && out "mounted: yes"
cat >/run/work.py <<'END'
import os, subprocess, sys
def out(key, value): print(f"TEST {{key}}: {{value}}", flush=True)
def attempt(call, *args):
    try: return call(*args)
    except OSError as error: return -error.errno
data = b"".join(b"%7d\\n" % number for number in range(1 << 17)) # 1 MiB
fd = os.open("/run/mnt/data", os.O_CREAT | os.O_RDWR)
out("written", sum(attempt(os.write, fd, data) for _ in range(30)))
out("fsync", attempt(os.fsync, fd))
out("refused", attempt(os.mkdir, "/run/mnt/later"))
out("again", attempt(os.fsync, fd))
open("/proc/sys/vm/drop_caches", "w").write("3")
out("read", [os.pread(fd, 1 << 20, n << 20) == data for n in range(30)].count(True))
out("umount", subprocess.run(["cowfs", "umount", "/run/mnt"]).returncode)
subprocess.run(["sh", "-c", sys.argv[1]])
out("room", attempt(os.fsync, fd))
out("later", attempt(os.mkdir, "/run/mnt/later"))
os.close(fd)
END
python3 -I /run/work.py ": >/run/full; until [ -e /run/extended ]; do usleep 10000; done" &
until [ -e /run/full ]; do usleep 10000; done
out "info: $(cowfs info /run/mnt | sed -n 's/^UNSAVED: *//p')"
extend && out "extended: yes"
: >/run/extended
wait
out "info: $(cowfs info /run/mnt | sed -n 's/^UNSAVED: *//p')."
cowfs umount /run/mnt; out "released: $?"
umount /run/thin && mount -t ext4 /dev/dm-3 /run/thin
e2fsck -fn /run/thin/store >/dev/null; out "e2fsck: $?"
cowfs mount /run/lower /run/mnt --store /run/thin/store
out "size: $(stat -c %s /run/mnt/data)"
out "lines: $(sort -u /run/mnt/data | wc -l)"
cowfs umount /run/mnt
umount /run/thin /run/tools
"""


def test_a_thin_pool_that_fills_up_and_is_extended(boot: Boot, image_disk: Path, tmp_path: Path) -> None:
    """Data written meanwhile stays in memory and then goes to the disk; nothing is lost."""
    program = shutil.which("dmsetup", path="/usr/sbin:/sbin")
    if program is None:
        pytest.skip("needs dmsetup")
    tree = tmp_path / "tools"
    (tree / "usr/sbin").mkdir(parents=True)
    images.copy_program(tree, Path(program))
    tools = images.ext4_disk(tmp_path / "tools.img", tree, 64)
    pool = tmp_path / "pool.img"
    with pool.open("wb") as out:
        out.truncate(64 * _MIB)
    initramfs = images.initramfs(tmp_path / "initramfs", "dm_thin_pool")
    devices = [*hard_disk(image_disk, "image"), *hard_disk(tools, "tools"), *hard_disk(pool, "pool")]
    with boot(f"{PLAIN} backstore=off", initramfs=initramfs, test=_GUEST, devices=devices).wait() as machine:
        said = machine.said
        assert said("made") == said("mounted") == "yes"
        assert said("written") == str(30 * _MIB), "the volume takes it"
        assert said("fsync") in {str(-errno.ENOSPC), str(-errno.EIO)}, "EIO it is in Linux 6.1"
        assert said("refused") == said("again") == said("fsync")
        assert said("read") == "30", "though the kernel was told to drop all pages"
        assert said("umount") == "32"
        machine.shows("TEST info: .*: the changes since .* are only in memory until its disk ")
        assert said("extended") == "yes"
        assert said("room") == said("later") == "None"
        assert said("info") == "."
        assert said("released") == said("e2fsck") == "0"
        assert said("size") == str(30 * _MIB) and said("lines") == str(1 << 17)
