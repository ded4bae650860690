"""Real programs, run in a chroot of a small Debian: what people do with a root filesystem.

Each is a script for ``sh -e`` in the merged tree, with a /dev and /proc of its own, and a check that is run
after a fresh mount and says on stdout what it has found.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from perf.bench import Workload
from perf.box import Box, SampleFailed, WrongResult
from perf.debian import C_FILES, COMMITTED, INSERTS, INSTALLED, MODULES, PURGED

IMPORTED = (
    "ast asyncio ctypes csv decimal difflib email.mime.text http.server json logging.handlers multiprocessing"
)
IMPORTED += " pydoc sqlite3 statistics tarfile unittest.mock urllib.request uuid xml.dom.minidom zipfile"
COPIED = "usr/share"
OWNER = 1234
GIVEN = ("usr/lib/python3.*", "usr/include")
MANY = len(IMPORTED.split())


def nothing(box: Box) -> None:
    """For what a script's own output tells of."""


@dataclass(frozen=True, slots=True)
class Program:
    """A script, and how it is known that it did its work."""

    name: str
    title: str
    script: str
    check: str = ""
    """A script for the fresh mount; "" where *look* does it."""
    found: str = ""
    """What it must print."""
    look: Callable[[Box], None] = nothing
    """What is looked at from outside besides."""
    prepare: str = ""
    """Run before, and not timed."""
    says: str = ""
    """What the script must say at last, if anything."""
    cold: bool = True
    main: bool = False
    writes: bool = True

    def setup(self, box: Box) -> None:
        if self.prepare:
            inside(box, self.prepare)

    def run(self, box: Box) -> float:
        seconds, box.state["said"] = inside(box, self.script)
        return seconds

    def verify(self, box: Box) -> None:
        if self.says and box.state["said"] != self.says:
            raise WrongResult(f"{self.name} said {box.state['said'][:80]!r} instead of {self.says!r}")
        if self.check:
            try:
                said = inside(box, self.check)[1]
            except SampleFailed as error:
                raise WrongResult(f"{self.name}: {error}") from None
            if said != self.found:
                raise WrongResult(f"{self.name}: the check says {said[:80]!r} instead of {self.found!r}")
        self.look(box)


def inside(box: Box, script: str) -> tuple[float, str]:
    """Run *script* in a chroot in ``merged``; return its seconds and the last line that it said."""
    return box.client("chroot", box.names_file([script]), prefix=["unshare", "--mount"])


def same_share(box: Box) -> None:
    """Compare the copy with what was copied, but for the bytes of most files."""
    source, copy = box.corpus.reference / COPIED, box.merged / "srv/share"
    wanted, found = dict(looked_at(source)), dict(looked_at(copy))
    if wanted != found or not wanted:
        different = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
        raise WrongResult(f"of the copy {len(different)} names are not as they were: {different[:3]}")
    files = [name for name, info in wanted.items() if stat.S_ISREG(info[0])]
    for name in files[::16]:
        if (source / name).read_bytes() != (copy / name).read_bytes():
            raise WrongResult(f"{name} has other bytes in the copy")


def looked_at(root: Path) -> Iterator[tuple[str, tuple[int, int, int, int, int]]]:
    """Every name under *root*: mode, owner, group, time, and the size but of directories."""
    for above, directories, files in os.walk(root):
        for name in [*directories, *files]:
            path = Path(above, name)
            info = path.lstat()
            size = 0 if stat.S_ISDIR(info.st_mode) else info.st_size
            yield (
                str(path.relative_to(root)),
                (info.st_mode, info.st_uid, info.st_gid, int(info.st_mtime), size),
            )


def all_given(box: Box) -> None:
    """Look whether everything has its new owner."""
    found = [info[1] for where in given(box.merged) for _, info in looked_at(where)]
    wanted = sum(1 for where in given(box.corpus.reference) for _ in looked_at(where))
    if found != [OWNER] * wanted or not wanted:
        raise WrongResult(f"{found.count(OWNER)} of {wanted} names have the new owner")


def given(root: Path) -> list[Path]:
    """The directories whose contents are given away."""
    return sorted(found for where in GIVEN for found in root.glob(where))


def counted(box: Box) -> None:
    """What du says depends on the filesystem's blocks: it must be near the sizes of the files."""
    wanted = sum(e.size for e in box.corpus.entries if stat.S_ISREG(e.mode) and e.path.startswith("usr/"))
    found = int((box.state["said"].split() or ["0"])[0]) * 1024
    if not wanted / 2 < found < wanted * 2:
        raise WrongResult(f"du: {found} bytes instead of some {wanted}")


GIT = "git -c gc.auto=0 -c safe.directory=* "
INSTALLED_CHECK = "dpkg-query -W -f '${db:Status-Status}\\n' %s 2>/dev/null | grep -cx installed || true"

WORKLOADS: list[Workload] = [
    Program(
        "python",
        f"python imports {MANY} modules, five times",
        f"for n in 1 2 3 4 5; do python3 -c 'import {IMPORTED.replace(' ', ', ')}; print({MANY})'; done",
        says=str(MANY),
        writes=False,
    ),
    Program("du", "du -s /usr", "du -s /usr", look=counted, writes=False),
    Program(
        "git-status",
        f"git status of a work tree of {COMMITTED} files that git has not seen since it was packed",
        f'changed=$({GIT} -C /srv/repository status --porcelain); test -z "$changed"; echo clean',
        says="clean",
        writes=False,
    ),
    Program(
        "git-clone-root",
        "git clone --no-hardlinks of it",
        f"{GIT} clone -q --no-hardlinks /srv/repository /srv/clone",
        f"cd /srv/clone; {GIT} fsck --no-progress; changed=$({GIT} status --porcelain);"
        ' test -z "$changed"; git ls-files | wc -l',
        str(COMMITTED),
    ),
    Program(
        "git-gc",
        f"git gc of {COMMITTED} files in loose objects",
        f"{GIT} -C /srv/repository gc -q",
        f"cd /srv/repository; {GIT} fsck --no-progress; {GIT} count-objects",
        "0 objects, 0 kilobytes",
    ),
    Program(
        "make",
        f"make -j2 of {C_FILES} C files",
        "make -s -j2 -C /srv/c",
        "/srv/c/program",
        str(sum(range(C_FILES))),
    ),
    Program(
        "pip",
        f"pip install of a wheel of {MODULES} modules",
        "pip3 install -q --no-index --no-deps --root-user-action=ignore --disable-pip-version-check"
        " --target=/srv/installed /srv/sample-1.0-py3-none-any.whl",
        "cd /srv/installed; python3 -c 'from importlib import import_module as i;"
        f' print(sum(i(f"sample.m{{n}}").number for n in range({MODULES})))\'',
        str(sum(range(MODULES))),
    ),
    Program(
        "sqlite",
        f"sqlite, {INSERTS} inserts, each a transaction",
        "sqlite3 /srv/rows.db </srv/inserts.sql",
        "sqlite3 /srv/rows.db 'PRAGMA integrity_check; SELECT count(*), sum(number) FROM rows' | tail -n 1",
        f"{INSERTS}|{sum(range(INSERTS))}",
    ),
    Program("cp-a", "cp -a of /usr/share", "cp -a /usr/share /srv/share", look=same_share),
    Program(
        "rm-rf",
        "rm -rf of a copy of it",
        "rm -rf /srv/removed",
        "ls -A /srv | grep -cx removed || true",
        "0",
        prepare="cp -a /usr/share /srv/removed",
    ),
    Program(
        "chown-R",
        "chown -R of Python's library and of C headers",
        f"chown -R {OWNER} {' '.join(f'/{where}/*' for where in GIVEN)}",
        look=all_given,
    ),
    Program(
        "dpkg-i",
        f"dpkg -i of {len(INSTALLED)} packages",
        "dpkg -i /srv/packages/*.deb",
        f"dpkg -V {' '.join(INSTALLED)}; " + INSTALLED_CHECK % " ".join(INSTALLED),
        str(len(INSTALLED)),
    ),
    Program(
        "dpkg-purge",
        f"dpkg --purge of {len(PURGED)} packages",
        f"dpkg --purge {' '.join(PURGED)}",
        INSTALLED_CHECK % " ".join(PURGED) + "; ls /usr/share | grep -cx vim || true",
        "0",
    ),
]
