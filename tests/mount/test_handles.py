"""File handles (open_by_handle_at(2)) lead to the inode that they are of, at any time, or nowhere."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounts import Mounted, cowfs, mounted
from tests.support.squashfs import needs_mksquashfs
from tests.support.system import needs_fuse, needs_root, run

pytestmark = [needs_fuse, needs_root, needs_mksquashfs]
DEV_FUSE_AT_NIGHT = True
_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD = -100
Handle = tuple[int, bytes]


class _Handle(ctypes.Structure):
    _fields_ = (("size", ctypes.c_uint), ("type", ctypes.c_int), ("data", ctypes.c_char * 128))


def handle_of(path: Path) -> Handle:
    """name_to_handle_at(2)."""
    handle, mount = _Handle(128, 0, b""), ctypes.c_int()
    if _libc.name_to_handle_at(_AT_FDCWD, os.fsencode(path), ctypes.byref(handle), ctypes.byref(mount), 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    start = _Handle.data.offset
    return handle.type, bytes(memoryview(handle).cast("B")[start : start + handle.size])


def opened(mount: Path, handle: Handle, flags: int = os.O_RDONLY) -> int:
    """open_by_handle_at(2): a descriptor."""
    made = _Handle(len(handle[1]), handle[0], b"")
    ctypes.memmove(ctypes.addressof(made) + _Handle.data.offset, handle[1], len(handle[1]))
    place = os.open(mount, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fd = int(_libc.open_by_handle_at(place, ctypes.byref(made), flags))
    finally:
        os.close(place)
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return fd


def content(mount: Path, handle: Handle) -> str:
    """Return the content of the file that a handle leads to."""
    fd = opened(mount, handle)
    try:
        return os.read(fd, 100).decode()
    finally:
        os.close(fd)


def drop_caches() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("2\n")


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    """An image with files in directories."""
    tree = tmp_path / "lower"
    (tree / "dir" / "sub").mkdir(parents=True)
    for number in range(20):
        (tree / "dir" / "sub" / f"{number}").write_text(f"lower {number}")
    (tree / "other").write_text("other")
    (tree / "large").write_bytes(b"large" * 40_000)
    os.link(tree / "other", tree / "dir" / "link")
    run("mksquashfs", tree, tmp_path / "lower.squashfs", "-quiet", "-no-progress")
    cowfs("create", tmp_path / "store", "64", check=True)
    return tmp_path / "lower.squashfs"


@pytest.fixture
def mount(lower: Path, tmp_path: Path) -> Iterator[Mounted]:
    """Mount the lower, and make changes of all kinds."""
    with mounted(lower, tmp_path / "mnt", tmp_path / "store") as made:
        yield made


def change(at: Path) -> dict[str, Path]:
    """Make changes of all kinds; return what should be found again."""
    (at / "new").mkdir()
    (at / "new" / "file").write_text("new file")
    (at / "dir" / "sub" / "3").write_text("changed 3")
    os.chmod(at / "large", 0o600)
    os.rename(at / "dir" / "sub", at / "moved")
    os.rename(at / "other", at / "new" / "other")
    os.chmod(at / "dir" / "link", 0o604)
    return {
        "lower 4": at / "moved" / "4",
        "changed 3": at / "moved" / "3",
        "new file": at / "new" / "file",
        "other": at / "new" / "other",
        "large" * 20: at / "large",
    }


def test_after_the_kernel_has_forgotten(mount: Mounted) -> None:
    wanted = change(mount.path)
    handles = {said: handle_of(path) for said, path in wanted.items()}
    for _ in range(2):
        drop_caches()
        for said, handle in handles.items():
            assert content(mount.path, handle) == said
    for said, path in wanted.items():
        assert handle_of(path) == handles[said]


def test_at_the_next_mount(lower: Path, tmp_path: Path) -> None:
    at = tmp_path / "mnt"
    with mounted(lower, at, tmp_path / "store"):
        before = handle_of(at / "dir" / "sub" / "5")
        directory = handle_of(at / "dir" / "sub")
        wanted = change(at)
        handles = {said: handle_of(path) for said, path in wanted.items()}
    with mounted(lower, at, tmp_path / "store"):
        for said, handle in [*handles.items(), ("lower 5", before)]:
            assert content(at, handle) == said
        fd = opened(at, directory, os.O_RDONLY | os.O_DIRECTORY)
        assert os.path.samestat(os.fstat(fd), (at / "moved").stat())
        assert len(os.listdir(fd)) == 20
        assert os.readlink(f"/proc/self/fd/{fd}") == str(at / "moved")
        os.close(fd)
        fd = opened(at, handles["new file"], os.O_RDWR)
        os.write(fd, b"NEW")
        os.close(fd)
        assert (at / "new" / "file").read_text() == "NEW file"
        (at / "moved" / "5").write_text("changed 5")  # a file of the lower, first met by its handle
        assert content(at, before) == "changed 5"


def make(path: Path, content: str) -> None:
    """Make a file, or a device 0:0, for which the store has a file."""
    if path.name.startswith("device"):
        os.mknod(path, stat.S_IFCHR | 0o600, 0)
    else:
        path.write_text(content)


def test_never_to_another_file(mount: Mounted) -> None:
    """Numbers of inodes of the store are used again."""
    lower = mount.path / "dir" / "sub" / "7"
    handles = [handle_of(lower)]
    lower.unlink()
    for number in range(10):
        for path in (mount.path / f"new{number}", mount.path / f"device{number}"):
            make(path, "first")
            handles.append(handle_of(path))
            path.unlink()
    for number in range(20):
        make(mount.path / f"again{number}", "second")
        make(mount.path / f"device{number}", "second")
    lower.write_text("second")
    for forget in (False, True):
        if forget:
            drop_caches()
        for handle in handles:
            with pytest.raises(OSError) as caught:
                os.close(opened(mount.path, handle))
            assert caught.value.errno == errno.ESTALE


def test_of_what_is_open_without_a_name(mount: Mounted) -> None:
    with (mount.path / "new").open("w+") as file:
        file.write("kept")
        file.flush()
        handle = handle_of(mount.path / "new")
        os.unlink(mount.path / "new")
        assert content(mount.path, handle) == "kept"
    with pytest.raises(OSError):
        drop_caches()
        opened(mount.path, handle)


def test_refused_where_numbers_are_all_that_is_known(tmp_path: Path) -> None:
    (tmp_path / "lower").mkdir()
    (tmp_path / "lower" / "file").write_text("here")
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        with pytest.raises(OSError) as caught:
            handle = handle_of(here.path / "file")
            drop_caches()  # before Linux 6.10 it gets one, which is good until then
            opened(here.path, handle)
        assert caught.value.errno in {errno.EOPNOTSUPP, errno.ESTALE}
