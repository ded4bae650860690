"""Pack inputs into the corpus: ``python -m tests.fuzz.pack TARGET DIRECTORY...``.

Of the inputs for ext3, only as many are packed as it takes to reach all lines that they reach.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import zipfile
from pathlib import Path

from tests.ext3 import images
from tests.fuzz.ext3 import build
from tests.fuzz.run import CORPUS
from tests.support.mounts import project_root
from tests.support.system import run


def smallest(directories: list[str], place: Path) -> Path:
    """Return a directory in *place* with the inputs for ext3 that are needed."""
    fuzzer = build.up_to_date(Path(project_root()) / ".cache/fuzz/engine/fuzzer")
    out = place / "out"
    out.mkdir()
    run(
        fuzzer, "-set_cover_merge=1", "-use_counters=0", "-max_len=3200", out, *directories, timeout=3600,
        env={**os.environ, "COWFS_FUZZ_IMAGES": str(build.make_images(place / "images"))},
    )  # fmt: skip
    return out


def pack(target: str, directories: list[Path]) -> Path:
    """Write CORPUS/TARGET.zip. The same inputs give the same bytes."""
    inputs = {path.read_bytes() for directory in directories for path in directory.iterdir()}
    archive = CORPUS / f"{target}.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        for data in sorted(inputs):
            out.writestr(zipfile.ZipInfo(hashlib.sha1(data).hexdigest()[:16]), data, zipfile.ZIP_DEFLATED)
    return archive


def main() -> None:
    """Run the command line; return the exit status."""
    target, *directories = sys.argv[1:]
    with tempfile.TemporaryDirectory(dir=images.scratch()) as place:
        taken = (
            [smallest(directories, Path(place))] if target == "ext3" else [Path(name) for name in directories]
        )
        archive = pack(target, taken)
    print(f"{archive}: {archive.stat().st_size} bytes")


if __name__ == "__main__":
    main()
