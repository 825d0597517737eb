"""``interface.Backend`` over the compiled library: fills structs and calls.

Structs are filled a column at a time: a cell has hundreds of operations a step, and Python that
looks at each of them took longer than the kernels of the last stage.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from .. import plan
from ..calls import Call
from ..interface import Arrays
from . import abi
from .library import Library
from .memory import pool

# Images are shared out in groups; sums over a group are merged in the order of the groups, so
# results depend on neither the number of threads nor who is busy. More groups balance better and
# cost more merging: C * C sums each.
_GROUPS_TIMES_CHANNELS = 1024

_FLOAT, _DOUBLE = 4, 8


def count_groups(images: int, channels: int) -> int:
    """Number of groups that a batch is worked on in."""
    return min(images, max(8, _GROUPS_TIMES_CHANNELS // channels))


def pixel_stride(x: Tensor) -> int:
    """Elements from one pixel of ``[N, H, W, C]`` to the next.

    Raises:
        ValueError: Rows or images do not follow one another without a gap.
    """
    images, height, width, channels = x.shape
    image, row, pixel, channel = x.stride()
    stride = pixel if width > 1 else row if height > 1 else image if images > 1 else channels
    followed = (
        (images == 1 or image == height * width * stride)
        and (height == 1 or row == width * stride)
        and (channels == 1 or channel == 1)
    )
    if not followed:
        raise ValueError(
            "kernels take channels-last arrays or slices of their channels, got shape "
            f"{tuple(x.shape)} with strides {x.stride()}"
        )
    return stride


class Template:
    """Structs of a call with all that does not change from step to step.

    Attributes:
        table: The structs; addresses are still zero.
        depthwise, pointwise: Byte offsets into the flat weights, meaningless where there is none.
        has_depthwise, has_pointwise: Where there is one.
    """

    def __init__(self, call: Call, offsets: list[int]) -> None:
        items = call.items
        self.table = np.zeros(len(items), dtype=abi.BRANCH)
        for name in ("kind", "kernel", "dilation", "stride", "padding", "stream"):
            self.table[name] = [getattr(item, name) for item in items]

        def column(name: str) -> np.ndarray:
            return np.array([getattr(item, name) for item in items], dtype=np.int64)

        self.slot, self.input, self.half = column("slot"), column("input"), column("half")
        self.source, self.node = column("source"), column("node")
        self.numbers = np.arange(len(items))
        self.is_skip = column("kind") == plan.SKIP
        self.has_skip = bool(self.is_skip.any())
        self.separable = self.half >= 0
        starts = np.array([*offsets, 0], dtype=np.int64) * _FLOAT
        self.has_depthwise = column("depthwise") >= 0
        self.has_pointwise = column("pointwise") >= 0
        self.depthwise = starts[column("depthwise")]
        self.pointwise = starts[column("pointwise")]


class CompiledPrimitives:
    """The primitives of ``interface.Backend`` in C++.

    Args:
        library: The loaded library and which of its variants to use.
    """

    def __init__(self, library: Library) -> None:
        self.library = library
        self._templates: WeakKeyDictionary[Call, Template] = WeakKeyDictionary()

    def channels(self, count: int) -> int:
        width = self.library.width
        return -(-count // width) * width

    def coefficient_dtype(self, storage: torch.dtype) -> torch.dtype:
        return torch.float32

    def empty(self, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        return pool.empty(shape, dtype)

    def _template(self, call: Call, arrays: Arrays) -> tuple[Template, np.ndarray]:
        """A call's template and a copy of its table."""
        found = self._templates.get(call)
        if found is None:
            found = self._templates[call] = Template(call, arrays.weights.layout.offsets)
        table = found.table.copy()
        if found.has_skip and not arrays.training:
            table["stream"] = -1
        return found, table

    def _task(self, arrays: Arrays, table: np.ndarray, y: Tensor) -> abi.Task:
        """A task with the sizes of its output ``y`` and its branches."""
        if y.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"kernels store float32 or bfloat16, got {y.dtype}")
        task = abi.Task()
        task.images, task.out_height, task.out_width, task.channels = y.shape
        task.in_height, task.in_width, task.in_channels = y.shape[1:]
        task.in_parts = 1
        task.real_channels = arrays.channels
        task.bf16 = y.dtype == torch.bfloat16
        task.threads = torch.get_num_threads()
        task.groups = count_groups(task.images, task.channels)
        task.num_branches = len(table)
        task.branches = table.ctypes.data
        task.dropout_rate, task.dropout_state = arrays.rate.data_ptr(), arrays.state.data_ptr()
        return task

    def _read(self, task: abi.Task, x: Tensor) -> None:
        """Makes ``x`` the task's input."""
        task.x, task.x_stride = x.data_ptr(), pixel_stride(x)
        _, task.in_height, task.in_width, task.in_channels = x.shape

    def _weights(self, t: Template, table: np.ndarray, arrays: Arrays) -> None:
        """Addresses of weights and of room for their gradients."""
        flat, grad = arrays.weights.flat.data_ptr(), arrays.weights.grad
        table["depthwise"] = np.where(t.has_depthwise, flat + t.depthwise, 0)
        table["pointwise"] = np.where(t.has_pointwise, flat + t.pointwise, 0)
        if grad is not None:
            base = grad.data_ptr()
            table["grad_depthwise"] = np.where(t.has_depthwise, base + t.depthwise, 0)
            table["grad_pointwise"] = np.where(t.has_pointwise, base + t.pointwise, 0)

    def _slots(self, column: np.ndarray, numbers: np.ndarray, stored: Tensor) -> None:
        """Addresses of rows ``numbers`` of a stack of arrays."""
        column[:] = stored.data_ptr() + numbers * (stored.stride(0) * stored.element_size())

    def _coefficients(self, t: Template, table: np.ndarray, name: str, x: Tensor) -> None:
        """Addresses of the rows of contiguous per-item numbers."""
        table[name] = x.data_ptr() + t.numbers * (x.stride(0) * x.element_size())

    def _skip_inputs(self, t: Template, table: np.ndarray, arrays: Arrays) -> None:
        if t.has_skip:
            states = arrays.states
            bases = np.array([state.data_ptr() for state in states], dtype=np.int64)
            strides = np.array([pixel_stride(state) for state in states], dtype=np.int64)
            table["input"] = np.where(t.is_skip, bases[t.source], 0)
            table["input_stride"] = np.where(t.is_skip, strides[t.source], 0)

    def _gradients(self, t: Template, table: np.ndarray, arrays: Arrays, halves: bool) -> None:
        """Gradients of nodes, or of first halves where ``halves`` and the item is one."""
        bases = np.array([grad.data_ptr() for grad in arrays.grads], dtype=np.int64)
        strides = np.array([pixel_stride(grad) for grad in arrays.grads], dtype=np.int64)
        grad, stride = bases[t.node], strides[t.node]
        if halves and arrays.half_grads is not None:
            stored = arrays.half_grads
            step = stored.stride(0) * stored.element_size()
            grad = np.where(t.separable, stored.data_ptr() + t.half * step, grad)
            stride = np.where(t.separable, stored.shape[-1], stride)
        table["grad"], table["grad_stride"] = grad, stride

    def fan_out(self, call: Call, arrays: Arrays, x: Tensor, sums: Tensor) -> None:
        t, table = self._template(call, arrays)
        self._weights(t, table, arrays)
        self._slots(table["y"], t.slot, arrays.y)
        self._coefficients(t, table, "sums", sums)
        task = self._task(arrays, table, arrays.y[0])
        self._read(task, x)
        self.library.run(abi.FAN_OUT, task)

    def mid(self, call: Call, arrays: Arrays, scale: Tensor, shift: Tensor, sums: Tensor) -> None:
        t, table = self._template(call, arrays)
        self._weights(t, table, arrays)
        self._slots(table["y"], t.slot, arrays.y)
        self._slots(table["input"], t.input, arrays.y)
        table["input_stride"] = arrays.y.shape[-1]
        self._coefficients(t, table, "scale", scale)
        self._coefficients(t, table, "shift", shift)
        self._coefficients(t, table, "sums", sums)
        self.library.run(abi.MID, self._task(arrays, table, arrays.y[0]))

    def affine_(self, y: Tensor, scale: Tensor, shift: Tensor) -> None:
        table = np.zeros(1, dtype=abi.BRANCH)
        table["scale"], table["shift"] = scale.data_ptr(), shift.data_ptr()
        task = abi.Task()
        task.images, task.out_height, task.out_width, task.channels = y.shape
        task.bf16 = y.dtype == torch.bfloat16
        task.threads = torch.get_num_threads()
        task.num_branches, task.branches = 1, table.ctypes.data
        task.out, task.out_stride = y.data_ptr(), pixel_stride(y)
        self.library.run(abi.AFFINE, task)

    def mix(self, call: Call, arrays: Arrays, scale: Tensor, shift: Tensor, out: Tensor) -> None:
        t, table = self._template(call, arrays)
        self._slots(table["y"], t.slot, arrays.y)
        self._skip_inputs(t, table, arrays)
        self._coefficients(t, table, "scale", scale)
        task = self._task(arrays, table, out)
        task.out, task.out_stride = out.data_ptr(), pixel_stride(out)
        task.shift = shift.data_ptr()
        self.library.run(abi.MIX, task)

    def reduce(
        self,
        call: Call,
        arrays: Arrays,
        grad: Tensor,
        scale: Tensor,
        shift: Tensor,
        sums: Tensor,
    ) -> None:
        t, table = self._template(call, arrays)
        self._slots(table["y"], t.slot, arrays.y)
        self._skip_inputs(t, table, arrays)
        self._coefficients(t, table, "scale", scale)
        self._coefficients(t, table, "shift", shift)
        self._coefficients(t, table, "sums", sums[1:])
        task = self._task(arrays, table, grad)
        self._read(task, grad)
        task.sums = sums.data_ptr()
        self.library.run(abi.REDUCE, task)

    def mid_backward(
        self,
        call: Call,
        arrays: Arrays,
        scale: Tensor,
        shift: Tensor,
        coef: Tensor,
        sums: Tensor,
    ) -> None:
        t, table = self._template(call, arrays)
        assert arrays.half_grads is not None
        self._weights(t, table, arrays)
        self._slots(table["y"], t.slot, arrays.y)
        self._slots(table["input"], t.input, arrays.y)
        self._slots(table["grad_input"], t.half, arrays.half_grads)
        table["input_stride"] = arrays.y.shape[-1]
        self._gradients(t, table, arrays, halves=False)
        self._coefficients(t, table, "scale", scale)
        self._coefficients(t, table, "shift", shift)
        self._coefficients(t, table, "coef", coef)
        self._coefficients(t, table, "sums", sums)
        self.library.run(abi.MID_BACKWARD, self._task(arrays, table, arrays.y[0]))

    def fan_in(
        self,
        call: Call,
        arrays: Arrays,
        x: Tensor,
        coef: Tensor,
        incoming: Tensor | None,
        out: Tensor | None,
    ) -> None:
        t, table = self._template(call, arrays)
        self._weights(t, table, arrays)
        self._slots(table["y"], t.slot, arrays.y)
        self._gradients(t, table, arrays, halves=True)
        self._coefficients(t, table, "coef", coef)
        self._coefficients(t, table, "scale", coef)
        task = self._task(arrays, table, arrays.grads[0])
        self._read(task, x)
        if out is not None:
            task.out, task.out_stride = out.data_ptr(), pixel_stride(out)
        if incoming is not None:
            task.incoming, task.incoming_stride = incoming.data_ptr(), pixel_stride(incoming)
        self.library.run(abi.FAN_IN, task)
