"""``operation.Backend`` over the compiled library: checks arrays, fills structs, calls."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operation import Dropout, Operation
from . import abi
from .library import Library

# Images are shared out in groups; sums over a group are merged in the order of the groups, so
# results depend on neither the number of threads nor who is busy. More groups balance better and
# cost more merging: C * C sums each.
_GROUPS_TIMES_CHANNELS = 1024


def count_groups(images: int, channels: int) -> int:
    """Number of groups that a batch is worked on in."""
    return min(images, max(8, _GROUPS_TIMES_CHANNELS // channels))


class CompiledPrimitives:
    """The primitives of ``operation.Backend`` in C++.

    Args:
        library: The loaded library and which of its variants to use.
    """

    def __init__(self, library: Library) -> None:
        self.library = library

    def channels(self, count: int) -> int:
        width = self.library.width
        return -(-count // width) * width

    def coefficient_dtype(self, storage: Tensor) -> torch.dtype:
        return torch.float32

    def _task(self, operations: list[Operation], y: Tensor, x: Tensor | None = None) -> abi.Task:
        """A task with the sizes of its output ``y`` and input ``x``, and its branches."""
        if y.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"kernels store float32 or bfloat16, got {y.dtype}")
        task = abi.Task()
        task.images, task.out_height, task.out_width, task.channels = y.shape
        task.real_channels = task.channels
        source = y if x is None else x
        _, task.in_height, task.in_width, task.in_channels = source.shape
        task.x, task.x_stride = abi.pointer(x), abi.pixel_stride(x)
        task.bf16 = y.dtype == torch.bfloat16
        task.threads = torch.get_num_threads()
        task.groups = count_groups(task.images, task.channels)
        task.num_branches = len(operations)
        task.branches = (abi.Branch * len(operations))()
        for i, operation in enumerate(operations):
            abi.fill_branch(task.branches[i], operation)
        return task

    def fan_out(self, x: Tensor, operations: list[Operation]) -> None:
        y = operations[0].y
        assert y is not None
        self.library.run(abi.FAN_OUT, self._task(operations, y, x))

    def mid(self, operations: list[Operation]) -> None:
        y = operations[0].y
        assert y is not None
        self.library.run(abi.MID, self._task(operations, y))

    def affine_(self, y: Tensor, scale: Tensor, shift: Tensor) -> None:
        task = self._task([Operation(0, scale=scale, shift=shift)], y)
        task.out = abi.pointer(y)
        self.library.run(abi.AFFINE, task)

    def _drop(self, task: abi.Task, dropout: Dropout) -> None:
        task.real_channels = dropout.channels
        task.dropout_rate = abi.pointer(dropout.rate)
        task.dropout_state = abi.pointer(dropout.state)

    def mix(
        self, operations: list[Operation], shift: Tensor, out: Tensor, dropout: Dropout
    ) -> None:
        task = self._task(operations, out)
        task.out, task.out_stride = abi.pointer(out), abi.pixel_stride(out)
        task.shift = abi.pointer(shift)
        self._drop(task, dropout)
        self.library.run(abi.MIX, task)

    def reduce(
        self, grad: Tensor, operations: list[Operation], sums: Tensor, dropout: Dropout
    ) -> None:
        task = self._task(operations, grad)
        task.x, task.x_stride = abi.pointer(grad), abi.pixel_stride(grad)
        task.sums = abi.pointer(sums)
        self._drop(task, dropout)
        self.library.run(abi.REDUCE, task)

    def mid_backward(self, operations: list[Operation]) -> None:
        y = operations[0].y
        assert y is not None
        self.library.run(abi.MID_BACKWARD, self._task(operations, y))

    def fan_in(
        self,
        x: Tensor,
        operations: list[Operation],
        incoming: Tensor | None,
        out: Tensor | None,
        dropout: Dropout,
    ) -> None:
        # Without operations the result is `incoming`: any array of the size of x will do for y.
        y = operations[0].grad if operations else x
        assert y is not None
        task = self._task(operations, y, x)
        if out is not None:
            task.out, task.out_stride = abi.pointer(out), abi.pixel_stride(out)
        task.incoming, task.incoming_stride = abi.pointer(incoming), abi.pixel_stride(incoming)
        self._drop(task, dropout)
        self.library.run(abi.FAN_IN, task)
