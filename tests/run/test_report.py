"""The report as HTML: complete, escaped, self-contained, and there for unfinished runs too."""

import json
import re
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.genotype import load_genotype
from pdarts_fast.run.charts import Frame, Series, line_chart, nice_ticks
from pdarts_fast.run.report import write_report
from pdarts_fast.run.report_data import read_run
from pdarts_fast.run.report_sections import duration

Make = Callable[..., Path]
VOID = {"meta", "link", "br", "img", "input"}
HOSTILE = "<script>alert(1)</script>\"' onload=x &amp;"


class Page(HTMLParser):
    """Collects tags, attributes and text, and refuses tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.code: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.code if self._open[-1:] in (["style"], ["script"]) else self.texts).append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def render(run: Path, **options: Any) -> Page:
    return Page(write_report(run, **options).read_text(encoding="utf-8"))


def has_class(attributes: dict[str, str], name: str) -> bool:
    return name in attributes.get("class", "").split()


def test_finished_run_shows_everything(make_run: Make) -> None:
    run = make_run()
    page = render(run, train_command="pdarts-fast train --genotype 'runs/a b'")
    text = page.text
    assert "Finished" in text
    assert "CIFAR-10" in text
    assert "unfinished" not in text.lower()
    for part in ("Example GPU 80GB", "triton", "1 h 52 min", "0123456789abcdef", "2.9.0"):
        assert part in text
    assert "pdarts-fast train --genotype 'runs/a b'" in text
    assert len([f for f in page.all("figure") if has_class(f, "panel")]) == 28
    assert len([s for s in page.all("svg") if has_class(s, "cell")]) == 2
    assert len([f for f in page.all("figure") if has_class(f, "kept")]) == 16
    for title in (
        "Loss", "Accuracy", "Alpha entropy", "Learning rate", "Skip dropout", "Throughput",
        "Skip restriction", "Share of the time", "Settings", "Versions", "Hardware", "Data set",
    ):  # fmt: skip
        assert title in page.texts


def test_validation_accuracy_is_that_of_the_last_epoch(make_run: Make) -> None:
    run = make_run()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in lines if record["kind"] == "validation"][-1]
    assert f"{100 * last['accuracy']:.2f}% supernet, stage 3, epoch 25" in render(run).text


def test_genotype_text_reads_back(make_run: Make, tmp_path: Path) -> None:
    run = make_run()
    html = write_report(run).read_text(encoding="utf-8")
    for name in ("python", "json"):
        block = re.search(rf'<pre id="genotype-{name}"[^>]*><code>(.*?)</code>', html, re.DOTALL)
        assert block is not None
        file = tmp_path / name
        text = block[1]
        for entity, character in (("&#x27;", "'"), ("&quot;", '"'), ("&amp;", "&")):
            text = text.replace(entity, character)
        file.write_text(text)
        assert load_genotype(file) == load_genotype(run)


def test_restricted_genotypes_of_all_numbers_of_skips(make_run: Make) -> None:
    run = make_run()
    html = write_report(run).read_text(encoding="utf-8")
    section = html[html.index('id="skips"') : html.index('id="alphas"')]
    rows = re.findall(r'<th scope="row">(\d+).*?<td class="number">(\d+)', section)
    assert [int(allowed) for allowed, _ in rows] == [8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert all(int(skips) <= int(allowed) for allowed, skips in rows)
    assert int(rows[0][1]) > 2, "the fixture has skips to restrict"
    assert section.count("result</span>") == 1


@pytest.mark.parametrize(
    ("stop_after", "progress"),
    [
        pytest.param(0, "no epoch done yet", id="nothing yet"),
        pytest.param(1, "stage 1 of 3, epoch 1 of 25", id="one epoch"),
        pytest.param(25, "stage 1 of 3, epoch 25 of 25", id="stage boundary"),
        pytest.param(33, "stage 2 of 3, epoch 8 of 25", id="in stage 2"),
        pytest.param(74, "stage 3 of 3, epoch 24 of 25", id="before the end"),
    ],
)
def test_unfinished_run_says_so_and_shows_what_is_there(
    make_run: Make, stop_after: int, progress: str
) -> None:
    page = render(make_run(stop_after=stop_after), train_command="pdarts-fast train")
    assert f"The search is unfinished: {progress}." in page.text
    assert "pdarts-fast train" not in page.text, "there is nothing to train yet"
    panels = [f for f in page.all("figure") if has_class(f, "panel")]
    assert len(panels) == (28 if stop_after else 0)
    assert not [s for s in page.all("svg") if has_class(s, "cell")]


def test_only_config_json_is_needed(make_run: Make) -> None:
    run = make_run(stop_after=0)
    (run / "metrics.jsonl").unlink()
    (run / "alphas.jsonl").unlink()
    (run / "config.json").write_text("{}")
    assert "unfinished" in render(run).text


def test_page_is_self_contained(make_run: Make) -> None:
    page = render(make_run(epochs=2))
    references = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "action", "data", "poster")
    ]
    assert references
    assert all(value.startswith(("#", "data:")) for value in references)
    html = " ".join([*page.texts, *page.code])
    assert "@import" not in html
    assert "url(http" not in html
    assert "@font-face" not in html
    policy = next(m["content"] for m in page.all("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'")
    assert "script-src 'sha256-" in policy


def test_page_is_accessible(make_run: Make) -> None:
    page = render(make_run(epochs=2), train_command="x")
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("title")) >= 1
    assert len(page.all("h1")) == 1
    for svg in page.all("svg"):
        assert svg.get("aria-hidden") == "true" or (svg["role"] == "img" and svg["aria-label"])
    assert all(th.get("scope") in ("row", "col") for th in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for name in ("aria-labelledby", "data-copy"):
            assert attributes.get(name, ids[0]) in ids
        if attributes.get("href", "").startswith("#"):
            assert attributes["href"][1:] in ids


def test_names_from_files_are_escaped(make_run: Make) -> None:
    run = make_run(epochs=1, name=HOSTILE, classes=[HOSTILE, "cat"])
    info = json.loads((run / "config.json").read_text())
    for section in ("hardware", "versions", "git", "config", "dataset"):
        info[section] = dict.fromkeys(info[section], HOSTILE) | {HOSTILE: HOSTILE}
    info["command"] = info["created"] = HOSTILE
    (run / "config.json").write_text(json.dumps(info))
    page = render(run, train_command=HOSTILE)
    assert len(page.all("script")) == 1
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count("<script>alert(1)</script>") > 20


def test_unknown_operation_names_are_escaped(make_run: Make) -> None:
    run = make_run(epochs=1, stop_after=2)
    text = (run / "alphas.jsonl").read_text()
    (run / "alphas.jsonl").write_text(text.replace("sep_conv_3x3", "<b>new</b>"))
    assert not render(run).all("b")


def test_full_report_is_made_within_five_seconds(make_run: Make) -> None:
    run = make_run()
    start = time.process_time()
    write_report(run)
    assert time.process_time() - start < 5.0


def test_line_cut_off_at_the_end_is_left_out(make_run: Make) -> None:
    run = make_run(epochs=2)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "epoch", "stage": 3, "epo')
    assert "was cut off and is left out" in render(run).text


def test_damaged_line_is_named(make_run: Make) -> None:
    run = make_run(epochs=2)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[2] = lines[2][:20]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    with pytest.raises(RunError, match=r"metrics\.jsonl: line 3 is not JSON"):
        write_report(run)


def test_line_without_its_keys_is_named(make_run: Make) -> None:
    run = make_run(epochs=2)
    (run / "alphas.jsonl").write_text('{"stage": 1, "epoch": 0}\n')
    with pytest.raises(RunError, match=r"alphas\.jsonl: line 1 lacks ops, normal, reduce"):
        write_report(run)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("config.json", "{", r"config\.json: not JSON", id="broken config"),
        pytest.param("config.json", "[]", "wanted a JSON object, got list", id="config is a list"),
        pytest.param("genotype.json", '{"gen', r"genotype\.json: not JSON", id="broken result"),
    ],
)
def test_damaged_json_is_named(make_run: Make, name: str, content: str, message: str) -> None:
    run = make_run(epochs=1)
    (run / name).write_text(content)
    with pytest.raises(RunError, match=message):
        write_report(run)


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.json in it"):
        write_report(tmp_path)
    with pytest.raises(UsageError, match="no such run directory"):
        write_report(tmp_path / "nowhere")


def test_repeated_epoch_counts_once(make_run: Make) -> None:
    run = make_run(epochs=2, stop_after=1)
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text + text.replace('"seconds": 28.0', '"seconds": 99.0'))
    data = read_run(run)
    assert len(data.epochs) == 1
    assert data.seconds == 99.0


def test_values_that_are_not_finite_leave_gaps(make_run: Make) -> None:
    run = make_run(epochs=3)
    for name, key in (("metrics.jsonl", "train_loss"), ("alphas.jsonl", "normal")):
        records = [json.loads(line) for line in (run / name).read_text().splitlines()]
        for record in records:
            if record["stage"] == 2 and record.get(key) is not None:
                record[key] = None if key == "train_loss" else [[None] * 5] * 14
        (run / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    html = write_report(run).read_text(encoding="utf-8")
    assert "nan" not in " ".join(re.findall(r' d="([^"]*)"', html))


def test_line_breaks_between_segments_and_at_gaps() -> None:
    series = Series("a", "red", [[(1, 1.0), (2, 2.0), (3, None), (4, 3.0)], [(5, 1.0), (6, 1.0)]])
    svg = line_chart([series], Frame(x_range=(1, 6)), "text")
    path = re.search(r"</title><path d=\"([^\"]*)\"", svg)
    assert path is not None
    assert path[1].count("M") == 3
    assert path[1].count("L") == 2


def test_points_lie_where_the_axes_say() -> None:
    frame = Frame(
        width=120, height=110, margins=(10, 10, 5, 5), x_range=(0, 10), y_range=(0.0, 1.0)
    )
    svg = line_chart([Series("a", "red", [[(0, 0.0), (10, 1.0), (5, 0.25)]])], frame, "text")
    assert "M10.0 105.0L110.0 5.0L60.0 80.0" in svg


@pytest.mark.parametrize(
    ("low", "high", "most", "wanted"),
    [
        pytest.param(0, 1, 6, [0, 0.2, 0.4, 0.6, 0.8, 1.0], id="unit"),
        pytest.param(1, 75, 4, [20, 40, 60], id="epochs"),
        pytest.param(0, 0.75, 4, [0, 0.2, 0.4, 0.6], id="share"),
        pytest.param(-3, 3, 3, [-2, 0, 2], id="negative"),
        pytest.param(0.0, 2.5e-4, 3, [0, 1e-4, 2e-4], id="small"),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, most: int, wanted: list[float]) -> None:
    assert nice_ticks(low, high, most) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        pytest.param(0, "0.0 s", id="zero"),
        pytest.param(12.34, "12.3 s", id="seconds"),
        pytest.param(59.99, "1 min 00 s", id="almost a minute"),
        pytest.param(245, "4 min 05 s", id="minutes"),
        pytest.param(3599.6, "1 h 00 min", id="almost an hour"),
        pytest.param(11520, "3 h 12 min", id="hours"),
    ],
)
def test_duration_reads_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text
