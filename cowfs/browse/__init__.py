"""``cowfs browse``: walk the changes in a terminal, look at them, revert them.

:mod:`cowfs.browse.source` reads the changes and reverts them, in a thread of its own; the rest draws, with
textual, which nothing else in cowfs imports. Everything goes through :mod:`cowfs.api`.
"""
