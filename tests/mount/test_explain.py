"""`cowfs explain`: what each layer has, and the rule that decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.mount.test_diff_patch import script
from tests.mount.test_revert import MAKE
from tests.support.mounts import cowfs, make_store, mounted
from tests.support.system import needs_fuse

DEV_FUSE_AT_NIGHT = True

pytestmark = needs_fuse

WORK = """
echo more >>etc/fstab; rm etc/hosts; mv usr bin; rm -r old; mkdir old; chmod 600 big; echo two >>second
echo more >>bin/lib/so
chmod 600 script; chmod 755 script; chmod 644 script; echo new >added
"""


def explained(what: Path, *paths: str) -> list[dict[str, Any]]:
    done = cowfs("explain", what, *paths, "--json")
    assert done.returncode in {0, 32} and done.stderr == "", done
    return [json.loads(line) for line in done.stdout.splitlines()]


def rules(answer: dict[str, Any]) -> list[list[str]]:
    return [[rule["rule"] for rule in layer["rules"]] for layer in answer["layers"]]


@pytest.mark.parametrize("kind", ["image", "directory"])
def test_the_rule_that_decides(tmp_path: Path, kind: str) -> None:
    script(f"{MAKE} head -c 100000 /dev/zero >huge", tmp_path)
    store = make_store(tmp_path, kind)
    paths = [
        "etc/fstab",
        "etc/hosts",
        "bin/tool",
        "bin/lib/so",
        "old/f",
        "big",
        "first",
        "added",
        "etc",
        "nothing",
        "script",
        "etc/fstab/below a file",
        "usr",
        "usr/tool",
        "old",
        "bin",
        "huge",
        "giant",
    ]
    with mounted(tmp_path / "lower", tmp_path / "mnt", store) as here:
        script(f"{WORK} mv huge giant; echo anew >huge", here.path)
        live = explained(here.path, *paths)
        assert explained(here.path / "etc/fstab") == live[:1]
        lines = cowfs("explain", here.path, "usr", "usr/tool", "huge").stdout.splitlines()
        assert "  store     whiteout  at usr" in lines
        assert "  renamed to bin" in lines and "  what the lower has here was renamed to giant" in lines
    assert explained(store, *paths) == live
    answers = dict(zip(paths, live, strict=True))
    assert {path: answer["change"] for path, answer in answers.items()} == {
        "etc/fstab": "M", "etc/hosts": "D", "bin/tool": None, "bin/lib/so": "M", "old/f": "D", "big": "M",
        "first": "M",
        "added": "A", "etc": None, "nothing": None, "script": None,
        "etc/fstab/below a file": None, "usr": "R", "usr/tool": None, "old": None,
        "bin": "R", "huge": "A", "giant": "R",
    }  # fmt: skip
    listed = map(json.loads, cowfs("diff", store, "--json", check=True).stdout.splitlines())
    kinds = {each["path"]: (each["kind"], each["what"]) for each in listed}
    now_at = {"usr": "bin", "huge": "giant"}
    for path in answers.keys() - {"usr"}:
        assert (answers[path]["change"], answers[path]["what"]) == kinds.get(path, (None, [])), path
    assert {path: answer["to"] for path, answer in answers.items() if "to" in answer} == now_at
    assert (answers["bin"]["source"], answers["giant"]["source"]) == ("usr", "huge")
    assert rules(answers["etc/fstab"]) == [["shown"], []]
    assert rules(answers["etc/hosts"]) == [["whiteout"], []]
    assert answers["etc/hosts"]["layers"][0]["type"] == "whiteout" and not answers["etc/hosts"]["seen"]
    assert rules(answers["bin/tool"]) == [["redirect"], ["shown"]]
    assert answers["bin/tool"]["layers"][1]["path"] == answers["bin/tool"]["source"] == "usr/tool"
    assert answers["bin/lib/so"]["layers"][1]["path"] == answers["bin/lib/so"]["source"] == "usr/lib/so"
    assert answers["bin/lib/so"]["layers"][1]["size"] == 3
    assert rules(answers["old/f"]) == [["opaque"], []] and not answers["old/f"]["seen"]
    assert answers["old/f"]["bytes"] == answers["usr/tool"]["bytes"] == 0 < answers["old"]["bytes"]
    assert rules(answers["big"]) == [["metacopy"], ["data"]] and answers["big"]["what"] == ["mode"]
    assert rules(answers["first"])[0] == ["index"] and answers["first"]["what"] == ["content", "times"]
    assert rules(answers["etc"]) == [["shown"], ["merged"]]


def test_for_people(tmp_path: Path) -> None:
    script(MAKE, tmp_path)
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        script(WORK, here.path)
        shown = cowfs("explain", here.path / "etc/hosts")
        assert shown.returncode == 32
        lines = shown.stdout.splitlines()
        assert lines[0] == "etc/hosts" and lines[1].split() == ["store", "whiteout"]
        assert lines[-1].startswith("  deleted")
        cowfs("checkpoint", here.path, "before the upgrade", check=True)
        (here.path / "etc/fstab").chmod(0o600)
        lines = cowfs("explain", here.path / "etc/fstab", check=True).stdout.splitlines()
        columns = [line.index(" -rw") for line in lines if " -rw" in line]
        assert len(columns) == 3 and len(set(columns)) == 1, lines


def test_what_cannot_be(tmp_path: Path) -> None:
    script(MAKE, tmp_path)
    for words, code, word in ((["nothing", "x"], 32, "no such store"), (["lower"], 1, "no path")):
        done = cowfs("explain", tmp_path / words[0], *words[1:])
        assert (done.returncode, done.stdout) == (code, "") and word in done.stderr, done
