"""`cowfs lower`: modules that come and go while a tree is in use, and a store that does not need them."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.mount.test_diff_patch import script
from tests.mount.test_revert import tree, without_directory_times
from tests.support.mounts import cowfs, mounted
from tests.support.squashfs import mksquashfs
from tests.support.system import as_nobody_prefix, needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True

pytestmark = needs_fuse

MAKE = r"""
mkdir -p lower/etc lower/usr/bin lower/srv/deep lower/covered/in
mkdir -p module/etc module/usr/bin module/opt/p module/srv/deep
cd lower; echo root >etc/conf; echo a >usr/bin/a; echo old >file; echo f >covered/in/f; echo d >srv/deep/d
head -c 200000 /dev/urandom >big; head -c 200000 /dev/urandom >other; cd ../module
echo module >etc/conf; echo b >usr/bin/b; ln usr/bin/b usr/bin/c; echo x >opt/p/x; echo new >file
echo file >covered
head -c 300000 /dev/urandom >opt/p/large; echo shorter >big; echo m >srv/deep/m; echo gone >gone
"""


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, Path]:
    script(MAKE, tmp_path)
    return tuple(mksquashfs(tmp_path / f"{name}.sb", tmp_path / name) for name in ("lower", "module"))  # type: ignore[return-value]


def lower(what: str, mountpoint: Path, image: Path) -> str:
    """Do it, and return what was said."""
    done = cowfs("lower", what, mountpoint, image)
    assert done.returncode == 0, done.stderr
    return done.stderr + done.stdout


def refused(*words: str | Path) -> str:
    done = cowfs(*words)
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    return done.stderr


def names(top: Path) -> set[str]:
    return {
        os.path.relpath(Path(here, name), top)
        for here, below, files in os.walk(top)
        for name in (*below, *files)
    }


def facts(mountpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(cowfs("info", mountpoint, "--json", check=True).stdout)
    return found


def test_a_module_comes_and_goes(tmp_path: Path, images: tuple[Path, Path]) -> None:
    root, module = images
    with mounted(root, tmp_path / "mnt", tmp_path / "store") as here:
        mnt = here.path
        before = tree(mnt)
        numbers = {path: (mnt / path).stat().st_ino for path in ("etc", "usr/bin", "srv", "etc/conf")}
        assert not (mnt / "opt").exists()  # the kernel remembers that
        with open(mnt / "file") as covered, open(mnt / "covered/in/f") as deep:
            lower("add", mnt, module)
            assert covered.read() == "old\n"
            assert deep.read() == "f\n"
            assert (mnt / "file").read_text() == "new\n"
            assert (mnt / "etc/conf").read_text() == "module\n"
            assert {"opt/p/x", "usr/bin/a", "usr/bin/b", "srv/deep/d", "srv/deep/m"} <= names(mnt)
            assert (mnt / "covered").read_text() == "file\n"
            assert [(mnt / path).stat().st_ino for path in numbers if path != "etc/conf"] == list(
                numbers.values()
            )[:3]
            assert [known["path"] for known in facts(mnt)["modules"]] == [str(module)]
            with open(mnt / "opt/p/x") as left:
                said = lower("remove", mnt, module)
                assert "closed when 1 file or directory in it is no longer in use" in said
                assert left.read() == "x\n"
            covered.seek(0)
            assert covered.read() == "old\n"
            assert {path: (mnt / path).stat().st_ino for path in numbers} == numbers
        assert tree(mnt) == before
        assert not facts(mnt)["modules"]


def test_the_store_comes_before_modules(tmp_path: Path, images: tuple[Path, Path]) -> None:
    """Changes and deletions stay, and data never comes from a module that was added later."""
    root, module = images
    with mounted(root, tmp_path / "mnt", tmp_path / "store") as here:
        mnt = here.path
        (mnt / "big").chmod(0o600)  # a metacopy, whose data is in the lower
        (mnt / "file").unlink()
        (mnt / "srv").rename(mnt / "moved")
        (mnt / "usr/bin/b").write_text("mine\n")
        (mnt / "opt").write_text("a file\n")
        subprocess.run(["sh", "-c", "rm -r etc; mkdir etc; echo mine >etc/mine"], cwd=mnt, check=True)
        before = tree(mnt)
        lower("add", mnt, module)
        after = tree(mnt)
        assert {path for path in after if path not in before} == {"gone", "usr/bin/c"}
        hidden = {"covered/in", "covered/in/f", "covered/in/."}  # by a file of the module
        assert hidden - after.keys() == hidden
        changed = {path for path in before.keys() - hidden if after.get(path) != before[path]}
        assert changed <= {".", "covered", "covered/.", "usr", "usr/.", "usr/bin/."}
        assert (mnt / "big").read_bytes() == (tmp_path / "lower/big").read_bytes()
    with mounted([module, root], tmp_path / "mnt", tmp_path / "store") as here:
        assert tree(here.path) == after
        lower("remove", here.path, module)
        assert tree(here.path) == before


def test_what_was_changed_of_a_module_stays(tmp_path: Path, images: tuple[Path, Path]) -> None:
    """The copies are whole: the module may go, and come back."""
    root, module = images
    with mounted(root, tmp_path / "mnt", tmp_path / "store") as here:
        mnt = here.path
        lower("add", mnt, module)
        (mnt / "opt/p/large").chmod(0o640)
        with open(mnt / "usr/bin/b", "a") as stream:
            stream.write("more\n")
        assert (mnt / "usr/bin/c").read_text() == "b\n"
        with pytest.raises(OSError, match=os.strerror(errno.EXDEV)):
            (mnt / "opt").rename(mnt / "opt2")
        subprocess.run(["mv", mnt / "opt/p", mnt / "p"], check=True)
        (mnt / "gone").unlink()
        whole = tree(mnt)
        said = cowfs("diff", mnt, check=True).stdout
        assert "A  p/large" in said
        assert "A  usr/bin/b" in said
        lower("remove", mnt, module)
        assert (mnt / "p/large").read_bytes() == (tmp_path / "module/opt/p/large").read_bytes()
        assert (mnt / "usr/bin/b").read_text() == "b\nmore\n"
        assert not (mnt / "usr/bin/c").exists()
        alone = tree(mnt)
        lower("add", mnt, module)
        assert tree(mnt) == whole
    with mounted(root, tmp_path / "mnt", tmp_path / "store") as here:
        assert tree(here.path) == alone
    with mounted([module, root], tmp_path / "mnt", tmp_path / "store") as here:
        assert tree(here.path) == whole
    assert cowfs("check", tmp_path / "store").returncode == 0


def test_what_is_refused(tmp_path: Path, images: tuple[Path, Path]) -> None:
    root, module = images
    with mounted(root, tmp_path / "mnt", tmp_path / "store") as here:
        mnt = here.path
        assert "is a lower of this mount already" in refused("lower", "add", mnt, root)
        assert "is a lower that the store belongs to" in refused("lower", "remove", mnt, root)
        assert "is not a module of this mount" in refused("lower", "remove", mnt, module)
        assert "No such file" in refused("lower", "add", mnt, tmp_path / "none.sb")
        assert "not a squashfs image in a file" in refused("lower", "add", mnt, tmp_path / "module")
        (tmp_path / "text").write_text("text\n" * 100)
        assert "squashfs" in refused("lower", "add", mnt, tmp_path / "text")
        (mnt / "inside.sb").write_bytes(module.read_bytes())
        program = Path("/bin/true").read_bytes()
        (tmp_path / "app").write_bytes(program + module.read_bytes())
        (tmp_path / "disk").write_bytes(bytes(1 << 20) + module.read_bytes())
        told = refused("lower", "add", mnt, tmp_path / "app")
        assert f"copy it out: tail -c +{len(program) + 1} FILE" in told and "offset=" not in told
        assert "copy it out: tail -c +OFFSET+1 FILE" in refused("lower", "add", mnt, tmp_path / "disk")
        assert "in the mount itself" in refused("lower", "add", mnt, mnt / "inside.sb")
        assert "not a cowfs mountpoint" in refused("lower", "add", tmp_path, module)
        (mnt / "inside.sb").unlink()
        lower("add", mnt, module)
        assert "is a lower of this mount already" in refused("lower", "add", mnt, module)
        assert "a store cannot depend" in refused("revert", mnt, "file")
        assert "a store cannot depend" in refused("vacuum", mnt)
        (mnt / "inside.sb").write_bytes(module.read_bytes())
        assert "is not a module of this mount" in refused("lower", "remove", mnt, mnt / "inside.sb")
        (mnt / "inside.sb").unlink()
        content = module.read_bytes()
        for there in (root.read_bytes(), content[:100], b"", None):  # what has replaced it
            module.unlink()
            if there is not None:
                module.write_bytes(there)
            lower("remove", mnt, module)
            assert not (mnt / "opt").exists()
            module.unlink(missing_ok=True)
            module.write_bytes(content)
            lower("add", mnt, module)
    assert not (tmp_path / "store/upper/inside.sb").exists()


@needs_root
def test_nothing_is_taken_from_below_a_mount(tmp_path: Path, images: tuple[Path, Path]) -> None:
    root, module = images
    with mounted(root, tmp_path / "mnt", tmp_path / "store") as here:
        mnt = here.path
        places = [mnt / "covered/in", mnt / "srv"]
        for place in places:
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
        try:
            assert "hides /covered/in, which is a mountpoint" in refused("lower", "add", mnt, module)
            subprocess.run(["umount", mnt / "covered/in"], check=True)
            lower("add", mnt, module)
            assert os.path.ismount(mnt / "srv")
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", mnt / "opt/p"], check=True)
            places.append(mnt / "opt/p")
            assert "has /opt/p, which is a mountpoint" in refused("lower", "remove", mnt, module)
            subprocess.run(["umount", mnt / "opt/p"], check=True)
            lower("remove", mnt, module)
            assert os.path.ismount(mnt / "srv")
        finally:
            for place in places:
                if os.path.ismount(place):
                    subprocess.run(["umount", place], check=True)


def test_a_module_can_only_add(tmp_path: Path, images: tuple[Path, Path]) -> None:
    root, _ = images
    for name, what in (("opaque", "etc"), ("metacopy", "gone")):
        marked = tmp_path / name
        subprocess.run(["cp", "-r", tmp_path / "module", marked], check=True)
        os.setxattr(marked / what, f"user.overlay.{name}", b"y")
        image = mksquashfs(tmp_path / f"{name}.sb", marked)
        with mounted(root, tmp_path / "mnt", tmp_path / "store") as here:
            assert f"/{what} changes what is below it" in refused("lower", "add", here.path, image)
            assert not facts(here.path)["modules"]


@needs_root
def test_as_an_ordinary_user(images: tuple[Path, Path]) -> None:
    root, module = images
    with tempfile.TemporaryDirectory(prefix="cowfs-nobody-") as place:
        top = Path(place)
        os.chown(top, 65534, 65534)
        for image in images:
            (top / image.name).write_bytes(image.read_bytes())
        root, module = (top / image.name for image in images)
        with mounted(root, top / "mnt", top / "store", nobody=True) as here:
            done = cowfs("lower", "add", here.path, module, nobody=True)
            assert done.returncode == 0, done.stderr
            shown = run(*as_nobody_prefix(), "cat", here.path / "opt/p/x", check=True)
            assert shown.stdout == "x\n"
            run(*as_nobody_prefix(), "sh", "-c", f"echo mine >>{here.path}/file", check=False)
            assert cowfs("lower", "remove", here.path, module, nobody=True).returncode == 0
            assert not run(*as_nobody_prefix(), "ls", here.path, check=True).stdout.count("opt")


def test_a_killed_daemon_leaves_either_set(tmp_path: Path, images: tuple[Path, Path]) -> None:
    root, module = images
    store = tmp_path / "store.bs"
    assert cowfs("create", store, "64").returncode == 0
    with mounted(root, tmp_path / "mnt", store) as here:
        lower("add", here.path, module)
        (here.path / "opt/p/large").chmod(0o640)
        with open(here.path / "file", "a") as stream:
            stream.write("mine\n")
            os.fsync(stream.fileno())
        os.sync()
        os.kill(here.pid(), 9)
        assert cowfs("umount", here.path).returncode == 0
    for lowers in ([module, root], [root]):
        with mounted(lowers, tmp_path / "mnt", store) as here:
            assert (here.path / "file").read_text() == "new\nmine\n"
            assert (here.path / "opt/p/large").stat().st_size == 300_000
            assert (here.path / "opt/p/x").exists() == (len(lowers) == 2)
            if lowers == [root]:
                assert "is not a module" in refused("lower", "remove", here.path, module)
    other = mksquashfs(tmp_path / "other.sb", tmp_path / "module/etc")
    assert "belongs to" in refused("mount", f"{other}:{root}", tmp_path / "mnt", "--store", store)


FEW = "abcd"


def a_tree(top: Path, rng: random.Random, depth: int = 3) -> None:
    """Make a tree of few names, so that two of them have much in common."""
    top.mkdir(exist_ok=True)
    for name in FEW:
        kind = rng.random()
        if (top / name).exists():
            continue
        if depth and kind < 0.5:
            a_tree(top / name, rng, depth - 1)
        elif kind < 0.8:
            (top / name).write_bytes(rng.randbytes(rng.choice([3, 100, 70_000])))
            if rng.random() < 0.2:
                with suppress(FileExistsError):
                    (top / rng.choice(FEW)).hardlink_to(top / name)
    if rng.random() < 0.1:
        (top / "link").symlink_to(rng.choice(FEW))


def change(top: Path, rng: random.Random, count: int) -> None:
    """Do what people do to a tree of few names; some of it cannot be done."""

    def somewhere() -> Path:
        return top.joinpath(*(rng.choice(FEW) for _ in range(rng.randrange(1, 4))))

    for number in range(count):
        path, other = somewhere(), somewhere()
        with suppress(OSError):
            match rng.randrange(9):
                case 0:
                    path.write_bytes(b"%d\n" % number)
                case 1:
                    with path.open("ab") as stream:
                        stream.write(b"more %d\n" % number)
                case 2:
                    path.unlink()
                case 3:
                    shutil.rmtree(path)
                case 4:
                    path.mkdir()
                case 5:
                    path.rename(other)
                case 6:
                    path.chmod(0o750 if path.is_dir() else 0o604)
                case 7:
                    path.hardlink_to(other)
                case _:
                    list(path.iterdir())


def whole(top: Path) -> dict[str, object]:
    """Return the tree without the times of directories, which differ between the two."""
    return without_directory_times(tree(top))


@pytest.mark.parametrize(
    ("seed", "turns"), [(1, 2), *(pytest.param(seed, 9, marks=pytest.mark.nightly) for seed in range(2, 12))]
)
def test_a_tree_in_use_is_what_a_mount_shows(tmp_path: Path, seed: int, turns: int) -> None:
    """Whatever comes and goes: what is known, to the kernel too, is what a new mount of the layers shows."""
    rng = random.Random(seed)
    for name in ("lower", "one", "two"):
        a_tree(tmp_path / name, rng)
    root, one, two = (
        mksquashfs(tmp_path / f"{name}.sb", tmp_path / name) for name in ("lower", "one", "two")
    )
    loaded: list[Path] = []
    with mounted(root, tmp_path / "mnt", tmp_path / "store") as here:
        mnt = here.path
        for _ in range(turns):
            change(mnt, rng, 15)
            whole(mnt)
            opened = [(file.open("rb"), file.read_bytes()) for file in files(mnt)[::3]]
            module = rng.choice([one, two])
            lower("remove" if module in loaded else "add", mnt, module)
            if module in loaded:
                loaded.remove(module)
            else:
                loaded.insert(0, module)
            for stream, content in opened:
                assert stream.read() == content
                stream.close()
        change(mnt, rng, 10)
        live = whole(mnt)
    with mounted([*loaded, root], tmp_path / "mnt", tmp_path / "store") as here:
        assert whole(here.path) == live


def files(top: Path) -> list[Path]:
    return sorted(
        Path(here, name)
        for here, _, names in os.walk(top)
        for name in names
        if not Path(here, name).is_symlink()
    )
