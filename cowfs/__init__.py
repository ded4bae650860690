"""cowfs: a copy-on-write overlay filesystem in userspace.

The layers of the package, each importing only from those below it (import-linter checks it):

    cli             one module per subcommand
    assemble        options -> layers + store + Overlay + mount
    fuse | changes  the FUSE adapter and its request loop | reading what has changed
    store           the writable store: header, lock, create, grow, check
    overlay         the union itself
    layers          what a union is made of
    formats         bytes -> objects: image formats read (and written) in-process
    linux           raw system calls
    errors | types  exceptions with exit codes | plain data

pyfuse3 and trio are imported in ``fuse`` alone. Everything below ``fuse`` is synchronous.
"""


def __getattr__(name: str) -> str:
    """Find out the version when it is asked for: nothing else is imported with the package (see __main__)."""
    if name != "__version__":
        raise AttributeError(name)
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("cowfs")
    except PackageNotFoundError:  # run from a source tree that was not installed
        found = "0"
    globals()[name] = found
    return found
