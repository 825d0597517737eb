"""Fast, faithful P-DARTS: progressive differentiable architecture search (arXiv 1904.12760).

The public names below load on first use, so ``import pdarts_fast`` (and with it the command
line) does not import torch.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdarts_fast.version import __version__

if TYPE_CHECKING:
    from pdarts_fast.dropin.acceleration import accelerate
    from pdarts_fast.genotype import Genotype
    from pdarts_fast.search_space import derive
    from pdarts_fast.supernet import Network

__all__ = ["Genotype", "Network", "__version__", "accelerate", "derive"]

_LAZY = {
    "Genotype": "pdarts_fast.genotype",
    "accelerate": "pdarts_fast.dropin.acceleration",
    "derive": "pdarts_fast.search_space",
    "Network": "pdarts_fast.supernet",
}

# In a checkout, `kernels/` lies beside this folder and is installed as `pdarts_fast.kernels`.
# Python run from the checkout's root finds this source folder before the installed package, so
# the sub-package has to be reachable from here too.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "kernels" / "backends.py").is_file() and (_checkout / "setup.py").is_file():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'pdarts_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
