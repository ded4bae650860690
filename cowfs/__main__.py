"""``python -m cowfs``: the command. Root's Python is isolated: it imports nothing of the caller's."""

import os
import sys

if __name__ == "__main__":
    if os.geteuid() == 0 and not sys.flags.isolated:
        # Before anything else is imported: the current directory and PYTHONPATH are searched first.
        os.execv(sys.executable, [sys.executable, "-I", "-m", "cowfs", *sys.argv[1:]])

    from cowfs.cli.main import main

    sys.exit(main())
