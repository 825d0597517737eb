"""OPP-DARTS and selection by perturbation on two ranks: decisions, weights, exact resume."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

TRIAL = "pdarts_fast.strategies.opp:trial_loss"
SCORE = "pdarts_fast.selection:Selection._score"
TUNING = "pdarts_fast.step:SearchStep.weight_step"
SHARED = ("--batch-size", 4, "--checkpoint-interval", 1)
OPP = (
    *SHARED, "--strategy", "opp", "--cells", 3, "--ops-kept", 8, "--epochs", 8,
    "--op-interval", 1, "--warmup-epochs", 0, "--skip-dropout", 0, "--log-interval", 100,
)  # fmt: skip
# 12 images for the weights and 15 for the alphas: the last batch of a score has three.
SEARCH = (
    *SHARED, "--data-split", 0.4445, "--cells", 3, 3, "--ops-kept", 8, 2, "--skip-dropout", 0, 0,
    "--max-skips", 8, "--log-interval", 100,
)  # fmt: skip
SELECTING = ("--select", "perturbation", "--perturbation-epochs", 1)
TIMING = (
    "seconds", "overhead_seconds", "images_per_second", "peak_memory_mib", "expected_latency",
    "derived_latency",
)  # fmt: skip
FOLDER = "select-perturbation"

Run = Callable[..., list[Any]]


def records(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def numbers(value: Any) -> Iterator[float]:
    """All numbers of a JSON value in their order."""
    if isinstance(value, dict):
        for one in value.values():
            yield from numbers(one)
    elif isinstance(value, list):
        for one in value:
            yield from numbers(one)
    elif isinstance(value, float):
        yield value


def assert_same_up_to_rounding(run: Path, other: Path) -> None:
    """The same decisions, and numbers that differ by rounding only."""
    mine, yours = records(run), records(other)
    assert [sorted(record) for record in mine] == [sorted(record) for record in yours]
    for one, two in zip(mine, yours, strict=True):
        for key in ("kind", "operation", "asked", "cell", "place", "chosen", "step", "accuracies"):
            assert one.get(key) == two.get(key), one["kind"]
        assert list(numbers(one)) == pytest.approx(list(numbers(two)), 1e-4, 2e-4), one["kind"]
    weights = sorted(path.name for path in run.glob("supernet-stage*.safetensors"))
    assert weights == sorted(path.name for path in other.glob("supernet-stage*.safetensors"))
    for name in weights:
        tensors, others = load_file(run / name), load_file(other / name)
        assert tensors.keys() == others.keys()
        for key, value in tensors.items():
            np.testing.assert_allclose(value, others[key], rtol=0, atol=1e-3, err_msg=key)
    cells = [json.loads((one / "genotype.json").read_text())["genotype"] for one in (run, other)]
    assert cells[0] == cells[1]


def finish(ranks: list[Any]) -> list[Any]:
    for process in ranks:
        assert process.status == 0, process.stderr
    return ranks


@pytest.fixture(scope="module")
def run_plain(run_ranks: Run) -> Run:
    """Runs a command with a supernet that does not depend on how batches are divided."""
    return lambda command, **options: run_ranks(command, network="PlainSupernet", **options)


@pytest.fixture(scope="module")
def opp_command(
    images: Path, tiny: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[str]]:
    """Makes the command of a search by OPP-DARTS; each half has 12 images, three whole batches."""
    folder = tmp_path_factory.mktemp("even") / "images"
    shutil.copytree(images, folder, ignore=shutil.ignore_patterns("10.png"))
    return lambda run, *flags: tiny(run, *OPP, "--data", folder, *flags)


@pytest.fixture(scope="module")
def opp(run_plain: Run, opp_command: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search by OPP-DARTS on two ranks."""
    run = tmp_path_factory.mktemp("opp") / "run"
    first, second = finish(run_plain(opp_command(run)))
    assert first.stderr.count(f"writes into {run}") == 1
    assert (second.stdout, second.stderr) == ("", "")
    return run


def test_opp_takes_the_decisions_of_one_process_and_ends_in_its_weights(
    opp: Path, processes: Any, opp_command: Any, tmp_path: Path
) -> None:
    alone = tmp_path / "run"
    finish([processes.run(opp_command(alone), network="PlainSupernet")])
    assert_same_up_to_rounding(opp, alone)
    additions = [record for record in records(opp) if record["kind"] == "operation"]
    assert len(additions) == 8
    assert json.loads((opp / "config.json").read_text())["hardware"]["ranks"] == 2


@pytest.mark.parametrize(
    ("rank", "kill"), [(0, (TRIAL, 13, "after")), (1, (TRIAL, 2, "before"))],
    ids=["rank0-between-trials", "rank1-in-the-first-trials"],
)  # fmt: skip
def test_opp_killed_among_trials_goes_on_exactly(
    rank: int,
    kill: Any,
    opp: Path,
    start_ranks: Run,
    run_plain: Run,
    opp_command: Any,
    outcome: Any,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    ranks = start_ranks(opp_command(run), network="PlainSupernet", only={rank: {"kill": kill}})
    assert ranks[rank].wait() == -signal.SIGKILL
    assert ranks[1 - rank].wait() == 1
    finish(run_plain(opp_command(run, "--resume")))
    assert outcome(run) == outcome(opp)


def test_a_trial_that_is_not_finite_on_one_rank_is_one_line_of_rank_0(
    run_plain: Run, opp_command: Any, tmp_path: Path
) -> None:
    fault = ("pdarts_fast.step:SearchStep.forward", 2, "nan")
    first, second = run_plain(opp_command(tmp_path / "run"), only={1: {"fault": fault}})
    assert "a trial of --strategy opp has a loss that is not finite" in first.error_line(1)
    assert (second.status, second.stderr) == (1, "")


@pytest.fixture(scope="module")
def selected(processes: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search of one process with its selection."""
    run = tmp_path_factory.mktemp("selected") / "run"
    finish([processes.run(tiny(run, *SEARCH, *SELECTING), network="PlainSupernet")])
    return run


def test_a_search_with_selection_on_two_ranks_is_that_of_one_process(
    selected: Path, run_plain: Run, tiny: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first, second = finish(run_plain(tiny(run, *SEARCH, *SELECTING)))
    assert_same_up_to_rounding(run, selected)
    assert_same_up_to_rounding(run / FOLDER, selected / FOLDER)
    assert first.stdout.count("genotype (at most") == 1
    assert (second.stdout, second.stderr) == ("", "")


@pytest.fixture(scope="module")
def saved(selected: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes a copy of a finished search without its selection."""

    def copy() -> Path:
        run = tmp_path_factory.mktemp("saved") / "run"
        shutil.copytree(selected, run, ignore=shutil.ignore_patterns(FOLDER))
        return run

    return copy


@pytest.fixture(scope="module")
def whole(saved: Callable[[], Path], run_plain: Run) -> Path:
    """``pdarts-fast select`` on two ranks."""
    run = saved()
    first, second = finish(run_plain(["select", str(run), "--epochs", "1"]))
    assert first.stdout.startswith("Genotype(")
    assert (second.stdout, second.stderr) == ("", "")
    return run / FOLDER


def test_select_on_two_ranks_is_that_of_one_process(whole: Path, selected: Path) -> None:
    assert_same_up_to_rounding(whole, selected / FOLDER)
    assert json.loads((whole / "config.json").read_text())["hardware"]["ranks"] == 2


@pytest.mark.parametrize(
    ("rank", "kill"), [(0, (TUNING, 14, "before")), (1, (SCORE, 9, "before"))],
    ids=["rank0-tuning", "rank1-asking"],
)  # fmt: skip
def test_select_killed_goes_on_exactly(
    rank: int, kill: Any, whole: Path, saved: Callable[[], Path], start_ranks: Run, run_plain: Run
) -> None:
    run = saved()
    command = ["select", str(run), "--epochs", "1"]
    ranks = start_ranks(command, network="PlainSupernet", only={rank: {"kill": kill}})
    assert ranks[rank].wait() == -signal.SIGKILL
    assert ranks[1 - rank].wait() == 1
    finish(run_plain(["select", str(run), "--resume"]))
    assert records(run / FOLDER) == records(whole)
    name = "genotype.json"
    assert (run / FOLDER / name).read_bytes() == (whole / name).read_bytes()


def test_select_started_again_by_torchrun_goes_on_by_itself(
    whole: Path, saved: Callable[[], Path], run_plain: Run
) -> None:
    run = saved()
    command = ["select", str(run), "--epochs", "1"]
    launch = {"TORCHELASTIC_MAX_RESTARTS": "1", "TORCHELASTIC_RUN_ID": "mine"}
    for process in run_plain(command, environment=launch, kill=(TUNING, 20, "before")):
        assert process.status == -signal.SIGKILL
    finish(run_plain(command, environment={**launch, "TORCHELASTIC_RESTART_COUNT": "1"}))
    assert records(run / FOLDER) == records(whole)


def test_select_without_a_finished_search_is_one_line_of_rank_0(
    run_plain: Run, tmp_path: Path
) -> None:
    first, second = run_plain(["select", str(tmp_path)])
    assert "no config.json of a search in it" in first.error_line(2)
    assert (second.status, second.stderr) == (2, "")


def test_targets_and_remedies_on_two_ranks_are_those_of_one_process(
    run_plain: Run, processes: Any, tiny: Any, tmp_path: Path
) -> None:
    flags = [
        *SEARCH, "--target", "params=2.9M", "--target", "latency=1s", "--beta-decay", 1,
        "--sample", "dirichlet",
    ]  # fmt: skip
    run, alone = tmp_path / "run", tmp_path / "alone"
    finish(run_plain(tiny(run, *flags)))
    finish([processes.run(tiny(alone, *flags), network="PlainSupernet")])
    assert_same_up_to_rounding(run, alone)
    costs = [record for record in records(run) if record["kind"] == "cost"]
    assert len(costs) == 4
    assert {"gate_params", "gate_latency"} <= costs[0].keys()
