"""Users do not see the names of attributes that they may not read."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.support.mounts import mounted
from tests.support.setid import CAPABILITY
from tests.support.system import NOBODY, as_nobody_prefix, makes_user_namespaces, needs_fuse, needs_root, run

pytestmark = [needs_fuse, needs_root]

_WHAT_ONE_MAY = """
import os, sys
path = sys.argv[1]
print(sorted(name for name in os.listxattr(path) if name != "system.posix_acl_access"))
for call, more in (os.getxattr, ()), (os.setxattr, (b"y",)), (os.removexattr, ()):
    for name in "trusted.secret", "security.capability", "user.plain":
        try:
            call(path, name, *more)
            print(name, "done")
        except OSError as error:
            print(name, error.strerror)
"""
CALLERS = {
    "root": [],
    "a user": as_nobody_prefix(),
    "root without CAP_SYS_ADMIN": ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-all"],
    "a user with CAP_SYS_ADMIN": [
        "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
        "--inh-caps=+sys_admin", "--ambient-caps=+sys_admin",
    ],
    "root of a user namespace of root's": ["unshare", "--user", "--map-root-user"],
    "root of a user namespace": [*as_nobody_prefix(), "unshare", "--user", "--map-root-user"],
}  # fmt: skip


@pytest.mark.parametrize("who", CALLERS)
def test_trusted_names_are_for_who_may_read_them(nobody_path: Path, who: str) -> None:
    """In the lower and in the store, everybody sees the other names, as on the filesystem of the lower."""
    if "--user" in CALLERS[who] and not makes_user_namespaces():
        pytest.skip("no namespace of users can be made here")
    lower = nobody_path / "lower"
    lower.mkdir()
    paths = [lower / name for name in ("below", "above", "plain")]
    for path in paths:
        path.write_bytes(b"content")
        os.chown(path, NOBODY, NOBODY)
        os.setxattr(path, "trusted.secret", b"x")
        os.setxattr(path, "security.capability", CAPABILITY)
        os.setxattr(path, "user.plain", b"y")

    def seen(path: Path) -> list[str]:
        done = run(*CALLERS[who], sys.executable, "-c", _WHAT_ONE_MAY, path, check=False)
        assert done.stdout.count("\n") == 10, done.stderr
        return done.stdout.splitlines()

    with mounted(lower, nobody_path / "mnt", nobody_path / "store", options=["allow_other"]) as here:
        (here.path / "above").chmod(0o600)
        (here.path / "above").chmod(0o644)
        there = {name: seen(here.path / name) for name in ("below", "above")}
    on_disk = seen(lower / "plain")
    assert there == {"below": on_disk, "above": on_disk}
    assert ("trusted.secret" in on_disk[0]) == (who in {"root", "a user with CAP_SYS_ADMIN"})
