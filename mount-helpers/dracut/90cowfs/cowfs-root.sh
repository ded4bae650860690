#!/bin/sh
# dracut, cmdline: boot=cowfs is for us, and there is no device to wait for.
#
# Not root=cowfs, where systemd is in the initramfs: it would try to mount that itself.

# shellcheck disable=SC2154,SC2034 # root and rootok are dracut's
if [ "$(getarg boot=)" = cowfs ] || [ "$root" = cowfs ]; then
    root=cowfs
    rootok=1
fi
