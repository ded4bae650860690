"""`cowfs diff -p` and its relatives: a patch that git takes, counts of lines, selected paths."""

from __future__ import annotations

import os
import random
import stat
import subprocess
from pathlib import Path

import pytest

from tests.support.mounts import COWFS, cowfs, mounted, project_root
from tests.support.system import as_nobody_prefix, needs_fuse, run

DEV_FUSE_AT_NIGHT = True

pytestmark = needs_fuse

MAKE = r"""
mkdir -p lower/etc lower/usr/lib lower/usr/share/doc/x lower/old && cd lower
seq 1 20 >etc/fstab; echo localhost >etc/hosts; printf 'no newline' >etc/nonl
printf 'a b\n' >'etc/with blank'
printf x >"etc/na$(printf '\303\244')me"; ln -s hosts etc/link; printf 'cr\r\nlf\n' >etc/dos
echo tool >usr/tool; echo so >usr/lib/so; echo a >usr/share/doc/x/a; echo b >usr/share/doc/x/b
i=0; while [ $i -lt 500 ]; do printf '\000\001\377%s' $i; i=$((i+1)); done >usr/bin.dat
echo '#!/bin/sh' >script; echo f >old/f; echo g >old/g; echo one >first; ln first second; : >nothing
touch -d 2020-01-01 etc/* usr/* script first
"""
WORK = r"""
sed -i 's/^7$/seven/' etc/fstab; rm etc/hosts; mkdir -p etc/new; echo n >etc/new/file
printf 'still no newline' >etc/nonl; echo c >>'etc/with blank'; echo y >>"etc/na$(printf '\303\244')me"
ln -sf fstab etc/link; printf 'cr\r\nmore\r\nlf\n' >etc/dos
mv usr bin; rm bin/tool; echo more >>bin/lib/so; printf 'other\000' >bin/bin.dat; mv bin/share/doc/x/a bin/a
chmod 755 script; rm -r old; echo now a file >old; echo two >>second; : >zero; printf x >>nothing
touch "$(printf 'new\nline')" 'quo"ted' 'back\slash'; ln -s nowhere dangling; head -c 3000 /dev/zero >zeros
"""


def script(text: str, directory: Path, nobody: bool = False) -> None:
    run(*(as_nobody_prefix() if nobody else []), "sh", "-euc", f'cd "$1"\n{text}', "sh", directory)


def tree(top: Path) -> dict[str, object]:
    """Return what a patch can express of a tree: files, their execute permission, and symlinks."""
    found: dict[str, object] = {}
    for directory, _, names in os.walk(top):
        for name in names:
            path = Path(directory, name)
            mode = path.lstat().st_mode
            key = os.path.relpath(path, top)
            if stat.S_ISLNK(mode):
                found[key] = os.readlink(path)
            elif stat.S_ISREG(mode):
                found[key] = bool(mode & 0o100), path.read_bytes()
        links = [Path(directory, name) for name in os.listdir(directory)]
        found |= {os.path.relpath(link, top): os.readlink(link) for link in links if link.is_symlink()}
    return found


def patch_of(what: Path, nobody: bool = False) -> bytes:
    done = subprocess.run(
        [*(as_nobody_prefix() if nobody else []), *COWFS, "diff", what, "-p", "--binary"],
        stdin=subprocess.DEVNULL, capture_output=True, check=False, cwd="/", timeout=600,
        env={**os.environ, "PYTHONPATH": project_root()},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b""), done.stderr
    return done.stdout


def apply(patch: bytes, lower: Path, where: Path) -> dict[str, object]:
    run("cp", "-a", lower, where)
    file = where.with_suffix(".patch")
    file.write_bytes(patch)
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(where)}
    run("git", "apply", file, cwd=where, env=env)
    return tree(where)


@pytest.mark.parametrize("kind", ["image", "directory"])
@pytest.mark.parametrize("nobody", [False, True])
def test_git_applies_it_to_the_lower(nobody_path: Path, kind: str, nobody: bool) -> None:
    top = nobody_path
    script(MAKE, top, nobody)
    store = top / ("store.bs" if kind == "image" else "store")
    if kind == "image":
        cowfs("create", store, "16", nobody=nobody, check=True)
    with mounted(top / "lower", top / "mnt", store, nobody=nobody) as here:
        script(WORK, here.path, nobody)
        live = patch_of(here.path, nobody)
        script(f"cp -a mnt {top}/merged", top, nobody)
    assert patch_of(store, nobody) == live
    assert apply(live, top / "lower", top / "patched") == tree(top / "merged")


def test_what_git_has_no_words_for(tmp_path: Path) -> None:
    script(MAKE, tmp_path)
    os.mkfifo(tmp_path / "lower/fifo")
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        script("mkfifo pipe; mkdir empty; chown 5:6 script; chmod 600 etc/fstab", here.path)
        os.setxattr(here.path / "script", "user.a\nb", b"c")
        assert cowfs("diff", here.path, "-p").stdout.splitlines() == [
            "# empty/: an empty directory was added",
            "# etc/fstab: mode 0644 -> 0600",
            "# pipe: fifo added, which a patch cannot tell",
            "# script: owner 0:0 -> 5:6",
            r"# script: extended attributes differ: user.a\nb",
        ]
        (here.path / "usr/bin.dat").write_bytes(b"\0" * 10)
        size = (tmp_path / "lower/usr/bin.dat").stat().st_size
        assert f"Binary files a/usr/bin.dat and b/usr/bin.dat differ\n# {size} -> 10 bytes\n" in (
            cowfs("diff", here.path, "-p").stdout
        )
        script("rm fifo; echo now >fifo", here.path)
        assert "+now\n" in cowfs("diff", here.path, "-p").stdout
        patch = cowfs("diff", here.path, "-p", "--binary").stdout  # which git apply is to take
        assert "# fifo: fifo became a file, which a patch cannot tell\n" in patch
        assert "a/fifo" not in patch


def test_files_of_a_renamed_directory_whose_names_others_have_now(tmp_path: Path) -> None:
    """A file stays a rename, a link that became a file does not, and the halves of another stay together."""
    script("mkdir -p base/usr; seq 9 >base/usr/a; ln -s a base/usr/l; echo plain >base/k", tmp_path)
    with mounted(tmp_path / "base", tmp_path / "mnt", tmp_path / "store") as here:
        script(
            "mv usr bin; mkdir usr; echo o >usr/a; echo n >usr/l; ln -sf m k; rm bin/l; echo b >bin/l",
            here.path,
        )
        patch = patch_of(here.path)
        script(f"cp -a mnt {tmp_path}/merged", tmp_path)
    lines = [
        line for line in patch.decode().splitlines() if line.startswith(("diff", "deleted", "new", "rename"))
    ]
    assert lines == [
        *("diff --git a/usr/l b/usr/l", "deleted file mode 120000"),
        *("diff --git a/bin/l b/bin/l", "new file mode 100644"),
        *("diff --git a/usr/a b/bin/a", "rename from usr/a", "rename to bin/a"),
        *("diff --git a/k b/k", "deleted file mode 100644", "diff --git a/k b/k", "new file mode 120000"),
        *("diff --git a/usr/a b/usr/a", "new file mode 100644"),
        *("diff --git a/usr/l b/usr/l", "new file mode 100644"),
    ]
    assert apply(patch, tmp_path / "base", tmp_path / "patched") == tree(tmp_path / "merged")


def test_what_is_where_a_renamed_link_was(tmp_path: Path) -> None:
    """git apply asks what the path is, and takes it from the deletion of a link, not from a rename; and it
    takes what it is told to delete for what it has made there before.
    """
    (tmp_path / "lower/old").mkdir(parents=True)
    (tmp_path / "lower/old/link").symlink_to("target")
    (tmp_path / "lower/old/other").symlink_to("target")
    (tmp_path / "lower/old/typed").symlink_to("target")
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        script("mv old z; mkdir -p old/link; echo x >old/link/file", here.path)
        script("echo now >old/typed; rm z/typed; echo another >z/typed", here.path)
        patch = patch_of(here.path)
        assert apply(patch, tmp_path / "lower", tmp_path / "patched") == tree(here.path)


def test_a_file_too_large_to_be_read(tmp_path: Path) -> None:
    """Sparse files cost nothing to make, and are not read."""
    (tmp_path / "lower").mkdir()
    (tmp_path / "lower/large").write_text("text\n")
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        os.truncate(here.path / "large", 1 << 40)
        (here.path / "small").write_text("text\n")
        patch = cowfs("diff", here.path, "-p", check=True, timeout=20).stdout
        assert "# large: 5 -> 1099511627776 bytes, too large for a patch\n" in patch and "+text\n" in patch
        assert "diff --git a/large" not in patch
        assert "5 -> 1099511627776" in cowfs("diff", here.path, "--stat", check=True, timeout=20).stdout
    stored = cowfs("diff", tmp_path / "store", "-p", check=True, timeout=20).stdout
    assert "# large: 5 -> 1099511627776 bytes" in stored


def test_counts_of_lines(tmp_path: Path) -> None:
    script(MAKE, tmp_path)
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        script(
            "sed -i 's/^7$/seven/; /^9$/d' etc/fstab; rm etc/hosts; mv usr bin; printf '\\0' >>bin/bin.dat",
            here.path,
        )
        size = (tmp_path / "lower/usr/bin.dat").stat().st_size
        shown = cowfs("diff", here.path, "--stat").stdout.splitlines()
    assert [" ".join(line.split()) for line in shown] == [
        f"usr/bin.dat => bin/bin.dat | Bin {size} -> {size + 1} bytes",
        "usr/lib/so => bin/lib/so | 0",
        "usr/share/doc/x/a => bin/share/doc/x/a | 0",
        "usr/share/doc/x/b => bin/share/doc/x/b | 0",
        "usr/tool => bin/tool | 0",
        "etc/fstab | 3 +--",
        "etc/hosts | 1 -",
        "7 files changed, 1 insertions(+), 3 deletions(-)",
    ]


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    script(MAKE, tmp_path)
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        script(
            "echo x >>etc/fstab; touch etc/hosts; mkdir etc/d; echo x >etc/d/a.conf; chmod 700 script\n"
            "rm usr/tool; mv old new",
            here.path,
        )
    return tmp_path / "store"


def names(*words: str | Path) -> list[str]:
    done = cowfs("diff", *words, "--name-only", check=True)
    return done.stdout.splitlines()


def test_paths_select(changed: Path, tmp_path: Path) -> None:
    assert names(changed) == ["etc/d", "etc/d/a.conf", "etc/fstab", "etc/hosts", "new", "script", "usr/tool"]
    assert names(changed, "etc") == ["etc/d", "etc/d/a.conf", "etc/fstab", "etc/hosts"]
    assert names(changed, "/etc/d/", "script") == ["etc/d", "etc/d/a.conf", "script"]
    assert names(changed, "*.conf") == ["etc/d/a.conf"]
    for command, more in (("diff", ()), ("report", ("-O", tmp_path / "page.html")), ("revert", ("-n",))):
        refused = cowfs(command, changed, "et", *more)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr == (
            f"cowfs: {changed}: no et in it, now or before (give the path from the root of the tree)\n"
        )
        away = cowfs(command, changed, "etc/../usr", *more)
        assert (away.returncode, away.stdout) == (1, "") and "etc/../usr: has .. in it" in away.stderr
    assert not (tmp_path / "page.html").exists()
    assert names(changed, ".") == names(changed, "./", "script") == names(changed)
    assert names(changed, "./etc//d/.") == ["etc/d", "etc/d/a.conf"]
    assert cowfs("explain", changed, ".").stdout.startswith("/\n")
    assert names(changed, "empty*") == names(changed, "etc/nonl") == []  # a glob; and what is as it was
    assert names(changed, "old") == ["new"]  # where it was counts, too
    with mounted(tmp_path / "lower", tmp_path / "mnt", changed) as here:
        assert names(here.path / "etc") == ["etc/d", "etc/d/a.conf", "etc/fstab", "etc/hosts"]
        assert names(here.path / "etc", "d") == ["etc/d", "etc/d/a.conf"]
        assert names(here.path, here.path / "etc/d") == ["etc/d", "etc/d/a.conf"]
        assert names(here.path / "script", here.path / "etc/d") == ["etc/d", "etc/d/a.conf", "script"]
        assert names(here.path / "usr/tool") == ["usr/tool"]  # though it is gone
        for words in (["mnt/script", "mnt/etc/d"], ["mnt/etc/d", "mnt/script"]):  # as a shell expands mnt/*
            told = cowfs("diff", *words, "--name-only", cwd=str(tmp_path), check=True).stdout
            assert told.splitlines() == ["etc/d", "etc/d/a.conf", "script"]
        told = cowfs("diff", "mnt/etc", "d", "--name-only", cwd=str(tmp_path), check=True).stdout
        assert told.splitlines() == ["etc/d", "etc/d/a.conf"]
        assert cowfs("diff", here.path / "usr/took").returncode == 1
        for name in ("a*", "ab", "[x]", "x"):
            (here.path / name).mkdir()
            (here.path / name / "f?").touch()
        assert names(here.path / "a*") == ["a*", "a*/f?"]
        assert names(here.path / "[x]") == ["[x]", "[x]/f?"]
        assert names(here.path / "[x]", "f?") == ["[x]/f?"]
        assert names(here.path, "[x]") == ["[x]", "[x]/f?", "x", "x/f?"]  # a glob, and what is called so
        assert cowfs("revert", here.path / "a*", "-q").returncode == 0
        assert (here.path / "ab/f?").exists() and not (here.path / "a*").exists()


def test_aspects_select(changed: Path) -> None:
    assert names(changed, "--content") == ["etc/d", "etc/d/a.conf", "etc/fstab", "new", "usr/tool"]
    assert names(changed, "--ignore", "mtime") == [
        "etc/d",
        "etc/d/a.conf",
        "etc/fstab",
        "new",
        "script",
        "usr/tool",
    ]
    shown = cowfs("diff", changed, "--ignore=mtime,mode", "etc/fstab", "script")
    assert (shown.stdout, shown.stderr) == ("M  etc/fstab  (content)\n", "1 modified\n")


def test_fields_that_end_with_a_nul(changed: Path) -> None:
    assert cowfs("diff", changed, "-z", "old", "usr").stdout == "R\0old\0new\0D\0usr/tool\0"
    assert cowfs("diff", changed, "-z", "--name-only", "old", "usr").stdout == "new\0usr/tool\0"


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["--binary"], "-p"),
        (["-z", "-p"], "-z"),
        (["--ignore", "colour"], "colour"),
        (["-p", "--stat"], "--stat"),
    ],
)
def test_wrong_usage(changed: Path, words: list[str], word: str) -> None:
    done = cowfs("diff", changed, *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert word in done.stderr and done.stderr.count("\n") == 1


def random_work(top: Path, seed: int, count: int) -> None:
    """Do what people do to a tree, *count* times."""
    rng = random.Random(seed)

    def pick(directories: bool) -> Path | None:
        found = [
            Path(here, name)
            for here, below, files in os.walk(top)
            for name in (below if directories else files)
            if not Path(here, name).is_symlink()
        ]
        return rng.choice(sorted(found)) if found else None

    for number in range(count):
        directory = pick(True) or top
        file = pick(False)
        act = rng.randrange(9)
        new = directory / f"n{seed}-{number}"
        if act == 0 or file is None:
            new.write_bytes(rng.randbytes(rng.randrange(200)) if rng.random() < 0.3 else b"line\n" * number)
        elif act == 1:
            new.mkdir()
            (new / "in it").write_text("x\n")
        elif act == 2:
            with file.open("a") as stream:
                stream.write(f"more {number}\n")
        elif act == 3:
            file.write_bytes(file.read_bytes()[:-1] + b"\n\n")
        elif act == 4:
            file.unlink()
        elif act == 5:
            file.rename(new)
        elif act == 6 and not top.is_relative_to(directory):
            target = pick(True) or top
            if not target.is_relative_to(directory):
                directory.rename(target / f"moved{seed}-{number}")
        elif act == 7:
            file.chmod(rng.choice([0o644, 0o755]))
        else:
            new.symlink_to(f"target{number}")


@pytest.mark.parametrize(
    ("seed", "count"),
    [(1, 100), *(pytest.param(seed, 1000, marks=pytest.mark.nightly) for seed in range(2, 12))],
)
def test_after_many_changes(tmp_path: Path, seed: int, count: int) -> None:
    script(MAKE, tmp_path)
    random_work(tmp_path / "lower", seed + 100, 60)
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        random_work(here.path, seed, count)
        merged = tree(here.path)
        live = patch_of(here.path)
    assert patch_of(tmp_path / "store") == live
    assert apply(live, tmp_path / "lower", tmp_path / "patched") == merged
