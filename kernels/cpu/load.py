"""How ``kernels.backends`` sees the compiled kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from ..backends import Availability
from .library import Library, LibraryError, load

if TYPE_CHECKING:
    from torch import Tensor, nn


@lru_cache(maxsize=1)
def _load() -> Library | LibraryError:
    try:
        return load()
    except LibraryError as error:
        return error


def availability() -> Availability:
    """Whether the compiled kernels run here, and one line of reason."""
    found = _load()
    if isinstance(found, LibraryError):
        return Availability(False, str(found))
    return Availability(True, f"compiled kernels, {found.variant} ({found.width} floats a vector)")


def status() -> str:
    """One line for ``doctor``: the variant and file in use, or what is missing."""
    found = _load()
    if isinstance(found, LibraryError):
        return str(found)
    return f"{found.variant} from {found.path}"


@lru_cache(maxsize=1)
def register() -> None:
    """Makes the primitives known to ``kernels.cell`` under the name ``cpu``.

    Raises:
        LibraryError: The library does not run here.
    """
    from .. import cell_operator, chain, stem
    from .chain import CompiledChain
    from .primitives import CompiledPrimitives
    from .stem import CompiledStem
    from .whole_cell import CompiledCell

    found = _load()
    if isinstance(found, LibraryError):
        raise found
    primitives = CompiledPrimitives(found)
    cell_operator.register_backend("cpu", primitives, CompiledCell(found))
    chain.register("cpu", CompiledChain(found))
    stem.register("cpu", CompiledStem(primitives))


def prepare_cell(cell: nn.Module) -> None:
    """Looks up what the operator needs to know of a cell; see ``kernels.cell.prepare``."""
    from .. import cell as cells

    register()
    cells.prepare(cell)


def run_cell(cell: nn.Module, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
    """What ``Cell.forward`` returns; see ``kernels.cell.run``."""
    from .. import cell as cells

    return cells.run("cpu", cell, s0, s1, weights)
