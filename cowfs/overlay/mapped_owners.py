"""Show the owners of a directory's files as the users of a store's namespace saw them.

If an ordinary user's mount was in a user namespace (`cowfs run`), the kernel translated the owners of a
lower's files for it, and the store has these numbers: 0 for the user, and nobody's (proc_sys_kernel(5)) for
all who have no number there. Elsewhere the kernel shows other numbers for the same files. So a store records
the map of the namespace in which it was first mounted, and a lower is read through it.

The owners in images are data, which no namespace translates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cowfs.layers import acl
from cowfs.layers.base import Key, LowerLayer
from cowfs.layers.slow import SlowLayer
from cowfs.linux import user_namespace
from cowfs.linux.user_namespace import IdMap, Range
from cowfs.overlay.wrapped import WrappedLayer
from cowfs.types import Attr, own_attr

ACLS = frozenset({acl.ACCESS, acl.DEFAULT})
_IN_NO_ACL = (1 << 32) - 1
"""The number that an ACL shows for a user without one (posix_acl_to_xattr() in fs/posix_acl.c)."""


class Translation:
    """Translates owners into the numbers of a user namespace, or out of it."""

    def __init__(self, number: Callable[[int, Sequence[Range]], int | None], owners: IdMap) -> None:
        """*number* is :func:`~cowfs.linux.user_namespace.number_in` or ``number_outside``."""
        self.user: Callable[[int], int | None] = lambda user: number(user, owners.users)
        self.group: Callable[[int], int | None] = lambda group: number(group, owners.groups)
        self.nobody = user_namespace.nobody()

    def owner(self, user: int, group: int) -> tuple[int, int]:
        """Return the user and the group there; nobody for one that has no number there."""
        new = self.user(user), self.group(group)
        return self.nobody[0] if new[0] is None else new[0], self.nobody[1] if new[1] is None else new[1]

    def attr(self, attr: Attr) -> Attr:
        """Return the same attributes, with the owner there."""
        seen = own_attr(attr)
        seen.st_uid, seen.st_gid = self.owner(attr.st_uid, attr.st_gid)
        return seen

    def xattr(self, name: bytes, value: bytes) -> bytes:
        """Return the value of an extended attribute; an ACL has the users and groups there."""
        if name not in ACLS:
            return value
        return acl.renamed(value, lambda who: _in_acl(self.user(who)), lambda who: _in_acl(self.group(who)))


def _in_acl(number: int | None) -> int:
    return _IN_NO_ACL if number is None else number


def into(owners: IdMap | None) -> Translation | None:
    """Return the translation of what this process sees into the numbers of a store with the map *owners*.

    None if these are the same, because the store has no map, or we are in such a namespace ourselves.
    """
    if owners is None or not user_namespace.is_outside(owners):
        return None
    return Translation(user_namespace.number_in, owners)


def out_of(owners: IdMap | None) -> Translation | None:
    """Return the translation of the numbers of a store with the map *owners* into those that we see."""
    if owners is None or not user_namespace.is_outside(owners):
        return None
    return Translation(user_namespace.number_outside, owners)


class MappedOwners(WrappedLayer):
    """The layer *inner*, with other owners."""

    def __init__(self, inner: LowerLayer, owners: Translation) -> None:
        super().__init__(inner)
        self._owners = owners
        self.readdir = inner.readdir
        self.pieces = inner.pieces
        self.names = inner.names
        self.listxattr = inner.listxattr
        self.handle = inner.handle
        self.forget = inner.forget

    def lookup(self, directory: Key, name: bytes) -> tuple[Key, Attr] | None:
        found = self.inner.lookup(directory, name)
        return None if found is None else (found[0], self._owners.attr(found[1]))

    def stat(self, key: Key) -> Attr:
        return self._owners.attr(self.inner.stat(key))

    def getxattr(self, key: Key, name: bytes) -> bytes:
        return self._owners.xattr(name, self.inner.getxattr(key, name))


def as_in_store(layers: Sequence[LowerLayer], kinds: Sequence[str], owners: IdMap | None) -> list[LowerLayer]:
    """Return the lowers of a store with the map *owners*, directories with the owners that the store has.

    *kinds* are those of :attr:`cowfs.types.Identity.kind`.
    """
    translation = into(owners)
    if translation is None:
        return list(layers)
    return [
        _mapped(layer, translation) if kind == "directory" else layer
        for layer, kind in zip(layers, kinds, strict=True)
    ]


def _mapped(layer: LowerLayer, translation: Translation) -> LowerLayer:
    if isinstance(layer, SlowLayer):
        layer.inner = MappedOwners(layer.inner, translation)
        return layer
    return MappedOwners(layer, translation)
