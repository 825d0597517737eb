"""Cells, inputs and comparisons that the kernel tests share."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pdarts_fast.kernels import calls, plan
from pdarts_fast.kernels import cell as fused
from pdarts_fast.kernels.calls import Call, CellCalls
from pdarts_fast.kernels.cpu import compile as compiler
from pdarts_fast.kernels.cpu import library
from pdarts_fast.kernels.cpu import load as cpu
from pdarts_fast.kernels.interface import Arrays
from pdarts_fast.kernels.reference import Reference
from pdarts_fast.kernels.weights import Weights, layout
from pdarts_fast.skip_dropout import DropoutControl
from pdarts_fast.supernet import Cell

Values = dict[str, Tensor]

# With TRITON_INTERPRET=1, set before triton is imported, the shared tests run over the Triton
# kernels instead: tests/triton_interpret starts such processes.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclass(frozen=True)
class Case:
    """A cell and the size of its input; ``live`` primitives of every edge are drawn by ``seed``."""

    channels: int = 8
    live: int = 8
    reduction: bool = False
    reduction_prev: bool = False
    batch: int = 2
    height: int = 6
    width: int = 6
    dropout: float = 0.0
    training: bool = True
    seed: int = 0

    def table(self) -> np.ndarray:
        """Switch table, bool ``[14, 8]``."""
        rng = np.random.default_rng(self.seed)
        table = np.zeros((14, 8), dtype=bool)
        for row in table:
            row[rng.choice(8, self.live, replace=False)] = True
        return table

    def cell(self) -> Cell:
        """A float64 cell with running statistics that are not those of a fresh one."""
        torch.manual_seed(self.seed)
        dropout = DropoutControl(self.dropout, self.seed) if self.dropout else None
        cell = Cell(
            2 * self.channels,
            4 * self.channels,
            self.channels,
            self.table(),
            reduction=self.reduction,
            reduction_prev=self.reduction_prev,
            index=3,
            dropout=dropout,
        )
        for name, buffer in cell.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
            if name.endswith("running_mean"):
                buffer.normal_()
        return cell.double().train(self.training)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """float64 s0, s1 and edge weights."""
        torch.manual_seed(self.seed + 1)
        larger = 2 if self.reduction_prev else 1
        shape = (self.height * larger, self.width * larger)
        s0 = torch.randn(self.batch, 2 * self.channels, *shape).double()
        s1 = torch.randn(self.batch, 4 * self.channels, self.height, self.width).double()
        return s0, s1, torch.rand(14, self.live).double()


class Bench:
    """The same random arrays for both sets of primitives.

    Attributes:
        calls: Of a cell with every primitive on every edge.
        out: Height and width of an output.
    """

    def __init__(self, channels: int, size: tuple[int, int, int], reduction: bool) -> None:
        batch, height, width = size
        self.key = plan.make_key(
            [[True] * 8] * 14,
            channels=channels,
            in_channels=(2 * channels, 4 * channels),
            reduction=reduction,
            reduction_prev=True,
            steps=4,
            multiplier=4,
            index=2,
            dropout=True,
        )
        self.plan = plan.from_key(self.key)
        self.calls: CellCalls = calls.of(self.key)
        self.channels = channels
        self.larger = (batch, height, width, channels)
        divisor = 2 if reduction else 1
        self.smaller = (batch, -(-height // divisor), -(-width // divisor), channels)
        torch.manual_seed(0)
        where = layout(self.key, channels, self.plan.in_channels)
        self.flat = torch.randn(where.total).double() * 0.3
        shape = self.smaller
        self.y = torch.randn(self.plan.num_slots, *shape).double()
        self.states = [torch.randn(*(self.larger if i < 2 else shape)).double() for i in range(6)]
        self.grads = [torch.randn(*shape).double() for _ in range(4)]
        self.half_grads = torch.randn(self.calls.num_halves, *shape).double()
        self.compute_outputs()

    def compute_outputs(self) -> None:
        """Makes y what it would be in a cell: a maximum's backward pass compares x with it."""
        arrays = self.arrays(torch.float64)
        for source, call in enumerate(self.calls.leave):
            sums = torch.zeros(len(call.items), 2, self.channels, dtype=torch.float64)
            Reference().fan_out(call, arrays, arrays.states[source], sums)
        self.y = arrays.y

    def random(self, *shape: int) -> Tensor:
        """float64 noise that depends on the shape alone."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).double()

    def arrays(self, dtype: torch.dtype, want_gradients: bool = True) -> Arrays:
        """Copies of the arrays in a storage dtype."""
        where = layout(self.key, self.channels, self.plan.in_channels)
        weights = Weights(where, self.flat, self.flat.dtype, want_gradients=False)
        weights.flat = self.flat.to(torch.float64 if dtype == torch.float64 else torch.float32)
        weights.grad = torch.zeros_like(weights.flat) if want_gradients else None
        return Arrays(
            y=self.y.to(dtype, copy=True),
            states=[state.to(dtype, copy=True) for state in self.states],
            weights=weights,
            rate=torch.tensor([0.25]),
            state=torch.tensor([3, 4]),
            channels=self.channels,
            training=True,
            grads=[grad.to(dtype) for grad in self.grads],
            half_grads=self.half_grads.to(dtype, copy=True),
        )

    @staticmethod
    def sums_like(call: Call, *shape: int) -> Tensor:
        """Zeros for what a primitive sums up for every item of a call."""
        return torch.zeros(len(call.items), *shape, dtype=torch.float64)


def run_cell(
    cell: Cell, inputs: tuple[Tensor, Tensor, Tensor], backend: str, dtype: torch.dtype
) -> Values:
    """Output, every gradient and every buffer after one forward and backward pass, in float64.

    Args:
        cell: Is left as it was.
        inputs: float64.
        backend: ``op-by-op``, or primitives that ``kernels.cell`` knows.
        dtype: In which the cell runs; bfloat16 means autocast of a float32 cell.
    """
    before = {name: buffer.clone() for name, buffer in cell.named_buffers()}
    amp = dtype == torch.bfloat16
    cell.to(torch.float32 if amp else dtype)
    s0, s1, weights = (
        x.to(torch.float32 if amp else dtype).clone().requires_grad_() for x in inputs
    )
    for parameter in cell.parameters():
        parameter.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        if backend == "op-by-op":
            out = cell.forward_op_by_op(s0, s1, weights)
        else:
            out = fused.run(backend, cell, s0, s1, weights)
    noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (out * noise.to(out.dtype)).sum().backward()
    found: dict[str, Tensor | None] = {
        "out": out.detach(),
        "s0": s0.grad,
        "s1": s1.grad,
        "weights": weights.grad,
        **{name: parameter.grad for name, parameter in cell.named_parameters()},
        **{name: buffer.clone() for name, buffer in cell.named_buffers()},
    }
    cell.double()
    for name, buffer in cell.named_buffers():
        buffer.copy_(before[name])
    return {name: value.double() for name, value in found.items() if value is not None}


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest wanted value, or to 1 where that is smaller.

    The loss sums pixels of unit variance, so 1 is small; a weight in front of a BatchNorm of a
    single channel has a gradient of nothing but eps and rounding.
    """
    return ((got - want).abs().max() / want.abs().max().clamp_min(1.0)).item()


def assert_close(got: Values, want: Values, tolerance: float) -> None:
    """All values by name, images one by one.

    A ReLU or arg-max at a tie may flip in another precision and change a patch of one image: the
    median image must agree, and at most a quarter of the images (and one) may differ.
    """
    assert got.keys() == want.keys()
    for name, value in want.items():
        if name in ("out", "s0", "s1"):
            by_image = [error(g, w) for g, w in zip(got[name], value, strict=True)]
            off = sum(one > tolerance for one in by_image)
            assert np.median(by_image) <= tolerance, f"{name}: images off by {by_image}"
            assert off <= 1 + len(by_image) // 4, f"{name}: images off by {by_image}"
        else:
            assert error(got[name], value) <= tolerance, f"{name}: {error(got[name], value):.1e}"


@pytest.fixture(params=["triton"] if INTERPRETED else ["reference", "cpu"])
def primitives(request: Any) -> str:
    """Name of a set of primitives; skips those that are not built."""
    return request.param if request.param == "reference" else request.getfixturevalue("kernels")


@pytest.fixture
def kernels(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of the kernels under test, ready to use: ``cpu``, or interpreted ``triton``."""
    if not INTERPRETED:
        return request.getfixturevalue("compiled")
    from pdarts_fast.kernels import backends
    from pdarts_fast.kernels.triton import load

    # Interpreted kernels run on the processor, where nobody but a test wants them.
    monkeypatch.setitem(backends._DEVICE_TYPE, "triton", "cpu")
    monkeypatch.setattr(load, "availability", lambda: backends.Availability(True, "interpreted"))
    load.register()
    return "triton"


@pytest.fixture
def compiled() -> str:
    """``cpu``, or a skip where the C++ kernels are not built."""
    found = cpu.availability()
    if not found.usable:
        pytest.skip(f"{found.reason} (or `python kernels/cpu/compile.py` in a checkout)")
    cpu.register()
    return "cpu"


@pytest.fixture(scope="session")
def amx_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library whose variant ``amx`` runs here: the installed one, or one that emulates AMX."""
    found = cpu.availability()
    if INTERPRETED or not found.usable:
        pytest.skip("needs the C++ kernels")
    installed = library.load()
    runs = {name for name, runs, _ in library.variants(installed.handle) if runs}
    if "amx" in runs:
        return installed.path
    if "avx512bf16" not in runs or compiler.find_compiler() is None:
        pytest.skip("needs a processor with AVX512-BF16, and a compiler that knows it")
    output = tmp_path_factory.mktemp("amx") / "emulated.so"
    return compiler.build(output, emulate_amx=True, only=("amx",), extra=("-O1",))


@pytest.fixture
def make_case() -> Callable[..., Case]:
    """Makes a ``Case``."""
    return Case


@pytest.fixture
def make_bench() -> Callable[..., Bench]:
    """Makes a ``Bench``."""
    return Bench


@pytest.fixture
def run() -> Callable[..., Values]:
    """``run_cell``."""
    return run_cell


@pytest.fixture
def close() -> Callable[[Values, Values, float], None]:
    """``assert_close``."""
    return assert_close


@pytest.fixture
def off() -> Callable[[Tensor, Tensor], float]:
    """``error``."""
    return error
