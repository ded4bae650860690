"""Log what a mounted union does: for ``--debug``.

A traced object gets a class derived from its own, whose methods log and call the original. If tracing is off,
there is no check and no cost.
"""

from __future__ import annotations

import errno
import functools
import inspect
import logging
import stat
import time
from collections.abc import Callable, Iterable
from typing import Any

from cowfs.fuse.daemon import Daemon
from cowfs.layers.slow import unwrapped
from cowfs.layers.squashfs import SquashfsLayer
from cowfs.overlay.node import Node
from cowfs.overlay.overlay import Overlay
from cowfs.union import Union

_LOGGER = "cowfs.debug"
_MOST_BYTES = 80
"""The most bytes of a name or value that are logged."""

_CHANGES = (
    *("create", "mkdir", "symlink", "mknod", "link", "unlink", "rmdir", "rename"),
    *("add_file", "copy_in", "remove_file"),
    *("chmod", "chown", "utimens", "truncate", "setxattr", "removexattr", "setflags", "sync"),
)


def trace(topics: Iterable[str], union: Union, daemon: Daemon) -> None:
    """Start to log *topics* of a union that *daemon* is about to serve."""
    for topic in topics:
        logging.getLogger(f"{_LOGGER}.{topic}").setLevel(logging.DEBUG)
    if "requests" in topics:
        _derive(daemon.adapter, _handlers(daemon.adapter), functools.partial(_request, union.overlay))
    if "overlay" in topics:
        _derive(union.overlay, ["lookup"], _lookup)
    if "store" in topics:
        _derive(union.store.layer, _CHANGES, functools.partial(_call, "store"))
    if "cache" in topics:
        _derive(daemon.loop, ["forget_attributes"], functools.partial(_call, "cache"))
        for layer in union.overlay.lowers:
            inner = unwrapped(layer)
            if isinstance(inner, SquashfsLayer):
                _derive(inner.source, ["pread"], _read)


def _derive(thing: Any, names: Iterable[str], wrap: Callable[[str, Any], Any]) -> None:
    """Wrap the methods *names* of *thing* with *wrap*. Other objects of its class stay as they are."""
    kind = type(thing)
    methods = {name: wrap(name, getattr(kind, name)) for name in names if hasattr(kind, name)}
    thing.__class__ = type(kind.__name__, (kind,), {"__slots__": (), **methods})


def _handlers(adapter: Any) -> list[str]:
    """Return the names of the methods that answer requests: all public coroutines (pyfuse3.Operations)."""
    return [
        name for name, _ in inspect.getmembers(type(adapter), inspect.iscoroutinefunction) if name[0] != "_"
    ]


# --- the wrappers


def _request(overlay: Overlay, name: str, method: Any) -> Any:
    parameters = list(inspect.signature(method).parameters.values())[1:]
    names = [parameter.name for parameter in parameters if parameter.name != "said"]
    log = logging.getLogger(f"{_LOGGER}.requests")

    async def traced(self: Any, *args: Any) -> Any:
        begin = time.monotonic_ns()
        shown = _arguments(overlay, names, args)
        try:
            answer = await method(self, *args)
        except BaseException as failure:
            log.debug("%s %s: %s (%s)", name, shown, _failure(failure), _since(begin))
            raise
        log.debug("%s %s: %s (%s)", name, shown, _answer(answer), _since(begin))
        return answer

    functools.update_wrapper(traced, method)
    return traced


def _lookup(name: str, method: Any) -> Any:
    log = logging.getLogger(f"{_LOGGER}.overlay")

    def traced(self: Overlay, parent: Node, entry: bytes) -> Any:
        found = method(self, parent, entry)
        place = _join(path_of(parent), _shown(entry))
        if found is None:
            log.debug("%s %s: in no layer, or hidden by a whiteout", name, place)
        else:
            log.debug("%s %s: %s", name, place, _layers(self, found[0]))
        return found

    return traced


def _call(topic: str, name: str, method: Any) -> Any:
    log = logging.getLogger(f"{_LOGGER}.{topic}")

    def traced(self: Any, *args: Any, **kwargs: Any) -> Any:
        shown = " ".join(map(_value, (*args, *kwargs.values())))
        try:
            result = method(self, *args, **kwargs)
        except BaseException as failure:
            log.debug("%s %s: %s", name, shown, _failure(failure))
            raise
        log.debug("%s %s", name, shown)
        return result

    functools.update_wrapper(traced, method)
    return traced


def _read(name: str, method: Any) -> Any:
    log = logging.getLogger(f"{_LOGGER}.cache")

    def traced(self: Any, size: int, position: int, what: str) -> Any:
        log.debug("%s: reads a %s, %d bytes at %d", self.name, what, size, position)
        return method(self, size, position, what)

    functools.update_wrapper(traced, method)
    return traced


# --- how things are shown


def path_of(node: Node) -> str:
    """Return the path of a node from the root of the mount: ``/``, ``/etc/fstab``."""
    names = []
    while node.parent is not None:
        names.append(_shown(node.name))
        node = node.parent
    return "/" + "/".join(reversed(names))


def _join(directory: str, name: str) -> str:
    return f"{directory.rstrip('/')}/{name}"


def _layers(overlay: Overlay, node: Node) -> str:
    places = ["store"] if node.upper is not None else []
    if node.upper is not None and node.metacopy:
        places[0] = "store (attributes only)"
    lowers = overlay.union_of(node).lowers
    places += [f"lower {layer} ({lowers[layer].name})" for layer, _ in node.lowers]
    return " + ".join(places) or "no layer: removed"


def _arguments(overlay: Overlay, names: list[str], args: tuple[Any, ...]) -> str:
    shown = []
    by = ""
    for name, value in zip(names, args, strict=False):
        if name in {"inode", "parent_inode", "parent_inode_old", "parent_inode_new", "new_parent_inode"}:
            node = overlay.nodes.get(value)
            shown.append(f"#{value}" if node is None else path_of(node))
        elif hasattr(value, "pid") and hasattr(value, "uid"):
            by = f" by pid {value.pid}, uid {value.uid}"
        else:
            shown.append(f"{name}={_value(value)}")
    return " ".join(shown) + by


def _answer(answer: Any) -> str:
    if answer is None:
        return "done"
    if hasattr(answer, "st_ino"):
        if not answer.st_ino:
            return "no such name"
        return f"inode {answer.st_ino}, {stat.filemode(answer.st_mode)}, {answer.st_size} bytes"
    if hasattr(answer, "fh"):
        return f"file {answer.fh}"
    if isinstance(answer, tuple):
        return ", ".join(map(_answer, answer))
    return _value(answer)


def _value(value: Any) -> str:
    if isinstance(value, (bytes, bytearray, memoryview)):
        data = bytes(value[: _MOST_BYTES + 1])
        return f"<{len(value)} bytes>" if len(value) > _MOST_BYTES else _shown(data)
    if isinstance(value, tuple):
        return f"({', '.join(map(_value, value))})"
    if isinstance(value, list):
        return f"<{len(value)} items>"
    if isinstance(value, (int, str, bool)) or value is None:
        return str(value)
    return f"<{type(value).__name__}>"


def _shown(name: bytes) -> str:
    return repr(name)[2:-1]


def _failure(failure: BaseException) -> str:
    code = getattr(failure, "errno", None)
    return errno.errorcode.get(code, str(code)) if isinstance(code, int) else repr(failure)


def _since(begin: int) -> str:
    return f"{(time.monotonic_ns() - begin) / 1000:.0f} us"
