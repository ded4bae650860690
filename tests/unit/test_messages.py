"""messages.txt lists every message that a user can meet, so that reviewers see new wordings.

``python tests/unit/test_messages.py`` writes the list anew.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("messages.txt")
_SAY = {
    "note",
    "say",
    "_say",
    "read_answer",
    "warn",
    "print",
    "progress",
    "debug",
    "info",
    "warning",
    "error",
    "exception",
    "critical",
    "add_json_or_null",
}
_ENDS = (
    "Error",
    "Failure",
    "StoreBusy",
    "WrongLower",
    "Damaged",
    "DamagedImage",
    "Silent",
    "Dead",
    "Refused",
    "Unreachable",
)
_ARGPARSE = {"help", "description", "epilog"}


def shown(node: ast.expr) -> str | None:
    """Return the text of a string, with ``{}`` for inserted values; None for others and for single words."""
    match node:
        case ast.Constant(value=str(text)):
            pass
        case ast.JoinedStr(values=values):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            text = (shown(left) or "{}") + (shown(right) or "{}")
        case _:
            return None
    return text if " " in text.strip() else None


def is_said(call: ast.Call) -> bool:
    """Return whether a call makes an exception for users, prints something, or logs it."""
    match call.func:
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return name in _SAY or name.endswith(_ENDS)
    return False


def messages(tree: ast.Module) -> Iterator[str]:
    """Return a module's messages: arguments of such calls, results, values of names, help texts."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        texts: list[ast.expr] = []
        match node:
            case ast.Call() if is_said(node):
                texts = node.args
            case ast.Return(value=value) | ast.Yield(value=value) if value is not None:
                texts = value.elts if isinstance(value, ast.Tuple) else [value]
            case ast.Assign(value=ast.Dict(values=values)):
                texts = values
            case ast.Assign(value=value):
                texts = value.elts if isinstance(value, ast.Tuple) else [value]
            case ast.keyword(arg=name, value=value) if name in _ARGPARSE:
                texts = [value]
            case ast.IfExp(body=body, orelse=orelse):
                texts = [body, orelse]
        for text in texts:
            line = shown(text)
            if line is not None:
                found.append((text.lineno, line.strip("\n").replace("\n", "\n    ")))
    seen = dict.fromkeys(line for _, line in sorted(found))
    yield from seen


_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_STRINGS = re.compile(r'"(?:[^"\\\n]|\\.)*"(?:\s*"(?:[^"\\\n]|\\.)*")*')


def messages_in_c(source: str) -> list[str]:
    """Return the strings of several words in a C source."""
    found = (re.sub(r'"\s*"', "", text)[1:-1] for text in _STRINGS.findall(_COMMENT.sub("", source)))
    return list(dict.fromkeys(text for text in found if re.search(r"[a-z] [a-z%]", text)))


def collected() -> str:
    """Return the list: the messages of each module below its name, in the order of the source."""
    out = []
    for path in sorted([*ROOT.glob("cowfs/**/*.py"), *ROOT.glob("cowfs/**/*.c")]):
        text = path.read_text()
        lines = messages_in_c(text) if path.suffix == ".c" else list(messages(ast.parse(text)))
        if lines:
            out += [f"{path.relative_to(ROOT)}:", *(f"    {line}".rstrip() for line in lines), ""]
    return "\n".join(out)


def test_the_list_of_messages_is_that_of_the_source() -> None:
    assert LIST.read_text() == collected(), (
        f"read what is new, then: python {Path(__file__).relative_to(ROOT)}"
    )


def test_messages_are_found() -> None:
    said = collected()
    for message in (
        "{}: created an empty {} store",  # a result
        "/dev/fuse: not found; is the fuse module loaded?",  # an error
        "as root: modprobe fuse",  # its hint
        "redirect not followed: %r: %s",  # a line of the log
        "its disk has no space for the journal: %s",  # of the ext3 engine, in C
        "what mount(8) and df(1) show as the source (default: the lowers)",  # a line of --help
    ):
        assert f"\n    {message}\n" in said


if __name__ == "__main__":
    sys.exit(LIST.write_text(collected()) == 0)
