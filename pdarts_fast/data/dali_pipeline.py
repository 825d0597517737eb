"""DALI pipelines that are fed batch by batch, one batch ahead of the one that trains."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

log = logging.getLogger(__name__)

# Batches that a pipeline holds: one is prepared while the step runs on the other.
DEPTH = 2

Feed = Mapping[str, Any]
"""Name of an input to its batch: an array with the images along dimension 0, or a list of them."""


class PipelineFailure(Exception):
    """A pipeline stopped with an error of DALI's, whose first telling line this is."""


def missing() -> str | None:
    """Why DALI cannot run here, or None if it can."""
    try:
        found = importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        found = False
    return None if found else "DALI is not installed (pip install nvidia-dali-cuda130)"


def pipeline_options(batch_size: int, threads: int, device: torch.device) -> dict[str, Any]:
    """Arguments of ``nvidia.dali.Pipeline`` that all pipelines here share."""
    return {
        "batch_size": batch_size,
        "num_threads": max(1, threads),
        "device_id": device_index(device),
        "prefetch_queue_depth": DEPTH,
    }


def device_index(device: torch.device) -> int | None:
    """Number of a CUDA device; None for the CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


class PipelinePool:
    """Runs batches through pipelines; keeps those that are done for the next epoch.

    A pipeline serves one iteration at a time, so iterations may be interleaved. It is built and
    warmed up at its first use, by a batch whose result nobody sees.

    Args:
        build: makes a pipeline of named external sources.
        warm_up: a batch it can run.
        device: where its outputs are.
    """

    def __init__(self, build: Callable[[], Any], warm_up: Feed, device: torch.device) -> None:
        self._make = build
        self._warm_up = warm_up
        self._device = device
        self._idle: list[Any] = []

    def __del__(self) -> None:
        for pipeline in self._idle:
            _close(pipeline)

    def stream(self, feeds: Iterable[Feed]) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yields the outputs of each batch, in order, on the device.

        The tensors are DALI's own memory, not copies; they stay valid as long as they are held.

        Raises:
            PipelineFailure: DALI failed; the pipeline is dropped.
        """
        pipeline = self._idle.pop() if self._idle else self._build()
        source, more, running = iter(feeds), True, 0
        failure: Exception | None = None
        try:
            while more or running:
                while more and running < DEPTH:
                    try:
                        feed = next(source, None)
                    # An error in the making of a batch comes after the batches before it.
                    except Exception as error:
                        failure, feed = error, None
                    more = feed is not None
                    if feed is not None:
                        self._start(pipeline, feed)
                        running += 1
                if running:
                    running -= 1
                    yield self._take(pipeline)
            if failure is not None:
                raise failure
        except PipelineFailure:
            _close(pipeline)
            pipeline = None
            raise
        finally:
            # An error holds this frame: without this the two would hold each other.
            failure = None
            if pipeline is not None:
                self._put_back(pipeline, running)

    def _put_back(self, pipeline: Any, running: int) -> None:
        """Keeps a pipeline for later, without the batches that nobody waits for any more."""
        try:
            for _ in range(running):
                self._take(pipeline)
        except PipelineFailure as failure:
            # It concerns none of the batches that were asked for; the next use builds another.
            log.debug("a DALI pipeline failed after its last batch: %s", failure)
            _close(pipeline)
        else:
            self._idle.append(pipeline)

    def _build(self) -> Any:
        pipeline = self._make()
        try:
            pipeline.build()
            # The first call runs as many batches as the queue holds; each later one runs one.
            for _ in range(DEPTH):
                _feed(pipeline, self._warm_up)
            pipeline.schedule_run()
        except RuntimeError as error:
            raise PipelineFailure(_reason(error)) from error
        for _ in range(DEPTH):
            self._take(pipeline)
        return pipeline

    def _start(self, pipeline: Any, feed: Feed) -> None:
        try:
            _feed(pipeline, feed)
            pipeline.schedule_run()
        except RuntimeError as error:
            raise PipelineFailure(_reason(error)) from error

    def _take(self, pipeline: Any) -> tuple[torch.Tensor, ...]:
        """Waits for the oldest batch: on CUDA the device's current stream does, not the host."""
        cuda = self._device.type == "cuda"
        try:
            stream = torch.cuda.current_stream(self._device) if cuda else None
            outputs = pipeline.outputs(cuda_stream=stream)
        except RuntimeError as error:
            raise PipelineFailure(_reason(error)) from error
        return tuple(torch.from_dlpack(output.as_tensor()) for output in outputs)


def _close(pipeline: Any) -> None:
    """Ends a pipeline's threads and frees its memory, but not that of tensors still held.

    A pipeline is part of a reference cycle. Left to the garbage collector it would hold the
    device's memory for long, and would hang a forked process that happens to collect it.
    """
    pipeline.__del__()


def _feed(pipeline: Any, feed: Feed) -> None:
    for name, batch in feed.items():
        pipeline.feed_input(name, batch)


def _reason(error: BaseException) -> str:
    """The line of DALI's report that names the trouble."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = [i + 1 for i, line in enumerate(lines[:-1]) if line.startswith("encountered:")]
    return lines[after[0]] if after else (lines[-1] if lines else type(error).__name__)


def normalisation_table(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """``(value / 255 - mean) / std`` of every value of every channel: float32 ``[3 * 256]``.

    Made by torch, so that looking a pixel up gives what torch computes, on every device.
    """
    values = torch.arange(256, dtype=torch.float32).div_(255)
    shift, scale = (torch.tensor(part, dtype=torch.float32)[:, None] for part in (mean, std))
    return values.expand(3, -1).sub(shift).div_(scale).flatten().numpy()
