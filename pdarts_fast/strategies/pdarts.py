"""P-DARTS: three stages, ops dropped between them, nothing added to the alpha loss.

Source: arXiv 1904.12760.
"""

from __future__ import annotations

from pdarts_fast.strategies.base import Strategy


class PDarts(Strategy):
    """The plain strategy."""
