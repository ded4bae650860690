"""The commands and options in the documentation exist in the command line."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs.cli import options
from cowfs.cli.main import SUBCOMMANDS, main

ROOT = Path(__file__).parents[2]
GUIDES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")} - {*ROOT.glob("docs/site/man/*")})
MANUAL = ROOT / "docs/man/cowfs.1"
_OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z-]*|-[a-zA-Z])(?![\w-])")
_COMMAND = re.compile(r"(?<![\w./-])cowfs +([a-z]+)\b(?!=)([^|;&`)]*)")


def known(subcommand: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Return the options of a subcommand, from its help."""
    with pytest.raises(SystemExit):
        main([subcommand, "--help"])
    said = capsys.readouterr().out
    start = said.index("\noptions:\n") + len("\noptions:\n")
    lines = said[start:].partition("\n\n")[0].splitlines()
    return {option for line in lines if line.startswith("  -") for option in _OPTION.findall(line)}


def code(text: str) -> Iterator[str]:
    """Yield every line of code in Markdown, and every inline code, with wrapped lines joined."""
    fenced = re.findall(r"^```.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^(?:    |\t)(.*)$", text, re.MULTILINE)
    prose = re.sub(r"^(?:    |\t).*$", "", text, flags=re.MULTILINE)
    for block in [*fenced, *indented]:
        yield from block.splitlines()
    for piece in re.findall(r"`([^`]+)`", prose):
        yield " ".join(piece.split())


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield every ``cowfs SUBCOMMAND`` in Markdown's code, with its options."""
    for line in code(text):
        if re.match(r"cowfs: ", line):  # its output
            continue
        for match in _COMMAND.finditer(line.partition(" #")[0] if not line.startswith("#") else line):
            yield match[1], _OPTION.findall(match[2].partition(" -- ")[0])  # the rest is not for cowfs


def manual() -> dict[str, set[str]]:
    """Return the options in the manual page, by subcommand."""
    found: dict[str, set[str]] = {}
    subcommand = ""
    for line in MANUAL.read_text().partition(".Sh COMMANDS")[2].partition(".Sh ENV")[0].splitlines():
        if match := re.match(r"\.It Cm (\w+)", line):
            subcommand = match[1]
            found[subcommand] = set()
        elif line.startswith(".It Fl "):
            found[subcommand] |= {"-" + name for name in re.findall(r"Fl +(-?[\w-]+)", line)}
    return {name: {option for option in found[name] if _OPTION.fullmatch(option)} for name in found}


def test_every_command_in_the_guides_exists(capsys: pytest.CaptureFixture[str]) -> None:
    have = {name: known(name, capsys) for name in SUBCOMMANDS}
    wrong, seen = [], 0
    for guide in GUIDES:
        for subcommand, given in commands(guide.read_text()):
            seen += 1
            if subcommand not in have:
                wrong.append(f"{guide.name}: cowfs {subcommand}")
            else:
                wrong += [f"{guide.name}: cowfs {subcommand} {o}" for o in given if o not in have[subcommand]]
    assert not wrong
    assert seen >= 50  # fails if the search finds nothing


@pytest.mark.parametrize("subcommand", SUBCOMMANDS)
def test_the_manual_has_all_options_and_no_others(
    subcommand: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert manual()[subcommand] == known(subcommand, capsys) - {"-h", "--help"}


def test_each_subcommand_has_a_page_of_its_own(tmp_path: Path) -> None:
    """The output of scripts/manpages contains every option, and man(1) prints no warning."""
    subprocess.run([sys.executable, ROOT / "scripts/manpages", tmp_path], check=True)
    assert {path.name for path in tmp_path.iterdir()} == {f"cowfs-{name}.1" for name in SUBCOMMANDS}
    for name, options_of in manual().items():
        text = (tmp_path / f"cowfs-{name}.1").read_text()
        assert re.search(r"^\.Nd [a-z][^\n]{5,75}$", text, re.MULTILINE), name
        assert f".Nm cowfs\n.Cm {name}\n" in text, f"the synopsis of {name}"
        shown = {"-" + option for option in re.findall(r"Fl +(-?[\w-]+)", text)}
        assert options_of <= shown
        if shutil.which("man"):
            said = subprocess.run(
                ["man", "--warnings", "-l", tmp_path / f"cowfs-{name}.1"],
                env={**os.environ, "MANPAGER": "cat", "MANROFFSEQ": "", "LC_ALL": "C.UTF-8"},
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            assert said.stderr == ""


def test_the_manual_has_all_mount_options() -> None:
    said = (ROOT / "docs/man/mount.cowfs.8").read_text().partition(".Sh OPTIONS")[2].partition(".Sh FILES")[0]
    described = {word for line in said.splitlines() if line.startswith(".It Cm") for word in line.split()}
    wanted = {line.split()[0].partition("=")[0] for line in options.describe().splitlines()}
    assert wanted and wanted <= described


def test_mount_options_in_the_guides_are_known() -> None:
    given = [
        match[1]
        for guide in GUIDES
        for line in code(guide.read_text())
        if re.search(r"(cowfs mount|mount -t cowfs|cowfs LOWER)", line)
        for match in re.finditer(r" -o +([\w=./,-]+)", line)
    ]
    assert given
    options.parse(given)


def test_what_the_guides_make_can_be_made() -> None:
    """Yield ``make TARGET`` and our scripts in all code of the guides."""
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wrong, seen = [], 0
    for guide in GUIDES:
        for line in code(guide.read_text()):
            made = re.findall(r"(?:^|sudo |&& )make ([a-z][a-z-]*)\b(?!=)", line)
            run = re.findall(r"(?<![\w./-])((?:scripts|mount-helpers|\.ci)/[\w./-]*\w)", line)
            seen += len(made) + len(run)
            wrong += [f"{guide.name}: make {target}" for target in made if target not in targets]
            wrong += [f"{guide.name}: {path}" for path in run if not (ROOT / path).exists()]
    assert not wrong
    assert seen >= 20


def test_links_lead_somewhere() -> None:
    broken = []
    for guide in GUIDES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", guide.read_text()):
            place = ROOT / target[1:] if target.startswith("/") else guide.parent / target
            if "://" not in target and not place.exists():
                broken.append(f"{guide.relative_to(ROOT)}: {target}")
    assert not broken


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.name)
def test_lines_of_prose_fit_an_editor(guide: Path) -> None:
    """Prose has at most 120 columns; tables, code and output may be longer."""
    long = []
    fenced = False
    for number, line in enumerate(guide.read_text().split("\n"), 1):
        fenced ^= line.startswith("```")
        if len(line.encode()) > 120 and not fenced and line[:4].strip() and line[0] != "|":
            long.append(number)
    assert long == []
