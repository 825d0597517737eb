"""The report's sections about strategies: costs, added operations, decisions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pdarts_fast.run.report import write_report

Make = Callable[..., Path]


def change(run: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a JSON file of a run."""
    content = json.loads((run / name).read_text())
    change(content)
    (run / name).write_text(json.dumps(content))


def add_records(run: Path, records: list[dict[str, Any]]) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def page_of() -> Callable[[Path], str]:
    return lambda run: write_report(run).read_text(encoding="utf-8")


def test_a_plain_search_has_none_of_the_sections(make_run: Make, page_of: Any) -> None:
    page = page_of(make_run())
    for title in ("Costs and targets", "Added operations", "Selection by perturbation"):
        assert title not in page


def test_costs_show_expected_derived_target_gate_and_repairs(make_run: Make, page_of: Any) -> None:
    run = make_run(epochs=2)
    change(run, "config.json", lambda c: c["config"].update(target=["params=3M", "latency=12ms"]))
    swap = {"cell": "normal", "node": 3, "source": 4, "before": "dil_conv_5x5",
            "after": "max_pool_3x3", "loss": 0.51}  # fmt: skip
    result = {"costs": {"params": 2.5e6, "latency": 0.0115}, "repairs": [swap]}
    change(run, "genotype.json", lambda c: c.update(result))
    add_records(
        run,
        [
            {"kind": "cost", "stage": stage, "epoch": epoch, "step": 9, "expected_params": 2.9e6,
             "derived_params": 3.4e6, "gate_params": stage % 2, "expected_latency": 0.02,
             "derived_latency": 0.03, "gate_latency": 1}
            for stage in (1, 2, 3) for epoch in (0, 1)
        ],
    )  # fmt: skip
    page = page_of(run)
    section = page[page.index('id="costs"') : page.index('id="alphas"')]
    for text in (
        "Parameters", "3.000 M", "2.900 M", "3.400 M", "4 of 6 epochs", "2.500 M",
        "Latency of an image", "12.000 ms", "20.000 ms", "30.000 ms", "6 of 6 epochs", "11.500 ms",
        "Normal cell, node 3", "0.510", "Operations swapped to meet the targets",
    ):  # fmt: skip
        assert text in section, text
    assert section.count('class="chart"') == 2


def test_an_unfinished_search_with_a_target_has_a_page(make_run: Make, page_of: Any) -> None:
    run = make_run(stop_after=0)
    change(run, "config.json", lambda c: c["config"].update(target=["params=3M"]))
    assert "0 of 0 epochs" in page_of(run)


def test_added_operations_stand_with_the_losses_of_their_trials(
    make_run: Make, page_of: Any
) -> None:
    run = make_run()
    first = {"sep_conv_3x3": 2.31, "sep_conv_5x5": 2.345678}
    add_records(
        run,
        [
            {"kind": "operation", "stage": 1, "epoch": 0, "step": 0, "number": 1,
             "operation": "sep_conv_5x5", "losses": first},
            {"kind": "operation", "stage": 1, "epoch": 14, "step": 9, "number": 8,
             "operation": "skip_connect", "losses": {}},
        ],
    )  # fmt: skip
    page = page_of(run)
    section = page[page.index('id="additions"') : page.index('id="alphas"')]
    for text in ("epoch 1<", "2.3457", "epoch 15<", "without a trial"):
        assert text in section, text


def test_decisions_of_a_selection_and_no_course_of_its_own(make_run: Make, page_of: Any) -> None:
    run = make_run()
    scores = {"max_pool_3x3": {"accuracy": 0.81, "loss": 1.0},
              "<b>": {"accuracy": 0.5, "loss": 1.0}}  # fmt: skip
    edges = {"5": {"accuracy": 0.25, "loss": 1}, "6": {"accuracy": 0.5, "loss": 1},
             "7": {"accuracy": 0.75, "loss": 1}}  # fmt: skip
    selection = {
        "decisions": [
            {"question": {"kind": "operation", "cell": "normal", "place": 5}, "scores": scores,
             "chosen": ["max_pool_3x3"]},
            {"question": {"kind": "edges", "cell": "reduce", "place": 2}, "scores": edges,
             "chosen": ["5", "6"]},
        ],
        "skip_swaps": [{"cell": "normal", "node": 0, "source": 1, "before": "skip_connect",
                        "after": "sep_conv_3x3"}],
    }  # fmt: skip
    change(run, "genotype.json", lambda c: c.update(selection=selection))
    change(run, "config.json", lambda c: c.update(kind="select"))
    page = page_of(run)
    section = page[page.index('id="decisions"') : page.index('id="alphas"')]
    for text in ("81.00%", "edges into node 2", "25.00%", "Skips replaced"):
        assert text in section, text
    assert "<b>" not in section.replace('<b class="chosen"', "")
    assert "Selection on CIFAR-10" in page
    assert "Training curves" not in page
    assert 'href="#curves"' not in page
