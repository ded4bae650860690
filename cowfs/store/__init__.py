"""The writable store: opened by :func:`cowfs.store.served.open.open_store`.

    disks       find stores on block devices
    offline     create, grow, check, describe, copy, convert and persist a store
    served      the store of a mount: open it as image, directory or memory; its lock; space on its disk
    e2fsprogs   run mke2fs, e2fsck and resize2fs
    format      the format of a store on disk: header, layout, mark, checkpoints; identities of lowers

Each imports only from those below it. This module imports nothing.
"""
