"""RAPDARTS: the term, the gate, the guarantee, and an exact resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pdarts_fast.alphas import load_alphas
from pdarts_fast.cost import genotype_cost
from pdarts_fast.errors import UsageError
from pdarts_fast.genotype import load_genotype
from pdarts_fast.run.signals import Interrupted
from pdarts_fast.search_space import (
    all_switches,
    check_switches,
    derive,
    drop_ops,
    probabilities,
    restrict_skips,
)
from pdarts_fast.step import SearchStep
from pdarts_fast.strategies.costs import CostTable
from pdarts_fast.strategies.rapdarts import RapDarts, evaluation_scale, make_costs
from pdarts_fast.supernet import Network

CPU = torch.device("cpu")


def cost_of(run: Path, tools: Any) -> Any:
    """Counted cost of what a run derived, at the scale of its targets."""
    config = tools.settings("--config", run / "config.json")
    return genotype_cost(load_genotype(run), evaluation_scale(config, 10))


def test_derived_costs_meet_three_targets_that_plain_pdarts_does_not(
    finished: Any, tools: Any
) -> None:
    plain = cost_of(finished(), tools)
    exceeded = 0
    for target, limit in (
        ("params=40k", 40_000),
        ("params=70k", 70_000),
        ("macs=900k", 900_000),
    ):
        run = finished("--strategy", "rapdarts", "--target", target)
        cost = cost_of(run, tools)
        resource = target.partition("=")[0]
        value = cost.parameters if resource == "params" else cost.multiply_adds
        assert value <= limit
        assert tools.genotype_file(run)["costs"][resource] == value
        before = plain.parameters if resource == "params" else plain.multiply_adds
        exceeded += before > limit
    assert exceeded >= 1


SEVERAL = (
    "--target-weight", 1, 2, 3, "--target", "params=80k", "memory=450kB", "--target", "latency=10s"
)  # fmt: skip


def test_several_targets_at_once_with_measured_latency(finished: Any, tools: Any) -> None:
    run = finished(*SEVERAL)
    content = tools.genotype_file(run)
    assert list(content["targets"]) == ["params", "memory", "latency"]
    for name, limit in content["targets"].items():
        assert content["costs"][name] <= limit
    saved = json.loads((run / "costs.json").read_text())
    tables = [CostTable.from_json(one) for one in saved["tables"]]
    genotype = load_genotype(run)
    assert [one.of(genotype) for one in tables] == list(content["costs"].values())
    assert saved["scale"] == "5 cells, 12 channels, 8 pixels"


def test_records_hold_expected_cost_derived_cost_and_gate(finished: Any, tools: Any) -> None:
    run = finished("--strategy", "rapdarts", "--target", "params=70k")
    records = tools.records(run, "cost")
    assert [(r["stage"], r["epoch"]) for r in records] == [
        (s, e) for s in (1, 2, 3) for e in (0, 1)
    ]
    (table,) = (
        CostTable.from_json(one) for one in json.loads((run / "costs.json").read_text())["tables"]
    )
    switches = all_switches()
    for stage, alphas in enumerate(load_alphas(run)):
        record = records[2 * stage + 1]
        derived = table.of(restrict_skips(switches, alphas)[2])
        assert record["derived_params"] == derived
        assert record["gate_params"] == (derived > 70_000)
        dense = {kind: np.zeros((14, 8)) for kind in alphas}
        for kind, one in alphas.items():
            dense[kind][switches[kind]] = probabilities(one).ravel()
        assert record["expected_params"] == pytest.approx(table.expected(dense))
        if stage < 2:
            switches = drop_ops(switches, alphas, [3, 2][stage])
    check_switches(switches)
    assert {r["gate_params"] for r in records} == {0, 1}, "the target is met sometimes only"


def test_every_restricted_genotype_is_within_the_target(finished: Any, tools: Any) -> None:
    run = finished("--strategy", "rapdarts", "--target", "params=40k")
    content = tools.genotype_file(run)
    derived = derive(load_alphas(run)).restricted
    scale = evaluation_scale(tools.settings("--config", run / "config.json"), 10)
    assert content["repairs"]
    for count in content["restricted"]:
        genotype = load_genotype(run, max_skips=int(count))
        assert genotype_cost(genotype, scale).parameters <= 40_000
        assert sum(op == "skip_connect" for op, _ in genotype.normal) <= int(count)
    before, after = derived[2], load_genotype(run)
    changed = {
        (cell, pair // 2, source, old, new)
        for cell in ("normal", "reduce")
        for pair, ((old, source), (new, _)) in enumerate(
            zip(getattr(before, cell), getattr(after, cell), strict=True)
        )
        if old != new
    }
    told = {tuple(swap[k] for k in ("cell", "node", "source", "before", "after"))
            for swap in content["repairs"]}  # fmt: skip
    assert told == changed


@pytest.fixture
def strategy(tools: Any) -> RapDarts:
    config = tools.settings("--preset", "demo", "--target", "params=60k", "--target-weight", 0.5)
    costs = make_costs(config, 10, CPU, None)
    assert costs is not None
    return RapDarts(config, CPU, costs)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("gate", [0, 1], ids=["closed", "open"])
def test_the_alpha_step_descends_loss_plus_gated_cost(strategy: RapDarts, gate: int) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    network = Network(2, 10, 3, F.cross_entropy, backend="reference")
    images, labels = torch.randn(6, 3, 8, 8), torch.randint(10, (6,))
    strategy.start_stage(network, all_switches(), resumed=False)
    strategy.load_state_dict({"gates": [gate]})
    strategy.start_stage(network, all_switches(), resumed=True)
    step = SearchStep(network, strategy.config, CPU, strategy.alpha_term)
    alphas = network.arch_parameters()
    loss = F.cross_entropy(network(images), labels)
    expected = strategy._term.expected(alphas)[0]  # type: ignore[union-attr]
    wanted = torch.autograd.grad(loss + 0.5 * gate * expected, alphas)
    before = [a.detach().clone() for a in alphas]
    adam = torch.optim.Adam(
        [b.requires_grad_() for b in before], strategy.config.alpha_lr, betas=(0.5, 0.999),
        weight_decay=1e-3,
    )  # fmt: skip
    for parameter, gradient in zip(before, wanted, strict=True):
        parameter.grad = gradient
    torch.nn.utils.clip_grad_norm_(before, 5.0)
    adam.step()
    step.alpha_step(images, labels, 0)
    for found, parameter in zip(alphas, before, strict=True):
        torch.testing.assert_close(found, parameter, rtol=1e-5, atol=1e-7)
    assert step.epoch_meter.read()[1].loss == pytest.approx(loss.item(), rel=1e-5)


def test_an_open_gate_lowers_the_expected_cost(search: Any, tools: Any) -> None:
    """Against the same search without target: same seed, same batches."""
    stage = "--cells 3 --ops-kept 8 --skip-dropout 0"
    flags = ["--alpha-lr", 0.05, "--target", "params=40k", "--target-weight"]
    runs = [search(f"run{weight}", *flags, weight, stages=stage) for weight in (20, 0)]
    costs = [tools.records(run, "cost")[-1]["expected_params"] for run in runs]
    assert costs[0] < 0.97 * costs[1]


class StopAfter:
    """A stop request that a signal would have set after so many looks at it."""

    def __init__(self, looks: int) -> None:
        self._left = looks

    @property
    def signum(self) -> int | None:
        self._left -= 1
        return 15 if self._left < 0 else None

    def settle(self) -> None:
        """There is nobody to settle with."""

    def __enter__(self) -> StopAfter:
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing to restore."""


@pytest.mark.parametrize("looks", [3, 20], ids=["stage1", "later"])
def test_a_stopped_search_goes_on_exactly(
    looks: int, search: Any, finished: Any, outcome: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--target", "params=70k", "macs=1M", "--beta-decay", 1, "--sample", "dirichlet"]
    whole = finished(*flags)
    with monkeypatch.context() as patch:
        patch.setattr("pdarts_fast.run_search.StopRequest", lambda agree: StopAfter(looks))
        with pytest.raises(Interrupted):
            search("cut", *flags)
    cut = search("cut", *flags, "--resume")
    assert outcome(cut) == outcome(whole)
    assert (cut / "costs.json").read_bytes() == (whole / "costs.json").read_bytes()


def test_a_resume_reads_the_measured_latency(
    finished: Any, search: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished(*SEVERAL), tmp_path / "run")
    monkeypatch.setattr(
        "pdarts_fast.strategies.rapdarts.cost_tables", lambda *a: pytest.fail("measured again")
    )
    run = search("run", *SEVERAL, "--resume")
    assert (run / "costs.json").read_bytes() == (finished(*SEVERAL) / "costs.json").read_bytes()


def test_an_infeasible_target_is_refused_before_anything_is_written(
    search: Any, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"params=20.000 k but the cheapest cell needs 32.974 k"):
        search("run", "--target", "params=20k")
    assert not (tmp_path / "run").exists()
