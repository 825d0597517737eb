"""sweep.json: the numbers of runs and settings against the records they come from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdarts_fast.cost import Cost, Scale, genotype_cost
from pdarts_fast.errors import UsageError
from pdarts_fast.genotype import count_skips, load_genotype
from pdarts_fast.network import NetworkCIFAR
from pdarts_fast.sweep.directory import SweepDirectory
from pdarts_fast.sweep.page import write_sweep_report
from pdarts_fast.sweep.summary import read_sweep
from pdarts_fast.sweep.targets import meets_targets

TRAINED = ("--preset", "demo", "--then-train")
Make = Callable[..., tuple[Path, Any]]


def summary_of(path: Path) -> dict[str, Any]:
    write_sweep_report(path)
    return json.loads((path / "sweep.json").read_text())


def last_accuracy(run: Path) -> float:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["accuracy"] for line in lines if line["kind"] == "validation"][-1]


def test_numbers_of_a_setting_are_those_of_numpy(make_sweep: Make) -> None:
    path, plan = make_sweep(seeds=3, vary=["lr=0.1,0.2"], flags=TRAINED)
    summary = summary_of(path)
    assert [setting["setting"] for setting in summary["settings"]] == [["lr=0.1"], ["lr=0.2"]]
    for setting in summary["settings"]:
        folders = [path / "runs" / name for name in setting["runs"]]
        assert len(folders) == setting["finished"] == 3
        for key, values in {
            "validation_accuracy": [last_accuracy(run) for run in folders],
            "test_accuracy": [last_accuracy(run / "train") for run in folders],
            "search_seconds": [21.0 + 42.0 + 63.0] * 3,
            "train_seconds": [110.0] * 3,
        }.items():
            assert setting[key]["mean"] == pytest.approx(np.mean(values))
            assert setting[key]["deviation"] == pytest.approx(np.std(values, ddof=1))
        best = max(folders, key=lambda run: last_accuracy(run / "train"))
        assert setting["best"] == best.name
        assert setting["feasible_fraction"] == 1.0
        assert set(setting["agreement"]) == {"normal", "reduce"}
        assert len(setting["agreement"]["normal"]["edges"]) == 14
    assert summary["counts"] == {"runs": 6, "finished": 6, "failed": 0}
    assert (summary["seeds"], summary["vary"]) == (3, list(plan.vary))


def test_numbers_of_a_run(make_sweep: Make) -> None:
    path, _ = make_sweep(seeds=1, flags=TRAINED)
    (run,) = summary_of(path)["runs"]
    folder = path / run["run_dir"]
    genotype = load_genotype(folder)
    # The demo recipe of the train command.
    cost = genotype_cost(genotype, Scale(NetworkCIFAR, 12, 5, 10, 16))
    assert (run["parameters"], run["multiply_adds"]) == (cost.parameters, cost.multiply_adds)
    assert run["skips"] == count_skips(genotype.normal)
    assert run["genotype"]["normal"] == [list(pair) for pair in genotype.normal]
    assert run["test_accuracy"] == last_accuracy(folder / "train")
    assert run["best_test_accuracy"] == pytest.approx(run["test_accuracy"] + 0.01)
    assert (path / run["log"]).is_file()


def test_costs_of_the_paper_preset_are_at_its_scale(make_sweep: Make) -> None:
    path, _ = make_sweep(seeds=1, flags=("--data", "images"))
    run = summary_of(path)["runs"][0]
    assert run["parameters"] == genotype_cost(load_genotype(path / run["run_dir"])).parameters


def test_network_is_given_only_if_all_costs_are_of_it(make_sweep: Make) -> None:
    path, _ = make_sweep(seeds=1)
    network = {"network": "NetworkCIFAR", "C": 12, "layers": 5, "num_classes": 10}
    assert summary_of(path)["network"] == network | {"image_size": 16}
    path, _ = make_sweep(seeds=1, vary=["image_size=8,16"])
    summary = summary_of(path)
    assert summary["network"] is None
    small, large = (run["multiply_adds"] for run in summary["runs"])
    assert small < large


def test_runs_that_have_not_finished(make_sweep: Make) -> None:
    path, _ = make_sweep(seeds=4, failed=[0], unfinished=[1], waiting=[2])
    summary = summary_of(path)
    assert [run["status"] for run in summary["runs"]] == [
        "failed", "unfinished", "waiting", "finished",
    ]  # fmt: skip
    assert summary["runs"][0]["error"] == "exit status 1: loss <is> not finite"
    (setting,) = summary["settings"]
    assert (setting["finished"], setting["failed"]) == (1, 1)
    assert setting["feasible_fraction"] == 0.5, "a run that failed has no valid cell"
    assert setting["agreement"] == {"normal": None, "reduce": None}
    assert setting["validation_accuracy"]["deviation"] is None


def test_a_damaged_run_fails_alone(make_sweep: Make) -> None:
    path, _ = make_sweep(seeds=2)
    (path / "runs" / "seed1" / "genotype.json").write_text("{")
    runs = read_sweep(SweepDirectory(path)).runs
    assert [run.status for run in runs] == ["finished", "failed"]
    assert "genotype.json: not JSON" in str(runs[1].error)


def test_a_folder_without_a_sweep(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no plan.json in it; wanted the folder of a sweep"):
        write_sweep_report(tmp_path)


@pytest.mark.parametrize(
    ("targets", "met"),
    [
        ([], True),
        (["params=3.5M"], True),
        (["params=3.4M"], False),
        (["macs=540M"], True),
        (["params=3.5M", "macs=520M"], False),
        (["latency=12ms"], True),
        (["params=3.5M", "latency=9ms"], False),
        (["memory=40MB"], None),
        (["memory=40MB", "params=1M"], False),
    ],
    ids=lambda value: ",".join(value) or "none" if isinstance(value, list) else str(value),
)
def test_targets(targets: list[str], met: bool | None) -> None:
    cost = Cost(parameters=3_433_798, multiply_adds=532_000_000)
    assert meets_targets(targets, cost, {"costs": {"latency": 0.010}}) is met
