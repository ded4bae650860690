"""The ring of records in a store: limited, complete after a crash, not to be forged by recorded users."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cowfs.errors import StoreError
from cowfs.layers.directory import DirectoryLayer
from cowfs.store.format import layout, records
from cowfs.store.format.records import Records

MIB = 1 << 20


@pytest.fixture
def layer(tmp_path: Path) -> Iterator[DirectoryLayer]:
    """The filesystem of a store without records."""
    (tmp_path / "cowfs").mkdir()
    made = DirectoryLayer(os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY), "store")
    with closing(made):
        yield made


def opened(layer: DirectoryLayer, size: int = 16 * MIB) -> Records:
    """Open the records of a store with this size in bytes."""
    found, said = records.open_or_make(layer, size)
    assert not said
    return found


def file_of(layer: DirectoryLayer, tmp_path: Path) -> Path:
    """Return the place of the records."""
    del layer
    return tmp_path / "cowfs/blame"


def test_the_newest_come_first_and_stay(layer: DirectoryLayer) -> None:
    with closing(opened(layer)) as made:
        for number in range(5):
            made.end_draft(b"batch %d" % number)
        assert made.keep_draft(b"draft")
        assert made.keep_draft(b"draft, longer")
        expected = [b"draft, longer", *(b"batch %d" % number for number in (4, 3, 2, 1, 0))]
        assert list(made.contents()) == expected
    with closing(opened(layer)) as again:
        assert list(again.contents()) == expected
        again.end_draft()
        again.end_draft(b"after")
        assert list(again.contents()) == [b"after", *expected]


def test_the_oldest_go_and_the_file_does_not_grow(layer: DirectoryLayer, tmp_path: Path) -> None:
    with closing(opened(layer)) as made:
        size = file_of(layer, tmp_path).stat().st_size
        assert size == MIB
        for number in range(200):
            made.end_draft(b"%03d" % number + os.urandom(number * 7919 % 60_000))
            assert made.gaps == 0
        found = [content[:3] for content in made.contents()]
    assert found == [b"%03d" % number for number in range(199, 199 - len(found), -1)]
    assert 15 < len(found) < 100
    assert file_of(layer, tmp_path).stat().st_size == size
    with closing(opened(layer)) as again:
        assert [content[:3] for content in again.contents()] == found
        assert again.gaps == 0


def test_the_file_is_for_its_owner_alone(layer: DirectoryLayer, tmp_path: Path) -> None:
    opened(layer).close()
    assert file_of(layer, tmp_path).stat().st_mode & 0o7777 == 0o600


def test_a_draft_that_was_cut_short_is_what_it_was(layer: DirectoryLayer, tmp_path: Path) -> None:
    with closing(opened(layer)) as made:
        assert made.keep_draft(b"old" * 5000)
        before = file_of(layer, tmp_path).read_bytes()
        assert made.keep_draft(b"new" * 5000)
    after = bytearray(file_of(layer, tmp_path).read_bytes())
    changed = [place for place in range(0, len(after), 4096) if after[place:][:4096] != before[place:][:4096]]
    assert len(changed) > 2
    for place in changed[2:]:  # the machine crashed when two of its blocks were on disk
        after[place : place + 4096] = before[place : place + 4096]
    file_of(layer, tmp_path).write_bytes(after)
    with closing(opened(layer)) as again:
        assert list(again.contents()) == [b"old" * 5000]


def test_what_is_recorded_cannot_be_taken_for_a_frame(layer: DirectoryLayer, tmp_path: Path) -> None:
    """A user who knows the format, but not the key, puts frames into the data that is recorded."""
    other = tmp_path / "other"
    (other / "cowfs").mkdir(parents=True)
    with closing(DirectoryLayer(os.open(other, os.O_RDONLY | os.O_DIRECTORY), "other")) as his:
        with closing(opened(his)) as made:
            made.end_draft(b"forged")
        image = (other / "cowfs/blame").read_bytes()
    place = image.index(b"blmf")
    frame = image[place : place + 4096]
    with closing(opened(layer)) as made:
        made.end_draft(bytes(4096 - 36) + frame * 10)
        made.end_draft(b"newest")
    whole = bytearray(file_of(layer, tmp_path).read_bytes())
    first = whole.index(b"blmf")
    assert whole[first + 4096 :][:4] == b"blmf"  # the place of a frame
    whole[first : first + 4096] = bytes(4096)  # it was the oldest, and was overwritten
    file_of(layer, tmp_path).write_bytes(whole)
    with closing(opened(layer)) as again:
        assert list(again.contents()) == [b"newest"]


def test_a_damaged_part_is_told_of(layer: DirectoryLayer, tmp_path: Path) -> None:
    with closing(opened(layer)) as made:
        for number in range(3):
            made.end_draft(b"content %d" % number)
    data = file_of(layer, tmp_path).read_bytes()
    file_of(layer, tmp_path).write_bytes(data.replace(b"content 1", b"content X"))
    with closing(records.read(layer)) as found:
        assert list(found.contents()) == [b"content 2", b"content 0"]
        assert found.gaps == 1


@pytest.mark.parametrize("damage", ["empty", "cut", "magic", "ring", "fifo"])
def test_damage_is_told_and_recording_begins_anew(layer: DirectoryLayer, tmp_path: Path, damage: str) -> None:
    with closing(opened(layer)) as made:
        made.end_draft(b"content")
    path = file_of(layer, tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "magic":
        data[0] ^= 1
    elif damage == "ring":
        data[16:24] = b"\xff" * 8
    kept = {"empty": 0, "cut": 500_000}.get(damage, len(data))
    path.write_bytes(data[:kept])
    if damage == "fifo":
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(StoreError, match="damaged"):
        records.read(layer)
    found, said = records.open_or_make(layer, 16 * MIB)
    with closing(found):
        assert "damaged" in said
        found.end_draft(b"new")
        assert list(found.contents()) == [b"new"]


def test_a_newer_version_is_left_alone(layer: DirectoryLayer, tmp_path: Path) -> None:
    opened(layer).close()
    path = file_of(layer, tmp_path)
    data = bytearray(path.read_bytes())
    data[8] = 2
    path.write_bytes(data)
    for call in (lambda: records.read(layer), lambda: records.open_or_make(layer, 16 * MIB)):
        with pytest.raises(StoreError, match="version 2"):
            call()
    assert path.read_bytes() == data


def test_nonsense_is_told_as_that(layer: DirectoryLayer) -> None:
    from cowfs.changes.blame import blame

    good = {"begun": 1, "processes": [[1, 0, "p", ["p"], "/"]], "directories": [""]}
    for content in (
        b"no zlib",
        records.pack({}),
        records.pack({**good, "records": [[1, 0, 0, 7, 0, "name", 1]]}),
        records.pack({**good, "records": [[1, 0, 0, 0, -5, "name", 1]]}),
        records.pack({**good, "records": [[1, -5, 0, 0, 0, "name", 1]]}),
        records.pack({**good, "records": [[1]]}),
        records.pack({**good, "records": 5}),
    ):
        with pytest.raises(StoreError, match="damaged"):
            blame([content], [b"name"], "store")
    histories, since = blame(
        [records.pack({**good, "records": [[1, 0, 0, 0, 0, "name", 1]]})], [b"name"], "store"
    )
    assert since == 1 and histories[0].last["made"].process is not None
    assert layout.BLAME == b"blame"
