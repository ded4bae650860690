"""Read squashfs images of versions 2.0 to 4.0 in this process. Nothing is ever written.

The modules, each importing only from those above it::

    errors       the exceptions for a damaged image
    cache        bounded caches: metadata, listings, data blocks
    workers      threads that decompress
    source       bounded reads (pread) of the image file
    recognise    what a file is that is not a squashfs image
    superblock   the first bytes of an image
    codecs       gzip xz zstd lz4 lzma lzo: bytes -> bytes, with a limit
    metadata     metadata blocks, and the tables that consist of them
    inodes       a reference -> an Inode
    directory    a listing -> {name: reference}; the directory index
    old          inodes and listings of versions 2 and 3
    xattrs       extended attributes
    blocks       the positions of a file's data: block list, fragments
    data         reading a file: block cache, readahead, runs for copying
    copy         copying a whole file, decompressed by several threads
    image        Image: the interface of the package
    summary      the facts that `unsquashfs -s` shows

The format is described in the kernel's Documentation/filesystems/squashfs.rst, in its
fs/squashfs/squashfs_fs.h, and in the squashfs-tools-ng project's doc/format.adoc (the format
document begun by dr-emann). Where these are unclear, this package does what the kernel does.

An image is untrusted: it may be an attack. docs/squashfs.md lists the limits.
"""
