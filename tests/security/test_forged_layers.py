"""Stores whose checkpoints, header and layers somebody has forged: an error of one line, soon, or none."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shlex
import socket
import stat
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from cowfs import api
from cowfs.changes.blame import names_of
from cowfs.errors import CowfsError, LayerError, StoreError
from cowfs.linux.files import open_ordinary
from cowfs.rebasing import rebase
from cowfs.store.format.kernel import commands
from cowfs.store.format.records import batches, pack
from tests.security.test_swaps import Watch
from tests.security.test_terminal import harmless
from tests.support.mounts import cowfs, mounted
from tests.support.system import needs_fuse, needs_root, run

pytestmark = [needs_root, needs_fuse]
PREFIX = "trusted.overlay.cowfs."
LONGEST = 10.0
"""Seconds of the processor that any of it may take."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a lower, and a directory store with three checkpoints: ``a``, on that ``b``, on that ``c``."""
    top = tmp_path_factory.mktemp("forged")
    (top / "lower/d").mkdir(parents=True)
    (top / "lower/f").write_text("f\n")
    with mounted(top / "lower", top / "mnt", top / "store") as here:
        for name in "abc":
            (here.path / name).write_text(name)
            (here.path / "d" / name).write_text(name)
            api.checkpoint(str(here.path), name)
        (here.path / "last").write_text("x")
    return top


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    run("cp", "-a", made / "store", tmp_path / "store")
    return tmp_path / "store"


def _name(layer: Path, **facts: object) -> None:
    os.setxattr(layer, PREFIX + "checkpoint", json.dumps(facts).encode())


def _on(layer: Path, number: object) -> None:
    os.setxattr(layer, PREFIX + "below", str(number).encode())


def _number(layers: Path) -> int:
    """Return the number of the lowest layer, which is ``a``."""
    return min(int(name) for name in os.listdir(layers))


def _lowest(layers: Path) -> Path:
    return layers / str(_number(layers))


def _replaced(path: Path, make: Callable[[Path], object]) -> None:
    path.rename(path.with_name("was"))
    make(path)


def _crowd(layers: Path, count: int, named: bool) -> None:
    for number in range(1000, 1000 + count):
        (layers / str(number)).mkdir()
        _name(layers / str(number), number=number, name=f"x{number}" if named else "", taken="2020")
        _on(layers / str(number), number + 1)


def _long(layers: Path) -> None:
    _crowd(layers, 1000, named=True)
    _on(layers.parents[1] / "upper", 1000)


def _zero(layers: Path) -> None:
    (layers / "0").mkdir()
    _name(layers / "0", number=0, name="zero", taken="0")
    _on(_lowest(layers), 0)


def _alias(layers: Path) -> None:
    run("cp", "-a", _lowest(layers), layers / f"0{_number(layers)}")


FORGERIES: dict[str, Callable[[Path], object]] = {
    "a name that drives terminals": lambda at: _name(
        _lowest(at), number=_number(at), name="../x\n\x1b]0;owned\x07/$(id)", taken="\x1b[2J"
    ),
    "no text": lambda at: _name(_lowest(at), number=_number(at), name=["x"], taken={"a": 1}),
    "half a character": lambda at: os.setxattr(
        _lowest(at), PREFIX + "checkpoint", b'{"number": %d, "name": "\\ud800", "taken": ""}' % _number(at)
    ),
    "a circle": lambda at: _on(_lowest(at), _number(at) + 2),
    "on itself": lambda at: _on(_lowest(at), _number(at)),
    "a large number": lambda at: _on(at.parents[1] / "upper", "9" * 3000),
    "one that is not there": lambda at: os.removexattr(_lowest(at), PREFIX + "checkpoint"),
    "number 0": _zero,
    "a number written otherwise": _alias,
    "a link for a layer": lambda at: _replaced(_lowest(at), lambda path: path.symlink_to("/etc")),
    "a fifo for a layer": lambda at: _replaced(_lowest(at), os.mkfifo),
    "a link for all": lambda at: _replaced(at, lambda path: path.symlink_to("/etc")),
    "a fifo for all": lambda at: _replaced(at, os.mkfifo),
    "thousands below each other": _long,
    "thousands without a name": lambda at: _crowd(at, 1000, named=False),
}


def _header(**changed: object) -> Callable[[Path], object]:
    def forge(at: Path) -> None:
        header = at.parent / "header.json"
        content = json.loads(header.read_text())
        lower = changed.pop("lower", {})
        content["lowers"][0].update(lower)
        header.write_text(json.dumps({**content, **changed}))

    return forge


FORGERIES |= {
    "a NUL in a lower": _header(lower={"path": "x\0y"}),
    "an offset beyond all": _header(lower={"offset": 1 << 63}),
    "an offset without end": _header(lower={"offset": float("inf")}),
    "a volatile directory elsewhere": _header(volatile=["/../../etc"]),
    "a volatile directory of no path": _header(volatile=["tmp\x1b[2J"]),
    "no list of lowers": _header(lowers="x"),
}


_SHOWN = {"a name that drives terminals", "half a character", "a volatile directory of no path"}


def _uses(what: str) -> Iterator[Callable[[], object]]:
    def listed(since: str | None, until: str | None) -> list[Any]:
        with api.open_changes(what, since=since, until=until) as changes:
            return list(changes)

    yield lambda: api.checkpoints(what)
    for since, until in ((None, None), ("a", None), ("a", "c"), (None, "b"), ("x1000", "x1001")):
        yield lambda since=since, until=until: listed(since, until)  # type: ignore[misc]
    yield lambda: api.checkpoint(what, "new")
    for name in ("c", "a", "x1500"):
        yield lambda name=name: api.rollback(what, name)  # type: ignore[misc]
    yield lambda: api.delete_checkpoint(what, "b")
    yield lambda: list(api.take_back(what, "vacuum"))


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_store_is_refused_or_read(store: Path, forgery: str) -> None:
    FORGERIES[forgery](store / "cowfs/layers")
    etc, descriptors = sorted(os.listdir("/etc")), len(os.listdir("/proc/self/fd"))
    for use in _uses(str(store)):
        start = time.process_time()
        with suppress(CowfsError):
            use()
        assert time.process_time() - start < LONGEST
    assert (sorted(os.listdir("/etc")), len(os.listdir("/proc/self/fd"))) == (etc, descriptors)
    for command in (["checkpoints"], ["info"], ["checkpoints", "--json"]) if forgery in _SHOWN else ():
        done = cowfs(*command, store)
        assert done.returncode in {0, 32} and harmless(done.stdout + done.stderr), (command, done)


def test_what_is_missing_is_said(store: Path) -> None:
    os.removexattr(_lowest(store / "cowfs/layers"), PREFIX + "checkpoint")
    opened = api.open_changes(str(store), until="b")
    with pytest.raises(StoreError, match=r"layers/[0-9]+ is missing"), opened as changes:
        list(changes)


@pytest.mark.parametrize("name", ["../../evil", "/evil", "..", "c/../../../evil", "-"])
def test_versions_in_conflict_stay_in_their_directory(
    made: Path, store: Path, tmp_path: Path, name: str
) -> None:
    """A checkpoint may be called anything by who made the store."""
    layers = store / "cowfs/layers"
    name = name if name[0] != "/" else str(tmp_path / "evil")
    _name(_lowest(layers), number=_number(layers), name=name, taken="2020")
    (tmp_path / "new").mkdir()
    for file in "abc":
        (tmp_path / "new" / file).write_text("another")
    there = set(os.listdir(tmp_path))
    rebase(
        str(store),
        api.Lowers((str(tmp_path / "new"),)),
        api.Lowers((str(made / "lower"),)),
        conflicts=str(tmp_path / "conflicts"),
    )
    assert set(os.listdir(tmp_path)) - there == {"conflicts"}
    (odd,) = set(os.listdir(tmp_path / "conflicts/checkpoints")) - {"b", "c"}
    assert (tmp_path / "conflicts/checkpoints" / odd / "changed/a").is_file()


def _step(**facts: object) -> str:
    return json.dumps({"number": 0, "kind": "moved", "path": _text(b"f"), **facts})


def _text(path: bytes) -> str:
    return base64.b64encode(path).decode()


_ATTRIBUTES = {"mode": 0o100644, "uid": 0, "gid": 0, "atime_ns": 0, "mtime_ns": 0, "xattrs": []}
LOGS = {
    "a number without end": _step(number=float("inf")),
    "a number below zero": _step(number=-1),
    "another kind": _step(kind="other"),
    "no object": "[]",
    "a text": '"undone"',
    "nothing undone": json.dumps({"undone": {}}),
    "something undone without end": json.dumps({"undone": float("inf")}),
    "a path that leads out": _step(path=_text(b"../../../victim")),
    "a rename that leads out": _step(kind="renamed", source=_text(b"../../../victim")),
    "a rename to no name": _step(kind="renamed", source=_text(b"a\0b")),
    "a rename of slashes": _step(kind="renamed", path=_text(b"//"), source=_text(b"/")),
    "no attributes": _step(kind="attributes"),
    "the root, moved": _step(path=""),
    "a rename from nowhere": _step(kind="renamed"),
    "not the first step": _step(number=1),
    "a step after what was undone": f'{_step()}\n{{"undone": 0}}\n{_step(number=1)}',
    "undone twice": f'{_step()}\n{{"undone": 0}}\n{{"undone": 0}}',
    "undone, but not done": '{"undone": 0}',
    "attributes without end": _step(
        kind="attributes", attributes={**_ATTRIBUTES, "xattrs": [[] for _ in range(1 << 18)]}
    ),
    "another value": _step(attributes=[[] for _ in range(1 << 18)]),
    **{
        f"attributes with {name} {value}": _step(kind="attributes", attributes={**_ATTRIBUTES, name: value})
        for name, value in (
            ("mode", float("inf")), ("mode", 1 << 70), ("mode", 0o40755), ("uid", -5), ("gid", 1 << 40),
            ("mtime_ns", 1 << 80), ("xattrs", 5), ("xattrs", [[1, 2]]),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("log", LOGS)
def test_a_forged_log_of_the_trash_is_refused(made: Path, store: Path, log: str) -> None:
    (store / "cowfs/trash/1").mkdir(parents=True)
    (store / "cowfs/trash/1/log").write_text(LOGS[log] + "\n")
    if log == "nothing undone":
        os.truncate(store / "cowfs/trash/1/log", (256 << 20) + 1)
    victim = store / "victim"
    victim.write_text("x")
    with suppress(CowfsError):
        done = list(api.take_back(str(store), "undo"))
        assert all(one.why_not for one in done), done
    assert victim.read_text() == "x"
    with api.open_changes(str(store)) as changes:
        assert (b"f", "M") not in {(one.path, one.kind) for one in changes}


def test_attributes_of_the_union_come_from_no_log(made: Path, store: Path) -> None:
    (store / "cowfs/trash/1").mkdir(parents=True)
    own = [_text(b"trusted.overlay.redirect"), _text(b"/d")]
    step = _step(kind="attributes", attributes={**_ATTRIBUTES, "mode": 0o100600, "xattrs": [own]})
    (store / "cowfs/trash/1/log").write_text(step + "\n")
    assert [one.why_not for one in api.take_back(str(store), "undo")] == [""]
    assert stat.S_IMODE((store / "upper/f").stat().st_mode) == 0o600
    with pytest.raises(OSError):
        os.getxattr(store / "upper/f", "trusted.overlay.redirect")


def test_records_that_are_nothing_but_beginnings(store: Path) -> None:
    """Each says that it is as long as all others together, and all would be read to see that it is not."""
    begin = 4096 + 2 * (192 << 10)
    for size, ring in ((8 << 20, 64 << 20), (8 << 20, (8 << 20) - begin), (180 << 10, (8 << 20) - begin)):
        head = struct.pack("<8sIIQ16s", b"cowfsblm", 1, 0, ring, bytes(16)).ljust(begin, b"\0")
        frame = struct.pack("<4sIQI", b"blmf", size - 100, 5, 1).ljust(4096, b"\0")
        (store / "cowfs/blame").write_bytes(head + frame * (ring // 4096))
        start = time.process_time()
        with suppress(StoreError):
            api.blame(str(store), [b"f"])
        assert time.process_time() - start < LONGEST


_BY = {"begun": 1, "processes": [], "directories": ["d/" * 400_000]}
_LATEST = 253402300799 * 10**6
_BATCHES: dict[str, dict[str, Any]] = {
    "a long path for each": {**_BY, "records": [[1, 0, 0, -1, 0, f"{each}", 1] for each in range(1900)]},
    "two for each": {**_BY, "records": [[1, 0, 0, -1, 0, f"{each}", 1, 0, "x"] for each in range(1900)]},
    "a time without a date": {**_BY, "begun": _LATEST, "records": [[1, 0, 0, -1, -1, "f", 1]]},
}


@pytest.mark.parametrize("batch", _BATCHES)
def test_a_forged_batch_is_refused(batch: str) -> None:
    """The batch is small in the store, and would fill the memory."""
    tracemalloc.start()
    try:
        with pytest.raises(StoreError, match="the record of changes is damaged"):
            names_of([pack(_BATCHES[batch])], "store", lambda _: True)
        assert tracemalloc.get_traced_memory()[1] < 128 << 20
    finally:
        tracemalloc.stop()


def test_batches_end() -> None:
    """Another user's daemon may send any number of them; and each may be long when it is unpacked."""
    small, large = (
        pack({"begun": 1, "processes": [], "directories": ["d" * size]}) for size in (1, 1_000_000)
    )
    for content in (small, large):
        with pytest.raises(StoreError, match="the record of changes is damaged"):
            for _ in batches(itertools.repeat(content, 1 << 20), "store"):
                pass


def test_layers_that_another_may_write(store: Path) -> None:
    (store / "cowfs/layers").chmod(0o777)
    with pytest.raises(StoreError, match="other users can write to cowfs/layers"):
        api.checkpoint(str(store), "new")


def _elf(table: int, size: int, count: int, programs: int = 0) -> bytes:
    fields = struct.pack("<QQ6xHHHH", programs, table, 56, 1 if programs else 0, size, count)
    load = struct.pack("<IIQQQQQQ", 1, 0, (1 << 64) - 1, 0, 0, (1 << 64) - 1, 0, 0)
    return b"\x7fELF\x02\x01" + bytes(26) + fields + load + bytes(40_000)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(_elf((1 << 64) - 1, 64, 4), id="sections at the end of all"),
        pytest.param(_elf((1 << 63) - 256, 64, 4), id="sections up to the last offset"),
        pytest.param(_elf(0, 0, 0, 64), id="a program that is loaded from nowhere"),
        pytest.param(b"hsqs" * (1 << 22), id="nothing but beginnings"),
        pytest.param((b"hsqs" + bytes(24) + b"\4\0\0\0") * (1 << 20), id="nothing but version 4"),
    ],
)
def test_an_image_is_not_searched_for_without_end(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    (tmp_path / "mnt").mkdir()
    for option in ("offset=auto", "offset=0"):
        start = time.monotonic()
        done = cowfs("mount", tmp_path / "file", tmp_path / "mnt", "-o", option)
        assert done.returncode == 32 and harmless(done.stderr) and "failed" not in done.stderr, done.stderr
        assert time.monotonic() - start < LONGEST


def test_a_device_is_not_opened_to_look_at_it(made: Path, tmp_path: Path) -> None:
    """A store says where its lower is; to open a watchdog would be to restart the machine."""
    device = tmp_path / "device"
    os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    store = tmp_path / "store"
    run("cp", "-a", made / "store", store)
    _header(lower={"path": str(device)})(store / "cowfs/layers")
    uses: list[Callable[[], object]] = [
        lambda: api.checkpoint(str(store), "new"),
        lambda: list(api.take_back(str(store), "vacuum")),
        lambda: api.checkpoints(str(device)),
        lambda: os.close(open_ordinary(device, os.O_RDWR)),
    ]
    with closing(Watch()) as watch:
        watch.add(device)
        for use in uses:
            with suppress(CowfsError):
                use()
        for command, more in (("mount", [tmp_path]), ("info", []), ("check", [])):
            assert cowfs(command, device, *more).returncode, command
        assert watch.seen() == []


def test_no_server_is_called_for_another_user(made: Path, nobody_path: Path) -> None:
    """A store says where its lower is: a URL of a server that only we reach."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        store = nobody_path / "store"
        run("cp", "-a", made / "store", store)
        _header(lower={"path": f"http://127.0.0.1:{server.getsockname()[1]}/root.sfs"})(
            store / "cowfs/layers"
        )
        done = cowfs("diff", store)
        assert done.returncode == 1 and "give the lower with --lower" in done.stderr, done.stderr
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize(
    "forged",
    [
        {"kind": "squashfs; id #"},
        {"kind": "fuse"},
        {"path": "--bind"},
        {"uuid": ";id #"},
        {"uuid": "../../x"},
    ],
)
def test_commands_for_the_kernel_are_what_they_seem(forged: dict[str, str]) -> None:
    """Root runs them, of any store: `cowfs info --kernel STORE | sh`."""
    facts: dict[str, Any] = {"kind": "squashfs", "path": "/a;b", "fingerprint": "f", "uuid": "f00", **forged}
    try:
        lines = commands("/store;x", "directory", "trusted.overlay.", facts["uuid"], [facts], [])
    except LayerError as error:
        assert ("uuid" in forged, str(error).isprintable()) == (False, True)
        return
    assert shlex.split(lines[1])[:6] == ["mount", "-t", "squashfs", "-o", "ro,loop", "/a;b"]
    for line in lines[:2]:
        place = shlex.split(line)[-1]
        assert ".." not in place and place == line.split()[-1] and not set(place) & set(";#")
    assert shlex.split(lines[2])[:2] == ["cd", "/store;x"]
