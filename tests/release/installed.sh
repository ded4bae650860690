#!/bin/sh
# On a bare Debian, in the source: make install, what it puts where, a mount, the commands of the documents, and
# make uninstall, which leaves nothing.

set -eux
all() {
    find / -xdev \( -path /var -o -path /tmp -o -path /src -o -path /root/.cache \) -prune -o \
        ! -name __pycache__ ! -name '*.pyc' ! -name ld.so.cache -print | sort
}
scripts/setup --packages
# The documents use them.
DEBIAN_FRONTEND=noninteractive apt-get install -yq --no-install-recommends attr squashfs-tools-ng
all >/tmp/before
make install
all >/tmp/with
PREFIX=/usr/local SBIN=/sbin scripts/install --list | sed "s/ -> .*//" | sort -u >/tmp/listed
# Of what is new: no directories, not the virtual environment, not the note of the directories that were made.
comm -13 /tmp/before /tmp/with | grep -v -e /lib/cowfs/venv -e /made-directories | while read -r path; do
    [ -d "$path" ] && [ ! -h "$path" ] || echo "$(realpath -s "$(dirname "$path")")/${path##*/}"
done | sort >/tmp/new
while read -r file; do [ ! -e "$file" ] || realpath -s "$(realpath "$(dirname "$file")")/${file##*/}"; done </tmp/listed |
    sort -u >/tmp/there
diff /tmp/there /tmp/new
cd /tmp
mkdir lower m
echo hi >lower/a
cowfs create s.bs 16M
mount -t cowfs -o store=/tmp/s.bs /tmp/lower /tmp/m
echo two >m/b
test "$(cowfs diff m)" = 'A  b'
umount m
fsck.cowfs -n s.bs
test -e /usr/local/share/man/man1/cowfs-diff.1
cd /src
tests/release/newcomer.py
make uninstall
all >/tmp/after
diff /tmp/before /tmp/after
