"""RAPDARTS: P-DARTS with resource costs in the alpha loss and a guarantee at the end.

Source: arXiv 1911.05704; cost term, gate and repair are ours (docs/strategies.md).
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pdarts_fast import search_space, train_config
from pdarts_fast.config import SearchConfig
from pdarts_fast.cost import Scale
from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.genotype import Genotype
from pdarts_fast.network import NetworkCIFAR
from pdarts_fast.run.files import write_json
from pdarts_fast.search_space import CELL_TYPES, Alphas, Derivation, Switches
from pdarts_fast.strategies.base import AlphaTerm, Record, Result
from pdarts_fast.strategies.costs import CostTable, ExpectedCosts, cost_tables
from pdarts_fast.strategies.pdarts import PDarts
from pdarts_fast.strategies.repair import Repair, Swap, log_probabilities, require_feasible
from pdarts_fast.strategies.targets import Target, parse_targets, show
from pdarts_fast.supernet import Network

log = logging.getLogger(__name__)

COSTS_FILE = "costs.json"


@dataclasses.dataclass(frozen=True)
class Costs:
    """The targets of a search and the tables that say what a cell costs.

    Attributes:
        targets: One a resource.
        tables: In the same order.
        scale: The evaluation network, as text.
    """

    targets: tuple[Target, ...]
    tables: tuple[CostTable, ...]
    scale: str

    def of(self, genotype: Genotype) -> dict[str, float]:
        """Cost of a genotype by resource."""
        return {
            target.resource: table.of(genotype)
            for target, table in zip(self.targets, self.tables, strict=True)
        }


def evaluation_scale(config: SearchConfig, num_classes: int) -> Scale:
    """The network whose cost counts: that of the train command's preset of the same name."""
    recipe = train_config.preset(config.preset)
    return Scale(NetworkCIFAR, recipe.channels, recipe.cells, num_classes, config.image_size)


def make_costs(
    config: SearchConfig, num_classes: int, device: torch.device, run_dir: Path | None
) -> Costs | None:
    """The targets of a search with their cost tables; None without targets.

    Args:
        config: A validated configuration.
        num_classes: Of the data set.
        device: Where latency is measured.
        run_dir: Folder of the run to go on with: its tables are read, not measured again.

    Raises:
        UsageError: No cell can meet the targets.
        RunError: The tables of the run to go on with are damaged.
    """
    targets = parse_targets(config.target)
    if not targets:
        return None
    scale = evaluation_scale(config, num_classes)
    text = f"{scale.layers} cells, {scale.C} channels, {scale.image_size} pixels"
    path = None if run_dir is None else run_dir / COSTS_FILE
    if path is not None and path.is_file():
        tables = _read_tables(path, targets)
    else:
        tables = cost_tables(targets, scale, device)
    require_feasible(tables, targets, config.max_skips)
    return Costs(targets, tables, text)


def _read_tables(path: Path, targets: Sequence[Target]) -> tuple[CostTable, ...]:
    try:
        saved = json.loads(path.read_text())["tables"]
        tables = tuple(CostTable.from_json(one) for one in saved)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}): start again with --overwrite") from error
    if [table.resource for table in tables] != [target.resource for target in targets]:
        raise RunError(f"{path} holds other resources than --target: give another --run-dir")
    return tables


def write_costs(costs: Costs, run_dir: Path) -> None:
    """Write costs.json, which a resume reads.

    Raises:
        RunError: It cannot be written.
    """
    values = {
        "scale": costs.scale,
        "targets": {target.resource: target.limit for target in costs.targets},
        "tables": [table.to_json() for table in costs.tables],
    }
    write_json(run_dir / COSTS_FILE, values)


class RapDarts(PDarts):
    """P-DARTS whose alpha loss adds sum_r weight_r g_r E_r / T_r.

    g_r is 1 while the genotype derived now (skip cap applied) exceeds its target, else 0; it is
    looked at when a stage begins and when an epoch ends.

    Args:
        config: A validated configuration.
        device: Where the supernet runs.
        costs: Targets and tables.
    """

    def __init__(self, config: SearchConfig, device: torch.device, costs: Costs) -> None:
        super().__init__(config, device)
        self.costs = costs
        given = config.target_weight
        self._weights = given * len(costs.targets) if len(given) == 1 else given
        self._gates = [0] * len(costs.targets)
        self._term: ExpectedCosts | None = None

    def start_stage(self, network: Network, switches: Switches, *, resumed: bool) -> None:
        super().start_stage(network, switches, resumed=resumed)
        if not resumed:
            normal, reduce = (a.detach().float().cpu().numpy() for a in network.arch_parameters())
            self._look(switches, {"normal": normal, "reduce": reduce})
        self._set_coefficients()

    def _terms(self, network: Network, switches: Switches) -> list[AlphaTerm]:
        self._term = ExpectedCosts(self.costs.tables, self.costs.targets, switches).to(self.device)
        return [self._term, *super()._terms(network, switches)]

    def _set_coefficients(self) -> None:
        """Write weight times gate where the alpha loss reads it."""
        assert self._term is not None
        values = [w * g for w, g in zip(self._weights, self._gates, strict=True)]
        self._term.coefficients.copy_(torch.tensor(values, dtype=torch.float32))

    def _look(self, switches: Switches, alphas: dict[str, np.ndarray]) -> dict[str, float]:
        """Set the gates by the genotype of the alphas; returns its costs."""
        restricted = search_space.restrict_skips(switches, alphas)
        allowed = max(self.config.max_skips, min(restricted))
        costs = self.costs.of(restricted[allowed])
        self._gates = [int(costs[one.resource] > one.limit) for one in self.costs.targets]
        return costs

    def end_epoch(self, switches: Switches, alphas: dict[str, np.ndarray]) -> Iterator[Record]:
        derived = self._look(switches, alphas)
        self._set_coefficients()
        dense = {}
        for kind in CELL_TYPES:
            dense[kind] = np.zeros(switches[kind].shape)
            dense[kind][switches[kind]] = search_space.probabilities(alphas[kind]).ravel()
        record: Record = {"kind": "cost"}
        for target, table, gate in zip(
            self.costs.targets, self.costs.tables, self._gates, strict=True
        ):
            name = target.resource
            record[f"expected_{name}"] = table.expected(dense)
            record[f"derived_{name}"] = derived[name]
            record[f"gate_{name}"] = gate
        yield record

    def result(self, finished: Sequence[Alphas]) -> Result:
        """The genotypes with their operations swapped until every target is met.

        A number of skips for which that cannot be is left out.
        """
        derivation = super().result(finished).derivation
        logs = log_probabilities(finished)
        restricted, swaps = {}, {}
        for allowed, genotype in derivation.restricted.items():
            try:
                restricted[allowed], swaps[allowed] = self.repaired(genotype, allowed, logs)
            except UsageError:
                log.info("no cell with at most %d skips meets the targets: left out", allowed)
        allowed = self.config.max_skips
        facts = self.facts(restricted[allowed], swaps[allowed]) if allowed in restricted else {}
        return Result(Derivation(derivation.switches, derivation.genotype, restricted), facts)

    def repaired(
        self, genotype: Genotype, max_skips: int, logs: dict[str, np.ndarray]
    ) -> tuple[Genotype, list[Swap]]:
        """A genotype that meets every target; arguments and errors as in `Repair.run`."""
        return Repair(genotype, self.costs.tables, self.costs.targets, max_skips).run(logs)

    def facts(self, genotype: Genotype, swaps: Sequence[Swap]) -> dict[str, Any]:
        """What genotype.json says of costs and repairs."""
        for swap in swaps:
            log.info(
                "repair: %s cell, node %d from state %d: %s instead of %s",
                *(swap.cell, swap.node, swap.source, swap.after, swap.before),
            )
        found = self.costs.of(genotype)
        for target in self.costs.targets:
            value, limit = (
                show(target.resource, x) for x in (found[target.resource], target.limit)
            )
            log.info("%s of the derived network: %s (target %s)", target.resource, value, limit)
        limits = {target.resource: target.limit for target in self.costs.targets}
        return {
            "costs": found,
            "targets": limits,
            "repairs": [swap.to_json() for swap in swaps],
        }

    def state_dict(self) -> dict[str, Any]:
        return {"gates": list(self._gates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._gates = list(state["gates"])
