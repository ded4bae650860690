"""Which other users can change the contents of layers, some of which may be on a server."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence

from cowfs.linux import trust
from cowfs.url.names import is_url


def forbidden(places: Sequence[str], trusted: Collection[int] = (0,)) -> dict[str, str]:
    """Do :func:`cowfs.linux.trust.forbidden` for files, directories and URLs."""
    for place in places:
        if is_url(place):
            return dict.fromkeys(("nosuid", "nodev"), f"{place} is what its server sends")
    return trust.forbidden(places, trusted)


def shows_too_much(layers: Sequence[str], who: Callable[[str], str | None]) -> str | None:
    """Return why others must not see the merged *layers* (topmost first); None if they may.

    A layer can refer to files and directories of the layers below (redirect, metacopy), and give them other
    modes. So its creator could show everybody what only this user may read. That is impossible if nobody
    else can change a layer (*who* returns the reason if somebody can), or if everybody can read what is
    below it.
    """
    for number, path in enumerate(layers[:-1], 1):
        reason = who(path)
        if reason is None:
            continue
        kept = next((low for low in layers[number:] if is_url(low) or not trust.is_public(low)), None)
        if kept is not None:
            return f"{reason}, and could show others what {kept} keeps from them"
    return None


def who_can_change(place: str, trusted: Collection[int] = (0,)) -> str | None:
    """Do what cowfs.linux.trust does, for a file, a directory, a URL, or a path that does not exist yet."""
    if is_url(place):
        return f"{place} is what its server sends"
    there = place if os.path.lexists(place) else os.path.dirname(place)  # a store that will be made
    return trust.who_can_change(there, trusted)
