"""A fuzz target for atheris: ``python -m tests.fuzz.fuzz_squashfs [CORPUS] [libFuzzer options]``.

The corpus is best begun with small images: ``python -m tests.fuzz.fuzz_squashfs --make-corpus DIR``.
Needs ``pip install atheris``, which no test does.
"""

from __future__ import annotations

import sys
from pathlib import Path

MAX_LENGTH = 1 << 17


def one_input(data: bytes) -> None:
    """What libFuzzer calls."""
    from tests.fuzz.exercise import exercise

    exercise(data if data[:4] == b"hsqs" else b"hsqs" + data[4:])


def main() -> None:
    """Fuzz until something happens, or until libFuzzer's options say that it is enough."""
    if sys.argv[1:2] == ["--make-corpus"]:
        from tests.support.squashfs import small_images

        small_images(Path(sys.argv[2]))
        return
    import atheris

    with atheris.instrument_imports(include=["cowfs.formats.squashfs", "cowfs.layers.squashfs"]):
        import cowfs.layers.squashfs  # noqa: F401
    atheris.Setup([*sys.argv, f"-max_len={MAX_LENGTH}", "-rss_limit_mb=1024", "-timeout=20"], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
