"""The compressors of squashfs: ``decompress(block, limit)`` returns at most *limit* bytes.

Several threads may call a function at once; each releases the GIL while it works. Whatever the block
contains, it allocates no more than *limit* and a small constant, and raises only :class:`CodecError`. The
libraries are imported when an image needs them.

What the blocks are: gzip: a zlib stream. lzma: the old ``.lzma`` format (before version 4 see
:mod:`cowfs.formats.squashfs.old_lzma`). xz: a whole ``.xz`` stream, whose header names the BCJ
filters; the compressor's options in the superblock say it once more and are not needed. lz4: a bare
block, no frame. zstd: a frame. lzo: a bare lzo1x block.
"""

from __future__ import annotations

import ctypes
import importlib
import lzma
import threading
import zlib
from collections.abc import Callable
from typing import Any

from cowfs.errors import LayerError
from cowfs.formats.squashfs import old_lzma
from cowfs.formats.squashfs.errors import CodecError

Block = bytes | memoryview
Decompress = Callable[[Block, int], bytes]

_XZ_MEMORY = 16 << 20
"""How many bytes liblzma may allocate.

A dictionary is at most a block (1 MiB); a forged one may need 4 GiB.
"""


def decompressor(name: str, block_size: int, image: str) -> Decompress:
    """Return the function for the compressor *name*; :class:`LayerError` if its library is not installed.

    *block_size* is that of the image, the largest size of decompressed data; *image* is for messages.
    """
    try:
        return _MAKERS[name](block_size)
    except (ImportError, OSError) as error:
        needs = _LIBRARIES.get(name, "a library that is missing")
        raise LayerError(
            f"{image}: is compressed with {name}, which needs {needs}",
            f"install it, or repack the image with another compressor: {error}",
        ) from error


def starter(name: str, block_size: int) -> Decompress | None:
    """Return a function for only the first *limit* bytes of a block, if that is quicker and as safe; else
    None.

    It is not as safe for gzip and xz, which have a checksum of the whole block.
    """
    return _zstd_start(block_size) if name == "zstd" else None


def _gzip(block_size: int) -> Decompress:
    del block_size
    try:
        library: Any = importlib.import_module("isal.igzip_lib")
    except ImportError:
        return _zlib
    make, flag = library.IgzipDecompressor, library.DECOMP_ZLIB
    failure = library.IsalError

    def decompress(block: Block, limit: int) -> bytes:
        stream = make(flag)
        try:
            # One byte more than allowed, to notice a stream that is too long.
            data: bytes = stream.decompress(block, limit + 1)
        except (failure, EOFError, ValueError) as error:
            raise CodecError(f"gzip: {error}") from error
        return _whole("gzip", data, limit, stream.eof)

    return decompress


def _zlib(block: Block, limit: int) -> bytes:
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(block, limit + 1)
    except zlib.error as error:
        raise CodecError(f"gzip: {error}") from error
    return _whole("gzip", data, limit, stream.eof)


def _lzma_stream(name: str, container: int) -> Callable[[int], Decompress]:
    def make(block_size: int) -> Decompress:
        del block_size

        def decompress(block: Block, limit: int) -> bytes:
            try:
                stream = lzma.LZMADecompressor(container, memlimit=_XZ_MEMORY)
                data = stream.decompress(block, limit + 1)
            except (lzma.LZMAError, EOFError) as error:
                raise CodecError(f"{name}: {error}") from error
            return _whole(name, data, limit, stream.eof)

        return decompress

    return make


def _any(block_size: int) -> Decompress:
    gzip = _gzip(block_size)
    lzma_alone = _lzma_stream("lzma", lzma.FORMAT_ALONE)(block_size)

    def decompress(block: Block, limit: int) -> bytes:
        kind = old_lzma.layout(block, limit)
        if kind == old_lzma.ALONE:
            return lzma_alone(block, limit)
        if kind == old_lzma.PROPERTIES:
            return old_lzma.with_properties(block, limit)
        try:
            return gzip(block, limit)
        except CodecError:
            if kind != old_lzma.SIZE:
                raise
        return old_lzma.with_size(block, limit)

    return decompress


class _ZstdContexts(threading.local):
    """The decompression contexts of one thread: one for each bound of the window."""

    def __init__(self, library: Any, window: int) -> None:
        self.sized = library.ZstdDecompressor()
        """For frames that state their size. Only that much is allocated, whatever the window."""
        self.unsized = library.ZstdDecompressor(max_window_size=window)
        """For other frames. A forged one may need a window of 2 GiB."""


def _zstd(block_size: int) -> Decompress:
    library: Any = importlib.import_module("zstandard")
    content_size = library.frame_content_size
    failure = library.ZstdError
    contexts = _ZstdContexts(library, max(block_size, 8192))  # the window: as in the kernel's zstd_wrapper.c

    def decompress(block: Block, limit: int) -> bytes:
        try:
            # The library allocates the size in the frame's header, so check that first.
            size = content_size(block)
            if size > limit:
                raise CodecError("zstd: the data is larger than its block")
            context = contexts.unsized if size < 0 else contexts.sized
            data: bytes = context.decompress(block, max_output_size=limit)
        except (failure, ValueError) as error:
            raise CodecError(f"zstd: {error}") from error
        return _whole("zstd", data, limit, True)

    return decompress


def _zstd_start(block_size: int) -> Decompress:
    library: Any = importlib.import_module("zstandard")
    contexts = _ZstdContexts(library, max(block_size, 8192))
    whole = _zstd(block_size)

    def decompress(block: Block, limit: int) -> bytes:
        try:
            frame = library.get_frame_parameters(block)
            # An unknown size is larger than any other.
            if frame.has_checksum or frame.content_size > block_size:
                return whole(block, block_size)[:limit]
            data: bytes = contexts.sized.stream_reader(block).read(limit)
        except (library.ZstdError, ValueError) as error:
            raise CodecError(f"zstd: {error}") from error
        return data

    return decompress


def _lz4(block_size: int) -> Decompress:
    del block_size
    library: Any = importlib.import_module("lz4.block")
    expand, failure = library.decompress, library.LZ4BlockError

    def decompress(block: Block, limit: int) -> bytes:
        try:
            data: bytes = expand(block, uncompressed_size=limit)
        except (failure, ValueError, OverflowError) as error:
            raise CodecError(f"lz4: {error}") from error
        return data

    return decompress


def _lzo(block_size: int) -> Decompress:
    del block_size
    expand = ctypes.CDLL("liblzo2.so.2").lzo1x_decompress_safe
    expand.restype = ctypes.c_int
    expand.argtypes = [
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_char_p,
        ctypes.POINTER(ctypes.c_size_t),
        ctypes.c_void_p,
    ]

    def decompress(block: Block, limit: int) -> bytes:
        out = ctypes.create_string_buffer(limit)
        length = ctypes.c_size_t(limit)
        code = expand(bytes(block), len(block), out, ctypes.byref(length), None)
        if code:
            raise CodecError(f"lzo: error {code}")
        return ctypes.string_at(out, min(length.value, limit))

    return decompress


def _whole(name: str, data: bytes, limit: int, ended: bool) -> bytes:
    if len(data) > limit:
        raise CodecError(f"{name}: the data is larger than its block")
    if not ended:
        raise CodecError(f"{name}: the block ends too early")
    return data


_MAKERS: dict[str, Callable[[int], Decompress]] = {
    "gzip": _gzip,
    "lzma": _lzma_stream("lzma", lzma.FORMAT_ALONE),
    "lzo": _lzo,
    "xz": _lzma_stream("xz", lzma.FORMAT_XZ),
    "lz4": _lz4,
    "zstd": _zstd,
    "gzip or lzma": _any,
}

_LIBRARIES = {
    "lzo": "the library liblzo2.so.2 (Debian: liblzo2-2)",
    "lz4": "the Python package lz4",
    "zstd": "the Python package zstandard",
}
