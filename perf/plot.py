"""Draw a results file: ``python -m perf.plot [FILE] [-o DIR] [--format png|svg]``. Needs matplotlib.

The first chart shows the seconds of every workload on every system, the second their ratios to cowfs. The
bars are medians, and the whiskers reach from the fastest to the slowest round. For a run of the targets, a
third chart shows the ratios of cowfs, over both transports, to the fastest C peer and to the kernel's
overlayfs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from perf import targets
from perf.report import load_results
from perf.samples import Results, Spread, ratio, spread

COLOURS = {
    "cowfs": "#1b7f5c",
    "overlayfs": "#33527a",
    "overlayfs-default": "#8aa4c4",
    "fuse-overlayfs": "#c8643c",
    "unionfs-fuse": "#d9a441",
    "cowfs-process": "#1b7f5c",
    "cowfs-store": "#1b7f5c",
    "squashfs": "#33527a",
    "squashfuse_ll+fuse-overlayfs": "#c8643c",
}
OTHER = "#8c8c8c"
OWN = ("cowfs", "cowfs-process", "cowfs-store")
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10)


def cowfs_seconds(results: Results, workload: str) -> Spread | None:
    """Return the seconds of cowfs, with the engine that ran this workload."""
    return next(filter(None, (spread(results.times(workload, name)) for name in OWN)), None)


def ratio_to_cowfs(results: Results, workload: str, system: str) -> Spread | None:
    """Return the ratio of *system* to cowfs, with the engine that ran this workload."""
    return next(filter(None, (ratio(results, workload, system, name) for name in OWN)), None)


def draw_seconds(results: Results, pyplot: Any) -> Any:
    """Draw one small chart for each workload, each with its own scale."""
    names = list(results.workloads)
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(4.6 * columns, 2.4 * lines), squeeze=False)
    for index, axis in enumerate(axes.flat):
        if index >= len(names):
            axis.set_visible(False)
            continue
        workload = names[index]
        axis.set_title(results.workloads[workload]["title"], fontsize=9)
        draw_bars(axis, results, workload)
    figure.supxlabel("seconds, median of the rounds (less is better)", fontsize=9)
    figure.tight_layout()
    return figure


def draw_bars(axis: Any, results: Results, workload: str) -> None:
    """Draw the bars of one workload, from top to bottom in the order of the systems."""
    values = [(s, spread(results.times(workload, s))) for s in reversed(results.systems)]
    drawn = [(system, value) for system, value in values if value]
    for place, (system, value) in enumerate(drawn):
        axis.barh(place, value.median, color=COLOURS.get(system, OTHER), height=0.7)
        whisker = [[value.median - value.low], [value.high - value.median]]
        axis.errorbar(value.median, place, xerr=whisker, color="#222222", capsize=2, linewidth=0.8)
    axis.set_yticks(range(len(drawn)), [system for system, _ in drawn], fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    ours = cowfs_seconds(results, workload)
    if ours:
        axis.axvline(ours.median, color=COLOURS["cowfs"], linewidth=0.8, linestyle=":")
    axis.spines[["top", "right"]].set_visible(False)


def draw_ratios(results: Results, pyplot: Any) -> Any:
    """Draw one chart with all ratios on a logarithmic scale, with cowfs as the line at 1."""
    others = [name for name in results.systems if name not in OWN]
    names = list(results.workloads)
    figure, axis = pyplot.subplots(figsize=(10, 0.45 * len(names) * max(1, len(others)) / 2 + 1.5))
    height = 0.8 / max(1, len(others))
    for number, system in enumerate(others):
        for place, workload in enumerate(reversed(names)):
            value = ratio_to_cowfs(results, workload, system)
            if value is None:
                continue
            at = place + 0.4 - (number + 0.5) * height
            label = system if workload == names[0] else None
            axis.barh(
                at, value.median - 1, left=1, height=height * 0.9,
                color=COLOURS.get(system, OTHER), label=label,
            )  # fmt: skip
            axis.plot([value.low, value.high], [at, at], color="#222222", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axis.set_yticks(range(len(names)), list(reversed(names)))
    axis.axvline(1, color=COLOURS["cowfs"], linewidth=1.5)
    axis.set_xlabel("times as long as cowfs (right of the line: slower than cowfs)")
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def draw_targets(results: Results, pyplot: Any) -> Any:
    """Draw two charts: ratios to the fastest C peer (or a user's stack), and to the kernel's overlayfs."""
    ours = targets.workloads_in(results, targets.ALL)
    of_user = targets.workloads_in(results, ("user",))
    sides = [
        ("times as long as the fastest C peer", targets.PEERS, of_user),
        ("times as long as the kernel's overlayfs", targets.KERNELS, []),
    ]
    height = 0.32 * (len(ours) + len(of_user)) + 1.6
    figure, axes = pyplot.subplots(1, 2, figsize=(12, height), squeeze=False)
    for axis, (axis_label, peers, users) in zip(axes.flat, sides, strict=True):
        rows = [*ours, *users]
        for number, system in enumerate(targets.OWN[:2]):
            values = targets.ratios(results, ours, system, peers)
            label = f"{system}: mean {targets.format_ratio(targets.mean(values))}"
            values |= targets.ratios(results, users, targets.USER_OWN[number], targets.STACKS)
            places = [len(rows) - 1 - rows.index(name) + 0.18 - 0.36 * number for name in values]
            widths = [value - 1 for value in values.values()]
            colour = (COLOURS["cowfs"], OTHER)[number]
            axis.barh(places, widths, left=1, height=0.34, color=colour, label=label)
        axis.set_xscale("log")
        axis.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        axis.set_yticks(range(len(rows)), list(reversed(rows)), fontsize=8)
        axis.axvline(1, color="#222222", linewidth=1)
        axis.set_xlabel(f"{axis_label} (left of the line: cowfs is faster)", fontsize=9)
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def main(argv: list[str] | None = None) -> int:
    """Write the charts beside the results file, or into another directory."""
    parser = argparse.ArgumentParser(prog="perf.plot", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="a results file (default: the newest)")
    parser.add_argument("-o", "--output", type=Path, help="directory for the charts (default: that of FILE)")
    parser.add_argument("--format", choices=("png", "svg", "both"), default="svg")
    parser.add_argument("--only", choices=("seconds", "ratios", "targets"), help="draw only this chart")
    options = parser.parse_args(argv)
    loaded = load_results(options.file, "perf.plot")
    if loaded is None:
        return 2
    path, results = loaded
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("perf.plot: matplotlib is not installed (scripts/setup --perf)", file=sys.stderr)
        return 2
    directory = options.output or path.parent
    directory.mkdir(parents=True, exist_ok=True)
    charts = {"seconds": draw_seconds}
    if any(name in results.systems for name in OWN) and len(results.systems) > 1:
        charts["ratios"] = draw_ratios
    if targets.ratio_rows(results):
        charts["targets"] = draw_targets
    # The same results must give the same file each time.
    matplotlib.rcParams["svg.hashsalt"] = path.stem
    for name, draw in charts.items():
        if options.only not in (None, name):
            continue
        figure = draw(results, pyplot)
        for kind in ("png", "svg") if options.format == "both" else (options.format,):
            target = directory / f"{path.stem}-{name}.{kind}"
            figure.savefig(target, dpi=120, metadata={"Date": None} if kind == "svg" else None)
            print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
