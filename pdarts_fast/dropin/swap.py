"""Gives a module another ``forward`` by giving it another class, and keeps all else as it was.

The new class is a subclass of the module's own with the same name. A pickled module is one of its
own class, so whoever loads it needs nothing of this package; a deep copy stays accelerated.
"""

from __future__ import annotations

import copy
import copyreg
from typing import Any, TypeVar

from torch import nn

HOLDER = "_pdarts_fast"
"""The attribute in which a module keeps what this package knows about it."""

_OWN_CLASS = "_pdarts_fast_own_class"
_classes: dict[tuple[type, type], type] = {}

Module = TypeVar("Module", bound=nn.Module)


class Swapped:
    """Mixed in before a module's own class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        function, args, *rest = reduced
        own = own_class(self)
        args = tuple(own if arg is type(self) else arg for arg in args)
        if function is copyreg.__newobj__ and len(args) == 1:  # type: ignore[attr-defined]
            # Pickle refuses to make another class than the object's by __newobj__.
            function, args = copyreg._reconstructor, (own, object, None)  # type: ignore[attr-defined]
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: value for name, value in rest[0].items() if name != HOLDER}
        return (function, args, *rest)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        own = own_class(self)
        holder = self.__dict__[HOLDER]
        if hasattr(own, "__deepcopy__"):
            twin = own.__deepcopy__(self, memo)
        else:
            function, args, *rest = self.__reduce_ex__(4)
            twin = function(*args)
            memo[id(self)] = twin
            if rest and rest[0] is not None:
                _set_state(twin, copy.deepcopy(rest[0], memo))
        if isinstance(twin, nn.Module):
            put_on(twin, type(self), holder.for_copy())
        return twin


def _set_state(module: Any, state: Any) -> None:
    if hasattr(module, "__setstate__"):
        module.__setstate__(state)
    else:
        module.__dict__.update(state)


def own_class(module: object) -> type:
    """The class that a module's program gave it."""
    cls = type(module)
    return cls.__dict__.get(_OWN_CLASS, cls)


def is_swapped(module: object) -> bool:
    """Whether a module has a class of ours."""
    return _OWN_CLASS in type(module).__dict__


def swapped_class(own: type, mixin: type) -> type:
    """The subclass of a module's own class whose methods of ``mixin`` go first."""
    key = (own, mixin)
    if key not in _classes:
        names = {
            "__module__": own.__module__,
            "__qualname__": own.__qualname__,
            "__doc__": own.__doc__,
            _OWN_CLASS: own,
        }
        _classes[key] = type(own.__name__, (mixin, own), names)
    return _classes[key]


def put_on(module: nn.Module, cls: type, holder: object) -> None:
    """Gives a module a swapped class and what it needs."""
    module.__class__ = cls
    module.__dict__[HOLDER] = holder


def take_off(module: nn.Module) -> None:
    """Gives a module its own class back."""
    if is_swapped(module):
        module.__class__ = own_class(module)
        module.__dict__.pop(HOLDER, None)
