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
# disk of a system that sleeps), ro, or rw.
mount_carrier() {
    mkdir -p "$disks/$1"
    # What a filesystem is no good as, its driver would complain of on the console.
    printk=$COWFS_PROC/sys/kernel/printk
    level=$(fact "$printk" | cut -f 1)
    echo 1 >"$printk"
    # What has a journal to replay, and cannot be written to, can be looked at all the same.
    mount_as_any "$1" "$2" || { [ "$2" = ro ] && mount_as_any "$1" look; }
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

# Whether something is mounted at $1; with $2: rw or ro, as the kernel has it, whatever was asked for.
is_mounted() { grep -q "^[^ ]* $1 [^ ]* ${2-}" "$COWFS_PROC/mounts"; }

# --- the root image

# Sets image_device and image_file. The removable ones come first: who plugs in a stick means it.
find_image() {
    waited=0 seen=''
    while :; do
        found="$(devices removable) $(devices all)"
        for device in $found; do
            [ "$found" != "$seen" ] || break # nothing new, so nothing to look at again
            mount_carrier "$device" look || continue
            if [ -f "$disks/$device$subdir$image" ]; then
                image_device=$device image_file=$disks/$device$subdir$image
                # Now it may replay its journal: it may have to become writable, for the store.
                unmount_carrier "$device" && mount_carrier "$device" ro || return
                say "root image: $subdir$image on $device"
                return
            fi
            unmount_carrier "$device"
        done
        seen=$found
        [ $waited -lt 60 ] || return
        [ $waited != 5 ] || say "waiting for a disk with the root image $subdir$image"
        sleep 1
        waited=$((waited + 1))
    done
}

# --- the store

# Sets the devices with a file of the right name, in the order of devices(), but the one of the root image first:
# candidates, and on_read_only_media. $1: the path.
find_candidates() {
    found=$(devices "$scope")
    [ "$found" != "$seen" ] || return 0 # nothing new, so nothing to look at again
    seen=$found candidates='' on_read_only_media=''
    for device in $(image_device_first); do
        if [ "$device" = "$image_device" ]; then
            is_candidate "$device" "$1" && note_candidate "$device"
        elif [ ! -e "$COWFS_SYS/block/$device/$image_device" ] && mount_carrier "$device" look; then
            is_candidate "$device" "$1" && note_candidate "$device"
            unmount_carrier "$device"
        fi
    done
}

image_device_first() {
    for device in $found; do [ "$device" != "$image_device" ] || echo "$device"; done
    for device in $found; do [ "$device" = "$image_device" ] || echo "$device"; done
}

note_candidate() {
    if is_read_only_media "$1"; then
        on_read_only_media="$on_read_only_media $1"
    else
        candidates="$candidates $1"
    fi
}

# Whether the carrier $1, which is mounted, can never be written to.
is_read_only_media() {
    [ "$(fact "$COWFS_SYS/class/block/$1/ro")" = 1 ] ||
        grep -qE "^[^ ]* $disks/$1 (iso9660|udf|squashfs) " "$COWFS_PROC/mounts"
}

# Whether there is something by the path $2 on the carrier $1; a name that is there and no use is told of.
is_candidate() {
    place=$disks/$1$2
    if [ -L "$place" ]; then
        warn "$2 on $1 is a symbolic link, not a store: not used"
    elif [ -d "$place" ]; then
        warn "$2 on $1 is a directory, not a store: not used"
    elif [ -f "$place" ]; then
        return 0
    fi
    return 1
}

# Look until there is a candidate that can be written to, or the patience is over. $1: the path.
wait_for_candidates() {
    waited=0 seen=none
    while :; do
        find_candidates "$1"
        [ -z "$candidates" ] || return 0
        if [ $waited -ge "$patience" ] && { [ $waited -ge 30 ] || ! disk_is_coming; }; then
            [ -n "$on_read_only_media" ]
            return
        fi
        [ $waited != 1 ] || say "waiting for a disk with the store $1"
        sleep 1
        waited=$((waited + 1))
    done
}

# Make the carrier $1 writable if it can be; sets store_mode: rw or ro.
open_carrier() {
    store_mode=rw
    if is_mounted "$disks/$1"; then
        mount -o remount,rw,noatime "$disks/$1" 2>/dev/null &&
            mount -o remount,bind,rw "$world$disks/$1"
    elif ! mount_carrier "$1" rw; then
        mount_carrier "$1" ro || return
    fi
    is_mounted "$disks/$1" rw || store_mode=ro
    is_mounted "$world$disks/$1" || bind_into_world "$disks/$1"
}

close_carrier() {
    if [ "$1" = "$image_device" ]; then
        mount -o remount,ro "$disks/$1" 2>/dev/null
    else
        umount "$world$disks/$1" && unmount_carrier "$1"
    fi 2>/dev/null
}

# Try the candidates one by one; the first that cowfs accepts becomes the root. What can be written to comes
# first, and may stand on what cannot. $1: the path.
use_store() {
    path=$1
    wait_for_candidates "$path" || {
        tell_missing "$path"
        return 1
    }
    for device in $on_read_only_media; do
        open_carrier "$device" && below="$below--below$newline$disks/$device$path$newline"
    done
    # shellcheck disable=SC2086 # one word each
    set -- $candidates $on_read_only_media
    [ $# = 1 ] || say "stores on $*: the first one is tried first"
    for device; do
        shift
        open_carrier "$device" || continue
        [ $store_mode = rw ] || warn "$path on $device cannot be written to (read-only media): changes are kept in memory"
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
    for device; do
        grep -qF "stands on $disks/$device$path" "$top/refused" && continue
        close_carrier "$device"
        unused="$unused $device"
    done
    [ -z "$unused" ] || warn "several stores: $path on $used is used, those on$unused are not"
}

tell_missing() {
    if [ -n "$named" ]; then
        warn "no disk that was looked at has the store $1 (backstore=alldev looks at all of them)"
    else
        say "no store ($1) was found on a disk"
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

# Start cowfs on the store $1 (or: memory), $2 rw or ro; returns when the root answers, or why not.
serve() {
    rm -f "$top/refused"
    set -- --image "$image_file" --store "$1" --mode "$2" --engine "$engine" --mountpoint "$top/root" \
        --show-store "$top/store" --show-below "$top/below" --log /run/log --pid-file /run/pid
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
    [ "$scope" = off ] || use_store "$subdir${named:-/sysrcd.bs}"
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
