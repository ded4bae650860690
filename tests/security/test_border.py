"""Nothing in another user's layer or store leads out of it: names, redirects, links, mounts."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from cowfs.layers.beneath import check_name
from cowfs.layers.directory import DirectoryLayer, open_directory
from tests.support.mounts import cowfs, kernel_overlay, mounted
from tests.support.system import NOBODY, as_nobody_prefix, needs_fuse, needs_root, run
from tests.support.tree import build, directory

# -- redirects

REDIRECTS: dict[str, bytes] = {
    "absolute": b"/real",
    "relative": b"real",
    "deep": b"/real/sub/deep",
    "up": b"..",
    "up from the root": b"/../outside",
    "up on the way": b"/real/../outside",
    "up at the end": b"/real/..",
    "up where nothing is": b"/missing/../real",
    "itself": b".",
    "itself on the way": b"/./real",
    "the root": b"/",
    "nothing": b"",
    "slash at the end": b"/real/",
    "two slashes": b"/real//sub",
    "slash in a name": b"real/sub",
    "up by a name": b"../outside",
    "with a NUL": b"/real\0/..",
    "a NUL alone": b"\0",
    "too long a name": b"/" + b"a" * 300,
    "too long a relative name": b"a" * 300,
    "many names": b"/n" * 1800,
    "missing": b"/missing",
    "a link": b"/link",
    "through a link": b"/link/secret",
    "a file": b"/real/sub/file",
}
_SAME = {"relative", "with a NUL"}
"""These lead to the same as another. In one upper the kernel refuses two that merge with one directory."""


def _seen(top: Path) -> dict[str, object]:
    """Return, for every name in a merged directory, its content or an errno."""
    seen: dict[str, object] = {}
    for name in REDIRECTS:
        for path in (top / name, top / f"{name}.file"):
            try:
                os.stat(path)
                seen[path.name] = sorted(os.listdir(path)) if path.is_dir() else path.read_bytes()
            except OSError as error:
                seen[path.name] = errno.errorcode[error.errno or 0]
    return seen


def _redirected(at: Path, names: Iterator[str]) -> None:
    at.mkdir()
    for name in names:
        (at / name).mkdir()
        os.setxattr(at / name, "trusted.overlay.redirect", REDIRECTS[name])
        file = at / f"{name}.file"
        file.touch()
        os.truncate(file, 5)
        os.setxattr(file, "trusted.overlay.metacopy", b"")
        os.setxattr(file, "trusted.overlay.redirect", REDIRECTS[name])


def _base(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("secret")
    lower, bottom = tmp_path / "lower", tmp_path / "bottom"
    build(lower, {"real/sub/file": b"deep\n", "real/sub/deep/x": b"x", "dir": directory()})
    os.symlink(tmp_path / "outside", lower / "link")
    build(bottom, {"real/below": b"y"})
    return lower, bottom


@needs_root
@needs_fuse
@pytest.mark.parametrize("where", ["upper", "lower"])
def test_redirects_are_followed_as_the_kernel_does(tmp_path: Path, ext3: Path, where: str) -> None:
    """The same errno for each that leads nowhere, or out."""
    lower, bottom = _base(tmp_path)
    scratch = ext3 / f"{tmp_path.name}-{where}"
    scratch.mkdir()
    chosen = [name for name in REDIRECTS if where == "lower" or name not in _SAME]
    lowers = [lower, bottom]
    if where == "lower":
        _redirected(tmp_path / "middle", iter(chosen))
        lowers = [tmp_path / "middle", *lowers]
    seen = []
    for system in ("kernel", "cowfs"):
        store = scratch / system
        (store / "work").mkdir(parents=True)
        if where == "upper":
            _redirected(store / "upper", iter(chosen))
        else:
            (store / "upper").mkdir()
        if system == "kernel":
            with kernel_overlay(lowers, store, tmp_path / system) as at:
                seen.append(_seen(at))
        else:
            with mounted(lowers, tmp_path / system, store, quiet=False) as here:
                seen.append(_seen(here.path))
                log = here.log.read_text()
            assert "redirect not followed: b'..'" in log
            assert "Traceback" not in log
    assert seen[1] == seen[0]
    assert "secret" not in str(seen)


@needs_root
@needs_fuse
def test_diff_of_a_store_with_a_redirect_that_leads_out(tmp_path: Path) -> None:
    """One line, and the exit code of an error; of the mount and of the store alone."""
    lower, _ = _base(tmp_path)
    store = tmp_path / "store"
    store.mkdir()
    _redirected(store / "upper", iter(["up from the root"]))
    (store / "work").mkdir()
    with mounted(lower, tmp_path / "mnt", store, quiet=False) as here:
        done = cowfs("diff", here.path)
        assert done.returncode not in {0, 1} and "secret" not in done.stdout
    done = cowfs("diff", store)
    assert done.returncode not in {0, 1} and "secret" not in done.stdout
    assert done.stderr.count("\n") == 1, done.stderr


# -- parts of a store that are something else

_STRANGE: dict[str, Callable[[Path, Path], None]] = {
    "a link": lambda at, outside: at.symlink_to(outside),
    "a fifo": lambda at, _: os.mkfifo(at),
    "a socket": lambda at, _: _socket(at),
}


_PARTS = ["upper", "work", "work/work", "work/index", "cowfs", "cowfs/header.json", "cowfs/lock"]


def _socket(at: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.open(at.parent, os.O_PATH)
        made.bind(f"/proc/self/fd/{here}/{at.name}")
        os.close(here)


@needs_root
@needs_fuse
@pytest.mark.parametrize("part", _PARTS)
@pytest.mark.parametrize("kind", ["a link", "a fifo"])
def test_parts_of_a_store_that_are_something_else(tmp_path: Path, part: str, kind: str) -> None:
    """Nothing outside is read, made or waited for; whoever is refused is told in one line."""
    outside, lower, store = tmp_path / "outside", tmp_path / "lower", tmp_path / "store"
    build(outside, {"header.json": b"{}", "work/x": b"x", "index/x": b"x", "upper/secret": b"x"})
    build(lower, {"file": b"x\n"})
    with mounted(lower, tmp_path / "mnt", store):
        pass
    place = store / part
    run("rm", "-r", place)
    target = outside / "header.json" if part == "cowfs/header.json" and kind == "a link" else outside
    _STRANGE[kind](place, target)
    before = run("ls", "-lR", "--time-style=full-iso", outside).stdout
    for command in (["info"], ["check", "-n"], ["diff"]):
        done = cowfs(*command, store, timeout=20)
        assert "Traceback" not in done.stderr and "secret" not in done.stdout + done.stderr
    options = ["--store", str(store), "-o", f"log={tmp_path / 'log'}"]
    done = cowfs("mount", lower, tmp_path / "mnt", *options, timeout=20)
    if done.returncode == 0:
        cowfs("umount", tmp_path / "mnt", check=True)
    assert done.returncode == 32 and done.stderr.count("\n") == 1, done.stderr
    assert run("ls", "-lR", "--time-style=full-iso", outside).stdout == before


# -- the directory layer itself


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/", b"../x", b"a\0b"])
def test_what_is_no_name_is_refused(tmp_path: Path, name: bytes) -> None:
    """By every call that takes one: images and notes may hold anything."""
    (tmp_path / "a").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="no name"):
        check_name(name)
    with closing(open_directory(str(tmp_path / "a"))) as layer:
        root, me = layer.root, (os.geteuid(), os.getegid())
        (tmp_path / "a/b").touch()
        found = layer.lookup(root, b"b")
        assert found is not None
        calls: list[Callable[[], Any]] = [
            lambda: layer.lookup(root, name),
            lambda: layer.create(root, name, 0o600, *me),
            lambda: layer.mkdir(root, name, 0o700, *me),
            lambda: layer.symlink(root, name, b"x", *me),
            lambda: layer.mknod(root, name, stat.S_IFIFO | 0o600, 0, *me),
            lambda: layer.link(found[0], root, name),
            lambda: layer.unlink(root, name, None),
            lambda: layer.rmdir(root, name, None),
            lambda: layer.rename((root, name), (root, b"c")),
            lambda: layer.rename((root, b"b"), (root, name)),
        ]
        for call in calls:
            with pytest.raises(OSError) as raised:
                call()
            assert raised.value.errno == errno.EINVAL
    assert sorted(os.listdir(tmp_path)) == ["a", "file"]


@pytest.fixture(params=["as we are", "guarded"])
def opened(request: pytest.FixtureRequest, nobody_path: Path) -> Iterator[tuple[DirectoryLayer, Path]]:
    """A layer of ``in``, beside ``out``; *guarded*: opened without the privilege for a mount of its own."""
    build(nobody_path / "out", {"file": b"secret", "dir/file": b"secret"})
    build(nobody_path / "in", {"file": b"x", "dir/file": b"y"})
    run("chmod", "-R", "777", nobody_path)
    guarded = request.param == "guarded" and os.geteuid() == 0
    if guarded:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    try:
        layer = open_directory(str(nobody_path / "in"))
    finally:
        if guarded:
            os.seteuid(0)
            os.setegid(0)
    with closing(layer):
        yield layer, nobody_path


def test_what_was_replaced_meanwhile_is_not_followed(opened: tuple[DirectoryLayer, Path]) -> None:
    """A file and a directory, known to the layer, that became links, fifos, sockets."""
    layer, top = opened
    for kind in ("a link", "a fifo", "a socket"):
        file, folder = layer.lookup(layer.root, b"file"), layer.lookup(layer.root, b"dir")
        assert file and folder
        moved = top / "in-old"
        (top / "in").rename(moved)
        (top / "in").mkdir()
        for name in ("file", "dir"):
            _STRANGE[kind](moved / f"{name}.new", top / "out" / name)
            run("mv", "-T", moved / name, top / "in" / name)
            (moved / f"{name}.new").rename(moved / name)
        for key in (file[0], folder[0]):
            for call in (
                lambda: layer.open(key, os.O_RDONLY).close(),  # noqa: B023
                lambda: layer.truncate(key, 0),  # noqa: B023
                lambda: layer.readdir(key),  # noqa: B023
                lambda: layer.lookup(key, b"file"),  # noqa: B023
                lambda: layer.create(key, b"new", 0o600, 0, 0),  # noqa: B023
            ):
                with pytest.raises(OSError) as raised:
                    call()
                assert raised.value.errno in {errno.ESTALE, errno.ENOTDIR, errno.ELOOP}
        if kind == "a link":
            with pytest.raises(OSError):
                layer.chmod(file[0], 0o600)
            with suppress(OSError):
                layer.utimens(file[0], 0, 0)
            with suppress(OSError):
                layer.setxattr(file[0], b"user.x", b"x")
        for name in ("file", "dir"):
            (moved / name).unlink()
            run("mv", "-T", top / "in" / name, moved / name)
        (top / "in").rmdir()
        moved.rename(top / "in")
    out = os.stat(top / "out/file")
    assert stat.S_IMODE(out.st_mode) == 0o777 and out.st_mtime_ns > 0 and os.listxattr(top / "out/file") == []
    assert (top / "out/file").read_bytes() == b"secret" and os.listdir(top / "out/dir") == ["file"]


@needs_root
def test_what_is_mounted_inside_is_not_entered(opened: tuple[DirectoryLayer, Path]) -> None:
    """Before the layer was opened or after it: what is below shows, or an empty directory; never another
    filesystem."""
    layer, top = opened
    (top / "in/later").mkdir()
    for name in ("dir", "later"):
        run("mount", "-t", "tmpfs", "none", top / "in" / name)
        (top / "in" / name / "mounted").touch()
    run("mount", "--bind", top / "out/file", top / "in/file")
    try:
        for mountpoint in (b"dir", b"later"):
            found = layer.lookup(layer.root, mountpoint)
            assert found is not None and stat.S_ISDIR(found[1].st_mode)
            assert found[1].st_dev == layer.dev == layer.stat(found[0]).st_dev
            assert layer.lookup(found[0], b"mounted") is None
            assert layer.names(found[0]) in ([], [b"file"])
            assert [entry.name for entry in layer.readdir(found[0])] == layer.names(found[0])
            layer.listxattr(found[0])
            layer.handle(found[0])
        try:
            found = layer.lookup(layer.root, b"file")
            assert found is not None
            with closing(layer.open(found[0], os.O_RDONLY)) as file:
                assert file.pread(10, 0) == b"x"
        except OSError as error:
            assert error.errno == errno.EXDEV
    finally:
        run("umount", top / "in/dir", top / "in/later", top / "in/file")


@needs_root
@needs_fuse
@pytest.mark.parametrize("nobody", [False, True])
def test_a_lower_with_mounts_inside(nobody_path: Path, nobody: bool) -> None:
    """As in overlayfs, mounts inside are not part of the lower: they can be listed, and overwritten."""
    lower = nobody_path / "lower"
    build(lower, {"file": b"x", "sub/below": b"y"})
    run("chown", "-R", "nobody:nogroup", lower)
    run("mount", "-t", "tmpfs", "none", lower / "sub")
    (lower / "sub/mounted").touch()
    prefix = as_nobody_prefix() if nobody else []
    try:
        with mounted(lower, nobody_path / "mnt", nobody=nobody) as here:
            shown = run(*prefix, "ls", "-A", here.path / "sub").stdout.split()
            assert shown == ([] if nobody else ["below"])
            run(*prefix, "ls", "-laR", here.path)
            if nobody:  # nothing true is known of what is below
                run(*prefix, "rmdir", here.path / "sub")
            else:
                (here.path / "sub/new").write_text("new")
                assert sorted(os.listdir(here.path / "sub")) == ["below", "new"]
    finally:
        run("umount", lower / "sub")
    assert os.listdir(lower / "sub") == ["below"]
