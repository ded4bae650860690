r"""Write changes as text for people, and as JSON for programs and the daemon's control socket.

A line of text has a letter, the path, and what differs::

    A  etc/new.conf
    M  etc/fstab  (content, times)
    D  usr/share/doc/
    R  old/ -> new/  (mode)

A directory ends with a slash; the root of the tree is ``/``. Unprintable characters, bytes that are not
UTF-8, and the backslash are escaped as in C: ``\n``, ``\t``, ``\r``, ``\\``, and ``\ooo`` with three octal
digits per byte. A space is written as ``\040`` where it could look like a separator: at either end of the
name, before another space, and before ``->``. No two paths look the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from cowfs.jsontext import get_path, put_path
from cowfs.types import Change

_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\"}
_DOUBTFUL_SPACE = re.compile(r"^ | \Z| (?= |->)")
_COLOURS = {"A": "\033[32m", "M": "\033[33m", "D": "\033[31m", "R": "\033[36m"}
_PLAIN = "\033[0m"
VERSION = 1
"""The version of the JSON. New members do not change it."""
_WORDS = {"A": "added", "M": "modified", "D": "deleted", "R": "renamed"}


def escape(path: bytes) -> str:
    """Return a path as printable text. :func:`unescape` is the inverse."""
    shown = []
    for character in path.decode("utf-8", "surrogateescape"):
        if character in _ESCAPES:
            shown.append(_ESCAPES[character])
        elif character.isprintable():
            shown.append(character)
        else:
            shown += [f"\\{byte:03o}" for byte in character.encode("utf-8", "surrogateescape")]
    return _DOUBTFUL_SPACE.sub(lambda _: "\\040", "".join(shown))


def unescape(text: str) -> bytes:
    """Return the path from which :func:`escape` made *text*."""
    letters = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"\\": b"\\"}

    def plain(match: re.Match[bytes]) -> bytes:
        return letters.get(match[1]) or bytes([int(match[1], 8)])

    return re.sub(rb"\\([0-7]{3}|.)", plain, text.encode())


def line(change: Change, *, colour: bool = False) -> str:
    """Return one change as a line of text, without its end."""
    slash = "/" if change.type == "directory" else ""
    text = f"{change.kind}  "
    if change.source is not None:
        text += f"{escape(change.source)}{slash} -> "
    text += escape(change.path) + slash
    if change.what:
        named = (each if each != "xattrs" else _with_names(change) for each in change.what)
        text += f"  ({', '.join(named)})"
    return f"{_COLOURS[change.kind]}{text}{_PLAIN}" if colour else text


def _with_names(change: Change) -> str:
    return " ".join(["xattrs", *(escape(name).replace(" ", r"\040") for name in change.xattrs)])


def render(changes: Iterable[Change], *, colour: bool = False) -> Iterator[str]:
    """Yield each change as a line of text, without its end."""
    for change in changes:
        yield line(change, colour=colour)


@dataclass(slots=True)
class Summary:
    """The numbers of changes that :meth:`counted` has yielded."""

    added: int = 0
    modified: int = 0
    deleted: int = 0
    renamed: int = 0

    def counted(self, changes: Iterable[Change]) -> Iterator[Change]:
        """Yield the same changes, and count each."""
        for change in changes:
            word = _WORDS[change.kind]
            setattr(self, word, getattr(self, word) + 1)
            yield change

    @property
    def total(self) -> int:
        return self.added + self.modified + self.deleted + self.renamed

    def __str__(self) -> str:
        counts = [f"{getattr(self, word)} {word}" for word in _WORDS.values() if getattr(self, word)]
        return ", ".join(counts) or "no changes"


def to_json(change: Change) -> dict[str, Any]:
    """Return a change as an object for JSON: ``kind path type what source``, and ``xattrs`` if any differ.

    If a path is not UTF-8, ``path`` has U+FFFD for each invalid byte, and ``path_b64`` has the exact bytes in
    base64. Other paths have no ``path_b64``. ``source`` and ``source_b64`` are the same.
    """
    entry: dict[str, Any] = {"kind": change.kind}
    put_path(entry, "path", change.path)
    entry["type"] = change.type
    entry["what"] = list(change.what)
    if change.source is None:
        entry["source"] = None
    else:
        put_path(entry, "source", change.source)
    if change.xattrs:
        entry["xattrs"] = [escape(name) for name in change.xattrs]
    return entry


def from_json(entry: dict[str, Any]) -> Change:
    """Return the change from which :func:`to_json` made *entry*. ValueError if it is not one."""
    try:
        kind, path, what = entry["kind"], get_path(entry, "path"), tuple(entry["what"])
        type_ = entry["type"]
        names = tuple(unescape(name) for name in entry.get("xattrs", ()))
        source = None if entry.get("source") is None else get_path(entry, "source")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a change: {entry!r}") from error
    words = (*what, type_)
    if kind not in _WORDS or not all(isinstance(word, str) and word.isprintable() for word in words):
        raise ValueError(f"not a change: {entry!r}")
    return Change(kind, path, what, source, type_, names)


def json_line(change: Change) -> str:
    """Return a change as one line of JSON, with ``version`` first and without its end; ASCII only."""
    return json.dumps({"version": VERSION} | to_json(change))
