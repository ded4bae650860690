"""Lowers and uppers that hide names by attributes which cowfs itself never writes."""

from __future__ import annotations

from tests.parity.script import Script, case
from tests.parity.trees import directory
from tests.support.tree import Node, Tree

PREFIX = "trusted.overlay."


def hidden(data: bytes = b"", prefix: str = PREFIX) -> Node:
    """Return a whiteout by attribute: an empty file. With *data*, it is no whiteout."""
    return Node(data=data, xattrs={prefix + "whiteout": b"y"})


def holder(prefix: str = PREFIX) -> Node:
    """Return a directory that is marked as containing such whiteouts."""
    return directory(xattrs={prefix + "opaque": b"x"})


BELOW: Tree = {
    "x/gone": b"gone\n",
    "x/kept": b"kept\n",
    "x/full": b"below\n",
    "x/tree/deep/file": b"never seen\n",
    "x/merged/below": b"below\n",
    "rest/a": b"a\n",
}
ABOVE: Tree = {
    "x": holder(),
    "x/gone": hidden(),
    "x/full": hidden(b"data\n"),
    "x/tree": hidden(),
    "x/alone": hidden(),
    "x/merged/above": b"above\n",
    "x/empty": b"",
}


@case(ABOVE, BELOW)
def whiteouts_by_attribute(s: Script) -> None:
    """An empty file with the attribute is a whiteout; a file with data is not."""
    s.listdir("x")
    for name in ("gone", "kept", "full", "tree", "alone", "empty", "tree/deep"):
        s.stat(f"x/{name}")
    s.create("x/gone", b"again\n")
    s.mkdir("x/tree")
    s.listdir("x/tree")
    s.unlink("x/full")
    s.rename("x/kept", "x/alone")
    s.link("x/empty", "x/full")
    s.remounted()
    s.listdir("x")


@case({"x/merged/top": b"top\n"}, ABOVE, BELOW)
def whiteouts_by_attribute_in_the_middle(s: Script) -> None:
    s.listdir("x")
    s.stat("x/gone")
    s.stat("x/tree")
    s.listdir("x/merged")
    s.rename("x/merged", "moved")
    s.remounted()
    s.create("x/tree", b"a file\n")
    s.unlink("x/kept")


@case(
    BELOW,
    upper={
        "x": directory(),
        "x/gone": hidden(),
        "x/full": hidden(b"data\n"),
        "x/tree": hidden(),
        "x/new": b"",
    },
)
def whiteouts_by_attribute_in_the_store(s: Script) -> None:
    """The kernel treats the file as a whiteout, but lists it, because the directory is not marked."""
    for name in ("gone", "kept", "full", "tree", "new", "tree/deep"):
        s.stat(f"x/{name}")
    s.remounted()
    s.stat("x/gone")


@case({"x": holder(), "x/gone": hidden(prefix="user.overlay."), "x/kept": b""}, {"x/gone": b"seen\n"})
def attributes_of_the_other_prefix_mean_nothing(s: Script) -> None:
    s.stat("x/gone")
    s.listxattr("x/gone")


ESCAPED = PREFIX + "overlay."
NESTED: Tree = {
    "x": directory(xattrs={ESCAPED + "opaque": b"x", PREFIX + "opaque": b"x"}),
    "x/gone": Node(xattrs={ESCAPED + "whiteout": b"y"}),
    "x/twice": Node(xattrs={ESCAPED + "overlay.whiteout": b"y"}),
    "o": directory(xattrs={ESCAPED + "opaque": b"y"}),
    "o/a": b"a\n",
}


@case(NESTED, {"x/gone": b"below\n", "x/twice": b"below\n", "o/b": b"b\n"})
def escaped_attributes_are_another_overlays(s: Script) -> None:
    """They have no effect, and are shown with one escape removed."""
    s.listdir("x")
    s.listdir("o")
    for name in ("x", "x/gone", "x/twice", "o"):
        s.listxattr(name)
    s.getxattr("x/gone", PREFIX + "whiteout")
    s.getxattr("x/twice", ESCAPED + "whiteout")
    s.chmod("x/gone", 0o600)
    s.listxattr("x/gone")
    s.remounted()
    s.listxattr("x/gone")


@case(
    {"file": Node(data=b"top..\n", xattrs={PREFIX + "metacopy": b"", PREFIX + "opaque": b"y"})},
    {"file": b"below\n"},
)
def an_opaque_metacopy(s: Script) -> None:
    """The opaque attribute has no effect on a file: its data is in the lower."""
    s.stat("file")
    s.read("file")
    s.append("file", b"more\n")
    s.remounted()
    s.read("file")
