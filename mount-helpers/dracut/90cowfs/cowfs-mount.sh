#!/bin/sh
# dracut, mount: mount the root filesystem of boot=cowfs.

# shellcheck disable=SC2154 # dracut sets root and NEWROOT
if [ "$root" = cowfs ] && ! ismounted "$NEWROOT"; then
    while read -r module; do modprobe -q "$module" </dev/null 2>/dev/null; done </usr/lib/cowfs/modules
    /usr/lib/cowfs/busybox sh /usr/lib/cowfs/mount-root "$NEWROOT" || die 'cowfs: there is no root filesystem'
fi
