"""The C structs of ``csrc/abi.h`` in ctypes, and how operations are written into them."""

from __future__ import annotations

import ctypes

from torch import Tensor

from ..operation import Operation

ABI_VERSION = 1
FAN_OUT, MID, AFFINE, MIX, REDUCE, MID_BACKWARD, FAN_IN = range(7)

_INT = ctypes.c_int64
_POINTER = ctypes.c_void_p


class Branch(ctypes.Structure):
    """``struct Branch``."""

    _fields_ = (
        *((name, _INT) for name in ("kind", "kernel", "dilation", "stride", "padding", "stream")),
        ("depthwise", _POINTER),
        ("pointwise", _POINTER),
        ("y", _POINTER),
        ("input", _POINTER),
        ("input_stride", _INT),
        ("scale", _POINTER),
        ("shift", _POINTER),
        ("grad", _POINTER),
        ("grad_stride", _INT),
        ("coef", _POINTER),
        ("grad_input", _POINTER),
        ("sums", _POINTER),
        ("grad_depthwise", _POINTER),
        ("grad_pointwise", _POINTER),
    )


class Task(ctypes.Structure):
    """``struct Task``."""

    _fields_ = (
        *(
            (name, _INT)
            for name in (
                "images",
                "in_height",
                "in_width",
                "out_height",
                "out_width",
                "in_channels",
                "channels",
                "real_channels",
                "bf16",
                "threads",
                "groups",
                "num_branches",
            )
        ),
        ("branches", ctypes.POINTER(Branch)),
        ("x", _POINTER),
        ("x_stride", _INT),
        ("out", _POINTER),
        ("out_stride", _INT),
        ("incoming", _POINTER),
        ("incoming_stride", _INT),
        ("shift", _POINTER),
        ("sums", _POINTER),
        ("dropout_state", _POINTER),
        ("dropout_rate", _POINTER),
    )


def pointer(x: Tensor | None) -> int | None:
    """Address of a tensor's first element; null for None."""
    return None if x is None else x.data_ptr()


def pixel_stride(x: Tensor | None) -> int:
    """Elements from one pixel of ``[N, H, W, C]`` to the next.

    Raises:
        ValueError: Rows or images do not follow one another without a gap.
    """
    if x is None:
        return 0
    images, height, width, channels = x.shape
    stride = x.stride(2) if width > 1 else x.stride(1) if height > 1 else x.stride(0)
    if images * height * width == 1:
        stride = channels
    expected = (height * width * stride, width * stride, stride, 1)
    for size, got, wanted in zip(x.shape, x.stride(), expected, strict=True):
        if size > 1 and got != wanted:
            raise ValueError(
                f"kernels take channels-last arrays or slices of their channels, got shape "
                f"{tuple(x.shape)} with strides {x.stride()}"
            )
    return stride


def fill_branch(branch: Branch, operation: Operation) -> None:
    """Writes an operation into a struct; the operation keeps the tensors alive."""
    branch.kind = operation.kind
    branch.kernel = operation.kernel
    branch.dilation = operation.dilation
    branch.stride = operation.stride
    branch.padding = operation.padding
    branch.stream = operation.stream
    branch.depthwise = pointer(operation.depthwise)
    branch.pointwise = pointer(operation.pointwise)
    branch.y = pointer(operation.y)
    branch.input = pointer(operation.input)
    branch.input_stride = pixel_stride(operation.input)
    branch.scale = pointer(operation.scale)
    branch.shift = pointer(operation.shift)
    branch.grad = pointer(operation.grad)
    branch.grad_stride = pixel_stride(operation.grad)
    branch.coef = pointer(operation.coef)
    branch.grad_input = pointer(operation.grad_input)
    branch.sums = pointer(operation.sums)
    branch.grad_depthwise = pointer(operation.grad_depthwise)
    branch.grad_pointwise = pointer(operation.grad_pointwise)
