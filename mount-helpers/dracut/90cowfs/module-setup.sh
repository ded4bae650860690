#!/bin/bash
# dracut: add the boot library of cowfs, for boot=cowfs. It is not included by default: dracut --add cowfs.

check() { return 255; }

depends() { echo base; }

installkernel() {
    local modules
    mapfile -t modules </usr/lib/cowfs/modules
    hostonly='' instmods "${modules[@]}"
}

# shellcheck disable=SC2154 # dracut sets moddir, initdir, systemdsystemunitdir
install() {
    local file
    for file in busybox mount-root shutdown cowfs-options.sh cowfs-boot.sh modules; do
        inst_simple "/usr/lib/cowfs/$file"
    done
    inst_hook cmdline 30 "$moddir/cowfs-root.sh"
    inst_hook mount 50 "$moddir/cowfs-mount.sh"
}
