"""`cowfs run --root` by an ordinary user: what they may change, and installing packages."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from perf import debian
from tests.boot.images import BUSYBOX
from tests.mount.test_sandbox import FAILED, made, with_programs
from tests.support.commits import one_run_at_a_time  # noqa: F401 - a fixture for all
from tests.support.mounts import COWFS, cowfs, project_root
from tests.support.system import as_nobody_prefix, makes_user_namespaces, needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True
pytestmark = [needs_fuse, needs_root]


def made_for_a_user(root: Path) -> tuple[Path, list[Path]]:
    """Make a directory of nobody's, with owners, ACLs and names of others; return it and two with ACLs."""
    own = root / "own"
    own.mkdir()
    (own / "group").write_text("1\n")
    (own / "group").chmod(0o664)
    (root / "log").write_text("1\n")
    (root / "other").mkdir()
    (root / "other/two").write_text("names\n")
    (root / "secret").mkdir(0o700)  # who looks for names of an inode comes here before there
    (own / "first").write_text("1\n")
    (own / "second").hardlink_to(own / "first")
    (root / "secret/third").hardlink_to(own / "first")  # so it is looked for everywhere
    for path in (own, own / "first", own / "group", root / "log", root / "other", root / "other/two"):
        os.chown(path, 65534, {"group": 4, "first": 65534}.get(path.name, -1))
    (own / "old").mkdir()
    (own / "old/in").write_text("1\n")
    for path in (own / "old", own / "old/in"):
        os.chown(path, 65534, 4)
    for name, owner in (("small", (65534, 4)), ("roots", (0, 0))):
        (own / name).write_text("1\n")
        os.chown(own / name, *owner)
    with_acls = [own / "group", root / "log"]
    (own / "open").write_text("to 7\n")
    os.chown(own / "open", 65534, 65534)
    run("setfacl", "-m", "u:7:rw,u:65534:r", *with_acls, own / "open")
    return own, with_acls


def must_have_the_real_owners(kept: Path, before: Path, acl_of_log: list[str]) -> None:
    """The store of a refused commit lists no owner as changed, and is applied with the real owners."""
    for nobody in (True, False):
        listed = cowfs("diff", kept, nobody=nobody, check=True).stdout
        assert "owner" not in listed  # in the namespace 65534 is 0, and 0 is nobody
        for line in ("D  file", "A  new", "A  own/d/new", "M  log  (content, times)"):
            assert line in listed.splitlines(), listed
    why = cowfs("explain", kept, "log", nobody=True, check=True).stdout
    assert "changed in content, times;" in why
    copied = before.with_name("copied")
    run("cp", "-a", before, copied)
    cowfs("apply", "--trust", kept, copied, check=True)
    owners = {
        name: (copied / name).stat()
        for name in ("new", "log", "own/d/new", "own/group", "own/renamed/in", "own/renamed-small")
    }
    assert [(info.st_uid, info.st_gid) for info in owners.values()] == [
        (65534, 65534), (65534, 0), (65534, 65534), (65534, 4), (65534, 4), (65534, 4),
    ]  # fmt: skip
    assert of_others(copied / "log") == acl_of_log


def test_an_ordinary_user_commits_what_they_may_change(nobody_path: Path) -> None:
    if not makes_user_namespaces():
        pytest.skip("needs user namespaces")
    env = {"XDG_STATE_HOME": str(nobody_path)}
    root = made(nobody_path / "root")
    own, with_acls = made_for_a_user(root)
    acls = [of_others(path) for path in with_acls]
    script = """
    cd own; mkdir d; echo 2 >d/new; ln ../other/two .; echo 2 >>group; chmod 600 group; echo 2 >>../log
    echo 2 >>first; mv small renamed-small; mv roots renamed-roots; setfacl -b open
    id -u; cat "$APT_CONFIG"; python3 -c 'import pty; pty.openpty()'
    """
    run("cp", "-a", root, nobody_path / "before")
    with with_programs(root):
        command = ("run", "--root", root, "--commit", "--", "sh", "-euc")
        (own / "theirs/sub").mkdir(parents=True)
        (own / "theirs/sub/file").write_text("root's")
        change = f"{script}rm ../file; echo >../new; rm -r theirs; mv old renamed"
        refused = cowfs(*command, change, nobody=True, env=env)
        assert refused.returncode == FAILED
        assert (own / "theirs/sub/file").exists()
        assert not (own / "d").exists()
        for name in ("file", "new", "own/theirs"):
            assert f"conflict: {name} may not be changed by you\n" in refused.stderr
        kept = next((nobody_path / "cowfs/kept").iterdir())
        must_have_the_real_owners(kept, nobody_path / "before", acls[1])
        done = cowfs(*command, script, nobody=True, env=env)
    assert (done.returncode, done.stdout) == (0, '0\nAPT::Sandbox::User "root";\n'), done.stderr
    assert (own / "d/new").stat().st_uid == 65534
    renamed = [(own / name).stat() for name in ("renamed-small", "renamed-roots")]
    assert [(info.st_uid, info.st_gid) for info in renamed] == [(65534, 4), (0, 0)]
    with with_programs(root):  # a store in a directory can have no such ACL
        in_directory = ("run", "--store", nobody_path / "directory", *command[1:])
        done = cowfs(*in_directory, "echo 3 >>own/group", nobody=True, env=env)
    assert done.returncode == 0, done.stderr
    assert [of_others(path) for path in (*with_acls, own / "open")] == [
        *acls,
        [],
    ]  # 7 has no number in the namespace
    assert (own / "two").stat().st_ino == (root / "other/two").stat().st_ino
    assert [(own / name).read_text() for name in ("first", "second")] == ["1\n2\n"] * 2
    assert (own / "first").samefile(own / "second") and (root / "secret/third").read_text() == "1\n"
    info = (own / "group").stat()
    assert (info.st_uid, info.st_gid, info.st_mode & 0o777) == (65534, 4, 0o600)
    assert [(own / "group").read_text(), (root / "log").read_text()] == ["1\n2\n3\n", "1\n2\n"]


@pytest.mark.usefixtures("many")
def test_with_subordinate_users_the_owners_of_others_stay(nobody_path: Path) -> None:
    """One of them has the number in the namespace that the kernel also shows for owners without a number."""
    if not makes_user_namespaces():
        pytest.skip("needs user namespaces")
    root, kept, copied = made(nobody_path / "root"), nobody_path / "kept", nobody_path / "copied"
    own = root / "own"
    own.mkdir()
    for name, owner in {"log": (65534, 4), "group": (65534, 4), "roots": (0, 0), ".": (65534, 65534)}.items():
        if name != ".":
            (own / name).write_text("1\n")
        os.chown(own / name, *owner)
    run("cp", "-a", root, copied)
    script = "cd own; echo 2 >>log; mv group g; mv roots r; echo 3 >new; chown 65534:7 new"
    with with_programs(root):
        for where in (("--keep", kept), ("--commit",)):
            command = ("run", "--root", root, *where, "--", "sh", "-euc", script)
            done = cowfs(*command, nobody=True, env={"XDG_STATE_HOME": str(nobody_path)})
            assert done.returncode == 0, done.stderr
            if kept in where:
                cowfs("apply", "--trust", kept, copied, check=True)
    for top in (root, copied):
        found = {name: (top / "own" / name).stat() for name in ("log", "g", "r", "new")}
        assert {name: (info.st_uid, info.st_gid) for name, info in found.items()} == {
            "log": (65534, 4), "g": (65534, 4), "r": (0, 0), "new": (165533, 100006),
        }  # fmt: skip
        assert (top / "own/log").read_text() == "1\n2\n"


@pytest.mark.usefixtures("many")
def test_a_store_with_files_of_subordinate_users_says_who_may_read_it(nobody_path: Path) -> None:
    if not makes_user_namespaces():
        pytest.skip("needs user namespaces")
    root, kept = made(nobody_path / "root"), nobody_path / "kept"
    script = "mkdir -m 700 private; touch private/file; chown 7:7 private"
    with with_programs(root):
        done = cowfs("run", "--root", root, "--store", kept, "--", "sh", "-euc", script, nobody=True)
        assert done.returncode == 0, done.stderr
    done = cowfs("diff", kept, nobody=True)
    advice = "run this with their rights: unshare --map-root-user --map-auto cowfs ..."
    assert done.returncode and done.stderr == (
        f"cowfs: {kept}: has files of subordinate users, which you may not read ({advice})\n"
    )
    with_their_rights = (*as_nobody_prefix(), "unshare", "--map-root-user", "--map-auto", *COWFS)
    assert "A  private/file\n" in run(*with_their_rights, "diff", kept).stdout


def of_others(path: Path) -> list[str]:
    """The entries of an ACL that name somebody."""
    return [
        line for line in run("getfacl", "-cEn", path).stdout.splitlines() if re.match("[ug][^:]*:[0-9]", line)
    ]


@pytest.mark.skipif(not BUSYBOX.exists(), reason="needs busybox-static")
def test_a_root_needs_nothing_of_ours(nobody_path: Path) -> None:
    """Not even libseccomp, which makes chown(2) succeed for who has no subordinate users."""
    if not makes_user_namespaces():
        pytest.skip("needs user namespaces")
    root = nobody_path / "root"
    (root / "etc").mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "busybox")
    script = "/busybox touch /etc/new; /busybox chown 5:5 /etc/new; /busybox id -u"
    command = (
        "run",
        "--root",
        root,
        "-o",
        "fakeroot",
        "--keep",
        nobody_path / "kept",
        "--",
        "/busybox",
        "sh",
    )
    done = cowfs(*command, "-c", script, nobody=True)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
    missing = cowfs("run", "--root", root, "--discard", "--", "/none", nobody=True)
    assert missing.returncode == 127 and "No such file or directory" in missing.stderr, missing


INSTALL = r"""
export DEBIAN_FRONTEND=noninteractive
apt-get -qq install -y /srv/packages/bash-completion*.deb /srv/packages/publicsuffix*.deb >/dev/null
dpkg -s bash-completion | grep ^Status
dpkg -i /srv/packages/wamerican*.deb >/dev/null && look zymurg || wc -l </usr/share/dict/words
pip install -q --no-index --break-system-packages --root-user-action ignore /srv/sample-1.0-py3-none-any.whl
python3 -c 'import sample.m7; print(sample.m7.number)'
cd /srv/c && make -s && install -D -o root -g 42 -m 2755 program /usr/local/bin/sum && sum
stat -c %a /usr/local/bin/sum
"""


@pytest.mark.nightly
def test_an_ordinary_user_installs_packages(nobody_path: Path) -> None:
    """apt-get, dpkg, pip and install(1) in a Debian, with nobody there but root."""
    if not makes_user_namespaces():
        pytest.skip("needs user namespaces")
    if missing := debian.missing_requirements():
        pytest.skip(missing)
    cache = Path(project_root(), ".cache/perf")
    cache.mkdir(parents=True, exist_ok=True)
    image = Path(shutil.copy(debian.make(cache), nobody_path))
    image.chmod(0o644)
    command = ("run", "--root", image, "--store", nobody_path / "store", "--", "sh", "-euc")
    done = cowfs(*command, INSTALL, nobody=True, timeout=110)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()
    assert (shown[0], shown[2:]) == ("Status: install ok installed", ["7", "780", "2755"])
    listed = cowfs("diff", nobody_path / "store", "--name-only", nobody=True).stdout.splitlines()
    assert {"usr/local/bin/sum", "usr/share/dict/american-english"} <= set(listed)
