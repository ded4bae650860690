"""Explain what a path shows: what each layer has, which rules decide, and what the store has of it."""

from __future__ import annotations

import stat
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

from cowfs.changes.composite import above
from cowfs.changes.diff import change_at
from cowfs.changes.lowers import LowerView
from cowfs.changes.paths import join, type_name
from cowfs.changes.scan import source_of
from cowfs.jsontext import local_time, put_path
from cowfs.layers.base import Key, LowerLayer, UpperLayer
from cowfs.overlay.index import open_index
from cowfs.overlay.stack import Path, Rule, Stack, Verdict, is_whiteout, notes_of
from cowfs.overlay.xattr_format import XattrFormat
from cowfs.types import Attr

VERSION = 1
"""The version of an explanation's JSON."""
_BLOCK = 512
"""The unit of st_blocks, in bytes."""


def explain(
    upper: UpperLayer,
    root: Key,
    lowers: Sequence[LowerLayer],
    prefix: bytes,
    index: Key | None,
    path: bytes,
    frozen: Sequence[tuple[str, LowerLayer]] = (),
) -> Generator[None, None, dict[str, Any]]:
    """Return an explanation of *path*, for JSON.

    *frozen* are the names and layers of the checkpoints below the upper. In the result, ``layers`` are the
    layers, the store first, each with its inode at the path: ``path`` (a redirect may lead elsewhere),
    ``type``, ``mode``, ``uid``, ``gid``, ``size``, ``mtime_ns``, and the ``rules`` that were applied there.
    ``seen`` says whether the path exists in the merged tree. ``change`` is the letter of ``cowfs diff``, or
    None, with ``what`` (what differs) and ``source`` (the path in the lowers). ``to`` is the present path of
    what the lowers have at *path*, if it was renamed. ``bytes`` is the space that the path takes in the
    store. Blocks as the layers do, but yields before each inode and each MiB of content; OSError.
    """
    xattrs = XattrFormat(prefix)
    below = [layer for _, layer in frozen]
    stack = Stack([upper, *below, *lowers], xattrs, root)
    called = ["store", *(f"checkpoint {name}" if name else "deleted checkpoint" for name, _ in frozen)]
    called += [f"lower {number}" for number in range(len(lowers))]
    names = tuple(path.split(b"/")) if path else ()
    verdicts: list[Verdict] = []
    hits = stack.look(stack.roots, names, verdicts=verdicts).hits if names else []
    layers = [
        {"layer": name, **_of_layer(stack, number, names, verdicts)} for number, name in enumerate(called)
    ]
    answer: dict[str, Any] = {"version": VERSION}
    put_path(answer, "path", path)
    answer |= {"seen": bool(hits) or not names, "layers": layers, "change": None, "what": [], "bytes": 0}
    view = LowerView(Stack(lowers, xattrs))
    upper, root, index = above((upper, root), below, xattrs, index)
    inode, source = _find(upper, root, xattrs, names)
    base = None if source is None else view.resolve(source)
    link = source if base is not None and not base.is_dir and base.attr.st_nlink > 1 else None
    if inode is None and base is not None and link is not None and index is not None:
        number, key = base.places[0]
        inode = open_index(upper, index, xattrs).find(lowers[number].handle(key))
        if inode is not None:
            rule = {"rule": Rule.INDEX.name.lower(), "meaning": Rule.INDEX.value}
            layers[0] |= {**_facts(upper, *inode), "rules": [rule]}
    shown = {number for number, *_ in hits}
    ends = {verdict.layer: verdict.path for verdict in verdicts if verdict.rule is not Rule.REDIRECT}
    blocks = [layer.pop("blocks", 0) for layer in layers]
    own = range(len(below) + 1)
    # not those of what hides it, in a directory above it
    answer["bytes"] = _BLOCK * sum(blocks[n] for n in own if n in shown or ends.get(n, names) == names)
    change, now_at = yield from change_at(upper, root, lowers, prefix, index, path, link)
    if change is not None:
        answer |= {"change": change.kind, "what": list(change.what)}
        source = change.source or (None if change.kind == "A" else source)
    if source is not None and source != path:
        put_path(answer, "source", source)
    if now_at is not None:
        put_path(answer, "to", now_at)
        answer["change"] = answer["change"] or "R"
    return answer


def _looked_for(stack: Stack, number: int, names: Path) -> Path:
    """Return where a layer would have a path, which a layer above has: redirects may lead elsewhere."""
    for depth in range(len(names) - 1, 0, -1):
        verdicts: list[Verdict] = []
        stack.look(stack.roots, names[:depth], directories=True, verdicts=verdicts)
        found = [one.path for one in verdicts if one.layer == number and one.rule is not Rule.REDIRECT]
        if found:
            return (*max(found, key=len), *names[depth:])
    return names


def _of_layer(stack: Stack, number: int, names: Path, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    mine = [verdict for verdict in verdicts if verdict.layer == number]
    at_end = [verdict for verdict in mine if verdict.rule is not Rule.REDIRECT]
    path = max((one.path for one in at_end), key=len) if at_end else _looked_for(stack, number, names)
    entry: dict[str, Any] = {"type": None}
    put_path(entry, "path", b"/".join(path))
    layer, key = stack.layers[number], stack.root_of[number]
    attr: Attr | None = layer.stat(key)
    for name in path:
        hit = layer.lookup(key, name) if attr is not None and stat.S_ISDIR(attr.st_mode) else None
        key, attr = hit if hit is not None else (key, None)
    if attr is not None:
        entry |= _facts(layer, key, attr)
        if is_whiteout(layer, key, attr, stack.format):
            entry["type"] = "whiteout"
    rules = []
    for verdict in mine:
        rule = {"rule": verdict.rule.name.lower(), "meaning": verdict.rule.value}
        if verdict.path != path:
            put_path(rule, "of", b"/".join(verdict.path))
        if verdict.redirect is not None:
            put_path(rule, "to", verdict.redirect)
        rules.append(rule)
    entry["rules"] = rules
    return entry


def _facts(layer: LowerLayer, key: Key, attr: Attr) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "type": type_name(attr.st_mode),
        "mode": stat.filemode(attr.st_mode),
        "nlink": attr.st_nlink,
        "uid": attr.st_uid,
        "gid": attr.st_gid,
        "size": attr.st_size,
        "mtime_ns": attr.st_mtime_ns,
        "blocks": attr.st_blocks,
    }
    if stat.S_ISLNK(attr.st_mode):
        put_path(facts, "target", layer.readlink(key))
    return facts


class _Found(NamedTuple):
    """The upper's inode at a path, and the path of the same file in the lowers."""

    inode: tuple[Key, Attr] | None
    source: bytes | None


def _find(upper: UpperLayer, root: Key, xattrs: XattrFormat, names: Path) -> _Found:
    source: bytes | None = b""
    key: Key | None = root
    inode = None if names else (root, upper.stat(root))
    for depth, name in enumerate(names):
        base, source = source, None if source is None else join(source, name)
        hit = None if key is None else upper.lookup(key, name)
        inode = hit if depth == len(names) - 1 else None
        key = None
        if hit is None or is_whiteout(upper, *hit, xattrs):
            continue
        notes = notes_of(upper, hit[0], xattrs) or {}
        redirected = None if base is None else source_of(notes, hit[1], base, xattrs)
        source = redirected if redirected is not None else source
        key = hit[0] if stat.S_ISDIR(hit[1].st_mode) else None
    return _Found(inode, source)


def render(answer: dict[str, Any], name: str, date: Callable[[float], str]) -> Iterator[str]:
    """Yield the lines of an explanation, for people."""
    yield name
    wide = max((len(layer["layer"]) for layer in answer["layers"]), default=0)
    wide = max(min(wide, _WIDEST), _NARROWEST)
    owners = max((len(_owner(layer)) for layer in answer["layers"]), default=0)
    for layer in answer["layers"]:
        yield f"  {layer['layer']:<{wide}} {_listed(layer, answer['path'], owners, date)}"
        for rule in layer["rules"]:
            of = f"{rule['of']}: " if "of" in rule else ""
            to = f" ({rule['to']})" if "to" in rule else ""
            yield f"  {'':<{wide}}   {of}{rule['meaning']}{to}"
    if answer.get("source") is not None:
        yield f"  in the lower it is {answer['source']}"
    if answer.get("volatile"):
        yield f"  changes below {answer['volatile']} are in memory only (volatile); the above is the store's"
    if answer.get("to") is not None and answer["change"] != "R":
        yield f"  what the lower has here was renamed to {answer['to']}"
    yield f"  {_verdict(answer)}"


_NARROWEST, _WIDEST = 9, 40
"""Width in columns of the layers' names, so that the details line up."""


def _owner(layer: dict[str, Any]) -> str:
    return f"{layer['uid']}:{layer['gid']}" if "uid" in layer else ""


def _listed(layer: dict[str, Any], path: str, owners: int, date: Callable[[float], str]) -> str:
    if layer["type"] is None:
        return "nothing"
    elsewhere = f"  at {layer['path']}" if layer["path"] != path else ""
    if layer["type"] == "whiteout":
        return f"whiteout{elsewhere}"
    target = f" -> {layer['target']}" if "target" in layer else ""
    when = date(layer["mtime_ns"] / 1e9)
    owner = f"{_owner(layer):<{owners}}"
    return f"{layer['mode']} {owner} {layer['size']:>8} {when}{target}{elsewhere}"


def _verdict(answer: dict[str, Any]) -> str:
    size = f"; {answer['bytes']} bytes in the store" if answer["bytes"] else ""
    what = ", ".join(answer["what"])
    letter = answer["change"]
    if letter == "D":
        return f"deleted{size}"
    if letter == "R" and not answer["seen"]:
        return f"renamed to {answer['to']}{size}"
    if not answer["seen"]:
        return "nothing is shown here"
    if letter == "A":
        return f"added{size}"
    if letter == "R":
        return f"renamed{f', changed in {what}' if what else ''}{size}"
    if letter == "M":
        return f"changed in {what}{size}"
    copy = ": the store has the same as the layers below" if answer["bytes"] else ""
    return f"not changed{copy}{size}"


def date_of(seconds: float) -> str:
    """Return a local time (seconds since the epoch) as other commands show it."""
    return local_time(seconds)
