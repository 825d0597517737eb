"""Steps as CUDA graphs: no launch from the host between the first kernel and the last."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from pdarts_fast.errors import UsageError


class CudaGraphs:
    """Records on a side stream; all graphs share one pool of memory, as only one runs at a time.

    Implements `capture.types.Capture`.

    Args:
        device: The GPU.

    Source:
        PyTorch notes, "CUDA semantics", section "CUDA graphs".
    """

    warmups = 3
    """Enough for libraries to choose kernels and allocate their workspaces."""

    def __init__(self, device: torch.device) -> None:
        self.broken = False
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def warm_up(self, function: Callable[[], None]) -> None:
        """See `Capture`."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(self.warmups):
                    function()
            torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """See `Capture`."""
        graph = torch.cuda.CUDAGraph()
        pool = self._graphs[0].pool() if self._graphs else None
        try:
            with (
                torch.cuda.device(self._device),
                # A capture that fails leaves its stream current: this puts the old one back.
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                # Threads of loaders may allocate meanwhile: only this one must not.
                torch.cuda.graph(
                    graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"
                ),
            ):
                function()
        except RuntimeError:
            self._free_generator()
            raise
        self._graphs.append(graph)
        return graph.replay

    def _free_generator(self) -> None:
        """Give the device's generator a fresh state: the one in a failed capture is locked."""
        with torch.cuda.device(self._device):
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(torch.Generator(self._device).graphsafe_get_state())

    def release(self) -> None:
        """See `Capture`."""
        if not self._graphs:
            return
        torch.cuda.synchronize(self._device)
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
        torch.cuda.empty_cache()


def cuda_capture(device: torch.device, wanted: bool) -> CudaGraphs | None:
    """How steps on a device are captured: by CUDA graphs if `wanted` and the device is a GPU."""
    return CudaGraphs(device) if wanted and device.type == "cuda" else None


def check_cuda_graphs(device: torch.device, wanted: bool, collectives: str | None = None) -> None:
    """Refuse what a captured step cannot work with.

    Args:
        device: Where steps run.
        wanted: Value of --cuda-graphs.
        collectives: Backend of the process group that averages gradients, or None.

    Raises:
        UsageError: Something that synchronises or allocates while a step is captured is on.
    """
    if not wanted or device.type != "cuda":
        return
    obstacles = {
        "CUDA_LAUNCH_BLOCKING is set": os.environ.get("CUDA_LAUNCH_BLOCKING", "0") != "0",
        "PYTORCH_NO_CUDA_MEMORY_CACHING is set": "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ,
        "autograd looks for anomalies": torch.is_anomaly_enabled(),
        f"gradients are averaged by {collectives}, which needs the host": (
            collectives not in (None, "nccl")
        ),
    }
    for obstacle, found in obstacles.items():
        if found:
            raise UsageError(
                f"--cuda-graphs: {obstacle}; a captured step does not go with it: change that or "
                "give --no-cuda-graphs"
            )
