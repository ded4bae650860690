"""Carry the changes of mounts onto the directories that are their lowers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from cowfs.api import Tell, open_changes
from cowfs.changes.paths import join
from cowfs.changes.render import escape
from cowfs.client import ask, facts_of, the_mount
from cowfs.errors import SystemFailure
from cowfs.exports.commit import Stage, complete, conflicts, forbidden, resume
from cowfs.exports.entries import Withheld
from cowfs.exports.losses import Losses
from cowfs.exports.plan import Plan, plan
from cowfs.linux.trust import who_can_change
from cowfs.linux.user_namespace import has_all

Tick = Callable[[bytes, int], None]


@dataclass(frozen=True, slots=True)
class Changed:
    """A mount whose changes go to its lower."""

    mountpoint: str
    root: str
    """The lower, a directory."""
    store: str = "memory"
    at: bytes = b""
    """The prefix of its paths in messages."""
    seen: int | None = None
    """When (ns) the lower was what the store's changes were made to, if that is longer ago."""

    def since(self, begun: int) -> int:
        """Return the moment after which no file of the lower may have been changed."""
        return begun if self.seen is None else min(self.seen, begun)


class Commit:
    """A commit in two steps: the changes that were prepared can be carried out when nothing is mounted any
    more.
    """

    def __init__(self) -> None:
        self.losses = Losses()
        self.conflicts: list[tuple[bytes, str]] = []
        self._stage: Stage | None = None

    def prepare(
        self, mounts: Sequence[Changed], *, since: int, force: bool, tell: Tell, tick: Tick = lambda *_: None
    ) -> bool:
        """Write everything needed to a directory; return whether that was done.

        It is not done if there are conflicts, unless *force*: the lower's version was changed after *since*
        (ns). Blocks. Raises CowfsError, and OSError with the path of what cannot be read.
        """
        with ExitStack() as stack:
            stage = Stage(place())
            undo = stack.enter_context(ExitStack())
            undo.callback(stage.abandon)  # even if it holds already, and may not be on disk
            for mount in mounts:
                changes = stack.enter_context(open_changes(mount.mountpoint, None, tell))
                before, after, told = changes.tree_before(), changes.tree(), list(changes.exactly())
                items = plan(told, after, before)
                found = conflicts(items, before, mount.since(since))
                self.conflicts += [(join(mount.at, path), why) for path, why in found]
                bad = set(forbidden(items, before, {change.path: change for change in told}, mount.root))
                if force:
                    items = self._without(items, bad, mount.at)
                else:
                    self.conflicts += [(join(mount.at, path), "may not be changed by you") for path in bad]
                if told and (force or not self.conflicts):
                    withheld = _withheld(mount.store)
                    lossy = os.path.isdir(mount.store)  # it cannot have an ACL of who has no number here
                    stage.add(
                        mount.root, items, before, after, told, self.losses, tick, withheld, keeps_acls=lossy
                    )
                if not (force or self.conflicts):  # what was copied may have been the lower's, and another's
                    found = conflicts(items, before, mount.since(since))
                    self.conflicts += [(join(mount.at, path), why) for path, why in found]
            if self.conflicts and not force:
                return False
            stage.finish()
            undo.pop_all()
            self._stage = stage
        return True

    def _without(self, items: Plan, bad: set[bytes], at: bytes) -> Plan:
        """Leave out what may not be changed, and everything below."""
        kept: Plan = {}
        out = b"\0"
        for path, item in items.items():
            if path.startswith(out):
                continue
            if path in bad:
                self.losses.add("left out, for you may not change it", join(at, path))
                out = path + b"/"
            else:
                kept[path] = item
        return kept

    def make(self, tick: Tick = lambda *_: None) -> None:
        """Carry out the prepared changes. Blocks. If it is interrupted, :func:`complete_all` continues."""
        assert self._stage is not None
        try:
            complete(self._stage.path, self.losses, tick)
        finally:
            self._stage.close()
            self._stage = None

    def forget(self) -> None:
        """Remove what was prepared, if it was."""
        if self._stage is not None:
            self._stage.abandon()
            self._stage = None


def look_for_stale(mount: Changed, begun: int, tell: Tell) -> int | None:
    """Tell what the lower has changed since the store's changes were made, and return when that was.

    If it is nothing, the store says from now on that its changes are to the lower of the moment *begun* (ns).
    Blocks. Raises CowfsError, and OSError with the path of what cannot be read.
    """
    found = the_mount(mount.mountpoint)
    seen = facts_of(found.dev)["store"].get("lowers_seen")
    if isinstance(seen, int) and mount.store != "memory":
        with open_changes(mount.mountpoint, None, lambda _: None) as changes:
            before, told = changes.tree_before(), list(changes)
            items = plan(told, changes.tree(), before)
            stale = [join(mount.at, path) for path, _ in conflicts(items, before, seen)]
        if stale:
            others = f" and {len(stale) - 1} more" if len(stale) > 1 else ""
            said = f"{mount.root}: {escape(stale[0])}{others}: was changed there after the store changed it"
            hint = f"the command sees the version of {mount.store}; cowfs revert takes it back"
            tell(f"{said} ({hint})")
            return seen
    for _ in ask(found.dev, "saw_lowers", when=begun):
        pass
    return None


def _withheld(store: str) -> Withheld:
    """Return what a commit leaves out: a user who can change the store, but not the lower, must gain no
    rights.
    """
    reason = None if store == "memory" else who_can_change(store)
    return {} if reason is None else dict.fromkeys(("nosuid", "nodev"), reason)


def place() -> str:
    """Return the directory in which commits are prepared: on a disk, so that interrupted ones can be
    completed.
    """
    state = os.environ.get("XDG_STATE_HOME", "")
    if os.geteuid() == 0 and has_all("uid"):
        state = "/var/lib"
    elif not os.path.isabs(state):
        state = os.path.expanduser("~/.local/state")
    return os.path.join(state, "cowfs", "commits")


def complete_all(lower: str, tell: Tell, *, force: bool = False) -> None:
    """Complete the commits that were interrupted. Blocks. SystemFailure if one to *lower* cannot be.

    With *force* one to *lower* overwrites what others have changed there meanwhile.
    """

    def is_of_it(roots: list[str]) -> bool:
        return any(os.path.join(root, "").startswith(os.path.join(lower, "")) for root in roots)

    losses = Losses()
    for path, roots, why in resume(place(), losses, lambda *_: None, lambda roots: force and is_of_it(roots)):
        if not why:
            tell(f"a commit to {', '.join(roots)} that was interrupted has been completed")
            continue
        said = f"a commit to {', '.join(roots)} that was interrupted cannot be completed: {why}"
        hint = f"remove {path} to leave things as they are"
        if is_of_it(roots):
            raise SystemFailure(said, hint)
        tell(f"{said} ({hint})")
    for text in losses:
        tell(text)
