"""Raw Linux system calls that Python's :mod:`os` lacks: on files, and on mounts and loop devices."""
