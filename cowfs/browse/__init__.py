"""``cowfs browse``: browse and revert changes in a terminal.

:mod:`cowfs.browse.source` reads and reverts the changes, in its own thread. The other modules draw with
textual, which no other part of cowfs imports. Everything goes through :mod:`cowfs.api`.
"""
