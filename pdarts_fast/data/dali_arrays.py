"""Batches from uint8 images in memory, augmented by DALI, on the GPU where there is one."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types

from pdarts_fast.data.base import ImageData
from pdarts_fast.data.dali_pipeline import (
    Feed,
    PipelineFailure,
    PipelinePool,
    normalisation_table,
    pipeline_options,
)
from pdarts_fast.data.loader import ArrayLoader, Batch
from pdarts_fast.data.plan import NO_AUGMENTATION, Augmentation, Plan
from pdarts_fast.errors import RunError


@pipeline_def
def array_pipeline(
    size: tuple[int, int], augmentation: Augmentation, table: np.ndarray, gpu: bool
) -> Any:
    """Pad, crop, flip, normalise, cut out; the choices come as inputs, one an image.

    Args:
        size: height and width of the images.
        augmentation: which of the operations are there.
        table: from :func:`normalisation_table`.
        gpu: the images are copied to the GPU and augmented there.

    Returns:
        float32 ``[3, H, W]`` and an int64 label, an image.
    """
    images = fn.external_source(name="images", dtype=types.UINT8, ndim=3, layout="CHW")
    labels = fn.external_source(name="labels", dtype=types.INT64, ndim=0)
    if gpu:
        images, labels = images.gpu(), labels.gpu()
    if augmentation.crop_padding:
        start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
        images = fn.slice(
            images,
            start=start,
            shape=list(size),
            axis_names="HW",
            out_of_bounds_policy="pad",
            fill_values=0,
        )
    if augmentation.flip:
        flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
        images = fn.flip(images, horizontal=flip, vertical=0)
    # One table for all channels: channel c looks up at 256 * c.
    offsets = types.Constant(np.array([0, 256, 512], np.uint16).reshape(3, 1, 1))
    images = fn.lookup_table(
        fn.cast(images, dtype=types.UINT16) + offsets,
        keys=list(range(len(table))),
        values=table.tolist(),
        dtype=types.FLOAT,
    )
    if augmentation.cutout:
        anchor, shape = (
            fn.external_source(name=name, dtype=types.FLOAT, ndim=1)
            for name in ("hole_anchor", "hole_shape")
        )
        images = fn.erase(images, anchor=anchor, shape=shape, axis_names="HW", fill_value=0.0)
    return images, labels


class DaliLoader(ArrayLoader):
    """Serves images through a DALI pipeline; its batches equal :class:`ResidentLoader`'s.

    On CUDA the uint8 images of a batch go to the GPU once and are augmented there; on the CPU the
    same pipeline runs in threads. One batch is prepared ahead. The tensors it yields are DALI's
    memory: copying them into a step's inputs is the only copy.

    Args:
        data: the images, on the CPU.
        indices: as for :class:`ArrayLoader`.
        workers: threads of the pipeline, at least one.
        options: the other arguments of :class:`ArrayLoader`.

    Raises:
        ValueError: an argument out of range.
        RunError: while iterating: DALI failed.
    """

    def __init__(
        self,
        data: ImageData,
        indices: np.ndarray | None = None,
        *,
        workers: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(data, indices, **options)
        if data.images.device.type != "cpu":
            raise ValueError(f"{data.name}: images are on {data.images.device}, wanted the CPU")
        self._host_images, self._host_labels = self._images.numpy(), self._labels.numpy()
        self._wanted = self._augmentation or NO_AUGMENTATION
        largest = self._shard.size(min(self._batch_size, self._count))
        one = Plan(*(np.zeros(1, dtype=np.int64) for _ in Plan._fields))
        height, width = self._images.shape[2:]
        build = functools.partial(
            array_pipeline,
            (height, width),
            self._wanted,
            normalisation_table(self._mean, self._std),
            self.device.type == "cuda",
            **pipeline_options(largest, workers, self.device),
        )
        self._pipelines = PipelinePool(build, self._feed(one), self.device)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        places = self._places(start)
        if not places:
            return
        plan = self._draw(epoch)
        feeds = (self._feed(plan.take(chosen)) for chosen in places)
        try:
            for outputs in self._pipelines.stream(feeds):
                yield outputs[0], outputs[1]
        except PipelineFailure as failure:
            raise RunError(
                f"--loader dali: the pipeline failed ({failure}): give --loader resident"
            ) from failure

    def _feed(self, plan: Plan) -> Feed:
        wanted = self._wanted
        feed = {"images": self._host_images[plan.rows], "labels": self._host_labels[plan.rows]}
        if wanted.crop_padding:
            start = np.stack([plan.crop_y, plan.crop_x], 1) - wanted.crop_padding
            feed["start"] = start.astype(np.int32)
        if wanted.flip:
            feed["flip"] = plan.flip.astype(np.int32)
        if wanted.cutout:
            first = np.stack([plan.hole_y, plan.hole_x], 1) - wanted.cutout // 2
            anchor = np.maximum(first, 0)
            feed["hole_anchor"] = anchor.astype(np.float32)
            feed["hole_shape"] = (first + wanted.cutout - anchor).astype(np.float32)
        return feed
