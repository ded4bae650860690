"""``python -m cowfs``: the command. Root's Python runs isolated: it imports nothing from the caller's
directories.
"""

# Built in: nobody can put another in its place.
import _signal as signal  # type: ignore[import-not-found]
import os
import sys

if __name__ == "__main__":
    # Until the command can answer a Ctrl-C it ends this process, without a traceback; bin/cowfs has it wait.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    if os.geteuid() == 0 and not sys.flags.isolated:
        # Before any other import: the current directory and PYTHONPATH would be searched first.
        os.execv(sys.executable, [sys.executable, "-I", "-m", "cowfs", *sys.argv[1:]])

    from cowfs.cli.main import main

    sys.exit(main())
