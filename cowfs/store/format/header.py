"""The header of a store, ``cowfs/header.json``: what it is, and which lowers it belongs to."""

from __future__ import annotations

import datetime
import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import cowfs
from cowfs.errors import StoreError, WrongLower
from cowfs.jsontext import whole
from cowfs.store.format import mark
from cowfs.store.format.mark import Mark
from cowfs.types import Identity

VERSION = 2
"""The highest that is known."""
WITH_LAYERS = 2
"""That of stores with checkpoints. All others have 1: older versions of cowfs can use them."""
OVERLAYFS, AUFS = "overlayfs", "aufs"
TRUSTED = "trusted.overlay."
USER = "user.overlay."

_SEEN = "lowers_seen"
_DEEPEST = 16
_OF_A_LOWER = ("kind", "fingerprint", "description", "path")
_FIELDS = (
    "version",
    "whiteouts",
    "xattrs",
    "uuid",
    "created",
    "created_by",
    "adopted",
    "lowers",
    "mark",
    "volatile",
    "modules",
)


@dataclass(frozen=True, slots=True)
class Header:
    """The facts that a store tells about itself."""

    uuid: str
    created: str
    """ISO 8601, UTC."""
    created_by: str
    whiteouts: str = OVERLAYFS
    """Whose format it has, ``aufs`` or …"""
    xattrs: str = TRUSTED
    """How the names of the overlay's own extended attributes begin."""
    adopted: bool = False
    """It was a store of the kernel's overlayfs before."""
    lowers: tuple[Identity, ...] = ()
    """The lowers it belongs to, leftmost on top; none before the first mount."""
    version: int = 1
    mark: Mark | None = field(default=None, compare=False)
    """By what a copy is known that has lost something; stores of old versions of cowfs have none."""
    volatile: tuple[str, ...] = ()
    """Directories of the union whose changes are not kept, as its users name them: ``/tmp``."""
    modules: tuple[Identity, ...] = ()
    """What may be mounted above the lowers, in any order, or not: what `cowfs lower add` added."""
    more: dict[str, Any] = field(default_factory=dict)
    """Fields of the same version that we do not know: kept as they are."""


def new_header(
    *, xattrs: str = TRUSTED, adopted: bool = False, identity: str = "", whiteouts: str = OVERLAYFS
) -> Header:
    """Return the header of a store made now, by us, for no lower yet."""
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    return Header(
        uuid=identity or str(uuid.uuid4()),
        created=now.isoformat(),
        created_by=f"cowfs {cowfs.__version__}",
        whiteouts=whiteouts,
        xattrs=xattrs,
        adopted=adopted,
    )


def to_json(header: Header) -> bytes:
    """Write a header as it stands in the store."""
    content = {
        "version": header.version,
        "whiteouts": header.whiteouts,
        "xattrs": header.xattrs,
        "uuid": header.uuid,
        "created": header.created,
        "created_by": header.created_by,
        "adopted": header.adopted,
        "lowers": list(map(_of_lower, header.lowers)),
        **({"mark": {"name": header.mark.name, "keeps": list(header.mark.keeps)}} if header.mark else {}),
        **({"volatile": list(header.volatile)} if header.volatile else {}),
        **({"modules": list(map(_of_lower, header.modules))} if header.modules else {}),
        **header.more,
    }
    return json.dumps(content, indent=2).encode() + b"\n"


def _of_lower(low: Identity) -> dict[str, Any]:
    return {
        "kind": low.kind,
        "fingerprint": low.fingerprint,
        "description": low.description,
        "path": low.path,
        **({"offset": low.offset} if low.offset else {}),
    }


def from_json(data: bytes, path: str) -> Header:
    """Read a header. Raises StoreError when it is damaged, or of a version that we do not know."""
    try:
        content = json.loads(data)
        version = content["version"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise _damaged(path) from None
    if not isinstance(content, dict) or not isinstance(version, int) or version < 1 or _is_deep(content):
        raise _damaged(path)
    if version > VERSION:
        raise StoreError(
            f"{path}: the store has format version {version}; this cowfs supports versions up to {VERSION}",
            f"created by {content.get('created_by', 'a newer cowfs')}; use that version or a newer one",
        )
    if content.get("xattrs") not in (TRUSTED, USER):
        raise _damaged(path)
    if content.get("whiteouts") not in (OVERLAYFS, AUFS):
        raise StoreError(
            f"{path}: the store has whiteouts of the {content.get('whiteouts')} format,"
            f" this cowfs knows {OVERLAYFS} and {AUFS} only"
        )
    try:
        return Header(
            uuid=str(content["uuid"]),
            created=str(content["created"]),
            created_by=str(content["created_by"]),
            whiteouts=content["whiteouts"],
            xattrs=content["xattrs"],
            adopted=bool(content.get("adopted", False)),
            lowers=tuple(map(_lower, content["lowers"])),
            version=version,
            mark=_mark(content.get("mark"), path),
            volatile=_volatile(content.get("volatile", [])),
            modules=tuple(map(_lower, content.get("modules", []))),
            more={key: value for key, value in content.items() if key not in _FIELDS},
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _damaged(path) from None


def _lower(content: dict[str, Any]) -> Identity:
    offset = whole(content.get("offset", 0), (1 << 63) - 1)
    kind, fingerprint, description, path = (str(content[name]) for name in _OF_A_LOWER)
    if "\0" in path:
        raise ValueError(path)
    return Identity(kind, fingerprint, description, path, offset)


def _is_deep(content: Any) -> bool:
    """Whether it is nested deeper than any of ours: some depths can be read, but not written."""
    level = [content]
    for _ in range(_DEEPEST):
        level = [
            entry
            for value in level
            if isinstance(value, dict | list)
            for entry in (value.values() if isinstance(value, dict) else value)
        ]
    return bool(level)


def _mark(content: Any, path: str) -> Mark | None:
    if content is None:
        return None
    name = str(content["name"])
    if not mark.NAME.fullmatch(name):
        raise _damaged(path)
    return Mark(name, tuple(str(what) for what in content["keeps"]))


def _volatile(content: Any) -> tuple[str, ...]:
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise ValueError(content)
    for name in content:
        parts = name.split("/")
        if "\0" in name or parts[0] or len(parts) < 2 or any(part in {"", ".", ".."} for part in parts[1:]):
            raise ValueError(name)
    return tuple(content)


def _damaged(path: str) -> StoreError:
    hint = "copy the store (cp -a) before you do anything; cowfs-store(5) says how to repair the copy"
    return StoreError(f"{path}: the store's header is damaged", hint)


def check_lowers(
    header: Header, lowers: Sequence[Identity], path: str, *, with_modules: bool = False
) -> None:
    """Raise WrongLower, naming both, if the store belongs to other lowers than those given.

    Above them there may be modules of the store, where *with_modules* are understood.
    """
    if not header.lowers or not lowers:
        return
    above = modules_in(header, lowers) if with_modules else 0
    if [low.fingerprint for low in header.lowers] == [low.fingerprint for low in lowers[above:]]:
        return
    raise WrongLower(
        f"{path} belongs to {_names(header.lowers)}, not to {_names(lowers)}",
        "give the lower that it was made with, or carry the changes over with cowfs rebase;"
        " what --force-lower shows of another one may be wrong, so copy the store before you try that",
    )


def modules_in(header: Header, lowers: Sequence[Identity]) -> int:
    """Return how many of *lowers*, the topmost, are modules of the store above its own lowers."""
    above = len(lowers) - len(header.lowers)
    known = {low.fingerprint for low in header.modules}
    given = [low.fingerprint for low in lowers[: max(above, 0)]]
    own = [low.fingerprint for low in header.lowers]
    if not own or not set(given) <= known or own != [low.fingerprint for low in lowers[len(given) :]]:
        return 0
    return len(given)


def volatile_above(volatile: Sequence[str], path: bytes) -> str | None:
    """Return which of the *volatile* directories a path of the union is, or is below, if any."""
    whole = b"/" + path.strip(b"/") + b"/"
    return next((name for name in volatile if whole.startswith(os.fsencode(name) + b"/")), None)


def said_of(volatile: Sequence[str]) -> str:
    """Return the words for paths that are *volatile*: not in the store."""
    return f"what is changed below {', '.join(volatile)} is in memory only, and not listed (volatile)"


def _names(lowers: Sequence[Identity]) -> str:
    return " : ".join(f"{low.path} ({low.description})" for low in lowers)


def bound(header: Header, lowers: Sequence[Identity], volatile: Sequence[str] | None = None) -> Header:
    """Return the header of the same store, bound to *lowers*, which, if not None, does not keep what is
    *volatile*."""
    return replace(
        header, lowers=tuple(lowers), volatile=header.volatile if volatile is None else tuple(volatile)
    )


def seen(header: Header, when: int) -> Header:
    """Return the header of a store whose changes are to what the lowers were at a moment (ns)."""
    return replace(header, more={**header.more, _SEEN: when})


def last_seen(header: Header) -> int | None:
    """Return that moment; None if nobody has written it down."""
    when = header.more.get(_SEEN)
    return when if isinstance(when, int) else None
