"""What the command line says to people."""

from __future__ import annotations

import sys

from cowfs.errors import printable


def say(text: str) -> None:
    """Print one line, whatever is in *text*, at once."""
    print(printable(text), flush=True)


def warn(text: str) -> None:
    """Print one line to standard error."""
    print(f"cowfs: {printable(text)}", file=sys.stderr, flush=True)
