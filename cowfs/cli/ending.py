"""Commit, keep or discard the changes that ``cowfs run``'s command made."""

from __future__ import annotations

import argparse
import os
import sys
import termios
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from cowfs.changes.paths import join
from cowfs.changes.render import Summary, escape, line
from cowfs.cli.output import progress_line, say, warn
from cowfs.cli.sandbox import Part, forget_unused, name_of
from cowfs.commits import Changed, Commit, complete_all, look_for_stale, place
from cowfs.errors import CowfsError
from cowfs.exports.target import remove
from cowfs.linux.signals import read_answer

FAILED = 125
"""Exit code if the command ran, but its changes could not be committed or kept."""
_SHOWN = 20
"""How many changes are shown before cowfs asks what to do with them."""


def complete_interrupted(lower: str, *, force: bool) -> None:
    """Complete interrupted commits. SystemFailure if one to *lower* cannot be completed."""
    complete_all(os.path.realpath(lower), warn, force=force)


class Ending:
    """Decides about the changes while everything is mounted, then finishes when nothing is mounted."""

    def __init__(self, args: argparse.Namespace, parts: Sequence[Part], since: int) -> None:
        self._args = args
        self._parts = list(parts)
        self._since = since
        self._commit = Commit()
        self._is_prepared = False
        self._is_discarded = args.discard
        self._has_failed = False
        self._changed: list[Part] = []
        self._seen: dict[str, int | None] = {}

    def look_at_stores(self) -> None:
        """Before the command runs, report what has changed in the lowers since the stores changed."""
        for part in self._parts:
            if os.path.isdir(part.lower):
                changed = Changed(part.mountpoint, part.lower, part.store, part.at)
                self._seen[part.mountpoint] = look_for_stale(changed, self._since, warn)

    def decide(self) -> None:
        """Show the changes, ask what to do with them, and do the part that needs the mount.

        Prints failures instead of raising them. :meth:`finish` returns the exit code.
        """
        args = self._args
        asks = _is_seen() and not (args.commit or args.discard or args.keep)
        if not (asks or args.root or args.commit or args.keep):
            return
        try:
            total = self._look(shows=asks)
        except (CowfsError, OSError) as error:  # the changes are unknown, and must not be lost
            self._fail(error)
            if not args.discard:
                self._changed = list(self._parts)
                self._do("rescue")
            return
        if not total:
            return
        if asks:
            _forget_typed()
        answer = "commit" if args.commit else "discard" if args.discard else "keep" if args.keep else ""
        try:
            while asks and not self._do(_ask(self._choices(), at_end="keep" if self._is_kept else "discard")):
                pass
        except KeyboardInterrupt:  # Ctrl-C is not an answer
            self._leave()
            return
        if not asks and not self._do(answer) and answer in {"commit", "keep"}:
            self._do("rescue")

    def _leave(self) -> None:
        """Keep the changes, and print where."""
        print(file=sys.stderr)
        if self._is_kept:
            warn(f"nothing was committed or discarded: the changes are in {self._args.store}")
        self._do("rescue")

    def finish(self) -> int:
        """Make the prepared commit; return 125 if anything failed, else 0. Nothing may be mounted."""
        used = set() if self._is_discarded else {part.mountpoint for part in self._changed}
        if self._is_prepared:
            self._make()
        if self._is_discarded and self._parts and self._parts[0].is_new:
            remove(self._parts[0].store)
        forget_unused(self._parts, used)
        return FAILED if self._has_failed else 0

    def _make(self) -> None:
        """Make the prepared commit, and remove its changes from the stores."""
        try:
            with progress_line() as show:
                self._commit.make(lambda path, _: show(f"committing {escape(path)}"))
        except (CowfsError, OSError) as error:
            self._fail(error)
            warn("the next `cowfs run` completes the commit")
            return
        for text in self._commit.losses:
            warn(f"commit: {text}")
        self._has_failed |= self._commit.losses.is_partial
        try:
            self._clear_stores()
        except (CowfsError, OSError) as error:
            self._fail(error)
            warn("the changes were committed, but are also still in the store")

    # --- the changes

    def _look(self, *, shows: bool) -> int:
        """Find the changes, and show the first ones if *shows*; return how many there are."""
        from cowfs.api import open_changes

        summary = Summary()
        for part in self._parts:
            before = summary.total
            with open_changes(part.mountpoint, None, warn) as changes:
                for change in summary.counted(iter(changes)):
                    if shows and summary.total <= _SHOWN:
                        source = change.source if change.source is None else join(part.at, change.source)
                        print(line(replace(change, path=join(part.at, change.path), source=source)))
            if summary.total > before:
                self._changed.append(part)
        if shows and summary.total > _SHOWN:
            say(f"… and {summary.total - _SHOWN} more")
        if summary.total or shows:
            sys.stdout.flush()
            warn(str(summary))
        return summary.total

    # --- the answer

    @property
    def _is_kept(self) -> bool:
        return (self._args.store or "memory") != "memory"

    def _choices(self) -> dict[str, str]:
        choices = {}
        if all(_is_writable(part.lower) for part in self._parts):
            choices["c"] = "commit"
        choices["k"] = "keep"
        if all(part.store == "memory" or part.is_new for part in self._parts):
            choices["d"] = "discard"
        return choices

    def _do(self, answer: str) -> bool:
        """Do what the user chose; return whether that worked, so that no other answer is needed."""
        try:
            match answer:
                case "commit":
                    return self._prepare()
                case "keep" if not self._is_kept:
                    return self._keep(self._args.keep or _ask_name())
                case "rescue" if not self._is_kept:
                    self._keep(os.path.join(os.path.dirname(place()), "kept", f"{time.time_ns():x}.bs"))
                    self._has_failed = True  # the user did not choose this
                case "discard":
                    self._is_discarded = True
                case "" if not self._is_kept:
                    warn("discarded (--commit or --keep STORE keeps them)")
        except (CowfsError, OSError) as error:
            self._fail(error)
            return False
        return True

    def _prepare(self) -> bool:
        """Prepare the commit; return whether that worked, and print the conflicts."""
        mounts = [
            Changed(part.mountpoint, part.lower, part.store, part.at, self._seen.get(part.mountpoint))
            for part in self._changed
        ]
        self._commit = Commit()
        with progress_line() as show:
            done = self._commit.prepare(
                mounts,
                since=self._since,
                force=self._args.force,
                tell=warn,
                tick=lambda path, _: show(f"preparing {escape(path)}"),
            )
        for path, why in self._commit.conflicts:
            warn(f"conflict: {escape(path) or '/'} {why}")
        if not done:
            warn("nothing was committed (--force also overwrites these files)")
        self._has_failed = not done
        self._is_prepared = done
        return done

    def _keep(self, store: str) -> bool:
        """Write the changes to new stores, those of the root to *store*; return whether that worked."""
        from cowfs.cli.persist import persist

        if not store:
            return False
        os.makedirs(os.path.dirname(os.path.abspath(store)), mode=0o700, exist_ok=True)
        for part in self._parts if self._changed else []:
            if part.at and part not in self._changed:
                continue
            target = store
            if part.at:
                os.makedirs(f"{store}.mounts", mode=0o700, exist_ok=True)
                target = os.path.join(f"{store}.mounts", name_of(part.at))
            if os.path.lexists(target):
                warn(f"{target}: already exists (give another name)")
                return False
            shown, _ = persist(part.mountpoint, target, tell=lambda _: None)
            warn(f"the changes of {os.path.join('/', os.fsdecode(part.at))} are kept in {shown}")
        self._has_failed = False
        return True

    def _clear_stores(self) -> None:
        """Remove from the stores what the lowers now contain."""
        from cowfs.api import Lowers, take_back

        for part in self._changed:
            if part.store != "memory":
                for _ in take_back(part.store, "vacuum", None, Lowers((part.lower,))):
                    pass

    def _fail(self, error: CowfsError | OSError) -> None:
        self._has_failed = True
        if isinstance(error, CowfsError):
            warn(str(error))
        else:
            name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else "changes"
            warn(f"{name}: {error.strerror or error}")


def _is_writable(lower: str) -> bool:
    return os.path.isdir(lower) and not os.statvfs(lower).f_flag & os.ST_RDONLY


def _is_seen() -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def _forget_typed() -> None:
    """Discard what was typed before the question: the command may have typed it (TIOCSTI of ioctl_tty(2))."""
    with suppress(termios.error):
        termios.tcflush(sys.stdin, termios.TCIFLUSH)


def _ask(choices: dict[str, str], at_end: str) -> str:
    """Return the user's answer; *at_end* for Ctrl-D or a closed terminal. KeyboardInterrupt for Ctrl-C."""
    while True:
        words = ", ".join(f"[{key}]{word[1:]}" for key, word in choices.items())
        said = read_answer(f"{words}? ")
        if not said:
            return at_end
        found = [word for key, word in choices.items() if said.strip().lower() in {key, word}]
        if found:
            return found[0]


def _ask_name() -> str:
    with suppress(KeyboardInterrupt):
        return read_answer("store (a new file): ").strip()
    return ""
