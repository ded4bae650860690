"""The writable store: opened by :func:`cowfs.store.open.open_store`.

    open                    image | directory | memory: what a store may be
    store                   the open store: its layer, its directories, its header
    create grow check info  what can be done to one that is not open
    layout header lock      what stands at its root, what it tells about itself, who has it
    identity                what a lower is recognised by
    superblock sniff        is this file a store, and if not, what is it
    tools signals           running e2fsprogs
    sizes                   read and write sizes, is there room for one

Nothing here is imported by the package itself.
"""
