"""Squashfs images through the command line: at an offset, described, and bad ones; as root and as nobody."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.support import tree
from tests.support.mounts import Mounted, cowfs, is_mounted, mounted
from tests.support.squashfs import mksquashfs, needs_mksquashfs, noise, sample_tree, text
from tests.support.system import NOBODY, as_nobody_prefix, needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True

pytestmark = [needs_fuse, needs_mksquashfs]

LOWER: tree.Tree = {
    "etc/hosts": b"127.0.0.1 localhost\n",
    "lib/big": text(300_000),
    "lib/noise": noise(70_000),
}
NOBODYS = ("-force-uid", str(NOBODY), "-force-gid", str(NOBODY))
WHERE = 188_393  # no multiple of anything


@pytest.fixture(params=["root kernel", "root process", "nobody process"])
def how(request: pytest.FixtureRequest) -> tuple[bool, str]:
    """Whether the user is nobody, and the engine."""
    who, engine = request.param.split()
    if who == "root" and os.geteuid() != 0:
        pytest.skip("needs root")
    return who == "nobody", engine


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good image, in a file of its own."""
    place = tmp_path_factory.mktemp("images")
    tree.build(place / "tree", LOWER)
    return mksquashfs(place / "good.squashfs", place / "tree", options=NOBODYS)


@pytest.fixture
def base(nobody_path: Path, good: Path) -> Path:
    """A place that both users can work in, with ``good.squashfs`` and ``program``, which has it appended."""
    shutil.copy(good, nobody_path / "good.squashfs")
    (nobody_path / "program").write_bytes(program(WHERE) + good.read_bytes())
    tree.build(nobody_path / "lower", {"etc/hosts": b"on top\n"})
    (nobody_path / "mnt").mkdir()
    return given_away(nobody_path)


def given_away(place: Path) -> Path:
    """Let all below a place belong to nobody."""
    if os.geteuid() == 0:
        run("chown", "-R", f"{NOBODY}:{NOBODY}", place)
    return place


def program(size: int) -> bytes:
    """An ELF program of *size* bytes as far as anybody looks: its section headers end there."""
    head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    head += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 0, size - 64, 0, 64, 0, 0, 64, 1, 0)
    return head.ljust(size, b"\x90")


def said(*arguments: str | Path, code: int, nobody: bool = False) -> str:
    """The one line of a command that is refused with *code*."""
    done = cowfs(*arguments, nobody=nobody)
    assert done.returncode == code, (done.returncode, done.stderr)
    assert done.stdout == "" and done.stderr.count("\n") == 1, (done.stdout, done.stderr)
    assert done.stderr.startswith("cowfs: ")
    return done.stderr


def facts(what: Path, *options: str, nobody: bool = False) -> dict[str, Any]:
    """Return what ``cowfs info --json`` prints."""
    told: dict[str, Any] = json.loads(
        cowfs("info", "--json", what, *options, nobody=nobody, check=True).stdout
    )
    return told


def shell(mount: Mounted, command: str) -> str:
    """Run a command in the root of a mount as whoever mounted it."""
    prefix = as_nobody_prefix() if mount.nobody else []
    return run(*prefix, "sh", "-euc", f'cd "$1"; {command}', "sh", mount.path).stdout


# --- an offset


def test_an_image_that_begins_further_on(base: Path, how: tuple[bool, str]) -> None:
    """The same tree, the same fingerprint, the same store; shown by info and diff."""
    nobody, engine = how
    options = [f"offset={WHERE}"]
    with mounted(
        base / "program", base / "mnt", base / "store", engine=engine, options=options, nobody=nobody
    ) as mount:
        assert shell(mount, "cat etc/hosts") == "127.0.0.1 localhost\n"
        for name in ("lib/big", "lib/noise"):
            digest = hashlib.sha256(LOWER[name]).hexdigest()  # type: ignore[arg-type]
            assert shell(mount, f"sha256sum < {name}") == f"{digest}  -\n"
        shell(mount, "echo more >> etc/hosts")
        lower = facts(mount.path, nobody=nobody)["lowers"][0]
        assert lower["offset"] == WHERE and f"offset {WHERE}" in lower["description"]
        assert f"offset {WHERE}" in cowfs("info", mount.path, nobody=nobody, check=True).stdout
        assert cowfs("diff", mount.path, nobody=nobody).stdout == "M  etc/hosts  (content, times)\n"
    assert lower["fingerprint"] == facts(base / "good.squashfs")["fingerprint"]
    with mounted(base / "good.squashfs", base / "mnt", base / "store", engine=engine, nobody=nobody) as mount:
        assert shell(mount, "tail -n 1 etc/hosts") == "more\n"


def test_the_offset_is_found(base: Path) -> None:
    """Behind a program, or anywhere in a disk image, whatever looks like the beginning of one before it."""
    with mounted(
        base / "program", base / "mnt", base / "store", options=["offset=auto"], nobody=True
    ) as mount:
        assert shell(mount, "cat etc/hosts; rm lib/big") == "127.0.0.1 localhost\n"
        assert facts(mount.path, nobody=True)["lowers"][0]["offset"] == WHERE
    done = cowfs("diff", base / "store", "--lower", base / "program", "--offset", "auto", nobody=True)
    assert (done.stdout, done.returncode) == ("D  lib/big\n", 0), done.stderr
    good = (base / "good.squashfs").read_bytes()
    longer = good[:40] + struct.pack("<Q", 1 << 40) + good[48:96]  # its length: more than the file has
    before = longer + b"hsqs".rjust((1 << 20) + 2 - 96)  # the second across what is read at once
    (base / "disk").write_bytes(before.ljust(3 << 20) + good)
    assert facts(base / "disk", "-o", "auto")["offset"] == 3 << 20
    assert facts(base / "good.squashfs", "-o", "auto")["offset"] == 0
    (base / "none").write_bytes(b"hsqs" * 1000)
    mount_it: list[str | Path] = ["mount", base / "none", base / "mnt", "-o", "offset=auto"]
    for arguments in (["info", base / "none", "-o", "auto"], mount_it):
        assert "contains no squashfs image" in said(*arguments, code=32)
    assert "no lower given" in said("diff", base / "store", "--offset", "auto", code=1, nobody=True)


def test_diff_of_a_store_knows_the_offset_or_takes_it(base: Path) -> None:
    with mounted(
        base / "program", base / "mnt", base / "store", options=[f"offset={WHERE}"], nobody=True
    ) as mount:
        shell(mount, "rm lib/big")
    done = cowfs("diff", base / "store", nobody=True)
    assert (done.stdout, done.returncode) == ("D  lib/big\n", 0), done.stderr

    header = base / "store/cowfs/header.json"  # as versions before 0.2 wrote it
    content = json.loads(header.read_text())
    assert content["lowers"][0].pop("offset") == WHERE
    header.write_text(json.dumps(content))
    line = said("diff", base / "store", code=1, nobody=True)
    assert f"offset {WHERE}" in line and "--offset" in line
    for option in (["-o", f"offset={WHERE}"], ["--offset", str(WHERE)]):
        for lower in ([], ["--lower", str(base / "program")]):
            done = cowfs("diff", base / "store", *option, *lower, nobody=True)
            assert (done.stdout, done.returncode) == ("D  lib/big\n", 0), done.stderr
    done = cowfs("diff", base / "store", "--lower", base / "good.squashfs", nobody=True)
    assert done.stdout == "D  lib/big\n"
    line = said("diff", base / "store", "--lower", base / "program", "--offset", "1:2", code=1, nobody=True)
    assert "2 offsets" in line


@pytest.mark.parametrize("offset", [f"0:{8 << 10}", ":8K", "0:8k:0"])
def test_several_lowers_have_an_offset_each(base: Path, good: Path, offset: str) -> None:
    (base / "second").write_bytes(bytes(8 << 10) + good.read_bytes())
    tree.build(base / "third", {"only": b"here\n"})
    lowers = [base / "lower", base / "second", base / "third"]
    with mounted(lowers, base / "mnt", base / "store", options=[f"offset={offset}"], nobody=True) as mount:
        assert shell(mount, "cat etc/hosts only; wc -c < lib/big") == "on top\nhere\n300000\n"
        assert [lower["offset"] for lower in facts(mount.path, nobody=True)["lowers"]] == [0, 8 << 10, 0]


BAD_OFFSETS: dict[str, tuple[str, str, int, list[str]]] = {
    "past the end": ("program", "1G", 32, ["program", "offset 1073741824 is beyond its end"]),
    "nothing there": ("program", "1000", 32, ["at offset 1000", "not a squashfs", f"offset={WHERE}"]),
    "none where one is": ("program", "0", 32, ["ELF program", f"offset={WHERE}"]),
    "text there": ("text", "10", 32, ["at offset 10", "a text file"]),
    "in an image": ("good.squashfs", "512", 32, ["at offset 512", "remove offset="]),
    "of a directory": ("lower", "4096", 32, ["is a directory"]),
    "no number": ("program", "0x20", 1, ["'0x20' is not an offset"]),
    "beyond all": ("program", "9" * 5000, 1, ["is not an offset"]),
    "negative": ("program", "-1", 1, ["'-1' is not an offset"]),
    "too many": ("program", f"{WHERE}:0", 1, ["2 offsets"]),
}


@pytest.mark.parametrize("which", BAD_OFFSETS)
def test_bad_offset(base: Path, which: str) -> None:
    """One line that says what is there; nothing is mounted, no store is begun."""
    name, offset, code, words = BAD_OFFSETS[which]
    (base / "text").write_text("nothing but text\n" * 5000)
    places = [base / name, base / "mnt"]
    command: list[str | Path] = ["mount", *places, "--store", base / "store", "-o", f"offset={offset}"]
    line = said(*command, code=code, nobody=True)
    if os.geteuid() == 0 and code == 32:
        assert said(*command, "--engine", "kernel", code=code) == line
    assert all(word in line for word in words), line
    assert not is_mounted(base / "mnt") and not (base / "store").exists()


@needs_root
def test_an_image_whose_end_the_kernel_cannot_reach(tmp_path: Path) -> None:
    """Whole sectors only: the other engine takes over, or it is said."""
    tree.build(tmp_path / "tree", LOWER)
    image = mksquashfs(tmp_path / "image", tmp_path / "tree", options=("-nopad",))
    image.write_bytes(b"\0" + image.read_bytes())
    at, store = tmp_path / "mnt", tmp_path / "store"
    at.mkdir()
    line = said("mount", image, at, "-o", "offset=1,engine=kernel", "--store", store, code=32)
    assert "end of the image" in line and "--engine process" in line
    with mounted(image, tmp_path / "mnt", tmp_path / "store", options=["offset=1"]) as mount:
        assert (mount.path / "lib/big").read_bytes() == LOWER["lib/big"]
    padded = image.with_name("padded")
    padded.write_bytes(image.read_bytes() + bytes(1024))
    options = ["offset=1", "engine=kernel"]
    with mounted(padded, tmp_path / "mnt", tmp_path / "store", options=options) as mount:
        assert (mount.path / "lib/big").read_bytes() == LOWER["lib/big"]


# --- cowfs info IMAGE

KINDS: dict[str, tuple[str, ...]] = {
    "gzip": ("-comp", "gzip"),
    "gzip told": (
        "-comp", "gzip", "-Xcompression-level", "5", "-Xwindow-size", "12", "-Xstrategy", "default,filtered",
    ),
    "xz": ("-comp", "xz", "-Xbcj", "x86,arm", "-Xdict-size", "8K", "-b", "8K"),
    "zstd": ("-comp", "zstd", "-Xcompression-level", "7", "-no-exports"),
    "lz4": ("-comp", "lz4", "-Xhc", "-no-duplicates"),
    "lzo": ("-comp", "lzo", "-Xalgorithm", "lzo1x_999", "-Xcompression-level", "4"),
    "lzo default": ("-comp", "lzo", "-b", "1M"),
    "lzma": ("-comp", "lzma", "-no-xattrs"),
    "uncompressed": ("-noI", "-noD", "-noF", "-noX", "-noId"),
    "no fragments": ("-no-fragments", "-mkfs-time", "4294967295"),
    "always fragments": ("-always-use-fragments", "-mkfs-time", "0"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_tree(tmp_path_factory.mktemp("sample") / "tree")


def expected(shown: str) -> dict[str, Any]:
    """Return what ``unsquashfs -s`` prints, in the words of ``cowfs info --json``."""

    def find(pattern: str) -> str | None:
        match = re.search(pattern, shown, re.MULTILINE)
        return match[1].strip() if match else None

    def number(pattern: str) -> int | None:
        found = find(pattern)
        return None if found is None else int(found)

    made = datetime.strptime(find(r"append time (.*)$") or "", "%a %b %d %H:%M:%S %Y").replace(tzinfo=UTC)
    whole = {
        "format": "squashfs " + (find(r"SQUASHFS (\d:\d) superblock") or "").replace(":", "."),
        "made": f"{made:%Y-%m-%d %H:%M:%S} UTC",
        "size": number(r"^Filesystem size (\d+) bytes"),
        "compression": find(r"^Compression (\w+)"),
        "block_size": number(r"^Block size (\d+)"),
        "inodes": number(r"^Number of inodes (\d+)"),
        "owners": number(r"^Number of (?:ids|uids) (\d+)"),
        "fragments": number(r"^Number of fragments (\d+)"),
        "attribute_sets": number(r"^Number of xattr ids (\d+)") or 0,
        "export_table": "is exportable via NFS" in shown,
        "duplicates": "removed" if "Duplicates are removed" in shown else "kept",
        "uncompressed": [
            name
            for name, words in (
                ("inodes", "Inodes are uncompressed"),
                ("data", "Data is uncompressed"),
                ("fragments", "Fragments are uncompressed"),
                ("attributes", "Xattrs are uncompressed"),
                ("owners", "Uids/Gids (Id table) are uncompressed"),
            )
            if words in shown
        ],
        "level": number(r"compression[- ]level (\d+)"),
        "window_size": number(r"window-size (\d+)"),
        "strategies": (find(r"Strategies selected: (.*)$") or "").split(", "),
        "dictionary": number(r"Dictionary size (\d+)"),
        "filters": (find(r"Filters selected: (.*)$") or "").split(", "),
        "algorithm": find(r"^\talgorithm (\w+)"),
        "high_compression": True if "-Xhc" in shown else None,
    }
    if "Fragments are not stored" in shown or "Always-use-fragments option is specified" in shown:
        none = "Fragments are not stored" in shown
        whole["small_files"] = "no fragments" if none else "fragments, and the tails of all others"
    return {key: value for key, value in whole.items() if value not in (None, [""])}


@pytest.mark.parametrize("kind", KINDS)
def test_info_says_what_unsquashfs_says(sample: Path, nobody_path: Path, kind: str) -> None:
    image = mksquashfs(nobody_path / "image", sample, options=KINDS[kind])
    shown = run("unsquashfs", "-s", image, env={**os.environ, "TZ": "UTC", "LC_ALL": "C"}).stdout
    told = facts(image, nobody=True)
    wanted = expected(shown)
    assert len(wanted) >= 12, shown
    assert {key: told.get(key) for key in wanted} == wanted, shown
    more = set(told) - set(wanted) - {"path", "kind", "offset", "fingerprint"}
    assert not more, f"not compared: {more}; {shown}"
    assert (told["path"], told["kind"], told["offset"]) == (str(image), "squashfs", 0)
    lines = dict(
        line.split(":", 1) for line in cowfs("info", image, nobody=True, check=True).stdout.splitlines()
    )
    for key, value in wanted.items():
        line = lines[key.replace("_", " ")].strip()
        if isinstance(value, int) and not isinstance(value, bool) and value:
            assert str(value) in re.findall(r"\d+", line)
        elif isinstance(value, str):
            assert line == value, key


def test_info_of_an_image_at_an_offset(base: Path, good: Path) -> None:
    alone = facts(good) | {"path": str(base / "program"), "offset": WHERE}
    for option in (["-o", f"offset={WHERE}"], ["--offset", str(WHERE)], [f"--offset=offset={WHERE}"]):
        assert facts(base / "program", *option, nobody=True) == alone
    text_ = cowfs("info", "-o", str(WHERE), base / "program", nobody=True, check=True).stdout
    assert re.search(rf"^offset: +{WHERE} bytes$", text_, re.MULTILINE)
    assert alone["fingerprint"] in text_


def test_info_of_what_is_neither(base: Path) -> None:
    (base / "text").write_text("words\n" * 100)
    assert f"try -o offset={WHERE}" in said("info", base / "program", code=32, nobody=True)
    assert "not a store but a text file" in said("info", base / "text", code=32, nobody=True)
    assert "neither a store nor a cowfs mountpoint" in said("info", base / "lower", code=32, nobody=True)
    assert "No such file or directory" in said("info", base / "missing", code=32, nobody=True)
    assert "is a directory" in said("info", "-o", "4096", base / "lower", code=32, nobody=True)
    assert "more than one offset" in said("info", "-o", "1:2", base / "program", code=1, nobody=True)
    with mounted(base / "lower", base / "mnt", base / "store", nobody=True) as mount:
        assert "is a mount" in said("info", "-o", "1", mount.path, code=1, nobody=True)


# --- bad images


def with_version(major: int, minor: int, magic: bytes = b"hsqs") -> bytes:
    """The start of an image of another version (struct squashfs_super_block of the time)."""
    order = ">" if magic == b"sqsh" else "<"
    return (magic + bytes(24) + struct.pack(order + "HH", major, minor)).ljust(4096, b"\0")


def damaged_tables(good: bytes) -> bytes:
    """The image with all its tables overwritten."""
    table: int = struct.unpack_from("<Q", good, 64)[0]
    return good[:table] + b"\xa5" * (len(good) - table)


BAD: dict[str, tuple[Callable[[bytes], bytes], list[str]]] = {
    "version 1": (lambda good: with_version(1, 1), ["squashfs version 1.1", "mksquashfs"]),
    "version 2": (lambda good: with_version(2, 2), ["squashfs version 2.2"]),
    "version 3": (lambda good: with_version(3, 2), ["squashfs version 3.2"]),
    "version 1 big-endian": (lambda good: with_version(1, 1, b"sqsh"), ["squashfs version 1.1"]),
    "version 5": (lambda good: with_version(5, 0), ["squashfs version 5.0", "newer"]),
    "gzip": (lambda good: b"\x1f\x8b\x08" + good, ["gzip-compressed data"]),
    "zip": (lambda good: b"PK\x03\x04" + good, ["damaged zip archive", "truncated"]),
    "a disk": (lambda good: bytes(510) + b"\x55\xaa" + good, ["a disk image", "offset=auto"]),
    "zeros": (lambda good: bytes(9000), ["begins with zeros"]),
    "half": (lambda good: good[: len(good) // 2], ["truncated", "bytes"]),
    "superblock": (lambda good: good[:96], ["truncated"]),
    "less": (lambda good: good[:50], ["truncated"]),
    "tables": (damaged_tables, ["damaged", "(download or copy it again"]),
}


@pytest.mark.parametrize("which", BAD)
def test_bad_image(base: Path, which: str) -> None:
    """One line, for mount and for info; nothing is mounted, no store is begun."""
    make, words = BAD[which]
    bad = base / "bad"
    bad.write_bytes(make((base / "good.squashfs").read_bytes()))
    lines = [said("mount", bad, base / "mnt", "--store", base / "store", code=32, nobody=True)]
    if bad.read_bytes()[:4] in {b"hsqs", b"sqsh"}:
        lines.append(said("info", bad, code=32, nobody=True))
    for line in lines:
        assert str(bad) in line and all(word in line for word in words), line
    assert not is_mounted(base / "mnt") and not (base / "store").exists()


@needs_root
def test_an_image_that_may_not_be_read(base: Path) -> None:
    os.chown(base / "good.squashfs", 0, 0)
    os.chmod(base / "good.squashfs", 0o600)
    image, at = str(base / "good.squashfs"), str(base / "mnt")
    for command in (["mount", image, at], ["info", image]):
        line = said(*command, code=32, nobody=True)
        assert "good.squashfs" in line and "Permission denied" in line


@pytest.mark.parametrize("change", ["another", "made again", "cut", "a directory"])
def test_an_image_that_became_another(base: Path, change: str) -> None:
    """The store says what it belongs to and what is there now, and is not touched."""
    image = base / "root.squashfs"
    shutil.copy(base / "good.squashfs", image)
    with mounted(image, base / "mnt", base / "store", nobody=True) as mount:
        shell(mount, "echo kept > kept")
    before = facts(image)
    image.unlink()
    if change == "another":
        mksquashfs(image, base / "lower", options=NOBODYS)
    elif change == "made again":  # the same names, one of them with other content
        (base / "again").mkdir()
        tree.build(base / "again" / "tree", {**LOWER, "etc/hosts": b"127.0.0.2 localhost, changed\n"})
        mksquashfs(image, base / "again" / "tree", options=NOBODYS)
    elif change == "cut":
        image.write_bytes((base / "good.squashfs").read_bytes()[:5000])
    else:
        tree.build(image, LOWER)
    given_away(base)
    header = (base / "store/cowfs/header.json").read_bytes()
    line = said("mount", image, base / "mnt", "--store", base / "store", code=32, nobody=True)
    if change == "cut":
        assert "truncated" in line
        return
    was = f"{before['inodes']} inodes, made {before['made']}"
    now = "directory on" if change == "a directory" else f"{facts(image)['inodes']} inodes"
    assert was in line and now in line.partition("not to")[2] and "--force-lower" in line, line
    assert (base / "store/cowfs/header.json").read_bytes() == header
    with mounted(image, base / "mnt", base / "store", options=["force_lower"], nobody=True) as mount:
        assert shell(mount, "cat kept") == "kept\n"


def overwrite(image: Path) -> None:
    """Damage all data blocks, and leave the tables."""
    with image.open("r+b") as file:
        (table,) = struct.unpack_from("<Q", file.read(96), 64)
        file.seek(96)
        file.write(b"\xa5" * (table - 96))


def cut(image: Path) -> None:
    os.truncate(image, 4096)


@pytest.mark.parametrize("harm", [overwrite, cut])
@pytest.mark.parametrize("offset", [0, WHERE])
def test_an_image_harmed_while_it_is_mounted(
    nobody_path: Path, harm: Callable[[Path], None], offset: int
) -> None:
    """EIO for what is not there any more, and the log says where; all else goes on."""
    top = nobody_path / "tree"
    tree.build(top, {"first": text(400_000, 1), "second": text(400_000, 2), "dir/deep": b"x\n"})
    image = mksquashfs(nobody_path / "image", top, options=("-comp", "gzip", *NOBODYS))
    original = image.read_bytes()
    image.write_bytes(bytes(offset) + original)
    given_away(nobody_path)
    with mounted(
        image,
        nobody_path / "mnt",
        nobody_path / "store",
        options=[f"offset={offset}"],
        nobody=True,
        quiet=False,
    ) as mount:
        shell(mount, "ls -lR . >/dev/null; echo new > new")
        if offset:
            harmed = nobody_path / "harmed"
            harmed.write_bytes(original)
            harm(harmed)
            os.truncate(image, offset + harmed.stat().st_size)
            with image.open("r+b") as file:
                file.seek(offset)
                file.write(harmed.read_bytes())
        else:
            harm(image)
        for _ in range(2):
            done = run(*as_nobody_prefix(), "cat", mount.path / "second", check=False)
            assert done.returncode == 1 and os.strerror(errno.EIO) in done.stderr
        shell(
            mount,
            "test $(cat new) = new; echo more >> new; ls . >/dev/null; test -e first; rm second; mkdir d",
        )
        done = run(*as_nobody_prefix(), "sh", "-c", 'echo x >> "$1"/first', "sh", mount.path, check=False)
        assert done.returncode != 0  # its data cannot be copied up
        told = cowfs("info", mount.path, nobody=True, check=True).stdout
        assert str(image) in told
        log = [line for line in mount.trouble() if "ERROR" in line]
        assert log and all(str(image) in line for line in log)
        assert any(re.search(r"block.* at 0x[0-9a-f]+", line) for line in log), log
        assert "Traceback" not in mount.log.read_text()
    image.write_bytes(bytes(offset) + original)
    given_away(nobody_path)
    second = nobody_path / "second.log"
    with mounted(
        image, nobody_path / "mnt", nobody_path / "store",
        options=[f"offset={offset}"], nobody=True, log=second,
    ) as mount:  # fmt: skip
        assert shell(mount, "wc -c < first; cat new; ls") == "400000\nnew\nmore\nd\ndir\nfirst\nnew\n"


@needs_root
@pytest.mark.parametrize("engine", ["process", "kernel"])
@pytest.mark.parametrize("partition", [False, True], ids=["whole", "at an offset"])
def test_an_image_on_a_block_device(base: Path, engine: str, partition: bool) -> None:
    """The image counts as the same lower as in a file."""
    cowfs("create", base / "store", "64", check=True)
    at = base / "mnt"
    with mounted(base / "good.squashfs", at, base / "store", engine=engine):
        (at / "new").write_text("new")
    image, options = (base / "program", [f"offset={WHERE}"]) if partition else (base / "good.squashfs", [])
    device = run("losetup", "--find", "--show", "--read-only", image).stdout.strip()
    try:
        with mounted(device, at, base / "store", engine=engine, options=options):
            assert (at / "lib" / "big").read_bytes() == LOWER["lib/big"]
            assert (at / "new").read_text() == "new"
        shown = cowfs("info", device, *(["-o", options[0]] if options else [])).stdout
        assert "fingerprint" in shown
    finally:
        run("losetup", "--detach", device)


def test_a_program_without_section_headers(base: Path) -> None:
    """The place of the image behind it is told."""
    header = b"\x7fELF\x02\x01" + struct.pack("<26xQQ6xHHHH2x", 64, 0, 56, 1, 64, 0)
    header += struct.pack("<I4xQ16xQ16x", 1, 0, WHERE)
    (base / "bare").write_bytes(header.ljust(WHERE, b"\0") + (base / "good.squashfs").read_bytes())
    for done in (cowfs("mount", base / "bare", base / "mnt"), cowfs("info", base / "bare")):
        assert done.returncode != 0
        assert f"-o offset={WHERE}" in done.stderr
