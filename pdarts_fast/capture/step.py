"""The graphs of one step: static inputs, recording without a trace, replay."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pdarts_fast.capture.types import Capture
from pdarts_fast.run.checkpoint import random_state, set_random_state

log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]
"""Images float [B, 3, H, W] and labels int64 [B]."""

MOST_GRAPHS = 8
"""Graphs of a stage: two kinds of steps, with full and with last batches, and some to spare."""


class Capturable(Protocol):
    """What a step must give so that it can be captured."""

    @property
    def device(self) -> torch.device: ...

    def prepare(self) -> None: ...

    def state_tensors(self) -> list[Tensor]: ...

    def clear_gradients(self) -> None: ...


class _Snapshot:
    """The values of all that a step changes, and the random generators."""

    def __init__(self, step: Capturable) -> None:
        self._device = step.device
        self._tensors = [tensor.detach() for tensor in step.state_tensors()]
        self._values = [tensor.clone() for tensor in self._tensors]
        self._random = random_state(step.device)

    def restore(self) -> None:
        for tensor, value in zip(self._tensors, self._values, strict=True):
            tensor.copy_(value)
        set_random_state(self._random, self._device)


class _Graph:
    """A recorded call and the batches that it reads."""

    def __init__(self, inputs: list[Tensor], replay: Callable[[], None]) -> None:
        self._inputs = inputs
        self._replay = replay

    def run(self, batches: tuple[Batch, ...]) -> None:
        for static, value in zip(self._inputs, _flat(batches), strict=True):
            static.copy_(value, non_blocking=True)
        self._replay()


class StepGraphs:
    """Replays the functions of a step, recording each the first time that it is called.

    There is a graph a function and shape of batches, so the smaller batch at the end of an epoch
    has one of its own. Recording leaves parameters, optimisers, sums, statistics and random
    generators as they were. If it fails, a warning says why, and this and all later steps run
    eagerly.

    Args:
        step: Owns the tensors that the functions change.
        capture: Records.
    """

    def __init__(self, step: Capturable, capture: Capture) -> None:
        self._step = step
        self._capture = capture
        self._graphs: dict[tuple[object, ...], _Graph] = {}

    def run(self, function: Callable[..., None], batches: tuple[Batch, ...]) -> None:
        """Call ``function(*batches)``, from its graph if there is one or there can be one."""
        key = (function.__name__, *((tensor.shape, tensor.dtype) for tensor in _flat(batches)))
        graph = self._graphs.get(key)
        if graph is None and len(self._graphs) < MOST_GRAPHS and not self._capture.broken:
            graph = self._record(function, batches)
            if graph is not None:
                self._graphs[key] = graph
        if graph is None:
            function(*batches)
        else:
            graph.run(batches)

    def close(self) -> None:
        """Free all graphs; a later call records anew."""
        self._graphs.clear()
        self._capture.release()

    def _record(self, function: Callable[..., None], batches: tuple[Batch, ...]) -> _Graph | None:
        step, capture = self._step, self._capture
        step.prepare()
        static = tuple((images.clone(), labels.clone()) for images, labels in batches)
        before = _Snapshot(step)
        try:
            capture.warm_up(lambda: function(*static))
            replay = capture.record(lambda: function(*static))
        except RuntimeError as error:
            capture.broken = True
            step.clear_gradients()
            log.warning(
                "a step cannot be captured, steps run eagerly from here on (%s); "
                "--no-cuda-graphs does not try",
                _reason(error),
            )
            return None
        finally:
            before.restore()
        return _Graph(_flat(static), replay)


def _reason(error: BaseException) -> str:
    """The first line of what went wrong first: ending a broken capture is an error of its own."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _flat(batches: tuple[Batch, ...]) -> list[Tensor]:
    return [tensor for batch in batches for tensor in batch]
