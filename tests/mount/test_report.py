"""`cowfs report`: one page, that has what was changed as data, and nothing that acts."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from tests.mount.test_diff_patch import script
from tests.mount.test_revert import MAKE
from tests.support.mounts import cowfs, mounted
from tests.support.system import needs_fuse

DEV_FUSE_AT_NIGHT = True

pytestmark = needs_fuse

NAMES = [
    b"</script><img src=x onerror=alert(1)>",
    b"new\nline",
    "a\u202eb".encode(),
    b"\xff\xfe",
    b"<!--<script>",
]
HOSTILE = "new/<!--<script>/</script><img src=x onerror=alert(1)>"
WORK = rf"""
echo 'more </script><img src=x onerror=alert(2)>' >>etc/fstab; rm etc/hosts; mv usr bin; chmod 755 bin/tool
mkdir -p 'new/<!--<script>/<'; touch '{HOSTILE}' "$(printf 'new/\342\200\256gpj')" "$(printf 'new/\377\n"')"
printf 'a\342\200\256b\033[31m\377\n' >new/text; head -c 5000 /dev/zero >new/binary; seq 100000 >new/long
cp "$(command -v touch)" '../<b>&'; '../<b>&' new/by
"""


class Page(HTMLParser):
    """The elements of a page, and the text in those that have only text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {}
        self._open = [""]
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag in {"script", "style"}:
            self.inside.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        self._open.append("")

    def handle_data(self, data: str) -> None:
        if self._open[-1] in {"script", "style"}:
            self.inside[self._open[-1]][-1] += data

    @property
    def data(self) -> Any:
        return json.loads(self.inside["script"][0])


def check(text: str) -> Page:
    """Look at all that a page must not have; return it."""
    page = Page(text)
    policy = next(attrs["content"] for tag, attrs in page.elements if "http-equiv" in attrs) or ""
    for kind, part in (("script", page.inside["script"][1]), ("style", page.inside["style"][0])):
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert [len(page.inside[kind]) for kind in ("script", "style")] == [2, 1]
    for tag, attrs in page.elements:
        assert tag not in {"img", "link", "iframe", "object", "embed", "base", "form", "b"}
        assert not {"src", "srcset", "style"} & attrs.keys()
        assert not any(name.startswith("on") for name in attrs)
        assert (attrs.get("href") or "#").startswith("#")
    assert not any(character in text for character in "\u202e\x1b\x00")
    return page


def test_a_page_of_hostile_names(tmp_path: Path) -> None:
    script(MAKE, tmp_path)
    store, file = tmp_path / "<i>&store", tmp_path / "page.html"
    file.write_text("old")
    with mounted(tmp_path / "lower", tmp_path / "mnt", store, options=["blame"]) as here:
        script(WORK, here.path)
        cowfs("report", here.path, "-f", "-o", file, check=True)
        live = check(file.read_text()).data
        inside = cowfs("report", here.path, "-o", here.path / "page.html")
        assert inside.returncode == 1 and "inside the mount" in inside.stderr
    first = cowfs("report", store, "-o", "-", check=True).stdout
    cowfs("report", store, "-fo", file, check=True)
    assert file.read_text() == first and file.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in tmp_path.glob(".page*")] == []
    page = check(first)
    data = page.data
    assert live["rows"] == data["rows"] and live["diffs"] == data["diffs"]

    rows = {row[1]: row for row in data["rows"]}
    told = [json.loads(line) for line in cowfs("diff", store, "--json", check=True).stdout.splitlines()]
    assert [row[0] for row in data["rows"]] == [change["kind"] for change in told]
    assert HOSTILE in rows and "new/\\342\\200\\256gpj" in rows and 'new/\\377\\n"' in rows
    assert rows["bin/"][5] == "usr/" and rows["bin/tool"][2] == "mode"
    assert "mode 0644 → 0755" in rows["bin/tool"][9]
    assert "+more </script><img src=x onerror=alert(2)>" in data["diffs"][rows["etc/fstab"][6]].split("\n")
    assert "-localhost" in data["diffs"][rows["etc/hosts"][6]]
    assert "+a\\u202eb\\x1b[31m\\xff" in data["diffs"][rows["new/text"][6]]
    assert rows["new/binary"][4:7] == [5000, "", -1]
    assert rows["new/long"][6] == -1 and data["left"]["diffs"] == 1
    assert (
        "<b>&" in rows["new/by"][7] and data["recorded"] and sum(count for _, count in data["programs"]) > 5
    )
    assert dict(data["reasons"])["new"] > 500_000
    assert len([tag for tag, _ in page.elements if tag == "svg"]) == 2

    only = cowfs("report", store, "etc", "--content", "-o", "-", check=True).stdout
    assert [row[1:3] for row in check(only).data["rows"]] == [["etc/fstab", "content"], ["etc/hosts", ""]]


def described(text: str) -> list[dict[str, Any]]:
    """The rows of a page, by name."""
    found = check(text).data
    kinds = {"A": "added", "M": "modified", "D": "deleted", "R": "renamed"}
    return [
        {"kind": kinds[row[0]], "path": row[1], "diff": found["diffs"][row[6]] if row[6] >= 0 else ""}
        for row in found["rows"]
    ]


def test_names_and_contents_are_described(tmp_path: Path) -> None:
    lower = tmp_path / "lower"
    lower.mkdir()
    (lower / "text").write_text("old\n")
    (lower / "gone").write_text("x\n")
    with mounted(lower, tmp_path / "mnt", tmp_path / "store") as here:
        for name in NAMES:
            with open(os.path.join(os.fsencode(here.path), name.replace(b"/", b"|")), "wb") as file:
                file.write(b"</script>\x1b]0;\n")
        (here.path / "text").write_text("new\n")
        (here.path / "gone").unlink()
        live = cowfs("report", here.path, "--output", "-", check=True).stdout
    out = tmp_path / "page.html"
    cowfs("report", tmp_path / "store", "--output", out, check=True)
    page = out.read_text(encoding="ascii")
    assert described(page) == described(live)
    rows = {row["path"]: row for row in described(page)}
    assert len(rows) == len(NAMES) + 2
    assert rows["gone"]["kind"] == "deleted"
    assert "-old\n+new\n" in rows["text"]["diff"]
    assert {"new\\nline", "a\\342\\200\\256b", "\\377\\376"} <= set(rows)
    assert page.count("</script>") == 2 and "<img" not in page and "<!--" not in page
    assert "\x1b" not in "".join(row["diff"] for row in rows.values())
    assert "default-src 'none'" in page

    only = described(cowfs("report", tmp_path / "store", "g*e", "--output", "-", check=True).stdout)
    assert [row["path"] for row in only] == ["gone"]
    refused = cowfs("report", tmp_path / "store", "--output", out)
    assert refused.returncode and "already exists" in refused.stderr
    cowfs("report", tmp_path / "store", "--output", out, "--force", check=True)
    assert out.read_text(encoding="ascii") == page


def test_what_cannot_be(tmp_path: Path) -> None:
    script(MAKE, tmp_path)
    (tmp_path / "there").mkdir()
    cowfs("create", tmp_path / "store.bs", "16", check=True)
    for words, code, word in (
        (["nothing", "-o", "x.html"], 32, "no such store"),
        (["store.bs", "-fo", tmp_path / "there"], 1, "not a regular file"),
        (["store.bs", "-o", tmp_path / "none/x"], 2, "No such file"),
        (["store.bs", "-o", "-", "--ignore", "colour"], 1, "unknown aspect"),
        (["store.bs", "-o", tmp_path / "there"], 1, "already exists"),
    ):
        lower = [] if words[0] == "nothing" else ["--lower", tmp_path / "lower", "--force-lower"]
        done = cowfs("report", tmp_path / str(words[0]), *map(str, words[1:]), *map(str, lower))
        assert (done.returncode, done.stdout) == (code, "") and word in done.stderr, done
        assert done.stderr.count("\n") == 1
