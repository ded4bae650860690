"""Stores of other live systems: adopted where they are overlayfs, else named, with what to do."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from cowfs.store.format.foreign import pair_in
from tests.mount.test_export import script
from tests.support.mounts import cowfs, force_umount, mounted
from tests.support.system import needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True

pytestmark = [needs_fuse, needs_root]

PAIRS = {
    "archiso": ("upperdir", "workdir", ""),
    "debian": ("rw", "work", "# all of it\n/ union\n"),
    "debian-more": ("rw", "work", "/home bind\n/ union\n/etc link,source=config/etc\n"),
    "debian-source": ("all/rw", "all/work", "/home bind\n/ union,source=all\n/srv union,source=all/srv\n"),
    "minios": ("changes", "workdir", ""),
    "fedora": ("overlay-F41-0123-4567", "ovlwork", ""),
    "fedora-image": ("overlayfs", "ovlwork", ""),
    "opensuse": ("rw", "work", ""),
    "container": ("diff", "work", ""),
}


def kernel_mount(lower: Path, upper: Path, work: Path, mnt: Path) -> None:
    options = f"lowerdir={lower},upperdir={upper},workdir={work},redirect_dir=on,metacopy=on,index=on"
    run("mount", "-t", "overlay", "overlay", "-o", options, mnt)


@pytest.mark.parametrize(
    "kind",
    [
        *("fedora", "debian-more", "container"),
        *(
            pytest.param(k, marks=pytest.mark.nightly)
            for k in sorted(PAIRS.keys() - {"fedora", "debian-more", "container"})
        ),
    ],
)
def test_a_pair_is_adopted_and_goes_back(tmp_path: Path, kind: str) -> None:
    upper, work, configuration = PAIRS[kind]
    place, lower, mnt = tmp_path / "place", tmp_path / "lower", tmp_path / "mnt"
    script(
        "mkdir -p lower/d mnt; echo a >lower/a; echo b >lower/b; echo x >lower/d/x; ln lower/b lower/c",
        tmp_path,
    )
    beside = {"debian-more": ("home", "config/etc"), "debian-source": ("home", "all/srv/rw")}
    for name in (upper, work, *beside.get(kind, ())):
        (place / name).mkdir(parents=True)
    if kind == "container":
        (place / "link").write_text("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        (place / "lower").write_text("l/ZYXWVUTSRQPONMLKJIHGFEDCBA")
    if configuration:
        (place / "persistence.conf").write_text(configuration)
    kernel_mount(lower, place / upper, place / work, mnt)
    try:
        script("rm a; mv d e; echo more >>b; chmod 700 e/x", mnt)
    finally:
        force_umount(mnt)
    with mounted(lower, mnt, place):
        assert sorted(os.listdir(mnt)) == ["b", "c", "e"]
        assert (mnt / "c").read_text() == "b\nmore\n"
        assert (mnt / "e/x").stat().st_mode & 0o777 == 0o700
        script("echo y >e/y; rm c; mkdir new", mnt)
        assert cowfs("checkpoint", mnt, "one").returncode == 1
        assert "MOVED" not in cowfs("info", mnt).stdout
    assert cowfs("check", place, check=True).stdout == f"{place}: clean\n"
    assert "\nformat:" in cowfs("info", place, check=True).stdout
    assert (
        f"upperdir={Path(upper).name},workdir={Path(work).name},"
        in cowfs("info", place, "--kernel", check=True).stdout
    )
    told = cowfs("diff", place)
    assert (told.returncode, "R  d/ -> e/" in told.stdout, "A  new/" in told.stdout) == (0, True, True)
    for refused in (
        cowfs("rebase", place, "--onto", lower),
        cowfs("backup", place, tmp_path / "copy"),
        cowfs("convert", place, "--to", "aufs"),
    ):
        assert (refused.returncode, "another" in refused.stderr) == (32, True)
    kernel_mount(lower, place / upper, place / work, mnt)
    try:
        assert sorted(os.listdir(mnt)) == ["b", "e", "new"]
        assert (mnt / "e/y").read_text() == "y\n"
    finally:
        force_umount(mnt)


def test_what_cannot_be_adopted_is_named(tmp_path: Path) -> None:
    (tmp_path / "lower").mkdir()

    def refused(store: Path) -> str:
        done = cowfs("mount", tmp_path / "lower", tmp_path / "mnt", "--store", store)
        assert (done.returncode, done.stderr.count("\n")) == (32, 1)
        return done.stderr

    (tmp_path / "mnt").mkdir()
    cow = tmp_path / "cow/persistent_ARCH/x86_64"
    for name in ("upperdir", "workdir"):
        (cow / name).mkdir(parents=True)
    assert f"holds archiso's cowspace (give {cow} as the store)" in refused(tmp_path / "cow")
    (tmp_path / "slax/changes/.wh..wh.plnk").mkdir(parents=True)
    assert f"(give {tmp_path}/slax/changes as the store)" in refused(tmp_path / "slax")
    stick, live = tmp_path / "stick", tmp_path / "stick/LiveOS"
    (live / "overlay-F41-0123").mkdir(parents=True)
    (live / "ovlwork").mkdir()
    assert f"holds the overlay of a Fedora live system (give {live} as the store)" in refused(stick)
    (tmp_path / "snapshot").write_bytes(b"SnAp\1\0\0\0\1\0\0\0\x08\0\0\0" + bytes(4096))
    assert "a device-mapper snapshot, as live systems of Fedora make it (it" in refused(tmp_path / "snapshot")
    (tmp_path / "fat").mkdir()
    (tmp_path / "fat/changes.dat.0").write_bytes(b"DynfilefsFS 4.00 (c)" + bytes(4096))
    for what in (tmp_path / "fat/changes.dat.0", tmp_path / "fat"):
        assert "a container of DynFileFS, as Slax and MiniOS make it (dynfilefs -f " in refused(what)
    for name in ("upper", "work", "install-logs-2023-01-02.0"):
        (tmp_path / "casper" / name).mkdir(parents=True)
    told = "an overlayfs pair, and install-logs-2023-01-02.0 beside it (cowfs overlay -o upperdir=upper,"
    assert told in refused(tmp_path / "casper")
    home = tmp_path / "home"
    (home / "rw").mkdir(parents=True)
    (home / "work").mkdir()
    (home / "persistence.conf").write_text("/home union\n")
    assert "not of the whole root" in refused(home)
    (home / "persistence.conf").write_text("/ union,source=../elsewhere\n")
    assert "leads out of it" in refused(home)
    new = tmp_path / "new"
    new.mkdir()
    (new / "persistence.conf").write_text("/ union,source=live\n")
    assert f"{new}/live: No such file or directory" in refused(new)
    (new / "persistence.conf").write_text("/ union\n")
    assert f"without changes yet (to use it as a store: mkdir {new}/rw {new}/work)" in refused(new)
    layers = tmp_path / "overlay"
    layer = layers / "0123/diff/d"
    for each in (layer, layers / "0123/work"):
        each.mkdir(parents=True)
    (layers / "0123/link").write_text("ABC")
    assert f"holds the layer of a container (give {layers}/0123 as the store)" in refused(layers)
    (layer / ".wh.gone").touch()
    told = f"{layer}/.wh.gone: a whiteout by name, as fuse-overlayfs writes it (use it as a lower: "
    assert told + f"cowfs mount {layer.parent}:LOWER DIR -o whiteouts=auto" in refused(layers / "0123")
    os.setxattr(layer.parent, "user.fuseoverlayfs.override_stat", b"0:0:40755")
    assert "(user.fuseoverlayfs.override_stat), which cowfs does not read (" in refused(layer.parent)
    image = tmp_path / "persistence"
    (home / "persistence.conf").write_text("/ union\n")
    with open(image, "wb") as file:
        file.truncate(16 << 20)
    run("mke2fs", "-q", "-t", "ext3", "-d", home, image)
    assert "or the overlay of openSUSE, in an image (mount it (mount -o loop" in refused(image)
    run("mke2fs", "-q", "-F", "-t", "ext4", image)
    assert "an ext4 filesystem" in refused(image)
    image.write_bytes(b"LUKS\xba\xbe\0\2" + bytes(1 << 20))
    key = tmp_path / "key"
    key.write_text("key")
    damaged = cowfs("mount", tmp_path / "lower", tmp_path / "mnt", "--store", image, "--key-file", key)
    # Without a device mapper, or cryptsetup, it does not come to looking at it.
    assert (damaged.returncode in {2, 32}, damaged.stderr.count("\n")) == (True, 1)
    assert re.search("encrypted|LUKS|cryptsetup", damaged.stderr)
    shutil.rmtree(tmp_path / "cow")


def test_the_upper_of_fedora_alone_names_the_work_dir_beside_it(tmp_path: Path) -> None:
    upper, work = tmp_path / "overlay-F41-0123-4567", tmp_path / "ovlwork"
    upper.mkdir()
    assert pair_in(str(upper)) is None
    work.mkdir()
    assert pair_in(str(upper)) == (str(upper), str(work))
