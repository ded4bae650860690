"""Reading squashfs images, versions 2.0 to 4.0, in-process: bytes -> objects, nothing is ever written.

The modules, each importing only from those above it::

    errors       what a damaged image answers with
    cache        bounded caches: metadata, listings, data blocks
    workers      threads that decompress
    source       bounded reads (pread) of the image file
    recognise    what a file that is no squashfs is instead
    superblock   the first bytes
    codecs       gzip xz zstd lz4 lzma lzo: bytes -> bytes, capped
    metadata     metadata blocks, and the tables made of them
    inodes       a reference -> an Inode
    directory    a listing -> {name: reference}; the directory index
    old          inodes and listings of versions 2 and 3
    xattrs       extended attributes
    blocks       where the data of a file is: block list, fragments
    data         reading a file: block cache, readahead, runs for copying
    copy         a whole file out of the image, decompressed by several threads
    image        Image: all of it behind one face
    summary      what `unsquashfs -s` shows

The format is described in the kernel's Documentation/filesystems/squashfs.rst, in its
fs/squashfs/squashfs_fs.h, and in the squashfs-tools-ng project's doc/format.adoc (the format
document begun by dr-emann). Where these leave something open, the kernel's reader decides.

An image is untrusted: it may have been made to hurt. docs/squashfs.md lists what bounds it.
"""
