"""Checks every kernel against the reference on the device at hand, once per device and version.

The gate and the interpreter prove the kernels without a GPU; what remains is this driver on this
card. A few seconds at the first use of backend ``triton``; ``pdarts-fast doctor --kernels`` runs
it on demand.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from pdarts_fast.errors import RunError
from pdarts_fast.version import __version__

from .. import calls, cell_operator, plan
from ..calls import Call
from ..interface import Arrays, Backend
from ..reference import Reference
from ..weights import Layout, Weights, layout
from .common import STORAGE
from .primitives import TritonPrimitives

logger = logging.getLogger(__name__)

CHANNELS, BATCH, SIZE = 16, 2, 8
# Largest difference relative to the largest value. float32 sums a few hundred products; bfloat16
# keeps 8 bits and rounds twice on the way to a result.
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 3e-2}

Outputs = dict[str, Tensor]
_checked: set[str] = set()


@dataclass(frozen=True)
class Finding:
    """How far one array of one primitive is from the reference.

    Attributes:
        primitive, storage, array: Which.
        error: Largest difference relative to the largest value; infinite for a kernel that fails.
        tolerance: What is allowed.
        failure: What was raised, else empty.
    """

    primitive: str
    storage: str
    array: str
    error: float
    tolerance: float
    failure: str = ""

    @property
    def is_good(self) -> bool:
        """Whether the error is a number within the tolerance."""
        return self.error <= self.tolerance


class Sample:
    """Random arrays of a cell with every primitive on every edge, float64 on the processor."""

    def __init__(self, reduction: bool, storage: torch.dtype) -> None:
        key = plan.make_key(
            [[True] * 8] * 14,
            channels=CHANNELS,
            in_channels=(32, 64),
            reduction=reduction,
            reduction_prev=True,
            steps=4,
            multiplier=4,
            index=2,
            dropout=True,
        )
        self.plan = plan.from_key(key)
        self.calls = calls.of(key)
        self.layout: Layout = layout(key, CHANNELS, self.plan.in_channels)
        self.storage = storage
        self._generator = torch.Generator().manual_seed(20190430)
        size = SIZE // 2 if reduction else SIZE
        self.larger = (BATCH, SIZE, SIZE, CHANNELS)
        self.smaller = (BATCH, size, size, CHANNELS)
        self.flat = (self.random(self.layout.total) * 0.3).to(storage).double()
        self.states = [self.random(*(self.larger if i < 2 else self.smaller)) for i in range(6)]
        self.grads = [self.random(*self.smaller) for _ in range(4)]
        self.half_grads = self.random(self.calls.num_halves, *self.smaller)
        self.y = self.random(self.plan.num_slots, *self.smaller)
        # The backward pass of a maximum compares x with y: y must be what it would be in a cell.
        arrays = self.arrays(torch.device("cpu"), torch.float64)
        for source, call in enumerate(self.calls.leave):
            Reference().fan_out(call, arrays, arrays.states[source], _sums(call, self.flat))
        self.y = arrays.y.to(storage).double()

    def random(self, *shape: int) -> Tensor:
        """float64 noise that the storage dtype holds exactly."""
        noise = torch.randn(shape, generator=self._generator)
        return noise.to(self.storage).double()

    def arrays(self, device: torch.device, dtype: torch.dtype) -> Arrays:
        """Copies on a device in a storage dtype."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weights = Weights(self.layout, self.flat.to(device, wide), wide, want_gradients=True)

        def put(x: Tensor) -> Tensor:
            return x.to(device, dtype, copy=True)

        return Arrays(
            y=put(self.y),
            states=[put(state) for state in self.states],
            weights=weights,
            rate=torch.tensor([0.25], device=device),
            state=torch.tensor([3, 4], device=device),
            channels=CHANNELS,
            training=True,
            grads=[put(grad) for grad in self.grads],
            half_grads=put(self.half_grads),
        )


def _sums(call: Call, like: Tensor) -> Tensor:
    return like.new_zeros(len(call.items), 2, CHANNELS, dtype=torch.float64)


def _coefficients(like: Tensor, *shape: int) -> Tensor:
    """The same numbers for both backends, in the dtype of their coefficients."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return noise.to(like.device, like.dtype)


def _grad(arrays: Arrays) -> Tensor:
    assert arrays.weights.grad is not None
    return arrays.weights.grad


def _fan_out(s: Sample, backend: Backend, arrays: Arrays) -> Outputs:
    call = s.calls.leave[0]
    sums = _sums(call, arrays.weights.flat)
    backend.fan_out(call, arrays, arrays.states[0], sums)
    return {"y": arrays.y[call.places(arrays.y.device).slots], "sums": sums}


def _mid(s: Sample, backend: Backend, arrays: Arrays) -> Outputs:
    call, flat = s.calls.second[1], arrays.weights.flat
    sums = _sums(call, flat)
    scale, shift = (_coefficients(flat, len(call.items), CHANNELS) for _ in range(2))
    backend.mid(call, arrays, scale, shift, sums)
    return {"y": arrays.y[call.places(arrays.y.device).slots], "sums": sums}


def _preprocess(which: int) -> Callable[[Sample, Backend, Arrays], Outputs]:
    """Preprocessing of an input, forward and backward; input 0 is factorized."""

    def run(s: Sample, backend: Backend, arrays: Arrays) -> Outputs:
        call, flat, dtype = s.calls.inputs[which], arrays.weights.flat, arrays.y.dtype
        depth, side = s.plan.in_channels[which], SIZE // (2 if which == 0 else 1)
        x = _coefficients(flat, BATCH, SIZE, SIZE, depth).to(s.storage).to(dtype)
        arrays.y = torch.zeros(1, BATCH, side, side, CHANNELS, dtype=dtype, device=x.device)
        arrays.grads = [_coefficients(flat, BATCH, side, side, CHANNELS).to(s.storage).to(dtype)]
        sums, coef = _sums(call, flat), _coefficients(flat, 1, 3, CHANNELS)
        backend.fan_out(call, arrays, x, sums)
        backend.affine_(arrays.y[0], coef[0, 0], coef[0, 1])
        out = torch.zeros_like(x)
        backend.fan_in(call, arrays, x, coef, None, out)
        return {"y": arrays.y, "sums": sums, "dx": out, "dw": _grad(arrays)}

    return run


def _mix(s: Sample, backend: Backend, arrays: Arrays) -> Outputs:
    call, flat = s.calls.both[3], arrays.weights.flat
    out = torch.zeros_like(arrays.states[2])
    scale, shift = _coefficients(flat, len(call.items), CHANNELS), _coefficients(flat, CHANNELS)
    backend.mix(call, arrays, scale, shift, out)
    return {"node": out}


def _reduce(s: Sample, backend: Backend, arrays: Arrays) -> Outputs:
    call, flat = s.calls.both[2], arrays.weights.flat
    scale, shift = (_coefficients(flat, len(call.items), CHANNELS) for _ in range(2))
    sums = flat.new_zeros(1 + len(call.items), CHANNELS, dtype=torch.float64)
    backend.reduce(call, arrays, arrays.grads[2], scale, shift, sums)
    return {"sums": sums}


def _mid_backward(s: Sample, backend: Backend, arrays: Arrays) -> Outputs:
    call, flat = s.calls.enter_second[3][1], arrays.weights.flat
    scale, shift = (_coefficients(flat, len(call.items), CHANNELS) for _ in range(2))
    coef, sums = _coefficients(flat, len(call.items), 3, CHANNELS), _sums(call, flat)
    backend.mid_backward(call, arrays, scale, shift, coef, sums)
    assert arrays.half_grads is not None
    return {"dv": arrays.half_grads, "sums": sums, "dw": _grad(arrays)}


def _fan_in(source: int) -> Callable[[Sample, Backend, Arrays], Outputs]:
    def run(s: Sample, backend: Backend, arrays: Arrays) -> Outputs:
        call, x = s.calls.gather[source], arrays.states[source]
        coef, out = _coefficients(arrays.weights.flat, len(call.items), 3, CHANNELS), x.clone()
        backend.fan_in(call, arrays, x, coef, arrays.states[source], out)
        return {"dx": out, "dw": _grad(arrays)}

    return run


CHECKS: dict[str, Callable[[Sample, Backend, Arrays], Outputs]] = {
    "fan_out": _fan_out,
    "factorized preprocessing": _preprocess(0),
    "pointwise preprocessing": _preprocess(1),
    "mid": _mid,
    "mix": _mix,
    "reduce": _reduce,
    "mid_backward": _mid_backward,
    "fan_in of an input": _fan_in(0),
    "fan_in of a node": _fan_in(2),
}


def _whole_pass(s: Sample, backend: str, device: torch.device, dtype: torch.dtype) -> Outputs:
    """Both passes of a cell by the operators that a search calls, training and all gradients."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sizes = [rows * columns for rows, columns in s.layout.shapes]
    weights = [part.to(device, wide) for part in s.flat.split(sizes)]
    images = [
        _coefficients(s.flat, BATCH, SIZE, SIZE, depth).permute(0, 3, 1, 2).to(device, dtype)
        for depth in s.plan.in_channels
    ]
    images[1] = images[1][..., : SIZE // 2, : SIZE // 2]
    alphas = _coefficients(s.flat, 14, s.plan.num_ops).to(device, wide)
    rate = torch.tensor([0.25], device=device)
    state = torch.tensor([3, 4], device=device)
    rest = (s.plan.key, backend, True)
    outputs = cell_operator.forward_pass(
        images[0], images[1], alphas, weights, [], rate, state, *rest, dtype
    )
    grad = _coefficients(s.flat, *outputs[0].shape).to(device, dtype)
    found = cell_operator.backward_pass(
        grad, images[0], images[1], alphas, weights, list(outputs), state, *rest, [True] * 4
    )
    running = [torch.zeros(CHANNELS, device=device) for _ in range(2 * len(s.plan.norms))]
    batches = [torch.zeros((), dtype=torch.int64, device=device) for _ in s.plan.norms]
    counts = [outputs[0][:, 0].numel(), images[1][:, 0].numel()]
    cell_operator.move_running(running, batches, outputs[8], s.plan.key, counts, backend)
    names = ("s0", "s1", "alphas", "weights")
    return {
        "out": outputs[0], **dict(zip(names, found, strict=True)),
        "running": torch.stack(running), "batches": torch.stack(batches),
    }  # fmt: skip


def _check_passes(device: torch.device) -> list[Finding]:
    found = []
    for reduction in (False, True):
        sample = Sample(reduction, torch.float32)
        want = _whole_pass(sample, "reference", torch.device("cpu"), torch.float64)
        label = f"whole pass{' of a reduction cell' if reduction else ''}"
        found += _compared(
            label, "fp32", TOLERANCE[torch.float32], want,
            partial(_whole_pass, sample, "triton", device, torch.float32),
        )  # fmt: skip
    return found


def check(device: torch.device, backend: Backend | None = None) -> list[Finding]:
    """Runs every primitive in float32 and bfloat16, of a normal and a reduction cell.

    Whole passes, in float32, follow if the primitives are the Triton ones.

    Args:
        device: Where; needs CUDA unless the kernels are interpreted.
        backend: Primitives to check; None for the Triton ones.

    Returns:
        One finding an array.
    """
    found: list[Finding] = []
    for storage in TOLERANCE:
        for reduction in (False, True):
            sample = Sample(reduction, storage)
            for name, run in CHECKS.items():
                # Skips of a reduction cell have no batch of the inputs' size.
                if not (reduction and name == "reduce"):
                    found += _compare(sample, name, run, device, backend or TritonPrimitives())
    return found + (_check_passes(device) if backend is None else [])


def _compare(
    sample: Sample, name: str, run: Any, device: torch.device, backend: Backend
) -> list[Finding]:
    tolerance, storage = TOLERANCE[sample.storage], STORAGE[sample.storage]
    label = f"{name}{' of a reduction cell' if sample.plan.reduction else ''}"
    want = run(sample, Reference(), sample.arrays(torch.device("cpu"), torch.float64))
    return _compared(
        label, storage, tolerance, want,
        lambda: run(sample, backend, sample.arrays(device, sample.storage)),
    )  # fmt: skip


def _compared(
    label: str, storage: str, tolerance: float, want: Outputs, run: Callable[[], Outputs]
) -> list[Finding]:
    """Findings of what ``run`` returns."""
    try:
        outputs = run()
        got = {array: value.cpu().double() for array, value in outputs.items()}
    # A driver or compiler may raise anything; what it raised belongs in the report.
    except Exception as error:
        failure = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return [Finding(label, storage, "none", float("inf"), tolerance, failure)]
    found = []
    for array, value in want.items():
        scale = value.abs().max().clamp_min(1e-3)
        off = ((got[array] - value).abs().max() / scale).item()
        found.append(Finding(label, storage, array, off, tolerance))
    return found


def _folder() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "pdarts-fast" / "checked-kernels"


def _key(device: torch.device) -> str:
    """Names this device, these versions and these sources."""
    properties = torch.cuda.get_device_properties(device)
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    versions = (__version__, torch.__version__, torch.version.cuda, triton.__version__)
    card = (properties.name, properties.major, properties.minor)
    digest.update(repr((versions, card)).encode())
    return digest.hexdigest()[:32]


def report(findings: list[Finding], device: torch.device) -> str:
    """Everything that a report to file needs, bad findings first."""
    properties = torch.cuda.get_device_properties(device)
    versions = f"pdarts-fast {__version__}, torch {torch.__version__}, triton {triton.__version__}"
    lines = [f"{properties.name} sm_{properties.major}{properties.minor}, {versions}"]
    ordered = sorted(findings, key=lambda finding: finding.is_good)
    return "\n".join([*lines, *(json.dumps(asdict(finding)) for finding in ordered)]) + "\n"


def require(device: torch.device) -> None:
    """Checks the kernels unless they have been found right on such a device; quick then.

    Raises:
        RunError: A kernel is wrong; names the report and ``--backend reference``.
    """
    if device.type != "cuda":
        return
    key = _key(device)
    passed = _folder() / f"{key}.passed"
    if key in _checked or passed.is_file():
        _checked.add(key)
        return
    name = torch.cuda.get_device_name(device)
    logger.info("backend triton checks its kernels on %s, once", name)
    findings = check(device)
    bad = [finding for finding in findings if not finding.is_good]
    passed.parent.mkdir(parents=True, exist_ok=True)
    if bad:
        path = passed.with_suffix(".failed.txt")
        path.write_text(report(findings, device))
        raise RunError(
            f"{len(bad)} of {len(findings)} checks of the Triton kernels fail on {name}, first "
            f"{bad[0].primitive} ({bad[0].storage}): {bad[0].failure or f'{bad[0].error:.1e} off'}"
            f"; use --backend reference, and please file the report {path}"
        )
    passed.touch()
    _checked.add(key)
