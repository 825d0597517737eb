"""Selection by perturbation: masks, decisions, skip cap, the command, an exact resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pdarts_fast.cli import main
from pdarts_fast.cost import genotype_cost
from pdarts_fast.errors import RunError
from pdarts_fast.genotype import check_genotype, count_skips, load_genotype
from pdarts_fast.search_space import all_switches, drop_ops
from pdarts_fast.step import SearchStep
from pdarts_fast.strategies.perturbation import (
    EDGES,
    OPERATION,
    Decision,
    PartlyDiscrete,
    Question,
    Score,
    cap_skips,
    cell_of,
    decide,
    rounds,
)
from pdarts_fast.strategies.rapdarts import evaluation_scale
from pdarts_fast.supernet import Network


def test_every_edge_and_every_node_with_a_choice_is_asked_once() -> None:
    asked = rounds(0)
    assert len(asked) == 14 + 3
    for cell in ("normal", "reduce"):
        questions = [q for one in asked for q in one if q.cell == cell]
        assert sorted(q.place for q in questions[:14]) == list(range(14))
        assert {q.kind for q in questions[:14]} == {OPERATION}
        assert sorted(q.place for q in questions[14:]) == [1, 2, 3]
        assert {q.kind for q in questions[14:]} == {EDGES}
    assert asked == rounds(0)
    assert asked != rounds(1)


@pytest.fixture
def mixing() -> PartlyDiscrete:
    alphas = {k: np.random.default_rng(0).normal(size=(14, 8)) for k in ("normal", "reduce")}
    return PartlyDiscrete(drop_ops(all_switches(), alphas, 4))


def test_an_operation_taken_out_leaves_the_others_as_they_were(mixing: PartlyDiscrete) -> None:
    alphas = torch.randn(14, 4)
    whole = mixing("normal", alphas)
    torch.testing.assert_close(whole, alphas.softmax(1))
    question = Question(OPERATION, "normal", 5)
    names = mixing.names["normal"][5]
    assert mixing.candidates(question) == [name for name in names if name != "none"]
    put_back = mixing.remove(question, names[-1])
    part = mixing("normal", alphas)
    assert part[5, 3] == 0
    part[5, 3] = whole[5, 3]
    assert torch.equal(part, whole)
    assert torch.equal(mixing("reduce", alphas), whole)
    put_back()
    assert torch.equal(mixing("normal", alphas), whole)


def test_a_decided_edge_has_one_operation_and_a_removed_edge_none(mixing: PartlyDiscrete) -> None:
    alphas = torch.randn(14, 4)
    whole = mixing("reduce", alphas)
    name = mixing.names["reduce"][6][1]
    mixing.carry_out(Decision(Question(OPERATION, "reduce", 6), {}, [name]))
    weights = mixing("reduce", alphas)
    assert weights[6].tolist() == [0, 1, 0, 0]
    put_back = mixing.remove(Question(EDGES, "reduce", 2), "6")
    assert mixing("reduce", alphas)[6].tolist() == [0, 0, 0, 0]
    put_back()
    assert torch.equal(mixing("reduce", alphas), weights)
    mixing.carry_out(Decision(Question(EDGES, "reduce", 2), {}, ["5", "6"]))
    weights = mixing("reduce", alphas)
    assert weights[7:9].abs().sum() == 0
    assert weights[6].tolist() == [0, 1, 0, 0]
    assert torch.equal(weights[5], whole[5])


def test_what_costs_most_accuracy_stays_and_the_loss_breaks_ties() -> None:
    operation = Question(OPERATION, "normal", 0)
    scores = {
        "a": Score(0.7, 1.0),
        "b": Score(0.5, 1.0),
        "c": Score(0.5, 1.5),
        "d": Score(0.5, 1.5),
    }
    assert decide(operation, scores).chosen == ["c"]
    edges = {"5": Score(0.3, 1.0), "6": Score(0.9, 1.0), "7": Score(0.2, 1.0), "8": Score(0.8, 9.0)}
    assert decide(Question(EDGES, "normal", 2), edges).chosen == ["5", "7"]
    decision = decide(operation, scores)
    assert Decision.from_json(json.loads(json.dumps(decision.to_json()))) == decision


def decisions(op: str, margins: dict[int, float]) -> list[Decision]:
    """All decisions: ``op`` everywhere, kept edges the first two; how much better on which edge."""
    made = []
    for cell in ("normal", "reduce"):
        for edge in range(14):
            scores = {op: Score(0.5, 1.0), "sep_conv_3x3": Score(0.5 + margins.get(edge, 0.4), 1.0)}
            made.append(Decision(Question(OPERATION, cell, edge), scores, [op]))
        for node, start in ((1, 2), (2, 5), (3, 9)):
            question = Question(EDGES, cell, node)
            made.append(Decision(question, {}, [str(start), str(start + 1)]))
    return made


def test_the_cell_is_what_was_decided_and_the_skip_cap_replaces_the_least_sure() -> None:
    made = decisions("skip_connect", {0: 0.3, 3: 0.2, 9: 0.1})
    genotype = check_genotype(cell_of(made))
    assert [source for _, source in genotype.normal] == [0, 1] * 4
    assert {op for op, _ in genotype.normal + genotype.reduce} == {"skip_connect"}
    capped, swaps = cap_skips(genotype, made, 5)
    assert [(s["node"], s["source"], s["after"]) for s in swaps] == [
        (3, 0, "sep_conv_3x3"), (1, 1, "sep_conv_3x3"), (0, 0, "sep_conv_3x3")
    ]  # fmt: skip
    assert count_skips(capped.normal) == 5
    assert capped.reduce == genotype.reduce
    assert cap_skips(genotype, made, 8) == (genotype, [])


def test_a_cap_that_cannot_be_reached_is_an_error() -> None:
    made = [
        Decision(d.question, {k: s for k, s in d.scores.items() if k == "skip_connect"}, d.chosen)
        for d in decisions("skip_connect", {})
    ]
    with pytest.raises(RunError, match="--max-skips 2 cannot be reached"):
        cap_skips(cell_of(made), made, 2)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_masked_supernet_is_the_supernet_without_the_operation(
    backend: str, one_thread: None
) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    network = Network(2, 10, 3, F.cross_entropy, backend=backend).eval()
    images = torch.randn(4, 3, 8, 8)
    mixing = PartlyDiscrete(all_switches())
    network.mixing = mixing
    mixing.remove(Question(OPERATION, "normal", 3), "sep_conv_3x3")
    found = network(images)
    network.mixing = None
    for cell in network.cells:
        if not cell.reduction:
            cell.cell_ops[3].m_ops[4].forward = lambda x: torch.zeros_like(x)  # type: ignore[union-attr]
    plain = Network(2, 10, 3, F.cross_entropy, backend="reference").eval()
    plain.load_state_dict(network.state_dict())
    for cell in plain.cells:
        if not cell.reduction:
            cell.cell_ops[3].m_ops[4].forward = lambda x: torch.zeros_like(x)  # type: ignore[union-attr]
    torch.testing.assert_close(found, plain(images), rtol=1e-4, atol=1e-5)


FLAGS = ("--select", "perturbation", "--perturbation-epochs", 1)


def test_a_search_ends_in_the_cell_that_was_selected(finished: Any, tools: Any) -> None:
    run = finished(*FLAGS, "--target", "params=60k", stages=tools.SELECT)
    content = tools.genotype_file(run)
    folder = run / "select-perturbation"
    assert tools.genotype_file(folder) == content
    genotype = check_genotype(content["genotype"])
    assert count_skips(genotype.normal) <= 2
    config = tools.settings("--config", run / "config.json")
    assert genotype_cost(genotype, evaluation_scale(config, 10)).parameters <= 60_000
    made = [Decision.from_json(one) for one in content["selection"]["decisions"]]
    assert cell_of(made) == check_genotype(content["unrestricted"])
    assert [d.question for d in made] == [q for one in rounds(0) for q in one]
    records = tools.records(folder, "decision")
    assert [r["chosen"] for r in records] == [d.chosen for d in made]
    for record in records:
        assert set(record["chosen"]) <= set(record["accuracies"])
        assert "none" not in record["accuracies"]
    assert len(tools.records(folder, "tuning")) == 16
    assert load_genotype(folder) == genotype


def without_seconds(run: Path, tools: Any) -> list[dict[str, Any]]:
    """All records of a selection, in kinds, without times."""
    found = [r for kind in ("decision", "tuning") for r in tools.records(run, kind)]
    return [{k: v for k, v in r.items() if k != "seconds"} for r in found]


@pytest.mark.usefixtures("few_images")
@pytest.mark.parametrize("call", [None, 2, 17], ids=["whole", "killed-early", "killed-later"])
def test_select_on_a_saved_run_is_what_the_search_would_do_also_when_it_was_killed(
    call: int | None,
    finished: Any,
    tools: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    together = finished(*FLAGS, stages=tools.SELECT) / "select-perturbation"
    apart = tmp_path / "run"
    shutil.copytree(finished(stages=tools.SELECT), apart)
    before = tools.genotype_file(apart)
    words = ["select", str(apart), "--method", "perturbation", "--epochs", "1"]
    if call is not None:
        original, steps = SearchStep.weight_step, iter(range(1, 1000))

        def dying(self: SearchStep, *args: Any) -> None:
            if next(steps) == call:
                raise KeyboardInterrupt
            original(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(SearchStep, "weight_step", dying)
            assert main(words) == 130
        words = ["select", str(apart), "--resume"]
    assert main(words) == 0
    assert capsys.readouterr().out.strip().endswith(str(load_genotype(together)))
    own = apart / "select-perturbation"
    assert tools.genotype_file(own) == tools.genotype_file(together)
    assert without_seconds(own, tools) == without_seconds(together, tools)
    assert tools.genotype_file(apart) == before
    assert main(["select", str(apart)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_a_folder_without_a_finished_search_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["select", str(tmp_path)]) == 2
    assert "no config.json of a search in it" in capsys.readouterr().err
    assert main(["select", str(tmp_path), "--resume"]) == 2
    assert "holds no selection" in capsys.readouterr().err
