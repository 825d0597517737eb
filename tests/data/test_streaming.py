"""The streaming loader: same images whatever the workers and the start, torchvision's values."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional

from pdarts_fast.data import Loader
from pdarts_fast.data.streaming import (
    MEAN,
    STD,
    StreamAugmentation,
    StreamingLoader,
    find_images,
)
from pdarts_fast.errors import RunError, UsageError

SIZE = 24


def loader(folder: Path, **changes: Any) -> StreamingLoader:
    options: dict[str, Any] = {
        "batch_size": 4,
        "image_size": SIZE,
        "augmentation": StreamAugmentation(),
        "seed": 3,
        "stream": "train",
        "shuffle": True,
        "device": "cpu",
    }
    return StreamingLoader(find_images(folder).train, **options | changes)


def batches(source: StreamingLoader, epoch: int = 0, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    return list(source.epoch(epoch, start))


def assert_same(got: list[tuple[Tensor, Tensor]], want: list[tuple[Tensor, Tensor]]) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_it_is_a_loader_with_all_images_in_batches(jpeg_folder: Path) -> None:
    source = loader(jpeg_folder)
    assert isinstance(source, Loader)
    found = batches(source)
    assert (source.num_images, len(source), len(found)) == (18, 5, 5)
    assert [tuple(images.shape) for images, _ in found] == [(4, 3, SIZE, SIZE)] * 4 + [
        (2, 3, SIZE, SIZE)
    ]
    assert Counter(torch.cat([labels for _, labels in found]).tolist()) == {0: 6, 1: 6, 2: 6}


def test_labels_are_those_of_the_folders(jpeg_folder: Path) -> None:
    files = find_images(jpeg_folder)
    assert files.classes == ("blue", "green", "red")
    assert len(files.test.files) == 9
    plain = StreamAugmentation(flip=True, jitter=(0.0, 0.0, 0.0, 0.0))
    for images, labels in batches(loader(jpeg_folder, augmentation=plain)):
        strongest = images.mean(dim=(2, 3)).argmax(1)
        assert (strongest == 2 - labels).all()


@pytest.mark.parametrize("start", [1, 4, 5])
def test_start_skips_batches_and_changes_none(jpeg_folder: Path, start: int) -> None:
    source = loader(jpeg_folder)
    assert_same(batches(source, 2, start), batches(source, 2)[start:])


@pytest.mark.parametrize("workers", [1, 2])
def test_number_of_workers_changes_nothing(jpeg_folder: Path, workers: int) -> None:
    assert_same(batches(loader(jpeg_folder, workers=workers), 1), batches(loader(jpeg_folder), 1))


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"stream": "other"}], ids=["another seed", "another stream"]
)
def test_seed_and_stream_draw_anew(jpeg_folder: Path, change: dict[str, Any]) -> None:
    one, other = batches(loader(jpeg_folder)), batches(loader(jpeg_folder, **change))
    assert not torch.equal(one[0][0], other[0][0])


def test_an_image_is_augmented_anew_each_epoch(jpeg_folder: Path) -> None:
    source = loader(jpeg_folder, shuffle=False)
    first, second = batches(source, 0), batches(source, 1)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0][0], second[0][0])


def test_the_order_of_augmentation_does_not_matter_to_an_image(jpeg_folder: Path) -> None:
    """Choices belong to the image: in batches of another size each image is the same."""
    small, large = loader(jpeg_folder, batch_size=4), loader(jpeg_folder, batch_size=18)
    together = torch.cat([images for images, _ in batches(small)])
    assert torch.equal(together, batches(large)[0][0])


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generator_is_left_alone(jpeg_folder: Path, workers: int) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(loader(jpeg_folder, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_is_resize_and_centre_crop(jpeg_folder: Path) -> None:
    listing = find_images(jpeg_folder).test
    source = StreamingLoader(
        listing, batch_size=2, image_size=56, augmentation=None, seed=0, stream="test",
        shuffle=False, device="cpu",
    )  # fmt: skip
    images, labels = next(iter(source.epoch(0)))
    for row in range(2):
        picture = functional.center_crop(functional.resize(Image.open(listing.files[row]), 64), 56)
        want = functional.normalize(functional.to_tensor(picture), MEAN, STD)
        torch.testing.assert_close(images[row], want, rtol=0, atol=1e-6)
        assert labels[row] == listing.labels[row]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_file_is_named_in_one_line(
    jpeg_folder: Path, tmp_path: Path, workers: int
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(jpeg_folder, folder)
    (folder / "train" / "red" / "0.jpg").write_bytes(b"no image")
    with pytest.raises(RunError, match=r"red/0\.jpg: not a readable image") as caught:
        batches(loader(folder, workers=workers))
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        find_images(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda source: source.epoch(-1), "epoch must be 0 or more"),
        (lambda source: source.epoch(0, 6), "start must be between 0 and 5"),
    ],
    ids=["epoch", "start"],
)
def test_wrong_arguments_are_refused(jpeg_folder: Path, call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(loader(jpeg_folder))
