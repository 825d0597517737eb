"""The search network: cells whose edges are weighted sums of every live primitive.

Parameter and buffer names are the stock ones, so checkpoints of existing scripts load. The
``reference`` backend runs the published graph one operation at a time; other backends replace how
a cell runs, never what it holds.

Source: arXiv 1904.12760, section 3.1; arXiv 1806.09055, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdarts_fast import search_space
from pdarts_fast.genotype import PRIMITIVES
from pdarts_fast.kernels import backends, chain
from pdarts_fast.kernels.plan import STREAMS_PER_CELL
from pdarts_fast.operations import OPS, FactorizedReduce, Identity, ReLUConvBN, batch_norm
from pdarts_fast.pooling import GlobalPool
from pdarts_fast.search_space import NUM_INPUTS, Switches
from pdarts_fast.skip_dropout import DropoutControl, SkipDropout
from pdarts_fast.stem import Stem

SwitchTable = Sequence[Sequence[bool]] | np.ndarray
"""Which primitives are alive on which edge: ``[edges, 8]`` booleans."""

ALPHA_SCALE = 1e-3
"""Standard deviation of the initial architecture parameters."""


class MixedOp(nn.Module):
    """``sum_k weights[k] * m_ops[k](x)`` over the live primitives of one edge.

    Pools are followed by BatchNorm. A stride-1 skip is followed by dropout if ``dropout`` is given.

    Args:
        C: Channels of input and output.
        stride: 1 or 2.
        switch: Which of the 8 primitives are alive.
        dropout: The network's skip dropout, or None for none.
        stream: Random stream of this edge's dropout.
    """

    def __init__(
        self,
        C: int,
        stride: int,
        switch: Sequence[bool] | np.ndarray,
        dropout: DropoutControl | None = None,
        stream: int = 0,
    ) -> None:
        super().__init__()
        self.m_ops = nn.ModuleList()
        for primitive, alive in zip(PRIMITIVES, switch, strict=True):
            if not alive:
                continue
            op = OPS[primitive](C, stride, False)
            if "pool" in primitive:
                op = nn.Sequential(op, batch_norm(C, affine=False))
            if isinstance(op, Identity) and dropout is not None:
                op = nn.Sequential(op, SkipDropout(dropout, stream))
            self.m_ops.append(op)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """``x`` is ``[N, C, H, W]``, ``weights`` ``[k]``."""
        return reduce(add, [weight * op(x) for weight, op in zip(weights, self.m_ops, strict=True)])


class Cell(nn.Module):
    """Two inputs, ``steps`` nodes that sum their edges, and the concatenation of the last nodes.

    Args:
        C_prev_prev: Channels of the first input.
        C_prev: Channels of the second input.
        C: Channels of every node.
        switches: Live primitives of every edge, bool ``[edges, 8]``.
        reduction: Whether edges from the two inputs have stride 2.
        reduction_prev: Whether the cell before is a reduction, so that the first input is larger.
        steps: Number of nodes.
        multiplier: How many of the last nodes form the output.
        index: Place in the network; tells its random streams apart.
        dropout: The network's skip dropout, or None for none.

    Attributes:
        backend: Name of what runs the cell; set by the network.
        edges: ``(node, source, stride)`` of every edge; sources 0 and 1 are the inputs and source
            ``2 + i`` is node ``i``.
    """

    def __init__(
        self,
        C_prev_prev: int,
        C_prev: int,
        C: int,
        switches: np.ndarray,
        *,
        reduction: bool,
        reduction_prev: bool,
        steps: int = 4,
        multiplier: int = 4,
        index: int = 0,
        dropout: DropoutControl | None = None,
    ) -> None:
        super().__init__()
        self.C = C
        self.steps = steps
        self.multiplier = multiplier
        self.reduction = reduction
        self.index = index
        self.switches = switches
        self.backend = backends.REFERENCE
        self._run: Callable[[Cell, Tensor, Tensor, Tensor], Tensor] = Cell.forward_op_by_op
        if reduction_prev:
            self.preprocess0: nn.Module = FactorizedReduce(C_prev_prev, C, affine=False)
        else:
            self.preprocess0 = ReLUConvBN(C_prev_prev, C, 1, 1, 0, affine=False)
        self.preprocess1 = ReLUConvBN(C_prev, C, 1, 1, 0, affine=False)
        self.edges = [
            (node, source, 2 if reduction and source < NUM_INPUTS else 1)
            for node, source in search_space.edges(steps)
        ]
        self.cell_ops = nn.ModuleList(
            MixedOp(C, stride, switches[edge], dropout, index * STREAMS_PER_CELL + edge)
            for edge, (_, _, stride) in enumerate(self.edges)
        )

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        """Runs the cell on its backend.

        Args:
            s0: Output of the cell before the last, ``[N, C_prev_prev, ...]``.
            s1: Output of the last cell, ``[N, C_prev, H, W]``.
            weights: Weight of every live primitive of every edge, ``[edges, k]``.

        Returns:
            ``[N, multiplier * C, H, W]``, or half of each side for a reduction.
        """
        return self._run(self, s0, s1, weights)

    def use_backend(self, name: str) -> None:
        """Lets a backend of ``kernels.backends.NAMES``, which must be usable, run the cell."""
        self.backend = name
        if name == backends.REFERENCE:
            self._run = Cell.forward_op_by_op
            return
        module = backends.load(name)
        module.prepare_cell(self)
        self._run = module.run_cell

    def forward_op_by_op(self, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        """The published graph: every operation of every edge on its own; as ``forward``."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for node in range(self.steps):
            edges = search_space.node_edges(node)
            terms = [
                self.cell_ops[edge](source, weights[edge])
                for edge, source in zip(edges, states, strict=True)
            ]
            states.append(reduce(add, terms))
        return torch.cat(states[-self.multiplier :], dim=1)

    def extra_repr(self) -> str:
        kind = "reduction" if self.reduction else "normal"
        return f"{kind}, index={self.index}, C={self.C}, backend={self.backend}"


class Network(nn.Module):
    """The supernet of one search stage.

    Stem (3×3 convolution, BN), ``layers`` cells of which those at ``layers // 3`` and
    ``2 * layers // 3`` are reductions and double the channels, global average pool, linear.

    Args:
        C: Channels of the first cell's nodes.
        num_classes: Size of the output.
        layers: Number of cells, at least 3.
        criterion: Loss of ``(logits, target)``.
        steps: Nodes in a cell.
        multiplier: How many of a cell's last nodes form its output.
        stem_multiplier: The stem gives ``stem_multiplier * C`` channels.
        switches_normal: Live primitives of normal cells, bool ``[edges, 8]``; empty for all.
        switches_reduce: Live primitives of reduction cells, likewise.
        p: Skip dropout rate to begin with, 0 <= p < 1. At 0 the network has no skip dropout.
        backend: What runs the cells: a name of ``kernels.backends.NAMES`` or ``auto``.

    Attributes:
        alphas_normal: Architecture parameters of normal cells, float32 ``[edges, k]``, drawn as
            1e-3·N(0,1) from numpy's global random state after all weights.
        alphas_reduce: Those of reduction cells, drawn next.
        mixing: ``mixing(cell type, alphas [edges, k]) -> weights [edges, k]``, how alphas become
            weights of operations; None for a softmax. What it reads may change in place only.
        p: Skip dropout rate; takes effect with ``update_p``.

    Raises:
        ValueError: An argument is out of its range or a switch table is not valid.
        UsageError: The backend does not exist or is not usable.
    """

    def __init__(
        self,
        C: int,
        num_classes: int,
        layers: int,
        criterion: Callable[[Tensor, Tensor], Tensor],
        steps: int = 4,
        multiplier: int = 4,
        stem_multiplier: int = 3,
        switches_normal: SwitchTable = (),
        switches_reduce: SwitchTable = (),
        p: float = 0.0,
        *,
        backend: str = backends.AUTO,
    ) -> None:
        super().__init__()
        _check_sizes(C, num_classes, layers, steps, multiplier, stem_multiplier)
        _check_rate(p)
        backends.check(backend)
        self._C = C
        self._num_classes = num_classes
        self._layers = layers
        self._criterion = criterion
        self._steps = steps
        self._multiplier = multiplier
        tables, self._num_ops = _read_switches(switches_normal, switches_reduce, steps)
        self.switches_normal = tables["normal"]
        self.switches_reduce = tables["reduce"]
        self.p = float(p)
        self._has_skip_dropout = self.p > 0
        self.skip_dropout = DropoutControl(self.p, torch.initial_seed())
        self.mixing: Callable[[str, Tensor], Tensor] | None = None
        self._requested_backend = backend
        self._backend_of_device: dict[str, str] = {}

        stem_channels = stem_multiplier * C
        self.stem = Stem(stem_channels)
        self.cells = nn.ModuleList()
        out_channels = self._append_cells(stem_channels)
        self.global_pooling = GlobalPool()
        self.classifier = nn.Linear(out_channels, num_classes)
        self.alphas_normal = self._initial_alphas()
        self.alphas_reduce = self._initial_alphas()

    def _append_cells(self, stem_channels: int) -> int:
        """Builds the cells; returns the channels of the last one's output."""
        C_prev_prev, C_prev, C = stem_channels, stem_channels, self._C
        reduction_prev = False
        for index in range(self._layers):
            reduction = index in (self._layers // 3, 2 * self._layers // 3)
            if reduction:
                C *= 2
            cell = Cell(
                C_prev_prev,
                C_prev,
                C,
                self.switches_reduce if reduction else self.switches_normal,
                reduction=reduction,
                reduction_prev=reduction_prev,
                steps=self._steps,
                multiplier=self._multiplier,
                index=index,
                dropout=self.skip_dropout if self._has_skip_dropout else None,
            )
            self.cells.append(cell)
            reduction_prev = reduction
            C_prev_prev, C_prev = C_prev, self._multiplier * C
        return C_prev

    def _initial_alphas(self) -> nn.Parameter:
        values = ALPHA_SCALE * np.random.randn(len(self.switches_normal), self._num_ops)
        return nn.Parameter(torch.tensor(values, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of images ``[N, 3, H, W]``: logits ``[N, num_classes]``."""
        backend = self._use_backend_of(x.device.type)
        if self.training and self._has_skip_dropout:
            self.skip_dropout.advance()
        weights_normal = self._edge_weights(self.alphas_normal, "normal")
        weights_reduce = self._edge_weights(self.alphas_reduce, "reduce")
        s = self.stem(x)
        out = chain.run(backend, Cell, self.cells, s, weights_normal, weights_reduce)
        if out is None:
            s0, out = s, s
            for cell in self.cells:
                s0, out = out, cell(s0, out, weights_reduce if cell.reduction else weights_normal)
        return self.classifier(self.global_pooling(out).flatten(1))

    def _edge_weights(self, alphas: Tensor, kind: str = "normal") -> Tensor:
        """Softmax over an edge's primitives; over the edges if each has only one."""
        if self.mixing is not None:
            return self.mixing(kind, alphas)
        return F.softmax(alphas, dim=-1 if self._num_ops > 1 else 0)

    def _loss(self, input: Tensor, target: Tensor) -> Tensor:
        return self._criterion(self(input), target)

    def arch_parameters(self) -> list[nn.Parameter]:
        """The two architecture parameters: normal, reduction."""
        return [self.alphas_normal, self.alphas_reduce]

    def weight_parameters(self) -> list[nn.Parameter]:
        """Every parameter but the two of the architecture, in the order of ``parameters()``."""
        alphas = {id(parameter) for parameter in self.arch_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in alphas]

    def update_p(self) -> None:
        """Pushes attribute ``p`` down to the dropouts.

        Raises:
            ValueError: ``p`` is not in 0 <= p < 1, or is above 0 in a network built without skip
                dropout.
        """
        _check_rate(self.p)
        if self.p > 0 and not self._has_skip_dropout:
            raise ValueError(
                f"skip dropout p={self.p}: this network was built with p=0 and has no skip "
                "dropout; construct it with p above 0"
            )
        self.skip_dropout.set_rate(self.p)

    @property
    def dropout_state(self) -> Tensor:
        """Seed and step of the skip dropout, int64 ``[2]``; write to it in place."""
        return self.skip_dropout.state

    @property
    def has_skip_dropout(self) -> bool:
        """Whether the network was built with ``p`` above 0."""
        return self._has_skip_dropout

    @property
    def backend(self) -> str:
        """What runs the cells on the device that the parameters lie on."""
        return self._use_backend_of(self.classifier.weight.device.type)

    @torch.compiler.assume_constant_result
    def _use_backend_of(self, device_type: str) -> str:
        """Resolves the backend once a device type, so ``.cuda()`` after building may change it.

        While a graph is traced this runs outside of it.
        """
        if device_type not in self._backend_of_device:
            widest = max(cast(Cell, cell).C for cell in self.cells)
            chosen = backends.resolve(self._requested_backend, device_type, widest)
            self._backend_of_device[device_type] = chosen
        chosen = self._backend_of_device[device_type]
        for cell in self.cells:
            if cast(Cell, cell).backend != chosen:
                cast(Cell, cell).use_backend(chosen)
        self.stem.backend = self.global_pooling.backend = chosen
        return chosen

    def extra_repr(self) -> str:
        return (
            f"C={self._C}, layers={self._layers}, ops={self._num_ops}, p={self.p}, "
            f"backend={self._requested_backend}"
        )


def _check_sizes(
    C: int, num_classes: int, layers: int, steps: int, multiplier: int, stem_multiplier: int
) -> None:
    sizes = {"C": C, "num_classes": num_classes, "steps": steps, "stem_multiplier": stem_multiplier}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if layers < 3:
        raise ValueError(f"layers must be at least 3 (two are reductions), got {layers}")
    if not 1 <= multiplier <= steps:
        raise ValueError(f"multiplier must be 1 to steps={steps}, got {multiplier}")
    edges = len(search_space.edges(steps))
    if edges > STREAMS_PER_CELL:
        raise ValueError(f"steps={steps} gives {edges} edges a cell; at most {STREAMS_PER_CELL}")


def _check_rate(p: float) -> None:
    if not 0 <= p < 1:
        raise ValueError(f"skip dropout p must be in 0 <= p < 1, got {p}")


def _read_switches(normal: SwitchTable, reduce: SwitchTable, steps: int) -> tuple[Switches, int]:
    """Checked copies of both tables, all alive where one is empty, and the live ops an edge."""
    everything = search_space.all_switches(steps)
    given = {"normal": normal, "reduce": reduce}
    tables, live = search_space.check_switches(
        {name: table if len(table) else everything[name] for name, table in given.items()}
    )
    got, wanted = len(tables["normal"]), len(everything["normal"])
    if got != wanted:
        raise ValueError(
            f"switches_normal and switches_reduce have {got} edges, steps={steps} has {wanted}"
        )
    return tables, live
