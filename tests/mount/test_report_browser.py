"""`cowfs report` as one sees it: in a browser without a window, driven through its DevTools protocol."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.mount.test_diff_patch import script
from tests.mount.test_report import WORK
from tests.mount.test_revert import MAKE, many_changes
from tests.support.mounts import cowfs, mounted
from tests.support.system import needs_fuse

_BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    needs_fuse,
    pytest.mark.nightly,
    pytest.mark.skipif(_BROWSER is None, reason="needs Chromium (apt install chromium)"),
]


class Browser:
    """A page in a browser; what it says meanwhile is kept."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._number, self._waiting = 0, b""
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []

    def ask(self, method: str, **params: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + 60
        while b"\0" not in self._waiting:
            assert select.select([self._answers], [], [], max(deadline - time.monotonic(), 0))[0], "no answer"
            piece = os.read(self._answers, 1 << 20)
            assert piece, "the browser ended"
            self._waiting += piece
        text, _, self._waiting = self._waiting.partition(b"\0")
        answer: dict[str, Any] = json.loads(text)
        return answer

    def open(self, file: Path) -> None:
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.ask("Page.navigate", url=file.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def value(self, expression: str) -> Any:
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def type(self, text: str) -> None:
        self.ask("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)

    def paths(self) -> list[str]:
        found = self.value("[...document.querySelectorAll('td.path')].map(cell => cell.innerText)")
        return [str(text) for text in found]


@contextmanager
def browser(directory: Path) -> Iterator[Browser]:
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    assert _BROWSER is not None
    command = [_BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    with subprocess.Popen(
        [
            "bash",
            "-c",
            f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}',
            "bash",
            *command,
            f"--user-data-dir={directory}",
        ],
        pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            page = Browser(ours_out, ours_in)
            yield page
            page._session = None
            with suppress(AssertionError, OSError):
                page.ask("Browser.close")
        finally:
            os.close(ours_out)
            os.close(ours_in)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def faults(page: Browser) -> list[dict[str, Any]]:
    """Requests for anything but the page, complaints, and dialogs."""
    bad = {
        "Runtime.exceptionThrown",
        "Runtime.consoleAPICalled",
        "Log.entryAdded",
        "Page.javascriptDialogOpening",
    }
    found = [event for event in page.events if event.get("method") in bad]
    asked = [event for event in page.events if event.get("method") == "Network.requestWillBeSent"]
    return found + asked[1:]


def test_what_a_user_sees(tmp_path: Path) -> None:
    script(MAKE, tmp_path)
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store", options=["blame"]) as here:
        script(WORK, here.path)
    cowfs("report", tmp_path / "store", "-o", tmp_path / "page.html", check=True)
    told = cowfs("diff", tmp_path / "store", check=True).stdout.splitlines()
    with browser(tmp_path / "profile") as page:
        page.open(tmp_path / "page.html")
        assert len(page.paths()) == len(told) and page.value("document.images.length") == 0
        page.value("document.getElementById('filter').focus()")
        page.type("FSTAB")
        assert page.paths() == ["\u25b8 etc/fstab"] or page.paths() == ["etc/fstab"]
        page.value("document.querySelector('td.path button').focus()")
        page.press("Enter", 13)
        assert "+more </script><img src=x onerror=alert(2)>" in page.value(
            "document.querySelector('pre').innerText"
        )
        page.press("Enter", 13)
        assert page.value("document.querySelector('pre')") is None
        page.value("filter.value = ''; filter.dispatchEvent(new Event('input'))")
        page.value("[...document.querySelectorAll('th button')].find(it => it.innerText == 'Size').click()")
        assert page.paths()[0].endswith("new/long")
        assert page.value("document.querySelector('th[aria-sort]').getAttribute('aria-sort')") == "descending"
        for kind in "AMR":
            page.value(f"document.querySelector('button[data-kind={kind}]').click()")
        assert len(page.paths()) == sum(line.startswith("D ") for line in told)
        assert faults(page) == []
        page.ask(
            "Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True
        )
        assert page.value("document.documentElement.scrollWidth") <= 360


@pytest.mark.timeout(900)
def test_fifty_thousand_changes(tmp_path: Path) -> None:
    store = many_changes(tmp_path, 50_000)
    cowfs("report", store, "-o", tmp_path / "page.html", check=True, timeout=800)
    assert (tmp_path / "page.html").stat().st_size < 10 << 20
    with browser(tmp_path / "profile") as page:
        page.open(tmp_path / "page.html")
        spent = page.value("performance.timing.domComplete - performance.timing.responseEnd")
        first = page.value("performance.getEntriesByName('first-contentful-paint')[0]?.startTime")
        assert page.value("document.getElementById('status').innerText") == "50,000 changes"
        assert len(page.paths()) == 100 and spent < 5000
        page.value("filter.focus()")
        page.type("d7/some new file 79")
        assert page.value("document.getElementById('status').innerText") == "10 of 50,000 changes"
        assert faults(page) == []
        took = page.value(
            "(() => { const times = [performance.now()];"
            "document.querySelectorAll('th button')[1].click(); times.push(performance.now());"
            "filter.value = 'e 4'; filter.dispatchEvent(new Event('input')); times.push(performance.now());"
            "filter.value = ''; filter.dispatchEvent(new Event('input')); times.push(performance.now());"
            "return times.slice(1).map((time, at) => Math.round(time - times[at])); })()"
        )
        size = (tmp_path / "page.html").stat().st_size
        print(
            f"first content {first} ms, complete {spent} ms; sort, filter, all again {took} ms; {size} bytes"
        )
