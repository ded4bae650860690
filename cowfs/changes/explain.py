"""Explain what a path shows: what each layer has, which rules decide, and what the store has of it."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cowfs.changes.compare import Inode, compare
from cowfs.changes.composite import above
from cowfs.changes.lowers import Lower, LowerView
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


def explain(
    upper: UpperLayer,
    root: Key,
    lowers: Sequence[LowerLayer],
    prefix: bytes,
    index: Key | None,
    path: bytes,
    frozen: Sequence[tuple[str, LowerLayer]] = (),
) -> dict[str, Any]:
    """Return an explanation of *path*, for JSON.

    *frozen* are the names and layers of the checkpoints below the upper. In the result, ``layers`` are the
    layers, the store first, each with its inode at the path: ``path`` (a redirect may lead elsewhere),
    ``type``, ``mode``, ``uid``, ``gid``, ``size``, ``mtime_ns``, and the ``rules`` that were applied there.
    ``seen`` says whether the path exists in the merged tree. ``change`` is the letter of ``cowfs diff``, or
    None, with ``what`` (what differs) and ``source`` (the path in the lowers). ``bytes`` is the space that
    the path takes in the store. Blocks as the layers do; OSError.
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
    here = _Upper(upper, root, xattrs).find(names)
    base = None if here.source is None else view.resolve(here.source)
    if here.source is not None and here.source != path:
        put_path(answer, "source", here.source)
    inode = here.inode
    if (
        inode is None
        and base is not None
        and index is not None
        and not base.is_dir
        and base.attr.st_nlink > 1
    ):
        number, key = base.places[0]
        hit = open_index(upper, index, xattrs).find(lowers[number].handle(key))
        if hit is not None:
            inode = Inode(upper, *hit)
            rule = {"rule": Rule.INDEX.name.lower(), "meaning": Rule.INDEX.value}
            layers[0] |= {**_facts(upper, *hit), "rules": [rule]}
    if inode is not None:
        answer["bytes"] = inode.attr.st_blocks * 512
        answer["change"], answer["what"] = _change(inode, base, here, xattrs, view)
    elif base is not None and names and not hits and _is_directory(stack, names[:-1]):
        answer["change"] = "D"  # an opaque directory hides it
    return answer


def _is_directory(stack: Stack, names: Path) -> bool:
    hits = stack.look(stack.roots, names).hits if names else []
    return not names or (bool(hits) and stat.S_ISDIR(hits[0][2].st_mode))


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
    }
    if stat.S_ISLNK(attr.st_mode):
        put_path(facts, "target", layer.readlink(key))
    return facts


class _Found:
    """The upper's inode at a path, and the path of the same file in the lowers."""

    def __init__(self) -> None:
        self.inode: Inode | None = None
        self.is_whiteout = False
        self.is_renamed = False
        self.source: bytes | None = b""


class _Upper:
    def __init__(self, upper: UpperLayer, root: Key, xattrs: XattrFormat) -> None:
        self._upper = upper
        self._root = root
        self._xattrs = xattrs

    def find(self, names: Path) -> _Found:
        found = _Found()
        key: Key | None = self._root
        for depth, name in enumerate(names):
            base = found.source
            found.source = None if base is None else join(base, name)
            hit = None if key is None else self._upper.lookup(key, name)
            if hit is None:
                key = None
                continue
            key, attr = hit
            if is_whiteout(self._upper, key, attr, self._xattrs):
                found.is_whiteout = True
                found.inode = Inode(self._upper, key, attr) if depth == len(names) - 1 else None
                key = None
                continue
            notes = notes_of(self._upper, key, self._xattrs) or {}
            source = None if base is None else source_of(notes, attr, base, self._xattrs)
            found.is_renamed = source is not None and source != found.source
            found.source = source if source is not None else found.source
            if depth == len(names) - 1:
                found.inode = Inode(self._upper, key, attr)
            elif not stat.S_ISDIR(attr.st_mode):
                key = None
        return found


def _change(
    inode: Inode, base: Lower | None, here: _Found, xattrs: XattrFormat, view: LowerView
) -> tuple[str | None, list[str]]:
    """Return the letter of the change, and what differs."""
    if here.is_whiteout:
        return ("D" if base is not None else None), []
    if base is None:
        return "A", []
    number, key = base.places[0]
    old = Inode(view.layers[number], key, base.attr)
    if not base.is_dir:
        data_number, data_key = base.places[-1]
        old.data = view.layers[data_number], data_key
        notes = notes_of(inode.layer, inode.key, xattrs) or {}
        if xattrs.is_metacopy(notes, inode.attr):
            note = xattrs.partial_of(notes)
            inode.data = old.data
            inode.end = None if note is None else min(note.end, inode.attr.st_size)
    what = list(_result(compare(inode, old, xattrs)))
    if here.is_renamed:
        return "R", what
    return ("M" if what else None), what


def _result(comparing: Any) -> tuple[str, ...]:
    while True:
        try:
            next(comparing)
        except StopIteration as end:
            result: tuple[str, ...] = end.value
            return result


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
    yield f"  {_verdict(answer)}"


_NARROWEST, _WIDEST = 9, 40
"""Width in columns of the layers' names, so that the details line up."""


def _owner(layer: dict[str, Any]) -> str:
    return f"{layer['uid']}:{layer['gid']}" if "uid" in layer else ""


def _listed(layer: dict[str, Any], path: str, owners: int, date: Callable[[float], str]) -> str:
    if layer["type"] is None:
        return "nothing"
    if layer["type"] == "whiteout":
        return "whiteout"
    elsewhere = f"  at {layer['path']}" if layer["path"] != path else ""
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
