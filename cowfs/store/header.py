"""The header of a store, ``cowfs/header.json``: what it is, and which lowers it belongs to."""

from __future__ import annotations

import datetime
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import cowfs
from cowfs.errors import StoreError, WrongLower
from cowfs.store import mark
from cowfs.store.mark import Mark
from cowfs.types import Identity

VERSION = 1
WHITEOUTS = "overlayfs"
TRUSTED = "trusted.overlay."
USER = "user.overlay."

_DEEPEST = 16
_FIELDS = ("version", "whiteouts", "xattrs", "uuid", "created", "created_by", "adopted", "lowers", "mark")


@dataclass(frozen=True, slots=True)
class Header:
    """The facts that a store tells about itself."""

    uuid: str
    created: str
    """ISO 8601, UTC."""
    created_by: str
    xattrs: str = TRUSTED
    """How the names of the overlay's own extended attributes begin."""
    adopted: bool = False
    """It was a store of the kernel's overlayfs before."""
    lowers: tuple[Identity, ...] = ()
    """The lowers it belongs to, leftmost on top; none before the first mount."""
    mark: Mark | None = field(default=None, compare=False)
    """By what a copy is known that has lost something; stores of old versions of cowfs have none."""
    more: dict[str, Any] = field(default_factory=dict)
    """Fields of the same version that we do not know: kept as they are."""


def new_header(*, xattrs: str = TRUSTED, adopted: bool = False, identity: str = "") -> Header:
    """Return the header of a store made now, by us, for no lower yet."""
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    return Header(
        uuid=identity or str(uuid.uuid4()),
        created=now.isoformat(),
        created_by=f"cowfs {cowfs.__version__}",
        xattrs=xattrs,
        adopted=adopted,
    )


def to_json(header: Header) -> bytes:
    """Write a header as it stands in the store."""
    lowers = [
        {"kind": low.kind, "fingerprint": low.fingerprint, "description": low.description, "path": low.path}
        for low in header.lowers
    ]
    content = {
        "version": VERSION,
        "whiteouts": WHITEOUTS,
        "xattrs": header.xattrs,
        "uuid": header.uuid,
        "created": header.created,
        "created_by": header.created_by,
        "adopted": header.adopted,
        "lowers": lowers,
        **({"mark": {"name": header.mark.name, "keeps": list(header.mark.keeps)}} if header.mark else {}),
        **header.more,
    }
    return json.dumps(content, indent=2).encode() + b"\n"


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
            f"{path}: the store has format version {version}, this cowfs knows up to {VERSION}",
            f"made by {content.get('created_by', 'a newer cowfs')}; use that one or a newer one",
        )
    if content.get("xattrs") not in (TRUSTED, USER):
        raise _damaged(path)
    if content.get("whiteouts") != WHITEOUTS:
        raise StoreError(
            f"{path}: the store has whiteouts of the {content.get('whiteouts')} format,"
            f" this cowfs knows {WHITEOUTS} only"
        )
    try:
        return Header(
            uuid=str(content["uuid"]),
            created=str(content["created"]),
            created_by=str(content["created_by"]),
            xattrs=content["xattrs"],
            adopted=bool(content.get("adopted", False)),
            lowers=tuple(
                Identity(str(low["kind"]), str(low["fingerprint"]), str(low["description"]), str(low["path"]))
                for low in content["lowers"]
            ),
            mark=_mark(content.get("mark"), path),
            more={key: value for key, value in content.items() if key not in _FIELDS},
        )
    except (KeyError, TypeError):
        raise _damaged(path) from None


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


def _damaged(path: str) -> StoreError:
    hint = (
        "make a copy of the store (cp -a) before you do anything; cowfs-store(5) tells what to do with that"
    )
    return StoreError(f"{path}: the store's header is damaged", hint)


def check_lowers(header: Header, lowers: Sequence[Identity], path: str) -> None:
    """Raise WrongLower, naming both, if the store belongs to other lowers than those given."""
    if not header.lowers or not lowers:
        return
    if [low.fingerprint for low in header.lowers] == [low.fingerprint for low in lowers]:
        return
    raise WrongLower(
        f"{path} belongs to {_names(header.lowers)}, not to {_names(lowers)}",
        "give the lower that it was made with; what --force-lower shows of another one may be wrong,"
        " so copy the store before you try that",
    )


def _names(lowers: Sequence[Identity]) -> str:
    return " : ".join(f"{low.path} ({low.description})" for low in lowers)


def bound(header: Header, lowers: Sequence[Identity]) -> Header:
    """Return the header of the same store, bound to *lowers*."""
    return replace(header, lowers=tuple(lowers))
