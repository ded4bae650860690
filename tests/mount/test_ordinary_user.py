"""A user's union on a directory does what the kernel's overlayfs does for the root of a user namespace."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.mounts import cowfs, mounted
from tests.support.system import as_nobody_prefix, makes_user_namespaces, needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True
pytestmark = [needs_fuse, needs_root]

_TREE = r"""
mkdir -p a zero/dir/deep whole
for n in 1 2 3 4 5 6; do
    ln -s target$n a/link$n
    mkfifo a/fifo$n
    echo $n >a/file$n
done
perl -MSocket -e 'for (1..6) { socket S, PF_UNIX, SOCK_STREAM, 0; bind S, sockaddr_un("a/socket$_") or die }'
cp -al a b
echo zero >zero/file && echo deep >zero/dir/deep/file && setfattr -n user.mine -v value zero/file
chmod 000 zero/file zero/dir/deep zero/dir whole
"""

_LINKS = r"""
for kind in link fifo socket file; do
    rm a/${kind}1
    mv a/${kind}2 moved-${kind}
    ln b/${kind}3 third-${kind}
    touch -hd '2001-02-03 04:05:06 UTC' b/${kind}4
    chown -h "$(id -u):$(id -g)" a/${kind}5
    [ $kind = link ] || chmod 611 a/${kind}5 b/${kind}5 # the kernel has broken the link
    echo "replaced" >b/new && mv b/new b/${kind}6
done
"""

_MODES = r"""
chmod 755 zero/file zero/dir
cat zero/file
getfattr --only-values -n user.mine zero/file
echo more >>zero/file
chmod u+rwx zero/dir/deep
cat zero/dir/deep/file
mv whole moved && chmod 700 moved && rmdir moved
rm -rf zero/dir
"""

_SHOW = "find . -printf '%P %y %m %s %l\n' | LC_ALL=C sort; cat b/file* a/file* 2>/dev/null"


@pytest.fixture
def base(nobody_path: Path) -> Path:
    """A directory of nobody's with the tree in it."""
    run(*as_nobody_prefix(), "mkdir", *(nobody_path / name for name in ("lower", "upper", "work", "mnt")))
    run(*as_nobody_prefix(), "sh", "-ec", _TREE, cwd=nobody_path / "lower")
    return nobody_path


@pytest.fixture
def by_kernel(base: Path) -> dict[str, str]:
    """What the kernel's overlayfs makes of each script."""
    if not makes_user_namespaces():
        pytest.skip("needs user namespaces")
    options = "userxattr,lowerdir=lower,upperdir=upper,workdir=work"
    there = f"mount -t overlay overlay -o {options} mnt && cd mnt"
    script = f"{there} && {{ {_LINKS}{_MODES}\n}} >/dev/null && {_SHOW}"
    shown = run(*as_nobody_prefix(), "unshare", "-Urm", "sh", "-ec", script, cwd=base)
    return {"shown": shown.stdout}


@pytest.mark.parametrize("options", [[], ["fakeroot"]], ids=["user", "fakeroot"])
def test_everything_that_the_kernel_does(base: Path, by_kernel: dict[str, str], options: list[str]) -> None:
    lower = run("find", base / "lower", "-printf", "%P %m %n %s %T@\n").stdout
    with mounted(base / "lower", base / "mnt", base / "store", nobody=True, options=options):
        run(*as_nobody_prefix(), "sh", "-ec", f"cd {base / 'mnt'}{_LINKS}{_MODES}")
    with mounted(base / "lower", base / "mnt", base / "store", nobody=True, options=options):
        shown = run(*as_nobody_prefix(), "sh", "-c", f"cd {base / 'mnt'} && {_SHOW}")
        assert shown.stdout == by_kernel["shown"]
    assert cowfs("check", base / "store", nobody=True).returncode == 0
    assert run("find", base / "lower", "-printf", "%P %m %n %s %T@\n").stdout == lower, (
        "the lower is as it was"
    )


@pytest.mark.parametrize("kind", ["link", "fifo", "socket", "file"])
def test_they_stay_hard_links(base: Path, kind: str) -> None:
    """As the kernel's with index=on, after a remount too, and the last name takes all that is left of it."""

    def facts() -> list[tuple[int, int, int]]:
        names = [base / "mnt" / name for name in (f"a/{kind}4", f"b/{kind}4", f"c/{kind}4")]
        shown = run(*as_nobody_prefix(), "stat", "-c", "%i %h %Y", *names)
        return [tuple(map(int, line.split())) for line in shown.stdout.splitlines()]  # type: ignore[misc]

    store = base / "store"
    with mounted(base / "lower", base / "mnt", store, nobody=True):
        run(*as_nobody_prefix(), "mkdir", base / "mnt" / "c")
        run(*as_nobody_prefix(), "ln", base / "mnt" / "a" / f"{kind}4", base / "mnt" / "c")
        run(*as_nobody_prefix(), "touch", "-hd", "@1000", base / "mnt" / "b" / f"{kind}4")
        before = facts()
        assert len(set(before)) == 1
        assert before[0][1:] == (3, 1000)
    with mounted(base / "lower", base / "mnt", store, nobody=True):
        assert facts() == before
        for place in "abc":
            run(*as_nobody_prefix(), "rm", base / "mnt" / place / f"{kind}4")
        left = [*os.listdir(store / "cowfs" / "links"), *os.listdir(store / "work" / "index")]
        assert left == []


def test_what_has_several_names_can_be_given_away_by_fakeroot(base: Path) -> None:
    with mounted(base / "lower", base / "mnt", base / "store", nobody=True, options=["fakeroot"]):
        at = base / "mnt"
        run(*as_nobody_prefix(), "chown", "-h", "1:2", at / "a" / "link4", at / "a" / "fifo4")
        names = [at / "b" / "link4", at / "b" / "fifo4"]
        shown = run(*as_nobody_prefix(), "stat", "-c", "%u:%g %h %F", *names).stdout.splitlines()
        assert shown == ["1:2 2 symbolic link", "1:2 2 fifo"]
