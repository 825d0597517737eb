"""The report in headless Chromium: it renders, fits, follows the colour scheme, stays offline."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pdarts_fast.run.report import write_report

pytestmark = pytest.mark.browser

HOSTILE = "<script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">"

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
    page: Any, make_run: Callable[..., Path], options: dict[str, Any], width: int
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


def test_text_is_legible_on_a_phone(page: Any, make_run: Callable[..., Path]) -> None:
    page.visit(report_url(make_run()), width=390)
    heights = page.evaluate(
        "[...document.querySelectorAll('svg.chart text')]"
        ".map(e => e.getBoundingClientRect().height)"
    )
    assert min(heights) >= 10


def test_dark_scheme_turns_page_and_drawings(page: Any, make_run: Callable[..., Path]) -> None:
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


def test_hostile_names_stay_text(page: Any, make_run: Callable[..., Path]) -> None:
    run = make_run(classes=[HOSTILE, "cat"], name=HOSTILE, epochs=1)
    page.visit(report_url(run), width=1280)
    assert HOSTILE in page.evaluate("document.title")
    assert page.evaluate("document.scripts.length") == 1
    assert page.evaluate("document.querySelectorAll('img').length") == 0
    assert page.problems() == []


def test_copy_button_copies_the_genotype(page: Any, make_run: Callable[..., Path]) -> None:
    page.visit(report_url(make_run(epochs=1)), width=1280)
    copied = page.evaluate(
        "(async () => { let got = null; const clipboard = {writeText: async t => { got = t; }};"
        "Object.defineProperty(navigator, 'clipboard', {value: clipboard});"
        "document.querySelector('[data-copy=genotype-json]').click();"
        "await new Promise(r => setTimeout(r, 50)); return got; })()"
    )
    assert sorted(json.loads(copied)) == ["normal", "normal_concat", "reduce", "reduce_concat"]


def test_choosing_an_operation_fades_the_others(page: Any, make_run: Callable[..., Path]) -> None:
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
