"""The lower trees of most cases."""

from __future__ import annotations

import os

from tests.support.tree import Node, Tree, directory, link, opaque, symlink, whiteout

__all__ = ["BASE", "BIG", "BOTTOM", "MIDDLE", "TOP", "directory", "link", "opaque", "symlink", "whiteout"]

BIG = bytes(range(256)) * 1200
CAPABILITY = bytes.fromhex("0100000200000000000000000000000000000000")
"""security.capability, version 2: nothing permitted, effective bit set."""

BASE: Tree = {
    "file": b"hello\n",
    "empty": b"",
    "big": BIG,
    "script": Node(data=b"#!/bin/sh\n", mode=0o755),
    "dir/a": b"a\n",
    "dir/b": b"bb\n",
    "dir/sub/c": b"ccc\n",
    "dir/sub/deep/d": b"dddd\n",
    "emptydir": directory(0o750),
    "one": b"linked\n",
    "two": link("one"),
    "dir/three": link("one"),
    "sym": symlink("file"),
    "dangling": symlink("nowhere"),
    "symdir": symlink("dir"),
    "fifo": Node("fifo"),
    "socket": Node("socket"),
    "null": Node("char", rdev=os.makedev(1, 3), mode=0o666),
    "disk": Node("block", rdev=os.makedev(7, 200)),
    "suid": Node(data=b"suid\n", mode=0o4755, uid=1000, gid=1000),
    "sgid": Node(data=b"sgid\n", mode=0o2755, uid=1000, gid=1000),
    "capable": Node(data=b"cap\n", mode=0o755, xattrs={"security.capability": CAPABILITY}),
    "sparse": Node(data=b"start", size=1 << 20),
    "dressed": Node(data=b"x\n", xattrs={"user.color": b"red", "user.empty": b"", "trusted.t": b"\0\1"}),
    "dresseddir": directory(xattrs={"user.place": b"here"}),
    "private": directory(0o700, uid=1000, gid=1000),
    "private/secret": Node(data=b"secret\n", mode=0o600, uid=1000, gid=1000),
    "world": directory(0o777),
    "sticky": directory(0o1777),
    "sticky/theirs": Node(data=b"theirs\n", mode=0o666, uid=1001, gid=1001),
    "sgiddir": directory(0o2775, gid=50),
    "open": Node(data=b"writable\n", mode=0o666),
}

TOP: Tree = {
    "both/top": b"top\n",
    "both/same": b"from top\n",
    "hidden": whiteout(),
    "fresh": opaque(),
    "fresh/new": b"new\n",
    "middle/gone": whiteout(),
    "mixed": b"a file here\n",
}
MIDDLE: Tree = {
    "both/middle": b"middle\n",
    "both/same": b"from middle\n",
    "hidden/in_middle": b"never seen\n",
    "fresh/old": b"never seen\n",
    "middle/gone": b"never seen\n",
    "middle/kept": b"kept\n",
    "reborn": whiteout(),
    "mixed/below": b"never seen\n",
    "only_middle/x": b"x\n",
}
BOTTOM: Tree = {
    "both/bottom": b"bottom\n",
    "both/same": b"from bottom\n",
    "hidden/in_bottom": b"never seen\n",
    "fresh/older": b"never seen\n",
    "middle/bottom": b"bottom\n",
    "middle/gone": b"never seen\n",
    "reborn/x": b"never seen\n",
    "only_bottom/y": b"y\n",
    "only_bottom/deep/z": b"z\n",
}
