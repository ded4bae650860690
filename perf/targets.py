"""What is aimed at, and what a run has reached: ratios to the better C peer and to the kernel's overlayfs.

A ratio is that of one workload's times, paired within rounds, the median of them; the better peer is the one
whose median is least. Below 1, cowfs is quicker. A mean is geometric.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from perf.bench import bench_of_targets
from perf.samples import Results, ratio, spread

PEERS = ("fuse-overlayfs", "fuse-overlayfs-new", "unionfs-fuse")
STACKS = ("stack-user", "stack-user-new")
KERNEL = "overlayfs"
OWN = ("cowfs", "cowfs-dev-fuse", "cowfs-kernel")
OF_USER = ("cowfs-user", "cowfs-dev-fuse-user")
EACH, MEAN = "each", "mean"


@dataclass(frozen=True, slots=True)
class Target:
    """How long a system may take at most."""

    what: str
    system: str
    groups: tuple[str, ...]
    against: tuple[str, ...]
    """Whose best is compared with."""
    limit: float
    how: str
    """Whether each workload must be within the limit, or the mean of all."""


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


def better(results: Results, workload: str, peers: tuple[str, ...]) -> str:
    """The quickest of *peers*; "" when none has a figure."""
    medians = {peer: found.median for peer in peers if (found := spread(results.times(workload, peer)))}
    return min(medians, key=lambda peer: medians[peer], default="")


def against(results: Results, workload: str, system: str, peers: tuple[str, ...]) -> float | None:
    """How many times as long *system* took as the better of *peers*; None without figures of both."""
    found = ratio(results, workload, system, better(results, workload, peers))
    return found.median if found else None


def of_groups(results: Results, groups: tuple[str, ...]) -> list[str]:
    """The workloads of *groups* that the run has."""
    known = bench_of_targets()
    return [name for group in groups for name in known[group] if name in results.workloads]


def ratios(
    results: Results, workloads: list[str], system: str, peers: tuple[str, ...]
) -> dict[str, float]:  # fmt: skip
    """By workload, what :func:`against` says, where it says something."""
    found = {workload: against(results, workload, system, peers) for workload in workloads}
    return {workload: value for workload, value in found.items() if value}


def mean(values: dict[str, float]) -> float | None:
    """The geometric mean; None of nothing."""
    return statistics.geometric_mean(values.values()) if values else None


def systems(results: Results, known: tuple[str, ...]) -> list[str]:
    """Those of *known* that the run has."""
    return [name for name in known if name in results.systems]


def ratio_rows(results: Results) -> list[list[str]]:
    """The table of ratios: each workload, then the mean of its group; at last that of all but the user's."""
    own = systems(results, OWN)
    head = [text for name in own for text in (f"{name} to the better C peer", f"{name} to {KERNEL}")]
    table = [["workload", "better C peer", *head]]
    for group in ALL:
        names = of_groups(results, (group,))
        for name in names:
            cells = [shown(against(results, name, s, p)) for s in own for p in (PEERS, KERNELS)]
            table.append([name, better(results, name, PEERS) or "-", *cells])
        if names:
            table.append([f"**mean of {group}**", "", *means(results, names, own)])
    names = of_groups(results, ALL)
    return [*table, ["**mean of all**", "", *means(results, names, own)]] if names else []


def means(results: Results, workloads: list[str], own: list[str]) -> list[str]:
    """The mean for each system, to the peers and to the kernel; none where it was not to do all of them."""
    did = {name: all(results.of(workload, name) for workload in workloads) for name in own}
    return [
        shown(mean(ratios(results, workloads, name, peers)) if did[name] else None)
        for name in own
        for peers in (PEERS, KERNELS)
    ]


def user_rows(results: Results) -> list[list[str]]:
    """The same for an ordinary user, beside the better of the stacks of three daemons."""
    own, names = systems(results, OF_USER), of_groups(results, ("user",))
    if not names or not own:
        return []
    table = [["workload", "better stack", *(f"{name} to it" for name in own)]]
    for name in names:
        cells = [shown(against(results, name, each, STACKS)) for each in own]
        table.append([name, better(results, name, STACKS) or "-", *cells])
    last = [shown(mean(ratios(results, names, each, STACKS))) for each in own]
    return [*table, ["**mean**", "", *last]]


def target_rows(results: Results) -> list[list[str]]:
    """Each target, what is reached, and what misses it where each must; nothing of what was not run."""
    table = [["target", "system", "to", "at most", "reached"]]
    for target in TARGETS:
        names = of_groups(results, target.groups)
        found = ratios(results, names, target.system, target.against)
        if not found:
            continue
        to = "overlayfs" if target.against == KERNELS else "the better peer"
        what = f"{target.what}, {'each' if target.how == EACH else 'mean'}"
        table.append([what, target.system, to, f"{target.limit:g}", reached(target, found, len(names))])
    return table if len(table) > 1 else []


def reached(target: Target, found: dict[str, float], wanted: int) -> str:
    """Whether, and what: the mean, or how many of the workloads, and the worst of those that do not."""
    lacking = f"; {wanted - len(found)} without a figure" if len(found) < wanted else ""
    if target.how == MEAN:
        value = mean(found) or 0.0
        return f"{'yes' if value <= target.limit else 'no'}: {value:.2f}{lacking}"
    above = {name: value for name, value in found.items() if value > target.limit}
    if not above:
        return f"yes: at most {max(found.values()):.2f}{lacking}"
    named = ", ".join(f"{name} {value:.2f}" for name, value in sorted(above.items(), key=lambda it: -it[1]))
    return f"no: {len(found) - len(above)} of {len(found)}; above are {named}{lacking}"


def shown(value: float | None) -> str:
    """A ratio, or that there is none."""
    return "-" if value is None else f"{value:.2f}"
