"""Lets scripts that insist on CUDA run on the CPU: what they ask of it stays where it is.

Torch's own code sees the machine as it is; only callers outside of torch are told otherwise.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_FACTORIES = ("zeros", "ones", "full", "empty", "randn", "rand", "arange", "tensor", "eye")
_TYPES = ("Float", "Double", "Half", "Long", "Int", "Byte", "Bool")


def _asked_by_torch() -> bool:
    """Whether the caller of our caller is torch's own code."""
    name = sys._getframe(2).f_globals.get("__name__", "")
    return name.partition(".")[0] in ("torch", "torchvision")


def _told(real: Callable[..., Any], answer: Any) -> Callable[..., Any]:
    @functools.wraps(real)
    def function(*args: Any, **kwargs: Any) -> Any:
        return real(*args, **kwargs) if _asked_by_torch() else answer

    return function


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.partition(":")[0] == "cuda"


def _to_cpu(device: Any) -> Any:
    return "cpu" if _is_cuda(device) else device


def _with_cpu(real: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose device arguments never name CUDA."""

    @functools.wraps(real)
    def function(*args: Any, **kwargs: Any) -> Any:
        return real(*map(_to_cpu, args), **{k: _to_cpu(v) for k, v in kwargs.items()})

    return function


def _staying() -> Callable[..., Any]:
    """A new method that returns its object: torch's compiler keeps a table of distinct ones."""

    def cuda(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    return cuda


def pretend() -> None:
    """Makes ``.cuda()``, ``torch.cuda`` and devices named ``cuda`` mean the CPU, from now on."""
    cuda: Any = torch.cuda
    torch.Tensor.cuda = _staying()  # type: ignore[method-assign]
    nn.Module.cuda = _staying()  # type: ignore[method-assign]
    torch.Tensor.to = _with_cpu(torch.Tensor.to)  # type: ignore[method-assign]
    nn.Module.to = _with_cpu(nn.Module.to)  # type: ignore[method-assign]
    for name in _FACTORIES:
        setattr(torch, name, _with_cpu(getattr(torch, name)))
    cuda.is_available = _told(cuda.is_available, True)
    cuda.device_count = _told(cuda.device_count, 1)
    cuda.current_device = _told(cuda.current_device, 0)
    cuda.get_device_name = _told(cuda.get_device_name, "CPU")
    for name in ("set_device", "synchronize", "empty_cache", "manual_seed", "manual_seed_all"):
        setattr(cuda, name, _told(getattr(cuda, name), None))
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        setattr(cuda, name, _told(getattr(cuda, name), 0))
    for name in _TYPES:
        setattr(cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
