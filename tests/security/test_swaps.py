"""Names of a directory layer that its owner swaps for something else, at every moment: nothing but the inode
that was looked up is opened, read or changed."""

from __future__ import annotations

import ast
import ctypes
import errno
import fcntl
import os
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cowfs.layers.directory import DirectoryLayer, open_directory
from cowfs.layers.keys import PathKey
from cowfs.linux.files import RENAME_NOREPLACE
from tests.support.listing import names_of
from tests.support.mounts import mounted
from tests.support.system import NOBODY, as_nobody_prefix, needs_fuse, needs_root, run
from tests.support.tree import build

ROOT = Path(__file__).parents[2]
SECRET = b"secret"
OWN = b"own"

# -- who watches: any open, read or change of what must not be touched


class Watch:
    """Notes what is done to inodes, by inotify(7): an open that is O_PATH is none."""

    _ALL = 0x2 | 0x4 | 0x20 | 0x1  # IN_MODIFY, IN_ATTRIB, IN_OPEN, IN_ACCESS
    _ENTRIES = 0x100 | 0x200 | 0x40 | 0x80  # IN_CREATE, IN_DELETE, IN_MOVED_FROM, IN_MOVED_TO
    _EVENT = struct.Struct("=iIII")

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._names: dict[int, str] = {}

    def add(self, path: Path) -> None:
        mask = self._ALL | (self._ENTRIES if path.is_dir() else 0)
        number = self._libc.inotify_add_watch(self._fd, os.fsencode(path), mask)
        assert number >= 0, os.strerror(ctypes.get_errno())
        self._names[number] = path.name

    def seen(self) -> list[str]:
        found = []
        with suppress(BlockingIOError):
            while data := os.read(self._fd, 1 << 16):
                while data:
                    number, mask, _, length = self._EVENT.unpack_from(data)
                    found.append(f"{self._names.get(number)}: {mask:#x}")
                    data = data[self._EVENT.size + length :]
        return found

    def close(self) -> None:
        os.close(self._fd)


@contextmanager
def _untouched(*paths: Path) -> Iterator[None]:
    """Fail unless these are as they were, and nobody has even opened them."""

    def facts() -> list[object]:
        told: list[object] = []
        for path in paths:
            info = path.lstat()
            xattrs = os.listxattr(path, follow_symlinks=False)
            told.append((path.name, info.st_mode, info.st_uid, info.st_gid, info.st_size, info.st_nlink))
            told += [info.st_mtime_ns, xattrs, sorted(os.listdir(path)) if path.is_dir() else None]
        return told

    before = facts()
    with closing(Watch()) as watch:
        for path in paths:
            if not path.is_symlink():
                watch.add(path)
        yield
        seen = watch.seen()
        assert not seen, seen[:20]
    assert facts() == before


# -- every operation on a key, after its name was swapped

Operation = Callable[[DirectoryLayer, PathKey], object]

ON_ANY: dict[str, Operation] = {
    "stat": lambda layer, key: layer.stat(key),
    "listxattr": lambda layer, key: layer.listxattr(key),
    "getxattr": lambda layer, key: layer.getxattr(key, b"user.note"),
    "setxattr": lambda layer, key: layer.setxattr(key, b"trusted.note", b"x"),
    "removexattr": lambda layer, key: layer.removexattr(key, b"user.note"),
    "handle": lambda layer, key: layer.handle(key),
    "chmod": lambda layer, key: layer.chmod(key, 0o4755),
    "chown": lambda layer, key: layer.chown(key, 1000, 1000),
    "utimens": lambda layer, key: layer.utimens(key, 0, 0),
    "link": lambda layer, key: layer.link(key, layer.root, b"linked"),
    "descriptor": lambda layer, key: os.close(layer.descriptor(key)),
    "replace": lambda layer, key: layer.rename((layer.root, b"spare"), (layer.root, key.name), 0, None, key),
}
ON_FILES: dict[str, Operation] = {
    **ON_ANY,
    "open": lambda layer, key: layer.open(key, os.O_RDONLY).close(),
    "open to write": lambda layer, key: layer.open(key, os.O_RDWR | os.O_TRUNC).close(),
    "truncate": lambda layer, key: layer.truncate(key, 0),
    "unlink": lambda layer, key: layer.unlink(layer.root, key.name, key),
}
ON_LINKS: dict[str, Operation] = {
    **{name: call for name, call in ON_ANY.items() if name not in {"chmod", "getxattr", "removexattr"}},
    "readlink": lambda layer, key: layer.readlink(key),
}
ON_DIRECTORIES: dict[str, Operation] = {
    **{name: call for name, call in ON_ANY.items() if name not in {"link", "replace"}},
    "readdir": lambda layer, key: layer.readdir(key),
    "names": lambda layer, key: layer.names(key),
    "lookup": lambda layer, key: layer.lookup(key, b"file"),
    "open_directory": lambda layer, key: layer.open_directory(key).close(),
    "create": lambda layer, key: layer.create(key, b"new", 0o600, 1000, 1000),
    "mkdir": lambda layer, key: layer.mkdir(key, b"new", 0o700, 1000, 1000),
    "symlink": lambda layer, key: layer.symlink(key, b"new", b"x", 1000, 1000),
    "mknod": lambda layer, key: layer.mknod(key, b"new", stat.S_IFIFO | 0o600, 0, 1000, 1000),
    "remove": lambda layer, key: layer.unlink(key, b"file", None),
    "move": lambda layer, key: layer.rename((key, b"file"), (layer.root, b"moved")),
    "rmdir": lambda layer, key: layer.rmdir(layer.root, key.name, key),
}

Swap = Callable[[Path, Path], object]
SWAPS: dict[str, Swap] = {
    "a link": lambda at, outside: at.symlink_to(outside),
    "a fifo": lambda at, _: os.mkfifo(at),
    "a device": lambda at, _: os.mknod(at, stat.S_IFCHR | 0o666, os.makedev(1, 3)),
    "a hard link": lambda at, outside: os.link(outside, at),
    "another file": lambda at, _: at.write_bytes(SECRET),
    "another directory": lambda at, _: build(at, {"file": SECRET}),
}

CASES = [
    *(("file", name, swap) for name in ON_FILES for swap in SWAPS),
    *(("symlink", name, swap) for name in ON_LINKS for swap in SWAPS),
    *(("dir", name, swap) for name in ON_DIRECTORIES for swap in SWAPS if swap != "a hard link"),
]


@needs_root
def test_what_has_taken_a_name_is_not_touched(tmp_path: Path) -> None:
    """By no operation: each says ESTALE, which makes the kernel look the name up again."""
    outside = tmp_path / "outside"
    build(outside, {"file": SECRET, "dir/file": SECRET})
    for number, (what, name, swap) in enumerate(CASES):
        top = tmp_path / f"in{number}"
        build(top, {"file": OWN, "dir/file": OWN, "spare": b"spare"})
        (top / "symlink").symlink_to("own")
        for marked in ("file", "dir"):
            os.setxattr(top / marked, "user.note", b"own")
        operations = {"file": ON_FILES, "symlink": ON_LINKS, "dir": ON_DIRECTORIES}[what]
        with closing(open_directory(str(top))) as layer:
            found = layer.lookup(layer.root, what.encode())
            assert found is not None
            (top / what).rename(tmp_path / f"was{number}")
            SWAPS[swap](top / what, outside / ("dir" if what == "dir" else "file"))
            victims = [outside / "file", outside / "dir", outside / "dir/file", top / what]
            if swap == "another directory":
                victims.append(top / what / "file")
            with _untouched(*victims):
                with pytest.raises(OSError) as raised:
                    operations[name](layer, found[0])
                assert raised.value.errno == errno.ESTALE, f"{name} of a {what}, now {swap}: {raised.value}"


@needs_root
@pytest.mark.parametrize("kind", ["file", "dir", "empty", "symlink", "node"])
def test_what_is_new_is_given_away_only_itself(tmp_path: Path, kind: str, monkeypatch: Any) -> None:
    """Somebody swaps a name right after it was made, before its owner is set."""
    top = tmp_path / "in"
    build(top, {"victim/file": SECRET, "other": SECRET})
    (top / "link").symlink_to("secret")
    os.mkfifo(top / "fifo")
    (top / "empty").mkdir()
    for name in ("link", "fifo", "empty"):
        os.utime(top / name, ns=(0, time.time_ns() - 10**9), follow_symlinks=False)
    victim = (
        top / {"file": "other", "dir": "victim", "empty": "empty", "symlink": "link", "node": "fifo"}[kind]
    )
    before = victim.lstat()
    calls = {"file": "open", "dir": "mkdir", "empty": "mkdir", "symlink": "symlink", "node": "mknod"}
    real = getattr(os, calls[kind])

    def made_and_swapped(*arguments: Any, **more: Any) -> Any:
        result = real(*arguments, **more)
        if b"new" in arguments:
            monkeypatch.undo()
            (top / "new").rename(top / "was")
            victim.rename(top / "new")
        return result

    with closing(open_directory(str(top))) as layer:
        monkeypatch.setattr(os, calls[kind], made_and_swapped)
        if kind == "file":
            layer.create(layer.root, b"new", 0o600, 1000, 1000)[1].close()
            assert (top / "was").lstat().st_uid == 1000
        else:
            with pytest.raises(OSError) as raised:
                if kind in {"dir", "empty"}:
                    layer.mkdir(layer.root, b"new", 0o700, 1000, 1000)
                elif kind == "symlink":
                    layer.symlink(layer.root, b"new", b"x", 1000, 1000)
                else:
                    layer.mknod(layer.root, b"new", stat.S_IFIFO | 0o600, 0, 1000, 1000)
            assert raised.value.errno == errno.ESTALE
    after = (top / "new").lstat()
    assert (after.st_ino, after.st_uid, after.st_mode) == (before.st_ino, before.st_uid, before.st_mode)


@needs_root
def test_a_lease_stops_nobody(nobody_path: Path) -> None:
    """A lease on a file delays an open for 45 seconds, unless the open does not block."""
    (nobody_path / "file").write_bytes(OWN)
    holder = os.open(nobody_path / "file", os.O_RDWR)
    fcntl.fcntl(holder, fcntl.F_SETSIG, 23)  # SIGURG, which is ignored, tells of the break
    fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    try:
        with closing(open_directory(str(nobody_path))) as layer:
            found = layer.lookup(layer.root, b"file")
            assert found is not None
            for call in (lambda: layer.open(found[0], os.O_RDONLY), lambda: layer.truncate(found[0], 1)):
                start = time.monotonic()
                with pytest.raises(BlockingIOError):
                    call()
                assert time.monotonic() - start < 20
    finally:
        os.close(holder)


@needs_root
@needs_fuse
def test_what_is_replaced_in_a_lower_is_found_again(nobody_path: Path) -> None:
    """This is no error: the kernel looks the name up again, and gets the new file or directory."""
    lower = nobody_path / "lower"
    build(lower, {"file": b"old", "dir/file": b"old", "written": b"old", "moded": b"old"})
    with mounted(lower, nobody_path / "mnt") as here:
        for name in ("file", "dir/file", "written", "moded"):
            assert (here.path / name).read_bytes() == b"old"
            os.link(lower / name, nobody_path / f"was-{name.replace('/', '-')}")  # keeps its inode number
            (lower / "new").write_bytes(b"newer")
            (lower / "new").rename(lower / name)
        assert (here.path / "file").read_bytes() == b"newer"
        assert (here.path / "dir/file").read_bytes() == b"newer"
        (here.path / "moded").chmod(0o600)
        assert (here.path / "moded").read_bytes() == b"newer"
        with (here.path / "written").open("ab") as file:
            file.write(b"!")
        assert (here.path / "written").read_bytes() == b"newer!"
        assert (lower / "written").read_bytes() == b"newer" and (
            lower / "moded"
        ).stat().st_mode & 0o777 != 0o600


# -- at full speed

_SWAPPER = """
import ctypes, os, sys
rename = ctypes.CDLL(None).renameat2
top = os.open(sys.argv[1], os.O_PATH)
os.chdir(top)
kinds = [os.fsencode("stash/" + name) for name in sorted(os.listdir("stash"))]
print("ready", flush=True)
while os.getppid() != 1:
    for kind in kinds:
        for name in (b"file", b"dir"):
            rename(-100, name, -100, kind, 2)
            rename(-100, name, -100, kind, 2)
        for name in os.listdir(b"."):
            if name.startswith(b"new"):
                rename(-100, name, -100, kind, 2)
                rename(-100, name, -100, kind, 2)
"""
_MAY_BE = {
    *(errno.ESTALE, errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.ELOOP),
    *(errno.EPERM, errno.EINVAL, errno.ENODATA, errno.EXDEV, errno.ENXIO),
}


def _others(top: Path, outside: Path) -> list[Path]:
    """Make what the names are swapped for, in ``stash``; return what nobody may touch of that."""
    build(top / "stash", {"b-file": SECRET, "c-dir/file": SECRET})
    os.link(outside / "linked", top / "stash/d-hard")
    (top / "stash/e-link").symlink_to(outside / "file")
    (top / "stash/f-dirlink").symlink_to(outside)
    os.mkfifo(top / "stash/g-fifo")
    os.mknod(top / "stash/h-device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(top / "stash/i-disk", stat.S_IFBLK | 0o666, os.makedev(7, 250))
    kept = [top / "stash" / name for name in os.listdir(top / "stash")]
    os.chown(top / "stash", NOBODY, NOBODY)
    return [path for path in kept if not path.is_symlink()] + [top / "stash/c-dir/file"]


class Hammer:
    """Does everything that a layer can do to ``file`` and ``dir``, if these are what they were."""

    def __init__(self, layer: DirectoryLayer) -> None:
        self.layer = layer
        found = {name: layer.lookup(layer.root, name) for name in (b"file", b"dir")}
        self._inos = {name: there[1].st_ino for name, there in found.items() if there is not None}
        self.longest = 0.0
        self.count = 0
        self.outcomes: dict[object, int] = {}

    def strike(self) -> None:
        for name, operations in ((b"file", ON_FILES), (b"dir", ON_DIRECTORIES)):
            for called, operation in operations.items():
                if called in {"unlink", "rmdir", "replace", "open to write", "remove", "move", "truncate"}:
                    continue
                self._one(called, partial(self._on, name, operation))
        self._one("read", self._read)
        self._one("write", self._write)
        self._one("below", self._below)
        self._one("made", self._made)

    def _one(self, called: str, call: Callable[[], object]) -> None:
        start = time.monotonic()
        outcome: object = "done"
        try:
            call()
        except OSError as failure:
            assert failure.errno in _MAY_BE, f"{called}: {failure!r}"
            outcome = failure.errno
        self.longest = max(self.longest, time.monotonic() - start)
        self.count += 1
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    def _key(self, name: bytes) -> PathKey:
        found = self.layer.lookup(self.layer.root, name)
        if found is None or found[1].st_ino != self._inos[name]:
            raise OSError(errno.ENOENT, "is something else just now")
        return found[0]

    def _on(self, name: bytes, operation: Operation) -> None:
        key = self._key(name)
        try:
            operation(self.layer, key)
        finally:
            self.layer.forget(key)

    def _read(self) -> None:
        with closing(self.layer.open(self._key(b"file"), os.O_RDONLY)) as file:
            assert file.pread(100, 0) in {OWN, b""}

    def _write(self) -> None:
        key = self._key(b"file")
        self.layer.truncate(key, 0)
        with closing(self.layer.open(key, os.O_RDWR)) as file:
            file.pwrite(OWN, 0)

    def _below(self) -> None:
        key = self._key(b"dir")
        found = self.layer.lookup(key, b"file")
        assert found is not None
        with closing(self.layer.open(found[0], os.O_RDONLY)) as file:
            assert file.pread(100, 0) == OWN
        assert set(names_of(self.layer, key)) >= {b"file"}
        self.layer.forget(found[0])
        self.layer.forget(key)

    def _made(self) -> None:
        layer, root = self.layer, self.layer.root
        made: list[Callable[[], Any]] = [
            lambda: layer.create(root, b"new1", 0o600, 1000, 1000),
            lambda: layer.mkdir(root, b"new2", 0o700, 1000, 1000),
            lambda: layer.symlink(root, b"new3", b"x", 1000, 1000),
            lambda: layer.mknod(root, b"new4", stat.S_IFIFO | 0o600, 0, 1000, 1000),
            lambda: layer.rename((root, b"new1"), (root, b"new5"), RENAME_NOREPLACE),
        ]
        for call in made:
            with suppress(OSError):
                call()


def _tidy(top: Path, places: dict[int, str]) -> None:
    """Put everything back in its place, and remove what is new, while nobody swaps."""
    loose = top.parent / "loose"
    loose.mkdir(exist_ok=True)
    found = [*top.iterdir(), *(top / "stash").iterdir()]
    for number, path in enumerate(found):
        if path == top / "stash" or places.get(path.lstat().st_ino) == str(path.relative_to(top)):
            continue
        path.rename(loose / str(number))
    for path in loose.iterdir():
        place = places.get(path.lstat().st_ino)
        if place is not None and not os.path.lexists(top / place):
            path.rename(top / place)
    run("rm", "-rf", loose, *((top / "dir").glob("new*")))


@contextmanager
def _swapper(top: Path) -> Iterator[Callable[[], None]]:
    """Another user's process that swaps names in *top*; what is yielded puts all in its place meanwhile."""
    places = {
        path.lstat().st_ino: str(path.relative_to(top))
        for path in (*top.iterdir(), *(top / "stash").iterdir())
    }
    process = subprocess.Popen(
        [*as_nobody_prefix(), sys.executable, "-c", _SWAPPER, str(top)], stdout=subprocess.PIPE
    )

    def tidy() -> None:
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        _tidy(top, places)
        process.send_signal(signal.SIGCONT)

    try:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        yield tidy
    finally:
        process.kill()
        process.communicate()
        _tidy(top, places)


def _hammer(top: Path, seconds: float, *, guarded: bool) -> Hammer:
    outside, inside = top / "outside", top / "in"
    build(outside, {"file": SECRET, "linked": SECRET})
    outside.chmod(0o700)
    build(inside, {"file": OWN, "dir/file": OWN})
    kept = [outside, outside / "file", outside / "linked", *_others(inside, outside)]
    for mine in (inside, inside / "file", inside / "dir"):
        os.chown(mine, NOBODY, NOBODY)
    if guarded:
        os.seteuid(NOBODY)
    try:
        layer = open_directory(str(inside))
    finally:
        os.seteuid(0)
    with closing(layer):
        hammer = Hammer(layer)
        with _untouched(*kept), _swapper(inside) as tidy:
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                for _ in range(10):
                    hammer.strike()
                tidy()
    return hammer


@pytest.fixture
def unseen(nobody_path: Path) -> Iterator[Path]:
    """A directory of nobody's on an ext4 that is mounted in the run's own mount namespace alone.

    Whoever else looks through /tmp, with find(1) say, would be seen to open what nobody may.
    """
    image, place = nobody_path / "image", nobody_path / "unseen"
    with image.open("wb") as out:
        out.truncate(64 << 20)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-E", f"root_owner={NOBODY}:{NOBODY}", image)
    place.mkdir()
    run("mount", "-o", "loop", image, place)
    try:
        yield place
    finally:
        run("umount", place)


@needs_root
@pytest.mark.parametrize(
    "seconds", [2, pytest.param(60, marks=[pytest.mark.nightly, pytest.mark.slow, pytest.mark.timeout(300)])]
)
@pytest.mark.parametrize("guarded", [False, True], ids=["in a mount of its own", "guarded"])
def test_every_operation_while_names_are_swapped(unseen: Path, seconds: float, guarded: bool) -> None:
    """Nothing outside, and nothing else inside, is opened, read or changed; no call waits."""
    hammer = _hammer(unseen, seconds, guarded=guarded)
    print(f"{hammer.count} calls, the longest {hammer.longest:.3f} s: {hammer.outcomes}")
    assert hammer.longest < 10
    assert hammer.outcomes.get("done", 0) > 100 and hammer.outcomes.get(errno.ESTALE, 0) > 0, hammer.outcomes


# -- no call by name but in one file

_BY_NAME = {
    *("access", "chdir", "chflags", "chmod", "chown", "chroot", "getxattr", "lchmod", "lchown", "link"),
    *(
        "listdir",
        "listxattr",
        "lstat",
        "makedirs",
        "mkdir",
        "mkfifo",
        "mknod",
        "open",
        "pathconf",
        "readlink",
    ),
    *("remove", "removedirs", "removexattr", "rename", "renames", "replace", "rmdir", "scandir", "setxattr"),
    *("stat", "statvfs", "symlink", "truncate", "unlink", "utime", "walk", "fwalk"),
}
"""The functions of :mod:`os` that take a name. For descriptors there are others: fstat, fchmod."""
_OF_PATHS = {"exists", "lexists", "isfile", "isdir", "islink", "ismount", "realpath", "getsize", "samefile"}
_OTHERS = {"shutil", "pathlib", "glob", "tempfile", "subprocess"}
"""Modules that are nothing but calls by name."""
_ALLOWED = {"beneath.py"}


def _calls_by_name(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name.partition(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                names = {node.module or ""} | ({"from os"} if node.module in {"os", "os.path"} else set())
            yield from (f"line {node.lineno}: {name}" for name in names & (_OTHERS | {"from os"}))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open":
            yield f"line {node.lineno}: open()"
        elif isinstance(node, ast.Attribute):
            of = ast.unparse(node.value)
            if (of == "os" and node.attr in _BY_NAME) or (of == "os.path" and node.attr in _OF_PATHS):
                yield f"line {node.lineno}: {of}.{node.attr}"
            elif of == "files" and node.attr in {"open_beneath", "stat_beneath", "file_handle"}:
                yield f"line {node.lineno}: {of}.{node.attr}"


@pytest.mark.parametrize(
    "source",
    [
        *("import os\nos.chmod(path, 0)", "import os\ncall = os.unlink", "open('x')", "import shutil"),
        *("from os import stat", "import os\nos.path.isdir(x)", "from pathlib import Path"),
        "from cowfs.linux import files\nfiles.stat_beneath(1, b'x')",
    ],
)
def test_calls_by_name_are_seen(source: str) -> None:
    assert list(_calls_by_name(source))


def test_layers_make_no_calls_by_name() -> None:
    """But for the one module that checks what it gets, :mod:`cowfs.layers.beneath`."""
    found = [
        f"{path.name}: {call}"
        for path in sorted((ROOT / "cowfs/layers").glob("*.py"))
        if path.name not in _ALLOWED
        for call in _calls_by_name(path.read_text())
    ]
    assert found == []


_INSIDE_A_STORE = [
    *("format/layout", "format/mark", "format/header", "format/copy_detection", "format/checkpoints"),
    *("format/records", "served/store"),
]
"""Modules that read and write what stands in a store: they do it by its layer."""


@pytest.mark.parametrize("module", _INSIDE_A_STORE)
def test_what_is_in_a_store_is_reached_by_its_layer(module: str) -> None:
    found = list(_calls_by_name((ROOT / f"cowfs/store/{module}.py").read_text()))
    assert found == []
