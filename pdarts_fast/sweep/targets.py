"""Whether a derived cell meets the targets of its search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pdarts_fast.cost import Cost
from pdarts_fast.strategies.targets import MACS, PARAMS, parse_targets


def meets_targets(texts: Sequence[str], cost: Cost, result: Mapping[str, Any]) -> bool | None:
    """Whether a derived cell costs at most what its search was told.

    Args:
        texts: Values of ``--target``; none are always met.
        cost: Of the derived network, counted here.
        result: Content of genotype.json; its entry ``costs``, resource to number, has what the
            search measured and cannot be counted (latency).

    Returns:
        None if a target is on something whose cost is not known.
    """
    recorded = result.get("costs")
    known: dict[str, float] = dict(recorded) if isinstance(recorded, dict) else {}
    known |= {PARAMS: cost.parameters, MACS: cost.multiply_adds}
    unknown = False
    for target in parse_targets(texts):
        if target.resource not in known:
            unknown = True
        elif known[target.resource] > target.limit:
            return False
    return None if unknown else True
