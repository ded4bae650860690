"""Tar archives as lowers: content is shown correctly, or refused with its name."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cowfs.errors import LayerError
from cowfs.exports.entries import Entry
from cowfs.exports.losses import Losses
from cowfs.exports.tar import Tar
from cowfs.formats import acl_text, archive, tar
from cowfs.formats.archive import Inode
from cowfs.layers import acl
from cowfs.layers.tar import TarLayer
from cowfs.store.format.identity import identify_lower
from cowfs.types import AttrData
from tests.support.system import run

Add = Callable[..., None]
Members = Callable[[Add], object]


def made(path: Path, members: Members) -> Path:
    """Make an archive with the files that *members* adds."""
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:

        def add(name: str, data: bytes = b"", **facts: object) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for key, value in facts.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(data))

        members(add)
    return path


@contextmanager
def opened(path: Path) -> Iterator[TarLayer]:
    with closing(TarLayer(str(path))) as layer:
        yield layer


def find(layer: TarLayer, path: str) -> Inode:
    key = layer.root
    for name in path.split("/"):
        found = layer.lookup(key, os.fsencode(name))
        assert found is not None, path
        key = found[0]
    return key


def read(layer: TarLayer, path: str) -> bytes:
    file = layer.open(find(layer, path), os.O_RDONLY)
    return file.pread(1 << 20, 0)


def test_odd_archives_are_read_as_tar_unpacks_them(tmp_path: Path) -> None:
    def members(add: Add) -> None:
        add("./a/b/c", b"deep", mode=0o640)  # without its directories
        add("/abs", b"absolute")
        add("twice", b"first")
        add("hard", type=tarfile.LNKTYPE, linkname="./twice")
        add("twice", b"second")
        add("a", type=tarfile.DIRTYPE, mode=0o700, uid=5)  # after what is in it
        add("gone", b"x")
        add("gone", type=tarfile.SYMTYPE, linkname="a/b")
        add("time", b"t", mtime=1_700_000_000.5)
        add("never", b"t", pax_headers={"mtime": "1e999999999"})
        add("huge", b"t", pax_headers={"mtime": "9" * 400})
        add("late", b"t", pax_headers={"mtime": "9999999999"})

    with opened(made(tmp_path / "x.tar", members)) as layer:
        assert sorted(layer.names(layer.root)) == [
            *(b"a", b"abs", b"gone", b"hard", b"huge", b"late", b"never", b"time", b"twice")
        ]
        assert read(layer, "a/b/c") == b"deep" and stat.S_IMODE(find(layer, "a/b/c").mode) == 0o640
        assert stat.S_IMODE(find(layer, "a").mode) == 0o700 and find(layer, "a").uid == 5
        assert stat.S_IMODE(find(layer, "a/b").mode) == 0o755
        assert read(layer, "twice") == b"second" and read(layer, "hard") == b"first"
        assert find(layer, "hard").nlink == find(layer, "twice").nlink == 1
        assert layer.readlink(find(layer, "gone")) == b"a/b"
        assert layer.stat(find(layer, "time")).st_mtime_ns == 1_700_000_000_500_000_000
        assert find(layer, "never").mtime_ns == find(layer, "huge").mtime_ns == 0
        assert find(layer, "late").mtime_ns == 0
        assert layer.stat(layer.root).st_nlink == 3


@pytest.mark.parametrize(
    ("members", "why"),
    [
        (lambda add: add("a/../../etc/passwd", b"x"), "which no file can have here"),
        (lambda add: add("n" * 256, b"x"), "which no file can have here"),
        (lambda add: add("l", type=tarfile.LNKTYPE, linkname="nothing"), "links to a missing file"),
        (lambda add: [add("f", b"x"), add("f/g", b"y")], "is not a directory, but has members"),
        (lambda add: add("s", type=tarfile.SYMTYPE, linkname="x" * 5000), "a symbolic link of 5000 bytes"),
        (
            lambda add: add("s", type=tarfile.SYMTYPE, pax_headers={"linkpath": "a\0b"}),
            "a symbolic link with a NUL in its target",
        ),
        (lambda add: add("d", type=tarfile.BLKTYPE, devmajor=4096), "a device that cannot be"),
        (
            lambda add: add("x", pax_headers={"GNU.sparse.realsize": f"{1 << 65}", "GNU.sparse.map": "0,1"}),
            r"has [0-9]{20} bytes",
        ),
        (lambda add: add("x", pax_headers={"SCHILY.xattr.user.a": "x" * (17 << 20)}), "a header of"),
        (
            lambda add: add("x", pax_headers={"SCHILY.xattr.user.a": "x" * 70_000}),
            "an extended attribute that",
        ),
        (lambda add: add("x", pax_headers={"SCHILY.xattr.": "x"}), "an extended attribute that no file"),
        (lambda add: add("a/" * 40_000 + "x"), "a path of 80001 characters"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, members: Members, why: str) -> None:
    with pytest.raises(LayerError, match=why):
        identify_lower(str(made(tmp_path / "x.tar", members)))


def test_what_stands_for_all_members_is_bounded(tmp_path: Path) -> None:
    """A single header that applies to each member of the archive."""

    def refused(headers: dict[str, str], why: str) -> None:
        with tarfile.open(
            tmp_path / "x.tar", "w:", format=tarfile.PAX_FORMAT, pax_headers=headers
        ) as archive:
            for number in range(1000):
                archive.addfile(tarfile.TarInfo(f"{number}"))
        with pytest.raises(LayerError, match=why):
            TarLayer(str(tmp_path / "x.tar"))

    refused({f"SCHILY.xattr.user.{number}": "x" for number in range(2000)}, "2000 records in global headers")
    refused({"SCHILY.xattr.user.a": "x" * 60_000}, "more bytes of extended attributes")


def test_files_directories_and_maps_of_holes_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "MOST_MEMBERS", 100)
    with pytest.raises(LayerError, match="more than 100 files and directories"):
        TarLayer(str(made(tmp_path / "x.tar", lambda add: add("a/" * 200 + "x"))))
    monkeypatch.setattr(tar, "_LONGEST_HEADER", 8192)
    holes = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "0"}
    data = b"9000\n" + b"0\n" * 18_000
    made(tmp_path / "x.tar", lambda add: add("x", data, pax_headers=holes))
    with pytest.raises(LayerError, match="a header of more than 8192 bytes"):
        TarLayer(str(tmp_path / "x.tar"))


def test_a_damaged_archive_is_refused_and_one_that_shrinks_is_an_error(tmp_path: Path) -> None:
    def members(add: Add) -> None:
        add("a", b"a" * 5000)
        add("b", b"b" * 50_000)

    archive = made(tmp_path / "x.tar", members)
    whole = archive.read_bytes()
    for cut in (513, 5000, 20_000):
        archive.write_bytes(whole[:cut])
        with pytest.raises(LayerError, match=r"truncated|damaged"):
            TarLayer(str(archive))
    header = whole.index(b"b\0\0\0", 1024)
    archive.write_bytes(whole[:header] + b"x" * 512 + whole[header + 512 :])
    with pytest.raises(LayerError, match="damaged tar archive"):
        TarLayer(str(archive))
    archive.write_bytes(whole)
    with opened(archive) as layer:
        os.truncate(archive, 8000)
        with pytest.raises(OSError, match="has become shorter"):
            read(layer, "b")


@pytest.mark.parametrize("form", ["gnu", "oldgnu", "pax", "0.0", "0.1", "1.0"])
@pytest.mark.parametrize("pieces", [1, 3, 40])
def test_holes_in_each_form_of_gnu_tar(tmp_path: Path, form: str, pieces: int) -> None:
    (tmp_path / "tree").mkdir()
    with (tmp_path / "tree/holes").open("wb") as file:
        for at in range(pieces):
            file.seek((41 - pieces + at) << 20)
            file.write(b"%d" % at)
        file.truncate(41 << 20)
    how = ["--format=pax", f"--sparse-version={form}"] if form[0].isdigit() else [f"--format={form}"]
    run("tar", *how, "--sparse", "-C", tmp_path / "tree", "-cf", tmp_path / "x.tar", ".")
    with opened(tmp_path / "x.tar") as layer:
        inode = find(layer, "holes")
        file_there = layer.open(inode, os.O_RDONLY)
        assert file_there.pread(41 << 20, 0) == (tmp_path / "tree/holes").read_bytes()
        assert layer.stat(inode).st_blocks * 512 < 1 << 20


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("user::rwx\nuser:7:rw-\ngroup::r-x\nmask::rwx\nother::r\n", "u::rwx u:7:rw- g::r-x m::rwx o::r--"),
        ("u::rw-,u:lisa:r--:502,g::r--,g:0:-w-,m::r--,o::-", "u::rw- u:502:r-- g::r-- g:0:-w- m::r-- o::---"),
        ("user::rwx,group::r,other:: # nothing", "u::rwx g::r-- o::---"),
        ("user::rw-,user:no such user:rwx,group::r--,mask::rwx,other::---", "u::rw- g::r-- m::rwx o::---"),
        ("user::rw-,group::r--", None),
        ("user::rw-,user:7:r--,group::r--,other::---", None),
        ("user::rw-,user::rw-,group::r--,other::---", None),
        ("user::rw-,user:7:r--:4294967295,group::r--,mask::r--,other::---", None),
        ("everyone@:rwx::allow", None),
        ("", None),
    ],
)  # fmt: skip
def test_acls_as_text(tmp_path: Path, text: str, shown: str | None) -> None:
    """ACLs in archives of tar --acls, star and bsdtar; invalid ones are ignored, as in tar."""
    headers = {"SCHILY.acl.access": text}
    with opened(made(tmp_path / "x.tar", lambda add: add("f", b"x", pax_headers=headers))) as layer:
        xattrs = {name: layer.getxattr(find(layer, "f"), name) for name in layer.listxattr(find(layer, "f"))}
    if shown is None:
        assert xattrs == {}
        return
    value = xattrs.pop(b"system.posix_acl_access")
    assert acl.parse(value) and not xattrs
    lines = (acl_text.to_text(value) or b"").decode().split()
    assert " ".join(line[0] + line[line.index(":") :] for line in lines) == shown


def test_the_attribute_itself_counts_more_than_its_text(tmp_path: Path) -> None:
    value = acl.build(acl.of_mode(0o751))
    headers = {"SCHILY.acl.access": "u::r--,g::r--,o::r--"}
    headers |= {"SCHILY.xattr.system.posix_acl_access": value.decode("utf-8", "surrogateescape")}
    archive = made(tmp_path / "x.tar", lambda add: add("f", b"x", pax_headers=headers))
    with opened(archive) as layer:
        assert layer.getxattr(find(layer, "f"), acl.ACCESS) == value


def test_a_directory_that_loses_two_acls_counts_once() -> None:
    losses = Losses()
    directory = AttrData(stat.S_IFDIR | 0o755, 2)
    node: Any = SimpleNamespace(attr=directory)
    entry = Entry(b"d", node, directory.st_mode, 0, {acl.ACCESS: b"a", acl.DEFAULT: b"d"}, None)
    Tar(lambda _: None, losses, lambda *_: None, "", accepts=lambda *_: False).add(entry)
    assert list(losses) == ["files without their ACLs: 1 (d)"]


@pytest.mark.parametrize("value", [b"", b"\2\0\0\0", b"\1\0\0\0" + bytes(24), b"\2\0\0\0" + b"\x40" * 24])
def test_a_value_that_is_no_acl_has_no_text(value: bytes) -> None:
    assert acl_text.to_text(value) is None


def test_an_archive_of_the_oldest_form_is_recognised_by_its_checksum(tmp_path: Path) -> None:
    (tmp_path / "tree/sub").mkdir(parents=True)
    (tmp_path / "tree/sub/file").write_text("old")
    (tmp_path / "tree/again").hardlink_to(tmp_path / "tree/sub/file")
    (tmp_path / "tree/link").symlink_to("sub/file")
    path = tmp_path / "old.tar"
    run("tar", "--format=v7", "-C", tmp_path / "tree", "-cf", path, ".")
    assert identify_lower(str(path)).kind == "tar"
    with opened(path) as layer:
        assert read(layer, "sub/file") == read(layer, "again") == b"old"
        assert layer.readlink(find(layer, "link")) == b"sub/file"
    damaged = bytearray(path.read_bytes())
    damaged[0] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(LayerError, match="not a squashfs image"):
        identify_lower(str(path))
