"""`cowfs checkpoint`, `checkpoints` and `rollback`, and what compares with them: mounted and not."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cowfs import api
from tests.mount.test_diff_patch import MAKE as PLAIN
from tests.mount.test_diff_patch import random_work, script
from tests.mount.test_revert import MAKE, WORK, tree
from tests.support.mounts import COWFS, cowfs, mounted, project_root
from tests.support.system import as_nobody_prefix, needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True

pytestmark = needs_fuse

MORE = r"""
echo once more >>etc/fstab; mv bin tools; echo again >>tools/lib/so; rm -r etc/new
mkdir etc/new; echo b >etc/new/b
chmod 600 large; echo three >>first; rm script; ln second third; mv old older; setfattr -n user.c -v d etc
echo y2 >>usr/y; rmdir usr/none 2>/dev/null || mkdir usr/none; ln -sf elsewhere etc/link
"""


Seen = dict[str, tuple[object, int]]


def seen(top: Path) -> Seen:
    """Everything that a user can see, numbers of inodes included."""
    numbers = {
        os.path.relpath(Path(here, name), top): Path(here, name).lstat().st_ino
        for here, below, files in os.walk(top)
        for name in [".", *below, *files]
    }
    return {path: (facts, numbers[path]) for path, facts in tree(top).items()}


def without_numbers(found: Seen) -> dict[str, object]:
    """The kernel's overlayfs shows other numbers."""
    return {path: facts for path, (facts, _) in found.items()}


def store_of(kind: str, place: Path) -> Path:
    """Make a store of a kind."""
    if kind == "directory":
        return place / "store"
    assert cowfs("create", place / "store.bs", "64").returncode == 0
    return place / "store.bs"


def names(what: Path) -> list[str]:
    return [one.name for one in api.checkpoints(str(what))]


@needs_root
@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        ("image", None),
        pytest.param("image", "kernel", marks=pytest.mark.nightly),
        pytest.param("directory", None, marks=pytest.mark.nightly),
    ],
)
def test_a_state_is_kept_and_comes_back(tmp_path: Path, kind: str, engine: str | None) -> None:
    script(MAKE, tmp_path)
    store = store_of(kind, tmp_path)
    lower, mnt = tmp_path / "lower", tmp_path / "mnt"
    how = ("passthrough=off",)
    with mounted(lower, mnt, store, engine=engine, options=how) as here:
        one, two = take_two(mnt)
        run(*COWFS, "rollback", mnt, "one")
        assert seen(mnt) == one
        script("echo x >on-one", mnt)
        assert cowfs("diff", mnt, "--since", "one").stdout == "A  on-one\n"
        assert cowfs("revert", mnt, "--all", "--dry-run").stdout == "A  on-one\n"
        assert "since the checkpoint one (cowfs diff --since one " in cowfs("revert", mnt, "a").stderr
        refused = cowfs("diff", mnt, "--since", "two")
        assert refused.returncode == 1
        assert "the tree is not based on this checkpoint" in refused.stderr
        run(*COWFS, "rollback", mnt, "two")
        assert seen(mnt) == two
        here.umount()
    assert names(store) == ["one", "two"]
    with mounted(lower, mnt, store, engine=engine, options=how):
        assert seen(mnt) == two
    told = json.loads(cowfs("checkpoints", store, "--json").stdout)
    assert [(one["name"], one["on"], one["current"], one["last"]) for one in told["checkpoints"]] == [
        ("one", None, True, False),
        ("two", "one", True, True),
    ]
    assert cowfs("check", "-n", store).returncode == 0
    assert "checkpoints: one, two" in cowfs("info", store).stdout
    assert seen_by_kernel(store, mnt) == without_numbers(two)
    run(*COWFS, "rollback", store, "one")
    run(*COWFS, "checkpoint", store, "--delete", "two")
    with mounted(lower, mnt, store, engine=engine, options=how):
        assert seen(mnt) == one
        assert names(mnt) == ["one"]
        script(MORE, mnt)
        assert cowfs("checkpoint", mnt, "three").returncode == 0
        script("echo four >>etc/fstab; mv tools other; rm -r etc/new", mnt)
        four = without_numbers(seen(mnt))
        assert cowfs("checkpoint", mnt, "--delete", "one").returncode == 0
        assert without_numbers(seen(mnt)) == four
    with mounted(lower, mnt, store, engine=engine, options=how):  # which merges what was deleted
        assert without_numbers(seen(mnt)) == four
        assert len(json.loads(cowfs("info", mnt, "--json").stdout)["store"]["layers"]) == 1
    assert seen_by_kernel(store, mnt) == four
    run(*COWFS, "checkpoint", store, "--delete", "three")
    assert (names(store), json.loads(cowfs("info", store, "--json").stdout)["layers"]) == ([], [])
    assert cowfs("check", "-n", store).returncode == 0
    assert seen_by_kernel(store, mnt) == four


def take_two(mnt: Path) -> tuple[Seen, Seen]:
    """Change the tree and take two checkpoints, the first while files are written; return what they show.

    Afterwards the tree is as at the second, after other changes were rolled back.
    """
    script(WORK, mnt)
    with open(mnt / "etc/fstab", "a") as writing, open(mnt / "usr/y", "r+b") as other:
        writing.write("buffered until now\n")
        writing.flush()
        one = seen(mnt)
        assert cowfs("checkpoint", mnt, "one").returncode == 0
        assert seen(mnt) == one
        writing.write("after the checkpoint\n")
        writing.flush()
        os.pwrite(other.fileno(), b"Z", 0)
        os.ftruncate(other.fileno(), 1)
        assert (mnt / "etc/fstab").read_text().endswith("buffered until now\nafter the checkpoint\n")
        assert (mnt / "usr/y").read_bytes() == b"Z"
        assert os.fstat(writing.fileno()).st_ino == (mnt / "etc/fstab").stat().st_ino
        refused = cowfs("rollback", mnt, "one")
        assert refused.returncode == 32
        assert f"in use: {mnt}/etc/fstab (open, by" in refused.stderr
        assert f"pid {os.getpid()}" in refused.stderr
        assert "no such checkpoint" in cowfs("rollback", mnt, "two").stderr  # that comes first
    script(MORE, mnt)
    two = seen(mnt)
    assert cowfs("checkpoint", mnt, "two").returncode == 0
    script("echo gone >>etc/fstab; rm -r tools; mkdir tools; echo gone >gone", mnt)
    run(*COWFS, "rollback", mnt, "two")
    assert seen(mnt) == two
    assert not (mnt / "gone").exists()
    return one, two


@needs_root
def test_what_was_before_a_deleted_checkpoint_can_be_reverted(tmp_path: Path) -> None:
    """Its layer is merged when the store is opened next: that is when it is reverted."""
    lower, mnt, store = tmp_path / "lower", tmp_path / "mnt", store_of("image", tmp_path)
    script("mkdir lower; echo a >lower/a; echo b >lower/b", tmp_path)
    before = tree(lower)
    with mounted(lower, mnt, store):
        script("echo new >a; rm b; echo c >c", mnt)
        cowfs("checkpoint", mnt, "one", check=True)
        cowfs("checkpoint", mnt, "--delete", "one", check=True)
        still = f"cowfs: {mnt}: changes made before the deleted checkpoint still count as part of the lower "
        still += "(until it is unmounted and mounted again)\n"
        for words in (["vacuum"], ["vacuum", "-n"], ["revert", "-n", "--all"], ["revert", "--all"]):
            done = cowfs(words[0], mnt, *words[1:])
            assert done.stderr.startswith(still) and not done.stdout
        script("echo newer >a", mnt)
        assert cowfs("revert", mnt, "-n", "--all", check=True).stdout == "M  a  (content, times)\n"
        assert cowfs("revert", mnt, "--all", check=True).stdout == "reverted a\n"
        assert (mnt / "a").read_text() == "new\n"
    assert cowfs("revert", store, "--all", check=True).stdout == "reverted a\nreverted c\nreverted b\n"
    assert cowfs("diff", store, check=True).stdout == ""
    with mounted(lower, mnt, store):
        assert tree(mnt) == before


def seen_by_kernel(store: Path, place: Path) -> dict[str, object]:
    """Return the tree that the kernel's overlayfs shows, mounted as `cowfs info --kernel` says."""
    commands = cowfs("info", store, "--kernel", check=True).stdout
    look = f"exec {sys.executable} -m tests.mount.test_checkpoint {place}"
    inside = f"set -e\nmount -t tmpfs none /run\n{commands}\ncd {project_root()}\n{look}"
    env = {**os.environ, "MOUNTPOINT": str(place), "PYTHONPATH": project_root()}
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", inside],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = eval(done.stdout)
    return found


@pytest.mark.parametrize("fakeroot", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_a_users_store(nobody_path: Path, fakeroot: bool) -> None:
    """An unprivileged user's, in a directory: hard links of symlinks, owners and devices that are notes."""
    prefix = as_nobody_prefix() if os.geteuid() == 0 else []

    def at(place: Path, text: str) -> str:
        return run(*prefix, "sh", "-c", f"cd {place} && {text}").stdout

    what = "ls -liR --time-style=full-iso . | grep -v ^total; find . -type f | sort | xargs cat"
    at(
        nobody_path,
        "mkdir lower && cd lower && mkdir d && echo a >a && ln -s x s && ln s s2 && ln a a2 && echo f >d/f",
    )
    lower, mnt, store = nobody_path / "lower", nobody_path / "mnt", nobody_path / "store"
    options = ["fakeroot"] if fakeroot else []
    own = "mknod null c 1 3; chown 5:6 n; chown -h 7:8 s; touch -h s;" if fakeroot else ""
    with mounted(lower, mnt, store, options=options, nobody=True) as here:
        at(mnt, f"echo n >n; {own} mv d dd; echo more >>a; mkfifo p")
        one = at(mnt, what)
        assert cowfs("checkpoint", mnt, "one", nobody=True).returncode == 0
        assert at(mnt, what) == one
        at(mnt, "rm n p; mv dd ddd; echo more >>a2; mkdir dd")
        two = at(mnt, what)
        run(*prefix, *COWFS, "checkpoint", mnt, "two", cwd="/")
        run(*prefix, *COWFS, "rollback", mnt, "one", cwd="/")
        assert at(mnt, what) == one
        here.umount()
    run(*prefix, *COWFS, "rollback", store, "two", cwd="/")
    with mounted(lower, mnt, store, options=options, nobody=True):
        assert at(mnt, what) == two


@needs_root
def test_what_is_refused(tmp_path: Path) -> None:
    script(MAKE, tmp_path)
    store = tmp_path / "store"
    with mounted(tmp_path / "lower", tmp_path / "mnt", store, options=("passthrough=off",)):
        mnt = tmp_path / "mnt"
        (mnt / "new").write_text("new\n")
        for name, why in [
            ("a/b", "has a slash"), ("", "an empty argument was given"), ("a\nb", "cannot be printed"),
            ("x" * 101, "longer"), (".x", "begins with"),
        ]:  # fmt: skip
            refused = cowfs("checkpoint", mnt, name)
            assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
            assert why in refused.stderr
        assert cowfs("checkpoint", mnt, "one").returncode == 0
        assert "a checkpoint of this name already exists" in cowfs("checkpoint", mnt, "one").stderr
        assert "no such checkpoint" in cowfs("rollback", mnt, "two").stderr
        assert "no such checkpoint" in cowfs("checkpoint", mnt, "--delete", "two").stderr
        for kept in ("file", "directory"):
            where = mnt if kept == "directory" else "/"
            with (
                open(mnt / "new" if kept == "file" else os.devnull) as file,
                subprocess.Popen(["sleep", "60"], cwd=where, stdin=file) as child,
            ):
                file.close()
                refused = cowfs("rollback", mnt, "one")
                child.kill()
            assert refused.returncode == 32
            assert f"by sleep, pid {child.pid})" in refused.stderr
        run("mount", "-t", "tmpfs", "none", mnt / "usr")
        try:
            assert f"{mnt}/usr: is mounted in the tree" in cowfs("rollback", mnt, "one").stderr
        finally:
            run("umount", mnt / "usr")
    header = store / "cowfs/header.json"
    assert json.loads(header.read_text())["version"] == 2  # which no cowfs without checkpoints opens
    assert "neither a store nor a cowfs mountpoint" in cowfs("checkpoints", tmp_path / "lower").stderr
    os.rename(store / "cowfs/layers/1", tmp_path / "away")
    assert "cowfs/layers/1 is missing" in cowfs("diff", store).stderr
    assert cowfs("check", "-n", store).returncode == 4


@needs_root
@pytest.mark.parametrize(
    ("seed", "count"),
    [(1, 40), *(pytest.param(seed, 150, marks=pytest.mark.nightly) for seed in range(2, 6))],
)
def test_differences_between_checkpoints(tmp_path: Path, seed: int, count: int) -> None:
    """The patch from one state to another makes the other of the one; mounted and not they are the same."""
    script(PLAIN, tmp_path)
    random_work(tmp_path / "lower", seed + 100, 60)
    store = store_of("image", tmp_path)
    mnt = tmp_path / "mnt"
    states = ["0", "1", "2", "3"]
    with mounted(tmp_path / "lower", mnt, store):
        run("cp", "-a", mnt, tmp_path / "state0")
        for name in states[1:]:
            random_work(mnt, seed * 10 + int(name), count)
            run("cp", "-a", mnt, tmp_path / f"state{name}")
            if name != "3":
                run(*COWFS, "checkpoint", mnt, name)
        live = {pair: patch_between(mnt, *pair) for pair in pairs(states)}
    for pair in pairs(states):
        text = patch_between(store, *pair)
        assert text == live[pair]
        work = tmp_path / "work"
        run("cp", "-a", tmp_path / f"state{pair[0]}", work)
        run("git", "init", "-q", work)
        done = subprocess.run(["git", "-C", work, "apply", "-"], input=text, capture_output=True, check=False)
        assert done.returncode == 0 or not text, done.stderr
        run("rm", "-rf", work / ".git")
        assert files_of(work) == files_of(tmp_path / f"state{pair[1]}")
        run("rm", "-rf", work)


@needs_root
@pytest.mark.parametrize("kind", ["image", "directory"])
def test_a_name_that_only_a_checkpoint_had(tmp_path: Path, kind: str) -> None:
    """What was renamed in a directory made before a checkpoint is not what the lower has under that name."""
    script("mkdir -p lower/n; echo x >lower/n/f", tmp_path)
    store = store_of(kind, tmp_path)
    with mounted(tmp_path / "lower", tmp_path / "mnt", store) as here:
        script("mkdir -p d/f; touch d/f/in", here.path)
        run(*COWFS, "checkpoint", here.path, "one")
        script("mv d/f d/g; rm -r n; mv d n", here.path)
        wanted = ["D  n/f", "A  n/g/", "A  n/g/in"]
        assert run(*COWFS, "diff", here.path, "-q").stdout.splitlines() == wanted
        told = json.loads(cowfs("explain", here.path, "n/f", "--json").stdout)
        assert told["change"] == "D" and "to" not in told
    assert run(*COWFS, "diff", store, "-q").stdout.splitlines() == wanted
    run(*COWFS, "checkpoint", store, "--delete", "one")
    assert run(*COWFS, "diff", store, "-q").stdout.splitlines() == wanted
    run(*COWFS, "revert", store, "n/g")
    assert run(*COWFS, "diff", store, "-q").stdout.splitlines() == wanted[:1]


@needs_root
def test_what_the_kernel_writes_by_itself(tmp_path: Path) -> None:
    """A file that it has, open or mapped, would change in the checkpoint: none is made meanwhile."""
    script(MAKE, tmp_path)
    mnt = tmp_path / "mnt"
    with mounted(tmp_path / "lower", mnt, tmp_path / "store"):
        (mnt / "new").write_bytes(bytes(4096))
        with open(mnt / "new", "r+b") as file:
            if not json.loads(cowfs("info", mnt, "--json").stdout)["passthrough"]["lent"]:
                pytest.skip("this kernel has no passthrough")
            with mmap.mmap(file.fileno(), 4096) as memory:
                assert "/new: open or mapped" in cowfs("checkpoint", mnt, "one").stderr
                file.close()
                assert "/new: open or mapped" in cowfs("checkpoint", mnt, "one").stderr
                memory[0:3] = b"old"
        assert cowfs("checkpoint", mnt, "one").returncode == 0
        with open(mnt / "new", "r+b") as file, mmap.mmap(file.fileno(), 4096) as memory:
            memory[0:3] = b"now"
        run(*COWFS, "rollback", mnt, "one")
        assert (mnt / "new").read_bytes()[:3] == b"old"


WRITE = r"""
import os, random, sys
files = [os.open(f"f{i}", os.O_CREAT | os.O_RDWR, 0o644) for i in range(4)]
held = [bytearray() for _ in files]
large, known = os.open("large", os.O_RDWR), bytearray(open("large", "rb").read())
chance, number = random.Random(1), 0
while not os.path.exists(sys.argv[1]):
    at, data = number % 4, b"%8d" % number * 50
    os.pwrite(files[at], data, len(held[at]))
    held[at] += data
    if number % 13 == 0:
        os.fsync(files[at])
    if number % 17 == 0:
        os.ftruncate(files[at], len(held[at]) // 2)
        del held[at][len(held[at]) // 2 :]
    if number % 5 == 0:
        place = chance.randrange(len(known) - 5000)
        known[place : place + 4000] = os.urandom(4000)
        os.pwrite(large, known[place : place + 4000], place)
    if number % 7 == 0:
        open("t", "w").write(str(number))
        os.rename("t", f"u{number % 50}")
    number += 1
for at, file in enumerate(files):
    assert os.pread(file, 1 << 30, 0) == held[at] == open(f"f{at}", "rb").read(), at
assert open("large", "rb").read() == known
"""


@needs_root
@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["image", "directory"])
def test_made_while_others_write(tmp_path: Path, kind: str) -> None:
    """Nothing that is written to open files gets lost, one of them a file that is copied up lazily."""
    (tmp_path / "lower").mkdir()
    (tmp_path / "lower/large").write_bytes(os.urandom(70 << 20))
    store = tmp_path / ("store" if kind == "directory" else "store.bs")
    if kind == "image":
        assert cowfs("create", store, "1200").returncode == 0
    mnt, over = tmp_path / "mnt", tmp_path / "over"
    with mounted(tmp_path / "lower", mnt, store, options=("passthrough=off",)) as here:
        with subprocess.Popen([sys.executable, "-c", WRITE, over], cwd=mnt) as writer:
            for number in range(8):
                run(*COWFS, "checkpoint", mnt, f"c{number}")
            over.touch()
            assert writer.wait(60) == 0
        last = without_numbers(seen(mnt))
        here.umount()
    with mounted(tmp_path / "lower", mnt, store):
        assert without_numbers(seen(mnt)) == last
    assert cowfs("check", "-n", store).returncode == 0


@needs_root
@pytest.mark.nightly
def test_a_full_store(tmp_path: Path) -> None:
    """A checkpoint that does not fit fails with one line, and changes nothing."""
    (tmp_path / "lower").mkdir()
    store = tmp_path / "store.bs"
    assert cowfs("create", store, "16").returncode == 0
    mnt = tmp_path / "mnt"
    with mounted(tmp_path / "lower", mnt, store):
        with pytest.raises(OSError, match="No space left"), (mnt / "fill").open("wb", 0) as file:
            while True:
                file.write(bytes(4096))
        before = seen(mnt)
        refused = cowfs("checkpoint", mnt, "one")
        assert (refused.returncode, refused.stderr.count("\n")) == (32, 1)
        assert "No space left on device (delete files, or make it larger with cowfs grow)\n" in refused.stderr
        assert (seen(mnt), names(mnt)) == (before, [])
        (mnt / "fill").unlink()
        run(*COWFS, "checkpoint", mnt, "one")
    assert cowfs("check", "-n", store).returncode == 0


def pairs(states: list[str]) -> list[tuple[str, str]]:
    return [(a, b) for a in states for b in states if a < b]


def patch_between(what: Path, since: str, until: str) -> bytes:
    given = [*(["--since", since] if since != "0" else []), *(["--until", until] if until != "3" else [])]
    done = subprocess.run(
        [*COWFS, "diff", what, "-p", "--binary", *given], capture_output=True, check=True, timeout=60
    )
    return done.stdout


def files_of(top: Path) -> dict[str, object]:
    """Return what git stores of a tree: contents, links and execute permission."""
    found: dict[str, object] = {}
    for here, _, files in os.walk(top):
        for name in files:
            path = Path(here, name)
            if path.is_symlink():
                found[os.path.relpath(path, top)] = os.readlink(path)
            elif path.is_file():
                found[os.path.relpath(path, top)] = (path.read_bytes(), bool(path.stat().st_mode & 0o100))
    return found


if __name__ == "__main__":
    print(without_numbers(seen(Path(sys.argv[1]))))


def test_the_mount_moves_its_upper_itself(tmp_path: Path) -> None:
    """The mount does not report this as a change of its store by others."""
    (tmp_path / "lower").mkdir()
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        (here.path / "new").write_text("x")
        api.checkpoint(str(here.path), "one")
        assert "renamed" not in cowfs("info", here.path, check=True).stdout
        api.rollback(str(here.path), "one")
        done = cowfs("umount", here.path)
        assert (done.returncode, done.stderr) == (0, "")
