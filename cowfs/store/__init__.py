"""The writable store: opened by :func:`cowfs.store.served.open.open_store`.

    disks       find stores on block devices
    offline     create, grow, check, describe and keep a store
    served      the store of a mount: open it as image, directory or memory; its lock; room on its disk
    e2fsprogs   run mke2fs, e2fsck and resize2fs
    format      what a store looks like on disk: header, layout, mark, checkpoints; identities of lowers

Each imports only those below it. Nothing here is imported by the package itself.
"""
