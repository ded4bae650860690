"""Find out whether users other than root can change the layers, and what the mount must then forbid."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cowfs.cli import options as mount_options
from cowfs.cli.output import warn
from cowfs.formats.verified import is_root_hash
from cowfs.linux import user_namespace
from cowfs.url.trust import forbidden, shows_too_much, who_can_change

if TYPE_CHECKING:
    from cowfs.union import UnionOptions


def fuse_options(given: mount_options.Options, union: UnionOptions) -> set[str]:
    """Return the options of the mount: the given ones, and those that the owners of its layers require."""
    options = set(given.fuse)
    if "ro" in given.flags:
        options.add("ro")
    is_root = os.geteuid() == 0
    if ("allow_other" in given.flags or is_root) and "noallow_other" not in given.flags:
        options.add("allow_other")
    if is_root and not given.flags & {"allow_other", "noallow_other"} and not options & {"suid", "dev"}:
        layers = [*([] if union.store == "memory" else [union.store]), *union.lowers]
        reason = shows_too_much(layers, lambda layer: _who_can_change(layer, union))
        if reason is not None:
            options.discard("allow_other")
            if not user_namespace.has_one_user():  # else there is nobody else to let in
                warn(f"mounted for root alone: {reason} (-o allow_other if you trust it)")
    if "fakeroot" in given.flags:
        options -= {"suid", "dev"}
        options |= {"nosuid", "nodev"}
    if is_root:  # nosuid,nodev is the default of libfuse, but not of mount(8)
        wanted = [option for option in ("suid", "dev") if not options & {option, f"no{option}"}]
        refused = _forbidden(union) if wanted else {}
        options |= {option for option in wanted if f"no{option}" not in refused}
        left_out = [f"no{option}" for option in wanted if f"no{option}" in refused]
        if left_out and user_namespace.has_all("uid"):  # no warning in a user namespace, where nobody owns /
            why = refused[left_out[0]]
            hint = ",".join(option.removeprefix("no") for option in left_out)
            warn(f"mounted with {','.join(left_out)}: {why} (use -o {hint} if you trust it)")
    return options


def _forbidden(union: UnionOptions) -> dict[str, str]:
    """Return why the mount must be ``nosuid`` and ``nodev``: other users than root can change a layer."""
    return forbidden((*_deciding(union), *([] if union.store == "memory" else [union.store])))


def verified_lowers(union: UnionOptions) -> dict[str, str]:
    """Return the lowers that are verified, and the root hash or file that verifies each."""
    return {low: by for low, by in zip(union.lowers, union.verify, strict=False) if by}


def _deciding(union: UnionOptions) -> list[str]:
    """Return the paths that determine the content of the lowers.

    For a verified lower, that is the file that verifies it, or none if a root hash was given.
    """
    compared = verified_lowers(union)
    deciding = (compared.get(lower, lower) for lower in union.lowers)
    return [one for one in deciding if not is_root_hash(one)]


def _who_can_change(path: str, union: UnionOptions) -> str | None:
    """Return why users other than root can change a layer; None if they cannot, or a hash would reveal it."""
    by = verified_lowers(union).get(path)
    if by:
        return None if is_root_hash(by) else who_can_change(by)
    return who_can_change(path)
