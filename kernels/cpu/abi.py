"""The C structs of ``csrc/abi.h`` in ctypes and numpy."""

from __future__ import annotations

import ctypes

import numpy as np

ABI_VERSION = 8
FAN_OUT, MID, AFFINE, MIX, REDUCE, MID_BACKWARD, FAN_IN = range(7)
PATCHES = 6
"""Kind of the stem's convolution, which no plan has."""

_INT = ctypes.c_int64
_POINTER = ctypes.c_void_p


class Branch(ctypes.Structure):
    """``struct Branch``."""

    _fields_ = (
        *((name, _INT) for name in ("kind", "kernel", "dilation", "stride", "padding", "stream")),
        ("depthwise", _POINTER),
        ("pointwise", _POINTER),
        ("pointwise_odd", _POINTER),
        ("y", _POINTER),
        ("input", _POINTER),
        *((name, _INT) for name in ("input_stride", "input_height", "input_width")),
        ("scale", _POINTER),
        ("shift", _POINTER),
        ("grad", _POINTER),
        ("grad_stride", _INT),
        ("coef", _POINTER),
        ("grad_input", _POINTER),
        ("sums", _POINTER),
        ("grad_depthwise", _POINTER),
        ("grad_pointwise", _POINTER),
        ("mask", _POINTER),
        ("kept", _POINTER),
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
                "in_parts",
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
        ("scale", _POINTER),
        ("shift", _POINTER),
        ("sums", _POINTER),
        ("dropout_state", _POINTER),
        ("dropout_rate", _POINTER),
    )


class Call(ctypes.Structure):
    """``struct Call``."""

    _fields_ = (("count", _INT), ("normed", _INT), ("items", _POINTER))


class CellCalls(ctypes.Structure):
    """``struct CellCalls``."""

    _fields_ = (
        *((name, _INT) for name in ("steps", "slots", "halves", "alphas", "norms")),
        *(
            (name, _POINTER)
            for name in ("inputs", "leave", "second", "enter", "enter_second", "gather")
        ),
    )


class CellTask(ctypes.Structure):
    """``struct CellTask``."""

    _fields_ = (
        ("calls", _POINTER),
        *(
            (name, _INT)
            for name in (
                "images",
                "height",
                "width",
                "channels",
                "real_channels",
                "bf16",
                "threads",
                "training",
            )
        ),
        *(
            (name, _INT * 2)
            for name in (
                "in_height",
                "in_width",
                "in_channels",
                "in_parts",
                "state_height",
                "state_width",
            )
        ),
        ("inputs", _POINTER * 2),
        ("states", _POINTER * 2),
        ("apart", _INT),
        *(
            (name, _POINTER)
            for name in (
                "nodes",
                "y",
                "norms",
                "stats",
                "alphas",
                "weights",
                "dropout_rate",
                "dropout_state",
                "masks",
                "mask_factors",
                "kept",
                "grad",
                "node_grads",
                "half_grads",
            )
        ),
        ("state_grads", _POINTER * 2),
        ("grad_inputs", _POINTER * 2),
        ("adds", _INT * 2),
        ("grad_alphas", _POINTER),
        ("grad_weights", _POINTER),
    )


class DrawTask(ctypes.Structure):
    """``struct DrawTask``."""

    _fields_ = (
        ("words", _POINTER),
        ("used", _POINTER),
        *((name, _INT) for name in ("masks", "images", "channels", "pixels", "threads", "padded")),
        ("thresholds", _POINTER),
        ("out", _POINTER),
    )


class RunningTask(ctypes.Structure):
    """``struct RunningTask``."""

    _fields_ = (
        *((name, _INT) for name in ("norms", "channels", "padded")),
        *((name, _POINTER) for name in ("slots", "running", "batches", "stats", "unbiased")),
        ("momentum", ctypes.c_double),
    )


ITEM = np.dtype(
    [
        (name, np.int64)
        for name in (
            "kind",
            "kernel",
            "dilation",
            "stride",
            "padding",
            "stream",
            "slot",
            "input",
            "half",
            "source",
            "node",
            "place",
            "input_place",
            "depthwise",
            "pointwise",
            "depthwise_weight",
            "pointwise_weight",
            "alpha",
            "norm",
            "input_norm",
            "mask",
            "kept",
        )
    ]
)
"""``struct Item`` as a numpy record."""

BRANCH = np.dtype([(field[0], np.int64) for field in Branch._fields_])
"""``struct Branch`` as a numpy record; every field has 64 bits."""
