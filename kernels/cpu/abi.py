"""The C structs of ``csrc/abi.h`` in ctypes and numpy."""

from __future__ import annotations

import ctypes

import numpy as np

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
        ("branches", _POINTER),
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


BRANCH = np.dtype([(field[0], np.int64) for field in Branch._fields_])
"""``struct Branch`` as a numpy record; every field has 64 bits."""
