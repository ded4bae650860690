r"""Write changes as a patch for ``git apply``.

Lines that begin with ``#``, which ``git apply`` and patch(1) skip, describe what git's format cannot express:
owners, modes other than 644 and 755, extended attributes, devices, fifos, sockets, empty directories. The
format is that of git-diff(1), "Generating patch text with -p"; binary files have the format of git's
``--binary`` (``GIT binary patch``: pieces of zlib data in base 85, each with its length as a letter).
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import os
import stat
import subprocess
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from cowfs.changes.pairs import Pair, Sides, files, git_mode, in_git, text
from cowfs.changes.version import Version
from cowfs.errors import SystemFailure
from cowfs.linux import programs
from cowfs.types import Change

_NULL = b"/dev/null"
_NO_BLOB = b"0" * 40
_LOOKED_AT = 8000
"""A file with a NUL in its first 8000 bytes is binary, as in git (buffer_is_binary() in
xdiff-interface.c)."""
_LARGEST_TEXT = 64 << 20
"""Bytes of the largest file that is compared by lines."""
_LARGEST = 256 << 20
"""Bytes of the largest file in a patch: both versions are read into memory, and sparse files can be huge."""
_COMPARED_HERE = 400
"""Old lines times new lines up to which difflib is faster than starting diff(1)."""
_PIECE = 52
"""Bytes in a line of a binary patch."""


@dataclass(slots=True)
class Counts:
    """The size of a change, for ``--stat``."""

    path: bytes
    source: bytes | None
    added: int = 0
    removed: int = 0
    sizes: tuple[int, int] | None = None
    """Bytes before and after, if the file is not compared by lines."""


def patch(changes: Iterable[Change], sides: Sides, *, binary: bool = False) -> Iterator[bytes]:
    """Yield a patch in pieces, one for each file, with line ends.

    diff(1) compares texts. A binary file is one line with its sizes; with *binary*, the patch has its whole
    content. Blocks. OSError; SystemFailure if diff(1) is missing.
    """
    for file in files(changes, sides):
        yield file + b"\n" if isinstance(file, bytes) else patch_of(file, binary=binary)


def stat_of(changes: Iterable[Change], sides: Sides) -> Iterator[Counts]:
    """Yield the numbers of lines added to and removed from each file. Blocks and raises as :func:`patch`."""
    for file in files(changes, sides):
        if isinstance(file, bytes) or not (in_git(file.old) or in_git(file.new)):
            continue
        source = file.old_path if file.old_path != file.new_path else None
        counts = Counts(file.new_path, source)
        if _is_too_large(file):
            counts.sizes = _size(file.old), _size(file.new)
            yield counts
            continue
        old, new = _data(file.old), _data(file.new)
        if _is_binary(old) or _is_binary(new):
            counts.sizes = len(old), len(new)
        elif not old or not new:
            counts.added, counts.removed = _count_lines(new), _count_lines(old)
        else:
            for line in _hunks(old, new):
                counts.added += line.startswith(b"+")
                counts.removed += line.startswith(b"-")
        yield counts


def patch_of(file: Pair, *, binary: bool) -> bytes:
    """Return the patch of one file; empty if git sees no difference. Blocks and raises as :func:`patch`."""
    remarks = _special(file)
    if _is_too_large(file):
        lengths = _size(file.old), _size(file.new)
        return b"# %s: %d -> %d bytes, too large for a patch\n" % (text(file.new_path), *lengths)
    old = file.old if in_git(file.old) else None
    new = file.new if in_git(file.new) else None
    if old is None and new is None:
        return remarks
    if old is None or new is None:  # git sees no rename
        at = file.new_path if old is None else file.old_path
        if binary and old is None and file.old is not None and not file.old.is_dir and file.old_path == at:
            # git apply refuses to create a file that exists, and then applies nothing.
            return b"# %s: %s became a file, which a patch cannot tell\n" % (
                text(at),
                _kind(file.old.attr.st_mode),
            )
        return remarks + _patch_of(Pair(at, at, old, new), binary=binary)
    return _patch_of(Pair(file.old_path, file.new_path, old, new), binary=binary)


def _special(file: Pair) -> bytes:
    """Return a comment for each version of a file whose type git does not store."""
    if file.old is not None and file.new is not None and not (in_git(file.old) or in_git(file.new)):
        if stat.S_IFMT(file.old.attr.st_mode) == stat.S_IFMT(file.new.attr.st_mode):
            if file.old_path == file.new_path or file.new.is_dir:
                return b""
            names = text(file.new_path), _kind(file.new.attr.st_mode), text(file.old_path)
            return b"# %s: %s renamed from %s, which a patch cannot tell\n" % names
    comments = b""
    for version, path, word in ((file.old, file.old_path, b"deleted"), (file.new, file.new_path, b"added")):
        if version is not None and not in_git(version) and not version.is_dir:
            kind = _kind(version.attr.st_mode)
            comments += b"# %s: %s %s, which a patch cannot tell\n" % (text(path), kind, word)
    return comments


def _patch_of(file: Pair, *, binary: bool) -> bytes:
    """Return the patch of a file; git stores the type of each version that exists."""
    old, new = file.old, file.new
    if old is not None and new is not None and stat.S_IFMT(git_mode(old)) != stat.S_IFMT(git_mode(new)):
        gone, come = (
            Pair(file.old_path, file.old_path, old, None),
            Pair(file.new_path, file.new_path, None, new),
        )
        return _patch_of(gone, binary=binary) + _patch_of(come, binary=binary)
    before, after = _data(old), _data(new)
    head = [b"diff --git %s %s\n" % (_quoted(b"a/" + file.old_path), _quoted(b"b/" + file.new_path))]
    if old is None:
        head.append(b"new file mode %06o\n" % git_mode(new))
    elif new is None:
        head.append(b"deleted file mode %06o\n" % git_mode(old))
    elif git_mode(old) != git_mode(new):
        head.append(b"old mode %06o\nnew mode %06o\n" % (git_mode(old), git_mode(new)))
    if file.old_path != file.new_path:
        head.append(b"similarity index %d%%\n" % _similarity(before, after))
        head.append(b"rename from %s\nrename to %s\n" % (_quoted(file.old_path), _quoted(file.new_path)))
    if before == after and old is not None and new is not None:
        return b"".join(head) if len(head) > 1 else b""
    mode = b" %06o" % git_mode(old) if old and new and git_mode(old) == git_mode(new) else b""
    head.append(b"index %s..%s%s\n" % (_blob(old, before), _blob(new, after), mode))
    names = (_NULL if old is None else b"a/" + file.old_path, _NULL if new is None else b"b/" + file.new_path)
    if _is_binary(before) or _is_binary(after):
        if binary:
            return b"".join([*head, b"GIT binary patch\n", _literal(after), _literal(before)])
        sizes = b"%d -> %d bytes" % (len(before), len(after))
        return b"".join([*head, b"Binary files %s and %s differ\n# %s\n" % (*map(_quoted, names), sizes)])
    hunks = _hunks(before, after)
    if hunks:
        head.append(b"--- %s\n+++ %s\n" % tuple(map(_named, names)))
    return b"".join([*head, *hunks])


def _size(version: Version | None) -> int:
    return version.attr.st_size if version is not None and version.is_file else 0


def _is_too_large(file: Pair) -> bool:
    return max(_size(file.old), _size(file.new)) > _LARGEST


def _kind(mode: int) -> bytes:
    if stat.S_ISFIFO(mode):
        return b"fifo"
    return b"socket" if stat.S_ISSOCK(mode) else b"device"


def _data(version: Version | None) -> bytes:
    return version.read() if version is not None and in_git(version) else b""


def _is_binary(data: bytes) -> bool:
    return b"\0" in data[:_LOOKED_AT] or len(data) > _LARGEST_TEXT


def _blob(version: Version | None, data: bytes) -> bytes:
    """Return git's object ID of a file's content: that of a blob, gitformat-pack(5)."""
    if version is None:
        return _NO_BLOB
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest().encode()


def _similarity(before: bytes, after: bytes) -> int:
    if before == after:
        return 100
    if max(len(before), len(after)) > 1 << 16:
        return 50
    return min(99, int(100 * difflib.SequenceMatcher(None, before, after, autojunk=True).quick_ratio()))


def _literal(data: bytes) -> bytes:
    packed = zlib.compress(data)
    lines = [b"literal %d\n" % len(data)]
    for start in range(0, len(packed), _PIECE):
        piece = packed[start : start + _PIECE]
        length = len(piece)
        letter = bytes([ord("A") + length - 1 if length <= 26 else ord("a") + length - 27])
        lines.append(letter + base64.b85encode(piece, pad=True) + b"\n")
    return b"".join([*lines, b"\n"])


def _hunks(before: bytes, after: bytes) -> list[bytes]:
    """Return the hunks of the unified diff of two texts, without the header lines."""
    if not before or not after:
        return _whole(before, b"-") if before else _whole(after, b"+")
    one, other = _lines(before), _lines(after)
    if len(one) * len(other) <= _COMPARED_HERE:
        return _compared(one, other)
    program = programs.find("diff")
    if program is None:
        raise SystemFailure("diff is not installed", "apt install diffutils")
    with ExitStack() as stack:
        fds = [stack.enter_context(_in_memory(data)) for data in (before, after)]
        done = subprocess.run(
            [program, "-a", "-u", *(f"/proc/self/fd/{fd}" for fd in fds)],
            stdin=subprocess.DEVNULL, capture_output=True, check=False, pass_fds=fds,
            env=programs.environment(),
        )  # fmt: skip
    if done.returncode > 1:
        raise SystemFailure(f"diff failed: {done.stderr.decode(errors='replace').strip()}")
    return _lines(done.stdout)[2:]


def _compared(before: list[bytes], after: list[bytes]) -> list[bytes]:
    """Return the hunks of a few lines, without starting a process."""
    found = list(difflib.diff_bytes(difflib.unified_diff, before, after, lineterm=b"\n"))[2:]
    return [line if line.endswith(b"\n") else line + b"\n\\ No newline at end of file\n" for line in found]


def _whole(data: bytes, sign: bytes) -> list[bytes]:
    """Return the one hunk of a text that was added or removed as a whole, in pieces."""
    lines = _count_lines(data)
    if not lines:
        return []
    count = b"1" if lines == 1 else b"1,%d" % lines
    places = (count, b"0,0") if sign == b"-" else (b"0,0", count)
    ended = data.endswith(b"\n")
    signed = sign + (data[:-1] if ended else data).replace(b"\n", b"\n" + sign)
    return [b"@@ -%s +%s @@\n" % places, signed, b"\n" if ended else b"\n\\ No newline at end of file\n"]


def _count_lines(data: bytes) -> int:
    return data.count(b"\n") + (data[-1:] not in {b"", b"\n"})


def _lines(data: bytes) -> list[bytes]:
    """Split at newlines only, and keep them."""
    lines = data.split(b"\n")
    last = lines.pop()
    return [line + b"\n" for line in lines] + ([last] if last else [])


@contextmanager
def _in_memory(data: bytes) -> Iterator[int]:
    """Put *data* into a file in memory; yield its descriptor, from which a program can read it."""
    with open(os.memfd_create("cowfs-diff", os.MFD_CLOEXEC), "r+b") as file:
        file.write(data)
        file.flush()
        yield file.fileno()


def _quoted(path: bytes) -> bytes:
    """Quote a path if git would: core.quotePath in git-config(1)."""
    if all(0x20 <= byte < 0x7F and byte not in b'"\\' for byte in path):
        return path
    shown = b"".join(
        _ESCAPES.get(byte) or (bytes([byte]) if 0x20 <= byte < 0x7F else b"\\%03o" % byte) for byte in path
    )
    return b'"%s"' % shown


_ESCAPES = {
    7: b"\\a", 8: b"\\b", 9: b"\\t", 10: b"\\n", 11: b"\\v", 12: b"\\f", 13: b"\\r", 34: b'\\"', 92: b"\\\\"
}  # fmt: skip


def _named(path: bytes) -> bytes:
    """Return a path for a ``---`` line. A tab ends a name that contains spaces."""
    quoted = _quoted(path)
    return quoted + b"\t" if b" " in path and quoted == path else quoted
