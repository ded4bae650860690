"""A load in its own process, to be killed: ``python -m tests.ext3.killed IMAGE SEED``.

It tells on stdout what it does, so that who kills it knows what must be there: pickled records,
each behind its length.
"""

from __future__ import annotations

import pickle
import stat
import struct
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.ext3 import engine
from tests.ext3.load import BEGIN, COMMITTED, SYNCED, Load
from tests.ext3.model import Block, Model, Promises, State, Synced, perhaps_written
from tests.ext3.operations import COPYING
from tests.ext3.reader import Image

_LENGTH = struct.Struct("<I")


def main() -> None:
    """Run the load until it is killed."""
    path, seed = Path(sys.argv[1]), int(sys.argv[2])
    out = sys.stdout.buffer

    def say(*record: Any) -> None:
        data = pickle.dumps(record)
        out.write(_LENGTH.pack(len(data)) + data)
        out.flush()

    def mark(kind: int, number: int) -> None:
        say("mark", kind, load.syncs[number] if kind == SYNCED else number)

    def settled(model: Model, touched: set[int]) -> None:
        facts = {ino: model.states[-1].facts.get(ino) for ino in touched}
        blocks = {
            ino: {index: (id(block), _last(block, model.operation)) for index, block in node.blocks.items()}
            for ino in touched
            if (node := model.nodes.get(ino)) and stat.S_ISREG(node.facts.mode)
        }
        say("state", facts, blocks)

    base = Image(path.read_bytes())

    def writing(ino: int, offset: int, data: bytes) -> None:
        say("writing", ino, offset, data)

    with engine.opened(path) as opened:
        load = Load(opened.layer, base, seed, mark, settled=settled, writing=writing, kinds=COPYING)
        while True:
            load.run(100, commit_every=12, sync_every=8)


def _last(block: Block, operation: int) -> bytes | None:
    return block.data if block.operations[-1] == operation else None


@dataclass
class Account:
    """The records that a load has written."""

    states: list[State]
    promises: Promises = field(default_factory=Promises)
    _blocks: dict[int, Block] = field(default_factory=dict)
    _writing: tuple[int, int, bytes] | None = None

    def take(self, data: bytes) -> None:
        """Add a record."""
        what, *record = pickle.loads(data)
        if what == "state":
            self._writing = None
            self._take_state(*record)
            return
        if what == "writing":
            self._writing = tuple(record)
            return
        kind, number = record
        if kind == BEGIN:
            self.promises.begun = number
        elif kind == COMMITTED:
            self.promises.committed = number
        else:
            assert isinstance(number, Synced)
            self.promises.synced.append(number)

    def _take_state(
        self, facts: dict[int, Any], blocks: dict[int, dict[int, tuple[int, bytes | None]]]
    ) -> None:
        last = self.states[-1]
        state = State(dict(last.facts), dict(last.blocks))
        number = len(self.states)
        for ino, fact in facts.items():
            if fact is None:
                state.facts.pop(ino, None)
                state.blocks.pop(ino, None)
                continue
            state.facts[ino] = fact
            if ino in blocks:
                state.blocks[ino] = {index: self._block(number, *one) for index, one in blocks[ino].items()}
        self.states.append(state)

    def _block(self, number: int, identity: int, data: bytes | None) -> Block:
        known = self._blocks.get(identity)
        if known is None:
            # The file had no name, or was never seen: only its current content matters.
            known = self._blocks[identity] = Block(number, data or b"")
        elif data is not None and known.operations[-1] != number:
            known.write(number, data)
        return known

    def end(self) -> None:
        """End: data of the unfinished write may be in blocks that existed already."""
        if self._writing is not None:
            perhaps_written(self.states, *self._writing)


def records(data: bytes) -> list[bytes]:
    """Split the output into records; the last one may be incomplete."""
    found, at = [], 0
    while at + _LENGTH.size <= len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size + length
        if at <= len(data):
            found.append(data[at - length : at])
    return found


if __name__ == "__main__":
    main()
