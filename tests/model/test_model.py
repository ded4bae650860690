"""Hypothesis searches for operations after which the union differs from a plain tree.

Between the operations the union is closed and opened again, and forgets what it knows of nodes; at the
end of each example the kernel mounts the same store, and must see the same tree.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.model.tree import EXCHANGE, NOREPLACE, Inode, Model
from tests.support import tree, upper
from tests.support.direct import Direct
from tests.support.mounts import kernel_overlay
from tests.support.tree import Snapshot

EXAMPLES = int(os.environ.get("COWFS_MODEL_EXAMPLES", "300"))
STEPS = int(os.environ.get("COWFS_MODEL_STEPS", "30"))
OLD = 1_000_000_000_000_000_000

NAMES = st.sampled_from("abc")
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
DATA = st.sampled_from([b"", b"x", b"hello\n", b"0123456789" * 20])
MODES = st.sampled_from([0o600, 0o644, 0o755, 0o4755, 0o2711])
LAYER = st.dictionaries(
    PATHS,
    st.one_of(
        DATA.map(lambda data: tree.Node(data=data, mode=0o640)),
        st.just(tree.directory(0o750)),
        st.just(tree.symlink("a")),
        st.just(tree.whiteout()),
        st.just(tree.opaque()),
        st.just(tree.Node(data=b"big", size=90_000)),
        st.builds(tree.link, PATHS),
    ),
    max_size=8,
)


def sound(
    layer: dict[str, tree.Node], below: dict[str, tree.Node] | None, *, is_below: bool = False
) -> dict[str, tree.Node]:
    """Leave out what cannot be built: names below a file, links to nothing, whiteouts that hide nothing.

    (In a directory that one layer alone has, overlayfs shows a whiteout as the device that it is.)
    """
    merged = {"", *(p for path, node in (below or {}).items() for p in _parents(path, node))}
    kept: dict[str, tree.Node] = {}
    for path, node in sorted(layer.items()):
        above = [path.rpartition("/")[0]]
        while above[-1]:
            above.append(above[-1].rpartition("/")[0])
        if any(kept[p].kind != "dir" for p in above if p in kept):
            continue
        is_whiteout = node.kind == "char"
        if is_whiteout and (
            below is None or above[0] not in merged or any(p in kept and kept[p].xattrs for p in above)
        ):
            continue
        if node.kind == "link" and (is_below or kept.get(node.target, tree.directory()).kind != "file"):
            continue  # a name may be hidden, which link counts do not show
        kept[path] = node
    return kept


def _parents(path: str, node: tree.Node) -> list[str]:
    parts = path.split("/")
    above = ["/".join(parts[:n]) for n in range(1, len(parts))]
    return [*above, path] if node.kind == "dir" else above


def load(model: Model, layers: list[dict[str, tree.Node]], places: list[Path]) -> None:
    """Put the merged tree of *layers* (topmost first) into the model."""
    known: dict[tuple[int, int], Inode] = {}
    for layer, place in zip(reversed(layers), reversed(places), strict=True):
        for path in sorted(str(p.relative_to(place)) for p in place.rglob("*")):
            st_ = os.lstat(place / path)
            parent, name = model.place(path)
            node = layer.get(path, tree.directory())
            before = parent.names.get(name)
            if node.kind == "char":
                parent.names.pop(name, None)
                continue
            inode = known.get((st_.st_dev, st_.st_ino))
            if inode is None:
                inode = Inode("dir" if stat.S_ISDIR(st_.st_mode) else node.kind)
                known[st_.st_dev, st_.st_ino] = inode
            if inode.kind == "dir" and before is not None and before.kind == "dir" and not _is_opaque(node):
                inode.names = before.names
            parent.names[name] = inode
            inode.mode, inode.mtime = st_.st_mode & 0o7777, st_.st_mtime_ns
            if inode.kind == "symlink":
                inode.data = os.fsencode(os.readlink(place / path))
            elif inode.kind == "file":
                inode.data = (place / path).read_bytes()
    top = os.lstat(places[0])
    model.root.mode, model.root.mtime = top.st_mode & 0o7777, top.st_mtime_ns


def _is_opaque(node: tree.Node) -> bool:
    return any(name.endswith(".overlay.opaque") for name in node.xattrs)


class UnionMachine(RuleBasedStateMachine):
    """Every rule does the same to the union and to the model."""

    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp(prefix="cowfs-model-", dir="/dev/shm"))
        self.model = Model()
        self.fs: Any = None
        self.handles: list[tuple[Any, Inode]] = []
        self.inos: dict[int, int] = {}

    @initialize(top=LAYER, bottom=LAYER, two=st.booleans(), caching=st.booleans(), slow=st.booleans())
    def build(
        self, top: dict[str, tree.Node], bottom: dict[str, tree.Node], two: bool, caching: bool, slow: bool
    ) -> None:
        below = sound(bottom, None, is_below=True) if two else None
        layers = [sound(top, below), *([below] if below is not None else [])]
        places = [self.place / f"lower{number}" for number in range(len(layers))]
        for place, layer in zip(places, layers, strict=True):
            tree.build(place, layer)
        load(self.model, layers, places)
        self.lowers = [str(place) for place in places]
        self.fs = Direct(str(self.place / "store"), self.lowers, slow=slow)
        self.fs.caching = caching
        self.look()

    def both(self, real: Callable[[], Any], model: Callable[[], Any]) -> Any:
        """Do it on both; both must raise the same errno, or none."""
        wanted = _errno_of(model)
        got = _errno_of(real)
        assert got == wanted, f"the union gave {got}, the model {wanted}"
        self.look()
        self.fs.done()

    def look(self) -> None:
        """Compare the whole trees."""
        assert compare(self.model.snapshot(), self.fs.snapshot(), self.inos) == []

    # -- rules -------------------------------------------------------------------------------

    @rule(path=PATHS, data=DATA, mode=MODES)
    def create(self, path: str, data: bytes, mode: int) -> None:
        self.both(
            lambda: self.fs.create(path, data, mode),
            lambda: self.model.add(path, Inode("file", mode, data=data)),
        )

    @rule(path=PATHS)
    def mkdir(self, path: str) -> None:
        def model() -> None:
            inherited = self.model.place(path)[0].mode & stat.S_ISGID
            self.model.add(path, Inode("dir", 0o755 | inherited))

        self.both(lambda: self.fs.mkdir(path), model)

    @rule(path=PATHS)
    def symlink(self, path: str) -> None:
        self.both(
            lambda: self.fs.symlink(b"target", path),
            lambda: self.model.add(path, Inode("symlink", 0o777, data=b"target")),
        )

    @rule(path=PATHS)
    def mkfifo(self, path: str) -> None:
        self.both(lambda: self.fs.mknod(path, 0o010600), lambda: self.model.add(path, Inode("fifo", 0o600)))

    @rule(path=PATHS)
    def unlink(self, path: str) -> None:
        self.both(lambda: self.fs.unlink(path), lambda: self.model.unlink(path))

    @rule(path=PATHS)
    def rmdir(self, path: str) -> None:
        self.both(lambda: self.fs.rmdir(path), lambda: self.model.rmdir(path))

    @rule(path=PATHS)
    def remove_tree(self, path: str) -> None:
        try:
            inode = self.model.find(path)
        except OSError:
            assume(False)
            return
        below = [f"{path}/{p}" if p != "." else path for p, _ in _subtree(inode)]
        for victim in reversed(below):
            if self.model.find(victim).kind == "dir":
                self.both(lambda v=victim: self.fs.rmdir(v), lambda v=victim: self.model.rmdir(v))  # type: ignore[misc]
            else:
                self.both(lambda v=victim: self.fs.unlink(v), lambda v=victim: self.model.unlink(v))  # type: ignore[misc]

    @rule(old=PATHS, new=PATHS, flags=st.sampled_from([0, 0, 0, NOREPLACE, EXCHANGE]))
    def rename(self, old: str, new: str, flags: int) -> None:
        self.both(lambda: self.fs.rename(old, new, flags), lambda: self.model.rename(old, new, flags))

    @rule(old=PATHS, new=PATHS)
    def link(self, old: str, new: str) -> None:
        self.both(lambda: self.fs.link(old, new), lambda: self.model.link(old, new))

    @rule(path=PATHS, data=DATA, offset=st.sampled_from([0, 3, 100]))
    def write(self, path: str, data: bytes, offset: int) -> None:
        inode = self.file(path)
        self.both(lambda: self.fs.write(path, data, offset), lambda: Model.write(inode, data, offset))

    @rule(path=PATHS, size=st.sampled_from([0, 1, 5, 1000]))
    def truncate(self, path: str, size: int) -> None:
        inode = self.file(path)
        self.both(lambda: self.fs.set(path, size=size), lambda: Model.truncate(inode, size))

    @rule(path=PATHS, data=DATA)
    def replace(self, path: str, data: bytes) -> None:
        inode = self.file(path)

        def model() -> None:
            Model.truncate(inode, 0)
            Model.write(inode, data, 0)

        self.both(lambda: self.fs.write(path, data, 0, os.O_WRONLY | os.O_TRUNC), model)

    @rule(path=PATHS, mode=MODES, uid=st.sampled_from([0, 1000]), mtime=st.sampled_from([OLD, OLD + 7]))
    def attributes(self, path: str, mode: int, uid: int, mtime: int) -> None:
        def model() -> None:
            inode = self.model.find(path)
            inode.uid, inode.mtime = uid, mtime
            if inode.kind != "symlink":
                inode.mode = mode

        def real() -> None:
            node = self.fs.find(path)
            self.fs.set(path, uid=uid)
            if node.mode & 0o170000 != 0o120000:
                self.fs.set(path, mode=mode)
            self.fs.set(path, mtime_ns=mtime)

        self.both(real, model)

    @rule(path=PATHS, name=st.sampled_from(["user.a", "user.b"]), value=st.sampled_from([b"", b"v"]))
    def setxattr(self, path: str, name: str, value: bytes) -> None:
        def model() -> None:
            inode = self.model.find(path)
            if inode.kind not in {"dir", "file"}:
                raise OSError(errno.EPERM, "user.* is for files and directories")
            inode.xattrs[name] = value

        self.both(lambda: self.fs.setxattr(path, name.encode(), value), model)

    @rule(path=PATHS, name=st.sampled_from(["user.a", "user.b"]))
    def removexattr(self, path: str, name: str) -> None:
        inode = self.inode(path)
        assume(inode.kind in {"dir", "file"})

        def model() -> None:
            if name not in inode.xattrs:
                raise OSError(errno.ENODATA, "no such attribute")
            del inode.xattrs[name]

        self.both(lambda: self.fs.removexattr(path, name.encode()), model)

    @rule(path=PATHS, writing=st.booleans())
    def open(self, path: str, writing: bool) -> None:
        inode = self.file(path)
        assume(len(self.handles) < 4)
        self.handles.append((self.fs.open(path, os.O_RDWR if writing else os.O_RDONLY), inode))
        self.look()

    @precondition(lambda self: self.handles)
    @rule(data=st.data(), content=DATA)
    def use(self, data: st.DataObject, content: bytes) -> None:
        """Read or write through a file that was opened earlier and may have no name left."""
        handle, inode = data.draw(st.sampled_from(self.handles))
        if handle.writable:
            self.fs.fs.write(handle, content, 1)
            if content:
                Model.write(inode, content, 1)
        assert handle.file.pread(1 << 20, 0) == inode.data
        self.look()

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        pair = data.draw(st.sampled_from(self.handles))
        self.handles.remove(pair)
        self.fs.fs.release_handle(pair[0])
        self.look()

    @rule()
    def forget(self) -> None:
        """Drop the caches of the kernel."""
        self.fs.forget()
        self.look()

    @rule()
    def remount(self) -> None:
        for handle, _inode in self.handles:
            self.fs.fs.release_handle(handle)
        self.handles.clear()
        self.fs.remount()
        self.look()

    # -- helpers -----------------------------------------------------------------------------

    def inode(self, path: str) -> Inode:
        """Return the model's inode; skip the rule if there is none."""
        try:
            return self.model.find(path)
        except OSError:
            assume(False)
            raise

    def file(self, path: str) -> Inode:
        """Return the model's inode of a regular file."""
        inode = self.inode(path)
        assume(inode.kind == "file")
        return inode

    def teardown(self) -> None:
        try:
            if self.fs is not None:  # otherwise nothing was built
                for handle, _inode in self.handles:
                    self.fs.fs.release_handle(handle)
                self.fs.close()
                self.by_the_kernel()
        finally:
            shutil.rmtree(self.place)

    def layers(self) -> list[str]:
        """Return the layers above the lowers, topmost first."""
        return []

    def by_the_kernel(self) -> None:
        """The kernel mounts the store and shows the tree of the model."""
        store = self.place / "store"
        assert upper.leftovers(str(store)) == []
        if os.geteuid() != 0:
            return
        with kernel_overlay([*self.layers(), *self.lowers], store, self.place / "mnt") as merged:
            assert compare(self.model.snapshot(), tree.snapshot(merged), None) == []


def _errno_of(operation: Callable[[], Any]) -> str | None:
    try:
        operation()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return None


def _subtree(inode: Inode) -> list[tuple[str, Inode]]:
    model = Model()
    model.root = inode
    return list(model.walk())


COMPARED = ("type", "mode", "owner", "mtime", "xattrs", "size", "content", "target", "nlink", "same_inode_as")


def compare(model: Snapshot, real: Snapshot, inos: dict[int, int] | None) -> list[str]:
    """Return all differences. *inos* has the number that each inode has shown so far."""
    wrong = [f"{path} is missing" for path in model.keys() - real.keys()]
    wrong += [f"{path} should not be there" for path in real.keys() - model.keys()]
    for path in sorted(model.keys() & real.keys()):
        one, two = model[path], real[path]
        for key in COMPARED:
            if key == "mtime" and one["mtime"] is None:
                continue
            if key == "nlink" and one["type"] == "dir":
                continue
            if one.get(key) != two.get(key):
                wrong.append(f"{path}: {key} should be {one.get(key)!r}, is {two.get(key)!r}")
        if inos is not None and inos.setdefault(one["ino"], two["ino"]) != two["ino"]:
            wrong.append(f"{path}: its inode number was {inos[one['ino']]}, is {two['ino']}")
    if inos is not None and len({real[path]["ino"] for path in real}) != len(
        {m["ino"] for m in model.values()}
    ):
        wrong.append("two inodes have one number")
    return wrong


UnionMachine.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    print_blob=True,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
TestModel = pytest.mark.timeout(600)(
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: whiteouts, owners, trusted xattrs")(
        UnionMachine.TestCase
    )
)
