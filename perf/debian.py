"""A small Debian to run real programs in: a squashfs image (zstd), made once by debootstrap and cached.

It has the same release as this machine, and comes from the mirror that apt uses here. ``/srv`` in it contains
what the programs work on: a repository, C files, a wheel, packages to install.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import textwrap
import zipfile
from pathlib import Path

from perf import machine

ANY_MIRROR = "http://deb.debian.org/debian"
NAME = "debian"
"""The name of the corpus, and of the image in the cache."""
INCLUDED = ("git", "make", "gcc", "libc6-dev", "python3", "python3-pip", "sqlite3", "vim-runtime")
PURGED = ("vim-runtime", "python3-pip", "python3-wheel", "python3-setuptools")
"""Packages in the image that no other package needs."""
INSTALLED = ("manpages", "bash-completion", "iso-codes", "publicsuffix", "wamerican")
"""Packages to install, which depend on nothing else."""
COMMITTED, C_FILES, MODULES, INSERTS = 900, 40, 300, 100


def release() -> str:
    """Return the code name of the Debian release that this machine runs."""
    found = re.search(r"^VERSION_CODENAME=(\w+)$", Path("/etc/os-release").read_text(), re.M)
    return found[1] if found else "bookworm"


def mirror() -> str:
    """Return the URL from which this machine's apt gets Debian."""
    if shutil.which("apt-get") is None:
        return ANY_MIRROR
    query = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(ORIGIN)", "Created-By: Packages"]
    targets = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    found = re.search(r"^(http\S+/debian)/? Debian$", targets, re.M)
    return found[1] if found else ANY_MIRROR


def path(cache: Path) -> Path:
    """Return the path of the cached image, which need not exist."""
    return cache / f"{NAME}.squashfs"


def missing_requirements() -> str:
    """Return a message about programs that make() needs and that are not installed; "" if all are."""
    return machine.missing_programs(
        ("debootstrap", "debootstrap"), ("apt-get", "apt"), ("mksquashfs", "squashfs-tools")
    )


def make(cache: Path) -> Path:
    """Return the path of the image in *cache*; make it if needed, which takes minutes and needs root."""
    image = path(cache)
    if image.exists():
        return image
    tree, new = cache / "debian.tree", image.with_suffix(".new")
    shutil.rmtree(tree, ignore_errors=True)
    try:
        fill(tree)
        run(["mksquashfs", str(tree), str(new), *["-comp", "zstd", "-noappend", "-no-progress", "-quiet"]])
        new.rename(image)
    finally:
        shutil.rmtree(tree, ignore_errors=True)
    return image


def fill(tree: Path) -> None:
    """Install the Debian in *tree*."""
    packages = f"--include={','.join(INCLUDED)}"
    run(["debootstrap", "--variant=minbase", packages, release(), str(tree), mirror()])
    for unneeded in ("var/cache/apt/archives", "var/lib/apt/lists", "usr/share/locale", "usr/share/doc"):
        shutil.rmtree(tree / unneeded, ignore_errors=True)
    srv = tree / "srv"
    (srv / "packages").mkdir()
    run(["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *INSTALLED], srv / "packages")
    make_c_files(srv / "c")
    make_wheel(srv / "sample-1.0-py3-none-any.whl")
    (srv / "inserts.sql").write_text(
        "CREATE TABLE rows (number INTEGER);\n"
        + "".join(f"INSERT INTO rows VALUES ({number});\n" for number in range(INSERTS))
    )
    (srv / "repository.sh").write_text(REPOSITORY)
    run(["chroot", str(tree), "sh", "-e", "/srv/repository.sh"])


REPOSITORY = f"""\
export GIT_CONFIG_GLOBAL=/dev/null
export GIT_AUTHOR_DATE=2000-01-01T00:00:00Z GIT_COMMITTER_DATE=2000-01-01T00:00:00Z
mkdir /srv/repository
find /usr/lib/python3* -name '*.py' -size -32k | LC_ALL=C sort | head -n {COMMITTED} >/srv/names
tar -c -P -T /srv/names | tar -x -C /srv/repository --transform 's,^/,,'
rm /srv/names
cd /srv/repository
git init -q -b main
git config user.name perf
git config user.email perf@localhost
for commit in 1 2 3; do
    git ls-files -o | head -n {COMMITTED // 3} | git add --pathspec-from-file=-
    git commit -q -m "$commit"
done
"""


def make_c_files(directory: Path) -> None:
    """Write a program of C_FILES source files and its Makefile. It prints the sum of the files' numbers."""
    directory.mkdir()
    numbers = range(C_FILES)
    for number in numbers:
        (directory / f"part{number}.c").write_text(
            f"#include <stdio.h>\n#include <string.h>\nint part{number}(void) {{ return {number}; }}\n"
        )
    calls = " + ".join(f"part{number}()" for number in numbers)
    declared = "".join(f"int part{number}(void);\n" for number in numbers)
    (directory / "main.c").write_text(
        f'#include <stdio.h>\n{declared}int main(void) {{ printf("%d\\n", {calls}); return 0; }}\n'
    )
    objects = " ".join(["main.o", *(f"part{number}.o" for number in numbers)])
    (directory / "Makefile").write_text(
        f"program: {objects}\n\tgcc -o $@ $^\n%.o: %.c\n\tgcc -O1 -c -o $@ $<\n"
    )


def make_wheel(wheel: Path) -> None:
    """Write a wheel of MODULES modules, each with its number."""
    info = "sample-1.0.dist-info"
    modules = {f"sample/m{n}.py": f"number = {n}\n" + "# a comment\n" * 100 for n in range(MODULES)}
    files = {
        "sample/__init__.py": "",
        **modules,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: sample\nVersion: 1.0\n",
        f"{info}/WHEEL": textwrap.dedent("""\
            Wheel-Version: 1.0
            Generator: perf
            Root-Is-Purelib: true
            Tag: py3-none-any
            """),
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(name, content)


def run(argv: list[str], cwd: Path | None = None) -> None:
    """Run *argv*; RuntimeError with its last line of output if it fails."""
    done = subprocess.run(
        argv, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        message = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise RuntimeError(f"{argv[0]} exited with {done.returncode}: {message}")
