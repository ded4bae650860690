"""Describe an image as ``unsquashfs -s`` does."""

from __future__ import annotations

import struct
from datetime import UTC, datetime

from cowfs.formats.squashfs import superblock as sblk
from cowfs.formats.squashfs.image import Image
from cowfs.formats.squashfs.superblock import Superblock

_STRATEGIES = ("default", "filtered", "huffman_only", "run_length_encoded", "fixed")
_FILTERS = ("x86", "powerpc", "ia64", "arm", "armthumb", "sparc")
_LZO = ("lzo1x_1", "lzo1x_1_11", "lzo1x_1_12", "lzo1x_1_15", "lzo1x_999")


def summary(image: Image) -> list[tuple[str, str]]:
    """Return the facts in the superblock as (name, value), in the order to print. May block. EIO."""
    sb = image.superblock
    made = datetime.fromtimestamp(sb.mkfs_time, UTC)
    facts = [
        ("format", "squashfs {}.{}".format(*sb.version) + _byte_order(sb)),
        ("made", f"{made:%Y-%m-%d %H:%M:%S} UTC"),
        ("size", f"{sb.bytes_used} bytes"),
        ("compression", sb.compression),
        *_options(image),
        ("block size", f"{sb.block_size} bytes"),
        ("inodes", str(sb.inodes)),
        ("owners", str(sb.ids)),
        *([("groups", str(sb.groups))] if sb.is_old else []),
        ("fragments", str(sb.fragments)),
        ("attribute sets", "none" if image.xattrs is None else str(image.xattrs.count)),
        ("export table", "yes" if sb.exportable else "no"),
        ("duplicates", "removed" if sb.flags & sblk.DUPLICATES_REMOVED else "kept"),
        ("uncompressed", ", ".join(_uncompressed(sb)) or "nothing"),
    ]
    if sb.flags & sblk.NO_FRAGMENTS:
        facts.append(("small files", "no fragments"))
    elif sb.flags & sblk.ALWAYS_FRAGMENTS:
        facts.append(("small files", "fragments, and the tails of all others"))
    return facts


def _byte_order(sb: Superblock) -> str:
    """Return a suffix with the byte order, for versions that have two; else ""."""
    return f", {sb.byteorder}-endian" if sb.is_old else ""


def _uncompressed(sb: Superblock) -> list[str]:
    flags = (
        (sblk.NO_INODE_COMPRESSION, "inodes"),
        (sblk.NO_DATA_COMPRESSION, "data"),
        (sblk.NO_FRAGMENT_COMPRESSION, "fragments"),
        (sblk.NO_XATTR_COMPRESSION, "attributes"),
        # If inodes are uncompressed, owners are too. Their own flag is set only for owners alone.
        (sblk.NO_ID_COMPRESSION | sblk.NO_INODE_COMPRESSION, "owners"),
    )
    return [name for flag, name in flags if sb.flags & flag]


def _options(image: Image) -> list[tuple[str, str]]:
    """Return the options of the compressor: a metadata block after the superblock, different for each."""
    sb = image.superblock
    if not sb.flags & sblk.COMPRESSOR_OPTIONS:
        return []
    raw = image.compressor_options()
    facts: list[tuple[str, str]] = []
    if sb.compression == "gzip" and len(raw) >= 8:
        level, window, strategies = struct.unpack_from("<IHH", raw)
        facts = [("level", str(level)), ("window size", str(window))]
        facts += _names("strategies", _STRATEGIES, strategies)
    elif sb.compression == "xz" and len(raw) >= 8:
        dictionary, filters = struct.unpack_from("<II", raw)
        facts = [("dictionary", f"{dictionary} bytes"), *_names("filters", _FILTERS, filters)]
    elif sb.compression == "zstd" and len(raw) >= 4:
        facts = [("level", str(struct.unpack_from("<I", raw)[0]))]
    elif sb.compression == "lzo" and len(raw) >= 8:
        algorithm, level = struct.unpack_from("<II", raw)
        facts = [("algorithm", _LZO[algorithm] if algorithm < len(_LZO) else str(algorithm))]
        facts += [("level", str(level))] if algorithm == len(_LZO) - 1 else []
    elif sb.compression == "lz4" and len(raw) >= 8:
        facts = [("high compression", "yes" if struct.unpack_from("<4xI", raw)[0] & 1 else "no")]
    return facts


def _names(what: str, names: tuple[str, ...], bits: int) -> list[tuple[str, str]]:
    chosen = [name for position, name in enumerate(names) if bits >> position & 1]
    return [(what, ", ".join(chosen))] if chosen else []
