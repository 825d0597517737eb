"""OPP-DARTS: constant depth, operations added one by one, the one with the largest loss first.

All eight operations have a slot from the beginning; a mask says which take part in the softmax. So
the cell's plan and a captured step stay valid when an operation comes.

Source: arXiv 2302.05632, section 3; slots, mask and shared trial batches are ours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pdarts_fast.config import SearchConfig
from pdarts_fast.data.plan import keyed_generator
from pdarts_fast.errors import RunError
from pdarts_fast.genotype import PRIMITIVES
from pdarts_fast.operations import OPS
from pdarts_fast.search_space import CELL_TYPES, Switches
from pdarts_fast.strategies.base import Record, Strategy, Trainer, Trials
from pdarts_fast.strategies.rules import OPP_ADDITIONS
from pdarts_fast.supernet import ALPHA_SCALE, Cell, MixedOp, Network

FIRST_OPS = ("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")
LAST_OP = "skip_connect"
# The order in which remaining ops are tried: the first of equal losses wins.
TRIED_OPS = ("none", "max_pool_3x3", "avg_pool_3x3", *FIRST_OPS)


class ActiveOps(nn.Module):
    """Softmax over the active columns of the alphas; the others have weight 0.

    Attributes:
        active: bool [8]; changes in place and does not show in ``state_dict``.
    """

    active: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer(
            "active", torch.zeros(len(PRIMITIVES), dtype=torch.bool), persistent=False
        )

    def set(self, ops: Sequence[str]) -> None:
        """Make these operations active and no other."""
        mask = torch.tensor([name in ops for name in PRIMITIVES])
        self.active.copy_(mask)

    def forward(self, kind: str, alphas: Tensor) -> Tensor:
        """Weights [edges, 8] from alphas [edges, 8]."""
        return alphas.masked_fill(~self.active, -float("inf")).softmax(dim=-1)


def due_additions(config: SearchConfig, epoch: int) -> int:
    """How many operations, the first one included, are there in an epoch (0-based)."""
    return 1 + min(epoch // config.op_interval, OPP_ADDITIONS)


def learning_rate(config: SearchConfig, epoch: int) -> float:
    """Cosine to ``lr_min`` that restarts at the current rate whenever an operation is added.

    The current rate is what the cosine before gives for the epoch of the addition.

    Args:
        epoch: 0-based epoch.

    Source:
        arXiv 2302.05632, section 4.
    """
    start, top = 0, config.lr
    for addition in range(1, OPP_ADDITIONS + 1):
        at = addition * config.op_interval
        if at > epoch:
            break
        top = _cosine(config, at, start, top)
        start = at
    return _cosine(config, epoch, start, top)


def _cosine(config: SearchConfig, epoch: int, start: int, top: float) -> float:
    e = epoch + (config.lr_schedule == "reference")
    angle = math.pi * (e - start) / (config.epochs - start)
    return config.lr_min + (top - config.lr_min) * (1 + math.cos(angle)) / 2


def renew(network: Network, primitive: str, seed: int, addition: int) -> None:
    """Give an operation fresh weights, statistics and alphas on every edge, in place.

    They depend on the seed, the addition and the operation only: not on the device, nor on what
    was tried before.

    Args:
        network: A supernet in which all eight primitives are alive.
        primitive: Which operation.
        seed: The run's seed.
        addition: Number of the addition, 0 for the first operation.
    """
    column = PRIMITIVES.index(primitive)
    key = (seed, "opp", addition, primitive)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        digest = blake2b(repr(key).encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest, "little") >> 1)
        for cell in network.cells:
            assert isinstance(cell, Cell)
            for (_, _, stride), edge in zip(cell.edges, cell.cell_ops, strict=True):
                fresh = OPS[primitive](cell.C, stride, False)
                slot = cast(MixedOp, edge).m_ops[column]
                if "pool" in primitive:
                    slot[1].reset_running_stats()  # type: ignore[index]
                else:
                    slot.load_state_dict(fresh.state_dict())
        draw = keyed_generator(*key, "alphas")
        for alphas in network.arch_parameters():
            values = ALPHA_SCALE * draw.standard_normal(len(alphas))
            alphas[:, column] = torch.from_numpy(values).to(alphas)


def reset_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Set momentum, moments and step counts to zero in place: as good as a new optimiser."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()


@torch.no_grad()
def trial_loss(trainer: Trainer, trials: Trials, number: int) -> float:
    """Mean cross-entropy over a pass with batch statistics; running statistics stay.

    Every image counts once, on whichever rank it is, so all ranks get the same value.

    Args:
        trainer: Its network is measured as it stands.
        trials: Gives the batches.
        number: Which pass.

    Raises:
        RunError: It is not finite.
    """
    network = trainer.network
    kept = [buffer.clone() for buffer in network.buffers()]
    losses, images_seen = [], 0
    for images, labels, own in trials.batches(number):
        _, logits = trainer.forward(images, labels)
        losses.append(
            functional.cross_entropy(logits[:own].double(), labels[:own], reduction="sum")
        )
        images_seen += own
        trials.check_stop()
    for buffer, value in zip(network.buffers(), kept, strict=True):
        buffer.copy_(value)
    total = torch.stack(losses).sum()
    loss, count = trials.ranks.total(torch.stack([total, total.new_tensor(images_seen)])).tolist()
    if not math.isfinite(loss):
        message = "a trial of --strategy opp has a loss that is not finite: try a smaller --lr"
        raise trials.ranks.agreed(RunError(message))
    return loss / count


class Opp(Strategy):
    """One stage in which operations come: the first of four, six by trial, skip_connect last.

    Attributes:
        order: Active operations in the order of their insertion.
    """

    def __init__(self, config: SearchConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.order: list[str] = []
        self._mixing = ActiveOps()

    def learning_rate(self, epoch: int) -> float:
        return learning_rate(self.config, epoch)

    def start_stage(self, network: Network, switches: Switches, *, resumed: bool) -> None:
        self._mixing = ActiveOps().to(self.device)
        self._mixing.set(self.order)
        network.mixing = self._mixing
        super().start_stage(network, switches, resumed=resumed)

    def _active_columns(self, network: Network) -> Tensor | None:
        return self._mixing.active

    def begin_epoch(self, epoch: int, trainer: Trainer, trials: Trials) -> Iterator[Record]:
        addition = len(self.order)
        if due_additions(self.config, epoch) <= addition:
            return
        start = time.perf_counter()
        losses = {}
        candidates = self._candidates()
        if len(candidates) > 1 or candidates[0] != LAST_OP:
            for name in candidates:
                renew(trainer.network, name, self.config.seed, addition)
                self._mixing.set([*self.order, name])
                losses[name] = trial_loss(trainer, trials, addition)
        chosen = max(candidates, key=lambda name: losses.get(name, 0.0))
        renew(trainer.network, chosen, self.config.seed, addition)
        self.order.append(chosen)
        self._mixing.set(self.order)
        for optimizer in (trainer.weight_optimizer, trainer.alpha_optimizer):
            reset_optimizer(optimizer)
        yield {
            "kind": "operation",
            "operation": chosen,
            "number": addition + 1,
            "losses": losses,
            "seconds": time.perf_counter() - start,
        }

    def _candidates(self) -> list[str]:
        if not self.order:
            return list(FIRST_OPS)
        left = [name for name in TRIED_OPS if name not in self.order]
        return left or [LAST_OP]

    def visible(
        self, switches: Switches, alphas: dict[str, np.ndarray]
    ) -> tuple[Switches, dict[str, np.ndarray]]:
        active = np.array([name in self.order for name in PRIMITIVES])
        shown = {kind: switches[kind] & active for kind in CELL_TYPES}
        return shown, {kind: alphas[kind][:, active] for kind in CELL_TYPES}

    def state_dict(self) -> dict[str, Any]:
        return {"order": list(self.order)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order = list(state["order"])
