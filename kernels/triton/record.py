"""What a pass of a cell would launch, without launching anything: on tensors of device ``meta``.

The gate and the time model take shapes, grids and launch counts from here, so from the launchers
themselves and the call tables of real plans, never from a copy of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.runtime.jit import JITFunction

from .. import calls
from .. import plan as plans
from ..calls import Call
from ..cell_backward import Backward
from ..cell_forward import Forward
from ..cell_pass import Saved, state_size
from ..interface import Arrays
from ..plan import Plan
from ..weights import Weights, layout
from .common import STORAGE, gated_storages
from .registry import Specialisation
from .traffic import traffic

_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
# Operators that launch nothing: they make a view or only reserve memory.
_FREE = (
    "empty", "new_empty", "empty_like", "view", "_unsafe_view", "select", "slice", "split",
    "split_with_sizes", "unbind", "expand", "permute", "transpose", "t", "detach", "as_strided",
    "alias", "unsqueeze", "squeeze", "chunk", "_reshape_alias", "empty_strided", "lift_fresh",
    "new_empty_strided",
)  # fmt: skip
PRIMITIVES = ("fan_out", "mid", "affine_", "mix", "reduce", "mid_backward", "fan_in")


@dataclass(frozen=True)
class Launch:
    """A kernel that a pass would launch.

    Attributes:
        function: What ``triton.jit`` made.
        grid: Programs.
        values: Every argument by name: tensors, numbers, constants.
        options: ``num_warps``, ``maxnreg``.
        primitive, call: Which primitive launched it, for what.
        size: N, H, W, C of the arrays of the call's outputs.
    """

    function: Any = field(repr=False)
    grid: tuple[int, ...]
    values: dict[str, Any] = field(repr=False)
    options: dict[str, Any]
    primitive: str
    call: Call | None = field(repr=False)
    size: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        """Of the kernel, without underscores around it."""
        return str(self.function.__name__).strip("_").removesuffix("_kernel")

    @property
    def programs(self) -> int:
        """Of the whole grid."""
        total = 1
        for extent in self.grid:
            total *= extent
        return total

    @property
    def storage(self) -> str:
        """That of the widest-spread array: the first half-precision argument, or ``fp32``."""
        dtypes = {v.dtype for v in self.values.values() if isinstance(v, Tensor)}
        half = [STORAGE[d] for d in (torch.bfloat16, torch.float16) if d in dtypes]
        return half[0] if half else "fp32"

    def _note(self, constants: dict[str, Any]) -> str:
        marks = {"SECOND": "second halves", "INCOMING": "incoming", "FACTORIZED": "factorized"}
        found = [text for name, text in marks.items() if constants.get(name)]
        if constants.get("STRIDE") == 2:
            found.insert(0, "stride 2")
        if constants.get("CX", constants.get("C")) != constants.get("C"):
            found.append(f"from {constants['CX']}")
        return " ".join(found)

    def specialisation(self, **extra: Any) -> Specialisation:
        """The compiled variant that the launch would run."""
        signature, constants, divisible = {}, {}, []
        for parameter in self.function.params:
            value = self.values[parameter.name]
            if parameter.is_constexpr:
                constants[parameter.name] = value
            elif isinstance(value, Tensor):
                signature[parameter.name] = _POINTERS[value.dtype]
            else:
                signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
                if value % 16 == 0 and not parameter.do_not_specialize:
                    divisible.append(parameter.name)
        return Specialisation(
            shape=self.size,
            storage=self.storage,
            signature=signature,
            constants=constants,
            divisible=tuple(divisible),
            num_warps=self.options.get("num_warps", 4),
            num_stages=self.options.get("num_stages", 1),
            max_registers=self.options.get("maxnreg"),
            programs=self.programs,
            note=self._note(constants),
            **extra,
        )


def _is_mixed(args: Any) -> bool:
    devices = {x.device.type for x in tree_leaves(args) if isinstance(x, Tensor)}
    return len(devices) > 1


class Recorder(TorchDispatchMode):
    """Collects launches and the names of torch operators that would launch something.

    Attributes:
        launches: In order.
        operators: Names, in order; what the coefficient algebra of a pass costs in launches.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.operators: list[str] = []
        self.place: tuple[str, Call | None, tuple[int, int, int, int]] = ("", None, (0, 0, 0, 0))

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        # Index tables of a call lie on the processor; a pass on a GPU needs them there, once.
        moved = tree_map_only(Tensor, lambda x: x.to("meta"), args) if _is_mixed(args) else args
        found = function(*moved, **(kwargs or {}))
        first = found[0] if isinstance(found, (tuple, list)) and found else found
        if name not in _FREE and isinstance(first, Tensor) and first.device.type == "meta":
            self.operators.append(name)
        return found

    def launcher(self, function: Any, grid: tuple[int, ...]) -> Any:
        """Stands in for ``function[grid]``."""

        def launch(*args: Any, **kwargs: Any) -> None:
            names = function.arg_names
            options = {k: v for k, v in kwargs.items() if k not in names}
            values = dict(zip(names, args, strict=False))
            values.update((k, v) for k, v in kwargs.items() if k in names)
            self.launches.append(Launch(function, grid, values, options, *self.place))

        return launch


@contextmanager
def recording() -> Iterator[Recorder]:
    """Within it, kernels of this process are recorded instead of launched."""
    recorder = Recorder()
    before = JITFunction.__getitem__
    JITFunction.__getitem__ = lambda function, grid: recorder.launcher(function, grid)
    try:
        with recorder:
            yield recorder
    finally:
        JITFunction.__getitem__ = before


class _Watched:
    """The primitives, telling a recorder which one runs."""

    def __init__(self, backend: Any, recorder: Recorder) -> None:
        self._backend, self._recorder = backend, recorder

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._backend, name)
        if name not in PRIMITIVES:
            return method

        def run(first: Any, *rest: Any) -> None:
            call = first if isinstance(first, Call) else None
            shape = rest[0].y.shape[1:] if call is not None else first.shape
            self._recorder.place = (name, call, tuple(shape))
            method(first, *rest)
            self._recorder.place = ("", None, (0, 0, 0, 0))

        return run


@dataclass(frozen=True)
class Recorded:
    """A forward and a backward pass of a cell.

    Attributes:
        forward, backward: Launches of Triton kernels.
        forward_operators, backward_operators: Names of torch operators between them.
    """

    forward: tuple[Launch, ...]
    backward: tuple[Launch, ...]
    forward_operators: tuple[str, ...]
    backward_operators: tuple[str, ...]


def _meta_pass(
    plan: Plan, backend: Any, batch: int, size: tuple[int, int], dtype: torch.dtype, wanted: bool
) -> tuple[Saved, Arrays, Tensor]:
    """Arrays of a pass on device ``meta``; ``size``: of input 1."""
    channels = backend.channels(plan.channels)
    depths = [backend.channels(count) for count in plan.in_channels]
    sizes = [tuple(extent * (1 + plan.reduction_prev) for extent in size), size]

    def meta(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    inputs = [meta(batch, *s, d) for s, d in zip(sizes, depths, strict=True)]
    states = [meta(batch, *state_size(plan, i, *s), channels) for i, s in enumerate(sizes)]
    out = [-(-extent // (2 if plan.reduction else 1)) for extent in size]
    saved = Saved(
        inputs=(inputs[0], inputs[1]),
        states=(states[0], states[1]),
        nodes=meta(batch, *out, plan.steps * channels),
        slots=meta(plan.num_slots, batch, *out, channels),
        norms=meta(plan.num_slots + 2, 2, channels, of=torch.float64),
    )
    where = layout(plan.key, channels, (depths[0], depths[1]))
    parameters = [meta(rows * columns, of=torch.float32) for rows, columns in where.shapes]
    arrays = Arrays(
        y=saved.slots,
        states=saved.all_states(plan.steps),
        weights=Weights(where, parameters, torch.float32, wanted),
        rate=meta(1, of=torch.float32),
        state=meta(2, of=torch.int64),
        channels=plan.channels,
        training=True,
        grads=[],
    )
    return saved, arrays, meta(14, plan.num_ops, of=torch.float32)


@lru_cache(maxsize=256)
def record_cell(
    key: str,
    batch: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    want_weights: bool,
    want_inputs: bool,
) -> Recorded:
    """Both passes of the cell ``key`` in training.

    Args:
        size: Height and width of input 1.
        want_weights: A weight step; else an alpha step.
        want_inputs: Not the case in an alpha step's first cells, which only see the stem.
    """
    from .primitives import TritonPrimitives

    plan = plans.from_key(key)
    found: list[Any] = []
    for is_forward in (True, False):
        with recording() as recorder:
            backend = _Watched(TritonPrimitives(), recorder)
            wanted = want_weights and not is_forward
            saved, arrays, alphas = _meta_pass(plan, backend, batch, size, dtype, wanted)
            if is_forward:
                Forward(backend, plan, saved, arrays, alphas).run(torch.empty_like(saved.norms))
            else:
                Backward(backend, plan, saved, arrays, alphas).run(
                    torch.empty_like(saved.nodes), (want_inputs, want_inputs), want_weights
                )
        found += [tuple(recorder.launches), tuple(recorder.operators)]
    return Recorded(found[0], found[2], found[1], found[3])


def search_cells(
    stage_channels: tuple[int, ...] = (16, 32, 64),
) -> list[tuple[str, tuple[int, int]]]:
    """Cells with every primitive on every edge at the sizes of a CIFAR-10 search: key, size.

    Of each width a normal cell, the same after a reduction, and a reduction cell; the stem's 48
    channels at the smallest.
    """
    found = []
    for level, channels in enumerate(stage_channels):
        side = 32 >> level
        for reduction, previous in ((False, False), (False, True), (True, False)):
            if (previous and level == 0) or (reduction and level == 0):
                continue
            before = 2 if reduction else 4
            depth = 48 if level == 0 else before * channels
            older = 2 * channels if previous else depth
            found.append(
                (
                    plans.make_key(
                        [[True] * 8] * 14,
                        channels=channels,
                        in_channels=(older, depth),
                        reduction=reduction,
                        reduction_prev=previous,
                        steps=4,
                        multiplier=4,
                        index=1,
                        dropout=True,
                    ),
                    (2 * side, 2 * side) if reduction else (side, side),
                )
            )
    return found


def _backward_launches(
    key: str, size: tuple[int, int], dtype: torch.dtype, wanted: bool
) -> list[Launch]:
    """Of every backward primitive of a cell, without the algebra between them."""
    from .primitives import TritonPrimitives

    plan, table = plans.from_key(key), calls.of(key)
    with recording() as recorder:
        backend: Any = _Watched(TritonPrimitives(), recorder)
        saved, arrays, _ = _meta_pass(plan, backend, 96, size, dtype, wanted)
        channels = saved.slots.shape[-1]
        arrays.grads = list(torch.empty_like(saved.nodes).chunk(plan.steps, dim=-1))
        arrays.half_grads = saved.slots.new_empty(table.num_halves, *saved.slots.shape[1:])

        def numbers(*shape: int) -> Tensor:
            return saved.norms.new_empty((*shape, channels), dtype=torch.float32)

        for node in range(plan.steps):
            count = len(table.both[node].items)
            sums = saved.norms.new_empty(1 + count, channels)
            grad = arrays.grads[node]
            backend.reduce(table.both[node], arrays, grad, numbers(count), numbers(count), sums)
            second = table.enter_second[3][node]
            count = len(second.items)
            sums = saved.norms.new_empty(count, 2, channels)
            given = (numbers(count), numbers(count), numbers(count, 3))
            backend.mid_backward(second, arrays, *given, sums)
        for source in range(plan.steps + 1):
            call, x = table.gather[source], arrays.states[source]
            for incoming in (None, x) if source > 1 else (None,):
                coef = numbers(len(call.items), 3)
                backend.fan_in(call, arrays, x, coef, incoming, torch.empty_like(x))
        for which in (0, 1):
            x, state = saved.inputs[which], saved.states[which]
            arrays.y, arrays.grads = state[None], [torch.empty_like(state)]
            sums = saved.norms.new_empty(2, channels)
            call = table.inputs[which]
            backend.reduce(call, arrays, state, numbers(1), numbers(1), sums)
            backend.fan_in(call, arrays, x, numbers(1, 3), None, torch.empty_like(x))
    return recorder.launches


@lru_cache(maxsize=1)
def _all_launches() -> tuple[Launch, ...]:
    launches: list[Launch] = []
    for key, size in search_cells():
        gated = gated_storages(plans.from_key(key).channels)
        for dtype in (dtype for dtype, name in STORAGE.items() if name in gated):
            for wanted in (True, False):
                launches += _backward_launches(key, size, dtype, wanted)
    return tuple(launches)


def search_specialisations(function: Any, **extra: Any) -> list[Specialisation]:
    """Every variant of a backward kernel that a CIFAR-10 search at batch 96 launches, once each.

    Args:
        extra: Attributes of ``Specialisation`` that hold for all.
    """
    found: dict[str, Specialisation] = {}
    for launch in _all_launches():
        if launch.function is function:
            one = launch.specialisation(**{"bytes": traffic(launch), **extra})
            found.setdefault(one.variant, one)
    return list(found.values())
