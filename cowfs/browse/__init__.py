"""``cowfs browse``: walk the changes in a terminal, look at them, take them back.

:mod:`cowfs.browse.source` gets the changes and takes them back, in a thread of its own; the rest draws, with
textual, which is imported here alone. All of it stands on :mod:`cowfs.api`.
"""
