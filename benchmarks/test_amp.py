"""Searches of the bundled digits with and without mixed precision, over three seeds.

``pytest benchmarks/test_amp.py --benchmark-only -s`` prints the table of docs/step.md. Accuracies
are those of the supernets on the alpha half, at the end of each stage. That the two agree means:
their means over the seeds differ by less than twice the standard error of the difference.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from pdarts_fast.config import SearchConfig, preset
from pdarts_fast.run_search import run_search

SEEDS = (0, 1, 2)
STAGES = (1, 2, 3)
# Three seeds give a poor estimate of a spread: half a per cent of the images is never more than it.
SMALLEST_SPREAD = 0.005


def accuracies(config: SearchConfig) -> dict[int, float]:
    """Validation accuracy at the end of each stage of a search."""
    assert config.run_dir is not None
    run_search(config)
    records = map(json.loads, (config.run_dir / "metrics.jsonl").read_text().splitlines())
    return {r["stage"]: r["accuracy"] for r in records if r["kind"] == "validation"}


def test_searches_agree_with_and_without_amp(
    benchmark: Any, machine: dict[str, Any], tmp_path: Path
) -> None:
    found: dict[tuple[int, bool], dict[int, float]] = {}

    def search_all() -> None:
        for seed in SEEDS:
            for amp in (False, True):
                config = dataclasses.replace(
                    preset("demo"), seed=seed, amp=amp, device="cpu",
                    run_dir=tmp_path / f"{seed}-{amp}",
                )  # fmt: skip
                found[seed, amp] = accuracies(config)

    benchmark.pedantic(search_all, rounds=1)
    benchmark.extra_info.update(machine)
    print("\n| stage | precision | " + " | ".join(f"seed {s}" for s in SEEDS) + " | mean |")
    differences = {}
    for stage in STAGES:
        means, spreads = {}, {}
        for amp, name in ((False, "float32"), (True, "--amp")):
            values = [found[seed, amp][stage] for seed in SEEDS]
            means[amp] = statistics.mean(values)
            spreads[amp] = max(statistics.stdev(values), SMALLEST_SPREAD)
            shown = " | ".join(f"{100 * v:.1f}" for v in values)
            print(f"| {stage} | {name} | {shown} | {100 * means[amp]:.1f} |")
            benchmark.extra_info[f"stage {stage} {name}"] = values
        error = sum(spread**2 / len(SEEDS) for spread in spreads.values()) ** 0.5
        differences[stage] = (means[True] - means[False]) / error
    assert differences == pytest.approx(dict.fromkeys(STAGES, 0.0), abs=2.0)
