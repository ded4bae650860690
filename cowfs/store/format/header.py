"""The header of a store, ``cowfs/header.json``: its format, and the lowers that it belongs to."""

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
from cowfs.linux.user_namespace import IdMap, Range, has_everybody
from cowfs.store.format import mark
from cowfs.store.format.mark import Mark
from cowfs.types import Identity

VERSION = 2
"""The highest known version."""
WITH_LAYERS = 2
"""The version of stores with checkpoints. All others have 1, so that older versions of cowfs can use them."""
OVERLAYFS, AUFS = "overlayfs", "aufs"
TRUSTED = "trusted.overlay."
USER = "user.overlay."

_SEEN = "lowers_seen"
_DEEPEST = 16
_LAST_ID = (1 << 32) - 1
_MOST_RANGES = 340
"""As many as the kernel allows (user_namespaces(7))."""
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
    "owners",
)


@dataclass(frozen=True, slots=True)
class Header:
    """The contents of a header."""

    uuid: str
    created: str
    """ISO 8601, UTC."""
    created_by: str
    whiteouts: str = OVERLAYFS
    """The format: ``aufs`` or ``overlayfs``."""
    xattrs: str = TRUSTED
    """The prefix of the overlay's extended attributes."""
    adopted: bool = False
    """Whether it was a store of the kernel's overlayfs before."""
    lowers: tuple[Identity, ...] = ()
    """The lowers that the store belongs to, topmost first; empty before the first mount."""
    version: int = 1
    mark: Mark | None = field(default=None, compare=False)
    """The mark, which detects incomplete copies; None in stores of old versions of cowfs."""
    volatile: tuple[str, ...] = ()
    """Directories of the union whose changes are not kept, as paths from its root: ``/tmp``."""
    modules: tuple[Identity, ...] = ()
    """Modules, which may be mounted above the lowers, in any order: those that `cowfs lower add` added."""
    owners: IdMap | None = None
    """The map of the user namespace in which the store was first mounted; None for all users."""
    more: dict[str, Any] = field(default_factory=dict)
    """Unknown fields, kept as they are."""


def new_header(
    *, xattrs: str = TRUSTED, adopted: bool = False, identity: str = "", whiteouts: str = OVERLAYFS
) -> Header:
    """Return the header of a new store without lowers."""
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
    """Return a header as the contents of its file."""
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
        **({"owners": _of_map(header.owners)} if header.owners else {}),
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


def _of_map(owners: IdMap) -> dict[str, Any]:
    return {"users": list(map(list, owners.users)), "groups": list(map(list, owners.groups))}


def from_json(data: bytes, path: str) -> Header:
    """Parse a header. StoreError if it is damaged or has an unknown version; *path* is for the message."""
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
            owners=_owners(content.get("owners")),
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


def _owners(content: Any) -> IdMap | None:
    return None if content is None else IdMap(_ranges(content["users"]), _ranges(content["groups"]))


def _ranges(content: Any) -> tuple[Range, ...]:
    if not isinstance(content, list) or len(content) > _MOST_RANGES:
        raise ValueError(content)
    found: list[Range] = []
    for first, outside, count in content:
        found.append((whole(first, _LAST_ID), whole(outside, _LAST_ID), whole(count, _LAST_ID, 1)))
    return tuple(found)


def _is_deep(content: Any) -> bool:
    """Whether *content* is nested deeper than a valid header: some depths can be parsed, but not written."""
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
    """WrongLower, with both, if the store belongs to other lowers than those given.

    If *with_modules*, modules of the store may be above them.
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
    """Return how many of the topmost *lowers* are modules above the store's own lowers."""
    above = len(lowers) - len(header.lowers)
    known = {low.fingerprint for low in header.modules}
    given = [low.fingerprint for low in lowers[: max(above, 0)]]
    own = [low.fingerprint for low in header.lowers]
    if not own or not set(given) <= known or own != [low.fingerprint for low in lowers[len(given) :]]:
        return 0
    return len(given)


def volatile_above(volatile: Sequence[str], path: bytes) -> str | None:
    """Return the one of the *volatile* directories that is, or contains, a path of the union; None if
    none."""
    whole = b"/" + path.strip(b"/") + b"/"
    return next((name for name in volatile if whole.startswith(os.fsencode(name) + b"/")), None)


def said_of(volatile: Sequence[str]) -> str:
    """Return a text that lists *volatile* paths, which are not in the store."""
    return f"changes below {', '.join(volatile)} are in memory only (volatile), and not listed"


def _names(lowers: Sequence[Identity]) -> str:
    return " : ".join(f"{low.path} ({low.description})" for low in lowers)


def bound(header: Header, lowers: Sequence[Identity], volatile: Sequence[str] | None = None) -> Header:
    """Return the header bound to *lowers*, and, if not None, with the directories *volatile*."""
    return replace(
        header, lowers=tuple(lowers), volatile=header.volatile if volatile is None else tuple(volatile)
    )


def made_by(header: Header, owners: IdMap) -> Header:
    """Return the header with the map of the namespace that the owners in the store are those of."""
    return replace(header, owners=None if has_everybody(owners) else owners)


def seen(header: Header, when: int) -> Header:
    """Return the header with the time (ns) at which the lowers were last seen without changes of their
    own."""
    return replace(header, more={**header.more, _SEEN: when})


def last_seen(header: Header) -> int | None:
    """Return the time (ns) from :func:`seen`; None if none is recorded."""
    when = header.more.get(_SEEN)
    return when if isinstance(when, int) else None
