"""For existing scripts: ``accelerate``, the stock module names, the script runner, log import.

``from pdarts_fast.dropin import model_search`` (or ``operations``, ``genotypes``, ``model``,
``utils``) gives a module with the names that scripts of the field import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pdarts_fast.dropin.acceleration import accelerate, restore

__all__ = ["accelerate", "restore"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from pdarts_fast.dropin import acceleration

        return getattr(acceleration, name)
    raise AttributeError(f"module 'pdarts_fast.dropin' has no attribute {name!r}")
