"""``python -m cowfs``: the command. Root's Python runs isolated: it imports nothing from the caller's
directories.
"""

import os
import sys

if __name__ == "__main__":
    if os.geteuid() == 0 and not sys.flags.isolated:
        # Before any other import: the current directory and PYTHONPATH would be searched first.
        os.execv(sys.executable, [sys.executable, "-I", "-m", "cowfs", *sys.argv[1:]])

    from cowfs.cli.main import main

    sys.exit(main())
