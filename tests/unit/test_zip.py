"""Zip archives as lowers: content is shown correctly, or refused with its name."""

from __future__ import annotations

import os
import random
import stat
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import cast

import pytest

from cowfs.errors import LayerError
from cowfs.formats import zip_data
from cowfs.formats.archive import Inode
from cowfs.formats.squashfs.source import Bytes
from cowfs.layers.zip import ZipLayer
from cowfs.store.format.identity import identify_lower
from tests.support.system import run

Members = Callable[[zipfile.ZipFile], object]


def made(path: Path, members: Members) -> Path:
    """Make an archive with the files that *members* adds."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        members(archive)
    return path


def info(name: str, mode: int = 0o100644, host: int = 3, extra: bytes = b"") -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name, (2024, 2, 29, 12, 30, 58))
    member.external_attr, member.create_system, member.extra = mode << 16 or 0x20, host, extra
    member.compress_type = zipfile.ZIP_DEFLATED
    return member


def find(layer: ZipLayer, path: str | bytes) -> Inode:
    key = layer.root
    for name in os.fsencode(path).split(b"/"):
        found = layer.lookup(key, name)
        assert found is not None, path
        key = found[0]
    return key


def read(layer: ZipLayer, path: str) -> bytes:
    return layer.open(find(layer, path), os.O_RDONLY).pread(1 << 30, 0)


def test_a_tree_that_zip_packed_is_shown_as_it_was(tmp_path: Path) -> None:
    top = tmp_path / "tree"
    (top / "dir/empty").mkdir(parents=True)
    (top / "dir/file").write_bytes(b"deflated " * 100_000)
    (top / "stored").write_bytes(random.Random(1).randbytes(100_000))
    (top / "nothing").touch(mode=0o4711)
    (top / os.fsdecode("ü €".encode())).write_text("x")
    (top / "link").symlink_to("dir/file")
    os.chmod(top / "dir", 0o2750)
    os.utime(top / "stored", ns=(1, 1_700_000_001_000_000_000))
    run("zip", "-qry", tmp_path / "x.zip", ".", cwd=top)
    with closing(ZipLayer(str(tmp_path / "x.zip"))) as layer:
        seen = 0
        for path in sorted(top.rglob("*")):
            inode, there = find(layer, os.fsencode(path.relative_to(top))), path.lstat()
            attr = layer.stat(inode)
            assert (attr.st_mode, attr.st_uid, attr.st_gid) == (there.st_mode, there.st_uid, there.st_gid)
            assert attr.st_mtime_ns // 1_000_000_000 == int(there.st_mtime)
            if path.is_symlink():
                assert layer.readlink(inode) == b"dir/file"
            elif path.is_file():
                assert attr.st_size == there.st_size
                assert read(layer, os.fspath(path.relative_to(top))) == path.read_bytes()
            seen += 1
        assert seen == 7
        assert layer.stat(layer.root).st_nlink == 3


def test_odd_archives_are_read_as_unzip_unpacks_them(tmp_path: Path) -> None:
    def members(archive: zipfile.ZipFile) -> None:
        archive.writestr(info("./a/b/c", 0o100640), b"deep")  # without its directories
        archive.writestr(info("/abs"), b"absolute")
        archive.writestr(info("twice"), b"first")
        archive.writestr(info("dos\\path", 0, host=0), b"dos")
        archive.writestr(info("a/", 0o40700), b"")  # after what is in it
        with pytest.warns(UserWarning):
            archive.writestr(info("twice"), b"second")
        unix = struct.pack("<HHBBHBH", 0x7875, 7, 1, 2, 1000, 2, 100)
        archive.writestr(info("owned", extra=unix), b"x")
        ntfs = struct.pack("<HHIHHQQQ", 10, 32, 0, 1, 24, 133_500_000_012_345_678, 0, 0)
        archive.writestr(info("windows", 0, host=0, extra=ntfs), b"x")
        archive.writestr(info("pipe", 0o10600), b"")
        archive.writestr(info("cp437-\x01", 0, host=0), b"x")

    data = made(tmp_path / "x.zip", members).read_bytes()
    (tmp_path / "x.zip").write_bytes(data.replace(b"cp437-\x01", b"cp437-\x81"))
    with closing(ZipLayer(str(tmp_path / "x.zip"))) as layer:
        assert read(layer, "a/b/c") == b"deep" and stat.S_IMODE(find(layer, "a/b/c").mode) == 0o640
        assert stat.S_IMODE(find(layer, "a").mode) == 0o700 and stat.S_IMODE(find(layer, "a/b").mode) == 0o755
        assert read(layer, "abs") == b"absolute" and read(layer, "twice") == b"second"
        assert read(layer, "dos/path") == b"dos" and find(layer, "dos/path").mode == stat.S_IFREG | 0o644
        assert (find(layer, "owned").uid, find(layer, "owned").gid) == (1000, 100)
        assert find(layer, "abs").mtime_ns == 1_709_209_858_000_000_000
        assert find(layer, "windows").mtime_ns == (133_500_000_012_345_678 - 116_444_736_000_000_000) * 100
        assert stat.S_ISFIFO(find(layer, "pipe").mode) and read(layer, "cp437-ü") == b"x"


def encrypted(data: bytes) -> bytes:
    at = data.index(b"PK\1\2") + 8
    return data[:at] + b"\1" + data[at + 1 :]


def numbered(field: int, value: int) -> Callable[[bytes], bytes]:
    """Set a four-byte number in the first entry of the central directory."""

    def changed(data: bytes) -> bytes:
        at = data.index(b"PK\1\2") + field
        return data[:at] + value.to_bytes(4, "little") + data[at + 4 :]

    return changed


def same(data: bytes) -> bytes:
    return data


@pytest.mark.parametrize(
    ("members", "change", "why"),
    [
        (lambda add: add.writestr("a/../../etc/passwd", "x"), same, "which no file can have here"),
        (lambda add: add.writestr("n" * 256, "x"), same, "which no file can have here"),
        (lambda add: add.writestr("d/" * 32000, ""), same, "lead through too many directories"),
        (lambda add: [add.writestr("f", "x"), add.writestr("f/g", "y")], same, "is not a directory, but"),
        (lambda add: add.writestr(info("s", 0o120777), "x" * 5000), same, "a symbolic link of 5000 bytes"),
        (lambda add: add.writestr(info("null", 0o20666), ""), same, "'null' is a device"),
        (lambda add: add.writestr("x", "x", zipfile.ZIP_BZIP2), same, "'x' is compressed with bzip2; only"),
        (lambda add: add.writestr("x", "x"), encrypted, r"'x' is encrypted \(unpack it with its password"),
        (lambda add: add.writestr("x", "x"), numbered(24, 1 << 30), "'x' has 1073741824 bytes in 3"),
        (lambda add: add.writestr("x", "x"), numbered(20, 1 << 30), "'x' has 1 bytes in 1073741824"),
        (lambda add: add.writestr("x", "x"), numbered(42, 1 << 30), "'x' is outside the archive"),
        (lambda add: add.writestr("x", "x"), numbered(0, 0), "has 0 members, but should have 1"),
        (lambda add: add.writestr("x", "x"), lambda data: data[:-9], "no central directory: truncated"),
        (lambda add: add.writestr("x", "x"), lambda data: data[:4] + data[60:], "directory is outside"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    tmp_path: Path, members: Members, change: Callable[[bytes], bytes], why: str
) -> None:
    archive = made(tmp_path / "x.zip", members)
    archive.write_bytes(change(archive.read_bytes()))
    for opened in (identify_lower, ZipLayer):
        with pytest.raises(LayerError, match=why):
            opened(str(archive))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_wrong_crc_is_an_error(tmp_path: Path, method: int) -> None:
    def members(archive: zipfile.ZipFile) -> None:
        archive.writestr("good", b"good", method)
        archive.writestr("bad", b"bad" * 200_000, method)

    archive = made(tmp_path / "x.zip", members)
    data = archive.read_bytes()
    entry = data.rindex(b"PK\1\2")
    archive.write_bytes(data[: entry + 16] + b"\0\0\0\0" + data[entry + 20 :])
    with closing(ZipLayer(str(archive))) as layer:
        assert read(layer, "good") == b"good"
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error"):
                read(layer, "bad")
        os.truncate(archive, 40)
        with pytest.raises(OSError, match="Input/output error"):
            read(layer, "bad")


def test_a_large_member_is_decompressed_once_and_read_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read in pieces from the start, each once; then anywhere, from a near position."""
    blocks = 0

    class Counted(zip_data.Unpacker):
        def _next(self, member: zip_data.Member, state: zip_data._State) -> bytes:
            nonlocal blocks
            blocks += 1
            return super()._next(member, state)

    choose = random.Random(2)
    content = b"".join(choose.randbytes(1000) * 40 for _ in range(600))
    archive = made(tmp_path / "x.zip", lambda add: add.writestr("large", content))
    monkeypatch.setattr("cowfs.formats.zip.Unpacker", Counted)
    monkeypatch.setattr(zip_data, "_KEPT", 4 << 20)
    with closing(ZipLayer(str(archive))) as layer, ThreadPoolExecutor(4) as threads:
        file = layer.open(find(layer, "large"), os.O_RDONLY)
        assert file.try_pread(4096, 20 << 20) is None
        places = range(0, len(content), 100_000)
        assert b"".join(file.pread(100_000, at) for at in places) == content
        assert blocks == -(-len(content) // zip_data._BLOCK)
        assert b"".join(threads.map(lambda at: file.pread(100_000, at), places)) == content
        for _ in range(20):
            at, before = choose.randrange(len(content)), blocks
            assert file.pread(5000, at) == content[at : at + 5000]
            assert blocks - before <= zip_data._LEAST_APART + 1
        file.pread(10, 0)
        assert file.try_pread(10, 100) == content[100:110]


def test_places_beyond_4_gib_are_read(tmp_path: Path) -> None:
    """Zip64: the numbers are in extra fields, and there is another end record."""

    def members(archive: zipfile.ZipFile) -> None:
        with archive.open(info("x"), "w", force_zip64=True) as file:
            file.write(b"content")

    archive = made(tmp_path / "x.zip", members)
    data = archive.read_bytes()
    entry, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    wide = struct.pack("<HHQQQ", 1, 24, 7, struct.unpack_from("<I", data, entry + 20)[0], 0)
    record = bytearray(data[entry:end])
    record[20:28], record[42:46] = b"\xff" * 8, b"\xff" * 4
    record[30:32] = struct.pack("<H", len(wide))
    directory = bytes(record[:47]) + wide
    end64 = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, len(directory), entry)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, entry + len(directory), 1)
    old = b"PK\5\6" + bytes(4) + b"\xff" * 12 + bytes(2)
    archive.write_bytes(data[:entry] + directory + end64 + locator + old)
    assert zipfile.ZipFile(archive).read("x") == b"content"
    with closing(ZipLayer(str(archive))) as layer:
        assert read(layer, "x") == b"content"


class _Held:
    """The bytes of an archive, some of which are delivered only on a signal."""

    def __init__(self, data: bytes, held: range) -> None:
        self._data, self._held = data, held
        self.asked, self.given = threading.Event(), threading.Event()

    def pread(self, size: int, at: int) -> bytes:
        if at in self._held and size > 30:
            self.asked.set()
            assert self.given.wait(60)
        return self._data[at : at + size]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_nobody_waits_for_those_who_read_other_members(method: int) -> None:
    """Headers 64 bytes apart, for example: one user could block all others."""
    member = bytes([*b"PK\3\4", *bytes(26)])
    big = random.Random(1).randbytes(400_000)
    packed = big if method == zipfile.ZIP_STORED else raw_deflated(big)
    small = b"small" if method == zipfile.ZIP_STORED else raw_deflated(b"small")
    start = -(-(30 + len(packed)) // 64) * 64
    data = _Held((member + packed).ljust(start, b"\0") + member + small, range(30, len(packed) - 200))
    unpacker = zip_data.Unpacker(cast(Bytes, data), "x.zip")
    members = [
        zip_data.Member(at, method, len(stored), len(plain), zlib.crc32(plain))
        for at, stored, plain in ((0, packed, big), (start, small, b"small"))
    ]
    with ThreadPoolExecutor(2) as threads:
        slow = threads.submit(unpacker.pread, members[0], 100, 399_900)
        assert data.asked.wait(60)
        try:
            assert threads.submit(unpacker.pread, members[1], 5, 0).result(timeout=30) == b"small"
        finally:
            data.given.set()
        assert slow.result(timeout=60) == big[-100:]


def raw_deflated(data: bytes) -> bytes:
    return zlib.compress(data, 6, wbits=-15)
