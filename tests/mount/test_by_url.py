"""A root that is mounted by its URL."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fileserver import FileServer, serving
from tests.support.mounts import COWFS, cowfs, eventually, is_mounted, mounted
from tests.support.system import as_nobody_prefix, needs_fuse, run
from tests.support.verity import make_tree

DEV_FUSE_AT_NIGHT = True

pytestmark = needs_fuse

BIG = 3 << 20
FAR = 40
"""So many files that are not read at first, each with data of its own."""


@pytest.fixture(scope="module")
def lower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lower = tmp_path_factory.mktemp("url") / "lower"
    (lower / "etc").mkdir(parents=True)
    (lower / "etc/hostname").write_text("first\n")
    (lower / "etc/hostname").chmod(0o666)
    (lower / "etc/link").symlink_to("hostname")
    (lower / "a-big").write_bytes(os.urandom(BIG))
    for number in range(FAR):
        (lower / f"far-{number}").write_bytes(os.urandom(300_000))
    run("mksquashfs", lower, lower.with_name("root.sqsh"), "-quiet", "-no-progress")
    return lower


@pytest.fixture
def server(lower: Path) -> Iterator[FileServer]:
    with serving(lower.with_name("root.sqsh")) as server:
        yield server


def as_user(script: str, at: Path, *, nobody: bool) -> str:
    """Return what a shell script prints that the user runs in a directory: root cannot see nobody's mount."""
    return run(*(as_nobody_prefix() if nobody else []), "sh", "-c", f"cd '{at}' && {script}").stdout


def test_sigterm_unmounts(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    arguments = "mount", server.url(), str(tmp_path / "mnt"), "--store", str(tmp_path / "store"), "-f"
    with subprocess.Popen([*COWFS, *arguments], stderr=subprocess.PIPE, text=True) as daemon:
        eventually(lambda: is_mounted(tmp_path / "mnt") or daemon.poll() is not None, "it is mounted")
        (tmp_path / "mnt/new").write_text("new")
        daemon.terminate()
        _out, said = daemon.communicate(timeout=20)
    assert daemon.returncode == 0, said
    assert not is_mounted(tmp_path / "mnt")


SUM = "find . -type f | sort | xargs cat | cksum"


@pytest.mark.parametrize("nobody", [False, True] if os.geteuid() == 0 else [False])
def test_a_root_by_url_is_as_one_beside_it(
    server: FileServer, lower: Path, nobody_path: Path, nobody: bool
) -> None:
    store, mnt, cache = nobody_path / "store", nobody_path / "mnt", nobody_path / "cache"
    options = [f"url_cache={cache}", "url_wait=30"]
    with mounted(server.url(), mnt, store, options=options, nobody=nobody) as here:
        assert server.served.bytes < BIG  # not a download
        assert as_user(SUM, mnt, nobody=nobody) == as_user(SUM, lower, nobody=False)
        assert as_user("readlink etc/link; echo second >etc/hostname", mnt, nobody=nobody) == "hostname\n"
        told = cowfs("info", mnt, nobody=nobody).stdout
        assert re.search(r"by URL: +[0-9]+ % of [0-9,]+ reads of blocks were cached", told)
        shown = run("findmnt", "-no", "SOURCE,OPTIONS", mnt).stdout
        assert shown.startswith(f"{server.url()} ") and "nosuid,nodev" in shown
        assert f"{server.url()} is what its server sends" in here.said or os.geteuid() or nobody
    before = server.served.bytes
    with mounted(server.url(), mnt, store, options=options, nobody=nobody):
        assert as_user("cat etc/hostname", mnt, nobody=nobody) == "second\n"
        assert as_user("cksum <a-big", mnt, nobody=nobody) == as_user("cksum <a-big", lower, nobody=False)
        assert server.served.bytes - before < 256 << 10  # the rest was on the disk
    if nobody or os.geteuid():  # root's would be in /var/cache
        home = {"XDG_CACHE_HOME": str(nobody_path)}
        assert "etc/hostname" in cowfs("diff", store, nobody=nobody, env=home).stdout
        told = cowfs("info", server.url(), nobody=nobody, env=home).stdout
        assert server.url() in told and "squashfs 4.0" in told
    done = cowfs("info", store, "--kernel", nobody=nobody)
    assert done.returncode and "the kernel cannot read by URL" in done.stderr
    image = nobody_path / "image"
    image.write_bytes(server.behaviour.files["/root.sqsh"])
    with mounted(image, mnt, store, nobody=nobody):  # it is the same, wherever it is
        assert as_user("cat etc/hostname", mnt, nobody=nobody) == "second\n"


def test_who_waits_for_the_server_keeps_nobody_from_what_is_at_hand(
    server: FileServer, lower: Path, tmp_path: Path
) -> None:
    mnt = tmp_path / "mnt"
    log = tmp_path / "log"
    with mounted(server.url(), mnt, options=["url_cache=none"], log=log, quiet=False):
        known = (mnt / "etc/hostname").read_bytes()
        (mnt / "etc/new").write_text("new")
        first = (mnt / "far-0").read_bytes()
        server.behaviour.away.set()
        results: dict[int, bytes] = {}

        def read(number: int) -> None:
            results[number] = (mnt / f"far-{number}").read_bytes()

        threads = [threading.Thread(target=read, args=[number]) for number in range(FAR - 12, FAR)]
        for thread in threads:
            thread.start()
        seen = server.served.requests
        eventually(lambda: server.served.requests > seen + 3, "more attempts")
        # all by the same user, with more that hang than there are threads
        run("dd", f"if={mnt}/etc/hostname", "iflag=direct", "of=/dev/null", timeout=10, check=False)
        assert (mnt / "etc/hostname").read_bytes() == known
        with open(mnt / "far-0", "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the daemon, not the kernel
            assert file.read() == first
        (mnt / "etc/hostname").write_text("changed")  # a copy-up
        assert len(list(mnt.iterdir())) == FAR + 2
        assert not results
        server.behaviour.away.clear()
        for thread in threads:
            thread.join(30)
        for number in range(FAR - 12, FAR):
            assert results[number] == (lower / f"far-{number}").read_bytes()

        (mnt / "far-1").stat()
        server.behaviour.etag = '"other"'
        with pytest.raises(OSError) as caught:
            (mnt / "far-10").read_bytes()
        assert caught.value.errno == errno.ESTALE
        assert (mnt / "far-0").read_bytes() == first
    text = log.read_text()
    assert "is another file than the one that was opened" in text
    assert "Traceback" not in text


def test_a_server_is_not_trusted_beyond_the_root_hash(
    server: FileServer, lower: Path, tmp_path: Path
) -> None:
    files, mnt = server.behaviour.files, tmp_path / "mnt"
    files["/root.verity"], root_hash = make_tree(files["/root.sqsh"])
    files["/root.roothash"] = root_hash.hex().encode()
    (tmp_path / "root.roothash").write_bytes(files["/root.roothash"])
    for who in ("maker", "other"):
        run(
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", "-days", "2"),
            *("-keyout", tmp_path / f"{who}.key", "-out", tmp_path / f"{who}.crt"),
        )
    run(
        *("openssl", "smime", "-sign", "-nocerts", "-noattr", "-binary", "-outform", "der"),
        *("-in", tmp_path / "root.roothash", "-out", tmp_path / "p7s"),
        *("-inkey", tmp_path / "maker.key", "-signer", tmp_path / "maker.crt"),
    )
    files["/root.roothash.p7s"] = (tmp_path / "p7s").read_bytes()
    at = files["/root.sqsh"].index((lower / "far-30").read_bytes()[:100])
    changed = bytearray(files["/root.sqsh"])
    changed[at + 50] ^= 1
    files["/root.sqsh"] = bytes(changed)  # by somebody who has the server, and changes neither size nor date
    certificate = tmp_path / "maker.crt"
    with mounted(server.url(), mnt, options=["url_cache=none", f"verify={certificate}"], quiet=False) as here:
        assert (mnt / "far-1").read_bytes() == (lower / "far-1").read_bytes()
        with pytest.raises(OSError) as caught:
            (mnt / "far-30").read_bytes()
        assert caught.value.errno == errno.EIO
        assert "does not match the root hash" in here.log.read_text()
        assert "what its server sends" not in here.said

    def refusal(by: str) -> str:
        said = cowfs("mount", server.url(), mnt, "-o", "url_cache=none", f"--verify={by}").stderr
        assert said.count("\n") == 1 and "the daemon failed" not in said
        return said

    assert "is not signed with" in refusal(str(tmp_path / "other.crt"))
    assert "does not match the root hash" in refusal("0" * 64)
    assert "neither a root hash nor a file" in refusal(str(tmp_path / "nothing"))
    del files["/root.verity"]
    assert "/root.verity: the server has no such file" in refusal(root_hash.hex())


@pytest.mark.nightly
def test_a_mount_whose_server_hangs_can_be_unmounted(server: FileServer, tmp_path: Path) -> None:
    mnt = tmp_path / "mnt"
    with mounted(server.url(), mnt, options=["url_cache=none"], quiet=False):
        server.behaviour.stalls.set()
        hanging = subprocess.Popen(
            ["cat", mnt / "far-20"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        eventually(lambda: server.served.waiting, "a request that hangs")
        assert cowfs("umount", "-l", mnt, timeout=30).returncode == 0
        assert hanging.wait(30) != 0
        server.behaviour.stalls.clear()


def test_who_reads_waits_once(server: FileServer, tmp_path: Path) -> None:
    """The kernel asks again at once for what it could not read ahead."""
    mnt = tmp_path / "mnt"
    with mounted(server.url(), mnt, options=["url_cache=none", "url_wait=1"], quiet=False):
        with open(mnt / "far-20", "rb", buffering=0) as file:
            server.behaviour.stalls.set()
            before = server.served.requests
            with pytest.raises(TimeoutError):
                file.read(1)
            server.behaviour.stalls.clear()
            assert server.served.requests == before + 1
        assert len((mnt / "far-20").read_bytes()) == 300_000


@pytest.mark.parametrize(
    "kind", ["zip", *(pytest.param(kind, marks=pytest.mark.nightly) for kind in ("tar", "iso"))]
)
def test_an_archive_by_url_is_as_one_beside_it(server: FileServer, tmp_path: Path, kind: str) -> None:
    tree, archive = tmp_path / "tree", tmp_path / f"a.{kind}"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/hostname").write_text("first\n")
    for number in range(2):
        (tree / f"data-{number}").write_bytes(os.urandom(1_500_000) + bytes(100_000))
    if kind == "iso":
        run("xorriso", "-as", "mkisofs", "-quiet", "-R", "-o", archive, tree)
    else:
        shutil.make_archive(str(tmp_path / "a"), kind, tree)
    server.behaviour.files["/archive"] = archive.read_bytes()
    mnt, store, log = tmp_path / "mnt", tmp_path / "store", tmp_path / "log"
    with mounted(archive, mnt, store):
        (mnt / "etc/hostname").write_text("second\n")
    with mounted(server.url("/archive"), mnt, store, options=["url_cache=none"], log=log, quiet=False):
        assert (mnt / "etc/hostname").read_text() == "second\n"  # it is the same, wherever it is
        assert (mnt / "data-0").read_bytes() == (tree / "data-0").read_bytes()
        server.behaviour.away.set()
        reading = subprocess.Popen(["cat", mnt / "data-1"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        seen = server.served.requests
        eventually(lambda: server.served.requests > seen + 3, "more attempts")
        assert sorted(os.listdir(mnt)) == ["data-0", "data-1", "etc"] and reading.poll() is None
        assert "by URL: " in cowfs("info", mnt).stdout
        server.behaviour.etag = '"another"'
        server.behaviour.away.clear()
        assert "Stale file handle" in os.fsdecode(reading.communicate(timeout=60)[1])


def test_what_cannot_be_mounted_is_told_of_in_one_line(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()

    def refusal(url: str, *more: str) -> str:
        done = cowfs("mount", url, tmp_path / "mnt", "-o", "url_cache=none", *more)
        assert done.returncode and done.stderr.count("\n") == 1 and done.stderr.startswith("cowfs: "), (
            done.stderr
        )
        return done.stderr

    server.behaviour.files["/text"] = b"hello\n" * 1000
    server.behaviour.files["/short.sqsh"] = server.behaviour.files["/root.sqsh"][:-5000]
    assert "no such file (404 Not Found)" in refusal(server.url("/nothing"))
    assert "not a squashfs image but a text file" in refusal(server.url("/text"))
    assert "truncated squashfs image" in refusal(server.url("/short.sqsh"))
    server.behaviour.ranges = False
    assert "does not take range requests" in refusal(server.url())
    assert "the kernel cannot read by URL" in refusal(server.url(), "--engine=kernel")
    assert "offset=auto would read all of it" in refusal(server.url(), "-o", "offset=auto")
    assert "a login in a URL is shown" in refusal("http://me:secret@127.0.0.1/x")
    assert "url_wait=x: not a number" in refusal(server.url(), "-o", "url_wait=x")
