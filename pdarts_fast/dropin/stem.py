"""The stem of somebody else's network: a 3x3 convolution of images, and its BatchNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pdarts_fast.dropin import swap
from pdarts_fast.dropin.stock_ops import is_known_norm
from pdarts_fast.hooks import has_hooks, hooks_on_all_modules
from pdarts_fast.kernels import backends, stem

_LARGEST_DEPTH = 4


def is_stem(module: nn.Module) -> bool:
    """Whether a module, as it is now, computes what ``kernels.stem`` does and nothing else."""
    if swap.own_class(module) is not nn.Sequential or "forward" in vars(module):
        return False
    parts = list(module._modules.values())
    if [type(part) for part in parts] != [nn.Conv2d, nn.BatchNorm2d]:
        return False
    conv, norm = parts
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    plain = not any("forward" in vars(part) or has_hooks(part) for part in (conv, norm))
    return (
        plain
        and conv.in_channels <= _LARGEST_DEPTH
        and stem.is_known_convolution(conv)
        and is_known_norm(norm)
        and norm.affine
        and norm.num_features == conv.out_channels
    )


class FusedStem(swap.Swapped):
    """``forward`` of a stem."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = _run(self, args[0]) if len(args) == 1 and not kwargs else None
        return super().forward(*args, **kwargs) if out is None else out  # type: ignore[misc]


@torch.compiler.disable
def _run(module: Any, x: Any) -> Tensor | None:
    """The output of a stem, or None if its own forward is to run."""
    if not isinstance(x, Tensor) or not is_stem(module) or hooks_on_all_modules():
        return None
    conv, norm = module
    backend = module.__dict__[swap.HOLDER].backend(x.device)
    if backend != backends.REFERENCE:
        # The stem runs before any cell: it is the first to need the kernels.
        backends.load(backend).register()
    return stem.run(backend, conv, norm, x) if stem.serves(backend, conv, norm, x) else None
