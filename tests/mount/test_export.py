"""`cowfs export`: stacked on the root, unpacked over it or applied to it, it shows the tree again."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import socket
import tarfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from shutil import which

import pytest

from tests.support.mounts import COWFS, cowfs, mounted, project_root
from tests.support.system import as_nobody_prefix, needs_fuse, needs_root, run
from tests.support.tree import Snapshot, differences, snapshot

DEV_FUSE_AT_NIGHT = True

pytestmark = needs_fuse

MAKE = r"""
mkdir -p lower/etc lower/usr/lib lower/usr/share/x lower/old lower/gone/sub lower/z1/d lower/z2
mkdir -p lower/touched lower/dirtofile/out lower/opq; cd lower
seq 1 20 >etc/fstab; echo localhost >etc/hosts; echo tool >usr/tool; echo so >usr/lib/so
echo a >usr/share/x/a; echo f >old/f; echo one >first; ln first second; echo 1 >linkme
echo s >gone/sub/f; echo f >gone/g
echo 1 >z1/one; echo x >z1/d/x; echo y >z1/d/y; echo 2 >z2/two; echo f >filetodir
echo q >dirtofile/q; echo o >dirtofile/out/o
head -c 300000 /dev/urandom >big; echo r >renamed; echo 1 >opq/1; echo 2 >opq/2; ln -s hosts etc/link
mkfifo pipe; ln pipe pipe2; ln -s hosts sl; ln sl sl2
touch -d 2020-01-01 etc/* usr/* first
"""
CHANGE = r"""
sed -i 's/^7$/seven/' etc/fstab; rm etc/hosts; mkdir -p etc/new/empty; echo n >etc/new/file
mv usr bin; rm bin/tool; echo more >>bin/lib/so; mv bin/share/x/a bin/a
rm -r old gone opq; echo now >old; mkdir opq; echo 3 >opq/3; echo two >>second; ln linkme linked
mv z1 z3; mv z2 z1; mv z3 z2; rm z2/d/x
rm filetodir; mkdir filetodir; echo in >filetodir/in
mv dirtofile/out out; rm -r dirtofile; echo f >dirtofile
chmod 600 big; mv renamed named; touch -d '2001-01-01 00:00:00.123456789' touched
touch "$(printf 'new\nline')" "$(printf 'bad\377name')" '#new' ';new'; ln -s nowhere dangling
mkfifo fifo; chmod 640 pipe; ln sl sl3; ln pipe2 etc/pipe
truncate -s 1M sparse; printf x | dd of=sparse bs=1 seek=700000 conv=notrunc status=none
setfattr -n user.x -v 0x00ff0a3d etc/fstab
long=$(printf 'n%.0s' $(seq 200)); mkdir -p $long/$long; echo long >$long/$long/$long
if [ "$(id -u)" = 0 ]; then
    mknod null c 1 3; chown 3000000:34 fifo; setfattr -n trusted.t -v 1 etc/fstab
    setfattr -n security.capability -v 0x0100000200200000000000000000000000000000 bin/a
fi
"""
NOT_EXACT = "times rounded to seconds"


@dataclass
class Work:
    """A store, and what its merged tree was."""

    made: Path
    """The directory of the store and the lower."""
    top: Path
    """For what a test makes."""
    tree: Snapshot
    mounted: dict[str, bytes]
    """The export that was made while the store was mounted."""

    @property
    def store(self) -> Path:
        return self.made / "store.bs"

    @property
    def lower(self) -> Path:
        return self.made / "lower"

    def export(self, form: str, name: str, *options: str) -> Path:
        """Export the store; what comes out must lose nothing but fractions of seconds."""
        done = cowfs("export", self.store, "--to", form, self.top / name, *options)
        assert done.returncode == 0, done.stderr
        assert all(NOT_EXACT in line for line in done.stderr.splitlines()), done.stderr
        return self.top / name

    def copy(self, name: str) -> Path:
        run("cp", "-a", self.lower, self.top / name)
        return self.top / name


def seen(top: Path, *, seconds: bool = False, times: bool = True) -> Snapshot:
    """Return what two trees must have in common."""
    found = snapshot(top)
    for facts in found.values():
        for key in ("ino", "same_dev", "d_ino", *(() if times else ("mtime",))):
            facts.pop(key, None)
        if facts["type"] == "dir":  # the kernel has one number for inodes of two layers
            facts.pop("same_inode_as", None)
            facts.pop("nlink")
    for facts in found.values():
        others = [path for path in facts.pop("same_inode_as", ()) if found[path].get("nlink", 1) > 1]
        facts |= {"links": others} if facts.get("nlink", 1) > 1 else {}
    return in_seconds(found) if seconds else found


def in_seconds(tree: Snapshot) -> Snapshot:
    return {path: {**facts, "mtime": facts["mtime"] // 10**9} for path, facts in tree.items()}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Work:
    top = tmp_path_factory.mktemp("export")
    script(MAKE, top)
    cowfs("create", top / "store.bs", "32", check=True)
    with mounted(top / "lower", top / "mnt", top / "store.bs") as here:
        script(CHANGE, here.path)
        made = Work(top, top, seen(here.path), {})
        for form in ("tar", "rsync"):
            done = cowfs("export", here.path, "--to", form, top / f"mounted.{form}")
            assert (done.returncode, done.stderr) == (0, "")
            made.mounted[form] = (top / f"mounted.{form}").read_bytes()
    return made


@pytest.fixture
def work(shared: Work, tmp_path: Path) -> Work:
    return replace(shared, top=tmp_path)


def script(text: str, directory: Path, nobody: bool = False) -> None:
    run(*(as_nobody_prefix() if nobody else []), "sh", "-euc", f'cd "$1"\n{text}', "sh", directory)


@needs_root
def test_a_squashfs_stacked_on_the_root_shows_the_tree(work: Work) -> None:
    if which("tar2sqfs") is None:
        pytest.skip("squashfs-tools-ng is not installed")
    module = work.export("squashfs", "module.sqfs", "--compression", "zstd")
    layer, merged = work.top / "layer", work.top / "merged"
    layer.mkdir()
    merged.mkdir()
    run("mount", "-o", "loop,ro", module, layer)
    try:
        run("mount", "-t", "overlay", "o", "-o", f"lowerdir={layer}:{work.lower}", merged)
        try:
            assert differences(in_seconds(work.tree), seen(merged, seconds=True)) == []
        finally:
            run("umount", merged)
    finally:
        run("umount", layer)
    with mounted([module, work.lower], work.top / "again", work.top / "fresh") as here:
        assert differences(in_seconds(work.tree), seen(here.path, seconds=True)) == []


@needs_root
def test_a_plain_upper_shows_the_tree_to_the_kernel(work: Work) -> None:
    upper = work.export("overlayfs", "upper")
    for name in ("work", "kernel"):
        (work.top / name).mkdir()
    options = f"lowerdir={work.lower},upperdir={upper},workdir={work.top / 'work'}"
    run("mount", "-t", "overlay", "o", "-o", options, work.top / "kernel")
    try:
        assert differences(work.tree, seen(work.top / "kernel")) == []
    finally:
        run("umount", work.top / "kernel")


def test_an_archive_unpacked_over_the_root_gives_the_tree(work: Work) -> None:
    archive = work.export("tar", "list.tar", "--whiteouts", "list")
    copy = work.copy("unpacked")
    script(f"xargs -0a {archive}.deleted rm -rf --; tar --xattrs --xattrs-include='*' -xpf {archive}", copy)
    assert differences(work.tree, seen(copy)) == []
    with tarfile.open(archive) as read:  # and Python understands it, too
        assert read.getmember("sparse").size == 1 << 20
        assert read.getmember("linkme").linkname == "linked" or read.getmember("linked").islnk()
        data = read.extractfile("sparse")
        assert data is not None
        assert data.read() == (copy / "sparse").read_bytes()


def test_the_whole_tree_in_an_archive(work: Work) -> None:
    archive = work.export("tar", "whole.tar", "--merged")
    (work.top / "whole").mkdir()
    run("tar", "--xattrs", "--xattrs-include=*", "-xpf", archive, "-C", work.top / "whole")
    assert differences(work.tree, seen(work.top / "whole")) == []


def test_an_image_is_a_layout_of_blobs_with_their_digests(work: Work) -> None:
    image = work.export("oci", "image")
    index = json.loads((image / "index.json").read_text())
    blobs = {path.name: path.read_bytes() for path in (image / "blobs/sha256").iterdir()}
    assert all(hashlib.sha256(data).hexdigest() == name for name, data in blobs.items())

    def blob(descriptor: dict[str, object]) -> bytes:
        data = blobs[str(descriptor["digest"]).removeprefix("sha256:")]
        assert len(data) == descriptor["size"]
        return data

    manifest = json.loads(blob(index["manifests"][0]))
    (layer,) = manifest["layers"]
    config = json.loads(blob(manifest["config"]))
    archive = gzip.decompress(blob(layer))
    assert config["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(archive).hexdigest()}"]
    assert {"etc/.wh.hosts", ".wh.gone", "z1/.wh.one", "opq/.wh.1"} <= set(
        _names(work.top / "a.tar", archive)
    )


def _names(place: Path, archive: bytes) -> list[str]:
    place.write_bytes(archive)
    with tarfile.open(place) as read:
        return read.getnames()


@pytest.mark.nightly
def test_a_container_of_the_image_on_its_base_has_the_tree(work: Work) -> None:
    """umoci unpacks, and skopeo copies, what is put on an image of the lower."""
    if which("umoci") is None or which("skopeo") is None:
        pytest.skip("umoci and skopeo are not installed")
    cowfs("create", work.top / "empty.bs", "16", check=True)
    base = work.top / "base"
    given = ("--lower", str(work.lower), "--merged", "--to", "oci", str(base))
    cowfs("export", str(work.top / "empty.bs"), *given, check=True)
    image = work.export("oci", "on-base", "--base", f"{base}:latest")
    run("skopeo", "copy", f"oci:{image}:latest", f"dir:{work.top / 'copied'}")
    run("umoci", "unpack", "--image", f"{image}:latest", work.top / "bundle")
    assert differences(work.tree, seen(work.top / "bundle/rootfs")) == []


def test_whiteouts_of_aufs(work: Work) -> None:
    if which("tar2sqfs") is None:
        pytest.skip("squashfs-tools-ng is not installed")
    module = work.export("squashfs", "module.sb", "--whiteouts", "aufs")
    lines = run("unsquashfs", "-ll", module).stdout.splitlines()
    whiteouts = [line for line in lines if ".wh." in line]
    names = {line.partition("squashfs-root/")[2] for line in whiteouts}
    assert names == {
        *(".wh.gone", ".wh.renamed", ".wh.usr", "etc/.wh.hosts", "opq/.wh.1", "opq/.wh.2"),
        *("z1/.wh.d", "z1/.wh.one", "z2/.wh.two"),
    }
    assert all(line.startswith("-r--r--r-- root/root ") for line in whiteouts)
    assert not any(line.startswith("c") and "0,  0" in line for line in lines)


def test_a_patch_is_applied_by_git(work: Work) -> None:
    done = cowfs("export", work.store, "--to", "patch", work.top / "changes.patch")
    assert done.returncode == 64
    said = {line.partition("changes.patch: ")[2].partition(": ")[0] for line in done.stderr.splitlines()}
    assert said == {
        "devices, FIFOs and sockets left out",
        "empty directories left out",
        "extended attributes and ACLs left out",
        "modes other than 644 and 755 left out",
    }
    copy = work.copy("patched")
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(copy)}
    run("git", "apply", work.top / "changes.patch", cwd=copy, env=env)
    assert (copy / "bin/lib/so").read_text() == "so\nmore\n"
    assert not (copy / "usr").exists() and not (copy / "etc/hosts").exists()


def test_a_directory_that_git_removes_is_told(tmp_path: Path) -> None:
    """git removes each directory whose last file a patch deletes or renames."""
    for name in ("a/b/c", "d/e", "f", "g/h"):
        (tmp_path / "lower" / name).mkdir(parents=True)
        (tmp_path / "lower" / name / "x").write_text("x")
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        script("mv a/b/c c; rm d/e/x f/x; touch f/y; rm -r g/h", here.path)
    done = cowfs("export", tmp_path / "store", "--to", "patch", tmp_path / "p")
    assert "p: empty directories left out: 5 (a, a/b, d, …)\n" in done.stderr
    run("git", "apply", tmp_path / "p", cwd=tmp_path / "lower", env={**os.environ, "GIT_DIR": "/none"})
    assert sorted(os.listdir(tmp_path / "lower")) == ["c", "f"]


def test_the_same_bytes_of_a_mount_and_of_its_store(work: Work) -> None:
    for form, data in work.mounted.items():
        assert work.export(form, f"unmounted.{form}").read_bytes() == data


def test_no_time_is_later_than_SOURCE_DATE_EPOCH(work: Work) -> None:
    env = {"SOURCE_DATE_EPOCH": "1000000000"}
    done = cowfs("export", work.store, "--to", "tar", work.top / "dated.tar", env=env)
    assert "later than SOURCE_DATE_EPOCH" in done.stderr
    with tarfile.open(work.top / "dated.tar") as read:
        assert max(member.mtime for member in read) == 1_000_000_000


def test_checkpoints_several_lowers_and_what_only_cowfs_can_store(work: Work) -> None:
    """Devices 0:0 are notes on files, and one name of a hard link is in a layer that was kept."""
    top, store = work.top, work.top / "kept"
    script("mkdir -p above/etc above/old; echo above >above/etc/fstab; echo z >above/old/z", top)
    lowers = [top / "above", work.lower]
    with mounted(lowers, top / "tree", store) as here:
        script("ln linkme linked; mv usr bin; rm z1/one", here.path)
        if os.geteuid() == 0:
            script("mknod zero c 0 0", here.path)
        cowfs("checkpoint", here.path, "one", check=True)
        script("mv bin/lib z1/lib; rm -r z2; ln second third; chmod 711 opq; mv opq opened", here.path)
        tree = seen(here.path)
        done = cowfs("export", here.path, "--to", "tar", "--whiteouts", "list", top / "mounted.tar")
        assert (done.returncode, done.stderr) == (0, "")
    done = cowfs("export", store, "--to", "tar", "--whiteouts", "list", top / "kept.tar")
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("tar", "tar.deleted"):
        assert (top / f"kept.{name}").read_bytes() == (top / f"mounted.{name}").read_bytes()
    with mounted(lowers, top / "plain", top / "nothing") as here:
        run("cp", "-a", here.path, top / "copy")
    script("xargs -0a ../kept.tar.deleted rm -rf --; tar --xattrs -xpf ../kept.tar", top / "copy")
    assert differences(tree, seen(top / "copy")) == []


@needs_root
def test_an_overlay_in_the_tree_is_not_taken_for_the_layer(tmp_path: Path) -> None:
    """The upper of a container in the tree has attributes of overlayfs itself."""
    if which("tar2sqfs") is None:
        pytest.skip("squashfs-tools-ng is not installed")
    script("mkdir -p lower/upper; echo f >lower/upper/f", tmp_path)
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        os.setxattr(here.path / "upper", "trusted.overlay.opaque", b"y")
    module, image = tmp_path / "module.sqfs", tmp_path / "root.sqfs"
    cowfs("export", tmp_path / "store", "--to", "squashfs", module)
    cowfs("export", tmp_path / "store", "--to", "squashfs", "--merged", image)
    for lowers in ([module, tmp_path / "lower"], [image]):
        with mounted(lowers, tmp_path / "mnt", tmp_path / f"fresh{len(lowers)}") as here:
            assert os.listdir(here.path / "upper") == ["f"]
            if len(lowers) == 2:
                assert os.getxattr(here.path / "upper", "trusted.overlay.opaque") == b"y"


def _change(random: Random, top: Path) -> None:
    """Do one thing in a tree, or try to."""
    found = sorted(path for path in top.rglob("*"))
    directories = [top, *(path for path in found if path.is_dir() and not path.is_symlink())]
    fresh = random.choice(directories) / random.choice("abcd")
    old = random.choice([*found, fresh])
    kind = random.randrange(9)
    with suppress(OSError):
        if kind == 0:
            fresh.write_text(str(random.random()))
        elif kind == 1:
            fresh.mkdir()
        elif kind == 2:
            run("rm", "-rf", old)
        elif kind < 6:
            old.rename(fresh)
        elif kind == 6:
            os.link(old, fresh, follow_symlinks=False)
        elif kind == 7:
            os.chmod(old, random.choice([0o700, 0o755]))
            os.utime(old, ns=(5, random.randrange(10**18)))
        else:
            run("rm", "-rf", old)
            old.mkdir() if random.random() < 0.5 else fresh.symlink_to("t")


@needs_root
@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(12))
def test_changes_at_random(tmp_path: Path, seed: int) -> None:
    random = Random(seed)
    lowers = [tmp_path / "above", tmp_path / "below"]
    for lower in lowers:
        lower.mkdir()
        for _ in range(40):
            _change(random, lower)
    store = tmp_path / "store"
    tree: Snapshot = {}
    for number in range(3):
        with mounted(lowers, tmp_path / "mnt", store) as here:
            for _ in range(15):
                _change(random, here.path)
            tree = seen(here.path)
            if random.random() < 0.4:
                cowfs("checkpoint", here.path, f"number{number}", check=True)
            if number == 2:
                cowfs("export", here.path, "--to", "tar", tmp_path / "mounted.tar", check=True)
    cowfs("export", store, "--to", "tar", tmp_path / "store.tar", check=True)
    assert (tmp_path / "store.tar").read_bytes() == (tmp_path / "mounted.tar").read_bytes()
    cowfs("export", store, "--to", "overlayfs", tmp_path / "upper", check=True)
    (tmp_path / "kernel").mkdir()
    below = ":".join(map(str, [tmp_path / "upper", *lowers]))
    run("mount", "-t", "overlay", "o", "-o", f"lowerdir={below}", tmp_path / "kernel")
    try:
        assert differences(tree, seen(tmp_path / "kernel")) == []
    finally:
        run("umount", tmp_path / "kernel")


def test_what_an_archive_does_not_take_from_a_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "lower/a").mkdir(parents=True)
    os.setxattr(tmp_path / "lower/a", "user.t", b"v")
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        os.removexattr(here.path / "a", "user.t")
        to = ("--to", "tar", "--whiteouts", "list")
        done = cowfs("export", here.path, *to, tmp_path / "x.tar")
    assert done.returncode == 64
    assert done.stderr.endswith("directories that keep extended attributes that were removed: 1 (a)\n")


@pytest.mark.nightly
def test_files_of_more_than_8_GiB(tmp_path: Path) -> None:
    (tmp_path / "lower").mkdir()
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        with open(here.path / "large", "wb") as file:
            file.truncate(9 << 30)
            os.pwrite(file.fileno(), b"end", (9 << 30) - 3)
        os.utime(here.path / "large", (5, 5))
    for form in ("tar", "squashfs"):
        cowfs("export", tmp_path / "store", "--to", form, tmp_path / form, check=True, timeout=300)
    with tarfile.open(tmp_path / "tar") as read:
        data = read.extractfile("large")
        assert data is not None
        assert data.seek(-3, os.SEEK_END) == (9 << 30) - 3
        assert data.read() == b"end"
    assert (tmp_path / "tar").stat().st_size < 1 << 20
    assert f" {9 << 30} " in run("unsquashfs", "-ll", tmp_path / "squashfs").stdout
    shown = f"{' '.join(map(str, COWFS))} export {tmp_path / 'store'} --to gnutar - | tar -tv"
    env = {**os.environ, "PYTHONPATH": project_root()}
    assert f" {9 << 30} " in run("sh", "-c", shown, timeout=300, env=env).stdout


@needs_root
@pytest.mark.nightly
def test_where_no_file_is_without_a_name(work: Work) -> None:
    if which("fuse2fs") is None:
        pytest.skip("fuse2fs is not installed")
    disk, place = work.top / "disk.img", work.top / "place"
    place.mkdir()
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    run("mke2fs", "-q", "-F", disk)
    run("fuse2fs", disk, place, "-o", "fakeroot")
    try:
        with pytest.raises(OSError, match="not supported"):
            os.open(place, os.O_TMPFILE | os.O_RDWR)
        archive = work.export("tar", "place/x.tar").read_bytes()
        assert cowfs("export", work.store, "--to", "tar", place / "x.tar").returncode == 1
        work.export("tar", "place/x.tar", "--force")
        assert (place / "x.tar").read_bytes() == archive
        work.export("oci", "place/image")
        assert set(os.listdir(place)) == {"lost+found", "x.tar", "image"}
    finally:
        run("umount", place)


def test_rsync_takes_the_list(work: Work) -> None:
    if which("rsync") is None:
        pytest.skip("rsync is not installed")
    names = work.export("rsync", "names")
    copy = work.copy("synced")
    options = ("-aHAXS", "--from0", f"--files-from={names}", "--delete-missing-args", "--force")
    with mounted(work.lower, work.top / "source", work.store) as here:
        run("rsync", *options, f"{here.path}/", f"{copy}/")
    assert differences(work.tree, seen(copy)) == []


def test_what_a_format_has_no_words_for_is_told(tmp_path: Path) -> None:
    (tmp_path / "lower").mkdir()
    (tmp_path / "lower/sub").mkdir()
    (tmp_path / "lower/sub" / ("n" * 254)).write_text("its whiteout would have too long a name")
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        for number in range(5):
            (here.path / f".wh.{number}").write_text("real")
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(here.path / "socket"))
        os.unlink(here.path / "sub" / ("n" * 254))
        (here.path / "empty").touch()
        os.setxattr(here.path / "empty", "user.x", b"")
        os.setxattr(here.path / "empty", "user.y", b"y")
        done = cowfs("export", here.path, "--to", "oci", tmp_path / "image")
        inside = cowfs("export", here.path, "--to", "tar", here.path / "in.tar")
    assert done.returncode == 64
    lines = [line.partition(f"{tmp_path / 'image'}: ")[2] for line in done.stderr.splitlines()]
    assert lines == [
        "left out, because the name would be taken for a whiteout: 5 (.wh.0, .wh.1, .wh.2, …)",
        "files without their empty extended attributes: 1 (empty)",
        "sockets left out: 1 (socket)",
        f"deletions left out: the name of the whiteout would be too long: 1 (sub/{'n' * 254})",
    ]
    assert (inside.returncode, "is inside the mount" in inside.stderr) == (1, True)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--to", "zip", "x"], "--to zip: no such format (known: squashfs, tar"),
        (["--to", "tar", "--whiteouts", "foo", "x"], "--whiteouts foo: not with --to tar (known: oci, aufs"),
        (["--to", "patch", "--merged", "x"], "--merged: not with --to patch"),
        (["--to", "tar", "there"], "there: already exists (give another name, or --force to replace it)"),
        (["--to", "tar", "directory", "-f"], "directory: exists, but is not a regular file"),
        (["--to", "oci", "directory", "-f"], "directory: is not empty"),
        (["--to", "tar", "no/where"], "no/where: No such file or directory"),
        (["--to", "oci", "-"], "-: oci is a directory"),
        (["--to", "tar", "--compression", "xz", "x"], "--compression: only with --to squashfs"),
        (["--to", "tar", "--tag", "mine", "x"], "--tag: only with --to oci"),
        (["--to", "oci", "--tag", "Bad Tag", "x"], "--tag Bad Tag: not a name for an image"),
        (["--to", "oci", "--tag", "a..b", "x"], "--tag a..b: not a name for an image"),
        (["--to", "tar", "none/x"], "none/x: No such file or directory (there is no directory none: mkdir"),
        (["--to", "squashfs", "-"], "-: squashfs cannot go to standard output"),
        (["--to", "squashfs", "--compression", "rar", "x"], "--compression rar: unknown"),
        (["--to", "oci", "--base", "directory", "x"], "--base directory: index.json: No such file"),
        (
            ["--to", "oci", "--base", "broken", "x"],
            "--base broken: index.json: not JSON (give the directory of",
        ),
        (["--to", "oci", "--base", "list", "x"], "--base list: not a valid image (give the directory of"),
        (["--to", "tar", "--base", "directory", "x"], "--base: only with --to oci or iso"),
        pytest.param(
            *(["--to", "iso", "--base", "there", "x"], "--base there: not an ISO image"),
            marks=pytest.mark.skipif(which("xorriso") is None, reason="xorriso is not installed"),
        ),
    ],
)
def test_what_is_refused_is_refused_in_one_line(work: Work, options: list[str], why: str) -> None:
    (work.top / "there").touch()
    (work.top / "directory/sub").mkdir(parents=True, exist_ok=True)
    for name, index in (("broken", "{"), ("list", "[]")):
        (work.top / name).mkdir(exist_ok=True)
        (work.top / name / "index.json").write_text(index)
    before = set(os.listdir(work.top))
    done = cowfs("export", work.store, *options, cwd=str(work.top))
    assert done.returncode in {1, 2} and done.stderr.count("\n") == 1
    assert why in done.stderr
    assert set(os.listdir(work.top)) == before
