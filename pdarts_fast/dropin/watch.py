"""Notices changes to a cell that its recipe does not know about.

What was recognised once holds only as long as modules, their settings, their mode and their hooks
stay as they were. A look at each takes about a microsecond a module, before every call.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import nn

from pdarts_fast.hooks import has_hooks, have_hooks, hooks_on_all_modules

# What torch keeps in every module.
_OF_TORCH = frozenset(vars(nn.Module()))
_CHILDREN = itemgetter("_modules")
_OF_REPLICAS = ("_is_replica", "_former_parameters")
_PLAIN = (int, float, bool, str, bytes, type(None))
_CODE = (type, types.FunctionType, types.BuiltinFunctionType)
_MUTABLE = (list, dict, np.ndarray)
_RATE = "the rate of the dropouts"


class _Opaque(Exception):
    """A value is an object of which nobody knows what it does."""


def _freeze(value: Any) -> Any:
    """Data in a form that can be compared and hashed.

    Raises:
        _Opaque: It is not data.
    """
    if isinstance(value, (_PLAIN, _CODE)):
        return value
    if isinstance(value, (list, tuple)):
        return (type(value), *map(_freeze, value))
    if isinstance(value, (range, torch.dtype, torch.device)):
        return value
    if isinstance(value, dict):
        return (dict, *((_freeze(k), _freeze(v)) for k, v in value.items()))
    if isinstance(value, np.ndarray) and value.dtype != object:
        return (np.ndarray, value.shape, value.dtype.str, value.tobytes())
    raise _Opaque(type(value).__name__)


def holds_only_data(module: nn.Module) -> bool:
    """Whether all that a module holds beside what torch keeps in it is plain data."""
    try:
        for name, value in vars(module).items():
            if name not in _OF_TORCH:
                _freeze(value)
    except _Opaque:
        return False
    return True


def _attributes(module: nn.Module, ignored: Iterable[str], rate: float | None) -> dict[str, Any]:
    """What a module holds beside parameters, buffers and children, frozen; objects as they are.

    A number that repeats the rate of the skip dropouts counts as that, since scripts push the
    rate down through attributes of cells and mixed operations.
    """
    found: dict[str, Any] = {}
    replica = module.__dict__.get("_former_parameters", ())
    for name, value in vars(module).items():
        if name in _OF_TORCH or name in ignored or name in replica or name in _OF_REPLICAS:
            continue
        if rate and isinstance(value, float) and value == rate:
            found[name] = _RATE
            continue
        try:
            found[name] = _freeze(value)
        except _Opaque:
            found[name] = value
    return found


def parameters_of(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """A module's own parameters; those of a replica of ``DataParallel`` are plain attributes."""
    if "_is_replica" in module.__dict__:
        return module.__dict__["_former_parameters"]
    return module._parameters  # type: ignore[return-value]


def _rate_of(dropouts: Iterable[nn.Dropout]) -> float | None:
    """The rate of all skip dropouts of a cell, if they have one."""
    rates = {dropout.p for dropout in dropouts}
    return rates.pop() if len(rates) == 1 else None


def _shapes(parameters: Iterable[torch.Tensor | None]) -> list[Any]:
    return [None if p is None else p.shape for p in parameters]


class Watch:
    """The state in which a cell was recognised.

    All modules are compared at once, one kind of attribute after the other.

    Args:
        cell: The cell.
        own_class: The cell's own class.
        ignored: Attributes of the cell that are ours.
        custom: Modules that are called as they are: they may change as they like.
        dropouts: Skip dropouts, whose rate is read at every call.
    """

    def __init__(
        self,
        cell: nn.Module,
        own_class: type,
        ignored: tuple[str, ...],
        custom: set[nn.Module],
        dropouts: list[nn.Dropout],
    ) -> None:
        left_alone = {child for module in custom for child in module.modules()}
        self._cell, self._ignored, self._dropouts = cell, ignored, dropouts
        # The cell is the first one; what it is called by may change.
        self._modules = [module for module in cell.modules() if module not in left_alone]
        self._inner = self._modules[1:]
        self._norms = [module for module in self._modules if isinstance(module, nn.BatchNorm2d)]
        self._types = list(map(type, self._inner))
        classes: dict[Any, None] = dict.fromkeys([own_class, *self._types])
        self._forwards = [(cls, cls.forward) for cls in classes]
        # By the names that are compared: how to read them, the modules, and what was read.
        self._groups: dict[tuple[str, ...], tuple[Callable[..., Any], list[int], list[Any]]] = {}
        self._data: list[tuple[nn.Module, str, Any]] = []
        for place, module in enumerate(self._modules):
            self._remember(place, module, own_class if module is cell else type(module))
        self._sizes = [len(vars(module)) for module in self._modules]
        self._children = [dict(module._modules) for module in self._modules]
        self._shapes = _shapes(self._parameters())

    def _remember(self, place: int, module: nn.Module, cls: type) -> None:
        """Notes the attributes of a module: objects, and data that may change unassigned."""
        state = vars(module)
        found = _attributes(module, self._ignored, _rate_of(self._dropouts))
        # Torch's own layers are not expected to have their lists and dicts written to.
        open_to_change = not cls.__module__.startswith("torch.")
        data = {
            name: frozen
            for name, frozen in found.items()
            if frozen is _RATE or (open_to_change and isinstance(state[name], _MUTABLE))
        }
        self._data += [(module, name, frozen) for name, frozen in data.items()]
        names = tuple(name for name in found if name not in data)
        if not names:
            return
        read, places, values = self._groups.setdefault(names, (itemgetter(*names), [], []))
        places.append(place)
        values.append(read(state))

    def _parameters(self) -> list[torch.Tensor | None]:
        return [p for module in self._modules for p in parameters_of(module).values()]

    def hook(self) -> str | None:
        """Which module has a hook that a fused cell would not call."""
        if hooks_on_all_modules():
            return "hooks on all modules are registered"
        if not have_hooks(self._inner):
            return None
        name = next(type(module).__name__ for module in self._inner if has_hooks(module))
        return f"a hook is registered on a {name} in it"

    def mode(self) -> str | None:
        """Whether a BatchNorm is in another mode (training, evaluation) than the cell."""
        training = self._cell.training
        for norm in self._norms:
            if norm.training is not training:
                return "a BatchNorm in it is not in the mode of the cell"
        return None

    def changed(self) -> bool:
        """Whether anything is no longer as it was recognised."""
        states = [module.__dict__ for module in self._modules]
        return (
            list(map(_CHILDREN, states)) != self._children
            or list(map(type, self._inner)) != self._types
            or any(cls.forward is not forward for cls, forward in self._forwards)
            or list(map(len, states)) != self._sizes
            or not self._attributes_are_as_read(states)
            or _shapes(self._parameters()) != self._shapes
            or self._data_changed()
        )

    def _attributes_are_as_read(self, states: list[dict[str, Any]]) -> bool:
        try:
            return all(
                [read(states[place]) for place in places] == values
                for read, places, values in self._groups.values()
            )
        except (KeyError, ValueError, RuntimeError):
            # A name is gone, or an array cannot be compared.
            return False

    def _data_changed(self) -> bool:
        rate = _rate_of(self._dropouts)
        for module, name, frozen in self._data:
            value = vars(module).get(name)
            if frozen is _RATE:
                if value != rate:
                    return True
            elif not _is(value, frozen):
                return True
        return False


def _is(value: Any, frozen: Any) -> bool:
    """Whether a value is data equal to what another was when it was frozen."""
    try:
        return bool(_freeze(value) == frozen)
    except _Opaque:
        return False


def signature(
    cell: nn.Module, own_class: type, ignored: tuple[str, ...], dropouts: list[nn.Dropout]
) -> tuple[Any, ...] | None:
    """Equal for cells that compute the same from their parameters; None if that cannot be told."""
    parts: list[Any] = []
    rate = _rate_of(dropouts)
    for path, module in cell.named_modules(remove_duplicate=False):
        cls = own_class if module is cell else type(module)
        try:
            attributes = tuple(
                (name, _freeze(value)) for name, value in _attributes(module, ignored, rate).items()
            )
            hash(attributes)
        except (_Opaque, TypeError):
            return None
        buffers = tuple([None if b is None else b.shape for b in module._buffers.values()])
        forward = cls.forward  # type: ignore[attr-defined]
        shapes = tuple(_shapes(p for p in parameters_of(module).values() if p is not None))
        parts.append((path, cls, forward, attributes, shapes, buffers))
    return tuple(parts)
