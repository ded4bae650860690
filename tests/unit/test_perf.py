"""The benchmark suite: its figures, and that a system which does not do the work gets no figure."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from perf import corpus, images, machine, plot, report, requests, run, samples, targets
from perf.bench import Workload, store, workloads
from perf.box import Box, SampleFailed, WrongResult
from perf.peers import systems
from perf.samples import Results, Sample
from tests.support.mounts import eventually


@pytest.fixture
def small_corpus(tmp_path: Path) -> corpus.Corpus:
    """A corpus of a tree of some hundred files."""
    reference = tmp_path / "reference"
    for number in range(240):
        file = reference / f"share/part{number % 6}/file{number}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"%d: return the number\n" % number * (number + 1))
    (reference / "bin").mkdir()
    (reference / "bin/program").write_bytes(b"#!")
    (reference / "share/link").symlink_to("part1/file1")
    (reference / "share/pipe").write_bytes(os.urandom(1 << 20))
    (reference / images.LARGE).write_bytes(os.urandom(1 << 20))
    entries = corpus.scan(reference)
    archived = corpus.choose_archived(entries, 100)
    archive, data = tmp_path / "files.tar", tmp_path / "data"
    with tarfile.open(archive, "w") as tar:
        for entry in archived:
            tar.add(reference / entry.path, arcname=entry.path, recursive=False)
    corpus.write_data(data, 2)
    content = (reference / images.LARGE).read_bytes()
    digest = f"{len(content)} {hashlib.blake2b(content, digest_size=16).hexdigest()}"
    large = corpus.Large(reference / images.LARGE, len(content), digest)
    return corpus.Corpus(tmp_path / "none", archive, data, reference, entries, archived, {}, large)


@pytest.fixture
def box(tmp_path: Path, small_corpus: corpus.Corpus, monkeypatch: pytest.MonkeyPatch) -> Iterator[Box]:
    """A box whose merged tree is a plain copy of the reference."""
    monkeypatch.setattr(store, "GIB", 32 << 20)
    monkeypatch.setattr(store, "NAMES", 2_000)
    scratch = tmp_path / "tmpfs/scratch"
    scratch.mkdir(parents=True)
    box = Box(tmp_path / "box", scratch, small_corpus, limit=60)
    box.open()
    shutil.copytree(small_corpus.reference, box.merged, symlinks=True, dirs_exist_ok=True)
    yield box
    box.close()


def run_nothing(box: Box, argv: list[str], **_: object) -> float:
    """Stand in for Box.run() on a system that answers at once and does nothing."""
    for name in ("listing", "matches", "copy"):
        (box.scratch / name).write_bytes(b"")
    (box.scratch / "client").write_text("0.001 \n")
    return 0.001


@pytest.mark.parametrize("workload", workloads().values(), ids=workloads())
def test_a_workload_accepts_the_right_result(workload: Workload, box: Box) -> None:
    if workload.name == "chown" and os.geteuid() != 0:
        pytest.skip("needs root: gives files to another user")
    workload.setup(box)
    assert workload.run(box) > 0
    workload.verify(box)


@pytest.mark.parametrize("workload", workloads().values(), ids=workloads())
def test_a_system_that_did_nothing_is_not_fast(
    workload: Workload, box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload.setup(box)
    with monkeypatch.context() as patch:
        patch.setattr(Box, "run", run_nothing)
        workload.run(box)
    with pytest.raises((WrongResult, FileNotFoundError)):
        workload.verify(box)


@pytest.mark.parametrize("name", ["untar", "append", "write"])
def test_a_lost_byte_is_found(name: str, box: Box) -> None:
    workload = workloads()[name]
    workload.setup(box)
    workload.run(box)
    where = {"untar": "unpacked/share/pipe", "append": "share/part0/file0", "write": "large"}[name]
    if name == "untar":
        where = "unpacked/" + [e.path for e in box.corpus.archived if stat.S_ISREG(e.mode)][-1]
    with (box.merged / where).open("r+b") as file:
        file.truncate(max(0, (box.merged / where).stat().st_size - 1))
    with pytest.raises(WrongResult):
        workload.verify(box)


def test_a_directory_removed_with_its_neighbours_is_found(box: Box) -> None:
    workload = workloads()["rm-lower"]
    workload.setup(box)
    workload.run(box)
    directory = box.merged / str(box.state["directory"])
    keep = next(p for p in directory.parent.iterdir())
    shutil.rmtree(keep) if keep.is_dir() else keep.unlink()
    with pytest.raises(WrongResult):
        workload.verify(box)


def test_a_client_that_hangs_is_killed_after_the_limit(box: Box) -> None:
    box._deadline = time.monotonic() + 0.3
    begin = time.monotonic()
    with pytest.raises(SampleFailed, match="not done within"):
        box.run(["sleep", "60"])
    assert time.monotonic() - begin < 10


def test_a_client_that_fails_has_no_figure(box: Box) -> None:
    with pytest.raises(SampleFailed, match=r"cat exited with 1.*No such file"):
        box.run(["cat", "no such file"])


def test_a_daemon_that_does_not_mount_is_reported_with_its_last_line(box: Box) -> None:
    with pytest.raises(SampleFailed, match="exited with 3: I cannot"):
        box.start_daemon(["sh", "-c", "echo I cannot >&2; exit 3"])
    box._mounts.clear()


def test_each_turn_begins_with_another_system() -> None:
    names = ["a", "b", "c"]
    turns = [samples.rotated(names, turn) for turn in range(4)]
    assert [turn[0] for turn in turns] == ["a", "b", "c", "a"]
    assert all(sorted(turn) == names for turn in turns)
    assert samples.rotated([], 1) == []


def some_results() -> Results:
    """Return three rounds of one workload on two systems, of which one failed in the last round."""
    find = Sample("find-cold", "cowfs", 0, 0, seconds=1.0, mount_seconds=0.5)
    find.rss_start, find.rss_end = 30_000_000, 60_000_000
    taken = [
        Sample("untar", "cowfs", 0, 0, seconds=2.0, settle_seconds=0.1),
        Sample("untar", "overlayfs", 0, 1, seconds=1.0, settle_seconds=0.1),
        Sample("untar", "overlayfs", 1, 0, seconds=4.0, settle_seconds=0.1),
        Sample("untar", "cowfs", 1, 1, seconds=10.0, settle_seconds=0.1),
        Sample("untar", "overlayfs", 2, 0, seconds=1.0, settle_seconds=0.1),
        Sample("untar", "cowfs", 2, 1, error="wrong bytes", seconds=0.1),
        find,
    ]
    machine = {"cpu": "some", "cores": 2, "hypervisor": True, "memory_mib": 1024, "kernel": "6.0"}
    return Results(
        started="2000-01-01T00:00:00+00:00",
        machine={**machine, "os": "Debian"},
        versions={"cowfs": "abc"},
        corpus={"entries": 60_000, "regular_bytes": 10**9, "image_bytes": 10**8},
        systems={"cowfs": {"fuse": True}, "overlayfs": {"fuse": False}},
        workloads={"untar": {"title": "unpack"}, "find-cold": {"title": "list"}},
        rounds=3,
        samples=taken,
        requests={
            "untar/cowfs": {
                "seconds": 2.0,
                "daemon_cpu_seconds": 1.0,
                "kinds": {"LOOKUP": {"count": 2, "seconds": 0.5}},
            }
        },
    )


def test_ratios_are_paired_within_rounds_and_leave_out_failures() -> None:
    ratio = samples.ratio(some_results(), "untar", "overlayfs", "cowfs")
    # Round 0: 1/2, round 1: 4/10; round 2 has no good sample of cowfs.
    assert ratio is not None and ratio.median == pytest.approx(0.45)
    assert (ratio.low, ratio.high, ratio.count) == (0.4, 0.5, 2)
    assert samples.ratio(some_results(), "find-cold", "overlayfs", "cowfs") is None


def test_the_median_leaves_out_failed_samples() -> None:
    assert samples.spread(some_results().times("untar", "cowfs")) == samples.Spread(6.0, 2.0, 10.0, 2)


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results = some_results()
    results.save(path)
    assert Results.load(path) == results


@pytest.mark.parametrize("text", ["{}", '{"format": 99}', "[]", "no json"])
def test_other_files_are_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    assert report.main([str(path)]) == 2
    assert plot.main([str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_the_report_shows_medians_ratios_memory_requests_and_failures() -> None:
    text = report.text(some_results())
    assert "6.00 (2.00..10.0) !" in text
    assert "0.45x (0.40..0.50)" in text
    assert "30.0 MB" in text and "500 B" in text
    assert "250000.0" in text
    assert "- untar on cowfs: wrong bytes" in text


def test_the_report_in_markdown_has_tables() -> None:
    text = report.text(some_results(), as_markdown=True)
    assert "| workload | cowfs | overlayfs |\n| --- | --- | --- |\n| untar |" in text


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_plots_are_written(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (scripts/setup --perf)")
    path = tmp_path / "2000-01-01.json"
    some_results().save(path)
    assert plot.main([str(path), "--format", kind]) == 0
    for name in ("seconds", "ratios"):
        assert (tmp_path / f"2000-01-01-{name}.{kind}").stat().st_size > 1000
    results_of_targets().save(path)
    assert plot.main([str(path), "--format", "both", "--only", "targets"]) == 0
    assert (tmp_path / f"2000-01-01-targets.{kind}").stat().st_size > 1000


def results_of_targets() -> Results:
    """Return three rounds of two workloads of the targets, on cowfs, two peers and the kernel."""
    seconds = {
        "create": {"cowfs": 1.0, "fuse-overlayfs": 4.0, "unionfs-fuse": 2.5, "overlayfs": 0.5},
        "make": {"cowfs": 9.0, "fuse-overlayfs": 8.0, "unionfs-fuse": 10.0, "overlayfs": 3.0},
    }
    results = some_results()
    results.workloads = {name: {"title": name} for name in seconds}
    results.systems = {name: {"fuse": True} for name in seconds["create"]}
    results.samples = [
        Sample(workload, system, turn, 0, seconds=first * (turn + 1))
        for turn in range(3)
        for workload, by_system in seconds.items()
        for system, first in by_system.items()
    ]
    return results


def test_targets_are_ratios_to_the_fastest_peer_and_to_the_kernel() -> None:
    results = results_of_targets()
    rows = {row[0]: row[1:] for row in targets.ratio_rows(results)}
    assert rows["create"] == ["unionfs-fuse", "0.40", "2.00"]
    assert rows["make"] == ["fuse-overlayfs", "1.12", "3.00"]
    assert rows["**mean of all**"] == ["", "0.67", "2.45"], "geometric"
    met = {(row[0], row[2]): row[4] for row in targets.target_rows(results)}
    assert met["small files, each", "the fastest peer"] == "yes: at most 0.40"
    assert met["programs, each", "the fastest peer"] == "no: 0 of 1; above: make 1.12"
    assert met["all, mean", "overlayfs"] == "no: 2.45"
    assert not any(subject.startswith(("data", "an ordinary user")) for subject, _ in met), "were not run"


def test_a_target_counts_workloads_without_a_figure() -> None:
    results = results_of_targets()
    for sample in results.samples:
        if (sample.workload, sample.system) == ("make", "cowfs"):
            sample.error = "wrong bytes"
    met = {(row[0], row[2]): row[4] for row in targets.target_rows(results)}
    assert met["all, mean", "the fastest peer"] == "yes: 0.40; 1 without a figure"


def test_the_document_has_the_targets_between_its_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, target = tmp_path / "2000-01-01.json", tmp_path / "benchmarks.md"
    results_of_targets().save(path)
    target.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "DOCUMENT", target)
    monkeypatch.setattr(report, "PLOTS", tmp_path / "plots")
    for _ in range(2):
        assert report.main([str(path), "--document"]) == 0
        text = target.read_text()
        assert text.startswith(f"before\n{report.BEGIN}\n") and text.endswith(f"{report.END}\nafter\n")
        assert "| create | unionfs-fuse | 0.40 | 2.00 |" in text and "old" not in text
    target.write_text("no marks")
    with pytest.raises(ValueError, match="no marks"):
        report.document(path, results_of_targets())


TRACE = """\
# tracer: nop
            tar-90  [001] ..... 5.000100: fuse_request_send: connection 40 req 2 opcode 1 (FUSE_LOOKUP) len 48
         python-91  [000] ..... 5.000150: fuse_request_end: connection 40 req 2 len 16 error 0
            tar-90  [001] ..... 5.000200: fuse_request_send: connection 40 req 4 opcode 1 (FUSE_LOOKUP) len 48
            rm-92  [001] ..... 5.000210: fuse_request_send: connection 40 req 6 opcode 2 (FUSE_FORGET) len 48
         python-91  [000] ..... 5.000300: fuse_request_end: connection 40 req 4 len 16 error -2
         python-91  [000] ..... 5.000400: fuse_request_end: connection 40 req 1 len 16 error 0
"""


def test_requests_are_counted_and_timed() -> None:
    assert requests.as_json(requests.parse(iter(TRACE.splitlines()))) == {
        "LOOKUP": {"count": 2, "seconds": pytest.approx(0.00015)},
        "FORGET": {"count": 1, "seconds": 0},
    }


def entry(path: str, size: int = 10, mode: int = stat.S_IFREG | 0o644) -> corpus.Entry:
    return corpus.Entry(path, mode, size, 1)


def test_the_lower_is_limited_and_prefers_what_a_root_has() -> None:
    entries = [entry("zoo/a"), entry("share/a"), entry("bin/huge", corpus.MAX_FILE + 1), entry("bin/a")]
    assert [e.path for e in corpus.choose(entries)] == ["bin/a", "share/a", "zoo/a"]
    assert [e.path for e in corpus.choose(entries, max_entries=2)] == ["bin/a", "share/a"]
    assert [e.path for e in corpus.choose(entries, max_bytes=15)] == ["bin/a"]


def test_files_are_chosen_evenly_over_the_tree(small_corpus: corpus.Corpus) -> None:
    chosen = small_corpus.regular_files(1, 1 << 16, 60)
    assert len(chosen) == len({e.path for e in chosen}) == 60
    assert {e.path.split("/")[1] for e in chosen} >= {f"part{n}" for n in range(6)}


def test_the_archive_has_every_directory_above_its_files(small_corpus: corpus.Corpus) -> None:
    paths = [e.path for e in small_corpus.archived]
    files = [e for e in small_corpus.archived if stat.S_ISREG(e.mode)]
    assert len(files) == 100
    for file in files:
        assert paths.index(os.path.dirname(file.path)) < paths.index(file.path)


def test_the_data_file_has_no_two_equal_blocks(small_corpus: corpus.Corpus) -> None:
    data = small_corpus.data.read_bytes()
    blocks = [data[at : at + 4096] for at in range(0, len(data), 4096)]
    assert len(blocks) == len(set(blocks)) == 512


@pytest.mark.skipif(shutil.which("mksquashfs") is None, reason="mksquashfs is not installed (squashfs-tools)")
def test_the_image_has_the_tree_and_is_made_once(tmp_path: Path, small_corpus: corpus.Corpus) -> None:
    image = corpus.make_image(tmp_path / "cache", small_corpus.reference)
    listed = subprocess.run(["unsquashfs", "-l", str(image)], capture_output=True, text=True, check=True)
    assert len(listed.stdout.splitlines()) == len(small_corpus.entries) + 1
    before = image.stat()
    assert corpus.make_image(tmp_path / "cache", small_corpus.reference).stat() == before


def test_a_missing_program_is_reported_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    wanted = ("unionfs", "unionfs-fuse"), ("fuse2fs", "fuse2fs")
    assert machine.missing_programs(*wanted) == (
        "unionfs is not installed (Debian package unionfs-fuse); "
        "fuse2fs is not installed (Debian package fuse2fs)"
    )
    missing = {name: system.missing_requirements() for name, system in systems().items()}
    assert "Debian package unionfs-fuse" in missing["unionfs-fuse"]
    assert "Debian package squashfuse" in missing["squashfuse+fuse2fs+fuse-overlayfs"]


def test_the_mount_commands_of_systems_have_no_paths_of_this_machine() -> None:
    for system in systems().values():
        assert "MNT" in system.options()
        assert str(Path.cwd()) not in system.options()


def test_an_unknown_name_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["-w", "nonsense"]) == 2
    message = capsys.readouterr().err
    assert "nonsense" in message and "find-cold" in message


def test_it_needs_root(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert run.main([]) == 2
    assert "needs root" in capsys.readouterr().err


def test_the_memory_and_time_of_a_session_are_measured() -> None:
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        # A program that has just been started has no memory yet.
        eventually(lambda: getattr(machine.session_usage(child.pid), "rss", 0) > 100_000, "it is seen")
    finally:
        child.kill()
        child.wait()
    assert machine.session_usage(child.pid) is None
