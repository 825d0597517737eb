"""Feeding pipelines: order, errors of DALI's and of the feeding side, pipelines used again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from pdarts_fast.data import dali_pipeline
from pdarts_fast.data.dali_pipeline import DEPTH, PipelineFailure, PipelinePool
from pdarts_fast.errors import RunError

dali = pytest.importorskip("nvidia.dali", reason="DALI is not installed")
CPU = torch.device("cpu")


@dali.pipeline_def
def doubling() -> Any:
    """Doubles numbers; a ninth element of a vector does not exist, so asking for it fails."""
    numbers = dali.fn.external_source(name="numbers", ndim=1, dtype=dali.types.FLOAT)
    first = dali.fn.external_source(name="first", ndim=1, dtype=dali.types.INT32)
    return dali.fn.slice(numbers * 2.0, start=first, shape=[2], axes=[0])


class Source:
    """Counts the pipelines that are built."""

    def __init__(self) -> None:
        self.built = 0

    def __call__(self) -> Any:
        self.built += 1
        return doubling(**dali_pipeline.pipeline_options(4, 1, CPU))


def feed(number: int, count: int = 4, first: int = 0) -> dict[str, np.ndarray]:
    return {
        "numbers": np.full((count, 8), number, dtype=np.float32),
        "first": np.full((count, 1), first, dtype=np.int32),
    }


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def pool(source: Source) -> PipelinePool:
    return PipelinePool(source, feed(0, 1), CPU)


def values(outputs: Iterator[tuple[torch.Tensor, ...]]) -> list[float]:
    return [float(output[0][0, 0]) for output in outputs]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_any_number_of_batches_comes_in_order(
    pool: PipelinePool, source: Source, count: int
) -> None:
    for _ in range(3):
        assert values(pool.stream(feed(i) for i in range(count))) == [2.0 * i for i in range(count)]
    assert source.built == 1


def test_the_size_of_batches_may_vary(pool: PipelinePool) -> None:
    sizes = [4, 1, 3, 4]
    outputs = list(pool.stream(feed(i, size) for i, size in enumerate(sizes)))
    assert [tuple(output[0].shape) for output in outputs] == [(size, 2) for size in sizes]


def test_one_batch_is_made_ahead(pool: PipelinePool) -> None:
    fed: list[int] = []

    def feeds() -> Iterator[dict[str, np.ndarray]]:
        for number in range(6):
            fed.append(number)
            yield feed(number)

    outputs = pool.stream(feeds())
    for taken in range(1, 5):
        next(outputs)
        assert len(fed) == taken + DEPTH - 1


def test_interleaved_iterations_have_a_pipeline_each(pool: PipelinePool, source: Source) -> None:
    first, second = pool.stream(feed(i) for i in range(5)), pool.stream(feed(i) for i in (7, 8, 9))
    mixed = [float(next(stream)[0][0, 0]) for stream in (first, second, second, first)]
    assert mixed == [0, 14, 16, 2]
    first.close()
    assert values(second) == [18]
    assert values(pool.stream([feed(3)])) == [6]
    assert source.built == 2


def test_a_failure_of_dali_is_named_and_the_next_iteration_works(
    pool: PipelinePool, source: Source
) -> None:
    with pytest.raises(PipelineFailure, match=r"(?i)out.of.bounds") as failure:
        list(pool.stream([feed(1), feed(2, first=7), feed(3)]))
    assert "\n" not in str(failure.value)
    assert values(pool.stream([feed(4)])) == [8]
    assert source.built == 2


def test_an_error_of_the_feeding_side_comes_after_the_batches_before_it(
    pool: PipelinePool, source: Source
) -> None:
    def feeds() -> Iterator[dict[str, np.ndarray]]:
        yield feed(1)
        yield feed(2)
        raise RunError("the disk is gone")

    shown: list[float] = []
    with pytest.raises(RunError, match="the disk is gone"):
        shown.extend(float(output[0][0, 0]) for output in pool.stream(feeds()))
    assert shown == [2, 4]
    assert values(pool.stream([feed(4)])) == [8]
    assert source.built == 1
