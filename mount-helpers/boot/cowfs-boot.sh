# shellcheck shell=dash
# shellcheck disable=SC2154 # scope and the others are set by read_options
# The boot library of cowfs: find the root image and its store, and have cowfs serve both as one root.
#
# For busybox's ash. mount-root uses it, after cowfs-options.sh; nothing happens when it is read.
# On the way, and for as long as the system runs, everything is below $top:
#
#   disk/NAME/    the carriers: filesystems that hold the image or the store
#   view/         the root image, mounted by the kernel: the lower, as it is
#   store/        the filesystem of the store, if it has one
#   below/        in world/: those of stores on read-only media that the store stands on
#   world/        the daemon's root: the image again, with /dev, /proc, /sys and the places above in it
#   log           what was said
#   daemon.pid    the daemon's process

: "${top:?cowfs-options.sh comes first}"
disks=$top/disk
newline='
'
below='' # what root-daemon gets for the stores on read-only media, a word a line: blanks may be in them

# --- carriers

# Mount a carrier at $disks/$1. As $2: look (read-only, and not even a journal is replayed: it may be the
# disk of a system that sleeps), ro, or rw. Sets mounted_as: look as well where ro is too much, for a journal
# that cannot be replayed on a disk with its lock set, or for one disk of a RAID, which all must be written to.
mount_carrier() {
    mkdir -p "$disks/$1"
    mounted_as=$2
    [ "$2" = look ] || ! is_raid_member "$1" || mounted_as=look
    # What a filesystem is no good as, its driver would complain of on the console.
    printk=$COWFS_PROC/sys/kernel/printk
    level=$(fact "$printk" | cut -f 1)
    echo 1 >"$printk"
    # What has a journal to replay, and cannot be written to, can be looked at all the same.
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
        vfat:* | exfat:* | ntfs3:* | iso9660:* | udf:*) options=,$options ;; # how names are written
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

unmount_carrier() { umount "$disks/$1" && rmdir "$disks/$1"; }

# Say what is on the disks that could not be mounted, with $1: say or warn. Not of those that are not meant
# to be: swap, parts of something else, and disks that are empty or only divided.
tell_unreadable() {
    for device in $unreadable; do
        place=$(facts_of "$device")
        [ -e "$place" ] || continue # it is gone
        divided=''
        for part in "$place/$device"*; do [ ! -e "$part/partition" ] || divided=yes; done
        [ -z "$divided" ] || continue
        type=$(type_of "$device")
        case $type in
        nothing | swap | *_member) ;;
        crypto_LUKS) [ -z "$named" ] || "$1" "$device is encrypted (LUKS): it must be opened first" ;;
        error) "$1" "$device cannot be read: no disk is in it, or it is damaged" ;;
        unknown) [ "$(fact "$place/size")" -lt 32768 ] || "$1" "$device holds nothing that is known here" ;;
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

# Whether something is mounted at $1; with $2: rw or ro, as the kernel has it, whatever was asked for.
is_mounted() { grep -q "^[^ ]* $1 [^ ]* ${2-}" "$COWFS_PROC/mounts"; }

# --- the root image

# Sets image_device, image_file, and image_mode: ro, or look if it must not become writable. The removable
# ones come first: who plugs in a stick means it. Those that cannot be mounted are in unreadable.
find_image() {
    waited=0 seen='' unreadable=''
    while :; do
        look_into_drives
        now=$(disks_now)
        # Nothing new, so nothing to look at again; but now and then, as a disk may take its time.
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
    mount_carrier "$1" look || {
        unreadable="$unreadable $1"
        return 1
    }
    place=$disks/$1$subdir$image
    [ -f "$place" ] && found=yes || found=''
    unmount_carrier "$1"
    # Now it may replay its journal: it may have to become writable, for the store.
    [ -n "$found" ] && mount_carrier "$1" ro && [ -f "$place" ] || return
    image_device=$1 image_file=$place image_mode=$mounted_as
    say "root image: $subdir$image on $1"
}

# --- the store

# Try what has the right name, $path, disk by disk, as they come; the first that cowfs accepts becomes the root.
use_store() {
    begin_search
    while wait_for_candidates; do
        try_candidates && return
    done
    [ "$tried" != ' ' ] || tell_missing
    return 1
}

begin_search() { waited=0 seen=none tried=' '; }

# Look until there is a candidate that can be written to, or the patience is over. A disk that is on its way may
# have one that comes first: for some seconds it is waited for in any case.
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

# Sets the devices with a file of the right name that were not tried yet, in the order of devices(), but the one
# of the root image first: candidates, and on_read_only_media.
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
        elif mount_carrier "$device" look; then
            note_candidate "$device"
            unmount_carrier "$device"
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

# Whether one of the devices $2 is a part of the disk $1.
has_part_in() {
    for part in $2; do
        [ ! -e "$COWFS_SYS/block/$1/$part" ] || return 0
    done
    return 1
}

# Note what is on the carrier $1, which is mounted, under the right name; one that is no use is told of.
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

# Whether the carrier $1, which is mounted, is one that is never written to.
cannot_be_written() {
    [ "$(fact "$(facts_of "$1")/ro")" = 1 ] || is_raid_member "$1" ||
        grep -qE "^[^ ]* $disks/$1 (iso9660|udf|squashfs) " "$COWFS_PROC/mounts"
}

# Make the carrier $1 writable if it can be; sets store_mode, rw or ro, and for ro why.
open_carrier() {
    store_mode=rw why='read-only media'
    if is_mounted "$disks/$1"; then
        [ "$1" != "$image_device" ] || [ "$image_mode" = look ] ||
            { mount -o remount,rw,noatime "$disks/$1" && mount -o remount,bind,rw "$world$disks/$1"; } 2>/dev/null
    elif ! mount_carrier "$1" rw && ! mount_carrier "$1" ro; then
        warn "$1 cannot be mounted any more: the store on it is not used"
        return 1
    fi
    is_mounted "$world$disks/$1" || bind_into_world "$disks/$1"
    is_mounted "$disks/$1" rw && return
    store_mode=ro
    ! is_raid_member "$1" || why='one disk of a RAID'
}

close_carrier() {
    if [ "$1" = "$image_device" ]; then
        mount -o remount,ro "$disks/$1" 2>/dev/null
    else
        umount "$world$disks/$1" && unmount_carrier "$1"
    fi 2>/dev/null
}

# What can be written to comes first, and may stand on what cannot.
try_candidates() {
    below=''
    for device in $on_read_only_media; do
        open_carrier "$device" && below="$below--below$newline$disks/$device$path$newline"
    done
    # shellcheck disable=SC2086 # one word each
    set -- $candidates $on_read_only_media
    [ $# = 1 ] || say "stores on $*: the first one is tried first"
    for device; do
        shift
        tried="$tried$device "
        open_carrier "$device" || continue
        [ $store_mode = rw ] || warn "$path on $device cannot be written to ($why): changes are kept in memory"
        if serve "$disks/$device$path" $store_mode; then
            say "store: $path on $device"
            [ $# = 0 ] || tell_unused "$device" "$@"
            return 0
        fi
        warn "the store $path on $device is not used: $(tail -n 1 "$top/refused" 2>/dev/null)"
        close_carrier "$device"
    done
    return 1
}

# The store on $1 is used; those on the others are not, but as a layer below it.
tell_unused() {
    used=$1 unused=''
    shift
    for other; do
        grep -qF "is based on $disks/$other$path" "$top/refused" && continue
        close_carrier "$other"
        unused="$unused $other"
    done
    [ -z "$unused" ] || warn "several stores: $path on $used is used, those on$unused are not"
}

tell_missing() {
    hint=''
    [ "$scope" = all ] || hint=' (backstore=alldev looks at all of them)'
    if [ -n "$named" ]; then
        warn "no disk that was looked at has the store $path$hint"
        tell_unreadable warn
    else
        say "no store ($path) was found on a disk"
        tell_unreadable say
    fi
}

# --- the daemon

# Mount the root image, and make of it the place where the daemon lives: nothing in there is ever looked for
# below the mount that it serves.
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
        say "the root image has no /$needed (mkrescue puts into it what it takes to boot from it)"
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

bind_into_world() { # under the same name, so that what cowfs tells is true in the whole system
    mkdir -p "$world$1"
    mount -o bind "$1" "$world$1"
}

# Let the kernel (Linux 6.14) give requests by io_uring, unless its command line says whether it shall.
offer_io_uring() {
    case " $(tr '\n' ' ' <"$COWFS_PROC/cmdline") " in *" fuse.enable_uring="*) return ;; esac
    switch=$COWFS_SYS/module/fuse/parameters/enable_uring
    [ ! -e "$switch" ] || echo Y >"$switch"
}

# Start cowfs on the store $1 (or: memory), $2 rw or ro; returns when the root answers, or why not.
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

# --- all of it

# Make the root filesystem, at $1. Fails if the boot must not go on; why has been said.
make_root() {
    mkdir -p "$disks"
    read_options
    find_image
    if [ -z "${image_file-}" ]; then
        tell_unreadable say
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
            say 'A shell, to see to it. exit: look for the store again; exit 1: go on, with changes in memory'
            if sh </dev/console >/dev/console 2>&1; then
                rm -f "$COWFS_RUN/motd.d/cowfs" # whatever it was, it is tried anew
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
    hand_over "$1"
}

with_store() {
    path=$subdir${named:-/sysrcd.bs}
    [ "$scope" = off ] || use_store
}

# The root and the store appear where the system expects them; and what takes it all away at the end.
hand_over() {
    mount -o bind "$world$top/root" "$1" || return
    if [ -n "$(ls "$world$top/store")" ]; then
        mount -o bind "$world$top/store" "$top/store"
        if [ -d "$1/mnt/memory" ]; then # to look at; what cowfs has open must not change behind its back
            mount -o bind "$top/store" "$1/mnt/memory" && mount -o remount,bind,ro "$1/mnt/memory"
        fi
    fi
    # sysvinit must not kill the daemon (systemd knows it by its name, which begins with @).
    mkdir -p "$COWFS_RUN/sendsigs.omit.d" && cp "$top/daemon.pid" "$COWFS_RUN/sendsigs.omit.d/cowfs"
}
