#!/bin/sh
# dracut, cmdline: with boot=cowfs, there is no device to wait for.
#
# root=cowfs does not work if systemd is in the initramfs, which would try to mount that.

# shellcheck disable=SC2154,SC2034 # dracut uses root and rootok
if [ "$(getarg boot=)" = cowfs ] || [ "$root" = cowfs ]; then
    root=cowfs
    rootok=1
fi
