#!/bin/sh
# dracut, mount: mount the root filesystem of root=cowfs.

# shellcheck disable=SC2154 # root and NEWROOT are dracut's
if [ "$root" = cowfs ] && ! ismounted "$NEWROOT"; then
    /usr/lib/cowfs/busybox xargs -n 1 modprobe -q </usr/lib/cowfs/modules
    /usr/lib/cowfs/busybox sh /usr/lib/cowfs/mount-root "$NEWROOT" || die 'cowfs: there is no root filesystem'
fi
