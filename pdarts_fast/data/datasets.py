"""One door to every data set, by name."""

from __future__ import annotations

from pathlib import Path

from pdarts_fast.data.base import Dataset
from pdarts_fast.errors import UsageError

DATASETS = ("cifar10", "cifar100", "digits", "image-folder")


def load_dataset(
    name: str,
    data_dir: str | Path | None = None,
    *,
    image_size: int = 32,
    download: bool = False,
    checksum: bool = True,
    workers: int = 0,
    skip_broken: bool = False,
) -> Dataset:
    """Loads a whole data set into memory.

    Args:
        name: one of :data:`DATASETS`.
        data_dir: the folder of the data (``--data``); ``digits`` needs none.
        image_size: side of the square images in pixels; others are resized.
        download: fetch CIFAR into ``data_dir`` if it is not there.
        checksum: verify the MD5 sums of CIFAR files; off for files of one's own in that format.
        workers: threads that decode an ``image-folder``; 0 means one for each CPU core.
        skip_broken: leave undecodable files of an ``image-folder`` out with a warning.

    Returns:
        Training and test images with their normalisation.

    Raises:
        UsageError: an unknown name, a missing folder, a value out of range.
        RunError: data that is missing, damaged, mislabelled or too large for the memory.
    """
    _check_name(name)
    if image_size < 1:
        raise UsageError(f"--image-size {image_size}: must be at least 1 pixel")
    if workers < 0:
        raise UsageError(f"--workers {workers}: must be 0 (one for each CPU core) or more")
    if name == "digits":
        from pdarts_fast.data.digits import load_digits

        return load_digits(image_size)
    folder = _folder(name, data_dir)
    if name == "image-folder":
        from pdarts_fast.data.image_folder import load_image_folder

        return load_image_folder(
            folder, image_size=image_size, workers=workers, skip_broken=skip_broken
        )
    from pdarts_fast.data.cifar import load_cifar

    return load_cifar(name, folder, image_size=image_size, download=download, checksum=checksum)


def class_count(name: str, data_dir: str | Path | None = None) -> int:
    """How many classes a data set has, without loading its images.

    Args:
        name: one of :data:`DATASETS`.
        data_dir: the folder of the data (``--data``); looked at for an ``image-folder`` only.

    Raises:
        UsageError: an unknown name, a missing folder.
        RunError: a folder that is no image-folder.
    """
    _check_name(name)
    if name == "digits":
        from pdarts_fast.data.digits import NUM_CLASSES

        return NUM_CLASSES
    if name != "image-folder":
        from pdarts_fast.data import cifar

        return cifar.class_count(name)
    from pdarts_fast.data.image_folder import list_images

    folder = _folder(name, data_dir)
    if not folder.is_dir():
        raise UsageError(f"--data {folder}: no such folder")
    return len(list_images(folder)[0])


def _check_name(name: str) -> None:
    if name not in DATASETS:
        raise UsageError(f"--dataset {name}: unknown, choose one of {', '.join(DATASETS)}")


def _folder(name: str, data_dir: str | Path | None) -> Path:
    if data_dir is None:
        hint = "where the class folders are" if name == "image-folder" else "to find or keep it in"
        raise UsageError(f"--dataset {name} needs --data DIR, the folder {hint}")
    return Path(data_dir).expanduser()
