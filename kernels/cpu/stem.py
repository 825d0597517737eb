"""``stem.StemKernels`` over the compiled primitives: one branch that is a product over patches."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import abi
from .memory import pool
from .primitives import CompiledPrimitives, count_groups

_KERNEL = 3
# Patches are read in whole vectors, up to this many numbers behind the last one.
_SLACK = 64


class CompiledStem:
    """The stem in C++.

    Args:
        primitives: Of the library.
    """

    def __init__(self, primitives: CompiledPrimitives) -> None:
        self._primitives = primitives
        self._library = primitives.library
        self.affine_ = primitives.affine_

    def takes(self, channels: int) -> bool:
        return channels == self._primitives.channels(channels)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return pool.empty(shape, dtype)

    def image(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Zero-padded rows ``[N, H + 2, W + 2, Cx]``."""
        images, channels, height, width = x.shape
        shape = (images, height + 2, width + 2, channels)
        count = math.prod(shape)
        flat = pool.empty((count + _SLACK,), dtype)
        flat.zero_()
        rows = flat[:count].view(shape)
        rows[:, 1:-1, 1:-1].copy_(x.detach().permute(0, 2, 3, 1))
        return rows

    def _task(self, x: Tensor, y: Tensor, branch: np.ndarray) -> abi.Task:
        """A task with one branch, which reads x and has the output y."""
        task = abi.Task(num_branches=1, branches=branch.ctypes.data, x=x.data_ptr())
        task.images, task.out_height, task.out_width, task.channels = y.shape
        _, task.in_height, task.in_width, task.in_channels = x.shape
        task.x_stride, task.in_parts = task.in_channels, 1
        task.real_channels = task.channels
        task.bf16, task.threads = y.dtype == torch.bfloat16, torch.get_num_threads()
        task.groups = count_groups(task.images, task.channels)
        return task

    def _matrix(self, weight: Tensor) -> Tensor:
        """``[C, Cx, 3, 3]`` in the order of patches, ``[C, depth]``."""
        rows = weight.detach().permute(0, 2, 3, 1).flatten(1)
        return F.pad(rows, (0, self._primitives.channels(rows.shape[1]) - rows.shape[1]))

    @staticmethod
    def _branch(y: Tensor, matrix: Tensor | None = None) -> np.ndarray:
        """A branch with the output y, of the weights of ``_matrix``."""
        branch = np.zeros(1, dtype=abi.BRANCH)
        branch["kind"], branch["kernel"], branch["stride"] = abi.PATCHES, _KERNEL, 1
        branch["y"] = y.data_ptr()
        if matrix is not None:
            branch["pointwise"] = matrix.data_ptr()
        return branch

    def convolve(self, image: Tensor, weight: Tensor, y: Tensor, sums: Tensor) -> None:
        matrix = self._matrix(weight)
        branch = self._branch(y, matrix)
        branch["sums"] = sums.data_ptr()
        self._library.run(abi.FAN_OUT, self._task(image, y, branch))

    def reduce(self, grad: Tensor, y: Tensor, norm: Tensor, sums: Tensor) -> None:
        branch = self._branch(y)
        branch["scale"], branch["shift"] = norm[0].data_ptr(), norm[1].data_ptr()
        branch["sums"] = sums[1].data_ptr()
        task = self._task(grad, y, branch)
        task.sums = sums.data_ptr()
        self._library.run(abi.REDUCE, task)

    def weight_gradient(
        self, image: Tensor, weight: Tensor, y: Tensor, grad: Tensor, coef: Tensor
    ) -> Tensor:
        matrix = self._matrix(weight)
        found = torch.empty_like(matrix)
        branch = self._branch(y, matrix)
        branch["grad"], branch["grad_stride"] = grad.data_ptr(), grad.shape[-1]
        branch["coef"], branch["scale"] = coef.data_ptr(), coef.data_ptr()
        branch["grad_pointwise"] = found.data_ptr()
        self._library.run(abi.FAN_IN, self._task(image, y, branch))
        _, channels, *kernel = weight.shape
        used = found[:, : math.prod(weight.shape[1:])].unflatten(1, (*kernel, channels))
        return used.permute(0, 3, 1, 2).contiguous()
