"""Convert a store between the formats of aufs and overlayfs, in place.

:mod:`cowfs.store.format.conversion` describes how an interrupted conversion is continued. Before a conversion
to aufs, :mod:`cowfs.changes.flatten` must copy into the store everything in the lowers that the upper refers
to.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from cowfs.errors import StoreError
from cowfs.layers.base import Key, UpperLayer, together
from cowfs.layers.owner_notes import OWNER_XATTR, USER_XATTR
from cowfs.linux.signals import ctrl_c_postponed
from cowfs.overlay.aufs import BASE, LEFT
from cowfs.overlay.named_whiteouts import META, OPAQUE_NAME, PREFIX, hidden_by
from cowfs.overlay.stack import is_whiteout
from cowfs.overlay.xattr_format import OPAQUE, XattrFormat, is_whiteout_device
from cowfs.store.format import conversion, layout
from cowfs.store.format.conversion import STAGE
from cowfs.store.format.header import AUFS, OVERLAYFS, Header, new_header
from cowfs.types import Attr

LOST = b"lost+found"
_TIMES = b"times"
_DEVICE = b"c0:0"
_OWNERS = {OWNER_XATTR, USER_XATTR}
"""Attributes in which an unprivileged layer records owners. They mean the same in both formats."""
_NO_LINK = {errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP}
_NO_XATTRS = {errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES}
Tick = Callable[[bytes], None]


@dataclass(slots=True)
class Converted:
    """The numbers of things converted; if the conversion was continued, without those before."""

    whiteouts: int = 0
    opaque: int = 0
    names: int = 0
    devices: int = 0
    copied: int = 0
    continued: bool = False


class Conversion:
    """The conversion of one store. *layer* shows the filesystem as it is, including whiteouts. Blocks;
    OSError."""

    def __init__(self, layer: UpperLayer, target: str, xattrs: XattrFormat, tick: Tick) -> None:
        self._layer = layer
        self._target = target
        self._format = xattrs
        self._tick = tick
        self._whiteout: Key | None = None
        self._owner = layout.owner(layer)
        self.done = Converted()
        aside = xattrs.prefix.removesuffix(b"overlay.") + b"cowfs."
        kept = (xattrs.origin, xattrs.layer, xattrs.protattr)
        self._kept = {aside + name.rpartition(b".")[2]: name for name in kept}
        """Attributes that both formats can have: the name in the format of aufs to overlayfs's name."""
        lost = (xattrs.place, xattrs.links, xattrs.nlink)
        self._foreign = {*self._kept, *(aside + name.rpartition(b".")[2] for name in lost)}

    def run(self, header: Header | None) -> Converted:
        """Do all remaining steps. *header* is the store's, or the one that it will get."""
        begun = conversion.begun(self._layer)
        self.done.continued = begun is not None
        if begun is not None and begun[0] != self._target:
            conversion.refuse_begun(self._layer)
        stage = self._stage()
        phases = self._to_overlayfs if self._target == OVERLAYFS else self._to_aufs
        steps = phases(stage, header)
        begun = conversion.begun(self._layer)
        phase = None if begun is None else begun[1]
        for number, step in enumerate(steps):
            if phase is not None and number < phase:
                continue
            if phase is None or number > phase:
                conversion.note(self._layer, stage, self._target, number, phase)
                phase = number
            self._keep_times(stage)
            step()
        assert phase is not None
        if self._target == OVERLAYFS:
            self._layer.sync()  # the next step moves the marker's directory to where a mount removes it
            inner = self._temporaries()
            self._layer.rename((self._layer.root, STAGE), (inner, b"#converted"))
            layout.empty(self._layer, inner)
        else:
            conversion.end(self._layer, stage, self._target, phase)
        self._layer.sync()
        return self.done

    def _stage(self) -> Key:
        """Return the directory of the store's parts. In the format of overlayfs, it exists only with its
        marker."""
        found = self._layer.lookup(self._layer.root, STAGE)
        if found is not None:
            return found[0]
        if self._target == OVERLAYFS:
            before = self._layer.stat(self._layer.root)
            with together(self._layer):
                made = layout.ensure_directory(self._layer, self._layer.root, STAGE, 0o755)
                self._layer.utimens(self._layer.root, before.st_atime_ns, before.st_mtime_ns)
            return made
        inner = self._temporaries()
        made = layout.ensure_directory(self._layer, inner, STAGE, 0o755)
        conversion.note(self._layer, made, self._target, 0, None)
        self._layer.rename((inner, STAGE), (self._layer.root, STAGE), moved=made)
        return self._must_find(STAGE)

    def _temporaries(self) -> Key:
        """Return the directory that the next mount empties, after emptying it now."""
        work = self._must_find(layout.WORK)
        inner = layout.ensure_directory(self._layer, work, layout.WORK, 0o700)
        layout.empty(self._layer, inner)
        return inner

    def _keep_times(self, stage: Key) -> None:
        """Save the times of the upper's root, which moving names changes, as the times of a file."""
        place = (STAGE, layout.UPPER) if self._target == AUFS else ()
        source = layout.find(self._layer, *place)
        if source is None or self._layer.lookup(stage, _TIMES) is not None:
            return
        attr = self._layer.stat(source)
        self._remove(stage, _TIMES + b".new")
        key, file = self._layer.create(stage, _TIMES + b".new", 0o600, *self._owner)
        file.close()
        self._layer.utimens(key, attr.st_atime_ns, attr.st_mtime_ns)
        self._layer.rename((stage, _TIMES + b".new"), (stage, _TIMES), moved=key)

    def _restore_times(self, stage: Key, key: Key) -> None:
        found = self._layer.lookup(stage, _TIMES)
        if found is not None:
            self._layer.utimens(key, found[1].st_atime_ns, found[1].st_mtime_ns)

    def _must_find(self, *path: bytes) -> Key:
        key = layout.find(self._layer, *path)
        if key is None:
            raise StoreError(
                f"{self._layer.name}: {os.fsdecode(b'/'.join(path))} is missing", "it is damaged"
            )
        return key

    # --- to overlayfs

    def _to_overlayfs(self, stage: Key, header: Header | None) -> list[Callable[[], object]]:
        root = self._layer.root

        def escape() -> None:
            self._walk(root, self._escape, skips_own=True)

        def set_apart() -> None:
            self._walk(root, self._keep_device, skips_own=True)

        def translate() -> None:
            self._walk(root, self._names_to_whiteouts, skips_own=True)

        def gather() -> None:
            upper = layout.ensure_directory(self._layer, stage, layout.UPPER, 0o755)
            for name in (layout.WORK, layout.PRIVATE):
                layout.ensure_directory(self._layer, stage, name, 0o755)
            for name in self._names_of_users():
                self._layer.rename((root, name), (upper, name))
                self._count("names", name)
            self._copy_attributes(root, upper)
            self._restore_times(stage, upper)
            self._save(stage, header, OVERLAYFS)

        def spread() -> None:
            for name in (layout.UPPER, layout.WORK, layout.PRIVATE):
                if self._layer.lookup(stage, name) is not None:
                    self._layer.rename((stage, name), (root, name))
            for name in (BASE, *LEFT):
                self._remove(root, name)
            self._plain_root()

        return [escape, set_apart, translate, gather, spread]

    def _escape(self, directory: Key, name: bytes, key: Key, attr: Attr) -> None:
        """Escape an entry of aufs that overlayfs would interpret."""
        known = self._format
        for own in self._xattrs_of(key):
            if known.is_own(own) and own not in _OWNERS:
                self._layer.setxattr(key, known.stored(own), self._layer.getxattr(key, own))
                self._layer.removexattr(key, own)

    def _keep_device(self, directory: Key, name: bytes, _: Key, attr: Attr) -> None:
        """Replace a device that would become a whiteout by a file."""
        if not is_whiteout_device(attr):
            return

        def make(temporary: bytes) -> Key:
            key, file = self._layer.create(
                directory, temporary, stat.S_IMODE(attr.st_mode), attr.st_uid, attr.st_gid
            )
            file.close()
            self._layer.setxattr(key, self._format.device, _DEVICE)
            return key

        self._replace(directory, name, attr, make)

    def _replace(self, directory: Key, name: bytes, attr: Attr, make: Callable[[bytes], Key]) -> None:
        """Replace a device, or the file that stands for it, by the inode that *make* creates under a given
        name."""
        temporary = META + b"cowfs.new"
        with self._at_once(directory, self._layer.stat(directory)):
            self._remove(directory, temporary)
            key = make(temporary)
            self._layer.utimens(key, attr.st_atime_ns, attr.st_mtime_ns)
            self._layer.rename((directory, temporary), (directory, name))
        self._count("devices", name)

    def _names_to_whiteouts(self, directory: Key, name: bytes, key: Key, attr: Attr) -> None:
        own = self._xattrs_of(key)
        for stored, note in self._kept.items():
            if stored in own:
                self._layer.setxattr(key, note, self._layer.getxattr(key, stored))
        for stored in self._foreign.intersection(own):
            self._layer.removexattr(key, stored)
        if not stat.S_ISDIR(attr.st_mode):
            return
        before = self._layer.stat(key)
        names = [entry.name for entry in self._layer.readdir(key) if entry.name.startswith(PREFIX)]
        is_opaque = OPAQUE_NAME in names
        for each in names:
            hidden = None if not name and each == PREFIX + LOST else hidden_by(each)
            if hidden is not None and not is_opaque:
                self._hide(key, hidden, before)
                self._count("whiteouts", hidden)
            elif each != OPAQUE_NAME and (name or each not in {STAGE, BASE, *LEFT}):
                self._drop(key, each, hidden, before)
        if is_opaque:
            with self._at_once(key, before):
                self._layer.setxattr(key, self._format.opaque, OPAQUE)
                self._remove(key, OPAQUE_NAME)
            self._count("opaque", name)

    def _drop(self, directory: Key, name: bytes, covered: bytes | None, before: Attr) -> None:
        """Remove an invisible entry: a whiteout that hides nothing, or a leftover of a crash of aufs."""
        for each in [name] if covered is None else [covered, name]:
            self._empty(directory, each)
            with self._at_once(directory, before):
                self._remove(directory, each)

    def _hide(self, directory: Key, name: bytes, before: Attr) -> None:
        """Replace a whiteout's name by a device. An entry with the hidden name is removed.

        The mount takes a directory of such a name for a whiteout too.
        """
        self._empty(directory, name)
        self._empty(directory, PREFIX + name)
        with self._at_once(directory, before):
            self._remove(directory, name)
            if not self._link(self._whiteout, directory, name):
                self._whiteout = self._layer.mknod(directory, name, stat.S_IFCHR, 0, *self._owner)
            self._remove(directory, PREFIX + name)

    # --- to aufs

    def _to_aufs(self, stage: Key, header: Header | None) -> list[Callable[[], object]]:
        root = self._layer.root

        def gather() -> None:
            for name in (layout.UPPER, layout.WORK, layout.PRIVATE):
                if self._layer.lookup(root, name) is not None:
                    self._layer.rename((root, name), (stage, name))

        def translate() -> None:
            if self._layer.lookup(root, BASE) is None:
                _, file = self._layer.create(root, BASE, 0o444, *self._owner)
                file.close()
            for name in LEFT:
                layout.ensure_directory(self._layer, root, name, 0o700)
            found = self._layer.lookup(root, BASE)
            self._whiteout = None if found is None else found[0]
            self._walk(self._must_find(STAGE, layout.UPPER), self._whiteouts_to_names)

        def restore() -> None:
            self._walk(self._must_find(STAGE, layout.UPPER), self._drop_overlay_attributes)

        def spread() -> None:
            upper = layout.find(self._layer, STAGE, layout.UPPER)
            if upper is not None:
                for entry in self._layer.readdir(upper):
                    self._layer.rename((upper, entry.name), (root, entry.name))
                    self._count("names", entry.name)
                self._copy_attributes(upper, root)
                self._layer.rmdir(stage, layout.UPPER, None)
            self._restore_times(stage, root)
            for name in (layout.WORK, layout.PRIVATE):
                layout.ensure_directory(self._layer, stage, name, 0o755)
            self._remove(self._must_find(STAGE, layout.WORK), layout.INDEX)
            self._save(stage, header, AUFS)
            self._remove(stage, _TIMES)

        return [gather, translate, restore, spread]

    def _whiteouts_to_names(self, directory: Key, name: bytes, key: Key, attr: Attr) -> None:
        """Replace whiteouts, and the attribute of an opaque directory, by names."""
        if not stat.S_ISDIR(attr.st_mode):
            return
        before = self._layer.stat(key)
        is_opaque = self._has_xattr(key, self._format.opaque)
        for entry in self._layer.readdir(key):
            if entry.name.startswith(PREFIX) or entry.type not in {0, stat.S_IFCHR, stat.S_IFREG}:
                continue
            found = self._layer.lookup(key, entry.name)
            if found is None or not is_whiteout(self._layer, *found, self._format):
                continue
            with self._at_once(key, before):
                if not is_opaque:  # otherwise it hides nothing
                    self._make_whiteout_name(key, PREFIX + entry.name)
                self._layer.unlink(key, entry.name, None)
            self._count("whiteouts", entry.name)
        if is_opaque:
            with self._at_once(key, before):
                self._make_whiteout_name(key, OPAQUE_NAME)
                self._layer.removexattr(key, self._format.opaque)
            self._count("opaque", name)

    def _make_whiteout_name(self, directory: Key, name: bytes) -> None:
        if self._layer.lookup(directory, name) is None and not self._link(self._whiteout, directory, name):
            key, file = self._layer.create(directory, name, 0o444, *self._owner)
            file.close()
            self._whiteout = key

    def _drop_overlay_attributes(self, directory: Key, name: bytes, key: Key, attr: Attr) -> None:
        """Remove the attributes that only overlayfs uses."""
        known = self._format
        stand_in = known.device in self._xattrs_of(key)
        for stored, note in self._kept.items():
            if note in self._xattrs_of(key):
                self._layer.setxattr(key, stored, self._layer.getxattr(key, note))
        for own in self._xattrs_of(key):
            if known.is_own(own) and own != known.device and own not in _OWNERS:
                self._layer.removexattr(key, own)
        if stand_in and name:
            mode = stat.S_IFCHR | stat.S_IMODE(attr.st_mode)
            self._replace(
                directory,
                name,
                attr,
                lambda temporary: self._layer.mknod(directory, temporary, mode, 0, attr.st_uid, attr.st_gid),
            )

    # --- both

    def _walk(
        self, top: Key, see: Callable[[Key, bytes, Key, Attr], None], *, skips_own: bool = False
    ) -> None:
        """Call *see* with each directory, name, inode and its attributes below *top*, skipping names of aufs.

        A directory comes before its contents.
        """
        see(top, b"", top, self._layer.stat(top))
        waiting: list[Key] = [top]
        while waiting:
            directory = waiting.pop()
            for entry in self._layer.readdir(directory):
                if entry.name.startswith(PREFIX) or (skips_own and directory is top and entry.name == LOST):
                    continue
                found = self._layer.lookup(directory, entry.name)
                if found is None:
                    continue
                see(directory, entry.name, *found)
                if stat.S_ISDIR(found[1].st_mode):
                    waiting.append(found[0])
                else:
                    self._layer.forget(found[0])
                self._tick(entry.name)
            if directory is not top:
                self._layer.forget(directory)

    def _count(self, what: str, name: bytes) -> None:
        setattr(self.done, what, getattr(self.done, what) + 1)
        self._tick(name)

    def _names_of_users(self) -> list[bytes]:
        """Return the names in the root that belong to the tree."""
        names = (entry.name for entry in self._layer.readdir(self._layer.root))
        return [name for name in names if not name.startswith(PREFIX) and name != LOST]

    def _link(self, key: Key | None, directory: Key, name: bytes) -> bool:
        if key is None:
            return False
        try:
            self._layer.link(key, directory, name)
        except OSError as failure:
            if failure.errno not in _NO_LINK:
                raise
            return False
        return True

    @contextmanager
    def _at_once(self, directory: Key, before: Attr) -> Iterator[None]:
        """Put a few changes in a directory on disk together or not at all, and keep the directory's times.

        Signals to terminate are blocked meanwhile.
        """
        with ctrl_c_postponed(), together(self._layer):
            yield
            self._layer.utimens(directory, before.st_atime_ns, before.st_mtime_ns)

    def _empty(self, directory: Key, name: bytes) -> None:
        """Remove everything below a name; keep the times of *directory*."""
        found = self._layer.lookup(directory, name)
        if found is not None and stat.S_ISDIR(found[1].st_mode):
            layout.empty(self._layer, found[0])

    def _remove(self, directory: Key, name: bytes) -> None:
        found = self._layer.lookup(directory, name)
        if found is None:
            return
        if stat.S_ISDIR(found[1].st_mode):
            layout.empty(self._layer, found[0])
            self._layer.rmdir(directory, name, None)
        else:
            self._layer.unlink(directory, name, None)

    def _xattrs_of(self, key: Key) -> list[bytes]:
        try:
            return self._layer.listxattr(key)
        except OSError as failure:
            if failure.errno in _NO_XATTRS:
                return []
            raise

    def _has_xattr(self, key: Key, name: bytes) -> bool:
        return name in self._xattrs_of(key)

    def _copy_attributes(self, source: Key, target: Key) -> None:
        attr = self._layer.stat(source)
        for name in self._xattrs_of(source):
            if name not in {self._format.prefix + b"cowfs.file", USER_XATTR}:
                self._layer.setxattr(target, name, self._layer.getxattr(source, name))
        self._layer.chown(target, attr.st_uid, attr.st_gid)
        self._layer.chmod(target, stat.S_IMODE(attr.st_mode))
        self._layer.utimens(target, attr.st_atime_ns, attr.st_mtime_ns)

    def _plain_root(self) -> None:
        """Give the root the attributes that mke2fs gives it. Those of the branch's root are now on upper/."""
        for name in {*self._xattrs_of(self._layer.root)} - {USER_XATTR}:
            with suppress(OSError):
                self._layer.removexattr(self._layer.root, name)

    def _save(self, stage: Key, header: Header | None, whiteouts: str) -> None:
        """Write the header that the store will have into its future directory."""
        made = replace(header or new_header(), version=1, whiteouts=whiteouts, adopted=True, mark=None)
        layout.save_header(self._layer, made, stage)
