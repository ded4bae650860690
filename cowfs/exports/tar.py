"""Write tar archives: in pax format (POSIX.1-2001) with xattrs and ACLs like star and GNU tar, or in GNU's.

Layouts: the ustar header of tar(5); pax records ``LENGTH KEY=VALUE\\n``, whose values are bytes; sparse files
in GNU tar's "Sparse Format 1.0" (the map before the data, in lines of decimals, padded to a block).
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Callable

from cowfs.exports.entries import Entry, Tick, copy, data_runs, opened, target_of
from cowfs.exports.losses import Losses
from cowfs.exports.whiteouts import is_taken, place_of
from cowfs.formats.acl_text import to_text
from cowfs.overlay.xattr_format import TRUSTED, XattrFormat

Write = Callable[[bytes], object]
_BLOCK = 512
_RECORD = 10240
_SECOND = 1_000_000_000
_SPARSE_FROM = 64 << 10
"""A file with at least so many bytes of holes becomes sparse in the archive."""
_NAME, _SIZE, _ID, _TIME = 100, 8**11, 8**7, 8**11
"""The limits of the fields of a header: bytes of a name, and the first number that does not fit."""
_ACLS = {
    b"system.posix_acl_access": b"SCHILY.acl.access",
    b"system.posix_acl_default": b"SCHILY.acl.default",
}
"""The ACL records that GNU tar --acls and star read; GNU tar --xattrs reads the xattr itself."""
_OVERLAYFS = XattrFormat(TRUSTED)
"""In a layer for overlayfs, attributes of an overlay inside the tree need other names."""
_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}


class Tar:
    """A :class:`cowfs.exports.entries.Sink` that writes an archive; :meth:`close` ends it."""

    def __init__(
        self, write: Write, losses: Losses, tick: Tick, style: str,
        *, gnu: bool = False, sparse: bool = True,
        accepts: Callable[[bytes, bytes], bool] = lambda *_: True,
    ) -> None:  # fmt: skip
        """*accepts* returns whether the reader can store an xattr, by its name and value."""
        self._write = write
        self._losses = losses
        self._tick = tick
        self._style = style
        self._gnu = gnu
        self._sparse = sparse and not gnu
        self._accepts = accepts
        self._written = 0
        self.deleted: list[bytes] = []
        """For the style ``list``: the paths to remove before the archive is unpacked."""

    def add(self, entry: Entry) -> None:
        kind = _TYPES.get(stat.S_IFMT(entry.mode))
        if kind is None:
            self._losses.add("sockets left out", entry.path)
        elif is_taken(entry.path, self._style):
            self._losses.add("left out, because the name would be taken for a whiteout", entry.path)
        elif self._style == "overlayfs" and kind == tarfile.CHRTYPE and not entry.node.attr.st_rdev:
            self._losses.add("devices 0:0 left out, which would be taken for whiteouts", entry.path)
        elif entry.same_as is not None and (is_taken(entry.same_as, self._style)):
            self._losses.add("hard links left out whose first name was", entry.path)
        else:
            self._add(entry, kind)

    def whiteout(self, path: bytes) -> None:
        place = place_of(path, self._style)
        if self._style == "list":
            self.deleted.append(path)
        elif place is None:
            self._losses.add("deletions left out: the name of the whiteout would be too long", path)
        elif self._style == "overlayfs":
            self._header(_info(place, tarfile.CHRTYPE), {})
        else:
            self._header(_info(place, tarfile.REGTYPE, 0o444), {})

    def close(self) -> None:
        """Write the end of the archive."""
        self._put(bytes(2 * _BLOCK))
        self._put(bytes(-self._written % _RECORD))

    def _put(self, data: bytes) -> None:
        self._written += len(data)
        self._write(data)

    def _add(self, entry: Entry, kind: bytes) -> None:
        attr = entry.node.attr
        link = entry.same_as if entry.same_as is not None else b""
        if kind == tarfile.SYMTYPE and entry.same_as is None:
            link = target_of(entry)
        info = _info(entry.path or b".", kind if entry.same_as is None else tarfile.LNKTYPE)
        info.mode, info.uid, info.gid = stat.S_IMODE(entry.mode), attr.st_uid, attr.st_gid
        info.linkname = link.decode("latin-1")
        info.mtime = entry.mtime_ns // _SECOND
        if kind in {tarfile.CHRTYPE, tarfile.BLKTYPE}:
            info.devmajor, info.devminor = _device(attr.st_rdev)
        records = self._records(entry)
        if kind != tarfile.REGTYPE or entry.same_as is not None:
            self._header(info, records)
            return
        with opened(entry) as file:
            runs = data_runs(file, entry.size)
            missing = entry.size - sum(stop - start for start, stop in runs)
            if self._sparse and missing >= _SPARSE_FROM:
                head = _sparse_map(runs, entry.size)
                info.size = len(head) + entry.size - missing
                records |= _sparse_records(entry)
                info.name = "GNUSparseFile.0/" + info.name.rpartition("/")[2][:80]
            else:
                head, info.size, runs = b"", entry.size, [(0, entry.size)] if entry.size else []
            self._header(info, records, name=entry.path)
            self._put(head)
            copy(entry, file, runs, lambda data, _: self._put(data), self._losses, self._tick)
        self._put(bytes(-info.size % _BLOCK))

    def _records(self, entry: Entry) -> dict[bytes, bytes]:
        """Return the pax records of an entry: what its ustar header cannot store."""
        nanoseconds = entry.mtime_ns % _SECOND
        if self._gnu:
            if nanoseconds:
                self._losses.add("times rounded to seconds", entry.path, exact=False)
            if entry.xattrs:
                self._losses.add("files without their extended attributes", entry.path)
            return {}
        records = {}
        lost = set()
        if nanoseconds or not 0 <= entry.mtime_ns // _SECOND < _TIME:
            records[b"mtime"] = _time(entry.mtime_ns)
        for name, value in entry.xattrs.items():
            if self._accepts(name, value):
                acl = to_text(value) if name in _ACLS else None
                if acl is not None:
                    records[_ACLS[name]] = acl
                stored = _OVERLAYFS.stored(name) if self._style == "overlayfs" else name
                records[b"SCHILY.xattr." + stored.replace(b"%", b"%25").replace(b"=", b"%3D")] = value
            else:
                what = "some extended attributes" if value else "empty extended attributes"
                what = "ACLs" if name.startswith(b"system.posix_acl") else what
                lost.add(f"files without their {what}")
        for what in sorted(lost):  # a directory may have two ACLs
            self._losses.add(what, entry.path)
        return records

    def _header(self, info: tarfile.TarInfo, records: dict[bytes, bytes], name: bytes | None = None) -> None:
        if self._gnu:
            self._put(info.tobuf(tarfile.GNU_FORMAT, "latin-1"))
            return
        is_sparse = b"GNU.sparse.major" in records
        path = name if name is not None and not is_sparse else info.name.encode("latin-1")
        link = info.linkname.encode("latin-1")
        if info.isdir() and not path.endswith(b"/"):
            path += b"/"
        more: dict[bytes, bytes] = {}
        if len(path) > _NAME or not path.isascii():
            more[b"path"] = path
            info.name = path[: _NAME - 1].decode("latin-1").rstrip("/")
        if len(link) > _NAME or not link.isascii():
            more[b"linkpath"] = link
            info.linkname = link[:_NAME].decode("latin-1")
        if info.size >= _SIZE:
            more[b"size"] = b"%d" % info.size
        for key in ("uid", "gid"):
            if getattr(info, key) >= _ID:
                more[key.encode()] = b"%d" % getattr(info, key)
                setattr(info, key, 0)
        records = more | records
        if records:
            body = b"".join(_record(key, value) for key, value in records.items())
            head = _info(b"././@PaxHeader", tarfile.XHDTYPE)
            head.size = len(body)
            self._put(head.tobuf(tarfile.USTAR_FORMAT, "latin-1"))
            self._put(body + bytes(-len(body) % _BLOCK))
        info.mtime = min(max(int(info.mtime), 0), _TIME - 1)
        size, info.size = info.size, min(info.size, _SIZE - 1)
        self._put(info.tobuf(tarfile.USTAR_FORMAT, "latin-1"))
        info.size = size


def _info(path: bytes, kind: bytes, mode: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(path.decode("latin-1"))
    info.type, info.mode = kind, mode
    return info


def _device(number: int) -> tuple[int, int]:
    return os.major(number), os.minor(number)


def _time(ns: int) -> bytes:
    sign, ns = ("-", -ns) if ns < 0 else ("", ns)
    return f"{sign}{ns // _SECOND}.{ns % _SECOND:09d}".rstrip("0").rstrip(".").encode()


def _record(key: bytes, value: bytes) -> bytes:
    """Return a pax record. Its length includes the digits of the length."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def _sparse_map(runs: list[tuple[int, int]], size: int) -> bytes:
    entries = [(start, stop - start) for start, stop in runs]
    if not runs or runs[-1][1] < size:
        entries.append((size, 0))
    text = b"%d\n" % len(entries) + b"".join(b"%d\n%d\n" % entry for entry in entries)
    return text + bytes(-len(text) % _BLOCK)


def _sparse_records(entry: Entry) -> dict[bytes, bytes]:
    numbers = {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0"}
    return {**numbers, b"GNU.sparse.name": entry.path, b"GNU.sparse.realsize": b"%d" % entry.size}
