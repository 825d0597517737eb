"""Folders of images written here: layouts, decoding, and everything that can be wrong."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from pdarts_fast.data import load_dataset, memory, split_indices
from pdarts_fast.errors import RunError, UsageError

COLOURS = {"cat": (200, 30, 40), "dog": (20, 180, 60), "owl": (10, 40, 220)}


def save(path: Path, colour=(1, 2, 3), size=(20, 16), mode="RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)
    return path


def make_classes(folder: Path, count: int = 10, names=("cat", "dog", "owl")) -> Path:
    for name in names:
        for row in range(count):
            extension = "png" if row % 2 else "JPG"
            save(folder / name / f"{row}.{extension}", COLOURS[name], (12 + row, 20 - row))
    return folder


def load(folder: Path, **options):
    return load_dataset("image-folder", folder, **{"image_size": 8, "workers": 2, **options})


def fails(folder: Path, message: str, error=RunError, **options) -> None:
    with pytest.raises(error, match=message) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)


def check_colours(part) -> None:
    """Every image still has its class's colour (JPEG changes it by a few levels)."""
    expected = torch.tensor([COLOURS[name] for name in part.classes])[part.labels]
    difference = part.images.float() - expected[:, :, None, None]
    assert difference.abs().max() <= 8


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_train_and_test_folders(tmp_path, held_out):
    make_classes(tmp_path / "train", 6)
    make_classes(tmp_path / held_out, 2)
    dataset = load(tmp_path)
    assert dataset.train.classes == ("cat", "dog", "owl")
    assert (len(dataset.train), len(dataset.test)) == (18, 6)
    assert dataset.train.images.shape == (18, 3, 8, 8)
    check_colours(dataset.train)
    check_colours(dataset.test)
    scaled = dataset.train.images.double() / 255
    assert dataset.mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), abs=1e-9)
    assert dataset.std == pytest.approx(scaled.std((0, 2, 3), correction=0).tolist(), abs=1e-9)


def test_class_folders_are_split_by_class(tmp_path):
    dataset = load(make_classes(tmp_path))
    assert torch.bincount(dataset.train.labels).tolist() == [8, 8, 8]
    assert torch.bincount(dataset.test.labels).tolist() == [2, 2, 2]
    check_colours(dataset.train)
    check_colours(dataset.test)


def test_split_stays_when_the_folder_moves(tmp_path):
    first = load(make_classes(tmp_path / "here"))
    second = load(make_classes(tmp_path / "there"), workers=0)
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.labels, second.test.labels)


def test_halves_of_the_training_images_mix_the_classes(tmp_path):
    make_classes(tmp_path / "train", 20)
    make_classes(tmp_path / "test", 1)
    dataset = load(tmp_path)
    for half in split_indices(len(dataset.train)):
        counts = torch.bincount(dataset.train.labels[torch.from_numpy(half)], minlength=3)
        assert counts.min() >= 5


def test_a_class_may_be_called_train(tmp_path):
    make_classes(tmp_path)
    for row in range(10):
        save(tmp_path / "train" / f"{row}.png")
    assert load(tmp_path).train.classes == ("cat", "dog", "owl", "train")


def test_other_files_and_hidden_folders_are_ignored(tmp_path):
    make_classes(tmp_path)
    (tmp_path / "readme.txt").write_text("hello")
    (tmp_path / "cat" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "cat" / "._0.png").write_bytes(b"x")
    (tmp_path / ".git").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    dataset = load(tmp_path)
    assert dataset.num_classes == 3
    assert len(dataset.train) + len(dataset.test) == 30


def test_nested_folders_belong_to_their_class(tmp_path):
    make_classes(tmp_path)
    save(tmp_path / "owl" / "night" / "0.png", COLOURS["owl"])
    dataset = load(tmp_path)
    assert len(dataset.train) + len(dataset.test) == 31


def decode_one(tmp_path: Path, path: Path, image_size: int) -> torch.Tensor:
    """Loads ``path``, the only training image of its class."""
    save(tmp_path / "train" / "other" / "0.png")
    save(tmp_path / "test" / "other" / "0.png")
    dataset = load(tmp_path, image_size=image_size)
    return dataset.train.images[dataset.train.labels == dataset.train.classes.index("one")][0]


@pytest.mark.parametrize(
    ("size", "image_size"),
    [
        pytest.param((64, 32), 16, id="wide"),
        pytest.param((32, 64), 16, id="tall"),
        pytest.param((24, 8), 16, id="enlarged"),
        pytest.param((16, 16), 16, id="same-size"),
    ],
)
def test_resize_and_crop_match_torchvision(tmp_path, size, image_size):
    # Sizes at which torchvision rounds neither the scaled size nor the crop's offset.
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    pixels = np.stack([x, y, (x + y) / 2], axis=-1).astype(np.uint8)
    path = tmp_path / "train" / "one" / "0.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(pixels).save(path)
    expected = transforms.Compose(
        [
            transforms.Resize(image_size),
            transforms.CenterCrop(image_size),
            transforms.PILToTensor(),
        ]
    )(Image.fromarray(pixels))
    difference = (decode_one(tmp_path, path, image_size).int() - expected.int()).abs()
    assert difference[:, 2:-2, 2:-2].max() <= 1
    # At the border torchvision's filter still reaches pixels outside the centre square.
    assert difference.max() <= 10


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param("0.png", "L", id="grey"),
        pytest.param("0.png", "RGBA", id="alpha"),
        pytest.param("0.png", "P", id="palette"),
        pytest.param("0.png", "1", id="bilevel"),
        pytest.param("0.jpg", "CMYK", id="cmyk"),
        pytest.param("0.gif", "P", id="gif"),
        pytest.param("0.WEBP", "RGB", id="webp"),
        pytest.param("0.bmp", "RGB", id="bmp"),
    ],
)
def test_other_modes_become_rgb(tmp_path, name, mode):
    path = save(tmp_path / "train" / "one" / name, (255, 255, 255), mode=mode)
    assert decode_one(tmp_path, path, 8).float().mean() > 250


def test_sixteen_bit_grey_keeps_its_upper_bits(tmp_path):
    path = tmp_path / "train" / "one" / "0.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(np.full((9, 9), 100 * 256 + 7, dtype=np.uint16)).save(path)
    assert (decode_one(tmp_path, path, 8) == 100).all()


def test_camera_orientation_is_applied(tmp_path):
    path = tmp_path / "train" / "one" / "0.jpg"
    path.parent.mkdir(parents=True)
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    image = decode_one(tmp_path, path, 16).float()
    assert image[:, :8].mean() < 10
    assert image[:, 8:].mean() > 245


def test_large_jpeg_is_decoded_at_a_fraction_of_its_size(tmp_path):
    path = save(tmp_path / "train" / "one" / "0.jpg", (90, 120, 30), (640, 480))
    image = decode_one(tmp_path, path, 16).float()
    assert (image - torch.tensor([90, 120, 30])[:, None, None]).abs().max() <= 4


def test_extreme_shapes_stay_small(tmp_path):
    path = save(tmp_path / "train" / "one" / "0.png", (9, 9, 9), (1, 20000))
    assert (decode_one(tmp_path, path, 8) == 9).all()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty-file"),
        pytest.param(b"not an image", id="text"),
        pytest.param(None, id="truncated"),
    ],
)
@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_broken_image(tmp_path, caplog, content, extension):
    make_classes(tmp_path / "train", 4)
    make_classes(tmp_path / "test", 1)
    path = tmp_path / "train" / "dog" / f"broken.{extension}"
    if content is None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        content = path.read_bytes()[:1500]
    path.write_bytes(content)
    fails(tmp_path, rf"broken.{extension}: not a readable image .*--skip-broken")
    with caplog.at_level(logging.WARNING):
        dataset = load(tmp_path, skip_broken=True)
    assert f"broken.{extension}" in caplog.text
    assert torch.bincount(dataset.train.labels).tolist() == [4, 4, 4]
    assert dataset.train.images.is_contiguous()
    check_colours(dataset.train)


def test_floating_point_image_is_refused(tmp_path):
    make_classes(tmp_path)
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "cat" / "depth.tiff")
    fails(tmp_path, r"depth.tiff: not a readable image .*floating-point pixels")


def test_class_of_broken_images_only(tmp_path):
    make_classes(tmp_path / "train", 2)
    make_classes(tmp_path / "test", 1)
    for path in (tmp_path / "train" / "owl").iterdir():
        path.write_bytes(b"x")
    fails(tmp_path, "class 'owl' has no usable image", skip_broken=True)


def test_test_set_of_broken_images_only(tmp_path):
    make_classes(tmp_path / "train", 2)
    for path in make_classes(tmp_path / "test", 1).glob("*/*"):
        path.write_bytes(b"x")
    fails(tmp_path, "no usable test image", skip_broken=True)


def test_empty_class_folder(tmp_path):
    make_classes(tmp_path)
    (tmp_path / "yak").mkdir()
    (tmp_path / "yak" / "notes.txt").write_text("none yet")
    fails(tmp_path, "yak: no image in this class folder")


def test_class_without_test_images_is_warned_about(tmp_path, caplog):
    make_classes(tmp_path / "train", 2)
    make_classes(tmp_path / "test", 1, names=("cat", "dog"))
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path).num_classes == 3
    assert "no image of class 'owl' to test with" in caplog.text


def test_test_class_unknown_in_training(tmp_path):
    make_classes(tmp_path / "train", 2, names=("cat", "dog"))
    make_classes(tmp_path / "test", 1)
    fails(tmp_path, "owl: this class is not in .*train")


def test_train_without_test(tmp_path):
    make_classes(tmp_path / "train", 2)
    fails(tmp_path, "has train/ but neither test/ nor val/")


def test_empty_test_folder(tmp_path):
    make_classes(tmp_path / "train", 2)
    (tmp_path / "test").mkdir()
    fails(tmp_path, "no usable test image")


def test_one_class(tmp_path):
    fails(make_classes(tmp_path, names=("cat",)), "has 1 class folders, wanted at least 2")


def test_images_without_class_folders(tmp_path):
    save(tmp_path / "0.png")
    fails(tmp_path, "has 0 class folders, wanted at least 2")


def test_one_image_a_class(tmp_path):
    fails(make_classes(tmp_path, 1), "every class has a single image")


def test_file_instead_of_a_folder(tmp_path):
    fails(save(tmp_path / "0.png"), "no such folder", UsageError)


def test_too_many_images_for_the_memory(tmp_path, monkeypatch):
    make_classes(tmp_path)
    monkeypatch.setattr(memory, "available_memory", lambda: 30 * 3 * 8 * 8 - 1)
    fails(tmp_path, "30 images at --image-size 8 need .*smaller --image-size")
    monkeypatch.setattr(memory, "available_memory", lambda: 30 * 3 * 8 * 8)
    assert load(tmp_path).num_classes == 3
