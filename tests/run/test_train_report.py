"""The report of a training run: complete, escaped, self-contained, and there before the end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.genotype import PDARTS, save_genotype
from pdarts_fast.run.train_report import read_training, write_run_report, write_train_report

HOSTILE = "<script>alert(1)</script>\"' onload=x &amp;"
Make = Callable[..., Path]


class Page(HTMLParser):
    """Collects tags and text, and refuses tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in {"meta", "link", "br"}:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] not in (["style"], ["script"]):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def make_training(tmp_path: Path) -> Make:
    """Writes a run directory as a training of some epochs leaves it."""

    def make(epochs: int = 5, done: int = 5, name: str = "digits") -> Path:
        run = tmp_path / "run"
        run.mkdir()
        info = {
            "kind": "train",
            "config": {"cells": 5, "channels": 12, "epochs": epochs, "dataset": name, "amp": False},
            "command": f"pdarts-fast train --dataset {name}",
            "versions": {"torch": "2.9.0"},
            "hardware": {"cpu": "Example 9000", "cores": 16, "memory_gib": 62.7, "gpu": None},
            "created": "2026-01-02T03:04:05+00:00",
            "dataset": {"name": name, "num_classes": 10, "train_images": 1438, "image_size": 16},
            "network": {"parameters": 107782, "multiply_adds": 4599000},
        }
        (run / "config.json").write_text(json.dumps(info))
        save_genotype(run / "genotype.json", PDARTS)
        lines: list[dict[str, Any]] = []
        for epoch in range(done):
            place = {"epoch": epoch, "step": 23 * (epoch + 1)}
            loss = math.exp(-epoch)
            accuracy = [0.5, 0.9, 0.97, 0.99, 0.985][epoch]
            lines += [
                {"kind": "interval", **place, "loss": loss, "seconds": 1.0},
                {
                    "kind": "epoch", **place, "train_loss": loss, "train_accuracy": 1 - loss / 2,
                    "lr": 0.02, "drop_path": 0.1 * epoch / epochs, "images_per_second": 100.0,
                    "seconds": 50.0, "peak_memory_mib": 500.0,
                },
                {
                    "kind": "validation", **place, "loss": loss, "accuracy": accuracy,
                    "top5_accuracy": 1.0, "images": 359, "seconds": 2.0,
                },
            ]  # fmt: skip
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return run

    return make


def render(run: Path) -> Page:
    return Page(write_train_report(run).read_text(encoding="utf-8"))


def test_finished_run_shows_everything(make_training: Make) -> None:
    page = render(make_training())
    for text in (
        "Training on digits", "Finished", "5 cells, 12 channels", "107,782 parameters",
        "4.6 M multiply-adds", "98.50%", "epoch 5; best 99.00%, epoch 4", "1.50%",
        "top-5 0.00%, over 359 images", "4 min 20 s", "Example 9000", "1,438 training images",
        "pdarts-fast train --dataset digits", "--cells", "Normal cell", "Reduction cell",
    ):  # fmt: skip
        assert text in page.text, text
    assert "unfinished" not in page.text.lower()
    charts = [a["aria-label"] for tag, a in page.tags if a.get("class") == "chart"]
    assert [label.split(" over")[0] for label in charts] == [
        "Loss", "Accuracy", "Learning rate", "Drop-path", "Throughput",
    ]  # fmt: skip
    assert "test ends at 98%" in charts[1] or "test ends at 99%" in charts[1]


@pytest.mark.parametrize("done", [0, 1, 4])
def test_unfinished_run_says_so(make_training: Make, done: int) -> None:
    page = render(make_training(done=done))
    assert f"The training is unfinished: {done} of 5 epochs." in page.text
    assert ("No epoch is complete yet." in page.text) == (done == 0)


def test_an_epoch_without_evaluation_leaves_no_gap_in_the_curve(make_training: Make) -> None:
    run = make_training()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if not ('"validation"' in line and '"epoch": 1,' in line)]
    (run / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    data = read_training(run)
    assert [record["epoch"] for record in data.validations] == [0, 2, 3, 4]
    render(run)


def test_page_is_self_contained_and_names_are_escaped(make_training: Make) -> None:
    run = make_training(name=HOSTILE)
    page = render(run)
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 1
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    links = [a[n] for _, a in page.tags for n in ("src", "href") if n in a]
    assert all(link.startswith(("#", "data:")) for link in links)
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert {link[1:] for link in links if link.startswith("#")} <= ids


def test_damage_is_named(make_training: Make, tmp_path: Path) -> None:
    run = make_training()
    with pytest.raises(UsageError, match=r"no config\.json in it"):
        write_train_report(tmp_path)
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text + '{"kind": "epo')
    assert "was cut off and is left out" in render(run).text
    (run / "metrics.jsonl").write_text("{}\n" + text)
    with pytest.raises(RunError, match=r"metrics\.jsonl: line 1 lacks kind, epoch"):
        write_train_report(run)


def test_the_report_command_knows_both_kinds_of_run(make_training: Make, make_run: Make) -> None:
    assert "Training on digits" in write_run_report(make_training()).read_text()
    search = make_run(epochs=1, stop_after=1)
    assert "Search on CIFAR-10" in write_run_report(search).read_text()
