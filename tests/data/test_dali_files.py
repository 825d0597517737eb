"""DALI's loader of image files: torchvision's windows, its pixels up to rounding, its errors."""

from __future__ import annotations

import io
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pdarts_fast.data import Loader
from pdarts_fast.data.choose import file_loader
from pdarts_fast.data.dali_pipeline import missing
from pdarts_fast.data.files import MEAN, STD, find_images
from pdarts_fast.data.views import StreamAugmentation
from pdarts_fast.errors import RunError

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
SIZE = 24
PLAIN = StreamAugmentation(jitter=(0.0, 0.0, 0.0, 0.0))
# Decoders agree to the bit. Scaling rounds elsewhere: Pillow to whole levels between its two
# passes, which shows most in dithered pictures.
WORST, AVERAGE = 4, 0.4


def make(name: str, folder: Path, part: str = "train", **changes: Any) -> Loader:
    options: dict[str, Any] = {
        "batch_size": 4,
        "image_size": SIZE,
        "augmentation": PLAIN,
        "seed": 3,
        "stream": "train",
        "shuffle": True,
        "device": torch.device("cpu"),
        "workers": 0,
    }
    return file_loader(name, getattr(find_images(folder), part), **options | changes)


def levels(images: Tensor) -> Tensor:
    """Normalised images as levels of 0..255."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return 255 * (images.cpu() * std + mean)


def assert_close(got: Loader, want: Loader, epoch: int = 0, start: int = 0) -> None:
    batches, wanted = list(got.epoch(epoch, start)), list(want.epoch(epoch, start))
    assert len(batches) == len(wanted) > 0
    for (images, labels), (images_wanted, labels_wanted) in zip(batches, wanted, strict=True):
        assert torch.equal(labels.cpu(), labels_wanted)
        assert (images.dtype, images.shape) == (torch.float32, images_wanted.shape)
        difference = (levels(images) - levels(images_wanted)).abs()
        assert difference.max() < WORST + 0.01
        assert difference.mean() < AVERAGE


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth pictures in every format, colour mode and orientation that occurs."""
    rng = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("photographs")

    def picture(height: int = 70, width: int = 90) -> Image.Image:
        y, x = np.mgrid[0:height, 0:width]
        waves = [127 + 100 * np.sin(x / rng.uniform(9, 30) + y / rng.uniform(9, 30)) for _ in "rgb"]
        return Image.fromarray(np.stack(waves, -1).astype(np.uint8))

    def turned(orientation: int) -> Image.Exif:
        exif = Image.Exif()
        exif[0x112] = orientation
        return exif

    deep = (np.asarray(picture())[..., 0].astype(np.uint16) * 257).astype(np.uint16)
    files: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        **{
            f"turn{turn}.jpg": (
                picture(40 + turn, 90),
                {"exif": turned(turn), "subsampling": turn % 3},
            )
            for turn in range(1, 9)
        },
        "progressive.jpg": (picture(), {"progressive": True}),
        "grey.jpg": (picture().convert("L"), {}),
        "cmyk.jpg": (picture().convert("CMYK"), {}),
        "plain.png": (picture(), {}),
        "turned.png": (picture(), {"exif": turned(6)}),
        "palette.png": (picture().convert("P"), {}),
        "transparent.png": (picture().convert("RGBA"), {}),
        "deep.png": (Image.fromarray(deep), {}),
        "bits.bmp": (picture(), {}),
        "old.gif": (picture().convert("P"), {}),
        "large.tiff": (picture(), {}),
        "new.webp": (picture(), {"lossless": True}),
    }
    for split in ("train", "val"):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
    for number, (name, (image, options)) in enumerate(files.items()):
        for split in ("train", "val"):
            image.save(folder / split / "ab"[number % 2] / name, **({"quality": 95} | options))
    return folder


@pytest.mark.parametrize("epoch", [0, 1])
def test_training_images_are_torchvisions_up_to_rounding(photographs: Path, epoch: int) -> None:
    assert_close(make("dali", photographs), make("torchvision", photographs), epoch)


def test_evaluation_images_are_torchvisions_up_to_rounding(photographs: Path) -> None:
    options = {"augmentation": None, "shuffle": False, "image_size": 56}
    assert_close(
        make("dali", photographs, "test", **options),
        make("torchvision", photographs, "test", **options),
    )


@pytest.mark.parametrize(
    ("jitter", "worst", "average"),
    [
        # The rounding of the scaling, made larger, and one more on each side.
        pytest.param((0.4, 0.0, 0.0, 0.0), 1.4 * WORST + 2.2, 1, id="brightness"),
        pytest.param((0.0, 0.0, 0.4, 0.0), 1.4 * WORST + 2.2, 1, id="saturation"),
    ],
)
def test_one_colour_alone_is_torchvisions_up_to_rounding(
    photographs: Path, jitter: tuple[float, ...], worst: float, average: float
) -> None:
    options = {"augmentation": StreamAugmentation(jitter=jitter)}
    for (ours, _), (theirs, _) in zip(
        make("dali", photographs, **options).epoch(0),
        make("torchvision", photographs, **options).epoch(0),
        strict=True,
    ):
        difference = (levels(ours) - levels(theirs)).abs()
        assert difference.max() < worst + 0.01
        assert difference.mean() < average


def test_all_colours_together_are_torchvisions_by_distribution(photographs: Path) -> None:
    """Mean and spread of the channels over many draws; single pixels differ, see the docs."""
    options = {"augmentation": StreamAugmentation(), "batch_size": 20}
    moments = []
    for name in ("dali", "torchvision"):
        loader = make(name, photographs, **options)
        images = levels(torch.cat([batch for e in range(12) for batch, _ in loader.epoch(e)]))
        moments.append(torch.stack([images.mean((0, 2, 3)), images.std((0, 2, 3))]))
    assert (moments[0][0] - moments[1][0]).abs().max() < 5
    assert (moments[0][1] / moments[1][1] - 1).abs().max() < 0.12


def test_epochs_seeds_and_streams_draw_anew(photographs: Path) -> None:
    first = next(make("dali", photographs, shuffle=False).epoch(0))[0]
    for changes, epoch in (({"seed": 4}, 0), ({"stream": "other"}, 0), ({}, 1)):
        other = next(make("dali", photographs, shuffle=False, **changes).epoch(epoch))[0]
        assert not torch.equal(first, other)


@pytest.mark.parametrize("start", [1, 4, 5])
def test_start_skips_batches_and_changes_none(photographs: Path, start: int) -> None:
    loader = make("dali", photographs, augmentation=StreamAugmentation(), workers=2)
    whole = list(loader.epoch(2))
    rest = list(make("dali", photographs, augmentation=StreamAugmentation()).epoch(2, start))
    assert (len(whole), len(rest)) == (5, 5 - start)
    for (images, labels), (images_again, labels_again) in zip(whole[start:], rest, strict=True):
        assert torch.equal(images, images_again)
        assert torch.equal(labels, labels_again)


@pytest.mark.parametrize("name", ["dali", "torchvision"])
def test_ranks_together_show_what_one_process_shows(photographs: Path, name: str) -> None:
    whole = list(make(name, photographs, batch_size=7).epoch(1))
    parts = [
        list(make(name, photographs, batch_size=7, rank=rank, world_size=2).epoch(1))
        for rank in range(2)
    ]
    assert [len(labels) for _, labels in parts[0]] == [len(labels) for _, labels in parts[1]]
    for number, (images, labels) in enumerate(whole):
        shown = torch.cat([part[number][0] for part in parts])
        assert torch.equal(shown[: len(images)], images)
        assert torch.equal(torch.cat([part[number][1] for part in parts])[: len(labels)], labels)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def encoded(name: str) -> bytes:
    """A picture whose data are spoilt behind a sound header."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, name)
    return buffer.getvalue()


BROKEN = {
    "no-image": b"no image",
    "empty": b"",
    "cut-jpeg": cut(encoded("JPEG")),
    "jpeg-header-only": encoded("JPEG")[:300],
    # Its header tells nothing: only decoding does, which stops DALI's pipeline.
    "cut-png": cut(encoded("PNG")),
}


@pytest.fixture(params=BROKEN.values(), ids=BROKEN.keys())
def broken(request: Any, jpeg_folder: Path, tmp_path: Path) -> Path:
    """The JPEGs with a broken training file."""
    folder = tmp_path / "copy"
    shutil.copytree(jpeg_folder, folder)
    (folder / "train" / "red" / "0.jpg").write_bytes(request.param)
    return folder


@pytest.mark.parametrize("name", ["dali", "torchvision"])
def test_a_broken_file_stops_in_one_line_that_names_it(broken: Path, name: str) -> None:
    with pytest.raises(RunError, match=r"red/0\.jpg: not a readable image.*--skip-broken") as error:
        list(make(name, broken).epoch(0))
    assert "\n" not in str(error.value)


def test_broken_files_are_skipped_alike_by_both_loaders(
    broken: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaders = [make(name, broken, skip_broken=True) for name in ("dali", "torchvision")]
    for epoch in range(2):
        assert_close(*loaders, epoch)
    # Another image took its place: all batches but the last are full.
    assert [len(labels) for _, labels in loaders[0].epoch(0)] == [4, 4, 4, 4, 2]
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert all("red/0.jpg" in text and text.endswith(": skipped") for text in warnings)


@pytest.mark.parametrize("name", ["dali", "torchvision"])
def test_evaluation_leaves_broken_files_out(broken: Path, name: str) -> None:
    options = {"augmentation": None, "shuffle": False, "skip_broken": True}
    shown = torch.cat([labels for _, labels in make(name, broken, **options).epoch(0)])
    assert sorted(shown.tolist()) == [0] * 6 + [1] * 6 + [2] * 5


@pytest.mark.parametrize("name", ["dali", "torchvision"])
def test_a_batch_without_a_readable_image_is_an_error(broken: Path, name: str) -> None:
    loader = make(name, broken, batch_size=1, skip_broken=True)
    with pytest.raises(RunError, match=r"none of the 1 images of a batch is readable"):
        list(loader.epoch(0))


def test_batches_before_a_broken_one_come_first(broken: Path) -> None:
    order = make("dali", broken)._rows(0, 0)  # type: ignore[attr-defined]
    files = find_images(broken).train.files
    bad = next(
        number for number, rows in enumerate(order)
        if any("red/0.jpg" in str(files[row]) for row in rows)
    )  # fmt: skip
    shown: list[Tensor] = []
    with pytest.raises(RunError, match=r"red/0\.jpg"):
        shown.extend(images for images, _ in make("dali", broken).epoch(0))
    assert len(shown) == bad


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: run on a machine with a GPU"
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "evaluate"])
def test_cuda_shows_what_the_cpu_shows(photographs: Path, training: bool) -> None:
    """nvJPEG's inverse transform rounds otherwise than libjpeg's: some levels more."""
    options = {"augmentation": PLAIN if training else None, "shuffle": training}
    on_gpu = make("dali", photographs, device=torch.device("cuda"), **options)
    for (ours, labels), (theirs, wanted) in zip(
        on_gpu.epoch(0), make("torchvision", photographs, **options).epoch(0), strict=True
    ):
        assert ours.is_cuda
        assert torch.equal(labels.cpu(), wanted)
        difference = (levels(ours) - levels(theirs)).abs()
        assert difference.mean() < 2
