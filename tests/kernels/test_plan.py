"""Plans and calls: names, slots and sharing."""

from __future__ import annotations

from typing import Any

import pytest

from pdarts_fast.genotype import PRIMITIVES
from pdarts_fast.kernels import calls, plan
from pdarts_fast.kernels import cell as fused


def key_of(table: list[list[bool]], **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "channels": 8,
        "in_channels": (24, 32),
        "reduction": False,
        "reduction_prev": False,
        "steps": 4,
        "multiplier": 4,
        "index": 1,
        "dropout": True,
    }
    return plan.make_key(table, **{**arguments, **changes})


def test_constants_are_those_of_the_search() -> None:
    assert plan.PRIMITIVES == PRIMITIVES


@pytest.mark.parametrize("reduction", [False, True], ids=["normal", "reduction"])
def test_a_full_cell_has_one_slot_a_batch_norm_but_shares_pools(reduction: bool) -> None:
    found = plan.from_key(key_of([[True] * 8] * 14, reduction=reduction))
    convolutions, factorized = 14 * 6, 8 if reduction else 0
    assert found.num_slots == convolutions + factorized + 2 * 5
    assert len(found.norms) == convolutions + factorized + 2 * 14 + 2
    assert len(found.branches) == 14 * 7
    assert len(found.weights) == 14 * 12 + 2 * factorized + 2


@pytest.mark.parametrize("live", [1, 3, 5, 8], ids=lambda n: f"{n}-live")
@pytest.mark.parametrize("reduction", [False, True], ids=["normal", "reduction"])
def test_every_parameter_and_norm_of_a_cell_is_named_once(
    make_case: Any, live: int, reduction: bool
) -> None:
    cell = make_case(live=live, reduction=reduction, reduction_prev=reduction).cell()
    found = plan.from_key(fused.Names(cell).key)
    assert sorted(found.weights) == sorted(name for name, _ in cell.named_parameters())
    norms = {name.rpartition(".")[0] for name, _ in cell.named_buffers() if "running" in name}
    assert sorted(found.norms) == sorted(norms)


def test_calls_cover_every_branch_once() -> None:
    key = key_of([[True] * 8] * 14)
    found, cell = plan.from_key(key), calls.of(key)
    gathered = [item for call in cell.gather for item in call.items]
    entered = [item for call in cell.both for item in call.items]
    assert len(gathered) == len(entered) == len(found.branches)
    written = [item.slot for call in (*cell.leave, *cell.second) for item in call.items]
    assert sorted(written) == list(range(found.num_slots))
    streams = {item.stream for item in entered if item.kind == plan.SKIP}
    assert streams == {plan.STREAMS_PER_CELL + edge for edge in range(14)}


def test_uneven_tables_are_refused() -> None:
    table = [[True] * 8] * 13 + [[False] * 8]
    with pytest.raises(ValueError, match="same number of live primitives"):
        plan.from_key(key_of(table))
