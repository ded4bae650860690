"""Real programs, run in a chroot in a small Debian: what people do with a root filesystem.

Each runs a script with ``sh -e`` in the merged tree, with its own /dev and /proc. A check, run after a new
mount, prints what the program has achieved.
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

IMPORTED = [
    "ast", "asyncio", "ctypes", "csv", "decimal", "difflib", "email.mime.text", "http.server", "json",
    "logging.handlers", "multiprocessing", "pydoc", "sqlite3", "statistics", "tarfile", "unittest.mock",
    "urllib.request", "uuid", "xml.dom.minidom", "zipfile",
]  # fmt: skip
COPIED = "usr/share"
OWNER = 1234
CHOWNED = ("usr/lib/python3.*", "usr/include")


def check_nothing(box: Box) -> None:
    """Accept the tree as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program(Workload):
    """A script, and what proves that it did its work."""

    script: str
    says: str = ""
    """The last line that the script must print, if any."""
    check: str = ""
    """A script to run after the new mount; "" for none."""
    prints: str = ""
    """The last line that *check* must print."""
    inspect: Callable[[Box], None] = check_nothing
    """A function that checks the merged tree from outside the chroot."""
    prepare: str = ""
    """A script to run before, which is not timed."""
    cold: bool = True
    writes: bool = True

    def setup(self, box: Box) -> None:
        if self.prepare:
            run_in_chroot(box, self.prepare)

    def run(self, box: Box) -> float:
        seconds, box.state["said"] = run_in_chroot(box, self.script)
        return seconds

    def verify(self, box: Box) -> None:
        if self.says and box.state["said"] != self.says:
            raise WrongResult(f"{self.name} printed {box.state['said'][:80]!r} instead of {self.says!r}")
        if self.check:
            try:
                printed = run_in_chroot(box, self.check)[1]
            except SampleFailed as error:
                raise WrongResult(f"{self.name}: {error}") from None
            if printed != self.prints:
                raise WrongResult(f"{self.name}: its check printed {printed[:80]!r}, not {self.prints!r}")
        self.inspect(box)


def run_in_chroot(box: Box, script: str) -> tuple[float, str]:
    """Run *script* in a chroot in ``merged``; return the seconds it took and the last line it printed."""
    return box.client("chroot", box.names_file([script]), prefix=["unshare", "--mount"])


def check_copy(box: Box) -> None:
    """Compare all attributes of the copied tree with the original, and the data of every 16th file."""
    source, copy = box.corpus.reference / COPIED, box.merged / "srv/share"
    expected, found = dict(walk(source)), dict(walk(copy))
    if expected != found or not expected:
        different = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
        raise WrongResult(f"{len(different)} names of the copy differ from the original: {different[:3]}")
    files = [name for name, info in expected.items() if stat.S_ISREG(info[0])]
    for name in files[::16]:
        if (source / name).read_bytes() != (copy / name).read_bytes():
            raise WrongResult(f"{name} has other data in the copy")


def walk(root: Path) -> Iterator[tuple[str, tuple[int, int, int, int, int]]]:
    """Yield every name under *root* with its mode, owner, group, mtime, and size (0 for directories)."""
    for above, directories, files in os.walk(root):
        for name in [*directories, *files]:
            path = Path(above, name)
            info = path.lstat()
            size = 0 if stat.S_ISDIR(info.st_mode) else info.st_size
            yield (
                str(path.relative_to(root)),
                (info.st_mode, info.st_uid, info.st_gid, int(info.st_mtime), size),
            )


def check_owners(box: Box) -> None:
    """Check that everything below CHOWNED has the new owner."""
    owners = [info[1] for top in chowned(box.merged) for _, info in walk(top)]
    expected = sum(1 for top in chowned(box.corpus.reference) for _ in walk(top))
    if owners != [OWNER] * expected or not expected:
        raise WrongResult(f"{owners.count(OWNER)} of {expected} names have the new owner")


def chowned(root: Path) -> list[Path]:
    """Return the directories under *root* whose contents change owner."""
    return sorted(path for pattern in CHOWNED for path in root.glob(pattern))


def check_usage(box: Box) -> None:
    """Check what du printed. It depends on the filesystem's block size, so it need only be near the size."""
    expected = sum(e.size for e in box.corpus.entries if stat.S_ISREG(e.mode) and e.path.startswith("usr/"))
    printed = int((box.state["said"].split() or ["0"])[0]) * 1024
    if not expected / 2 < printed < expected * 2:
        raise WrongResult(f"du: {printed} bytes instead of some {expected}")


GIT = "git -c gc.auto=0 -c safe.directory=* "
COUNT_INSTALLED = "dpkg-query -W -f '${db:Status-Status}\\n' %s 2>/dev/null | grep -cx installed || true"

WORKLOADS: list[Workload] = [
    Program(
        "python",
        f"python imports {len(IMPORTED)} modules, five times",
        script=f"for n in 1 2 3 4 5; do python3 -c 'import {', '.join(IMPORTED)};"
        f" print({len(IMPORTED)})'; done",
        says=str(len(IMPORTED)),
        writes=False,
    ),
    Program("du", "du -s /usr", script="du -s /usr", inspect=check_usage, writes=False),
    Program(
        "git-status",
        f"git status of a work tree of {COMMITTED} files that git has not seen since it was packed",
        script=f'changed=$({GIT} -C /srv/repository status --porcelain); test -z "$changed"; echo clean',
        says="clean",
        writes=False,
    ),
    Program(
        "git-clone-root",
        "git clone --no-hardlinks of it",
        script=f"{GIT} clone -q --no-hardlinks /srv/repository /srv/clone",
        check=f"cd /srv/clone; {GIT} fsck --no-progress; changed=$({GIT} status --porcelain);"
        ' test -z "$changed"; git ls-files | wc -l',
        prints=str(COMMITTED),
    ),
    Program(
        "git-gc",
        f"git gc of {COMMITTED} files in loose objects",
        script=f"{GIT} -C /srv/repository gc -q",
        check=f"cd /srv/repository; {GIT} fsck --no-progress; {GIT} count-objects",
        prints="0 objects, 0 kilobytes",
    ),
    Program(
        "make",
        f"make -j2 of {C_FILES} C files",
        script="make -s -j2 -C /srv/c",
        check="/srv/c/program",
        prints=str(sum(range(C_FILES))),
    ),
    Program(
        "pip",
        f"pip install of a wheel of {MODULES} modules",
        script="pip3 install -q --no-index --no-deps --root-user-action=ignore --disable-pip-version-check"
        " --target=/srv/installed /srv/sample-1.0-py3-none-any.whl",
        check="cd /srv/installed; python3 -c 'from importlib import import_module as i;"
        f' print(sum(i(f"sample.m{{n}}").number for n in range({MODULES})))\'',
        prints=str(sum(range(MODULES))),
    ),
    Program(
        "sqlite",
        f"sqlite, {INSERTS} inserts, each a transaction",
        script="sqlite3 /srv/rows.db </srv/inserts.sql",
        check="sqlite3 /srv/rows.db 'PRAGMA integrity_check; SELECT count(*), sum(number) FROM rows'"
        " | tail -n 1",
        prints=f"{INSERTS}|{sum(range(INSERTS))}",
    ),
    Program("cp-a", "cp -a of /usr/share", script="cp -a /usr/share /srv/share", inspect=check_copy),
    Program(
        "rm-rf",
        "rm -rf of a copy of it",
        prepare="cp -a /usr/share /srv/removed",
        script="rm -rf /srv/removed",
        check="ls -A /srv | grep -cx removed || true",
        prints="0",
    ),
    Program(
        "chown-R",
        "chown -R of Python's library and of C headers",
        script=f"chown -R {OWNER} {' '.join(f'/{pattern}/*' for pattern in CHOWNED)}",
        inspect=check_owners,
    ),
    Program(
        "dpkg-i",
        f"dpkg -i of {len(INSTALLED)} packages",
        script="dpkg -i /srv/packages/*.deb",
        check=f"dpkg -V {' '.join(INSTALLED)}; " + COUNT_INSTALLED % " ".join(INSTALLED),
        prints=str(len(INSTALLED)),
    ),
    Program(
        "dpkg-purge",
        f"dpkg --purge of {len(PURGED)} packages",
        script=f"dpkg --purge {' '.join(PURGED)}",
        check=COUNT_INSTALLED % " ".join(PURGED) + "; ls /usr/share | grep -cx vim || true",
        prints="0",
    ),
]
