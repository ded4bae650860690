"""What a developer does in a merged tree: clone a repository and look at its status."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from perf.bench import Workload
from perf.box import Box, WrongResult

FILES = 1500


@dataclass(frozen=True, slots=True)
class Clone(Workload):
    """Run ``git clone`` of a bare repository on tmpfs, with its checkout."""

    name: str = "git-clone"
    title: str = "git clone of 1,500 files"
    writes: bool = True

    def setup(self, box: Box) -> None:
        source = box.scratch.parent / "source.git"
        if not source.exists():
            make_repository(box)

    def run(self, box: Box) -> float:
        source = box.scratch.parent / "source.git"
        return box.run(["git", "clone", "-q", "--no-hardlinks", str(source), "clone"])

    def verify(self, box: Box) -> None:
        status = box.output(["git", "-C", "clone", "status", "--porcelain"], box.merged)
        if status:
            raise WrongResult(f"git status: {status.splitlines()[0].decode(errors='replace')}")
        box.output(["git", "-C", "clone", "fsck", "--no-progress"], box.merged)


def make_repository(box: Box) -> None:
    """Commit some files of the reference to a repository on tmpfs; done once per run."""
    tree = box.scratch.parent / "source"
    for entry in box.corpus.regular_files(1, 1 << 15, FILES):
        target = tree / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(box.corpus.reference / entry.path, target)
    git = ["git", "-c", "user.name=perf", "-c", "user.email=perf@localhost", "-c", "core.autocrlf=false"]
    box.output([*git, "init", "-q", "-b", "main"], tree)
    box.output([*git, "add", "-f", "-A"], tree)
    box.output([*git, "commit", "-q", "-m", "files"], tree)
    box.output([*git, "clone", "-q", "--bare", str(tree), f"{tree}.git"], tree)
    shutil.rmtree(tree)


WORKLOADS: list[Workload] = [Clone()]
