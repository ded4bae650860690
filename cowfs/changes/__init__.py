"""Find, show, revert and move changes: the differences between a merged tree and its lowers.

Most of it reads the layers, not the mounted tree. :func:`cowfs.changes.diff.diff` finds the changes,
:mod:`cowfs.changes.render` shows them.
"""
