"""Steps as traces: what a CUDA graph is on a GPU, for any device, to prove a step capturable.

A trace holds every operation of one call with its tensors. Whatever the host decided, read or
computed while it was recorded is frozen in it, as it is in a CUDA graph; only the stream rules of
CUDA are not checked. Replaying is no faster than running.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

_READS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class _NoReads(TorchDispatchMode):
    """Refuses operations that give the host a value, or a shape that depends on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(tag in func.tags for tag in _READS):
            raise RuntimeError(f"{func} reads from the device within a step")
        return func(*args, **(kwargs or {}))


class TraceCapture:
    """Records by `make_fx`; implements `capture.types.Capture`.

    Attributes:
        traces: The graphs recorded since the last release.
    """

    warmups = 1

    def __init__(self) -> None:
        self.broken = False
        self.traces: list[GraphModule] = []

    def warm_up(self, function: Callable[[], None]) -> None:
        """See `Capture`."""
        for _ in range(self.warmups):
            function()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """See `Capture`.

        Raises:
            RuntimeError: The function reads a value, or copies a constant of the host, which a
                CUDA graph would have to do at every replay.
        """
        with _NoReads():
            trace = make_fx(function)()
        targets = {str(node.target) for node in trace.graph.nodes if node.op == "call_function"}
        constants = sorted(target for target in targets if "lift_fresh" in target)
        if constants:
            raise RuntimeError(f"{', '.join(constants)}: a step copies a constant of the host")
        self.traces.append(trace)

        def replay() -> None:
            with torch.no_grad():
                trace()

        return replay

    def release(self) -> None:
        """See `Capture`."""
        self.traces.clear()
