# shellcheck shell=dash
# shellcheck disable=SC2154 # read_options sets scope and the others
# The second half of the boot library: find the root image and its store, and mount both with cowfs as the root.
#
# For busybox's ash. It only defines functions. mount-root reads it after cowfs-options.sh. During the boot, and as long
# as the system runs, everything is below $top:
#
#   disk/NAME/    the disks: filesystems that contain the image or the store
#   view/         the root image, mounted by the kernel: the lower
#   store/        the filesystem of the store, if it has one
#   below/        in world/: the filesystems of stores on read-only media that are layers below the store
#   world/        the daemon's root: the image again, with /dev, /proc, /sys and the directories above in it
#   log           all messages
#   daemon.pid    the PID of the daemon

: "${top:?cowfs-options.sh comes first}"
disks=$top/disk
newline='
'
below='' # arguments of root-daemon for the stores on read-only media, one per line: they may contain spaces

# --- disks

# Mount the device $1 at $disks/$1. $2: look (read-only, without replaying a journal: the disk may belong to a
# hibernated system), ro, or rw. Sets mounted_as. This is look instead of ro for a write-protected disk whose journal
# cannot be replayed, and for one disk of a RAID, because a replay must write to all of its disks.
mount_disk() {
    mkdir -p "$disks/$1"
    mounted_as=$2
    [ "$2" = look ] || ! is_raid_member "$1" || mounted_as=look
    # Keep errors off the console: drivers report filesystems of other types.
    printk=$COWFS_PROC/sys/kernel/printk
    level=$(fact "$printk" | cut -f 1)
    echo 1 >"$printk"
    # A write-protected disk whose journal needs a replay can still be mounted with look.
    mount_as_any "$1" "$mounted_as" || { [ "$mounted_as" = ro ] && mounted_as=look && mount_as_any "$1" look; }
    result=$?
    echo "${level:-7}" >"$printk"
    [ $result = 0 ] || rmdir "$disks/$1"
    return $result
}

mount_as_any() {
    for try in ext4:noload vfat:utf8 exfat:iocharset=utf8 ntfs3:iocharset=utf8 iso9660:utf8 udf:utf8 \
        btrfs:rescue=nologreplay xfs:norecovery; do
        type=${try%%:*} options=${try#*:}
        case $type:$2 in
        vfat:* | exfat:* | ntfs3:* | iso9660:* | udf:*) options=,$options ;; # the encoding of names
        *:look) options=,$options ;;
        *) options='' ;;
        esac
        case $2 in
        rw) mode=rw ;;
        *) mode=ro ;;
        esac
        mount -t "$type" -o "$mode,noatime$options" "$(node "$1")" "$disks/$1" 2>/dev/null && return
    done
    return 1
}

unmount_disk() { umount "$disks/$1" && rmdir "$disks/$1"; }

# Report the contents of disks that could not be mounted, with $1: say or warn. Leave out swap, members of RAIDs and
# volume groups, and disks that are empty or only have partitions.
report_unreadable() {
    for device in $unreadable; do
        place=$(facts_of "$device")
        [ -e "$place" ] || continue # removed meanwhile
        divided=''
        for part in "$place/$device"*; do [ ! -e "$part/partition" ] || divided=yes; done
        [ -z "$divided" ] || continue
        type=$(type_of "$device")
        case $type in
        nothing | swap | *_member) ;;
        crypto_LUKS) [ -z "$named" ] || "$1" "$device is encrypted (LUKS): it must be opened first" ;;
        error) "$1" "$device cannot be read: no disk is in it, or it is damaged" ;;
        unknown) [ "$(fact "$place/size")" -lt 32768 ] || "$1" "$device has no known filesystem" ;;
        *)
            driver=$type
            [ "$type" != ntfs ] || driver=ntfs3
            if grep -qw "$driver" "$COWFS_PROC/filesystems"; then
                "$1" "$device ($type) cannot be mounted: its filesystem is damaged"
            else
                "$1" "$device ($type) cannot be read by this kernel"
            fi
            ;;
        esac
    done
}

# Whether a filesystem is mounted at $1; with $2 (rw or ro): whether the kernel mounted it so.
is_mounted() { grep -q "^[^ ]* $1 [^ ]* ${2-}" "$COWFS_PROC/mounts"; }

# --- the root image

# Set image_device, image_file, and image_mode: ro, or look if the disk must not become writable. Removable disks come
# first, because a stick is plugged in on purpose. Add devices that cannot be mounted to unreadable.
find_image() {
    waited=0 seen='' unreadable=''
    while :; do
        look_into_drives
        now=$(disks_now)
        # Examine the disks again when they have changed, and every ten seconds, because a disk may be slow.
        if [ "$now" != "$seen" ] || [ $((waited % 10)) = 9 ]; then
            seen=$now unreadable='' looked_at=' '
            for device in $(devices removable) $(devices all); do
                case $looked_at in
                *" $device "*) continue ;;
                esac
                looked_at="$looked_at$device "
                has_image "$device" && return
            done
        fi
        [ $waited -lt 60 ] || return
        [ $waited != 5 ] || say "waiting for a disk with the root image $subdir$image"
        sleep 1
        waited=$((waited + 1))
    done
}

has_image() {
    mount_disk "$1" look || {
        unreadable="$unreadable $1"
        return 1
    }
    place=$disks/$1$subdir$image
    [ -f "$place" ] && found=yes || found=''
    unmount_disk "$1"
    # Now the journal may be replayed: the disk may have to become writable, for the store.
    [ -n "$found" ] && mount_disk "$1" ro && [ -f "$place" ] || return
    image_device=$1 image_file=$place image_mode=$mounted_as
    say "root image: $subdir$image on $1"
}

# --- the store

# Try the files $path, disk by disk as they appear. The first store that cowfs accepts is used.
use_store() {
    begin_search
    while wait_for_candidates; do
        try_candidates && return
    done
    [ "$tried" != ' ' ] || report_missing
    return 1
}

begin_search() { waited=0 seen=none tried=' '; }

# Search until there is a writable candidate, or $patience has passed. If a disk has not appeared yet, always wait some
# seconds for it, because it may have a candidate that comes first.
wait_for_candidates() {
    candidates='' on_read_only_media=''
    while :; do
        find_candidates
        if [ -n "$candidates" ]; then
            { [ "$waited" -lt 5 ] && [ "$waited" -lt "$patience" ] && disk_is_coming; } || return 0
        elif [ "$waited" -ge "$patience" ] && { [ "$waited" -ge 30 ] || ! disk_is_coming; }; then
            [ -n "$on_read_only_media" ]
            return
        fi
        [ "$waited" != 1 ] || [ -n "$candidates" ] || say "waiting for a disk with the store $path"
        sleep 1
        waited=$((waited + 1))
    done
}

# Set candidates and on_read_only_media to the devices with the file $path that were not tried yet, in the order of
# devices(), but that of the root image first.
find_candidates() {
    look_into_drives
    now=$(disks_now)
    [ "$now" != "$seen" ] || [ $((waited % 10)) = 9 ] || return 0 # as in find_image
    seen=$now candidates='' on_read_only_media='' unreadable=''
    for device in $(image_device_first); do
        case $tried in
        *" $device "*) continue ;;
        esac
        if [ "$device" = "$image_device" ]; then
            note_candidate "$device"
        elif has_part_in "$device" "$image_device $candidates $on_read_only_media $tried"; then
            continue
        elif mount_disk "$device" look; then
            note_candidate "$device"
            unmount_disk "$device"
        else
            unreadable="$unreadable $device"
        fi
    done
}

image_device_first() {
    found=$(devices "$scope")
    for device in $found; do [ "$device" != "$image_device" ] || echo "$device"; done
    for device in $found; do [ "$device" = "$image_device" ] || echo "$device"; done
}

# Whether one of the devices $2 is a partition of the disk $1.
has_part_in() {
    for part in $2; do
        [ ! -e "$COWFS_SYS/block/$1/$part" ] || return 0
    done
    return 1
}

# Add the mounted device $1 to the candidates if it has the file $path; warn if this cannot be a store.
note_candidate() {
    place=$disks/$1$path
    if [ -L "$place" ]; then
        warn "$path on $1 is a symbolic link, not a store: not used"
    elif [ -d "$place" ]; then
        warn "$path on $1 is a directory, not a store: not used"
    elif [ ! -f "$place" ]; then
        :
    elif cannot_be_written "$1"; then
        on_read_only_media="$on_read_only_media $1"
    else
        candidates="$candidates $1"
    fi
}

# Whether the mounted device $1 is never written to.
cannot_be_written() {
    [ "$(fact "$(facts_of "$1")/ro")" = 1 ] || is_raid_member "$1" ||
        grep -qE "^[^ ]* $disks/$1 (iso9660|udf|squashfs) " "$COWFS_PROC/mounts"
}

# Make the device $1 writable if possible. Set store_mode to rw or ro, and for ro, why to the reason.
open_disk() {
    store_mode=rw why='read-only media'
    if is_mounted "$disks/$1"; then
        [ "$1" != "$image_device" ] || [ "$image_mode" = look ] ||
            { mount -o remount,rw,noatime "$disks/$1" && mount -o remount,bind,rw "$world$disks/$1"; } 2>/dev/null
    elif ! mount_disk "$1" rw && ! mount_disk "$1" ro; then
        warn "$1 cannot be mounted any more: the store on it is not used"
        return 1
    fi
    is_mounted "$world$disks/$1" || bind_into_world "$disks/$1"
    is_mounted "$disks/$1" rw && return
    store_mode=ro
    ! is_raid_member "$1" || why='one disk of a RAID'
}

close_disk() {
    if [ "$1" = "$image_device" ]; then
        mount -o remount,ro "$disks/$1" 2>/dev/null
    else
        umount "$world$disks/$1" && unmount_disk "$1"
    fi 2>/dev/null
}

# Try the writable stores first. They may be based on stores on read-only media.
try_candidates() {
    below=''
    for device in $on_read_only_media; do
        open_disk "$device" && below="$below--below$newline$disks/$device$path$newline"
    done
    # shellcheck disable=SC2086 # one word each
    set -- $candidates $on_read_only_media
    [ $# = 1 ] || say "stores on $*: the first one is tried first"
    for device; do
        shift
        tried="$tried$device "
        open_disk "$device" || continue
        [ $store_mode = rw ] || warn "$path on $device cannot be written to ($why): changes are kept in memory"
        if serve "$disks/$device$path" $store_mode; then
            say "store: $path on $device"
            [ $# = 0 ] || report_unused "$device" "$@"
            return 0
        fi
        warn "the store $path on $device is not used: $(tail -n 1 "$top/refused" 2>/dev/null)"
        close_disk "$device"
    done
    return 1
}

# The store on $1 is used. Close the disks of the others, except those that are layers below it, and report them.
report_unused() {
    used=$1 unused=''
    shift
    for other; do
        grep -qF "is based on $disks/$other$path" "$top/refused" && continue
        close_disk "$other"
        unused="$unused $other"
    done
    [ -z "$unused" ] || warn "several stores: $path on $used is used, those on$unused are not"
}

report_missing() {
    hint=''
    [ "$scope" = all ] || hint=' (backstore=alldev looks at all of them)'
    if [ -n "$named" ]; then
        warn "no disk that was looked at has the store $path$hint"
        report_unreadable warn
    else
        say "no store ($path) was found on a disk"
        report_unreadable say
    fi
}

# --- the daemon

# Mount the root image, and make the daemon's root from it. So the daemon never looks up a file below its own mount.
make_world() {
    world=$top/world
    mkdir -p "$top/view" "$top/store" "$top/root" "$world"
    mount -t squashfs -o loop,ro "$image_file" "$top/view" || {
        say "the root image $image_file cannot be mounted"
        return 1
    }
    mount -o bind "$top/view" "$world"
    for needed in dev proc sys run tmp usr/lib/cowfs; do
        [ -d "$world/$needed" ] && continue
        say "the root image has no /$needed (mkrescue installs everything needed for booting)"
        return 1
    done
    mount -o bind "$COWFS_DEV" "$world/dev"
    mount -t proc -o nosuid,noexec,nodev proc "$world/proc"
    mount -t sysfs -o nosuid,noexec,nodev,ro sysfs "$world/sys"
    mount -t tmpfs -o mode=755,size=16m cowfs-run "$world/run"
    mount -t tmpfs -o mode=1777,size=16m cowfs-tmp "$world/tmp"
    mkdir -p "$world$top/root" "$world$top/store" "$world$top/below"
    bind_into_world "$disks/$image_device"
}

bind_into_world() { # at the same path, so that paths in cowfs's messages are valid in the whole system
    mkdir -p "$world$1"
    mount -o bind "$1" "$world$1"
}

# Allow FUSE over io_uring (Linux 6.14), unless the kernel command line has a setting for it.
offer_io_uring() {
    case " $(tr '\n' ' ' <"$COWFS_PROC/cmdline") " in *" fuse.enable_uring="*) return ;; esac
    switch=$COWFS_SYS/module/fuse/parameters/enable_uring
    [ ! -e "$switch" ] || echo Y >"$switch"
}

# Start cowfs on the store $1 (or: memory), $2: rw or ro. Returns when the root answers, or fails, with the reason in
# $top/refused.
serve() {
    rm -f "$top/refused"
    offer_io_uring
    set -- --image "$image_file" --store "$1" --mode "$2" --engine "$engine" --mountpoint "$top/root" \
        --show-store "$top/store" --show-below "$top/below" --log /run/log --pid-file /run/pid
    [ -z "$volatile" ] || set -- "$@" --volatile "$volatile"
    [ -z "$system" ] || set -- "$@" --subdir "$system"
    set -f
    IFS=$newline
    # shellcheck disable=SC2086 # a line is a word
    set -- "$@" $below
    unset IFS
    set +f
    chroot "$world" /usr/lib/cowfs/root-daemon "$@" </dev/null 2>"$top/refused" && cp "$world/run/pid" "$top/daemon.pid" && {
        while IFS= read -r line; do
            case $line in
            WARNING:*) warn "${line#WARNING: }" ;;
            *) say "$line" ;;
            esac
        done <"$top/refused"
        return 0
    }
    sed -i 's/^cowfs: //' "$top/refused"
    [ -s "$top/refused" ] || echo 'cowfs could not be started' >"$top/refused"
    return 1
}

# --- the whole boot

# Mount the root filesystem at $1. Fails, with a message, if the boot must not continue.
make_root() {
    mkdir -p "$disks"
    read_options
    find_image
    if [ -z "${image_file-}" ]; then
        report_unreadable say
        say "FAILED: no disk has the root image $subdir$image"
        return 1
    fi
    make_world || return
    until with_store; do
        case $fallback in
        fail)
            say 'FAILED: no store, and backstore.fallback=fail: this system does not start without it'
            return 1
            ;;
        shell)
            say 'starting a shell to fix this; exit: search for the store again; exit 1: continue, with changes in memory'
            if sh </dev/console >/dev/console 2>&1; then
                rm -f "$COWFS_RUN/motd.d/cowfs" # everything is tried again
            else
                fallback=ram
            fi
            ;;
        esac
        [ "$fallback" != ram ] || break
    done
    if [ ! -e "$top/daemon.pid" ]; then
        if [ "$scope" = off ]; then
            say 'changes are kept in memory (backstore=off)'
        else
            warn 'changes are kept in memory, and lost when the system ends'
        fi
        serve memory rw || {
            say "FAILED: $(cat "$top/refused")"
            return 1
        }
    fi
    hand_over "$1" || return
    tell_kernel "$1" "$top/view"
}

with_store() {
    path=$subdir${named:-/sysrcd.bs}
    [ "$scope" = off ] || use_store
}

# Mount the root and the store where the system expects them, and prepare the shutdown.
hand_over() {
    mount -o bind "$world$top/root" "$1" || return
    if [ -n "$(ls "$world$top/store")" ]; then
        mount -o bind "$world$top/store" "$top/store"
        if [ -d "$1/mnt/memory" ]; then # read-only: nobody may change the store while cowfs uses it
            mount -o bind "$top/store" "$1/mnt/memory" && mount -o remount,bind,ro "$1/mnt/memory"
        fi
    fi
    # sysvinit must not kill the daemon. (systemd recognises it by its name, which begins with @.)
    mkdir -p "$COWFS_RUN/sendsigs.omit.d" && cp "$top/daemon.pid" "$COWFS_RUN/sendsigs.omit.d/cowfs"
}

# --- a kernel in the store

# Warn of a kernel that an upgrade wrote into the store, where no boot loader reads it, and of missing modules of the
# running kernel. $1: the root, $2: the root image.
tell_kernel() {
    running=$(fact "$COWFS_PROC/sys/kernel/osrelease")
    started=$(command_line | sed -n 's/^BOOT_IMAGE=//p' | tail -n 1) # from GRUB or SYSLINUX
    started=$(printf '%s\n' "${started##*)}" | sed 's|^/*||')
    carrier=''
    for disk in "$disks"/*; do
        [ -z "$started" ] || [ ! -f "$disk/$started" ] || carrier=$disk/$started
    done
    over=${carrier:+ over ${carrier#"$disks/"}}
    newest=$(for one in "$1"/boot/vmlinuz-*; do [ ! -f "$one" ] || echo "${one##*/vmlinuz-}"; done | sort -V | tail -n 1)
    kernel=/boot/vmlinuz-$running
    if [ -n "$newest" ] && [ "$newest" != "$running" ] && [ ! -e "$2/boot/vmlinuz-$newest" ] &&
        [ "$(printf '%s\n' "$running" "$newest" | sort -V | tail -n 1)" = "$newest" ]; then
        warn "the system has the kernel $newest, and $running was started: copy /boot/vmlinuz-$newest$over," \
            'and its initramfs'
    elif [ -n "$carrier" ] && is_other_file "$1$kernel" "$2$kernel" && ! cmp -s "$carrier" "$1$kernel"; then
        warn "the system has a newer build of the kernel $running than was started: copy $kernel$over, and its initramfs"
    fi
    others=''
    for one in "$1"/lib/modules/*; do [ ! -d "$one" ] || others="$others ${one##*/}"; done
    [ ! -d "$2/lib/modules/$running" ] || [ -d "$1/lib/modules/$running" ] ||
        warn "the modules of the running kernel $running were removed: hardware may not work until one of these is started:$others"
}

# Whether $1 is there, and is not the file $2 of the image.
is_other_file() {
    [ -f "$1" ] && [ "$(stat -c '%s %Y' "$1")" != "$(stat -c '%s %Y' "$2" 2>/dev/null)" ]
}
