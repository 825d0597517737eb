"""One's own images: a folder a class, decoded once into memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from pdarts_fast.data.base import (
    Dataset,
    ImageData,
    channel_statistics,
    hash_order,
    require_classes,
    stratified_split,
)
from pdarts_fast.data.memory import require_memory
from pdarts_fast.errors import RunError, UsageError

log = logging.getLogger(__name__)

_NAME = "image-folder"
_EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Images a thread takes at once: enough to hide the hand-over, small enough to share evenly.
_TASK = 32


@dataclass(frozen=True)
class Listing:
    """Image files with their labels, in the order they will be stored in."""

    where: Path
    files: list[Path]
    labels: np.ndarray


def load_image_folder(folder: Path, *, image_size: int, workers: int, skip_broken: bool) -> Dataset:
    """Loads images from ``train/<class>/`` and ``test/<class>/`` (or ``val``), or ``<class>/``.

    Without a ``train`` folder, a fifth of each class is held out for testing, chosen by a hash of
    the file's path. Files are found at any depth below a class folder; hidden ones and those
    without an image's extension are ignored. The training images are stored in the order of that
    hash, so that splitting them by index gives both halves all classes.

    Each image is turned upright (EXIF), converted to RGB, scaled bilinearly until its shorter
    side is ``image_size``, and cropped at the centre.

    Args:
        folder: the folder given with ``--data``.
        image_size: side in pixels.
        workers: decoding threads, 0 for one a CPU core.
        skip_broken: leave undecodable files out with a warning.

    Returns:
        The data set, mean and std from its training images.

    Raises:
        UsageError: ``folder`` does not exist.
        RunError: fewer than two classes, an empty class, an undecodable file, too many images.
    """
    if not folder.is_dir():
        raise UsageError(f"--data {folder}: no such folder")
    classes, listings = list_images(folder)
    require_memory(str(folder), sum(len(part.files) for part in listings), image_size)
    train, test = (
        _decode_all(part, classes, image_size, workers, skip_broken) for part in listings
    )
    require_classes(_NAME, str(listings[0].where), train.labels.numpy(), classes)
    if not len(test):
        raise RunError(f"{listings[1].where}: no usable test image: add some to each class")
    mean, std = channel_statistics(train.images)
    return Dataset(train, test, mean, std)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_dir() and not path.name.startswith((".", "__MACOSX"))
    )


def list_images(folder: Path) -> tuple[tuple[str, ...], tuple[Listing, Listing]]:
    """Finds classes and files: ``(classes, (train, test))``."""
    train_folder = folder / "train"
    if not (train_folder.is_dir() and _subfolders(train_folder)):
        classes = _class_names(folder)
        whole = _list_classes(folder, classes)
        keys = [path.relative_to(folder).as_posix() for path in whole.files]
        parts = stratified_split(whole.labels.tolist(), keys)
        if not len(parts[1]):
            raise RunError(f"{folder}: every class has a single image: none is left for testing")
        train, test = (
            Listing(folder, [whole.files[row] for row in part], whole.labels[part])
            for part in parts
        )
        return classes, (train, test)
    held_out = [path for path in (folder / "test", folder / "val") if path.is_dir()]
    if not held_out:
        raise RunError(
            f"{folder}: has train/ but neither test/ nor val/: add one of them, or give --data "
            f"{train_folder} to hold a fifth of it out"
        )
    classes = _class_names(train_folder)
    unknown = [path.name for path in _subfolders(held_out[0]) if path.name not in classes]
    if unknown:
        raise RunError(
            f"{held_out[0] / unknown[0]}: this class is not in {train_folder}: rename or remove it"
        )
    train = _list_classes(train_folder, classes)
    return classes, (train, _list_classes(held_out[0], classes, may_lack=True))


def _class_names(folder: Path) -> tuple[str, ...]:
    names = tuple(path.name for path in _subfolders(folder))
    if len(names) < 2:
        raise RunError(
            f"{folder}: has {len(names)} class folders, wanted at least 2: put the images of each "
            f"class into a folder of its own there"
        )
    return names


def _list_classes(folder: Path, classes: Sequence[str], *, may_lack: bool = False) -> Listing:
    """Lists the image files below each class folder, in the order of their paths' hash."""
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = [
            Path(parent, file)
            for parent, _, entries in os.walk(folder / name)
            for file in entries
            if file.lower().endswith(_EXTENSIONS) and not file.startswith(".")
        ]
        if not found and not may_lack:
            raise RunError(
                f"{folder / name}: no image in this class folder "
                f"({', '.join(_EXTENSIONS)}): add images or remove the folder"
            )
        if not found:
            log.warning("%s: no image of class %r to test with", folder, name)
        files += found
        labels += [label] * len(found)
    order = hash_order([path.relative_to(folder).as_posix() for path in files])
    return Listing(folder, [files[row] for row in order], np.array(labels, dtype=np.int64)[order])


def _decode_all(
    listing: Listing, classes: tuple[str, ...], image_size: int, workers: int, skip_broken: bool
) -> ImageData:
    """Decodes every file in a pool of threads (PIL releases the interpreter lock)."""
    count = len(listing.files)
    images = np.empty((count, 3, image_size, image_size), dtype=np.uint8)

    def decode_some(first: int) -> list[tuple[int, str]]:
        broken = []
        for row in range(first, min(first + _TASK, count)):
            try:
                images[row] = _decode(listing.files[row], image_size).transpose(2, 0, 1)
            # Decoders of broken files raise OSError, SyntaxError, struct.error and many others.
            except Exception as error:
                broken.append((row, f"{listing.files[row]}: not a readable image ({error})"))
                if not skip_broken:
                    break
        return broken

    lost: set[int] = set()
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for broken in pool.map(decode_some, range(0, count, _TASK)):
            for row, message in broken:
                if not skip_broken:
                    raise RunError(
                        f"{message}: replace or remove it, or leave it out with --skip-broken"
                    )
                log.warning("%s: skipped", message)
                lost.add(row)
    kept = [row for row in range(count) if row not in lost]
    if lost:
        # Row by row towards the front: a fancy index would hold a second copy of all images.
        for target, source in enumerate(kept):
            images[target] = images[source]
    labels = torch.from_numpy(listing.labels[kept])
    return ImageData(_NAME, torch.from_numpy(images[: len(kept)]), labels, classes)


def _decode(path: Path, image_size: int) -> np.ndarray:
    """Decodes one file to uint8 ``[image_size, image_size, 3]``."""
    with Image.open(path) as image:
        # JPEG only: decodes at 1/2, 1/4 or 1/8 of the size while that still leaves twice the
        # pixels needed, which the resize below then averages.
        image.draft("RGB", (2 * image_size, 2 * image_size))
        upright = to_rgb(ImageOps.exif_transpose(image))
    width, height = upright.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    # Resizing the centre square alone is resizing the image and cropping, without ever holding
    # the whole resized image (a 1×10000 strip would become huge).
    square = upright.resize(
        (image_size, image_size),
        Image.Resampling.BILINEAR,
        box=(left, top, left + side, top + side),
    )
    return np.asarray(square)


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts to 8-bit RGB; 16-bit grey keeps its upper 8 bits, where PIL would saturate."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("32-bit pixels beyond 16 bits: convert it to 8 or 16 bits a channel")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels: convert it to 8 or 16 bits a channel")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
