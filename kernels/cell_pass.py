"""What the forward and the backward pass of a search cell have in common.

Saved for backward: the two inputs before and after preprocessing, the nodes, one array a slot
(output before BatchNorm), and scale and shift of every BatchNorm. Everything else is recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from . import calls
from . import plan as plans
from .calls import Call, Places
from .interface import Arrays, Backend
from .plan import Plan


@dataclass(slots=True)
class Saved:
    """What the backward pass reads; C is padded to the backend's channels.

    Attributes:
        inputs: Both cell inputs, ``[N, H, W, Cx]``.
        states: Both after preprocessing, ``[N, H, W, C]``.
        nodes: ``[N, H, W, steps * C]``, node after node.
        slots: Outputs before BatchNorm, ``[slots, N, H, W, C]``.
        norms: Scale and shift of every BatchNorm, float64 ``[rows, 2, C]``. Rows are slots and
            then the two inputs in training, ``Plan.norms`` in evaluation, where norms of the same
            slot may differ.
    """

    inputs: tuple[Tensor, Tensor]
    states: tuple[Tensor, Tensor]
    nodes: Tensor
    slots: Tensor
    norms: Tensor

    def all_states(self, steps: int) -> list[Tensor]:
        """Every state, ``[N, H, W, C]``: the inputs', then slices of the nodes."""
        return [*self.states, *self.nodes.chunk(steps, dim=-1)]


class Pass:
    """One forward or backward pass of a cell.

    Args:
        backend: Runs the primitives.
        plan: The cell.
        saved: Arrays to write in a forward pass, to read in a backward pass.
        arrays: The same for the primitives.
        alphas: Weights of the operations, ``[edges, ops]``.
    """

    def __init__(
        self, backend: Backend, plan: Plan, saved: Saved, arrays: Arrays, alphas: Tensor
    ) -> None:
        self.backend = backend
        self.plan = plan
        self.calls = calls.of(plan.key)
        self.saved = saved
        self.arrays = arrays
        self.training = arrays.training
        self.alphas = alphas.detach().double().flatten()
        self.dtype = backend.coefficient_dtype(saved.slots.dtype)

    def places(self, call: Call) -> Places:
        """Indices of a call's items, on the device of the arrays."""
        return call.places(self.saved.norms.device)

    def rows(self, call: Call) -> Tensor:
        """Rows of a call's items in ``Saved.norms``."""
        places = self.places(call)
        return places.slots if self.training else places.norms

    def norms(self, call: Call) -> Tensor:
        """Scale and shift of a call's items, float64 ``[n, 2, C]``."""
        return self.saved.norms.index_select(0, self.rows(call))

    def input_row(self, which: int) -> int:
        """Row of an input in ``Saved.norms``."""
        return (self.plan.num_slots if self.training else len(self.plan.norms) - 2) + which

    def factors(self, call: Call) -> Tensor:
        """Alphas of a call's items, float64 ``[n, 1]``."""
        return self.alphas.index_select(0, self.places(call).alphas)[:, None]

    def cast(self, x: Tensor) -> Tensor:
        """float64 to the dtype in which the backend wants coefficients."""
        return x.to(self.dtype).contiguous()

    def input_arrays(self, which: int) -> Arrays:
        """The arrays of a call of ``CellCalls.inputs``: its slot 0 is the state."""
        arrays = self.arrays
        return Arrays(
            y=self.saved.states[which][None],
            states=arrays.states,
            weights=arrays.weights,
            rate=arrays.rate,
            state=arrays.state,
            channels=arrays.channels,
            training=arrays.training,
            grads=[],
        )

    def half_norms(self, call: Call) -> Tensor:
        """Scale and shift of what a call's second halves read, float64 ``[n, 2, C]``."""
        places = self.places(call)
        rows = places.input_slots if self.training else places.input_norms
        return self.saved.norms.index_select(0, rows)


def state_size(plan: Plan, which: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of an input after preprocessing."""
    divisor = 2 if plan.input_kind(which) == plans.FACTORIZED else 1
    return -(-height // divisor), -(-width // divisor)
