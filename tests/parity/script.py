"""The script of a case: operations on a merged tree, recorded with their results or errnos.

It runs in its own child process for each system (see :mod:`tests.parity.child`), so that no other case shares
its descriptors, working directory and credentials. Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import pickle
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.support import tree

RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Step:
    """One step of a case, and its result."""

    said: str
    result: Any = None
    snapshot: tree.Snapshot | None = None
    expected: dict[str, Any] | None = None
    """If cowfs differs on purpose, the result that each system must give."""
    reason: str = ""


@dataclass
class Case:
    """A case: a function that acts on a :class:`Script`, and its layers."""

    name: str
    act: Callable[[Script], None]
    lowers: tuple[tree.Tree, ...]
    upper: tree.Tree | None = None
    upper_differs: str = ""
    """Why the uppers differ after this case, although the merged trees are equal; "" if they are equal."""
    alone: bool = False
    """Whether it needs its own mount, because it is about the root or the whole filesystem."""
    doc: str = ""


CASES: dict[str, Case] = {}


def case(
    *lowers: tree.Tree, upper: tree.Tree | None = None, upper_differs: str = "", alone: bool = False
) -> Callable[[Callable[[Script], None]], Callable[[Script], None]]:
    """Register a case with *lowers*, topmost first, by the name of its function."""

    def register(act: Callable[[Script], None]) -> Callable[[Script], None]:
        assert act.__name__ not in CASES, f"two cases are called {act.__name__}"
        CASES[act.__name__] = Case(
            act.__name__, act, lowers, upper, upper_differs, alone, (act.__doc__ or "").strip()
        )
        return act

    return register


@dataclass
class Script:
    """Operations below *root*; their paths are relative to it."""

    root: str
    system: str
    remount: Callable[[], None]
    steps: list[Step] = field(default_factory=list)

    # -- recording ---------------------------------------------------------------------------

    def step(self, said: str, operation: Callable[[], Any], *, look: bool = True) -> Any:
        """Do *operation*, record its result or errno, and take a snapshot; return the result."""
        result = attempt(operation)
        self.steps.append(Step(said, result, self.look() if look else None))
        return result

    def look(self) -> tree.Snapshot:
        """Return a snapshot of the merged tree."""
        return tree.snapshot(self.root)

    def differs(
        self, reason: str, said: str, operation: Callable[[], Any], *, kernel: Any, cowfs: Any
    ) -> Any:
        """Do a step whose result on cowfs differs from the kernel's on purpose, for this *reason*."""
        result = self.step(said, operation)
        self.steps[-1].expected = {"kernel": kernel, "cowfs": cowfs}
        self.steps[-1].reason = reason
        return result

    def remounted(self) -> None:
        """Unmount and mount again. Everything must be unchanged, including inode numbers."""
        self.remount()
        self.steps.append(Step("remount", None, self.look()))

    def at(self, path: str | bytes) -> Any:
        """Return the full path."""
        if isinstance(path, bytes):
            return os.path.join(os.fsencode(self.root), path)
        return os.path.join(self.root, path)

    # -- files -------------------------------------------------------------------------------

    def create(self, path: str | bytes, data: bytes = b"", mode: int = 0o644) -> Any:
        """Create a file (O_EXCL) with *data*."""
        return self.open_do(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, lambda fd: os.write(fd, data), mode)

    def write(self, path: str | bytes, data: bytes, offset: int = 0) -> Any:
        """Write *data* at *offset* of an existing file."""
        return self.open_do(path, os.O_WRONLY, lambda fd: os.pwrite(fd, data, offset))

    def append(self, path: str | bytes, data: bytes) -> Any:
        """Append *data* with O_APPEND."""
        return self.open_do(path, os.O_WRONLY | os.O_APPEND, lambda fd: os.write(fd, data))

    def replace(self, path: str | bytes, data: bytes) -> Any:
        """Write with O_CREAT and O_TRUNC, as a shell's ``>`` does."""
        return self.open_do(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, lambda fd: os.write(fd, data))

    def open_do(
        self, path: str | bytes, flags: int, use: Callable[[int], Any] = lambda fd: None, mode: int = 0o644
    ) -> Any:
        """Open a file, use its descriptor, and close it; return the result of *use*."""

        def operation() -> Any:
            fd = os.open(self.at(path), flags, mode)
            try:
                return use(fd)
            finally:
                os.close(fd)

        return self.step(f"open {path!r} {flags:#o}", operation)

    def open(self, path: str | bytes, flags: int = os.O_RDONLY, mode: int = 0o644) -> int:
        """Open a file and keep it open; return the descriptor, or -1 if it failed."""
        kept: list[int] = []
        self.step(f"open {path!r} {flags:#o}, kept", lambda: kept.append(os.open(self.at(path), flags, mode)))
        return kept[0] if kept else -1

    def fd(self, said: str, operation: Callable[[], Any]) -> Any:
        """Do any operation on a descriptor."""
        return self.step(said, operation)

    def close(self, fd: int) -> Any:
        """Close a descriptor from :meth:`open`."""
        return self.step("close", lambda: os.close(fd))

    def read(self, path: str | bytes) -> Any:
        """Read the whole file."""

        def operation() -> bytes:
            with open(self.at(path), "rb") as file:
                return file.read()

        return self.step(f"read {path!r}", operation, look=False)

    def truncate(self, path: str | bytes, size: int) -> Any:
        """truncate(2)."""
        return self.step(f"truncate {path!r} {size}", lambda: os.truncate(self.at(path), size))

    # -- names -------------------------------------------------------------------------------

    def unlink(self, path: str | bytes) -> Any:
        """unlink(2)."""
        return self.step(f"unlink {path!r}", lambda: os.unlink(self.at(path)))

    def rmdir(self, path: str | bytes) -> Any:
        """rmdir(2)."""
        return self.step(f"rmdir {path!r}", lambda: os.rmdir(self.at(path)))

    def mkdir(self, path: str | bytes, mode: int = 0o755) -> Any:
        """mkdir(2)."""
        return self.step(f"mkdir {path!r}", lambda: os.mkdir(self.at(path), mode))

    def rename(self, old: str | bytes, new: str | bytes, flags: int = 0) -> Any:
        """renameat2(2). The inode must keep its number."""
        ino = attempt(lambda: os.lstat(self.at(old)).st_ino)

        def operation() -> Any:
            renameat2(self.at(old), self.at(new), flags)
            return "same inode" if os.lstat(self.at(new)).st_ino == ino else "another inode"

        return self.step(f"rename {old!r} {new!r} {flags}", operation)

    def link(self, old: str | bytes, new: str | bytes) -> Any:
        """link(2). If *old* is a symbolic link, link that itself."""
        return self.step(
            f"link {old!r} {new!r}", lambda: os.link(self.at(old), self.at(new), follow_symlinks=False)
        )

    def symlink(self, target: str | bytes, path: str | bytes) -> Any:
        """symlink(2)."""
        return self.step(f"symlink {target!r} {path!r}", lambda: os.symlink(target, self.at(path)))

    def mknod(self, path: str | bytes, kind: int, rdev: int = 0, mode: int = 0o600) -> Any:
        """mknod(2)."""
        return self.step(
            f"mknod {path!r} {kind:#o} {rdev}", lambda: os.mknod(self.at(path), kind | mode, rdev)
        )

    def listdir(self, path: str | bytes) -> Any:
        """List a directory, sorted."""
        return self.step(f"list {path!r}", lambda: sorted(os.listdir(self.at(path))), look=False)

    # -- attributes --------------------------------------------------------------------------

    def stat(self, path: str | bytes) -> Any:
        """lstat(2), without the fields that may differ."""

        def operation() -> Any:
            st = os.lstat(self.at(path))
            return oct(st.st_mode), st.st_uid, st.st_gid, st.st_size if stat.S_ISREG(st.st_mode) else 0

        return self.step(f"lstat {path!r}", operation, look=False)

    def chmod(self, path: str | bytes, mode: int) -> Any:
        """chmod(2)."""
        return self.step(f"chmod {path!r} {mode:o}", lambda: os.chmod(self.at(path), mode))

    def chown(self, path: str | bytes, uid: int, gid: int) -> Any:
        """lchown(2)."""
        return self.step(f"chown {path!r} {uid}:{gid}", lambda: os.lchown(self.at(path), uid, gid))

    def utime(self, path: str | bytes, mtime_ns: int) -> Any:
        """utimensat(2), of a symbolic link itself."""
        return self.step(
            f"utime {path!r}",
            lambda: os.utime(self.at(path), ns=(mtime_ns, mtime_ns), follow_symlinks=False),
        )

    def setxattr(self, path: str | bytes, name: str, value: bytes, flags: int = 0) -> Any:
        """lsetxattr(2)."""
        return self.step(
            f"setxattr {path!r} {name} {flags}",
            lambda: os.setxattr(self.at(path), name, value, flags, follow_symlinks=False),
        )

    def getxattr(self, path: str | bytes, name: str) -> Any:
        """lgetxattr(2)."""
        return self.step(
            f"getxattr {path!r} {name}",
            lambda: os.getxattr(self.at(path), name, follow_symlinks=False),
            look=False,
        )

    def listxattr(self, path: str | bytes) -> Any:
        """llistxattr(2), sorted."""
        return self.step(
            f"listxattr {path!r}",
            lambda: sorted(
                name
                for name in os.listxattr(self.at(path), follow_symlinks=False)
                if name not in tree.NOT_OURS
            ),
            look=False,
        )

    def removexattr(self, path: str | bytes, name: str) -> Any:
        """lremovexattr(2)."""
        return self.step(
            f"removexattr {path!r} {name}",
            lambda: os.removexattr(self.at(path), name, follow_symlinks=False),
        )

    # -- others ------------------------------------------------------------------------------

    def as_user(self, uid: int, said: str, operation: Callable[[], Any], gid: int | None = None) -> Any:
        """Do *operation* in a child process as *uid* and *gid*, without privileges."""
        return self.step(f"as {uid}: {said}", lambda: in_child(uid, uid if gid is None else gid, operation))


class Failed(OSError):
    """An errno from a child process."""


def in_child(uid: int, gid: int, operation: Callable[[], Any]) -> Any:
    """Run *operation* as another user; return its result, or raise its OSError.

    Who is not root cannot be another: nothing is done.
    """
    if os.geteuid() != 0:
        return None
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            answer = attempt(operation)
            os.write(writing, pickle.dumps(answer))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pickle.loads(pipe.read())
    os.waitpid(pid, 0)
    if isinstance(answer, str) and answer.startswith("errno "):
        raise Failed(getattr(errno, answer[6:]), "in the child")
    return answer


def attempt(operation: Callable[[], Any]) -> Any:
    """Return the result of *operation*, or ``errno NAME``."""
    try:
        return operation()
    except OSError as error:
        return f"errno {errno.errorcode.get(error.errno or 0, error.errno)}"


def renameat2(old: str | bytes, new: str | bytes, flags: int = 0) -> None:
    """renameat2(2) on two paths."""
    if _libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), ctypes.c_uint(flags)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def load_cases() -> dict[str, Case]:
    """Import every module of cases; return the cases."""
    import importlib
    from pathlib import Path

    for path in sorted(Path(__file__).parent.glob("cases_*.py")):
        importlib.import_module(f"tests.parity.{path.stem}")
    return CASES


def note(text: str) -> None:
    """Print to stderr, to debug a case."""
    print(text, file=sys.stderr)
