"""UpperLayer.copy_in: files and directories that appear complete, in one step."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import replace

import pytest

from cowfs.layers.base import UpperLayer, takes_whole
from cowfs.types import AttrData
from tests.contract.test_upper import fails
from tests.ext3.operations import ACL


def test_copy_in(upper: UpperLayer) -> None:
    """All attributes are set at once, whatever the directory's ACL is, and no temporary name is visible."""
    if not takes_whole(upper):
        pytest.skip("this layer makes no copies in one step")
    folder = upper.mkdir(upper.root, b"d", 0o755, 5, 6)
    upper.chmod(folder, 0o2755)
    upper.setxattr(folder, b"system.posix_acl_default", ACL)
    upper.utimens(folder, 10**9, 2 * 10**9)
    attr = AttrData(
        stat.S_IFREG | 0o4751, 0, 0, 1, 70_000, 80_000, 0, 5000, st_atime_ns=10**9, st_mtime_ns=-(10**9)
    )
    xattrs = [(b"user.a", b""), (b"trusted.b", bytes(100))]
    data = os.urandom(70_001)
    key = upper.copy_in(folder, b"name", attr, data, xattrs)
    found = upper.lookup(folder, b"name")
    assert found is not None and found[0] == key
    seen, above = found[1], upper.stat(folder)
    wanted = (attr.st_mode, 70_000, 80_000, 1, len(data))
    assert (seen.st_mode, seen.st_uid, seen.st_gid, seen.st_nlink, seen.st_size) == wanted
    assert (seen.st_atime_ns, seen.st_mtime_ns) == (10**9, -(10**9))
    assert {name: upper.getxattr(key, name) for name in upper.listxattr(key)} == dict(xattrs)
    assert (above.st_atime_ns, above.st_mtime_ns) == (10**9, 2 * 10**9)
    file = upper.open(key, os.O_RDONLY)
    assert file.pread(len(data) + 1, 0) == data
    file.close()
    hole = upper.copy_in(folder, b"hole", attr, None, xattrs)
    inside = upper.copy_in(folder, b"inside", replace(attr, st_mode=stat.S_IFDIR | 0o1750), None, xattrs)
    assert (upper.stat(hole).st_size, upper.stat(hole).st_mode) == (attr.st_size, attr.st_mode)
    seen, above = upper.stat(inside), upper.stat(folder)
    assert (seen.st_mode, seen.st_nlink, seen.st_uid, seen.st_mtime_ns) == (0o41750, 2, 70_000, -(10**9))
    assert (above.st_nlink, above.st_mtime_ns) == (3, 2 * 10**9)
    file = upper.open(hole, os.O_RDONLY)
    assert (list(file.segments(attr.st_size)), file.pread(10, 0)) == ([], bytes(10))
    file.close()
    upper.mkdir(inside, b"more", 0o700, 1, 2)
    assert [entry.name for entry in upper.readdir(inside)] == [b"more"]
    upper.rmdir(inside, b"more", None)
    upper.rmdir(folder, b"inside", inside)
    upper.unlink(folder, b"hole", hole)
    with fails(errno.EEXIST):
        upper.copy_in(folder, b"name", attr, b"", [])
    with fails(errno.ENAMETOOLONG):
        upper.copy_in(folder, b"n" * 256, attr, b"", [])
    with fails(errno.EOPNOTSUPP):
        upper.copy_in(folder, b"other", attr, data, [(b"unknown.x", b"")])
    assert [entry.name for entry in upper.readdir(folder)] == [b"name"]
