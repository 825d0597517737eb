"""CIFAR-10 and CIFAR-100 from their "python version" files, extracted or still in the archive."""

from __future__ import annotations

import hashlib
import logging
import pickle
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pdarts_fast.data import safe_pickle
from pdarts_fast.data.base import Dataset, ImageData, resize_images
from pdarts_fast.data.memory import require_memory
from pdarts_fast.errors import RunError, UsageError

log = logging.getLogger(__name__)

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
# Far above any real member (153 MB): keeps a forged archive from filling the memory.
_MAX_MEMBER_BYTES = 1 << 30


@dataclass(frozen=True)
class _Variant:
    name: str
    torchvision_class: str
    num_classes: int
    label_key: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


# Mean and standard deviation of the 50,000 training images, as published and commonly used.
_VARIANTS = {
    "cifar10": _Variant(
        "cifar10",
        "CIFAR10",
        10,
        "labels",
        (0.49139968, 0.48215827, 0.44653124),
        (0.24703233, 0.24348505, 0.26158768),
    ),
    "cifar100": _Variant(
        "cifar100",
        "CIFAR100",
        100,
        "fine_labels",
        (0.5071, 0.4867, 0.4408),
        (0.2675, 0.2565, 0.2761),
    ),
}


def class_count(name: str) -> int:
    """Classes of ``cifar10`` or ``cifar100``."""
    return _VARIANTS[name].num_classes


def load_cifar(
    name: str, folder: Path, *, image_size: int, download: bool, checksum: bool
) -> Dataset:
    """Loads CIFAR-10 or CIFAR-100.

    Looks for the files in ``folder/cifar-10-batches-py`` (``cifar-100-python``), in ``folder``
    itself, then inside ``folder/cifar-10-python.tar.gz``. Archives are read in memory, member by
    member: nothing is written to disk.

    Args:
        name: ``cifar10`` or ``cifar100``.
        folder: the folder given with ``--data``.
        image_size: side in pixels; other than 32 resizes.
        download: fetch the archive into ``folder`` if the files are in none of these places.
        checksum: compare every file's MD5 with torchvision's table.

    Returns:
        The data set, images in the order of the files, with the published mean and std.

    Raises:
        UsageError: ``folder`` does not exist.
        RunError: a file is missing, damaged, or holds other things than CIFAR images.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html (the file format).
    """
    variant = _VARIANTS[name]
    # The file names, MD5 sums and address have one home: torchvision, which also downloads.
    from torchvision import datasets

    table = getattr(datasets, variant.torchvision_class)
    sums = dict([*table.train_list, *table.test_list, (table.meta["filename"], table.meta["md5"])])
    files = _find_files(table, folder, list(sums), download)
    if checksum:
        for file, (path, content) in files.items():
            _verify(path, content, sums[file])
    classes = _read_classes(*files[table.meta["filename"]], table.meta["key"], variant)
    parts = [
        [_read_batch(*files[file], variant) for file, _ in listed]
        for listed in (table.train_list, table.test_list)
    ]
    files.clear()
    require_memory(name, sum(len(batch[1]) for part in parts for batch in part), image_size)
    train, test = (
        ImageData(
            name,
            resize_images(
                torch.from_numpy(np.concatenate([batch[0] for batch in part])), image_size
            ),
            torch.from_numpy(np.concatenate([batch[1] for batch in part])),
            classes,
        )
        for part in parts
    )
    return Dataset(train, test, variant.mean, variant.std)


def _find_files(
    table: Any, folder: Path, wanted: list[str], download: bool
) -> dict[str, tuple[str, bytes]]:
    """Reads every wanted file from the first place that has it: ``{file: (path, content)}``."""
    extracted = folder / table.base_folder
    places = [place for place in (extracted, folder) if (place / wanted[0]).is_file()]
    # A folder of which only some files are left counts too, to name what it lacks.
    places = places or ([extracted] if extracted.is_dir() else [])
    missing = [file for place in places[:1] for file in wanted if not (place / file).is_file()]
    if places and not missing:
        return {file: _read_file(places[0] / file) for file in wanted}
    # `--data` may name the extracted folder itself, which then lies beside the archive.
    archives = [folder / table.filename]
    if folder.name == table.base_folder:
        archives.append(folder.parent / table.filename)
    archive = next((path for path in archives if path.is_file()), None)
    if archive is None and download:
        archive = _download(table, folder)
    if archive is not None:
        return _read_archive(archive, table.base_folder, wanted)
    if missing:
        raise RunError(
            f"{places[0] / missing[0]}: missing: extract {table.filename} again, "
            f"or add --download to fetch it"
        )
    if not folder.is_dir():
        raise UsageError(f"--data {folder}: no such folder: create it, or add --download")
    raise RunError(
        f"{folder}: holds neither {table.base_folder}/ nor {table.filename}: "
        f"correct --data, or add --download to fetch it"
    )


def _read_file(path: Path) -> tuple[str, bytes]:
    try:
        return str(path), path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read_archive(
    archive: Path, base_folder: str, wanted: list[str]
) -> dict[str, tuple[str, bytes]]:
    """Reads the wanted regular members into memory in one pass; all others are ignored."""
    log.info("reading %s in memory; extract it to start faster", archive)
    names = {f"{base_folder}/{file}": file for file in wanted}
    found: dict[str, tuple[str, bytes]] = {}
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                file = names.get(member.name.removeprefix("./"))
                if file is None or not member.isfile():
                    continue
                if member.size > _MAX_MEMBER_BYTES:
                    raise RunError(
                        f"{archive}: {member.name} is {member.size} bytes, too large for CIFAR"
                    )
                stream = tar.extractfile(member)
                if stream is not None:
                    found[file] = (f"{archive}:{member.name}", stream.read())
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise RunError(
            f"{archive}: damaged or incomplete archive ({error}): delete it and fetch it again "
            f"with --download"
        ) from error
    for file in wanted:
        if file not in found:
            raise RunError(
                f"{archive}: has no {base_folder}/{file}: delete it and fetch it again "
                f"with --download"
            )
    return found


def _download(table: Any, folder: Path) -> Path:
    """Fetches the archive with torchvision's downloader, which checks its MD5."""
    from torchvision.datasets.utils import download_url

    try:
        folder.mkdir(parents=True, exist_ok=True)
        download_url(table.url, str(folder), table.filename, table.tgz_md5)
    except (OSError, RuntimeError) as error:
        raise RunError(
            f"{table.url}: download into {folder} failed ({error}): check the connection and "
            f"the disk, or fetch it by hand and put it there"
        ) from error
    return folder / table.filename


def _verify(path: str, content: bytes, expected: str) -> None:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise RunError(
            f"{path}: MD5 is {found}, wanted {expected}: the file is damaged or altered; delete "
            f"it and add --download, or turn the check off with --no-checksum if it is yours"
        )


def _load(path: str, content: bytes) -> dict[Any, Any]:
    """Unpickles one file safely into a dictionary."""
    try:
        loaded = safe_pickle.loads(content)
    except pickle.UnpicklingError as error:
        raise RunError(
            f"{path}: not a readable CIFAR file ({error}): delete it and fetch it again "
            f"with --download"
        ) from error
    if not isinstance(loaded, dict):
        raise RunError(f"{path}: holds a {type(loaded).__name__}, wanted a dictionary")
    return loaded


def _read_classes(path: str, content: bytes, key: str, variant: _Variant) -> tuple[str, ...]:
    names = _load(path, content).get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RunError(f"{path}: has no list of class names under {key!r}")
    if len(names) != variant.num_classes:
        raise RunError(
            f"{path}: names {len(names)} classes, {variant.name} has {variant.num_classes}: "
            f"for other data use --dataset image-folder"
        )
    return tuple(names)


def _read_batch(path: str, content: bytes, variant: _Variant) -> tuple[np.ndarray, np.ndarray]:
    """Reads one batch file.

    Returns:
        images uint8 ``[n, 3, 32, 32]`` and labels int64 ``[n]``.
    """
    batch = _load(path, content)
    pixels = batch.get("data")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
        kind = getattr(pixels, "dtype", type(pixels).__name__)
        raise RunError(f"{path}: 'data' must be a uint8 array, got {kind}")
    if pixels.ndim != 2 or pixels.shape[1] != _PIXELS or not len(pixels):
        raise RunError(
            f"{path}: 'data' has shape {list(pixels.shape)}, wanted [n, {_PIXELS}] "
            f"(images of 3×{_SIDE}×{_SIDE}): for other sizes use --dataset image-folder"
        )
    labels = batch.get(variant.label_key)
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise RunError(f"{path}: has no list of integer labels under {variant.label_key!r}")
    if len(labels) != len(pixels):
        raise RunError(f"{path}: has {len(pixels)} images but {len(labels)} labels")
    wrong = next((label for label in labels if not 0 <= label < variant.num_classes), None)
    if wrong is not None:
        raise RunError(
            f"{path}: label {wrong} is out of range: {variant.name} has labels 0 to "
            f"{variant.num_classes - 1}"
        )
    return pixels.reshape(-1, 3, _SIDE, _SIDE), np.array(labels, dtype=np.int64)
