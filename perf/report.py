"""Print a results file as tables: ``python -m perf.report [FILE] [--markdown]``, by default the newest file.

``--document`` writes the targets and their charts to docs/.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from perf import targets
from perf.samples import Results, Spread, ratio, spread

FOLDER = Path(__file__).with_name("results")
DOCUMENT = FOLDER.parents[1] / "docs/benchmarks.md"
PLOTS = DOCUMENT.with_name("plots")
BEGIN, END = "<!-- targets: made by perf.report --document -->", "<!-- end of targets -->"
BASES = (
    *("cowfs", "overlayfs", "cowfs-store", "cowfs-process"),
    *("squashfuse_ll", "squashfuse_ll+fuse-overlayfs"),
)
"""The systems to which the tables give ratios."""


def newest() -> Path | None:
    """Return the newest file in ``results/``, by its name; None if there is none."""
    return max(FOLDER.glob("*.json"), default=None)


def load_results(file: Path | None, program: str) -> tuple[Path, Results] | None:
    """Load *file*, or the newest results; print an error as *program* and return None if that fails."""
    path = file or newest()
    if path is None:
        print(f"{program}: there are no results yet (make perf)", file=sys.stderr)
        return None
    try:
        return path, Results.load(path)
    except (OSError, ValueError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return None


def rows(results: Results, base: str) -> list[list[str]]:
    """Return the table of times: for each workload, each system's median seconds and its ratio to *base*."""
    workloads = [name for name in results.workloads if results.samples_of(name, base)]
    names = [name for name in results.systems if any(results.samples_of(w, name) for w in workloads)]
    table = [["workload", *names]]
    for workload in workloads:
        cells = [workload]
        for name in names:
            times = spread(results.times(workload, name))
            ratios = ratio(results, workload, name, base) if name != base else None
            cells.append(cell(times, ratios, any(s.error for s in results.samples_of(workload, name))))
        table.append(cells)
    return table


def cell(times: Spread | None, ratios: Spread | None, failed: bool) -> str:
    """Return a cell of the table: seconds, and the ratio with its minimum and maximum."""
    if times is None:
        return "failed" if failed else "-"
    text = seconds(times.median)
    if ratios:
        text += f" {ratios.median:.2f}x ({ratios.low:.2f}..{ratios.high:.2f})"
    else:
        text += f" ({seconds(times.low)}..{seconds(times.high)})"
    return text + (" !" if failed else "")


def seconds(value: float) -> str:
    """Return *value* with three significant digits."""
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def memory_rows(results: Results) -> list[list[str]]:
    """Return the table of resident memory of each daemon, at the start and after find has listed the tree."""
    table = [["daemon", "at start", "after find", "per inode", "mount"]]
    images = results.corpus.get("images", {})
    entries = {"find-cold": results.corpus["entries"]}
    entries |= {f"{name}-find": facts["entries"] for name, facts in images.items()}
    for workload, count in entries.items():
        for name in results.systems:
            good = [s for s in results.samples_of(workload, name) if s.rss_start and s.rss_end]
            if not good:
                continue
            start = statistics.median([float(s.rss_start or 0) for s in good])
            end = statistics.median([float(s.rss_end or 0) for s in good])
            per_inode = (end - start) / count
            mounts = [s.mount_seconds for s in good if s.mount_seconds]
            mounted = f"{statistics.median(mounts):.2f} s" if mounts else "-"
            daemon = name if workload == "find-cold" else f"{name}, {workload.removesuffix('-find')}"
            table.append(
                [daemon, f"{start / 1e6:.1f} MB", f"{end / 1e6:.1f} MB", f"{per_inode:.0f} B", mounted]
            )
    return table


def settle_rows(results: Results) -> list[list[str]]:
    """Return the table of median seconds from the end of each workload until all is in the store's image."""
    names = list(results.systems)
    table = [["until unmounted", *names]]
    for workload in results.workloads:
        samples = [results.samples_of(workload, name) for name in names]
        values = [[s.settle_seconds for s in group if s.settle_seconds] for group in samples]
        table.append([workload, *[seconds(statistics.median(v)) if v else "-" for v in values]])
    return table


def request_rows(results: Results, key: str) -> list[list[str]]:
    """Return the table of requests of the traced sample *key*."""
    table = [["request", "count", "us each", "seconds"]]
    for kind, values in results.requests[key]["kinds"].items():
        us = 1e6 * values["seconds"] / values["count"] if values["count"] else 0
        table.append([kind, f"{values['count']:.0f}", f"{us:.1f}", f"{values['seconds']:.3f}"])
    return table


def aligned(table: list[list[str]]) -> str:
    """Return *table* as text in columns."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join(lines)


def markdown(table: list[list[str]]) -> str:
    """Return *table* in Markdown."""
    head, *body = table
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def machine_line(results: Results) -> str:
    """Return a sentence about the machine and the versions."""
    m, c = results.machine, results.corpus
    load = [s.load for s in results.samples]
    return " ".join(
        (
            f"{results.started}: {m['cpu']}, {m['cores']} cores,",
            "a virtual machine," if m["hypervisor"] else "not virtual,",
            f"{m['memory_mib']} MiB, Linux {m['kernel']}, {m['os']}.",
            ", ".join(f"{k} {v}" for k, v in results.versions.items()) + ".",
            f"Lower: {c['entries']} entries, {c['regular_bytes'] / 1e6:.0f} MB in a squashfs of",
            f"{c['image_bytes'] / 1e6:.0f} MB. {results.rounds} rounds;",
            f"load average {min(load, default=0):.1f}..{max(load, default=0):.1f}, nice {m.get('nice', 0)}.",
        )
    )


def image_lines(results: Results) -> list[str]:
    """Return a line about each image of the squashfs benchmarks."""
    return [
        f"The {name} image: {facts['entries']} entries, one of {facts['large_bytes'] / 1e6:.0f} MB, "
        f"in {facts['image_bytes'] / 1e6:.0f} MB."
        for name, facts in results.corpus.get("images", {}).items()
        if "large_bytes" in facts
    ]


def text(results: Results, *, as_markdown: bool = False) -> str:
    """Return all tables, for a terminal or in Markdown."""
    show = markdown if as_markdown else aligned
    parts = [machine_line(results), *image_lines(results), *target_parts(results, show)]
    for base in BASES:
        if any(s.system == base for s in results.samples):
            parts.append(f"Median seconds, and the ratio to {base} paired within rounds (lowest..highest):")
            parts.append(show(rows(results, base)))
    memory, settle = memory_rows(results), settle_rows(results)
    if len(memory) > 1:
        parts += ["Memory of the daemon, and the time to mount:", show(memory)]
    parts += ["Seconds from the end of the workload until everything is in the store's image:", show(settle)]
    for key in results.requests:
        entry = results.requests[key]
        cpu = entry["daemon_cpu_seconds"]
        parts.append(f"Requests of {key}: {entry['seconds']} s, daemon's processor time {cpu} s")
        parts.append(show(request_rows(results, key)))
    failed = results.errors()
    if failed:
        lines = {f"{s.workload} on {s.system}: {s.error}" for s in failed}
        parts += ["Failed (marked !):", "\n".join(f"- {line}" for line in sorted(lines))]
    return "\n\n".join(parts)


def target_parts(results: Results, show: Callable[[list[list[str]]], str]) -> list[str]:
    """Return the titles and tables of the targets; nothing if the run has none of their workloads."""
    tables: dict[str, Callable[[Results], list[list[str]]]] = {
        "Targets: the time of cowfs divided by that of the other system:": targets.target_rows,
        "Ratios, the medians of those within each round; means are geometric:": targets.ratio_rows,
        "The same for an ordinary user, to the stack of squashfuse_ll, fuse2fs and fuse-overlayfs:":
            targets.user_rows,
    }  # fmt: skip
    filled = {title: table(results) for title, table in tables.items()}
    return [part for title, table in filled.items() if table for part in (title, show(table))]


def document(path: Path, results: Results) -> None:
    """Rewrite the section of the targets in docs/benchmarks.md, from a run and its charts."""
    parts = [textwrap.fill(machine_line(results), 120), *target_parts(results, markdown)]
    if path.resolve().parent == FOLDER:
        parts.insert(1, f"The raw figures: [{path.name}](../perf/results/{path.name}).")
    charts = PLOTS.glob(f"{path.stem}-targets.svg")
    parts += [f"![Ratios](plots/{chart.name}) ([PNG](plots/{chart.stem}.png))" for chart in charts]
    parts += [
        "Median seconds, and the ratio to cowfs paired within rounds (lowest..highest); `!` marks a failure:"
    ]
    parts += [markdown(rows(results, base)) for base in ("cowfs", "cowfs-user") if base in results.systems]
    failed = {f"- {s.workload} on {s.system}: {s.error}" for s in results.errors()}
    parts += ["\n".join(sorted(failed))] if failed else []
    replace_section(DOCUMENT, BEGIN, END, f"\n{chr(10).join(f'{part}{chr(10)}' for part in parts)}")


def replace_section(path: Path, begin: str, end: str, text: str) -> None:
    """Replace what is between two marks in *path* with *text*; ValueError if a mark is missing."""
    head, _, rest = path.read_text().partition(begin)
    _, end_mark, tail = rest.partition(end)
    if not end_mark:
        raise ValueError(f"{path} has no marks for this section: {begin}")
    path.write_text(f"{head}{begin}{text}{end}{tail}")


def main(argv: list[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="perf.report", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="a results file (default: the newest)")
    parser.add_argument("--document", action="store_true", help="update docs/benchmarks.md and docs/plots")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    options = parser.parse_args(argv)
    loaded = load_results(options.file, "perf.report")
    if loaded is None:
        return 2
    path, results = loaded
    if options.document:
        from perf import plot  # here, because it imports this module

        for old in PLOTS.glob("*-targets.*"):
            old.unlink()
        plot.main([str(path), "-o", str(PLOTS), "--format", "both", "--only", "targets"])
        document(path, results)
    print(text(results, as_markdown=options.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
