"""Run a Python target with atheris, if installed: ``python -m tests.fuzz.by_atheris TARGET FINDINGS ...``.

The other arguments are for libFuzzer: directories of inputs, and options. It stops at the first finding.
"""

from __future__ import annotations

import importlib
import logging
import random
import sys
from pathlib import Path

from tests.fuzz.driver import Target


def main() -> None:
    """Fuzz until there is a finding, or until libFuzzer's options end the run."""
    import atheris

    name, findings, *rest = sys.argv[1:]
    logging.disable(logging.CRITICAL)
    with atheris.instrument_imports(include=["cowfs"]):
        target: Target = importlib.import_module(f"tests.fuzz.targets.{name}").TARGET
    seeds = Path(findings).parent / "seeds"
    seeds.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(target.seeds()):
        (seeds / str(number)).write_bytes(data)
    limits = [
        f"-max_len={target.largest}",
        "-rss_limit_mb=2048",
        "-timeout=20",
        f"-artifact_prefix={findings}/",
    ]

    def mutate(data: bytes, largest: int, seed: int) -> bytes:
        choose = random.Random(seed)
        if choose.randrange(2):
            return bytes(atheris.Mutate(data, largest))
        return target.mutate(data, choose)[:largest]

    with target.run() as run:
        atheris.Setup([sys.argv[0], *limits, *rest, str(seeds)], run, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
