"""Whole searches: their files, that they repeat, and that every setting does what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from pdarts_fast.alphas import load_alphas
from pdarts_fast.genotype import PRIMITIVES, check_genotype, load_genotype
from pdarts_fast.search_space import (
    all_switches,
    derive,
    drop_ops,
    entropy,
    live_names,
    live_ops,
)

STEPS = 3  # 13 weight images in batches of 5


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in lines(run / "metrics.jsonl") if record["kind"] == kind]


@pytest.fixture(scope="module")
def toy(processes: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished three-stage search with the toy network."""
    run = tmp_path_factory.mktemp("toy") / "run"
    process = processes.run(tiny(run))
    assert process.status == 0, process.stderr
    return run


@pytest.fixture(scope="module")
def real(processes: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished three-stage search with the supernet, drawings and report."""
    run = tmp_path_factory.mktemp("real") / "run"
    process = processes.run(tiny(run, "--batch-size", 13), toy=False)
    assert process.status == 0, process.stderr
    assert "at most 2 skips in the normal cell" in process.stdout
    assert f"report: {run}/report.html" in process.stdout
    assert "Genotype(normal=[" in process.stdout
    return run


def test_a_real_search_leaves_every_file(real: Path) -> None:
    assert {path.name for path in real.iterdir()} == {
        ".lock",
        "config.json",
        "metrics.jsonl",
        "alphas.jsonl",
        "alphas.json",
        "genotype.json",
        "report.html",
        "checkpoints",
        "cell-normal.svg",
        "cell-normal.png",
        "cell-reduce.svg",
        "cell-reduce.png",
        "supernet-stage1.safetensors",
        "supernet-stage2.safetensors",
        "supernet-stage3.safetensors",
    }
    assert len(list((real / "checkpoints").iterdir())) == 4
    assert "<svg" in (real / "report.html").read_text()


def test_config_json_says_what_ran_on_what(real: Path) -> None:
    info = json.loads((real / "config.json").read_text())
    assert info["config"]["cells"] == [3, 3, 3]
    assert info["config"]["channels"] == [1, 1, 1]
    assert info["command"].startswith("pdarts-fast search --preset cifar10 ")
    assert {"pdarts_fast", "python", "torch", "numpy"} <= set(info["versions"])
    assert info["hardware"]["backend"] == "reference"
    assert info["hardware"]["threads"] == 1
    assert info["dataset"]["name"] == "image-folder"
    assert info["dataset"]["classes"] == ["circle", "cross", "star"]
    assert info["dataset"]["train_images"] == 27
    assert info["dataset"]["test_images"] == 6
    assert info["created"].endswith("+00:00")
    if info["git"] is not None:
        assert len(info["git"]["commit"]) == 40


def test_every_supernet_has_the_stock_names_and_the_final_alphas(real: Path) -> None:
    for stage, alphas in enumerate(load_alphas(real), start=1):
        tensors = load_file(real / f"supernet-stage{stage}.safetensors")
        assert {"stem.0.weight", "cells.0.preprocess0.op.1.weight", "classifier.bias"} <= set(
            tensors
        )
        assert "cells.0.cell_ops.0.m_ops.0.bn.running_mean" not in tensors
        for kind in ("normal", "reduce"):
            np.testing.assert_array_equal(tensors[f"alphas_{kind}"], alphas[kind])


@pytest.fixture(params=["toy", "real"])
def run(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_stage_switch_tables_follow_from_the_alphas(run: Path) -> None:
    switches = all_switches()
    alphas = load_alphas(run)
    per_epoch = lines(run / "alphas.jsonl")
    for stage, kept in enumerate([8, 5, 3]):
        assert live_ops(switches) == kept
        of_stage = [line for line in per_epoch if line["stage"] == stage + 1]
        assert [line["epoch"] for line in of_stage] == [0, 1]
        for line in of_stage:
            for kind in ("normal", "reduce"):
                assert line["ops"][kind] == live_names(switches[kind])
                assert np.array(line[kind]).shape == (14, kept)
        for kind in ("normal", "reduce"):
            np.testing.assert_array_equal(np.float32(of_stage[-1][kind]), alphas[stage][kind])
        if stage < 2:
            switches = drop_ops(switches, alphas[stage], [3, 2][stage])


def test_the_genotypes_follow_from_the_alphas(run: Path) -> None:
    derived = derive(load_alphas(run))
    content = json.loads((run / "genotype.json").read_text())
    assert content["max_skips"] == 2
    assert check_genotype(content["genotype"]) == derived.restricted[2]
    assert check_genotype(content["unrestricted"]) == derived.genotype
    assert {int(m): check_genotype(g) for m, g in content["restricted"].items()} == dict(
        derived.restricted
    )
    assert load_genotype(run) == derived.restricted[2]
    assert json.loads((run / "alphas.json").read_text())["primitives"] == list(PRIMITIVES)


def test_alphas_are_frozen_in_the_warm_up_and_train_after_it(run: Path) -> None:
    for frozen, trained in zip(*[iter(lines(run / "alphas.jsonl"))] * 2, strict=True):
        for kind in ("normal", "reduce"):
            assert np.abs(frozen[kind]).max() < 0.01
            moved = np.abs(np.array(trained[kind]) - np.array(frozen[kind]))
            assert moved.max() > 1e-3
    for stage in range(1, 4):
        frozen, trained = (e for e in records(run, "epoch") if e["stage"] == stage)
        assert frozen["alpha_loss"] is frozen["alpha_accuracy"] is None
        assert trained["alpha_loss"] > 0
        assert 0 <= trained["alpha_accuracy"] <= 1


PLACE = {"kind", "stage", "epoch", "step"}
KEYS = {
    "interval": {
        "loss", "accuracy", "alpha_loss", "alpha_accuracy", "lr", "dropout", "images_per_second",
        "seconds",
    },
    "epoch": {
        "train_loss", "train_accuracy", "alpha_loss", "alpha_accuracy", "lr", "dropout",
        "entropy_normal", "entropy_reduce", "images_per_second", "seconds", "overhead_seconds",
        "peak_memory_mib",
    },
    "validation": {"loss", "accuracy", "images", "seconds"},
    "stage": {"cells", "ops", "channels", "epochs", "parameters", "seconds", "dropped"},
}  # fmt: skip


def test_metrics_have_the_documented_keys_and_order(toy: Path) -> None:
    for record in lines(toy / "metrics.jsonl"):
        assert set(record) == KEYS[record["kind"]] | PLACE, record["kind"]
    kinds = [record["kind"] for record in lines(toy / "metrics.jsonl")]
    stage = ["interval"] * 2 + ["epoch"] + ["interval"] * 2 + ["epoch", "validation", "stage"]
    assert kinds == stage * 3
    ends = records(toy, "epoch")
    assert [(e["stage"], e["epoch"]) for e in ends] == [(s, e) for s in (1, 2, 3) for e in (0, 1)]
    assert [e["step"] for e in ends] == [STEPS * n for n in range(1, 7)]
    assert [r["dropped"] for r in records(toy, "stage")] == [3, 2, 2]
    assert [r["ops"] for r in records(toy, "stage")] == [8, 5, 3]


def test_metrics_hold_the_schedules_and_the_entropy(toy: Path) -> None:
    for record in records(toy, "epoch"):
        p = [0.0, 0.4, 0.7][record["stage"] - 1]
        assert record["lr"] == [0.025, 0.0125][record["epoch"]]
        assert record["dropout"] == pytest.approx([p / 2, p][record["epoch"]])
    for record, line in zip(records(toy, "epoch"), lines(toy / "alphas.jsonl"), strict=True):
        for kind in ("normal", "reduce"):
            assert record[f"entropy_{kind}"] == pytest.approx(entropy(line[kind]), rel=1e-12)


def test_the_last_smaller_batch_is_used(toy: Path) -> None:
    for record in records(toy, "epoch"):
        images = record["images_per_second"] * record["seconds"]
        # 13 weight images; 14 alpha images in batches of 5, 5 and 4.
        assert round(images) == (13 if record["epoch"] == 0 else 27)
    assert {record["images"] for record in records(toy, "validation")} == {14}


def test_one_seed_repeats_and_another_does_not(
    real: Path, toy: Path, processes: Any, tiny: Any, outcome: Any, tmp_path: Path
) -> None:
    assert processes.run(tiny(tmp_path / "same")).status == 0
    assert outcome(tmp_path / "same") == outcome(toy)
    assert processes.run(tiny(tmp_path / "other", "--seed", 1)).status == 0
    assert outcome(tmp_path / "other")["alphas.json"] != outcome(toy)["alphas.json"]
    again = tmp_path / "real"
    assert processes.run(tiny(again, "--batch-size", 13), toy=False).status == 0
    assert outcome(again) == outcome(real)


@pytest.mark.parametrize(
    ("split", "weights", "alphas"),
    [(0.3, 8, 19), (0.7, 18, 9)],
    ids=["alpha-half-longer", "alpha-half-shorter"],
)
def test_halves_of_different_length(
    split: float, weights: int, alphas: int, processes: Any, tiny: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = ["--data-split", split, "--epochs", 4, "--validation-epochs", 1]
    assert processes.run(tiny(run, *flags)).status == 0
    ends = [e for e in records(run, "epoch") if e["stage"] == 1]
    seen = [round(e["images_per_second"] * e["seconds"]) for e in ends]
    steps, pieces = -(-weights // 5), -(-alphas // 5)
    sizes = [min(5, alphas - 5 * i) for i in range(pieces)]
    taken = [sizes[step % pieces] for step in range(3 * steps)]
    assert seen == [weights] + [
        weights + sum(taken[epoch * steps : (epoch + 1) * steps]) for epoch in range(3)
    ]
    assert {record["images"] for record in records(run, "validation")} == {alphas}


@pytest.mark.parametrize(
    ("cells", "kept"),
    [("3", "8"), ("3 3", "8 2"), ("3 3 3 3", "8 6 6 4")],
    ids=["one-stage", "two-stages", "four-stages"],
)
def test_other_numbers_of_stages(
    cells: str, kept: str, processes: Any, tiny: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = ["--cells", *cells.split(), "--ops-kept", *kept.split(), "--skip-dropout", "0.3"]
    process = processes.run(tiny(run, *flags))
    assert process.status == 0, process.stderr
    widths = [int(width) for width in kept.split()]
    assert [stage["normal"].shape for stage in load_alphas(run)] == [(14, w) for w in widths]
    drops = [a - b for a, b in zip(widths, [*widths[1:], 1], strict=True)]
    assert [record["dropped"] for record in records(run, "stage")] == drops
    assert load_genotype(run) == derive(load_alphas(run)).restricted[2]


def test_mixed_precision_and_the_shifted_schedule_run(
    processes: Any, tiny: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = [
        "--cells", 3, "--ops-kept", 8, "--skip-dropout", 0.2, "--batch-size", 14, "--amp",
        "--lr-schedule", "reference",
    ]  # fmt: skip
    process = processes.run(tiny(run, *flags), toy=False)
    assert process.status == 0, process.stderr
    assert [record["lr"] for record in records(run, "epoch")] == [0.0125, 0.0]
    assert all(record["train_loss"] > 0 for record in records(run, "epoch"))


def test_tensorboard_gets_every_number(processes: Any, tiny: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install 'pdarts-fast[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    process = processes.run(tiny(run, "--tensorboard"))
    assert process.status == 0, process.stderr
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    wanted = records(run, "epoch")
    points = events.Scalars("epoch/train_loss")
    assert [point.step for point in points] == [record["step"] for record in wanted]
    for point, record in zip(points, wanted, strict=True):
        assert point.value == pytest.approx(record["train_loss"], rel=1e-6)
    assert {f"{kind}/seconds" for kind in KEYS} <= set(events.Tags()["scalars"])
