"""The targets, and whether a run meets them: ratios to the fastest C peer and to the kernel's overlayfs.

A ratio is the median of the ratios within each round, for one workload. The fastest peer is the one with the
smallest median. Below 1, cowfs is faster. Means are geometric.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from perf.bench import target_workloads
from perf.samples import Results, ratio, spread

PEERS = ("fuse-overlayfs", "fuse-overlayfs-new", "unionfs-fuse")
STACKS = ("stack-user", "stack-user-new")
KERNEL = "overlayfs"
OWN = ("cowfs", "cowfs-dev-fuse", "cowfs-kernel")
USER_OWN = ("cowfs-user", "cowfs-dev-fuse-user")
EACH, MEAN = "each", "mean"


@dataclass(frozen=True, slots=True)
class Target:
    """An upper limit for the ratio of a system to others."""

    subject: str
    system: str
    groups: tuple[str, ...]
    peers: tuple[str, ...]
    """The systems to compare with; the fastest of them counts."""
    limit: float
    scope: str
    """Whether the limit applies to EACH workload or to the MEAN of all."""


ALL = ("files", "data", "programs")
KERNELS = (KERNEL,)
TARGETS = (
    Target("small files", "cowfs", ("files",), PEERS, 0.5, EACH),
    Target("small files", "cowfs", ("files",), KERNELS, 4, EACH),
    Target("data", "cowfs", ("data",), PEERS, 1, EACH),
    Target("data", "cowfs", ("data",), KERNELS, 1.3, EACH),
    Target("data, mounted by the kernel", "cowfs-kernel", ("data",), PEERS, 0.6, EACH),
    Target("data, mounted by the kernel", "cowfs-kernel", ("data",), KERNELS, 1.1, EACH),
    Target("programs", "cowfs", ("programs",), PEERS, 0.7, EACH),
    Target("programs", "cowfs", ("programs",), KERNELS, 1.5, MEAN),
    Target("all", "cowfs", ALL, PEERS, 0.45, MEAN),
    Target("all", "cowfs", ALL, KERNELS, 1, MEAN),
    Target("an ordinary user", "cowfs-user", ("user",), STACKS, 0.25, MEAN),
    Target("all, by /dev/fuse", "cowfs-dev-fuse", ALL, PEERS, 0.8, MEAN),
    Target("all, by /dev/fuse", "cowfs-dev-fuse", ALL, PEERS, 1.1, EACH),
    Target("all, by /dev/fuse", "cowfs-dev-fuse", ALL, KERNELS, 1.6, MEAN),
)


def fastest(results: Results, workload: str, peers: tuple[str, ...]) -> str:
    """Return the fastest of *peers*; "" if none has a figure."""
    medians = {peer: times.median for peer in peers if (times := spread(results.times(workload, peer)))}
    return min(medians, key=lambda peer: medians[peer], default="")


def ratio_to_fastest(results: Results, workload: str, system: str, peers: tuple[str, ...]) -> float | None:
    """Return the ratio of *system* to the fastest of *peers*; None without figures of both."""
    ratios = ratio(results, workload, system, fastest(results, workload, peers))
    return ratios.median if ratios else None


def workloads_in(results: Results, groups: tuple[str, ...]) -> list[str]:
    """Return the workloads of *groups* that the run has."""
    known = target_workloads()
    return [name for group in groups for name in known[group] if name in results.workloads]


def ratios(
    results: Results, workloads: list[str], system: str, peers: tuple[str, ...]
) -> dict[str, float]:  # fmt: skip
    """Return :func:`ratio_to_fastest` by workload, for those that have one."""
    values = {workload: ratio_to_fastest(results, workload, system, peers) for workload in workloads}
    return {workload: value for workload, value in values.items() if value}


def mean(values: dict[str, float]) -> float | None:
    """Return the geometric mean; None without values."""
    return statistics.geometric_mean(values.values()) if values else None


def systems_in(results: Results, names: tuple[str, ...]) -> list[str]:
    """Return those of *names* that the run has."""
    return [name for name in names if name in results.systems]


def ratio_rows(results: Results) -> list[list[str]]:
    """Return the table of ratios: workloads, the mean of each group, and the mean of all but the user's."""
    own = systems_in(results, OWN)
    head = [text for name in own for text in (f"{name} to the fastest C peer", f"{name} to {KERNEL}")]
    table = [["workload", "fastest C peer", *head]]
    for group in ALL:
        names = workloads_in(results, (group,))
        for name in names:
            values = [ratio_to_fastest(results, name, s, p) for s in own for p in (PEERS, KERNELS)]
            table.append([name, fastest(results, name, PEERS) or "-", *map(format_ratio, values)])
        if names:
            table.append([f"**mean of {group}**", "", *means(results, names, own)])
    names = workloads_in(results, ALL)
    return [*table, ["**mean of all**", "", *means(results, names, own)]] if names else []


def means(results: Results, workloads: list[str], own: list[str]) -> list[str]:
    """Return the means of each system, to peers and to the kernel; "-" if it did not run all workloads."""
    complete = {name: all(results.samples_of(workload, name) for workload in workloads) for name in own}
    return [
        format_ratio(mean(ratios(results, workloads, name, peers)) if complete[name] else None)
        for name in own
        for peers in (PEERS, KERNELS)
    ]


def user_rows(results: Results) -> list[list[str]]:
    """Return the table of ratios for an ordinary user, to the faster stack of three daemons."""
    own, names = systems_in(results, USER_OWN), workloads_in(results, ("user",))
    if not names or not own:
        return []
    table = [["workload", "faster stack", *(f"{name} to it" for name in own)]]
    for name in names:
        cells = [format_ratio(ratio_to_fastest(results, name, system, STACKS)) for system in own]
        table.append([name, fastest(results, name, STACKS) or "-", *cells])
    last = [format_ratio(mean(ratios(results, names, system, STACKS))) for system in own]
    return [*table, ["**mean**", "", *last]]


def target_rows(results: Results) -> list[list[str]]:
    """Return the table of targets and outcomes, without targets whose workloads were not run."""
    table = [["target", "system", "to", "at most", "met"]]
    for target in TARGETS:
        names = workloads_in(results, target.groups)
        values = ratios(results, names, target.system, target.peers)
        if not values:
            continue
        to = KERNEL if target.peers == KERNELS else "the fastest peer"
        subject = f"{target.subject}, {target.scope}"
        table.append([subject, target.system, to, f"{target.limit:g}", outcome(target, values, len(names))])
    return table if len(table) > 1 else []


def outcome(target: Target, values: dict[str, float], expected: int) -> str:
    """Return whether the ratios *values* of *expected* workloads meet *target*, and which do not."""
    missing = f"; {expected - len(values)} without a figure" if len(values) < expected else ""
    if target.scope == MEAN:
        value = mean(values) or 0.0
        return f"{'yes' if value <= target.limit else 'no'}: {value:.2f}{missing}"
    above = {name: value for name, value in values.items() if value > target.limit}
    if not above:
        return f"yes: at most {max(values.values()):.2f}{missing}"
    listed = ", ".join(f"{name} {value:.2f}" for name, value in sorted(above.items(), key=lambda it: -it[1]))
    return f"no: {len(values) - len(above)} of {len(values)}; above: {listed}{missing}"


def format_ratio(value: float | None) -> str:
    """Return *value* with two decimals, or "-"."""
    return "-" if value is None else f"{value:.2f}"
