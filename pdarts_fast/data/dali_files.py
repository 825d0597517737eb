"""Batches read from image files through DALI: decoded and augmented on the GPU if there is one."""

from __future__ import annotations

import collections
import functools
import io
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from pdarts_fast.data.dali_pipeline import Feed, PipelineFailure, PipelinePool, pipeline_options
from pdarts_fast.data.files import FileLoader, decode, unreadable
from pdarts_fast.data.image_folder import Listing
from pdarts_fast.data.loader import Batch
from pdarts_fast.data.views import View
from pdarts_fast.errors import RunError

# Batches whose files are read ahead of the one that is handed to the pipeline.
READ_AHEAD = 2
# What DALI decodes to the pixels that Pillow gives; all else is decoded by Pillow.
_DECODED = {("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "L"), ("BMP", "RGB")}
_ORIENTATION = 0x112
_END_OF_IMAGE, _START_OF_SCAN = b"\xff\xd9", b"\xff\xda"


@pipeline_def
def file_pipeline(
    side: int,
    jitter: bool,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    gpu: bool,
) -> Any:
    """Decode a window, scale, crop, colour, flip, normalise; the choices come as inputs.

    Args:
        side: of the result in pixels.
        jitter: whether colours change.
        mean: per-channel mean in 0..1.
        std: per-channel standard deviation in 0..1.
        gpu: nvJPEG decodes (on the CPU what it cannot) and the GPU does the rest.

    Returns:
        float32 ``[3, side, side]`` and an int64 label, an image.
    """

    def choice(name: str, dtype: Any, ndim: int) -> Any:
        return fn.external_source(name=name, dtype=dtype, ndim=ndim)

    files, labels = choice("files", types.UINT8, 1), choice("labels", types.INT64, 0)
    images = fn.decoders.image_slice(
        files,
        device="mixed" if gpu else "cpu",
        start=choice("corner", types.INT32, 1),
        shape=choice("extent", types.INT32, 1),
        axis_names="HW",
        output_type=types.RGB,
        # libjpeg's interpolation of the colours, so that CPU and GPU give the same pixels.
        jpeg_fancy_upsampling=True,
    )
    images = fn.resize(
        images,
        size=choice("resized", types.FLOAT, 1),
        interp_type=types.INTERP_LINEAR,
        antialias=True,
        dtype=types.UINT8,
    )
    window = choice("window", types.INT32, 1)
    images = fn.slice(images, start=window, shape=[side, side], axis_names="HW")
    if jitter:
        images = fn.color_twist(
            images,
            brightness=choice("brightness", types.FLOAT, 0),
            contrast=choice("contrast", types.FLOAT, 0),
            saturation=choice("saturation", types.FLOAT, 0),
            hue=choice("hue", types.FLOAT, 0),
        )
    images = fn.crop_mirror_normalize(
        images,
        mirror=choice("flip", types.INT32, 0),
        mean=[255 * value for value in mean],
        std=[255 * value for value in std],
        output_layout="CHW",
        dtype=types.FLOAT,
    )
    return images, labels.gpu() if gpu else labels


class _File(NamedTuple):
    """An encoded image, its upright size in pixels and its view; or what is wrong with it."""

    data: bytes
    view: View | None
    problem: str | None = None


class DaliFileLoader(FileLoader):
    """Serves image files through a DALI pipeline.

    Threads read the files ahead and draw the choices; the pipeline decodes and augments one batch
    ahead. Windows, flips and strengths of the colours are those of :class:`StreamingLoader`; the
    pixels differ by the rounding of the scaling and by the order and maths of the colours
    (docs/loaders.md).

    Args:
        listing: the files and labels.
        options: the other arguments of :class:`FileLoader`; ``workers`` are threads, at least one
            is used.

    Raises:
        ValueError: an argument out of range.
        RunError: while iterating: a file cannot be decoded, or DALI failed.
    """

    def __init__(self, listing: Listing, **options: Any) -> None:
        super().__init__(listing, **options)
        augmentation = self._views.augmentation
        self._jitter = augmentation is not None and any(augmentation.jitter)
        largest = self._shard.size(min(self._batch_size, self._count))
        grey = io.BytesIO()
        Image.new("RGB", (64, 64), (127, 127, 127)).save(grey, "JPEG")
        sample = _File(grey.getvalue(), self._views.of(64, 64, (0, "warm-up"), 0))
        build = functools.partial(
            file_pipeline,
            self._views.image_size,
            self._jitter,
            self._mean,
            self._std,
            self.device.type == "cuda",
            **pipeline_options(largest, self._workers, self.device),
        )
        warm_up = self._feed([sample], np.zeros(1, dtype=np.int64))
        self._pipelines = PipelinePool(build, warm_up, self.device)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        rows = self._rows(epoch, start)
        key = (*self._key, epoch)
        done = 0
        with ThreadPoolExecutor(max(1, self._workers)) as pool:
            while done < len(rows):
                try:
                    for outputs in self._pipelines.stream(self._feeds(rows[done:], key, pool)):
                        done += 1
                        yield outputs[0], outputs[1]
                except PipelineFailure:
                    # Some file of this batch, or of the one after it, passed the checks of its
                    # header but cannot be decoded: this batch is decoded without DALI.
                    done += 1
                    yield self._decoded_by_pillow(rows[done - 1], key, pool)

    def _feeds(
        self, rows: list[np.ndarray], key: tuple[int | str, ...], pool: ThreadPoolExecutor
    ) -> Iterator[Feed]:
        """Reads the files of each batch, some batches ahead."""
        reading: collections.deque[list[Future[_File]]] = collections.deque()
        submitted = 0
        try:
            for batch in rows:
                while submitted < len(rows) and len(reading) <= READ_AHEAD:
                    reading.append(
                        [pool.submit(self._read, int(row), key) for row in rows[submitted]]
                    )
                    submitted += 1
                yield self._checked([file.result() for file in reading.popleft()], batch)
        finally:
            for files in reading:
                for file in files:
                    file.cancel()

    def _checked(self, files: list[_File], rows: np.ndarray) -> Feed:
        shown = self._shown([file.problem for file in files])
        return self._feed([files[place] for place in shown], rows[shown])

    def _decoded_by_pillow(
        self, rows: np.ndarray, key: tuple[int | str, ...], pool: ThreadPoolExecutor
    ) -> Batch:
        files = list(pool.map(lambda row: self._read(int(row), key, True), rows))
        try:
            (batch,) = self._pipelines.stream([self._checked(files, rows)])
        except PipelineFailure as failure:
            raise RunError(
                f"--loader dali: the pipeline failed ({failure}): give --loader torchvision"
            ) from failure
        return batch[0], batch[1]

    def _read(self, row: int, key: tuple[int | str, ...], by_pillow: bool = False) -> _File:
        """Reads one file and looks at its header."""
        path = os.fsdecode(self._paths[row])
        try:
            with open(path, "rb") as file:
                data = file.read()
            data, height, width = _prepared(data, by_pillow)
        # Decoders of broken files raise OSError, SyntaxError, struct.error and many others.
        except Exception as error:
            return _File(b"", None, unreadable(path, error))
        return _File(data, self._views.of(height, width, key, row))

    def _feed(self, files: list[_File], rows: np.ndarray) -> Feed:
        views = [file.view for file in files if file.view is not None]
        boxes = np.array([view.box for view in views], dtype=np.int32)
        feed: dict[str, Any] = {
            "files": [np.frombuffer(file.data, dtype=np.uint8) for file in files],
            "labels": self._labels.numpy()[rows],
            "corner": boxes[:, :2].copy(),
            "extent": boxes[:, 2:].copy(),
            "resized": np.array([view.resized for view in views], dtype=np.float32),
            "window": np.array([view.window for view in views], dtype=np.int32),
            "flip": np.array([view.flip for view in views], dtype=np.int32),
        }
        if self._jitter:
            colours = np.array([view.colours for view in views], dtype=np.float32)
            colours[:, 3] *= 360  # degrees
            for place, name in enumerate(("brightness", "contrast", "saturation", "hue")):
                feed[name] = colours[:, place].copy()
        return feed


def _prepared(data: bytes, by_pillow: bool) -> tuple[bytes, int, int]:
    """Bytes that DALI decodes to what Pillow would, with the upright height and width.

    Formats and colour modes that DALI does not know or decodes otherwise are decoded here and
    handed on as an uncompressed PPM, and so is everything if ``by_pillow``. DALI shows what is
    there of a cut-off JPEG; one that lacks its end is decoded here too, which refuses it.
    """
    with Image.open(io.BytesIO(data)) as image:
        known = (image.format, image.mode) in _DECODED and "transparency" not in image.info
        turn = image.getexif().get(_ORIENTATION, 1) if known else 1
        height, width = image.height, image.width
        whole = image.format != "JPEG" or data.rfind(_END_OF_IMAGE) > data.rfind(_START_OF_SCAN)
        if known and whole and not by_pillow and (turn == 1 or image.format == "JPEG"):
            return (data, width, height) if turn >= 5 else (data, height, width)
        upright = decode(io.BytesIO(data))
    pixels = io.BytesIO()
    upright.save(pixels, "PPM")
    return pixels.getvalue(), upright.height, upright.width
