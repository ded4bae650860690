"""cowfs: a copy-on-write overlay filesystem in userspace.

The layers of the package, each importing only from those below it (import-linter checks it):

    cli             one module per subcommand; the daemon of a root filesystem
    trio_api | pytest_plugin  mounting under trio | for tests under pytest
    api             the Python API, of mounted_tree, opened_changes, backups and others
    client | serve  talks to the daemon of a mount over its control socket | answers in the daemon
    command         the command, run by other programs
    mountpoint      where a union may be mounted
    union           options -> layers + store + Overlay
    exports         what has changed, in the formats of other programs
    fuse | changes  the FUSE adapter and its request loop | reading what has changed
    store           the writable store: header, lock, create, grow, check
    overlay         the union itself
    layers          what a union is made of
    formats         bytes -> objects: image formats read (and written) in-process
    linux           raw system calls
    errors | types  exceptions with exit codes | plain data

pyfuse3 is imported in ``fuse`` alone, trio there and in ``trio_api``. Everything below ``fuse`` is
synchronous.
"""

TYPE_CHECKING = False  # not imported: root's Python may not be isolated yet (see __main__)
if TYPE_CHECKING:
    __version__: str
    from cowfs.api import mount as mount
    from cowfs.api import warm as warm
    from cowfs.trio_api import mount_async as mount_async

_ELSEWHERE = {"mount": "cowfs.api", "mount_async": "cowfs.trio_api", "warm": "cowfs.command"}


def __getattr__(name: str) -> object:
    """Import what is asked for on first use: importing the package alone loads nothing else."""
    found: object
    if name in _ELSEWHERE:
        from importlib import import_module

        found = getattr(import_module(_ELSEWHERE[name]), name)
    elif name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            found = version("cowfs")
        except PackageNotFoundError:  # run from a source tree that was not installed
            found = "0"
    else:
        raise AttributeError(name)
    globals()[name] = found
    return found
