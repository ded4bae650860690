#!/bin/bash
# dracut: the boot library of cowfs, for boot=cowfs. Not in by default: dracut --add cowfs.

check() { return 255; }

depends() { echo base; }

installkernel() {
    local modules
    mapfile -t modules </usr/lib/cowfs/modules
    hostonly='' instmods "${modules[@]}"
}

# shellcheck disable=SC2154 # moddir, initdir, systemdsystemunitdir are dracut's
install() {
    local file
    for file in busybox mount-root shutdown cowfs-options.sh cowfs-boot.sh modules; do
        inst_simple "/usr/lib/cowfs/$file"
    done
    inst_hook cmdline 30 "$moddir/cowfs-root.sh"
    inst_hook mount 50 "$moddir/cowfs-mount.sh"
}
