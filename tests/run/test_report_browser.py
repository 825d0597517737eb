"""The report in headless Chromium: it renders, fits, follows the colour scheme, stays offline."""

import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pdarts_fast.run.report import write_report

pytestmark = pytest.mark.browser

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
]
TIMEOUT_S = 60.0
HOSTILE = "<script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">"
# Chromium speaks over descriptors 3 and 4; a child of Python can only be given other numbers.
LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
    "os.execv(sys.argv[3], sys.argv[3:])"
)


class Browser:
    """Chromium under the DevTools protocol, NUL-separated JSON over two pipes."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        (to_read, self._write), (self._read, to_write) = _high_pipe(), _high_pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(to_read), str(to_write), CHROMIUM, *FLAGS,
             f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self._numbers = itertools.count(1)
        self._buffer = b""
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []

    def open_page(self) -> None:
        """Opens a fresh tab that reports its log, exceptions and requests."""
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.events.clear()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends one command and returns its result; events that come in between are kept."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def visit(self, url: str, *, width: int, dark: bool = False) -> None:
        """Loads a page at a screen width in pixels and a colour scheme, and waits for it."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())

    def evaluate(self, expression: str) -> Any:
        """Returns the JSON value of a JavaScript expression on the page."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True,
            userGesture=True,
        )  # fmt: skip
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def problems(self) -> list[str]:
        """Returns console errors, log errors and uncaught exceptions since the last visit."""
        found = []
        for event in self.events:
            method, details = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(json.dumps(details["exceptionDetails"]))
            elif method == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning"):
                found.append(json.dumps(details["args"]))
            elif method == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
                found.append(details["entry"]["text"])
        return found

    def requests(self) -> list[str]:
        """Returns the addresses requested since the last visit."""
        sent = [e for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def close(self) -> None:
        """Ends the browser."""
        self._session = None
        with contextlib.suppress(OSError, AssertionError):
            self.call("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"{CHROMIUM} did not answer within {TIMEOUT_S:g} s"
            chunk = os.read(self._read, 1 << 16)
            assert chunk, f"{CHROMIUM} ended (exit status {self._process.poll()})"
            self._buffer += chunk
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)


def _high_pipe() -> tuple[int, int]:
    """Returns a pipe whose descriptors are not 3 or 4, which Chromium needs."""
    ends = []
    for descriptor in os.pipe():
        ends.append(fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10))
        os.close(descriptor)
    return ends[0], ends[1]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH: apt-get install chromium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    try:
        yield browser
    finally:
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Browser:
    browser.open_page()
    return browser


RUNS = [
    pytest.param({}, id="finished"),
    pytest.param({"stop_after": 33}, id="stopped in stage 2"),
    pytest.param({"epochs": 1}, id="one epoch a stage"),
    pytest.param({"stop_after": 0}, id="nothing yet"),
]
WIDTHS = [pytest.param(390, id="phone"), pytest.param(1280, id="desktop")]


def report_url(run: Path) -> str:
    return write_report(run, train_command="pdarts-fast train --genotype runs/x").as_uri()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("options", RUNS)
def test_report_renders_quietly_and_fits_the_screen(
    page: Browser, make_run: Callable[..., Path], options: dict[str, Any], width: int
) -> None:
    url = report_url(make_run(**options))
    page.visit(url, width=width)
    boxes = page.evaluate(
        "[...document.querySelectorAll('figure, figure svg.chart, figure svg.cell, .bar')]"
        ".map(e => { const b = e.getBoundingClientRect(); return [b.width, b.height]; })"
    )
    assert all(w > 20 and h > 10 for w, h in boxes), boxes
    if options == {}:
        assert len(boxes) == 2 * (2 + 28 + 6 + 1)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.documentElement.clientWidth") <= width
    assert page.problems() == []
    assert page.requests() == [url]


def test_text_is_legible_on_a_phone(page: Browser, make_run: Callable[..., Path]) -> None:
    page.visit(report_url(make_run()), width=390)
    heights = page.evaluate(
        "[...document.querySelectorAll('svg.chart text')]"
        ".map(e => e.getBoundingClientRect().height)"
    )
    assert min(heights) >= 10


def test_dark_scheme_turns_page_and_drawings(page: Browser, make_run: Callable[..., Path]) -> None:
    url = report_url(make_run())
    colours = {}
    for dark in (False, True):
        page.visit(url, width=1280, dark=dark)
        colours[dark] = page.evaluate(
            "(() => { const style = s => getComputedStyle(document.querySelector(s));"
            "return [style('body').backgroundColor, style('body').color, style('.line').stroke,"
            "style('svg.cell path[style*=\"--ink\"]').stroke]; })()"
        )
    light_sum, dark_sum = (
        [sum(map(int, c[4:-1].split(","))) for c in colours[dark][:2]] for dark in (False, True)
    )
    assert light_sum[0] > 600 > 200 > light_sum[1], "dark text on a light page"
    assert dark_sum[0] < 200 < 600 < dark_sum[1], "light text on a dark page"
    assert colours[False][2] != colours[True][2], "chart lines change with the scheme"
    assert colours[False][3] != colours[True][3], "drawn cells change with the scheme"


def test_hostile_names_stay_text(page: Browser, make_run: Callable[..., Path]) -> None:
    run = make_run(classes=[HOSTILE, "cat"], name=HOSTILE, epochs=1)
    page.visit(report_url(run), width=1280)
    assert HOSTILE in page.evaluate("document.title")
    assert page.evaluate("document.scripts.length") == 1
    assert page.evaluate("document.querySelectorAll('img').length") == 0
    assert page.problems() == []


def test_copy_button_copies_the_genotype(page: Browser, make_run: Callable[..., Path]) -> None:
    page.visit(report_url(make_run(epochs=1)), width=1280)
    copied = page.evaluate(
        "(async () => { let got = null; const clipboard = {writeText: async t => { got = t; }};"
        "Object.defineProperty(navigator, 'clipboard', {value: clipboard});"
        "document.querySelector('[data-copy=genotype-json]').click();"
        "await new Promise(r => setTimeout(r, 50)); return got; })()"
    )
    assert sorted(json.loads(copied)) == ["normal", "normal_concat", "reduce", "reduce_concat"]


def test_choosing_an_operation_fades_the_others(
    page: Browser, make_run: Callable[..., Path]
) -> None:
    page.visit(report_url(make_run(epochs=1)), width=1280)
    script = (
        "document.querySelector('[data-key=skip_connect]').click();"
        "[...document.querySelectorAll('#alphas .line:not(.faded)')].map(e => e.dataset.op)"
    )
    assert set(page.evaluate(script)) == {"skip_connect"}
    again = page.evaluate(
        "document.querySelector('[data-key=skip_connect]').click();"
        "document.querySelectorAll('#alphas .faded').length"
    )
    assert again == 0
