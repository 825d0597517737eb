"""Tells which primitive a module of somebody else's program is, by its layers.

Only the types and settings of the layers count, not class names or attribute names. What is not
one of the known shapes is a *custom* operation, which is evaluated as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from pdarts_fast.cells.plan import CUSTOM, NOTHING, StockOp
from pdarts_fast.dropin.watch import holds_only_data
from pdarts_fast.kernels import moments
from pdarts_fast.kernels.plan import AVG_POOL, CONV, FACTORIZED, MAX_POOL, POINTWISE, SKIP

KERNELS = (3, 5)
DILATIONS = (1, 2)
# Side of the images that modules without layers are tried on.
_TRIAL_SIDE = 4


_CUSTOM = StockOp(CUSTOM)


def leaves(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Path and module of everything without children, in order; shared modules repeat."""
    return [
        (path, child)
        for path, child in module.named_modules(remove_duplicate=False)
        if not any(True for _ in child.children())
    ]


def _holds_tensors_outside(module: nn.Module, layers: list[tuple[str, nn.Module]]) -> bool:
    """Whether parameters or buffers exist elsewhere than in the layers, or layers repeat."""
    ids = {id(layer) for _, layer in layers}
    if len(ids) != len(layers):
        return True
    return any(
        len(child._parameters) + len(child._buffers) > 0
        for child in module.modules()
        if id(child) not in ids
    )


def is_known_norm(norm: nn.Module) -> bool:
    """A BatchNorm2d as the kernels fold it: eps, momentum and running statistics as usual."""
    return (
        type(norm) is nn.BatchNorm2d
        and norm.eps == moments.EPS
        and norm.momentum == moments.MOMENTUM
        and norm.track_running_stats
        and norm.running_mean is not None
        and norm.running_var is not None
        and norm.num_batches_tracked is not None
        and norm.affine == (norm.weight is not None) == (norm.bias is not None)
    )


def _pair(value: int | tuple[int, ...] | str) -> int:
    """The common number of a setting given per axis; -1 if the axes differ."""
    if isinstance(value, int):
        return value
    return int(value[0]) if not isinstance(value, str) and len(set(value)) == 1 else -1


def _is_plain(convolution: nn.Module) -> bool:
    return (
        type(convolution) is nn.Conv2d
        and convolution.bias is None
        and convolution.padding_mode == "zeros"
    )


def _is_pointwise(convolution: nn.Module, stride: int) -> bool:
    return (
        _is_plain(convolution)
        and isinstance(convolution, nn.Conv2d)
        and _pair(convolution.kernel_size) == 1
        and _pair(convolution.stride) == stride
        and _pair(convolution.padding) == 0
        and convolution.groups == 1
    )


class _Half(NamedTuple):
    """ReLU, depthwise, pointwise, BN."""

    kernel: int
    dilation: int
    stride: int
    in_channels: int
    out_channels: int


def _separable_half(layers: list[nn.Module]) -> _Half | None:
    relu, depthwise, pointwise, norm = layers
    if type(relu) is not nn.ReLU or not is_known_norm(norm):
        return None
    if not _is_plain(depthwise) or not _is_pointwise(pointwise, 1):
        return None
    assert isinstance(depthwise, nn.Conv2d)
    assert isinstance(pointwise, nn.Conv2d)
    kernel, dilation = _pair(depthwise.kernel_size), _pair(depthwise.dilation)
    stride, channels = _pair(depthwise.stride), depthwise.in_channels
    if kernel not in KERNELS or dilation not in DILATIONS or stride not in (1, 2):
        return None
    if _pair(depthwise.padding) != dilation * (kernel - 1) // 2:
        return None
    if not channels == depthwise.out_channels == depthwise.groups == pointwise.in_channels:
        return None
    return _Half(kernel, dilation, stride, channels, pointwise.out_channels)


def _convolution(layers: list[tuple[str, nn.Module]]) -> StockOp | None:
    """A (dilated) separable convolution, once or twice."""
    modules = [layer for _, layer in layers]
    first, last = _separable_half(modules[:4]), _separable_half(modules[-4:])
    if first is None or last is None:
        return None
    if len(layers) == 8:
        same = (first.kernel, first.dilation, 1, first.out_channels)
        if last[:4] != same or first.in_channels != first.out_channels:
            return None
    return StockOp(
        CONV,
        first.stride,
        first.kernel,
        first.dilation,
        (first.in_channels, last.out_channels),
        tuple(layers[i][0] for i in range(len(layers)) if i % 4 in (1, 2)),
        tuple(layers[i][0] for i in range(len(layers)) if i % 4 == 3),
    )


def _is_pool(pool: nn.Module) -> bool:
    if not isinstance(pool, (nn.MaxPool2d, nn.AvgPool2d)):
        return False
    usual = (
        _pair(pool.kernel_size) == 3
        and _pair(pool.padding) == 1
        and _pair(pool.stride) in (1, 2)
        and not pool.ceil_mode
    )
    if type(pool) is nn.MaxPool2d:
        return usual and _pair(pool.dilation) == 1 and not pool.return_indices
    if type(pool) is nn.AvgPool2d:
        return usual and not pool.count_include_pad and pool.divisor_override is None
    return False


def _pool(layers: list[tuple[str, nn.Module]]) -> StockOp | None:
    pool = layers[0][1]
    if not _is_pool(pool):
        return None
    assert isinstance(pool, (nn.MaxPool2d, nn.AvgPool2d))
    kind, stride = (MAX_POOL if type(pool) is nn.MaxPool2d else AVG_POOL), _pair(pool.stride)
    if len(layers) == 1:
        return StockOp(kind, stride)
    path, norm = layers[1]
    if not is_known_norm(norm):
        return None
    assert isinstance(norm, nn.BatchNorm2d)
    return StockOp(kind, stride, channels=(norm.num_features,) * 2, norms=(path,))


def _factorized(layers: list[tuple[str, nn.Module]]) -> StockOp | None:
    (_, relu), (path_1, conv_1), (path_2, conv_2), (path_bn, norm) = layers
    if type(relu) is not nn.ReLU or not is_known_norm(norm):
        return None
    if not _is_pointwise(conv_1, 2) or not _is_pointwise(conv_2, 2):
        return None
    assert isinstance(conv_1, nn.Conv2d)
    assert isinstance(conv_2, nn.Conv2d)
    if conv_1.in_channels != conv_2.in_channels:
        return None
    channels = (conv_1.in_channels, conv_1.out_channels + conv_2.out_channels)
    return StockOp(
        FACTORIZED, 2, channels=channels, convolutions=(path_1, path_2), norms=(path_bn,)
    )


def _without_layers(module: nn.Module) -> StockOp:
    """Identity or zeros: told by what the module answers, since classes have any name."""
    if type(module) is nn.Identity:
        return StockOp(SKIP, 1)
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        return _CUSTOM
    if type(module).__module__.startswith("torch.") or not holds_only_data(module):
        return _CUSTOM
    count = 2 * 2 * _TRIAL_SIDE * _TRIAL_SIDE
    image = (torch.arange(count, dtype=torch.float64) - 31.3).sin()
    image = image.reshape(2, 2, _TRIAL_SIDE, _TRIAL_SIDE)
    try:
        with torch.no_grad():
            answer = module(image.clone())
    except Exception:  # a custom operation may refuse these images in any way
        return _CUSTOM
    if not isinstance(answer, torch.Tensor):
        return _CUSTOM
    if answer.shape == image.shape and torch.equal(answer, image):
        return StockOp(SKIP, 1)
    for stride in (1, 2):
        if answer.shape == image[:, :, ::stride, ::stride].shape and not answer.any():
            return StockOp(NOTHING, stride)
    return _CUSTOM


def recognise_op(module: nn.Module) -> StockOp:
    """The primitive that a module is, or a custom operation.

    The layers must be all that the module holds. Whether its ``forward`` uses them in the usual
    way cannot be read from them: the whole cell is tried for that later.
    """
    layers = leaves(module)
    if _holds_tensors_outside(module, layers):
        return _CUSTOM
    found: StockOp | None = None
    if len(layers) in (4, 8) and type(layers[1][1]) is nn.Conv2d:
        found = _convolution(layers)
        if found is None and len(layers) == 4:
            found = _factorized(layers)
    elif len(layers) in (1, 2) and _is_pool(layers[0][1]):
        found = _pool(layers)
    elif len(layers) == 1 and layers[0][1] is module:
        found = _without_layers(module)
    elif len(layers) == 2 and type(layers[1][1]) is nn.Dropout and not layers[1][1].inplace:
        skip = _without_layers(layers[0][1])
        if skip.kind == SKIP:
            found = StockOp(SKIP, 1, dropout=layers[1][0])
    elif len(layers) == 1:
        found = _without_layers(layers[0][1])
    return found or _CUSTOM


def recognise_input(module: nn.Module) -> StockOp:
    """How a cell brings an input to its channels: a 1×1 convolution, factorized, or custom."""
    layers = leaves(module)
    if _holds_tensors_outside(module, layers):
        return _CUSTOM
    if len(layers) == 4:
        return _factorized(layers) or _CUSTOM
    if len(layers) != 3:
        return _CUSTOM
    (_, relu), (path, convolution), (path_bn, norm) = layers
    if type(relu) is not nn.ReLU or not _is_pointwise(convolution, 1) or not is_known_norm(norm):
        return _CUSTOM
    assert isinstance(convolution, nn.Conv2d)
    channels = (convolution.in_channels, convolution.out_channels)
    return StockOp(POINTWISE, 1, channels=channels, convolutions=(path,), norms=(path_bn,))
