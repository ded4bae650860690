"""What has changed between a merged tree and its lower, read from the layers and never from FUSE.

:func:`cowfs.changes.diff.diff` finds the changes, :mod:`cowfs.changes.render` shows them.
"""
