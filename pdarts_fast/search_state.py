"""What a checkpoint of a search holds, and how it is read back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from pdarts_fast.config import SearchConfig
from pdarts_fast.run.checkpoint import random_state, set_random_state
from pdarts_fast.run.directory import RunDirectory
from pdarts_fast.run.resume import load_matching
from pdarts_fast.search_space import CELL_TYPES, Switches, live_names
from pdarts_fast.settings import to_json
from pdarts_fast.step import SearchStep
from pdarts_fast.supernet import Network

Alphas = dict[str, np.ndarray]


@dataclass
class Position:
    """Where a search stands; all counts are of what is done.

    Attributes:
        stage: 0-based stage; equal to the number of stages when the search is over.
        epoch: 0-based epoch of the stage.
        step: Weight steps done in the epoch.
        global_step: Weight steps done in the search.
        epoch_seconds: Time spent on the steps of this epoch.
        stage_seconds: Time spent in this stage.
        interval_seconds: Time spent since the last interval record.
        overhead_seconds: Time of this epoch spent on loading, logging and checkpoints.
    """

    stage: int = 0
    epoch: int = 0
    step: int = 0
    global_step: int = 0
    epoch_seconds: float = 0.0
    stage_seconds: float = 0.0
    interval_seconds: float = 0.0
    overhead_seconds: float = 0.0

    def add_seconds(self, seconds: float) -> None:
        """Count time spent on a training step."""
        self.epoch_seconds += seconds
        self.stage_seconds += seconds
        self.interval_seconds += seconds


@dataclass
class SearchState:
    """Everything of a search but the network that is training.

    Attributes:
        position: Where it stands.
        switches: Live ops per edge, bool [14, 8] per cell type.
        finished: Final alphas of the finished stages, float32 [14, live ops] per cell type.
        stage_state: Network, optimisers and sums of the stage in training as they were in the
            checkpoint; None at the start of a stage.
        random: Random generators as they were in the checkpoint; None in a new search.
        strategy: State of the strategy as it was in the checkpoint; empty in a new search.
    """

    position: Position
    switches: dict[str, np.ndarray]
    finished: list[Alphas]
    stage_state: dict[str, Any] | None = None
    random: dict[str, Any] | None = None
    strategy: dict[str, Any] = field(default_factory=dict)


def alphas_of(network: Network) -> Alphas:
    """The architecture parameters as float32 [14, live ops] arrays on the host."""
    normal, reduce = (a.detach().float().cpu().numpy().copy() for a in network.arch_parameters())
    return {"normal": normal, "reduce": reduce}


def save_state(
    state: SearchState,
    step: SearchStep | None,
    config: SearchConfig,
    facts: dict[str, Any],
    run: RunDirectory,
    device: torch.device,
) -> None:
    """Write a checkpoint.

    Args:
        step: The stage in training, or None between two stages.
        facts: What identifies the data set, as `Dataset.facts` gives it.

    Raises:
        RunError: The disk refuses.
    """
    run.checkpoints.save(
        {
            "settings": to_json(config),
            "dataset": facts,
            "position": asdict(state.position),
            "switches": {kind: table.tolist() for kind, table in state.switches.items()},
            "finished": [{k: torch.from_numpy(v) for k, v in a.items()} for a in state.finished],
            "stage_state": None if step is None else step.state_dict(),
            "random": random_state(device),
            "strategy": state.strategy,
            "files": run.file_lengths(),
        }
    )


def load_state(
    config: SearchConfig, facts: dict[str, Any], run: RunDirectory
) -> SearchState | None:
    """Read the newest whole checkpoint and cut the growing files back to its moment.

    Args:
        facts: What identifies the data set, as `Dataset.facts` gives it.

    Returns:
        The state, or None if there is no checkpoint: the search starts from the beginning.

    Raises:
        RunError: The checkpoint was made with other settings (names the flags) or other images.
    """
    saved = load_matching(config, facts, run)
    if saved is None:
        return None
    return SearchState(
        position=Position(**saved["position"]),
        switches={kind: np.array(table) for kind, table in saved["switches"].items()},
        finished=[{k: v.numpy() for k, v in alphas.items()} for alphas in saved["finished"]],
        stage_state=saved["stage_state"],
        random=saved["random"],
        strategy=saved.get("strategy", {}),
    )


def restore_random(state: SearchState, device: torch.device) -> None:
    """Set the random generators to where the checkpoint had them, if there was one."""
    if state.random is not None:
        set_random_state(state.random, device)


def alphas_record(position: Position, switches: Switches, values: Alphas) -> dict[str, Any]:
    """The line of alphas.jsonl for the epoch that has ended: live ops and their alphas."""
    return {
        "stage": position.stage + 1,
        "epoch": position.epoch,
        "ops": {kind: live_names(switches[kind]) for kind in CELL_TYPES},
        **{kind: values[kind].tolist() for kind in CELL_TYPES},
    }
