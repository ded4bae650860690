"""The C engine through its own interface, checked by e2fsck, and again with sanitizers."""

from __future__ import annotations

import errno
import os
import random
import stat
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs.formats.ext3.records import FIRST, number_of, time_of
from tests.support import ext3, sanitized
from tests.support.raw_ext3 import ROOT, Engine, ffi, lib, recovered, refused, sound
from tests.support.system import run

GEOMETRIES = [(1024, 128), (1024, 256), (2048, 256), (4096, 256)]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory in memory, because thousands of barriers would take minutes on a disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as directory:
        yield Path(directory)


@pytest.fixture(params=GEOMETRIES, ids=lambda pair: "-".join(map(str, pair)))
def image(request: pytest.FixtureRequest, place: Path) -> Iterator[Path]:
    block_size, inode_size = request.param
    path = ext3.make(
        place / "image", block_size, inode_size, size=24 << 20, more=("-J", "size=4", "-N", "8192")
    )
    yield path
    sound(path)


@pytest.fixture
def plain(place: Path) -> Iterator[Path]:
    path = ext3.make(place / "image", size=64 << 20, more=("-J", "size=4"))
    yield path
    sound(path)


def test_every_kind_of_inode(image: Path) -> None:
    with Engine(image) as engine:
        directory = engine.create(ROOT, b"dir", 0o40750, uid=70000, gid=3)
        device = engine.create(directory, b"device", stat.S_IFBLK | 0o600, major=259, minor=70000)
        whiteout = engine.create(directory, b"whiteout", stat.S_IFCHR)
        short = engine.create(directory, b"short", 0o120777, b"s" * 59)
        long = engine.create(directory, b"long", 0o120777, b"l" * 60)
        engine.call("setattr", device, 31, ffi.new("struct x3_attr *", {"mode": 0o4711, "uid": 1 << 31}))
    with Engine(image, lib.X3_READ_ONLY) as engine:
        assert engine.names(ROOT)[b"dir"] == directory
        assert set(engine.names(directory)) == {b"device", b"whiteout", b"short", b"long"}
        attr = engine.attr(device)
        assert (attr.mode, attr.major, attr.minor) == (stat.S_IFBLK | 0o4711, 259, 70000)
        assert (attr.uid, attr.mtime_ns) == (1 << 31, 0)
        assert (engine.attr(whiteout).major, engine.attr(whiteout).minor) == (0, 0)
        assert (engine.attr(directory).uid, engine.attr(directory).nlink) == (70000, 2)
        assert engine.attr(ROOT).nlink == 4
        assert engine.call("parent", directory) == ROOT
        buffer = ffi.new("char[]", 100)
        for ino, target in ((short, b"s" * 59), (long, b"l" * 60)):
            assert ffi.buffer(buffer, engine.call("readlink", ino, buffer, 100))[:] == target
        with refused(errno.EROFS):
            engine.create(ROOT, b"more")


def test_times_beyond_2038_and_before_1970(image: Path) -> None:
    wide = ext3_inode_size(image) > 128
    with Engine(image) as engine:
        ino = engine.create(ROOT, b"file")
        times = (
            4_000_000_000_123_456_789,
            -1_500_000_001,
            (1 << 63) - 10**10,
            14 * 10**18 + 1,
            FIRST,
            FIRST - 1,
        )
        for given in times:
            new = ffi.new("struct x3_attr *", {"mtime_ns": number_of(given)})
            engine.call("setattr", ino, lib.X3_MTIME, new)
            last = ((1 << 31) - 1 + (3 << 32 if wide else 0)) * 10**9
            got = time_of(engine.attr(ino).mtime_ns)
            if not FIRST <= given < last + 10**9:
                assert got == (FIRST if given < 0 else last)
            else:
                assert got == (given if wide else given // 10**9 * 10**9)


def ext3_inode_size(path: Path) -> int:
    with path.open("rb") as file:
        file.seek(1024 + 88)
        return int(struct.unpack("<H", file.read(2))[0])


def test_sparse_files_up_to_the_largest(image: Path) -> None:
    with Engine(image) as engine:
        ino, block = engine.create(ROOT, b"file"), engine.facts().block_size
        per = block // 4
        places = [11 * block, (12 + per - 1) * block + 7, (12 + per + per * per - 1) * block + 9]
        places += [(12 + per + per * per + 5) * block + 5]
        for place in places:
            assert engine.write(ino, b"x" * 2 * block, place) == 2 * block
        for place in places:
            assert engine.read(ino, 2 * block + 2, place - 1) == b"\0" + b"x" * 2 * block + b"\0" * (
                place != places[-1]
            )
        stop = ffi.new("uint64_t *")
        assert engine.call("segment", ino, 0, stop) == places[0]
        with refused(errno.ENXIO):
            engine.call("segment", ino, places[-1] + 2 * block, stop)
        with refused(errno.EFBIG):
            engine.call("truncate", ino, 1 << 43)
        for place in reversed(places):
            engine.call("truncate", ino, place + 1)
            assert engine.read(ino, 10, place) == b"x"
        engine.call("truncate", ino, 100 * block)
        assert engine.read(ino, block, 12 * block) == bytes(block)
        engine.call("truncate", ino, 0)
        assert engine.attr(ino).blocks == 0


def test_thousands_of_names(image: Path) -> None:
    rng = random.Random(1)
    with Engine(image) as engine:
        directory = engine.create(ROOT, b"dir", 0o40755)
        ino = engine.create(directory, b"first")
        names = {b"first"}
        for number in range(60):
            engine.create(directory, b"sub%d" % number, 0o40755)
        for number in range(9000):
            name = b"%d" % number + b"n" * rng.choice([1, 5, 20, 240])
            place = ffi.new("struct x3_place *")
            engine.call("link", ino, directory, name, len(name), 0, place)
            engine.places[directory, name] = (place.block, place.offset)
            names.add(name)
            if rng.random() < 0.3:
                gone = name if rng.random() < 0.5 else rng.choice(sorted(names)[:50])
                engine.unlink(directory, gone, ino)
                names.discard(gone)
        assert {name for name in engine.names(directory) if name[:3] != b"sub"} == names
        assert engine.attr(ino).nlink == len(names)
        assert engine.attr(directory).flags & 0x1000  # it has an index
        with refused(errno.ENOENT):
            engine.call("unlink", directory, b"none", 4, (0, 0), ino, 0)
        with refused(errno.ENOTEMPTY):
            engine.unlink(ROOT, b"dir", directory, call="rmdir")


def test_links_end_where_the_kernel_ends_them(plain: Path) -> None:
    with Engine(plain) as engine:
        ino = engine.create(ROOT, b"0")
        place = ffi.new("struct x3_place *")
        for number in range(1, lib.X3_LINK_MAX):
            name = b"%d" % number
            engine.call("link", ino, ROOT, name, len(name), 0, place)
        with refused(errno.EMLINK):
            engine.call("link", ino, ROOT, b"x", 1, 0, place)


def test_renames(image: Path) -> None:
    with Engine(image) as engine:
        one, two = engine.create(ROOT, b"one", 0o40755), engine.create(ROOT, b"two", 0o40755)
        file, child = engine.create(one, b"file"), engine.create(one, b"child", 0o40755)
        engine.rename((one, b"child"), (two, b"child"), child)
        assert (engine.attr(one).nlink, engine.attr(two).nlink, engine.call("parent", child)) == (2, 3, two)
        engine.rename((one, b"file"), (two, b"child"), file, child, lib.X3_EXCHANGE)
        assert (engine.names(one), engine.names(two)) == ({b"file": child}, {b"child": file})
        assert (engine.attr(one).nlink, engine.attr(two).nlink) == (3, 2)
        how = engine.rename((two, b"child"), (two, b"moved"), file, 0, lib.X3_WHITEOUT)
        assert engine.names(two) == {b"child": how.whiteout, b"moved": file}
        assert engine.attr(how.whiteout).mode == stat.S_IFCHR
        full = engine.create(ROOT, b"full", 0o40755)
        engine.create(full, b"name")
        with refused(errno.ENOTEMPTY):
            engine.rename((one, b"file"), (ROOT, b"full"), child, full)
        with refused(errno.EISDIR):
            engine.rename((two, b"moved"), (ROOT, b"full"), file, full)
        other = engine.create(ROOT, b"other")
        engine.write(other, b"x" * 100_000)
        engine.rename((two, b"moved"), (ROOT, b"other"), file, other)
        with refused(errno.ESTALE):
            engine.attr(other)


def test_extended_attributes(image: Path) -> None:
    with Engine(image) as engine:
        ino, block = engine.create(ROOT, b"file"), engine.facts().block_size
        wanted = {b"user.%d" % number: b"v" * number for number in range(8)}
        wanted |= {b"trusted.overlay.opaque": b"y", b"security.big": bytes(block // 2)}
        for name, value in wanted.items():
            engine.setxattr(ino, name, value)
        for name, value in wanted.items():
            assert engine.getxattr(ino, name) == value
        acl = struct.pack("<I", 2) + b"".join(
            struct.pack("<HHI", *entry)
            for entry in (
                (1, 7, 2**32 - 1),
                (2, 5, 70000),
                (4, 5, 2**32 - 1),
                (16, 7, 2**32 - 1),
                (32, 0, 2**32 - 1),
            )
        )
        engine.setxattr(ino, b"system.posix_acl_access", acl)
        assert engine.getxattr(ino, b"system.posix_acl_access") == acl
        buffer = ffi.new("char[]", 4096)
        listed = bytes(ffi.buffer(buffer, engine.call("listxattr", ino, buffer, 4096))).split(b"\0")[:-1]
        assert set(listed) == {*wanted, b"system.posix_acl_access"}
        with refused(errno.ENOSPC):
            engine.setxattr(ino, b"user.huge", bytes(block))
        with refused(errno.EEXIST):
            engine.setxattr(ino, b"user.1", b"", 1)
        with refused(errno.ENODATA):
            engine.setxattr(ino, b"user.none", b"", 2)
        with refused(errno.EOPNOTSUPP):
            engine.setxattr(ino, b"strange.name", b"")
        with refused(errno.EINVAL):
            engine.setxattr(ino, b"system.posix_acl_access", b"nonsense")
        for name in listed:
            engine.call("removexattr", ino, name, len(name))
        assert engine.call("listxattr", ino, buffer, 4096) == 0
        assert engine.attr(ino).blocks == 0


def test_an_attribute_block_shared_by_the_kernel(plain: Path) -> None:
    with Engine(plain) as engine:
        inos = [engine.create(ROOT, b"%d" % number) for number in range(3)]
        for ino in inos:
            engine.setxattr(ino, b"user.big", b"x" * 1000)
    share(plain, inos)
    with Engine(plain) as engine:
        engine.setxattr(inos[0], b"user.big", b"y" * 1000)
        assert [engine.getxattr(ino, b"user.big")[:1] for ino in inos] == [b"y", b"x", b"x"]
        engine.names(ROOT)
        engine.unlink(ROOT, b"1", inos[1])
        assert engine.getxattr(inos[2], b"user.big") == b"x" * 1000


def share(path: Path, inos: list[int]) -> None:
    """Let all inodes share the attribute block of the first, as the kernel does with equal blocks."""
    shown = run("debugfs", "-R", f"stat <{inos[0]}>", path).stdout
    block = shown.split("File ACL: ")[1].split()[0]
    commands = "".join(f"set_inode_field <{ino}> file_acl {block}\n" for ino in inos)
    subprocess.run(
        ["debugfs", "-w", "-f", "-", path], input=commands, text=True, capture_output=True, check=True
    )
    raw = bytearray(path.read_bytes())
    struct.pack_into("<I", raw, int(block) * 4096 + 4, len(inos))
    path.write_bytes(raw)
    subprocess.run(["e2fsck", "-fy", path], capture_output=True)  # frees the unused blocks
    sound(path)


def test_what_is_kept_lives_until_released(image: Path, place: Path) -> None:
    with Engine(image) as engine:
        free = engine.facts().free_blocks, engine.facts().free_inodes
        inos = [engine.create(ROOT, b"%d" % number) for number in range(20)]
        for number, ino in enumerate(inos):
            engine.write(ino, b"data" * 5000)
            assert engine.unlink(ROOT, b"%d" % number, ino, keep=True) == 1
        directory = engine.create(ROOT, b"dir", 0o40755)
        assert engine.unlink(ROOT, b"dir", directory, keep=True, call="rmdir") == 1
        engine.call("commit")
        recovered(image, place / "crashed")
        with refused(errno.ENOENT):
            engine.create(directory, b"name")
        random.Random(3).shuffle(inos)
        back = inos.pop()
        engine.call("link", back, ROOT, b"back", 4, 0, ffi.new("struct x3_place *"))
        engine.call("link", directory, ROOT, b"again", 5, 0, ffi.new("struct x3_place *"))
        assert engine.call("parent", directory) == ROOT
        for ino in inos:
            assert engine.read(ino, 4) == b"data"
            engine.call("release", ino)
            with refused(errno.ESTALE):
                engine.attr(ino)
        engine.names(ROOT)
        engine.unlink(ROOT, b"back", back)
        engine.unlink(ROOT, b"again", directory, call="rmdir")
        assert (engine.facts().free_blocks, engine.facts().free_inodes) == free


def test_orphans_of_a_crash_are_freed_at_open(image: Path) -> None:
    with Engine(image) as engine:
        free = engine.facts().free_inodes
        ino = engine.create(ROOT, b"file")
        engine.write(ino, b"x" * 500_000)
        engine.unlink(ROOT, b"file", ino, keep=True)
        engine.call("commit")
        engine.abandon()
    with Engine(image) as engine:
        assert engine.facts().free_inodes == free


def test_an_operation_that_fails_leaves_nothing(image: Path) -> None:
    with Engine(image) as engine:
        filler = engine.create(ROOT, b"filler")
        chunk = bytes(range(256)) * 256
        offset = 0
        while True:
            try:
                offset += engine.write(filler, chunk, offset)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                break
        assert engine.facts().free_blocks <= 2
        assert engine.attr(filler).size == offset
        engine.call("commit")
        before = engine.facts()
        for mode, target in ((0o40755, b""), (0o120777, b"t" * 500)):
            for _ in range(3):
                with refused(errno.ENOSPC):
                    for number in range(3):
                        engine.create(ROOT, b"%d" % number, mode, target)
        made = [name for name in engine.names(ROOT) if name.isdigit()]
        assert before.free_inodes - engine.facts().free_inodes == len(made)
        file = engine.create(ROOT, b"file")
        with refused(errno.ENOSPC):
            for number in range(100):
                engine.write(file, b"x", 20_000_000 * number)
        engine.unlink(ROOT, b"filler", filler)
        assert engine.write(file, chunk, 0) == len(chunk)  # there is space at once


@pytest.mark.parametrize("seed", range(3))
def test_random_operations(image: Path, place: Path, seed: int) -> None:
    """Compare with dictionaries, with a cache that is too small; after a crash the image is sound."""
    rng = random.Random(seed)
    files: dict[bytes, tuple[int, bytearray]] = {}
    with Engine(image, cache=1 << 18) as engine:
        engine.create(ROOT, b"sub", 0o40755)
        for step in range(2500):
            name = b"%d" % rng.randrange(150) + b"n" * rng.choice([0, 200])
            try:
                random_step(engine, rng, files, name)
            except OSError as error:
                assert error.errno == errno.ENOSPC
            if step % 500 == 250:
                recovered(image, place / "crashed")
            if rng.random() < 0.01:
                engine.call(rng.choice(["commit", "checkpoint"]))
        compare(engine, files)
    sound(image)
    with Engine(image) as engine:
        compare(engine, files)


def random_step(
    engine: Engine, rng: random.Random, files: dict[bytes, tuple[int, bytearray]], name: bytes
) -> None:
    if name not in files:
        files[name] = (engine.create(ROOT, name), bytearray())
        return
    ino, content = files[name]
    kind = rng.randrange(9)
    if kind <= 3:
        data = rng.randbytes(rng.choice([1, 700, 5000, 70_000, 900_000]))
        offset = rng.randrange(len(content) + 20_000)
        done = engine.write(ino, data, offset)
        content.extend(bytes(max(0, offset + done - len(content))))
        content[offset : offset + done] = data[:done]
    elif kind == 4:
        size = rng.randrange(len(content) + 9000)
        engine.call("truncate", ino, size)
        del content[size:]
        content.extend(bytes(size - len(content)))
    elif kind == 5:
        engine.setxattr(ino, b"user.%d" % rng.randrange(3), rng.randbytes(rng.randrange(300)))
    elif kind == 6:
        engine.unlink(ROOT, name, ino)
        del files[name]
    elif kind == 7:
        assert engine.unlink(ROOT, name, ino, keep=True) == 1
        del files[name]
        assert engine.read(ino, len(content) + 1) == content
        engine.call("release", ino)
    else:
        target = b"%d" % rng.randrange(150)
        if target != name:
            engine.rename((ROOT, name), (ROOT, target), ino, files[target][0] if target in files else 0)
            files[target] = files.pop(name)


def compare(engine: Engine, files: dict[bytes, tuple[int, bytearray]]) -> None:
    found = engine.names(ROOT)
    assert {name for name in found if name not in (b"sub", b"lost+found")} == set(files)
    for name, (ino, content) in files.items():
        assert found[name] == ino
        assert engine.attr(ino).size == len(content)
        assert engine.read(ino, len(content) + 1) == content


def test_many_threads(plain: Path, place: Path) -> None:
    failures: list[BaseException] = []
    stop = threading.Event()
    with Engine(plain, cache=1 << 20) as engine:

        def work(number: int) -> None:
            rng = random.Random(number)
            try:
                directory = engine.create(ROOT, b"thread%d" % number, 0o40755)
                for turn in range(150):
                    name, data = b"%d" % turn, bytes([number, turn]) * rng.randrange(1, 60_000)
                    ino = engine.create(directory, name)
                    assert engine.write(ino, data) == len(data)
                    if turn % 10 == 0:
                        engine.call("fsync", ino, turn % 20 == 0)
                    assert engine.read(ino, len(data)) == data
                    if turn % 3:
                        engine.call("truncate", ino, 10)
                        engine.unlink(directory, name, ino, keep=turn % 3 == 1)
                        if turn % 3 == 1:
                            engine.call("release", ino)
            except BaseException as error:
                failures.append(error)

        def commit() -> None:
            while not stop.is_set():
                engine.call("commit")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        committer = threading.Thread(target=commit)
        for thread in (committer, *threads):
            thread.start()
        recovered(plain, place / "crashed")
        for thread in threads:
            thread.join()
        stop.set()
        committer.join()
        assert not failures, failures
        for number in range(4):
            directory = engine.names(ROOT)[b"thread%d" % number]
            assert set(engine.names(directory)) == {b"%d" % turn for turn in range(0, 150, 3)}


def test_suspended_for_growing(plain: Path) -> None:
    with Engine(plain) as engine:
        ino = engine.create(ROOT, b"file")
        engine.write(ino, b"content")
        blocks = engine.facts().blocks
        engine.call("suspend")
        sound(plain)
        waiting = threading.Thread(target=engine.create, args=(ROOT, b"waited"))
        waiting.start()
        run("truncate", "-s", "128M", plain)
        run("resize2fs", "-f", plain)
        assert waiting.is_alive()
        engine.call("resume", -1)
        waiting.join()
        assert engine.facts().blocks == 2 * blocks
        assert engine.read(ino, 10) == b"content"
        assert b"waited" in engine.names(ROOT)


def test_a_barrier_with_nothing_behind_it_is_spared(plain: Path) -> None:
    """fsync of a file, then of its directory: the second does not wait for data that is on disk."""
    with Engine(plain) as engine:

        def barriers(call: str, *arguments: object) -> int:
            before = engine.facts().barriers
            engine.call(call, *arguments)
            return int(engine.facts().barriers - before)

        assert barriers("fsync", ROOT, 0) == 1, "what an earlier daemon wrote may not be on disk"
        ino = engine.create(ROOT, b"journal")
        engine.write(ino, b"x" * 8192)
        assert barriers("fsync", ino, 0) == 2, "a commit"
        assert barriers("fsync", ROOT, 0) == 0
        engine.write(ino, b"y" * 4096)
        assert barriers("fsync", ino, 1) == 1, "data alone"
        assert barriers("fsync", ino, 1) == 0
        engine.write(ino, b"z" * 4096)
        engine.call("inject", 2, 1, errno.ENOSPC, 0)  # the next fdatasync
        with pytest.raises(OSError, match="No space left"):
            engine.call("fsync", ino, 1)
        assert barriers("fsync", ino, 1) >= 1, "the last one has failed"
        engine.call("suspend")
        engine.call("resume", -1)
        assert barriers("fsync", ino, 1) >= 1, "who had the image meanwhile may have written to it"
        assert engine.read(ino, 8192) == b"z" * 4096 + b"x" * 4096


def test_changes_between_begin_and_end_come_together(plain: Path, place: Path) -> None:
    with Engine(plain) as engine:
        lib.x3_begin(engine.image)
        ino = engine.create(ROOT, b"file")
        commit = threading.Thread(target=engine.call, args=("commit",))
        commit.start()
        with Engine(recovered(plain, place / "crashed")) as crashed:
            assert b"file" not in crashed.names(ROOT)
        engine.setxattr(ino, b"user.x", b"y")
        assert commit.is_alive()
        lib.x3_end(engine.image)
        commit.join()
        with Engine(recovered(plain, place / "crashed")) as crashed:
            assert crashed.getxattr(crashed.names(ROOT)[b"file"], b"user.x") == b"y"


@pytest.mark.parametrize(
    ("options", "expected"),
    [(("-O", "extents"), errno.EOPNOTSUPP), (("-O", "^has_journal"), errno.EOPNOTSUPP)],
    ids=str,
)
def test_what_is_no_ext3_is_refused(tmp_path: Path, options: tuple[str, ...], expected: int) -> None:
    path = tmp_path / "image"
    path.touch()
    os.truncate(path, 16 << 20)
    with refused(errno.EINVAL):
        Engine(path)
    run("mke2fs", "-q", "-F", "-t", "ext3", *options, path)
    with refused(expected):
        Engine(path)


@pytest.mark.nightly  # by day the fuzz tests run the engine under sanitizers
@pytest.mark.skipif(sanitized.ENGINE is not None, reason="this is the run under sanitizers")
@pytest.mark.timeout(300)
def test_all_of_this_under_sanitizers(tmp_path: Path) -> None:
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={tmp_path / 'inner'}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, __file__],
        env=sanitized.environment(tmp_path),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
