"""Whether torch would call hooks where a module is called: fused code calls none."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import itemgetter

from torch import nn
from torch.nn.modules import module as torch_module

_NAMES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_READ = itemgetter(*_NAMES)
_GLOBAL = tuple(f"_global{name}" for name in _NAMES)


def has_hooks(module: nn.Module) -> bool:
    """Whether torch calls hooks of this module where it is called itself."""
    return any(_READ(module.__dict__))


def have_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether any of these modules has: in a fraction of the time of asking each."""
    return any(chain.from_iterable([_READ(module.__dict__) for module in modules]))


def hooks_on_all_modules() -> bool:
    """Whether torch calls hooks for whatever module runs."""
    return any(getattr(torch_module, name, None) for name in _GLOBAL)
