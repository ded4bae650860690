# shellcheck shell=dash
# shellcheck disable=SC2034 # cowfs-boot.sh uses the variables that read_options sets
# The first half of the boot library (see cowfs-boot.sh): read the options, find the devices and recognise their
# contents.
#
# For busybox's ash. It only defines functions. Tests set COWFS_SYS, COWFS_DEV, COWFS_PROC and COWFS_RUN to other
# directories.

: "${COWFS_SYS:=/sys}" "${COWFS_DEV:=/dev}" "${COWFS_PROC:=/proc}" "${COWFS_RUN:=/run}"
top=$COWFS_RUN/initramfs/cowfs

# --- messages

# Write a message to the console, at any log level; to the kernel's log, at a level that is not shown again; to a file.
say() {
    said=$(harmless "$*")
    printf 'cowfs: %s\n' "$said" >"$COWFS_DEV/console"
    printf '<7>cowfs: %s\n' "$said" >"$COWFS_DEV/kmsg"
    printf '%s\n' "$said" >>"$top/log"
} 2>/dev/null

# Print $1 without control characters: it may contain names from the command line and from disks. Of UTF-8, valid
# characters stay, except those that are controls, invisible, or change the direction of the text.
harmless() {
    printf %s "$1" | tr '\001-\037\177' '?' | LC_ALL=C awk '
        BEGIN { for (byte = 128; byte < 256; byte++) code[sprintf("%c", byte)] = byte }
        function bad(c) {
            return c < 160 || c == 173 || (c >= 8203 && c <= 8207) || (c >= 8232 && c <= 8238) ||
                (c >= 8288 && c <= 8303) || (c >= 55296 && c <= 57343) || c == 65279 ||
                (c >= 65529 && c <= 65531) || (c >= 917504 && c <= 921599) || c > 1114111
        }
        {
            said = ""
            for (at = 1; at <= length($0); at += size) {
                first = code[substr($0, at, 1)] + 0
                size = first < 194 ? 1 : first < 224 ? 2 : first < 240 ? 3 : first < 245 ? 4 : 1
                c = size == 1 ? first : first - (size == 2 ? 192 : size == 3 ? 224 : 240)
                for (next_one = 1; next_one < size; next_one++) {
                    byte = code[substr($0, at + next_one, 1)] + 0
                    c = byte >= 128 && byte < 192 ? c * 64 + byte - 128 : -1000000
                }
                least = size == 2 ? 128 : size == 3 ? 2048 : 65536
                if (first && (size == 1 || c < least || bad(c))) { said = said "?"; size = 1 }
                else said = said substr($0, at, size)
            }
            print said
        }'
}

# Print a warning, and add it to /run/motd.d, which pam_motd shows at each login. Each text is reported only once, even
# if a disk is examined several times.
warn() {
    set -- "$(harmless "$*")"
    ! grep -qxF "cowfs: $*" "$COWFS_RUN/motd.d/cowfs" 2>/dev/null || return 0 # already reported
    say "WARNING: $*"
    mkdir -p "$COWFS_RUN/motd.d" && printf 'cowfs: %s\n' "$*" >>"$COWFS_RUN/motd.d/cowfs"
}

# --- the kernel's command line

# Print one option per line. As for the kernel, a space in double quotes belongs to the option.
command_line() {
    awk '{
        quoted = 0; word = ""
        for (i = 1; i <= length($0); i++) {
            c = substr($0, i, 1)
            if (c == "\"") quoted = !quoted
            else if (!quoted && (c == " " || c == "\t")) { if (word != "") print word; word = "" }
            else word = word c
        }
        if (word != "") print word
    }' "$COWFS_PROC/cmdline"
}

# Set: scope (off, removable, all), named (the given path, or empty), subdir, image, skip (a list), fallback (ram, fail,
# shell), patience (seconds), engine (auto, kernel, process), volatile (directories whose changes are not kept, or
# empty), system (the name of a store in the store, or empty), panic (seconds until a reboot after a failed boot).
read_options() {
    scope=removable named='' subdir='' image=/sysrcd.dat skip='' fallback='' patience='' engine=auto volatile='' system=''
    panic=''
    while IFS= read -r word; do
        case $word in
        backstore=*) read_backstore "${word#*=}" ;;
        backstore.fallback=ram | backstore.fallback=fail | backstore.fallback=shell) fallback=${word#*=} ;;
        backstore.fallback=*) warn "$word is not understood (ram, fail or shell): ignored" ;;
        backstore.wait=*) read_patience "$word" ;;
        subdir=*) subdir=$(clean_path "${word#*=}") || warn "$word is not a path: ignored" ;;
        skipmount=*) skip="$skip $(printf %s "${word#*=}" | sed 's|/dev/||g' | tr ,/ ' !')" ;;
        cowfs.image=/*) image=$(image_path "${word#*=}") || warn "$word is not the path of a file: ignored" ;;
        cowfs.engine=kernel | cowfs.engine=process | cowfs.engine=auto) engine=${word#*=} ;;
        cowfs.engine=*) warn "$word is not understood (auto, kernel or process): ignored" ;;
        cowfs.volatile=/* | cowfs.volatile=none) volatile=${word#*=} ;;
        cowfs.volatile=*) warn "$word is not understood (directories, or none): ignored" ;;
        cowfs.subdir= | cowfs.subdir=[!A-Za-z0-9_]* | cowfs.subdir=*[!A-Za-z0-9_.+-]*)
            warn "$word is not understood (a name of letters, digits and _ . + -): ignored"
            ;;
        cowfs.subdir=*) system=${word#*=} ;;
        cowfs.image=*) warn "$word does not begin with /: ignored" ;;
        panic=*) panic=${word#*=} ;;
        esac
    done <<END
$(command_line)
END
    # If a named store is missing, the user must decide. If no store was named, none is required.
    [ -n "$fallback" ] || if [ -n "$named" ]; then fallback=shell; else fallback=ram; fi
    [ -n "$patience" ] || if [ -n "$named" ]; then patience=20; else patience=3; fi
}

read_backstore() { # the last backstore= on the line is used, as for all kernel options
    scope=removable named=''
    rest=$1,
    while [ -n "$rest" ]; do
        item=${rest%%,*}
        rest=${rest#*,}
        case $item in
        '') ;;
        off) scope=off ;;
        alldev) [ $scope = off ] || scope=all ;;
        /*)
            if ! path=$(clean_path "$item") || [ "${item%/}" != "$item" ]; then
                warn "backstore=: $item cannot be the path of a store: ignored"
            elif [ -n "$named" ]; then
                warn "backstore=: $named was given already: $item is ignored"
            else
                named=$path
            fi
            ;;
        *) warn "backstore=: $item is not understood (off, alldev, or a path from /): ignored" ;;
        esac
    done
    if [ $scope = off ] && [ -n "$named" ]; then
        warn "backstore=: off and $named exclude each other: no store is used"
        named=''
    fi
}

read_patience() {
    case ${1#*=} in
    '' | *[!0-9]* | ?????*) warn "$1 is not a number of seconds: ignored" ;;
    *) patience=${1#*=} ;;
    esac
}

# Print a path from / without redundant slashes; fail for other paths, and for . or .. in it.
clean_path() {
    path=/$(printf %s "$1" | sed 's|//*|/|g; s|^/||; s|/$||')
    case $path/ in
    //) return 0 ;; # the root: an empty subdir
    */./* | */../*) return 1 ;;
    esac
    printf %s "$path"
}

# The same for the path of the image; print the default path if it fails.
image_path() {
    if [ -n "${1##*/}" ] && path=$(clean_path "$1"); then
        printf %s "$path"
    else
        printf /sysrcd.dat
        return 1
    fi
}

# --- which devices

# Print the first line of an attribute in sysfs, an empty line if it does not exist.
fact() {
    value=''
    [ ! -r "$1" ] || read -r value 2>/dev/null <"$1"
    printf '%s\n' "$value"
}

# Whether $1, a directory in /sys/block, is a stick, a card, a disc, or a USB disk, which sysfs does not call removable.
is_removable() {
    [ "$(fact "$1/removable")" = 1 ] && return
    case $(readlink -f "$1") in
    */usb[0-9]*) return 0 ;;
    esac
    [ "$(fact "$1/device/type")" = SD ] && return
    for slave in "$1"/slaves/*; do # device-mapper: the device of its first part
        [ -e "$slave" ] || return 1
        slave=$(readlink -f "$slave")
        [ ! -e "$slave/partition" ] || slave=${slave%/*}
        is_removable "$slave"
        return
    done
}

# Whether skipmount= names the device $1, its disk $2, or the name of its mapping.
is_skipped() {
    for unwanted in $skip; do
        case $unwanted in
        "$1" | "$2" | "mapper!$(fact "$COWFS_SYS/block/$1/dm/name")") return 0 ;;
        esac
    done
    return 1
}

# Print the devices of $1, all or removable, in the order in which they are examined: disks by name; of each disk the
# partitions by number, then the whole disk, for sticks without a partition table.
devices() {
    for disk in "$COWFS_SYS"/block/*; do
        name=${disk##*/}
        case $name in
        loop* | ram* | zram* | fd[0-9]*) continue ;;
        esac
        [ "$(fact "$disk/size")" != 0 ] && [ -e "$disk" ] || continue
        [ "$(fact "$disk/dm/suspended")" != 1 ] || continue # reading it would block
        [ "$1" = all ] || is_removable "$disk" || continue
        {
            for part in "$disk/$name"*; do
                [ ! -e "$part/partition" ] || echo "$(fact "$part/partition") ${part##*/} $part"
            done | sort -n
            echo "0 $name $disk"
        } | while read -r _ device place; do
            # Skip devices that others (device-mapper, RAID) use.
            [ -z "$(ls "$place/holders" 2>/dev/null)" ] || continue
            is_skipped "$device" "$name" || echo "$device"
        done
    done
}

# Print a text that changes when a disk is added or removed, or a medium is changed in its drive.
disks_now() {
    for disk in "$COWFS_SYS"/block/*; do
        case ${disk##*/} in
        loop* | ram* | zram*) ;; # the boot itself uses some of them
        *) echo "${disk##*/} $(fact "$disk/diskseq") $(fact "$disk/size")" ;;
        esac
    done
}

# Open all drives: without udev, the kernel notices a new disc or card only then. Turn autoclose off meanwhile, so that
# an open tray stays open.
look_into_drives() {
    autoclose=$COWFS_PROC/sys/dev/cdrom/autoclose
    closes=$(fact "$autoclose")
    [ "$closes" != 1 ] || echo 0 >"$autoclose"
    for disk in "$COWFS_SYS"/block/*; do
        case ${disk##*/} in
        fd[0-9]*) continue ;;
        esac
        [ "$(fact "$disk/removable")" != 1 ] || true <"$(node "${disk##*/}")"
    done 2>/dev/null
    [ "$closes" != 1 ] || echo 1 >"$autoclose"
}

# Whether a USB disk was found that cannot be read yet.
disk_is_coming() {
    for interface in "$COWFS_SYS"/bus/usb/devices/*:*; do
        [ "$(fact "$interface/bInterfaceClass")" = 08 ] || continue
        for block in "$interface"/host*/target*/*/block/*; do
            [ -e "$block" ] || return 0
        done
    done
    return 1
}

node() { printf '%s/%s' "$COWFS_DEV" "$(printf %s "$1" | tr '!' /)"; } # cciss!c0d0 is /dev/cciss/c0d0

# --- their contents

# Print the directory in sysfs of the device $1, a disk or a partition.
facts_of() {
    for place in "$COWFS_SYS/block/$1" "$COWFS_SYS"/block/*/"$1"; do
        [ ! -e "$place" ] || break
    done
    printf '%s\n' "$place"
}

# Whether the device $1 is a disk of a RAID whose superblock is at the end (versions 0.90 and 1.0). The filesystem on
# such a disk could be mounted as if there were no other disks.
is_raid_member() {
    size=$(fact "$(facts_of "$1")/size")
    [ "${size:-0}" -gt 128 ] || return
    for sector in $(((size & ~127) - 128)) $(((size - 16) & ~7)); do
        mark=$(dd if="$(node "$1")" bs=512 skip=$sector count=1 2>/dev/null | od -A n -t x1 -N 4 | tr -d ' \n')
        [ "$mark" != fc4e2ba9 ] || return 0
    done
    return 1
}

# Print the type of the contents of the device $1 as blkid(8) does, or nothing, unknown, or error (if reading fails).
type_of() {
    head=$top/head
    dd if="$(node "$1")" of="$head" bs=1k count=68 2>/dev/null || {
        echo error
        return
    }
    while read -r type offset mark; do
        length=${#mark}
        case $mark in
        0x*) # bytes in hexadecimal
            length=$(((length - 2) / 2))
            found=0x$(dd if="$head" bs=1 skip="$offset" count=$length 2>/dev/null | od -A n -t x1 | tr -d ' \n')
            ;;
        *) found=$(dd if="$head" bs=1 skip="$offset" count="$length" 2>/dev/null | tr '\0' .) ;;
        esac
        [ "$found" != "$mark" ] || break
    done <<END
ntfs 3 NTFS
exfat 3 EXFAT
BitLocker 3 -FVE-FS-
crypto_LUKS 0 LUKS
LVM2_member 512 LABELONE
LVM2_member 0 LABELONE
linux_raid_member 4096 0xfc4e2ba9
linux_raid_member 0 0xfc4e2ba9
swap 4086 SWAPSPACE2
swap 4086 SWAP-SPACE
ext4 1080 0x53ef
xfs 0 XFSB
btrfs 65600 _BHRfS_M
iso9660 32769 CD001
udf 32769 BEA01
f2fs 1024 0x1020f5f2
hfsplus 1024 H+
apfs 32 NXSB
jfs 32768 JFS1
reiserfs 65588 ReIsEr
squashfs 0 hsqs
vfat 82 FAT32
vfat 54 FAT1
END
    if [ -z "$type" ]; then
        type=unknown
        [ "$(tr -d '\0' <"$head" | head -c 1 | wc -c)" != 0 ] || type=nothing
    fi
    rm -f "$head"
    echo "$type"
}
