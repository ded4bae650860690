"""Ext3 filesystems of many makes: from other programs, or with other options."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.ext3.images import FEATURES, IDENTITY
from tests.support.system import run

SIGNED, UNSIGNED = 1, 2
"""Bits of s_flags: whether hashes use the bytes of names as signed or unsigned."""


def without(*names: str) -> str:
    """Return the features of a store, without some."""
    return ",".join(name for name in FEATURES.split(",") if name not in names)


@dataclass(frozen=True)
class Make:
    """A make: how to create it, and what to change then."""

    features: str = FEATURES
    options: tuple[str, ...] = ()
    extended: str = ""
    kib: int = 24 << 10
    journal: int = 4
    """The size in MiB."""
    changes: tuple[str, ...] = ()
    """Commands for debugfs."""
    patch: Callable[[Path], None] | None = None
    for_kernel: bool = True
    """Whether the kernel can mount it."""

    def make(self, path: Path) -> Path:
        """Create an empty filesystem of this make."""
        with path.open("wb") as out:
            out.truncate(self.kib << 10)
        extended = f"lazy_itable_init=0,lazy_journal_init=0,nodiscard,hash_seed={IDENTITY}"
        journal = ["-J", f"size={self.journal}"] if "has_journal" in self.features else []
        run(
            "mke2fs", "-q", "-F", "-t", "ext3", "-U", IDENTITY, "-O", self.features, "-m", "0", *journal,
            *self.options, "-E", f"{extended}{self.extended and ','}{self.extended}", path,
        )  # fmt: skip
        for command in self.changes:
            run("debugfs", "-w", "-R", command, path)
        if self.patch:
            self.patch(path)
        return path


def _busybox(path: Path) -> None:
    run("busybox", "mke2fs", "-F", path)
    run("tune2fs", "-j", "-J", "size=4", path)


def _revision_0(path: Path) -> None:
    # By hand, because the option of mke2fs depends on its version.
    run("mke2fs", "-q", "-F", "-O", "none", "-b", "1024", "-I", "128", path)
    for command in ("set_super_value rev_level 0", "set_super_value default_mount_opts 0"):
        run("debugfs", "-w", "-R", command, path)
    assert path.read_bytes()[1024 + 76 : 1024 + 80] == b"\0\0\0\0"
    run("tune2fs", "-j", "-J", "size=4", path)


def _journal_v1(path: Path) -> None:
    """Change the journal's superblock to version 1, whose later fields have no meaning."""
    data = bytearray(path.read_bytes())
    size = 1024 << struct.unpack_from("<I", data, 1024 + 24)[0]
    magic = bytes.fromhex("c03b3998")
    (at,) = (at for at in range(0, len(data), size) if data[at : at + 8] == magic + b"\0\0\0\4")
    data[at + 7] = 3
    data[at + 36 : at + 256] = b"\xff" * 220
    path.write_bytes(data)


def _hashed(version: str, flags: int, *options: str) -> Make:
    changes = f"set_super_value def_hash_version {version}", f"set_super_value flags {flags}"
    return Make(options=options, changes=changes)


def _large(block_size: int) -> Make:
    """Return a make whose journal has at least 1024 blocks."""
    return Make(
        options=("-b", str(block_size), "-N", "2000"),
        kib=block_size * 2200 >> 10,
        journal=block_size >> 10,
        for_kernel=False,
    )


K1, K4 = ("-b", "1024"), ("-b", "4096")

MAKES = {
    "plain": Make(),
    "no_ext_attr": Make(without("ext_attr"), K4),
    "no_ext_attr_128": Make(without("ext_attr"), (*K1, "-I", "128")),
    "no_dir_index": Make(without("dir_index"), K1),
    "no_resize_inode": Make(without("resize_inode"), K1),
    "no_large_file": Make(without("large_file"), K4),
    "no_filetype": Make(without("filetype"), K1),
    "no_sparse_super": Make(without("sparse_super", "resize_inode"), (*K1, "-g", "2048")),
    "bare": Make("none,has_journal", (*K4, "-I", "128")),
    "bare_indexed": Make("none,has_journal,dir_index", (*K1, "-I", "128")),
    "sparse_super2": Make(without("sparse_super", "resize_inode") + ",sparse_super2", K1),
    "inodes_512": Make(options=("-I", "512")),
    "inodes_1024": Make(options=(*K1, "-I", "1024", "-N", "500")),
    "inodes_4096": Make(options=(*K4, "-I", "4096", "-N", "500")),
    "legacy": _hashed("legacy", SIGNED, *K1),
    "legacy_unsigned": _hashed("legacy", UNSIGNED, *K4),
    "half_md4_unsigned": _hashed("half_md4", UNSIGNED, *K1),
    "tea": _hashed("tea", SIGNED, *K4),
    "tea_unsigned": _hashed("tea", UNSIGNED, *K1, "-I", "128"),
    "no_hash_hint": _hashed("half_md4", 0, *K1),
    "no_hash_seed": Make(options=K1, changes=("set_super_value hash_seed null",)),
    "blocks_2048": Make(options=("-b", "2048")),
    "blocks_8192": _large(8192),
    "blocks_16384": _large(16384),
    "blocks_32768": _large(32768),
    "blocks_65536": _large(65536),
    "meta_bg": Make(without("resize_inode") + ",meta_bg", (*K1, "-g", "256", "-N", "1500")),
    "meta_bg_not_sparse": Make(
        without("resize_inode", "sparse_super") + ",meta_bg", (*K1, "-g", "256", "-N", "1500")
    ),
    "meta_bg_unasked": Make(options=(*K1, "-g", "256", "-N", "1500")),
    "small_groups": Make(options=(*K1, "-g", "1024", "-N", "1500")),
    "odd_groups": Make(options=(*K4, "-g", "4136", "-N", "1111"), kib=49_999),
    "odd_size": Make(options=(*K1, "-N", "333"), kib=20_001),
    "short_last_group": Make(options=(*K1, "-N", "900"), kib=24_577 + 700),
    "few_inodes": Make(options=(*K4, "-N", "32")),
    "reserved": Make(options=(*K4, "-m", "20"), extended="root_owner=1000:1000,resize=2G"),
    "largest_journal": Make(options=K1, kib=300 << 10, journal=100),
    "journal_v1": Make(patch=_journal_v1),
    "revision_0": Make(patch=_revision_0),
    "busybox": Make(patch=_busybox),
    "hurd": Make(without("filetype"), options=("-o", "hurd", *K4)),
    "wants_extra": Make(changes=("set_super_value want_extra_isize 64",)),
}
"""The makes that cowfs reads and writes."""


def _features(names: str, *options: str, **more: object) -> Make:
    return Make(f"{FEATURES},{names}", ("-I", "256", *options), **more)  # type: ignore[arg-type]


REFUSED = {
    **{
        name: _features(name)
        for name in (
            "extents", "flex_bg", "uninit_bg", "metadata_csum", "huge_file", "dir_nlink", "extra_isize",
            "quota", "inline_data", "encrypt", "casefold", "mmp", "ea_inode", "large_dir", "stable_inodes",
            "fast_commit", "orphan_file",
        )
    },
    "64bit": _features("extents,64bit"),
    "project": _features("quota,project", extended="quotatype=prjquota"),
    "bigalloc": _features("extents,bigalloc"),
    "verity": _features("extents,verity"),
    "metadata_csum_seed": _features("metadata_csum,metadata_csum_seed"),
    "lazy_bg": Make(changes=("feature lazy_bg",)),
    "journal": Make(without("has_journal"), K4),
    "journal is on another device": Make(
        changes=("set_super_value journal_inum 0", "set_super_value journal_dev 2049")
    ),
    "revision": Make(changes=("set_super_value rev_level 2",)),
    "unknown feature 0x20000000": Make(changes=("feature FEATURE_C29",)),
    "unknown feature 0x40000000": Make(changes=("feature FEATURE_I30",)),
    "unknown feature 0x80000000": Make(changes=("feature FEATURE_R31",)),
}  # fmt: skip
"""The makes that cowfs refuses, with its messages."""
