"""Run the small cases as an ordinary user, on cowfs and on the kernel's overlayfs in a user namespace.

``python -m tests.parity.ordinary`` reads a pickled :class:`Work` on stdin, and writes the results to stdout.
The user has the same user ID in the namespace, and uses its capabilities there only for mounting.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.parity.places import Place
from tests.parity.quick import load
from tests.parity.runs import look, run_steps
from tests.support import tree, upper
from tests.support.mounts import KERNEL_OPTIONS, project_root
from tests.support.system import NOBODY, as_nobody_prefix

P = "user.overlay."
ROOTS = "roots kernel"
_NEWUSER, _NEWNS, _REC, _PRIVATE = 0x10000000, 0x20000, 0x4000, 1 << 18
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Work:
    """What to do with a store."""

    system: str
    """``cowfs``, ``kernel`` (mounted in a user namespace), or ``roots kernel`` (mounted by root outside)."""
    at: Path
    lowers: Sequence[Path]
    store: Path
    kind: str
    names: Sequence[str]
    runs: bool = True
    """Whether to run the cases before taking a snapshot of each."""


def run_as_nobody(work: Work) -> Any:
    """Do *work* as nobody; return the :class:`~tests.parity.runs.Seen`, or the snapshots."""
    prefix = [] if work.system == ROOTS else as_nobody_prefix()
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "tests.parity.ordinary"],
        input=pickle.dumps(work), capture_output=True, cwd="/", timeout=1800,
        env={**os.environ, "PYTHONPATH": project_root(), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return pickle.loads(done.stdout)


def build(root: Path, description: tree.Tree, prefix: str) -> None:
    """Build a lower tree of nobody's, as the kernel's overlayfs in a user namespace needs it.

    It has no devices, because a user who cannot create devices cannot copy them up.
    """
    usable = {path: node for path, node in description.items() if isinstance(node, bytes) or not node.rdev}
    tree.build(root, {path: _with_prefix(node, prefix) for path, node in usable.items()})
    for place, names, files in os.walk(os.fsencode(root)):
        for name in [b".", *names, *files]:
            os.lchown(os.path.join(place, name), NOBODY, NOBODY)


def _with_prefix(content: tree.Node | bytes, prefix: str) -> tree.Node:
    """Return a node whose overlay attributes have this prefix, without other attributes that need root."""
    node = tree.Node(data=content) if isinstance(content, bytes) else content
    xattrs = {name.replace(upper.P, prefix): value for name, value in node.xattrs.items()}
    return replace(node, xattrs={name: xattrs[name] for name in xattrs if name.startswith(("user.", prefix))})


class _UsersPlace(Place):
    """A store of nobody's. The kernel mounts it in a user namespace, where it has fewer features."""

    features = "userxattr,xino=on"

    @contextmanager
    def kernel(self) -> Iterator[None]:
        for name in ("upper", "work"):
            if not (self.store / name).exists():
                (self.store / name).mkdir(parents=True)
                os.utime(self.store / name, ns=(tree.EPOCH_NS, tree.EPOCH_NS))
        layers = f"upperdir={self.store}/upper,workdir={self.store}/work"
        options = f"lowerdir={':'.join(map(str, self.lowers))},{layers},{self.features}"
        with self.capable():
            _check(_libc.mount(b"overlay", os.fsencode(self.at), b"overlay", 0, options.encode()), "mount")
        try:
            yield
        finally:
            with self.capable():
                _check(_libc.umount2(os.fsencode(self.at), 0), "umount")

    @contextmanager
    def capable(self) -> Iterator[None]:
        """Run the block with all capabilities in effect."""
        _put_in_effect(True)
        try:
            yield
        finally:
            _put_in_effect(False)

    def by(self, system: str) -> AbstractContextManager[None]:
        return self.cowfs() if system == "cowfs" else self.kernel()


class _RootsPlace(_UsersPlace):
    """A store that root mounts for nobody."""

    features = KERNEL_OPTIONS

    @contextmanager
    def capable(self) -> Iterator[None]:
        os.seteuid(0)
        try:
            yield
        finally:
            os.seteuid(NOBODY)


def _check(result: int, what: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), what)


def _put_in_effect(wanted: bool) -> None:
    header, sets = struct.pack("Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
    _check(_libc.capget(header, sets), "capget")
    words = list(struct.unpack("6I", sets.raw))
    words[0], words[3] = (words[1], words[4]) if wanted else (0, 0)
    _check(_libc.capset(header, struct.pack("6I", *words)), "capset")


def _enter_user_namespace() -> None:
    """Enter a user namespace as the same user, with all capabilities permitted but not in effect."""
    _check(_libc.unshare(_NEWUSER), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{NOBODY} {NOBODY} 1")
    Path("/proc/self/gid_map").write_text(f"{NOBODY} {NOBODY} 1")
    _check(_libc.unshare(_NEWNS), "unshare")
    _check(_libc.mount(None, b"/", None, _REC | _PRIVATE, None), "mount --make-rprivate /")
    _put_in_effect(False)


def main() -> None:
    work: Work = pickle.loads(sys.stdin.buffer.read())
    answer = os.dup(1)
    os.dup2(2, 1)
    cases = {name: case for name, case in load().items() if name in work.names}
    os.umask(0o022)
    if work.system == "kernel":
        _enter_user_namespace()
    elif work.system == ROOTS:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, 0)
    kind = _RootsPlace if work.system == ROOTS else _UsersPlace
    place = kind(work.at, work.lowers, work.store, work.kind, made=not work.runs)
    if work.kind == "image":
        place.options = ["whiteouts=userxattr"]
    result: Any = look(cases, work.system, place) if not work.runs else None
    if work.runs:
        result = run_steps(cases, work.system, place, ",".join(work.names))
        result.again = look(cases, work.system, place)
    with os.fdopen(answer, "wb") as out:
        pickle.dump(result, out)


if __name__ == "__main__":
    main()
