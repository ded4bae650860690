"""What other programs make of an export of a tree with odd times, owners, names and links."""

from __future__ import annotations

import os
from pathlib import Path
from shutil import which

import pytest

from tests.mount.test_export import script, seen
from tests.support.mounts import cowfs, mounted
from tests.support.system import needs_fuse, needs_root, run
from tests.support.tree import Snapshot, differences

pytestmark = [needs_fuse, needs_root, pytest.mark.nightly, pytest.mark.timeout(600)]

MAKE = r"""
mkdir lower; cd lower; mkdir -p a/b/c d/e/f deep/x/y/z keep/me op/in acl times 'sp ace/ü' empty1
seq 1 5000 >a/b/c/num; echo one >a/1; ln a/1 d/e/one; ln a/1 deep/x/y/uno; echo two >d/two
yes big | head -c 400000 >big; yes more | head -c 400000 >d/e/big2; ln d/e/big2 deep/big2link
echo z >deep/x/y/z/z; echo op >op/in/op; mknod times/dev c 7 200; mkfifo times/ff
touch -d '1960-03-04 05:06:07.5' times/old; touch -d '2100-01-01' times/new; setfattr -n user.low -v 1 a/1
setfacl -m u:77:rwx acl; setfacl -d -m u:77:r acl; echo x >acl/x; setfacl -m g:9:r acl/x
chown 4000000000:4000000001 d/two; cp /bin/true cap; setcap cap_net_raw+ep cap
"""
CHANGE = r"""
mv a A; mv d/e A/b/E; mv A/b deep/x/B; mv deep/x deep/X
echo more >>A/1; chmod 600 big; setfattr -n user.only -v 9 deep/X/B/E/big2
rm -r op; mkdir -p op/in; echo n >op/in/n
touch -d '1971-12-14' times/old; touch -d '2200-02-28 12:00:00.125' times/new
chown 4294967294:4294967293 d/two; mkfifo -m 604 d/p; ln d/p keep/p2; mknod -m 640 d/null c 1 3
ln d/null keep/null2
mkdir -p "$(printf 'we\tird\n\377')/x"; echo h >h1; ln h1 deep/X/h2; ln h1 op/in/h3
truncate -s 8M sparse; printf tail | dd of=sparse bs=1 seek=6000000 conv=notrunc status=none
setfacl -m u:78:rw acl/x; mkdir acl/inh; setcap cap_sys_admin+ep cap; cp /bin/true cap2; chmod 6755 cap2
rmdir empty1; mkdir -m 1777 empty2; ln -s /abs/../x link; setfattr -h -n trusted.l -v 1 link
rm -r keep/me; mkdir keep/me; mv 'sp ace' 'sp ace2'
touch -d '1969-12-31 23:59:59.9' 'sp ace2'; echo '-rf' >./-rf
"""
FORMATS = ("tar", "gnutar", "squashfs", "patch", "oci")


def make(top: Path, *stores: str) -> Snapshot:
    """Make a lower, and stores with the same changes, the first with a checkpoint; return what is seen."""
    script(MAKE, top)
    tree: Snapshot = {}
    half = CHANGE.index("chown")
    for store in stores:
        if store.endswith(".bs"):
            cowfs("create", top / store, "32", check=True)
        with mounted(top / "lower", top / "mnt", top / store) as here:
            script(CHANGE[:half], here.path)
            if store == stores[0]:
                cowfs("checkpoint", here.path, "half", check=True)
            script(CHANGE[half:], here.path)
        with mounted(top / "lower", top / "mnt", top / store) as here:
            tree = seen(here.path)
    return tree


def test_the_same_bytes_for_any_store_and_user(nobody_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For an image with a checkpoint, and for a directory without, if all times are too late."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    make(nobody_path, "store.bs", "store")
    run("chmod", "a+r", nobody_path / "store.bs")
    run("chmod", "-R", "a+rX", nobody_path / "lower")
    out = nobody_path / "out"
    out.mkdir()
    os.chown(out, 65534, 65534)
    wrong = []
    for form in FORMATS:
        for more in ((), ("--merged",))[: 1 if form == "patch" else 2]:
            for name, store, nobody in (
                ("a", "store.bs", False),
                ("b", "store", False),
                ("c", "store.bs", True),
            ):
                done = cowfs(
                    "export", nobody_path / store, "--to", form, *more, out / f"{name}.{form}{len(more)}",
                    nobody=nobody,
                )  # fmt: skip
                assert done.returncode in {0, 64}, done.stderr
            for name in "bc":
                first, other = (out / f"{one}.{form}{len(more)}" for one in ("a", name))
                if run("diff", "-rq", first, other, check=False).returncode:
                    wrong.append((form, more, name))
    assert wrong == []


def test_restic_takes_the_list(tmp_path: Path) -> None:
    if which("restic") is None:
        pytest.skip("restic is not installed")
    tree = make(tmp_path, "store.bs")
    secret = {"RESTIC_PASSWORD": "x", "RESTIC_REPOSITORY": f"{tmp_path}/repository"}
    env = {**os.environ, **secret, "RESTIC_CACHE_DIR": f"{tmp_path}/cache"}
    run("restic", "init", env=env)
    names = tmp_path / "names"
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store.bs") as here:
        told = cowfs("export", here.path, "--to", "restic", names)
        assert (told.returncode, "deletions left out: " in told.stderr) == (64, True)
        run("restic", "backup", "--files-from-raw", names, env=env, cwd=here.path)
    run("restic", "restore", "latest", "--target", tmp_path / "out", env=env)
    found = seen(tmp_path / "out")
    changed = [os.fsdecode(name) for name in names.read_bytes().split(b"\0") if name]
    assert len(changed) > 20
    facts = ("type", "mode", "owner", "content", "size", "target", "rdev", "mtime")
    for name in changed:
        for fact in facts:
            assert found[name].get(fact) == tree[name].get(fact), (name, fact)


def test_buildah_takes_the_image(tmp_path: Path) -> None:
    if which("buildah") is None or which("umoci") is None:
        pytest.skip("buildah and umoci are not installed")
    tree = make(tmp_path, "store.bs")
    base, image = tmp_path / "base", tmp_path / "image"
    run("umoci", "init", "--layout", base)
    run("umoci", "new", "--image", f"{base}:1")
    names: list[str | Path] = ["--xattrs", "--xattrs-include=*", "--format=pax", "-C", tmp_path / "lower"]
    run("tar", *names, "-cf", tmp_path / "base.tar", ".")
    run("umoci", "raw", "add-layer", "--image", f"{base}:1", tmp_path / "base.tar")
    cowfs("export", tmp_path / "store.bs", "--to", "oci", "--base", f"{base}:1", image, check=True)
    places: list[str | Path] = [
        "--root",
        tmp_path / "root",
        "--runroot",
        tmp_path / "run",
        "--storage-driver",
        "vfs",
    ]
    run("buildah", *places, "pull", f"oci:{image}:latest", timeout=120)
    (name,) = run("buildah", *places, "images", "-q").stdout.split()
    container = run("buildah", *places, "from", "--pull-never", name, timeout=120).stdout.strip()
    place = run("buildah", *places, "mount", container).stdout.strip()
    try:
        found = seen(Path(place))
    finally:
        run("buildah", *places, "umount", container)
    for facts in (*tree.values(), *found.values()):
        for fact in ("xattrs", "mtime", "links", "nlink"):  # its copy of a layer keeps some of these only
            facts.pop(fact, None)
    assert differences(tree, found) == []
