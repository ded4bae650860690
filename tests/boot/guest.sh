# shellcheck shell=dash
# Functions for the virtual machines of the tests. Process 1 or its child calls them; busybox and Python are
# available, and the caller defines out and finish (see images.py). Each function prints its results as
# lines "TEST key: value".

tell_root() {
    out "root: $(awk '$2 == "/" { print $3 }' /proc/mounts | tail -n 1)"
    cowfs info / >/run/info
    out "store: $(sed -n 's/^store: *//p' /run/info)"
    out "lower: $(sed -n 's/^lower: *//p' /run/info)"
    out "memory: $(awk '$2 == "/mnt/memory" { print $3, substr($4, 1, 2) }' /proc/mounts)"
    out "view: $(echo /run/initramfs/cowfs/view/*)"
    out "motd: $(cat /run/motd.d/cowfs 2>/dev/null | tr '\n' ' ')"
}

# Check the read-only view of the store: it shows a file that was just written, refuses writes, and is a mount
# of its own, so that programs that stay in the root filesystem (find -xdev) do not enter it.
look_at_store() {
    echo "$1" >/root/looked
    out "looked: $(cat /mnt/memory/upper/root/looked)"
    out "refused: $(touch /mnt/memory/upper/root/looked 2>&1)"
    out "apart: $([ "$(stat -c %d /)" != "$(stat -c %d /mnt/memory)" ] && echo yes)"
}

# Check what a root filesystem must support: permissions, set-user-ID, devices, programs, mmap. Check that its
# daemon is protected: from the OOM killer, from being swapped out, and from signals.
checks() {
    python3 -I - <<'END'
import mmap, os, re, signal, stat, subprocess, sys, time
from pathlib import Path

def out(key, value): print(f"TEST {key}: {value}", flush=True)

def as_nobody(call):
    pid = os.fork()
    if not pid:
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        try: code = call()
        except PermissionError: code = 13
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def read_shadow(): Path("/etc/shadow").read_bytes(); return 0
out("shadow", as_nobody(read_shadow))
suid = "/var/lib/suid"
subprocess.run(["cp", "/usr/bin/python3.11" if os.path.exists("/usr/bin/python3.11") else os.path.realpath("/usr/bin/python3"), suid], check=True)
os.chmod(suid, 0o4755)
out("suid", as_nobody(lambda: subprocess.run([suid, "-ISc", "import os; os._exit(100 + (os.geteuid() == 0))"]).returncode))
os.mknod("/root/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
out("device", Path("/root/null").open("wb").write(b"x"))
script = Path("/root/script"); script.write_text("#!/bin/sh\nexit 7\n"); script.chmod(0o755)
out("exec", subprocess.run([script]).returncode)
with open("/root/mapped", "w+b") as file:
    file.truncate(8192)
    with mmap.mmap(file.fileno(), 8192) as mapped: mapped[4096:4100] = b"abcd"; mapped.flush()
out("mmap", Path("/root/mapped").read_bytes()[4096:4100].decode())

daemon = int(Path("/run/initramfs/cowfs/daemon.pid").read_text())
out("name", Path(f"/proc/{daemon}/cmdline").read_bytes()[:1].decode())
out("oom", Path(f"/proc/{daemon}/oom_score_adj").read_text().strip())
locked = re.search(r"VmLck:\s+(\d+) kB", Path(f"/proc/{daemon}/status").read_text())
out("locked", int(locked[1]) > 10000)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT): os.kill(daemon, number)
time.sleep(1)
Path("/root/after").write_text("still writable")
out("signals", Path("/root/after").read_text() if os.path.exists(f"/proc/{daemon}") else "dead")
END
}

# Allocate memory until the OOM killer ends the allocating process. Then check that the root still answers.
press_memory() {
    dd if=/dev/zero of=/root/ballast bs=1M count=16 2>/dev/null
    python3 -Ic 'held = []
while True: held.append(bytearray(b"x") * (4 << 20))' 2>/dev/null
    out "eater: $?"
    out "ballast: $(md5sum </root/ballast | cut -c1-8)"
    out "read: $(cat /usr/lib/python3*/*.py | wc -c)"
}

# Swap to the disk $1, and allocate memory until swap is in use. Check that the daemon is not swapped out, and that
# a file on the root cannot be used as swap.
use_swap() {
    dd if=/dev/zero of=/root/swap bs=1M count=1 2>/dev/null
    mkswap /root/swap >/dev/null
    out "swap file: $(swapon /root/swap 2>&1)"
    mkswap "$1" >/dev/null && swapon "$1"
    python3 -I - <<'END'
import os, re
from pathlib import Path

def kilobytes(file, key): return int(re.search(rf"{key}:\s+(\d+) kB", Path(file).read_text())[1])

held = []
while kilobytes("/proc/meminfo", "SwapTotal") - kilobytes("/proc/meminfo", "SwapFree") < 32 << 10:
    held.append(bytearray(b"x") * (4 << 20))
with open("/root/swapped", "w") as file:
    file.write("written meanwhile")
    file.flush()
    os.fsync(file.fileno())
print("TEST swapped:", Path("/root/swapped").read_text())
daemon = Path("/run/initramfs/cowfs/daemon.pid").read_text().strip()
print("TEST daemon in swap:", kilobytes(f"/proc/{daemon}/status", "VmSwap"), "kB", flush=True)
END
    swapoff "$1"
}

# Drop the caches, and check that the files below these directories are read from the disks unchanged.
read_anew() {
    out "read before: $(checksum "$@")"
    sync
    echo 3 >/proc/sys/vm/drop_caches
    out "read anew: $(checksum "$@")"
}

checksum() { find "$@" -xdev -type f -print0 | xargs -0 md5sum | sort | md5sum; }
