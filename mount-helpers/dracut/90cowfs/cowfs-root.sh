#!/bin/sh
# dracut, cmdline: root=cowfs is for us, and there is no device to wait for.

# shellcheck disable=SC2154,SC2034 # root and rootok are dracut's
if [ "$root" = cowfs ]; then
    rootok=1
fi
