"""The list of Triton kernels that the static gate compiles and the time model predicts.

A kernel's file ends with one call::

    register(
        "fan_in",                           # name in tables
        _fan_in_kernel,                     # what @triton.jit made
        reference="Reference.fan_in",       # its specification
        maths="dx = ...",                   # one line for the table
        why="4 warps: ...",                 # reason of tile and num_warps
        specialisations=_specialisations,   # () -> list[Specialisation], called by the gate only
    )

and its module is named in ``MODULES``. A ``Specialisation`` is one compiled variant at one shape:
everything that ``triton.compile`` needs, and what a launch costs. Pointers are taken to be
divisible by 16 bytes; integer arguments only if named in ``divisible``. Variants that compile to
the same code (same signature, constants, divisibility, warps) are compiled once however many
shapes name them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# Every module that registers kernels, relative to this package.
MODULES = (
    "weights",
    "fan_out",
    "preprocess",
    "affine",
    "mix",
    "fold",
    "reduce",
    "sums",
    "coefficients",
    "output_gradient",
    "transposed",
    "fan_in",
    "pointwise_backward",
    "weight_gradient",
    "running",
)

# Stages of Triton's pipelines on a launch that names none.
DEFAULT_STAGES = 3


@dataclass(frozen=True)
class Specialisation:
    """One compiled variant at one shape.

    Attributes:
        shape: ``(N, H, W, C)`` of the output.
        storage: ``fp32``, ``tf32``, ``bf16`` or ``fp16``; ``tf32`` stores fp32.
        signature: Argument name -> ``*bf16``, ``*fp32``, ``*i64``, ``i32``, ``fp32``; constants
            are left out.
        constants: Every ``tl.constexpr`` argument.
        divisible: Integer arguments that are multiples of 16.
        num_warps, num_stages: As at the launch.
        programs: Of one launch.
        bytes: Read from and written to memory by one launch, each array once.
        stencil_flops: Of one launch outside of the tensor cores, a multiply-add counts two.
        product_flops: Of one launch in ``tl.dot``.
        trips: How often a program runs the body of its innermost loop, for the time model.
        max_registers: ``maxnreg`` at the launch, or None.
        product: Whether the kernel multiplies matrices: machine code must use tensor cores.
        gathers: Whether its loads cannot be 16 bytes wide; the kernel's docstring says why.
        targets: GPUs that this variant is for; empty for all.
        note: What tells this one from others of the same shape, e.g. ``stride 2``.
    """

    shape: tuple[int, int, int, int]
    storage: str
    signature: dict[str, str]
    constants: dict[str, Any]
    programs: int
    bytes: int
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = DEFAULT_STAGES
    stencil_flops: int = 0
    product_flops: int = 0
    trips: float = 1.0
    max_registers: int | None = None
    product: bool = False
    gathers: bool = False
    targets: tuple[str, ...] = ()
    note: str = ""

    @property
    def variant(self) -> str:
        """Text that two specialisations share if and only if they compile to the same code."""
        parts = (
            sorted(self.signature.items()),
            sorted((name, str(value)) for name, value in self.constants.items()),
            sorted(self.divisible),
            (self.num_warps, self.num_stages, self.max_registers),
        )
        return repr(parts)

    def is_for(self, target: str) -> bool:
        """Whether this variant runs on a GPU, e.g. ``sm_90``."""
        return not self.targets or target in self.targets

    @property
    def label(self) -> str:
        """One line, e.g. ``C=16 32x32 bf16 stride 2``."""
        _, height, width, channels = self.shape
        return f"C={channels} {height}x{width} {self.storage} {self.note}".strip()


@dataclass(frozen=True)
class Kernel:
    """A registered kernel; see ``register``."""

    name: str
    function: Any
    reference: str
    maths: str
    why: str
    specialisations: Callable[[], list[Specialisation]] = field(repr=False)


_KERNELS: dict[str, Kernel] = {}


def register(
    name: str,
    function: Any,
    *,
    reference: str,
    maths: str,
    why: str,
    specialisations: Callable[[], list[Specialisation]],
) -> None:
    """Makes a kernel known to the gate, the time model and the documentation.

    Raises:
        ValueError: The name is taken by another function.
    """
    taken = _KERNELS.get(name)
    if taken is not None and taken.function is not function:
        raise ValueError(f"kernel {name} is registered twice")
    _KERNELS[name] = Kernel(name, function, reference, maths, why, specialisations)


def kernels() -> dict[str, Kernel]:
    """All kernels by name, in the order of ``MODULES``."""
    for module in MODULES:
        importlib.import_module(f"{__package__}.{module}")
    return dict(_KERNELS)
