"""The ext3 engine, called directly through its C functions."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from tests.support import sanitized

module = sanitized.load()
ffi, lib = module.ffi, module.lib

ROOT = 2


class Engine:
    """An open image. Errors raise OSError."""

    def __init__(self, path: Path, flags: int = 0, cache: int = 0, debug: int = 0) -> None:
        out = ffi.new("x3_image **")
        fd = os.open(path, os.O_RDWR)
        try:
            if error := lib.x3_open(fd, flags, cache, -1, debug, out):
                raise OSError(-error, ffi.string(lib.x3_message(ffi.NULL)).decode())
        finally:
            os.close(fd)
        self.image = out[0]
        self.places: dict[tuple[int, bytes], Any] = {}

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        image, self.image = self.image, None
        if image is None:
            return
        if error is not None:
            lib.x3_abandon(image)
        else:
            assert lib.x3_close(image) == 0

    def abandon(self) -> None:
        image, self.image = self.image, None
        lib.x3_abandon(image)

    def call(self, name: str, *arguments: Any) -> int:
        result = getattr(lib, f"x3_{name}")(self.image, *arguments)
        if result < 0:
            raise OSError(-result, f"{name}: {os.strerror(-result)}")
        return int(result)

    def facts(self) -> Any:
        facts = ffi.new("struct x3_facts *")
        self.call("facts", facts)
        return facts

    def attr(self, ino: int) -> Any:
        attr = ffi.new("struct x3_attr *")
        self.call("getattr", ino, attr)
        return attr

    def create(
        self, directory: int, name: bytes, mode: int = 0o100644, target: bytes = b"", **more: int
    ) -> int:
        kept = ffi.from_buffer(target)
        new = ffi.new("struct x3_new *", {"mode": mode, "target_len": len(target), **more})
        new.target = ffi.cast("char *", kept)
        self.call("create", directory, name, len(name), 0, new)
        self.places[directory, name] = (new.place.block, new.place.offset)
        return int(new.ino)

    def unlink(self, directory: int, name: bytes, ino: int, keep: bool = False, call: str = "unlink") -> int:
        done = self.call(call, directory, name, len(name), self.places[directory, name], ino, keep)
        del self.places[directory, name]
        return done

    def rename(
        self,
        source: tuple[int, bytes],
        target: tuple[int, bytes],
        ino: int,
        replaced: int = 0,
        flags: int = 0,
    ) -> Any:
        names = [ffi.from_buffer(source[1]), ffi.from_buffer(target[1])]
        request = ffi.new("struct x3_rename *", {"ino": ino, "replaced": replaced, "flags": flags})
        request.source_dir, request.target_dir = source[0], target[0]
        request.source_name, request.target_name = (ffi.cast("char *", name) for name in names)
        request.source_len, request.target_len = len(source[1]), len(target[1])
        request.source_place = self.places[source]
        if replaced:
            request.target_place = self.places[target]
        self.call("rename", request)
        if not flags:
            del self.places[source]
        self.places[target] = (request.place.block, request.place.offset)
        return request

    def write(self, ino: int, data: bytes, offset: int = 0) -> int:
        return self.call("write", ino, data, len(data), offset)

    def read(self, ino: int, size: int, offset: int = 0) -> bytes:
        buffer = ffi.new("char[]", size or 1)
        return bytes(ffi.buffer(buffer, self.call("read", ino, buffer, size, offset)))

    def names(self, directory: int) -> dict[bytes, int]:
        cursor, buffer = ffi.new("uint64_t *"), ffi.new("char[]", 16384)
        found: dict[bytes, int] = {}
        while size := self.call("readdir", directory, cursor, buffer, 16384):
            raw, at = bytes(ffi.buffer(buffer, size)), 0
            while at < size:
                ino, block, offset, _, length = struct.unpack_from("<IIHBB", raw, at)
                name = raw[at + 12 : at + 12 + length]
                found[name] = ino
                self.places[directory, name] = (block, offset)
                at += 12 + length
        return found

    def setxattr(self, ino: int, name: bytes, value: bytes, flags: int = 0) -> None:
        self.call("setxattr", ino, name, len(name), value, len(value), flags)

    def getxattr(self, ino: int, name: bytes) -> bytes:
        buffer = ffi.new("char[]", 65536)
        return bytes(ffi.buffer(buffer, self.call("getxattr", ino, name, len(name), buffer, 65536)))


def sound(path: Path) -> None:
    done = subprocess.run(["e2fsck", "-fn", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def recovered(path: Path, copy: Path) -> Path:
    """Copy the image as a crash would leave it, and replay the journal; return the copy."""
    shutil.copyfile(path, copy)
    done = subprocess.run(["e2fsck", "-p", copy], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    sound(copy)
    return copy


@contextmanager
def refused(number: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == number, caught.value
