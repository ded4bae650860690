#!/bin/sh
# On a bare Debian, in the source: an ordinary user's pipx install. It says in one line what is missing to compile it.

set -eux
install_packages() { DEBIAN_FRONTEND=noninteractive apt-get install -yq --no-install-recommends "$@"; }
as_user() {
    setpriv --reuid=tester --regid=tester --init-groups \
        env HOME=/home/tester PATH="/home/tester/.local/bin:$PATH" sh -euxc "$1"
}
refused() { # sets wanted: the packages that the refusal names
    if as_user 'cd ~/cowfs; pipx install .' >/tmp/said 2>&1; then exit 1; fi
    cat /tmp/said
    grep -rh 'cowfs cannot be compiled without' /tmp/said /home/tester/.local/state/pipx /home/tester/.local/pipx \
        2>/dev/null | tail -n 1 >/tmp/why
    if grep -A9 'cannot be compiled' /tmp/said | grep Traceback; then exit 1; fi
    wanted=$(sed -n 's/.*apt-get install \(.*\)).*/\1/p' /tmp/why)
    [ -n "$wanted" ]
}

apt-get update -q
install_packages pipx fuse3 e2fsprogs
ln -sf /proc/self/mounts /etc/mtab
useradd -m tester
cp -r /src /home/tester/cowfs
chown -R tester: /home/tester/cowfs

refused
# shellcheck disable=SC2086  # one word each
install_packages $wanted
if ! as_user 'cd ~/cowfs; pipx install .'; then # headers that only a compiler can miss
    refused
    # shellcheck disable=SC2086
    install_packages $wanted
    as_user 'cd ~/cowfs; pipx install .'
fi
# shellcheck disable=SC2016  # the user's shell expands it
as_user 'cd; mkdir l m; cowfs mount l m; echo x >m/new; test "$(cowfs diff m)" = "A  new"; cowfs umount m'
as_user 'pipx uninstall cowfs; if command -v cowfs; then exit 1; fi'
