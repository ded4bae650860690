"""The changes of a mounted union, as its daemon tells them."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import TYPE_CHECKING, Any

from cowfs.changes.merged import Merged
from cowfs.changes.mounted import MountedTree
from cowfs.changes.paths import checked
from cowfs.changes.version import Tree, Version
from cowfs.client import ask, checked_answer, record_batches, the_mount
from cowfs.errors import CowfsError, MountFailure
from cowfs.jsontext import whole
from cowfs.linux.trust import mount_forbids
from cowfs.offline_changes import Tell, identities
from cowfs.overlay.stack import Stack
from cowfs.overlay.xattr_format import XattrFormat
from cowfs.types import DATA_ONLY, AttrData, Change, Identity

if TYPE_CHECKING:
    from cowfs.changes.blame import Record
    from cowfs.changes.du import Used

PATIENCE = 3600.0
"""Seconds that a daemon may take from one change to the next: it may be comparing a huge file."""
_MOST = 1 << 64
"""No size and no attribute is larger."""


class MountedChanges:
    """The changes of a mounted union. Its lowers are opened when a file of theirs is asked for."""

    def __init__(
        self, path: str, dev: str, stack: ExitStack, tell: Tell, when: tuple[str | None, str | None]
    ) -> None:
        self._since, self._until = when
        self._path = path
        self._dev = dev
        self._stack = stack
        self._tell = tell
        self._lowers: Merged | None = None
        self._tree: MountedTree | None = None

    def __iter__(self) -> Iterator[Change]:
        return self._told()

    def within(self, paths: Sequence[bytes]) -> Iterator[Change]:
        return self._told(within=[base64.b64encode(path).decode() for path in paths])

    def exactly(self) -> Iterator[Change]:
        return self._told(directory_times=True)

    def tree(self) -> Tree:
        return self._opened_tree()

    def _opened_tree(self) -> MountedTree:
        tree = MountedTree(self._path)
        self._stack.callback(tree.close)
        if tree.dev != self._dev:
            raise MountFailure(f"{self._path}: is no longer the mount that was asked", "try again")
        return tree

    def tree_before(self) -> Tree:
        return self._opened()

    def _told(self, **how: Any) -> Iterator[Change]:
        from cowfs.changes.render import from_json

        since, until = self._since, self._until
        for reply in ask(self._dev, "diff", timeout=PATIENCE, since=since, until=until, **how):
            if "said" in reply:
                self._tell(str(reply["said"]))
            else:
                with checked_answer(self._path):
                    change = from_json(reply["change"])
                    checked(change.path), checked(change.source or b"")
                yield change

    def before(self, path: bytes) -> Version | None:
        return self._opened().version(path) if self._since is None else self._kept(path, self._since)

    def after(self, path: bytes) -> Version | None:
        if self._until is not None:
            return self._kept(path, self._until)
        if self._tree is None:
            self._tree = self._opened_tree()
        return self._tree.version(path)

    def _kept(self, path: bytes, name: str) -> Version | None:
        """Return what a checkpoint has at a path: the daemon, which has the store, reads it."""
        asked = base64.b64encode(path).decode()

        first = next(ask(self._dev, "version", timeout=PATIENCE, at=name, path=asked), None)
        if first is None:
            return None
        with checked_answer(self._path):
            attr = AttrData(*(whole(each, _MOST, -_MOST) for each in first["attr"]))

        def read() -> bytes:
            pieces, room = [], attr.st_size
            for reply in ask(self._dev, "version", timeout=PATIENCE, at=name, path=asked, content=True):
                with checked_answer(self._path):
                    pieces.append(base64.b64decode(reply.get("data", "")))
                    room -= len(pieces[-1])
                    if room < 0:
                        raise ValueError(room)
            return b"".join(pieces)

        return Version(attr, read)

    def files_before(self, path: bytes) -> Iterator[bytes]:
        if self._since is None:
            yield from self._opened().files(path)
            return
        asked = base64.b64encode(path).decode()
        for reply in ask(self._dev, "files", timeout=PATIENCE, at=self._since, path=asked):
            with checked_answer(self._path):
                found = checked(base64.b64decode(reply["path"]))
            yield found

    def explain(self, path: bytes) -> dict[str, Any]:
        return next(ask(self._dev, "explain", path=base64.b64encode(path).decode()), {})

    def usage(self) -> Iterator[Used]:
        from cowfs.changes.du import REASONS, Used

        for reply in ask(self._dev, "du", timeout=PATIENCE):
            if "said" in reply:
                self._tell(str(reply["said"]))
                continue
            with checked_answer(self._path):
                path = checked(base64.b64decode(reply["path"]))
                used = Used(path, str(reply["reason"]), whole(reply["size"], _MOST))
                used = used._replace(is_dir=reply.get("directory") is True)
                if used.reason not in REASONS:
                    raise ValueError(used.reason)
            yield used

    def about(self) -> list[tuple[str, str]]:
        from cowfs.client import facts_of

        facts = facts_of(self._dev)
        with checked_answer(self._path):
            store = facts["store"]
            return [
                ("store", f"{store['path']}"),
                *(("lower", f"{one['path']} ({one['description']})") for one in facts["lowers"]),
            ]

    def paths(self) -> list[str]:
        from cowfs.client import facts_of

        facts = facts_of(self._dev)
        with checked_answer(self._path):
            return [str(one["path"]) for one in (facts["store"], *facts["lowers"])]

    def count_names(self, *, merged: bool = False) -> int:
        from cowfs.changes.names import count_names
        from cowfs.client import facts_of

        with checked_answer(self._path):
            is_image = facts_of(self._dev)["store"]["kind"] != "directory"
        if not is_image:
            return 0  # the numbers are those of all that is on its filesystem
        stats = os.statvfs(self._path)
        lowers = self._opened().layers if merged else ()
        return stats.f_files - stats.f_ffree + sum(count_names(layer, layer.root) for layer in lowers)

    def withheld(self) -> dict[str, str]:
        why = {option: f"{self._path} is mounted {option}" for option in mount_forbids(self._path)}
        words = the_mount(self._path).super_words
        if f"user_id={os.geteuid()}" in words and os.geteuid() == 0 and "allow_other" not in words:
            why["shown"] = f"{self._path} is mounted for root alone"
        return why

    def records(self) -> Iterator[Record] | None:
        from cowfs.changes.blame import records

        replies = ask(self._dev, "blame")
        try:
            first = next(replies, None)
        except CowfsError:
            return None
        if first is None:
            return iter(())
        return records(record_batches(chain([first], replies), self._path), self._path)

    def _opened(self) -> Merged:
        if self._lowers is None:
            self._lowers = self._open()
        return self._lowers

    def _open(self) -> Merged:
        from cowfs.client import facts_of
        from cowfs.lowers import open_lowers

        facts = facts_of(self._dev)
        with checked_answer(self._path):
            told = facts["lowers"]
            offsets = [int(lower["offset"]) for lower in told]
            paths = [str(lower["path"]) for lower in told]
            fingerprints = [str(lower["fingerprint"]) for lower in told]
            data_only = sum(one.startswith(DATA_ONLY) for one in fingerprints)
            styles = [Identity("", one, "", "").whiteouts for one in fingerprints]
            prefix = str(facts["store"]["xattr_prefix"]).encode()
        found = identities(paths, offsets, data_only, styles)
        for now, fingerprint in zip(found, fingerprints, strict=True):
            if now.fingerprint != fingerprint:
                raise MountFailure(
                    f"{now.path}: has changed since it was mounted: {now.description}",
                    "put the old one back, or unmount",
                )
        layers = open_lowers(paths, "auto", offsets, data_only, styles)
        for layer in layers:
            self._stack.callback(layer.close)
        return Merged(Stack(layers, XattrFormat(prefix)))
