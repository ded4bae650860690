"""What `mount -o blame` has recorded: of a mount, or of a store that is not mounted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

from cowfs.client import ask, record_batches
from cowfs.errors import CowfsError, MountFailure, SystemFailure
from cowfs.offline_changes import Tell, must_be_there


def of_mount(place: str, dev: str) -> Iterator[bytes]:
    """Yield the contents of the records of a mount, the newest first. SystemFailure if it records nothing."""
    try:
        yield from record_batches(ask(dev, "blame"), place)
    except MountFailure:
        raise
    except CowfsError as failure:
        if failure.message.startswith("unknown command"):
            raise SystemFailure(
                f"{place}: its daemon is an older cowfs, which records nothing",
                "mount it again, with -o blame",
            ) from None
        raise


def of_store(path: str, engine: str, stack: ExitStack, tell: Tell) -> Iterator[bytes]:
    """The same, of a store, which *stack* closes. StoreError if it has none."""
    from cowfs.store.format import records
    from cowfs.store.served.open import open_store

    must_be_there(path)
    store = open_store(path, engine=engine, read_only=True, progress=tell)
    stack.callback(store.close)
    found = records.read(store.layer)
    stack.callback(found.close)
    if found.gaps:
        tell(f"{path}: {found.gaps} parts of the record are damaged: what was in them is not told")
    return found.contents()
