"""A store for cases, and how each system mounts it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from tests.support.mounts import cowfs, kernel_overlay, mounted
from tests.support.system import run


class Place:
    """A store, and how each system mounts it."""

    options: Sequence[str] = ()
    """Mount options for cowfs."""

    def __init__(
        self,
        at: Path,
        lowers: Sequence[Path],
        store: Path,
        kind: str,
        *,
        made: bool = False,
        images: Sequence[Path] = (),
    ) -> None:
        """Create the store unless *made*. *images* are squashfs images to mount instead of *lowers*."""
        self.at, self.lowers, self.store, self.kind = at, lowers, store, kind
        self.images = images
        self.opened = store if kind == "directory" else at.with_name(f"{at.name}.opened")
        at.mkdir()
        if kind != "directory":
            self.opened.mkdir()
            if not made:
                cowfs("create", store, "128", check=True)

    @contextmanager
    def seen(self) -> Iterator[Path]:
        """Mount the store's filesystem if needed; yield the directory with upper/ and work/."""
        if self.kind == "directory":
            yield self.store
            return
        run("mount", "-o", "loop", self.store, self.opened)
        try:
            yield self.opened
        finally:
            run("umount", self.opened)

    @contextmanager
    def kernel(self) -> Iterator[None]:
        with self.seen() as store, ExitStack() as stack:
            store.mkdir(exist_ok=True)
            lowers = [stack.enter_context(self._of_image(image)) for image in self.images] or self.lowers
            with kernel_overlay(lowers, store, self.at):
                yield

    @contextmanager
    def _of_image(self, image: Path) -> Iterator[Path]:
        """Mount an image with the kernel's squashfs."""
        at = self.at.with_name(f"{self.at.name}.{image.name}")
        at.mkdir(exist_ok=True)
        run("mount", "-t", "squashfs", "-o", "loop,ro", image, at)
        try:
            yield at
        finally:
            run("umount", at)

    @contextmanager
    def cowfs(self) -> Iterator[None]:
        engine = "kernel" if self.kind == "kernel" else None
        with mounted(
            list(self.images or self.lowers),
            self.at,
            self.store,
            engine=engine,
            options=self.options,
            quiet=False,
        ) as here:
            yield
        trouble = [line for line in here.trouble() if " is missing from a listing: " not in line]
        assert not trouble, trouble

    def by(self, system: str) -> AbstractContextManager[None]:
        """Mount the store with *system*."""
        return self.kernel() if system == "kernel" else self.cowfs()
