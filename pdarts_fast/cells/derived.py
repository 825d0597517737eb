"""Runs a cell of a derived network as one operator: what ``network.Cell.forward`` calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pdarts_fast.cells import (
    derived_operator,  # noqa: F401  (defines the operators)
    derived_plan,
)
from pdarts_fast.kernels import moments
from pdarts_fast.kernels.plan import FACTORIZED
from pdarts_fast.kernels.rows import storage_dtype


class Names:
    """The modules of a cell that hold its weights and statistics, in the order of its plan.

    Args:
        cell: A ``network.Cell``.
    """

    def __init__(self, cell: Any) -> None:
        inputs = (cell.preprocess0, cell.preprocess1)
        self.key = derived_plan.make_key(
            list(zip(cell.operations, cell.sources, strict=True)),
            cell.concat,
            channels=cell.C,
            in_channels=tuple(
                (m.conv_1 if hasattr(m, "conv_1") else m.op[1]).in_channels for m in inputs
            ),
            reduction=cell.reduction,
            reduction_prev=hasattr(inputs[0], "conv_1"),
        )
        self.plan = derived_plan.from_key(self.key)
        # Every operation but an identity draws a mask, "none" too, which then has no use for it.
        drawing = [
            number
            for number, (name, source) in enumerate(zip(cell.operations, cell.sources, strict=True))
            if name != "skip_connect" or (cell.reduction and source < derived_plan.NUM_INPUTS)
        ]
        self.draws = len(drawing)
        self.used = [drawing.index(edge) for edge, _ in derived_plan.masked_places(self.plan)]
        self.convolutions: list[Any] = [
            cell.get_submodule(name.removesuffix(".weight")) for name in self.plan.weights
        ]
        self.norms: list[Any] = [cell.get_submodule(name) for name in self.plan.norms]
        paths = [name.removesuffix(".weight") for name in (*self.plan.weights, *self.plan.norms)]
        self._links = list(dict.fromkeys(link for path in paths for link in _links(cell, path)))
        # Somebody may have put other modules in their places, SyncBatchNorm for one.
        self.are_stock = all(type(norm) is nn.BatchNorm2d for norm in self.norms) and all(
            type(module) is nn.Conv2d and module.bias is None for module in self.convolutions
        )

    def hold(self) -> bool:
        """Whether the cell still consists of these modules."""
        return all(parent._modules.get(name) is child for parent, name, child in self._links)


def _links(cell: nn.Module, path: str) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Parent, name and child of every step of a path."""
    parent = cell
    for name in path.split("."):
        child = parent._modules[name]
        assert child is not None
        yield parent, name, child
        parent = child


def _names(cell: nn.Module) -> Names:
    found = cell.__dict__.get("fused_names")
    # A replica of nn.DataParallel shares the attributes of the original, not its parameters.
    if found is None or getattr(cell, "_is_replica", False) or not found.hold():
        found = cell.__dict__["fused_names"] = Names(cell)
    return found


def fits(cell: nn.Module, s0: Tensor, s1: Tensor) -> bool:
    """Whether the kernels compute what the modules of a cell compute for these inputs.

    They do not where modules were replaced, where a BatchNorm is in another mode than the cell,
    and where torch would refuse the inputs in words of its own.
    """
    names, training = _names(cell), cell.training
    plan = names.plan
    if not names.are_stock:
        return False
    if s0.dim() != 4 or s1.dim() != 4 or s0.shape[0] != s1.shape[0] or not s1.numel():
        return False
    if (s0.shape[1], s1.shape[1]) != plan.in_channels:
        return False
    factor = 2 if plan.input_kind(0) == FACTORIZED else 1
    if any(
        -(-large // factor) != small
        for large, small in zip(s0.shape[2:], s1.shape[2:], strict=True)
    ):
        return False
    if any(n.training is not training or n.momentum != moments.MOMENTUM for n in names.norms):
        return False
    # BatchNorm refuses a single value a channel.
    divisor = 2 if plan.reduction else 1
    pixels = s1.shape[0] * -(-s1.shape[2] // divisor) * -(-s1.shape[3] // divisor)
    return pixels > 1 or not training


def draw_masks(names: Names, like: Tensor, drop_path: float | Tensor) -> Tensor:
    """Factors of drop-path, ``[operations, N]``, as ``network.drop_path`` draws them one by one.

    Args:
        names: Of the cell.
        like: The images, for their number, dtype and device.
        drop_path: Probability that an operation is dropped for an image; the number 0 draws
            nothing, a tensor (which may change under a captured graph) always draws.
    """
    keep, images = 1.0 - drop_path, like.shape[0]
    if not names.used or (not isinstance(drop_path, Tensor) and drop_path == 0):
        return like.new_empty((0, images))
    if isinstance(keep, Tensor):
        kept = [torch.rand(images, device=like.device) < keep for _ in range(names.draws)]
        return (torch.stack([kept[number] for number in names.used]) / keep).to(like.dtype)
    rows = [like.new_empty((images, 1, 1, 1)).bernoulli_(keep) for _ in range(names.draws)]
    return torch.stack([rows[number] for number in names.used]).view(-1, images) / keep


def run(cell: nn.Module, backend: str, s0: Tensor, s1: Tensor, drop_path: float | Tensor) -> Tensor:
    """What ``Cell.forward`` returns, by the primitives of a backend.

    Args:
        cell: A ``network.Cell``; its parameters and buffers are read, running statistics written.
        backend: Name of a backend that is registered.
        s0, s1: Inputs, ``[N, C_prev_prev, H0, W0]`` and ``[N, C_prev, H, W]``.
        drop_path: Drop-path probability; acts in training only.

    Returns:
        ``[N, multiplier * C, H_out, W_out]``, channels-last in memory.
    """
    names, training, dtype = _names(cell), cell.training, storage_dtype(s1)
    masks = draw_masks(names, s1.detach(), drop_path if training else 0.0)
    running = [b for norm in names.norms for b in (norm.running_mean, norm.running_var)]
    out, *_, stats, _ = torch.ops.pdarts_fast.derived_forward(
        s0,
        s1,
        [module.weight for module in names.convolutions],
        [gain for norm in names.norms for gain in (norm.weight, norm.bias)],
        [] if training else running,
        masks,
        names.key,
        backend,
        training,
        dtype,
    )
    if training:
        batches = [norm.num_batches_tracked for norm in names.norms]
        counts = [out.shape[0] * out.shape[2] * out.shape[3], s1[:, 0].numel()]
        torch.ops.pdarts_fast.derived_update(running, batches, stats, names.key, counts)
    return out
