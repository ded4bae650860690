"""`-o fakeroot`: a user who is root inside, for a whole system, tar, chown and dpkg; also after a remount."""

from __future__ import annotations

import errno
import io
import os
import shutil
import stat
import struct
import tarfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path

import pytest

from cowfs.layers.directory import DirectoryLayer
from tests.support import tree
from tests.support.mounts import Mounted, cowfs, is_mounted, mounted
from tests.support.squashfs import mksquashfs, needs_mksquashfs
from tests.support.system import NOBODY, as_nobody_prefix, needs_fuse, needs_root, run
from tests.support.tree import Node

DEV_FUSE_AT_NIGHT = True

pytestmark = [needs_fuse, needs_mksquashfs]

SYSTEM = (  # for mksquashfs -p: a system's tree with owners, modes and devices, without privilege
    "etc d 755 0 0",
    "etc/shadow f 640 0 42 echo secret",
    "etc/gshadow f 0 0 42 echo nobody reads this",
    "bin d 755 0 0",
    "bin/su f 4755 0 0 echo su",
    "bin/sh s 777 0 0 su",
    "dev d 755 0 0",
    "dev/null c 666 0 0 1 3",
    "dev/sda b 660 0 6 8 0",
    "dev/initctl i 600 0 0 f",
    "root d 700 0 0",
    "root/notes f 600 0 0 echo notes",
    "home d 755 0 0",
    "home/user d 700 1000 1000",
    "home/user/mail f 600 1000 8 echo mail",
    "home/user/link s 777 1000 1000 mail",
    "tmp d 1777 0 0",
    "tmp/old f 600 1000 1000 echo old",
    "staff d 2775 0 50",
    "var d 755 0 0",
    "var/lib d 755 0 0",
    "var/lib/dpkg d 755 0 0",
    "var/lib/dpkg/info d 755 0 0",
    "var/lib/dpkg/updates d 755 0 0",
    "var/lib/dpkg/status f 644 0 0 true",
)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A system's root."""
    place = tmp_path_factory.mktemp("system")
    (place / "empty").mkdir()
    made = [part for line in SYSTEM for part in ("-p", line)]
    return mksquashfs(place / "root.squashfs", place / "empty", options=tuple(made))


@pytest.fixture
def base(image: Path, nobody_path: Path) -> Path:
    """A place of nobody's with the image in it."""
    shutil.copy(image, nobody_path / "root.squashfs")
    os.chmod(nobody_path / "root.squashfs", 0o644)
    return nobody_path


@pytest.fixture(params=["directory", "image"])
def any_base(request: pytest.FixtureRequest, base: Path) -> Path:
    """The same with each kind of store: nothing in it yet, or an image that is called ``store``, too."""
    if request.param == "image":
        pytest.importorskip(
            "cowfs.formats.ext3._engine", reason="needs the engine: libext2fs-dev to build it"
        )
        cowfs("create", base / "store", "16", nobody=True, check=True)
    return base


def fakeroot(base: Path, *more: str) -> AbstractContextManager[Mounted]:
    """Mount the system with it, as nobody."""
    return mounted(
        base / "root.squashfs", base / "mnt", base / "store", options=["fakeroot", *more], nobody=True
    )


def shell(mount: Mounted, command: str, *, check: bool = True) -> str:
    """Run a command in the root of a mount as nobody; its output and errors."""
    done = run(
        *as_nobody_prefix(), "sh", "-euc", f'exec 2>&1; cd "$1"; {command}', "sh", mount.path, check=check
    )
    return done.stdout


def shown(mount: Mounted, *paths: str) -> list[str]:
    """Type, mode, owner and device of paths."""
    return shell(mount, f"stat -c '%F %a %u:%g %t:%T' {' '.join(paths)}").splitlines()


def whole(mount: Mounted) -> list[str]:
    """Everything that stat shows of everything, but inode numbers and the times of directories."""
    script = (
        "find . -printf '%p %y %m %U:%G %n %l' -a \\( -type d -printf '\\n' -o -printf ' %s %T@\\n' \\);"
        "find . -type c -exec stat -c '%n %t:%T' {} + ; find . -type b -exec stat -c '%n %t:%T' {} +"
    )
    return sorted(shell(mount, script).splitlines())


def test_all_owners_are_shown_and_nothing_is_denied(base: Path) -> None:
    with fakeroot(base) as mount:
        assert shown(mount, "etc/shadow", "dev/sda", "home/user", "tmp") == [
            "regular file 640 0:42 0:0",
            "block special file 660 0:6 8:0",
            "directory 700 1000:1000 0:0",
            "directory 1777 0:0 0:0",
        ]
        assert shell(mount, "cat etc/shadow etc/gshadow root/notes home/user/mail") == (
            "secret\nnobody reads this\nnotes\nmail\n"
        )
        shell(mount, "echo more >> etc/gshadow; rm tmp/old; mv home/user root/; rm -r var/lib/dpkg/updates")
        shell(mount, "test -w etc/shadow; test ! -x etc/shadow; test -x bin/su; test -x root")
        assert "fakeroot" in cowfs("info", "--json", mount.path, nobody=True).stdout


def test_new_files_belong_to_root(base: Path) -> None:
    with fakeroot(base) as mount:
        shell(mount, "umask 027; touch f; mkdir d; ln -s f s; mkfifo p; touch staff/f; mkdir staff/d")
        assert shown(mount, "f", "d", "s", "p", "staff/f", "staff/d") == [
            "regular empty file 640 0:0 0:0",
            "directory 750 0:0 0:0",
            "symbolic link 777 0:0 0:0",
            "fifo 640 0:0 0:0",
            "regular empty file 640 0:50 0:0",
            "directory 2750 0:50 0:0",
        ]
    # Nothing needs a note or a stand-in, and the kernel's overlayfs in a user namespace shows the same.
    upper = base / "store/upper"
    assert os.readlink(upper / "s") == "f" and stat.S_ISFIFO(os.stat(upper / "p").st_mode)
    for name in ("f", "d"):
        assert "user.overlay.cowfs.owner" not in os.listxattr(upper / name)


CHANGE = """
chown 1000:1001 bin/su; chown -h 7:8 bin/sh; chown 9:10 dev/sda dev/initctl; chmod 600 dev/null
touch new; ln new hard; chown 2000 new; chmod 4711 new; mkdir shut; touch shut/file; chown 3:3 shut shut/file
chmod 000 shut/file shut; ln -s x symbolic; chown -h 65534:65534 symbolic; mkfifo pipe; chown 5:6 pipe
chmod 0 etc; chmod 1777 etc; chmod 0444 root/notes; echo x >> root/notes; mv dev/null dev/zero
touch mine; chown 65534:65534 mine; touch -d @1000 -h bin/sh
"""


def test_all_is_the_same_after_a_remount(any_base: Path) -> None:
    """Also in a mount without fakeroot, which checks permissions, and in what diff says of the store."""
    with fakeroot(any_base) as mount:
        shell(mount, CHANGE)
        before = whole(mount)
        assert shown(
            mount, "new", "shut", "shut/file", "symbolic", "bin/sh", "dev/sda", "dev/zero", "mine"
        ) == [
            "regular empty file 4711 2000:0 0:0",
            "directory 0 3:3 0:0",
            "regular empty file 0 3:3 0:0",
            "symbolic link 777 65534:65534 0:0",
            "symbolic link 777 7:8 0:0",
            "block special file 660 9:10 8:0",
            "character special file 600 0:0 1:3",
            "regular empty file 644 65534:65534 0:0",
        ]
        live = cowfs("diff", mount.path, nobody=True, check=True).stdout
    assert "M  dev/sda  (owner)" in live and "M  bin/su  (mode, owner)" in live and "A  symbolic" in live
    offline = cowfs("diff", any_base / "store", nobody=True, check=True)
    assert offline.stdout == live
    assert cowfs("check", "-n", any_base / "store", nobody=True).returncode == 0
    with fakeroot(any_base) as mount:
        assert whole(mount) == before
        shell(mount, "chown -R 0:0 shut symbolic dev pipe; chmod 755 shut")
        assert shown(mount, "shut/file", "symbolic", "dev/sda", "pipe") == [
            "regular empty file 0 0:0 0:0",
            "symbolic link 777 0:0 0:0",
            "block special file 660 0:0 8:0",
            "fifo 644 0:0 0:0",
        ]
        assert shell(mount, "readlink symbolic bin/sh; cat root/notes") == "x\nsu\nnotes\nx\n"
        before = whole(mount)
    with mounted(any_base / "root.squashfs", any_base / "mnt", any_base / "store", nobody=True) as mount:
        refused = shell(mount, "cat shut/file", check=False)
        assert "Permission denied" in refused
        visible = "find . -maxdepth 1 -printf '%p %y %m %U:%G %l\\n' | sort"
        there = shell(mount, visible)
        shell(mount, "touch bin/mine", check=False)
    with fakeroot(any_base) as mount:
        assert shell(mount, visible) == there
        assert whole(mount) == before


def test_a_store_that_was_begun_without(base: Path) -> None:
    """Files of the user still belong to the user; new files belong to root."""
    tree.build(base / "lower", {"dir/file": b"x\n"})
    if os.geteuid() == 0:
        run("chown", "-R", f"{NOBODY}:{NOBODY}", base / "lower")
    with mounted(base / "lower", base / "mnt", base / "store", nobody=True) as mount:
        shell(mount, "echo x > mine; ln -s mine link; mkdir closed; chmod 0 closed")
    options = ["fakeroot"]
    with mounted(base / "lower", base / "mnt", base / "store", options=options, nobody=True) as mount:
        shell(mount, "echo x > roots; ln -s roots link2; touch closed/in; mkfifo pipe; chown -h 1:2 link")
        wanted = [
            "regular file 644 65534:65534 0:0",
            "symbolic link 777 1:2 0:0",
            "regular file 644 0:0 0:0",
            "symbolic link 777 0:0 0:0",
            "fifo 644 0:0 0:0",
            "directory 0 65534:65534 0:0",
        ]
        assert shown(mount, "mine", "link", "roots", "link2", "pipe", "closed") == wanted
    with mounted(base / "lower", base / "mnt", base / "store", nobody=True) as mount:
        assert shown(mount, "mine", "link", "roots", "link2", "pipe", "closed") == wanted


def archive() -> bytes:
    """A tar of many owners, modes and types."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for number, mode in enumerate((0o755, 0o644, 0o4755, 0o2755, 0o600, 0o444, 0o000, 0o1777)):
            for kind in (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE):
                entry = tarfile.TarInfo(f"{kind.decode()}-{mode:o}")
                entry.type, entry.mtime = kind, 1_000_000 + number
                entry.mode = 0o777 if kind == tarfile.SYMTYPE else mode
                entry.uid, entry.gid = number * 1000, number * 1000 + 7
                entry.linkname = "to/nowhere" if kind == tarfile.SYMTYPE else ""
                entry.size = 5 if kind == tarfile.REGTYPE else 0
                tar.addfile(entry, io.BytesIO(b"bytes") if entry.size else None)
                if entry.name == "5-0":  # a directory that nobody may enter
                    inside = tarfile.TarInfo("5-0/file")
                    inside.uid, inside.gid, inside.mode = 77, 88, 0
                    tar.addfile(inside)
        again = tarfile.TarInfo("hard")
        again.type, again.linkname = tarfile.LNKTYPE, "0-644"
        again.uid, again.gid, again.mode, again.mtime = 1000, 1007, 0o644, 1_000_001
        tar.addfile(again)
    return out.getvalue()


def test_tar_unpacks_what_root_would(any_base: Path) -> None:
    """``tar -xp``: the same listing comes back out of the mount, also after a remount."""
    (any_base / "a.tar").write_bytes(archive())
    wanted = run("tar", "--numeric-owner", "-tvf", any_base / "a.tar").stdout
    listing = "tar --numeric-owner --no-recursion --exclude=. -c -C un -T names | tar --numeric-owner -tvf -"
    names = "".join(
        line.split(maxsplit=5)[5].split(" -> ")[0].split(" link to ")[0] + "\n"
        for line in wanted.splitlines()
    )
    with fakeroot(any_base) as mount:
        shell(mount, "mkdir un; tar --numeric-owner --same-owner -xpf ../a.tar -C un")
        (any_base / "names").write_text(names)
        shell(mount, "cp ../names names")
        assert shell(mount, listing).replace("un/", "") == wanted
    with fakeroot(any_base) as mount:
        assert shell(mount, listing) == wanted


def test_chown_of_a_whole_tree(any_base: Path) -> None:
    with fakeroot(any_base) as mount:
        shell(mount, "chown -Rh 1234:5678 .")
        owners = shell(mount, "find . -printf '%U:%G\\n' | sort -u")
        assert owners == "1234:5678\n"
        everything = whole(mount)
        assert any(" c 666 1234:5678 " in line for line in everything)
    with fakeroot(any_base) as mount:
        assert whole(mount) == everything


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg")
def test_dpkg_installs_a_package(base: Path, tmp_path: Path) -> None:
    """The package was built offline, with files of several owners; dpkg reports no permission problem."""
    made = base / "hello"
    tree.build(
        made,
        {
            "DEBIAN/control": b"Package: hello\nVersion: 1\nArchitecture: all\n"
            b"Maintainer: nobody <nobody@example.org>\nDescription: a test\n",
            "usr/share/hello/data": b"data\n",
            "usr/bin/hello": Node(data=b"#!/bin/sh\necho hello\n", mode=0o4755),
            "var/spool/hello/x": b"",
        },
    )
    (made / "usr/bin/hallo").symlink_to("hello")
    package = base / "hello.deb"
    run("dpkg-deb", "--root-owner-group", "-b", made, package)
    with fakeroot(base) as mount:
        install = 'PATH=$PATH:/usr/sbin:/sbin dpkg --log=/dev/null --force-not-root --root="$PWD" '
        shell(mount, install + "-i ../hello.deb")
        assert shown(mount, "usr/bin/hello", "usr/bin/hallo", "var/spool/hello") == [
            "regular file 4755 0:0 0:0",
            "symbolic link 777 0:0 0:0",
            "directory 755 0:0 0:0",
        ]
        shell(mount, "chown 13:13 var/spool/hello")
    with fakeroot(base) as mount:
        assert shell(mount, "dpkg-query --admindir=var/lib/dpkg -W hello") == "hello\t1\n"
        assert shown(mount, "var/spool/hello") == ["directory 755 13:13 0:0"]
        found = cowfs("diff", mount.path, nobody=True).stdout
        assert "A  usr/bin/hello\n" in found
        shell(mount, install + "-r hello")
        assert not shell(mount, "ls usr/bin 2>/dev/null || true")


@pytest.mark.skipif(not shutil.which("setfacl"), reason="needs setfacl")
def test_programs_set_acls_on_what_they_make(base: Path) -> None:
    """The kernel leaves that to the owner, root. cp, install and sed do so, and setfacl with any file."""
    with fakeroot(base) as mount:
        said = shell(
            mount,
            "cp -a home/user a; cp -p root/notes p; install -m 750 etc/shadow run; echo 'echo ran' >run;"
            "./run; sed -i s/notes/more/ root/notes; setfacl -m u:7:r etc/shadow; setfacl -d -m u:8:rwx root;"
            "setfacl -m u:9:rwx p; echo 'echo ran' >p; ./p; chmod a-x p; ./p || true; mkdir root/d; wc -l p",
        )
        assert said == "ran\nran\nsh: 1: ./p: Permission denied\n1 p\n"
        wanted = [
            "directory 700 1000:1000 0:0",
            "regular file 600 1000:8 0:0",
            "regular file 600 0:0 0:0",
            "regular file 750 0:0 0:0",
            "regular file 640 0:42 0:0",
            "directory 770 0:0 0:0",
        ]
        paths = "a", "a/mail", "root/notes", "run", "etc/shadow", "root/d"
        assert shown(mount, *paths) == wanted
        acls = shell(mount, "getfacl -n etc/shadow root/d p")
        assert "user:7:r--" in acls and acls.count("user:8:rwx") == 2 and "user:9:rwx" in acls
        # The kernel keeps what it knows of a file when ls looks at it, but not when a program reads its ACL.
        # Now and then ls does not sleep yet when the daemon looks what it asks for.
        names = "bin/su dev/null dev/sda etc/gshadow tmp/old var/lib/dpkg/status"
        shell(mount, f"ls -l {names}")
        known = shell(mount, f"stat --cached=always -c %u {names}").split()
        assert {"0", "1000"} & set(known), "ls made the kernel forget each file"
        shell(mount, f"getfacl {names}")
        assert set(shell(mount, f"stat --cached=always -c %u {names}").split()) == {str(NOBODY)}
    with fakeroot(base) as mount:
        assert shown(mount, *paths) == wanted
        assert shell(mount, "getfacl -n etc/shadow root/d p") == acls


def test_what_the_kernel_refuses_before_it_asks(base: Path) -> None:
    """Devices, trusted.* and security.*, links to set-ID programs: checked before FUSE is reached."""
    with fakeroot(base) as mount:
        assert "Operation not permitted" in shell(mount, "mknod x c 1 3", check=False)
        for name, code in (("trusted.x", errno.EPERM), ("security.x", errno.EPERM), ("user.x", 0)):
            said = shell(mount, f"setfattr -n {name} -v 1 etc || true")
            assert (os.strerror(code) in said) if code else not said
        if Path("/proc/sys/fs/protected_hardlinks").read_text().strip() != "0":
            assert "Operation not permitted" in shell(mount, "ln bin/su bin/again", check=False)
        shell(mount, "setfattr -n user.x -v 1 tmp; getfattr -n user.x tmp")  # root's, and sticky


def test_permissions_are_checked_without_it(base: Path) -> None:
    with mounted(base / "root.squashfs", base / "mnt", base / "store", nobody=True) as mount:
        for command in ("cat etc/shadow", "ls root", "touch bin/new", "chown 1:1 bin/su", "chmod 777 etc"):
            done = run(*as_nobody_prefix(), "sh", "-c", f"cd {mount.path}; {command}", check=False)
            assert done.returncode and ("denied" in done.stderr or "not permitted" in done.stderr), command
        assert shown(mount, "etc/shadow") == ["regular file 640 0:42 0:0"]


def test_suid_and_dev_are_not_to_be_had(base: Path) -> None:
    with fakeroot(base, "suid", "dev") as mount:
        line = next(line for line in Path("/proc/mounts").read_text().splitlines() if str(mount.path) in line)
        assert {"nosuid", "nodev"} <= set(line.split()[3].split(","))
        assert "default_permissions" not in line


@needs_root
def test_nobody_else_is_let_in(base: Path, tmp_path: Path) -> None:
    """No permission is checked inside: with allow_other everybody would be root there."""
    (tmp_path / "fuse.conf").write_text("user_allow_other\n")
    run("mount", "--bind", tmp_path / "fuse.conf", "/etc/fuse.conf")
    try:
        (base / "mnt").mkdir()
        os.chown(base / "mnt", NOBODY, NOBODY)
        for options in ("fakeroot,allow_other", "allow_other,fakeroot"):
            done = cowfs("mount", base / "root.squashfs", base / "mnt", "-o", options, nobody=True)
            assert done.returncode == 1 and done.stderr.count("\n") == 1
            assert "every user would be root in the mount" in done.stderr
            assert not is_mounted(base / "mnt")
    finally:
        run("umount", "/etc/fuse.conf")


@needs_root
def test_root_is_refused(base: Path) -> None:
    (base / "mnt").mkdir()
    done = cowfs("mount", base / "root.squashfs", base / "mnt", "-o", "fakeroot")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "fakeroot is for ordinary users" in done.stderr
    assert not is_mounted(base / "mnt")


@pytest.fixture
def layer(nobody_path: Path) -> Iterator[DirectoryLayer]:
    """A layer as nobody has it, that holds everything."""
    for name in ("tree", "spare"):
        (nobody_path / name).mkdir()
        if os.geteuid() == 0:
            os.chown(nobody_path / name, NOBODY, NOBODY)
    root = os.geteuid() == 0
    if root:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    try:
        made = DirectoryLayer(os.open(nobody_path, os.O_PATH | os.O_DIRECTORY), "layer", privileged=False)
        spare = made.lookup(made.root, b"spare")
        assert spare
        made.act_as_root(spare[0], anew=True)
        yield made
        made.close()
    finally:
        if root:
            os.seteuid(0)
            os.setegid(0)


def test_a_layer_holds_devices(layer: DirectoryLayer, nobody_path: Path) -> None:
    """Devices come by copy-up, and from users who may create them."""
    top = layer.lookup(layer.root, b"tree")
    assert top
    block = layer.mknod(top[0], b"block", stat.S_IFBLK | 0o640, os.makedev(259, 70000), 5, 6)
    char = layer.mknod(top[0], b"char", stat.S_IFCHR | 0o666, os.makedev(1, 3), 0, 0)
    with pytest.raises(FileExistsError):
        layer.mknod(top[0], b"char", stat.S_IFCHR | 0o666, os.makedev(1, 5), 0, 0)
    layer.chown(char, 7, -1)
    layer.chmod(char, 0o600)
    layer.utimens(char, 1, 2)
    layer.rename((top[0], b"char"), (top[0], b"other"), moved=char)
    found = layer.lookup(top[0], b"other")
    assert found and layer.stat(char) == found[1]
    attr = layer.stat(block)
    assert (attr.st_mode, attr.st_rdev, attr.st_uid, attr.st_gid, attr.st_size) == (
        stat.S_IFBLK | 0o640, os.makedev(259, 70000), 5, 6, 0,
    )  # fmt: skip
    attr = layer.stat(char)
    assert (attr.st_mode, attr.st_rdev, attr.st_uid, attr.st_gid) == (
        stat.S_IFCHR | 0o600, os.makedev(1, 3), 7, 0,
    )  # fmt: skip
    assert attr.st_mtime_ns == 2
    whiteout = layer.mknod(top[0], b"gone", stat.S_IFCHR, 0, 0, 0)
    assert stat.S_ISCHR(os.lstat(nobody_path / "tree/gone").st_mode), "a whiteout must be a real one"
    assert layer.stat(whiteout).st_rdev == 0
    spare = layer.lookup(layer.root, b"spare")
    assert spare and layer.names(spare[0]) == []


def test_a_layer_changes_owners_of_links(layer: DirectoryLayer) -> None:
    """An inode that can have no note is replaced when it gets a second name, not later."""
    top = layer.lookup(layer.root, b"tree")
    assert top
    key = layer.symlink(top[0], b"link", b"to \xff where", 0, 0)
    layer.link(key, top[0], b"again")
    layer.chown(key, 1, 2)
    again = layer.lookup(top[0], b"again")
    assert again
    for attr in (layer.stat(key), again[1]):
        assert (attr.st_uid, attr.st_gid, attr.st_nlink) == (1, 2, 2)
    assert layer.readlink(again[0]) == b"to \xff where"
    layer.unlink(top[0], b"again", None)
    layer.utimens(key, 3, 4)
    layer.chown(key, 1, 2)
    attr = layer.stat(key)
    assert (attr.st_uid, attr.st_gid, attr.st_mode, attr.st_size) == (1, 2, stat.S_IFLNK | 0o777, 10)
    assert (attr.st_atime_ns, attr.st_mtime_ns) == (3, 4)
    assert layer.readlink(key) == b"to \xff where"
    layer.link(key, top[0], b"again")
    layer.chown(key, 5, 6)
    found = layer.lookup(top[0], b"again")
    assert found and found[1].st_uid == 5 and layer.readlink(found[0]) == b"to \xff where"


def test_a_layer_shows_the_mode_that_an_acl_gives(layer: DirectoryLayer) -> None:
    """Also where the real mode must be another one."""
    top = layer.lookup(layer.root, b"tree")
    assert top
    key, file = layer.create(top[0], b"file", 0o000, 7, 8)
    file.close()
    minimal = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, perm, 0xFFFFFFFF) for tag, perm in ((1, 6), (4, 4), (0x20, 0))
    )
    for acl, mode in ((minimal, 0o640), (minimal.replace(b"\x01\0\x06", b"\x01\0\0"), 0o040)):
        layer.setxattr(key, b"system.posix_acl_access", acl)
        attr = layer.stat(key)
        assert (stat.S_IMODE(attr.st_mode), attr.st_uid, attr.st_gid) == (mode, 7, 8)
    fifo = layer.mknod(top[0], b"fifo", stat.S_IFIFO | 0o644, 0, 7, 8)
    full = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", *entry)
        for entry in (
            (1, 0, -1 % 2**32),
            (2, 7, 1234),
            (4, 5, -1 % 2**32),
            (0x10, 6, -1 % 2**32),
            (0x20, 1, -1 % 2**32),
        )
    )
    for key_, kind in ((key, stat.S_IFREG), (fifo, stat.S_IFIFO)):
        layer.setxattr(key_, b"system.posix_acl_access", full)
        assert layer.stat(key_).st_mode == kind | 0o061
        assert layer.getxattr(key_, b"system.posix_acl_access") == full
        layer.chmod(key_, 0o472)
        assert layer.stat(key_).st_mode == kind | 0o472
        shown = [
            entry[:2]
            for entry in struct.iter_unpack("<HHI", layer.getxattr(key_, b"system.posix_acl_access")[4:])
        ]
        assert shown == [(1, 4), (2, 7), (4, 5), (0x10, 7), (0x20, 2)]
    with closing(layer.open(key, os.O_RDWR)) as file:
        assert file.pwrite(b"x", 0) == 1
