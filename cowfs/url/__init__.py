"""Reading images by URL, without a download first: bytes of a file on a server.

The modules, each importing only from those above it::

    names        what is a URL, and how it is written among other lowers
    settings     how files on servers are read
    waiting      who must not wait, and what is raised where they would have to
    protocol     what the process that fetches and the one that it fetches for say to each other
    http         a file on a web server, by ranges
    by_fsspec    a file that the Python package fsspec knows how to read
    fetcher      the process that fetches: unprivileged, it may hang or die
    link         the other end: asks it, and asks again
    disk_cache   blocks on the disk, with a checksum each, for all mounts of a user's
    remote       the bytes of one file: blocks in memory, on disk or fetched, and ahead of who reads on
    opened       the files that are open, each once

docs/adr/0062-roots-by-url.md says why it is so.
"""
