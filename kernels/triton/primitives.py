"""``interface.Backend`` over the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..calls import Call
from ..interface import Arrays
from . import affine, fan_out, mix
from .fan_in import fan_in
from .mid_backward import mid_backward
from .reduce import reduce


class TritonPrimitives:
    """The primitives of ``interface.Backend`` as Triton kernels.

    Arrays are float32, bfloat16 or float16 on a CUDA device, or anywhere under
    ``TRITON_INTERPRET=1``. Nothing is read back to the host.
    """

    def channels(self, count: int) -> int:
        return -(-count // 16) * 16

    def coefficient_dtype(self, storage: torch.dtype) -> torch.dtype:
        return torch.float32

    def empty(self, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        return like.new_empty(shape, dtype=dtype)

    def fan_out(self, call: Call, arrays: Arrays, x: Tensor, sums: Tensor) -> None:
        fan_out.fan_out(call, arrays, x, sums)

    def mid(self, call: Call, arrays: Arrays, scale: Tensor, shift: Tensor, sums: Tensor) -> None:
        fan_out.mid(call, arrays, scale, shift, sums)

    def affine_(self, y: Tensor, scale: Tensor, shift: Tensor) -> None:
        affine.affine_(y, scale, shift)

    def mix(self, call: Call, arrays: Arrays, scale: Tensor, shift: Tensor, out: Tensor) -> None:
        mix.mix(call, arrays, scale, shift, out)

    def reduce(
        self,
        call: Call,
        arrays: Arrays,
        grad: Tensor,
        scale: Tensor,
        shift: Tensor,
        sums: Tensor,
    ) -> None:
        reduce(call, arrays, grad, scale, shift, sums)

    def mid_backward(
        self,
        call: Call,
        arrays: Arrays,
        scale: Tensor,
        shift: Tensor,
        coef: Tensor,
        sums: Tensor,
    ) -> None:
        mid_backward(call, arrays, scale, shift, coef, sums)

    def fan_in(
        self,
        call: Call,
        arrays: Arrays,
        x: Tensor,
        coef: Tensor,
        incoming: Tensor | None,
        out: Tensor | None,
    ) -> None:
        fan_in(call, arrays, x, coef, incoming, out)
