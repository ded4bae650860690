"""mount(8), umount(8) and /etc/fstab know cowfs by the helpers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import tree
from tests.support.mounts import COWFS, is_mounted, project_root
from tests.support.system import needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True

pytestmark = [needs_fuse, needs_root]

HELPERS = Path(project_root()) / "mount-helpers"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A lower, a mountpoint, and the helpers where mount(8) looks for them."""
    tree.build(tmp_path / "lower", {"file": b"x\n", "dir/y": b"y\n"})
    (tmp_path / "mnt").mkdir()
    sbin = tmp_path / "sbin"
    sbin.mkdir()
    for helper, names in (
        ("mount.cowfs", ("mount.cowfs",)),
        ("umount.cowfs", ("umount.cowfs", "umount.fuse.cowfs")),
    ):
        assert (HELPERS / helper).exists()
        for name in names:
            os.symlink(HELPERS / helper, sbin / name)
    # The helpers take the cowfs of their own place, or else the one on the path: this.
    command = sbin / "cowfs"
    command.write_text(f'#!/bin/sh\nPYTHONPATH={project_root()} exec {" ".join(COWFS)} "$@"\n')
    command.chmod(0o755)
    return tmp_path


def with_helpers(base: Path, commands: str, fstab: str = "") -> str:
    """Run shell commands in a namespace where the helpers are in /sbin and /etc/fstab is *fstab*."""
    (base / "fstab").write_text(fstab)
    setup = f"""
        mount -t overlay -o lowerdir={base}/sbin:/usr/sbin none /usr/sbin
        mount --bind {base}/fstab /etc/fstab
        cd {base}
    """
    return run("unshare", "-m", "--propagation", "private", "sh", "-euc", setup + commands).stdout


LOOK = """
    test "$(cat mnt/file)" = changed
    test "$(findmnt -n -o FSTYPE -M "$PWD/mnt")" = fuse.cowfs
"""


def test_mount_and_umount(base: Path) -> None:
    with_helpers(
        base,
        f"""
        mount -t cowfs -o store={base}/store,log={base}/log lower mnt
        echo changed > mnt/file
        {LOOK}
        umount mnt
        ! mountpoint -q mnt
        mount -t cowfs -o store={base}/store,ro lower mnt
        {LOOK}
        ! touch mnt/x 2>/dev/null
        umount mnt
        """,
    )
    assert not is_mounted(base / "mnt")


def test_fstab(base: Path) -> None:
    """By its line in fstab, by mount -a, and not twice by mount -a."""
    line = f"{base}/lower {base}/mnt cowfs store={base}/store,nofail,x-systemd.requires=x,_netdev 0 0\n"
    with_helpers(
        base,
        f"""
        mount mnt
        echo changed > mnt/file
        umount mnt
        mount -a
        {LOOK}
        mount -a
        test "$(grep -c " $PWD/mnt " /proc/self/mountinfo)" = 1
        umount {base}/mnt
        """,
        fstab=line,
    )


def test_umount_waits_for_the_store(base: Path) -> None:
    """When umount(8) returns, the store is free: it can be mounted at once, again and again."""
    with_helpers(
        base,
        f"""
        for number in 1 2 3; do
            mount -t cowfs -o store={base}/store lower mnt
            echo $number >> mnt/count
            umount mnt
        done
        mount -t cowfs -o store={base}/store lower mnt
        test "$(wc -l < mnt/count)" = 3
        umount mnt
        """,
    )


def test_exit_code_and_message(base: Path) -> None:
    said = with_helpers(
        base,
        f"""
        code=0; mount -t cowfs -o store={base}/store missing mnt 2>&1 || code=$?
        echo "code $code"
        code=0; mount -t cowfs -o stroe=x lower mnt 2>&1 || code=$?
        echo "code $code"
        mount -t cowfs -s -o stroe=x,store={base}/store lower mnt
        umount mnt
        mount.cowfs lower mnt --wrong 2>&1 | tail -n 1
        umount.cowfs mnt --wrong 2>&1 | tail -n 1
        """,
    )
    lines = said.splitlines()
    assert "missing" in lines[0] and lines[1] == "code 32"
    assert "stroe" in lines[2] and lines[3] == "code 1"
    assert lines[-2].startswith("usage: mount.cowfs ") and lines[-1].startswith("usage: umount.cowfs ")


def test_a_dry_run_mounts_nothing(base: Path) -> None:
    with_helpers(base, f"mount -f -t cowfs -o store={base}/store lower mnt; ! mountpoint -q mnt")
    assert not (base / "store").exists()


def test_remount(base: Path) -> None:
    """mount(8) finds the helper by the name of the type: nothing can be written, then it can again.

    It also sets a flag that the kernel alone needs.
    """
    os.symlink(HELPERS / "mount.cowfs", base / "sbin" / "mount.fuse.cowfs")
    said = with_helpers(
        base,
        """
        mkdir store
        mount -t cowfs -o store=store,nosuid lower mnt
        echo one > mnt/one
        exec 5> mnt/open
        mount -o remount,ro mnt 2> refused && echo "not refused"
        exec 5>&-
        grep -q fuser refused
        mount -o remount,ro mnt
        findmnt -n -o OPTIONS -M "$PWD/mnt"
        echo two 2> /dev/null > mnt/two && echo "written to"
        cat mnt/one
        mount -o remount,rw,noexec mnt
        findmnt -n -o OPTIONS -M "$PWD/mnt"
        echo two > mnt/two
        umount mnt
        cat store/upper/two
        """,
    )
    options, one, again, two = said.splitlines()
    assert (one, two) == ("one", "two")
    assert options.startswith("ro,nosuid")
    assert again.startswith("rw,nosuid,noexec")


@pytest.mark.parametrize("kind", [pytest.param("directory", marks=pytest.mark.nightly), "image"])
def test_a_store_on_read_only_media(base: Path, kind: str) -> None:
    """The store can be read, with its hard links, and cannot be made writable."""
    os.symlink(HELPERS / "mount.cowfs", base / "sbin" / "mount.fuse.cowfs")
    os.link(base / "lower/file", base / "lower/link")
    said = with_helpers(
        base,
        f"""
        mkdir media
        mount -t tmpfs none media
        [ {kind} = directory ] || cowfs create media/store 32M >&2
        mount -t cowfs -o store=media/store lower mnt
        echo changed >> mnt/link
        echo new > mnt/new
        rm -r mnt/dir
        umount mnt
        mount -o remount,ro media
        mount -t cowfs -o store=media/store,ro lower mnt
        (cd mnt; ls; cat file link new)
        ! touch mnt/x 2> /dev/null
        ! mount -o remount,rw mnt 2>&1
        cowfs diff mnt
        umount mnt
        ! mount -t cowfs -o store=media/store lower mnt 2>&1
        umount media
        """,
    )
    refusal, *lines = [line for line in said.splitlines() if "media/store" in line]
    assert "was opened read-only (unmount, and mount without ro)" in refusal
    assert "read-only media" in lines[0]
    rest = [line for line in said.splitlines() if "media/store" not in line]
    assert rest[:3] == ["file", "link", "new"]
    assert rest[3:8] == ["x", "changed", "x", "changed", "new"]
    assert {tuple(line.split()) for line in rest[8:]} >= {("A", "new"), ("D", "dir/")}


def test_a_user_mounts_and_unmounts_by_fstab(nobody_path: Path, base: Path) -> None:
    """``users``: mount(8) and umount(8) run the helpers as the user, who may unmount what root has mounted;
    findmnt and df show what is there."""
    for name in ("lower", "mnt"):
        (nobody_path / name).mkdir()
        os.chown(nobody_path / name, 65534, 65534)
    (nobody_path / "lower/file").write_text("file\n")
    user = f"setpriv --reuid=65534 --regid=65534 --clear-groups env PATH={base}/sbin:$PATH"
    os.chmod(base, 0o755)
    said = with_helpers(
        base,
        f"""
        cd {nobody_path}
        {user} mount mnt
        {user} sh -c 'cat mnt/file; echo new > mnt/new'
        {user} findmnt -n -o TARGET,SOURCE,FSTYPE -M {nobody_path}/mnt
        {user} df --output=fstype,target mnt | tail -n 1
        {user} umount mnt
        mountpoint -q mnt || cat store/upper/new
        mount -o store={nobody_path}/other mnt
        {user} umount mnt
        mountpoint -q mnt || ls -d other
        """,
        fstab=f"{nobody_path}/lower {nobody_path}/mnt cowfs store={nobody_path}/store,users,noauto 0 0\n",
    )
    here = str(nobody_path)
    shown = [f"{here}/mnt", f"{here}/lower", "fuse.cowfs"]
    assert [line.split() for line in said.splitlines()] == [
        *(["file"], shown, ["fuse.cowfs", f"{here}/mnt"], ["new"], ["other"])
    ]


def test_every_option_may_stand_in_fstab(base: Path) -> None:
    """Those of cowfs, those of mount(8), and those of others: all in one line that mounts, and remounts."""
    os.symlink(HELPERS / "mount.cowfs", base / "sbin" / "mount.fuse.cowfs")
    ours = [
        f"store={base}/store,subdir=one,engine=auto,image_offset=0,io_uring=auto,passthrough=auto,volatile=/dir",
        f"size=64M,fsname=name,log={base}/log,debug=cache,force_lower,noallow_other,noacl,blame,fault=none",
    ]
    others = (
        "defaults,async,rw,nosuid,nodev,noexec,relatime,sync,nofail,noauto,_netdev,users,user,owner,group"
    )
    systemd = (
        "x-systemd.automount,x-systemd.device-timeout=5,x-systemd.requires=a.service,x-initrd.mount,comment=x"
    )
    said = with_helpers(
        base,
        """
        mount mnt
        findmnt -n -o SOURCE,OPTIONS -M "$PWD/mnt"
        mount -o remount,ro mnt
        touch mnt/x 2>&1 || true
        mount -o remount,rw mnt
        touch mnt/x
        umount mnt
        """,
        fstab=f"{base}/lower {base}/mnt cowfs {','.join([*ours, others, systemd])} 0 0\n",
    )
    (source, options), *rest = map(str.split, said.splitlines())
    assert source == "name"
    assert [" ".join(line) for line in rest] == ["touch: cannot touch 'mnt/x': Read-only file system"]
    assert {"rw", "nosuid", "nodev", "noexec", "relatime", "sync"} <= set(options.split(","))


GENERATOR = Path("/lib/systemd/system-generators/systemd-fstab-generator")


@pytest.mark.skipif(not GENERATOR.exists(), reason="needs systemd (its generator for fstab)")
@pytest.mark.parametrize(
    ("layers", "missing"),
    [
        ("gone cowfs store={}/store", "{}/gone"),
        ("lower cowfs store={}/none.bs", "{}/none.bs"),
        ("lower cowfs store=UUID=1-2", "UUID=1-2"),
        ("lower cowfs store=/dev/none1", "/dev/none1"),
    ],
)
def test_nofail_is_silent_if_a_layer_is_missing(base: Path, layers: str, missing: str) -> None:
    """mount(8) does the same if a device is missing. Other failures are still reported."""
    lower, type_, store = layers.format(base).split()
    line = f"{base}/{lower} {base}/mnt {type_} {store}"
    said = with_helpers(
        base,
        """
        mount -a 2>&1
        test -z "$(ls mnt)"
        sed s/,nofail// fstab >without; cat without >/etc/fstab
        mount -a 2>&1 || echo "code $?"
        """,
        fstab=f"{line},nofail 0 0\n",
    )
    assert said.startswith(f"cowfs: {missing.format(base)}: no such ") and said.endswith("code 32\n"), said


def test_nofail_hides_no_other_failure(base: Path) -> None:
    (base / "store").mkdir()
    (base / "store/file").touch()
    said = with_helpers(
        base,
        "mount -a 2>&1 || echo code $?",
        fstab=f"{base}/lower {base}/mnt cowfs store={base}/store,nofail 0 0\n",
    )
    assert said.startswith(f"cowfs: {base}/store: ") and said.endswith("code 32\n"), said


@pytest.mark.skipif(not GENERATOR.exists(), reason="needs systemd (its generator for fstab)")
def test_systemd_makes_units_of_the_line(tmp_path: Path) -> None:
    """An automount, a mount that does not stop the boot, and what it waits for."""
    units = tmp_path / "units"
    units.mkdir()
    options = "store=/srv/store.bs,nofail,_netdev,x-systemd.automount,x-systemd.requires=srv.mount"
    (tmp_path / "fstab").write_text(f"/srv/root.sqsh /mnt/system cowfs {options} 0 0\n")
    run("env", f"SYSTEMD_FSTAB={tmp_path}/fstab", GENERATOR, units, units, units)
    unit = (units / "mnt-system.mount").read_text()
    assert f"What=/srv/root.sqsh\nWhere=/mnt/system\nType=cowfs\nOptions={options}\n" in unit
    assert "Requires=srv.mount\n" in unit
    assert (units / "mnt-system.automount").exists()
    assert (units / "remote-fs.target.wants/mnt-system.automount").exists() or (
        units / "remote-fs.target.requires/mnt-system.automount"
    ).exists()
