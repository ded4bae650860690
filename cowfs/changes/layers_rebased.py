"""List the layers of a store that a rebase builds again, each on the new version of the layer below it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cowfs.layers.base import Key
from cowfs.store.format.checkpoints import UPPER, Checkpoint, Layers


@dataclass(frozen=True, slots=True)
class Step:
    """One layer to be built from an existing one."""

    top: Checkpoint | None
    """The existing layer; None: the upper of the store."""
    merged: tuple[Checkpoint, ...]
    """Layers of deleted checkpoints directly below *top*, to be merged with it. Topmost first."""
    below: tuple[Checkpoint, ...]
    """All layers below *merged*, topmost first."""
    base: int | None
    """The number of the layer directly below *merged*; None: the lowers."""

    @property
    def number(self) -> int:
        """The number of *top*."""
        return UPPER if self.top is None else self.top.number


def steps(layers: Layers, upper: Key) -> list[Step]:
    """Return the layers to build, each after the one below it, the upper last. Blocks; OSError,
    StoreError."""
    known = layers.all()
    wanted: dict[int, tuple[int, ...]] = {UPPER: layers.below(upper)}
    if any(number not in known for number in wanted[UPPER]):
        layers.frozen(upper)  # says which one is missing
    for one in known.values():
        if not one.name:
            continue
        wanted[one.number] = one.below
        if any(number not in known for number in one.below):
            layers.under(one)  # says which one is missing
    for below in list(wanted.values()):
        for number in below:
            wanted[number] = known[number].below
    for number, below in wanted.items():
        if number in below:
            layers.under(known[number])  # says so
    standing: dict[int, int] = {}
    for below in wanted.values():
        for number in below[:1]:
            standing[number] = standing.get(number, 0) + 1

    def joins(number: int) -> bool:
        return not known[number].name and standing.get(number) == 1

    def made() -> Iterator[Step]:
        for number, below in wanted.items():
            if number != UPPER and joins(number):
                continue
            count = next((at for at, one in enumerate(below) if not joins(one)), len(below))
            chain = tuple(known[one] for one in below)
            top = None if number == UPPER else known[number]
            yield Step(top, chain[:count], chain[count:], below[count] if count < len(below) else None)

    return sorted(made(), key=lambda step: (step.top is None, len(step.below)))
