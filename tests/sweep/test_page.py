"""The comparison page: what it says, and that a browser shows it on any screen."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pdarts_fast.cli import main
from pdarts_fast.sweep.charts import Dots, dot_chart, size_chart
from pdarts_fast.sweep.page import write_sweep_report
from pdarts_fast.sweep.statistics import spread

Make = Callable[..., tuple[Path, Any]]
TRAINED = ("--preset", "demo", "--then-train")
GRID = ["lr=0.1,0.2", "channels=8,16"]


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page[page.index("<body>") :]))


def test_page_compares_settings_and_lists_runs(make_sweep: Make) -> None:
    path, _ = make_sweep(seeds=2, vary=GRID, flags=TRAINED, failed=[1], waiting=[7])
    page = write_sweep_report(path).read_text()
    text = text_of(page)
    assert "Sweep on digits Unfinished" in text
    assert "lr=0.1-channels=8-seed1 failed (exit status 1: loss &lt;is&gt; not finite)." in text
    assert "1 of 8 runs have not ended" in text
    assert "lr=0.2, channels=16 1 of 2" in text
    assert "6 of 8 4 settings, 2 seeds, 1 failed" in text
    assert "derived network of 5 cells with 12 channels on 16×16 images" in text
    assert 'href="runs/lr%3D0.1-channels%3D8-seed0/report.html"' in page
    # One seed each in two settings: their agreement is not known.
    assert text.count("Normal cell, edge by edge") == 2
    assert page.count("<svg") > 20


def test_equal_cells_are_drawn_once(make_sweep: Make) -> None:
    path, _ = make_sweep(seeds=2, vary=["lr=0.1,0.2"])
    page = write_sweep_report(path).read_text()
    assert page.count('class="cell"') == 4
    assert 'The same cells as <a href="#cells-0">lr=0.1-seed0</a>' in page


def test_page_of_a_sweep_that_has_not_begun(make_sweep: Make) -> None:
    path, _ = make_sweep(seeds=2, waiting=[0, 1])
    text = text_of(write_sweep_report(path).read_text())
    assert "Sweep on digits Unfinished" in text
    assert "0 of 2" in text


def test_report_command_writes_it_again(
    make_sweep: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = make_sweep(seeds=2)
    assert main(["report", str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(path / "report.html")
    assert "Sweep on digits" in (path / "report.html").read_text()


def test_dots_stand_at_their_values() -> None:
    rows = [Dots("one", [("a", 1.0), ("b", 3.0)], spread([1.0, 3.0])), Dots("", [], spread([]))]
    drawn = dot_chart("Size", "note", rows, "{:g}".format, "b")
    places = [float(x) for x in re.findall(r'<circle[^>]* cx="([\d.]+)%"', drawn)]
    # mean 2, deviation sqrt(2): the band is wider than the values.
    low, high = 2 - 2**0.5, 2 + 2**0.5
    low, high = low - 0.06 * (high - low), high + 0.06 * (high - low)
    assert places == pytest.approx([100 * (v - low) / (high - low) for v in (1, 3)], abs=0.01)
    assert "<title>b: 3 (best)</title>" in drawn
    assert "2 ± 1.41421" in drawn
    assert dot_chart("Size", "note", [Dots("", [], spread([]))], "{:g}".format, None) == ""


def test_size_chart_needs_two_runs() -> None:
    assert size_chart([("", [("a", 3e6, 0.9)])], "test") == ""
    chart = size_chart([("", [("a", 3e6, 0.9), ("b", 3.1e6, 0.92)])], "test")
    assert "a: 3,000,000 parameters, 90.00%; b: 3,100,000 parameters, 92.00%" in chart
    assert chart.count('class="line"') == 1


SWEEPS = [
    pytest.param({"seeds": 5, "flags": TRAINED}, id="five seeds"),
    pytest.param(
        {"seeds": 2, "vary": GRID, "flags": TRAINED, "failed": [0], "waiting": [7]}, id="grid"
    ),
    pytest.param({"seeds": 2, "waiting": [0, 1]}, id="nothing yet"),
]


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desktop"])
@pytest.mark.parametrize("options", SWEEPS)
def test_page_renders_quietly_and_fits_the_screen(
    page: Any, make_sweep: Make, options: dict[str, Any], width: int
) -> None:
    path, _ = make_sweep(**options)
    url = write_sweep_report(path).as_uri()
    page.visit(url, width=width)
    boxes = page.evaluate(
        "[...document.querySelectorAll('figure, figure svg')].filter(e => e.checkVisibility())"
        ".map(e => { const b = e.getBoundingClientRect(); return [b.width, b.height]; })"
    )
    assert all(w > 20 and h >= 8 for w, h in boxes), boxes
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.problems() == []
    assert page.requests() == [url]


@pytest.mark.browser
def test_dark_scheme_turns_the_dots(page: Any, make_sweep: Make) -> None:
    url = write_sweep_report(make_sweep(seeds=2)[0]).as_uri()
    colours = []
    for dark in (False, True):
        page.visit(url, width=1280, dark=dark)
        colours.append(
            page.evaluate(
                "['circle', '.meter i', '.chip.common'].map(s => {"
                "const style = getComputedStyle(document.querySelector(s));"
                "return style.fill + style.backgroundColor; })"
            )
        )
    assert all(light != dark for light, dark in zip(*colours, strict=True))
