"""The in-memory form of a data set, splits, statistics and the memory check."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pdarts_fast.data import Dataset, ImageData, load_dataset, memory, split_indices
from pdarts_fast.data.base import channel_statistics, resize_images, stratified_split
from pdarts_fast.errors import RunError, UsageError


@pytest.mark.parametrize(
    ("num_images", "fraction", "first"),
    [
        pytest.param(50000, 0.5, 25000, id="half"),
        pytest.param(7, 0.5, 3, id="odd"),
        pytest.param(10, 0.8, 8, id="four-fifths"),
        pytest.param(2, 0.5, 1, id="smallest"),
    ],
)
def test_split_by_index(num_images, fraction, first):
    weights, alphas = split_indices(num_images, fraction)
    assert weights.dtype == alphas.dtype == np.int64
    assert np.array_equal(weights, np.arange(first))
    assert np.array_equal(alphas, np.arange(first, num_images))


@pytest.mark.parametrize(
    ("num_images", "fraction"),
    [
        pytest.param(1, 0.5, id="one-image"),
        pytest.param(0, 0.5, id="no-image"),
        pytest.param(10, 0.0, id="nothing-first"),
        pytest.param(10, 0.05, id="rounds-to-nothing"),
        pytest.param(10, 1.0, id="nothing-second"),
        pytest.param(10, 1.5, id="above-one"),
        pytest.param(10, -0.5, id="negative"),
        pytest.param(10, float("nan"), id="nan"),
        pytest.param(10, float("inf"), id="infinite"),
    ],
)
def test_empty_halves_are_refused(num_images, fraction):
    with pytest.raises(UsageError, match="leaves one part empty"):
        split_indices(num_images, fraction)


def test_stratified_split_takes_a_fifth_of_each_class_and_is_fixed():
    labels = [0] * 50 + [1] * 10 + [2] * 2 + [3]
    keys = [f"image{row}" for row in range(63)]
    train, test = stratified_split(labels, keys)
    assert sorted([*train, *test]) == list(range(63))
    counts = np.bincount(np.array(labels)[test], minlength=4)
    assert counts.tolist() == [10, 2, 1, 0]
    again = stratified_split(labels, keys)
    assert np.array_equal(train, again[0])
    assert np.array_equal(test, again[1])


def test_stratified_split_follows_keys_not_positions():
    keys = [f"image{row}" for row in range(40)]
    _, test = stratified_split([0] * 40, keys)
    _, reversed_test = stratified_split([0] * 40, keys[::-1])
    assert {keys[row] for row in test} == {keys[::-1][row] for row in reversed_test}


def test_channel_statistics_match_float64():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 200, (1500, 3, 5, 4), dtype=torch.uint8, generator=generator)
    scaled = images.double() / 255
    mean, std = channel_statistics(images)
    assert mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert std == pytest.approx(scaled.std((0, 2, 3), correction=0).tolist(), abs=1e-12)


def test_a_constant_channel_has_standard_deviation_one():
    images = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    images[0, 0] = 255
    _, std = channel_statistics(images)
    assert std[1:] == (1.0, 1.0)
    assert 0 < std[0] < 1


def test_resize_keeps_constants_and_size():
    images = torch.full((1500, 3, 8, 8), 77, dtype=torch.uint8)
    for size in (3, 32):
        resized = resize_images(images, size)
        assert resized.shape == (1500, 3, size, size)
        assert (resized == 77).all()
    assert resize_images(images, 8) is images


def image_data(**changes) -> ImageData:
    values = {
        "name": "mine",
        "images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
        "labels": torch.tensor([0, 1]),
        "classes": ("a", "b"),
    }
    return ImageData(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"images": torch.zeros(2, 3, 4, 4)}, "uint8", id="float-images"),
        pytest.param(
            {"images": torch.zeros(2, 4, 4, 3, dtype=torch.uint8)}, r"\[2, 4, 4, 3\]", id="nhwc"
        ),
        pytest.param(
            {"images": torch.zeros(2, 4, 4, 3, dtype=torch.uint8).permute(0, 3, 1, 2)},
            "contiguous",
            id="channels-last",
        ),
        pytest.param({"labels": torch.tensor([0])}, r"one an image.*\[1\]", id="label-count"),
        pytest.param({"labels": torch.tensor([0.0, 1.0])}, "int64", id="float-labels"),
        pytest.param({"labels": torch.tensor([0, 2])}, "from 0 to 2, wanted 0 to 1", id="large"),
        pytest.param({"labels": torch.tensor([-1, 0])}, "from -1", id="negative"),
        pytest.param(
            {"labels": torch.zeros(2, dtype=torch.int64, device="meta")}, "meta", id="dev"
        ),
    ],
)
def test_bad_image_data_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        image_data(**changes)


def test_train_and_test_must_have_the_same_classes():
    with pytest.raises(ValueError, match="must be the same"):
        Dataset(image_data(), image_data(classes=("a", "c")), (0, 0, 0), (1, 1, 1))


def test_digits():
    dataset = load_dataset("digits")
    assert dataset.num_classes == 10
    assert len(dataset.train) + len(dataset.test) == 1797
    assert 0.19 < len(dataset.test) / 1797 < 0.21
    for part in (dataset.train, dataset.test):
        assert part.images.shape[1:] == (3, 32, 32)
        assert torch.equal(part.images[:, 0], part.images[:, 2])
        counts = torch.bincount(part.labels, minlength=10)
        assert counts.max() - counts.min() <= 10
    assert dataset.train.images.max() == 255
    assert dataset.mean[0] == pytest.approx(
        dataset.train.images.double().mean().item() / 255, abs=1e-9
    )
    # Both halves of a split by index hold every class, about equally.
    for half in split_indices(len(dataset.train)):
        counts = torch.bincount(dataset.train.labels[torch.from_numpy(half)], minlength=10)
        assert counts.min() > 50


def test_digits_split_and_pixels_are_fixed():
    first, second = load_dataset("digits", image_size=8), load_dataset("digits", image_size=8)
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.labels, second.test.labels)
    # Pinned: another split would make test accuracies of different versions incomparable.
    assert first.test.labels[:12].tolist() == [1, 9, 3, 4, 8, 9, 2, 3, 5, 6, 5, 9]
    train = {image.tobytes() for image in first.train.images.numpy()}
    assert sum(image.tobytes() in train for image in first.test.images.numpy()) == 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        pytest.param("mnist", {}, "--dataset mnist: unknown.*digits", id="unknown-name"),
        pytest.param("digits", {"image_size": 0}, "--image-size 0", id="image-size"),
        pytest.param("digits", {"workers": -1}, "--workers -1", id="workers"),
        pytest.param("cifar10", {}, "cifar10 needs --data DIR", id="cifar-without-folder"),
        pytest.param("image-folder", {}, "image-folder needs --data DIR", id="images-without"),
        pytest.param("cifar100", {"data_dir": "/nowhere"}, "--data /nowhere", id="no-folder"),
        pytest.param("image-folder", {"data_dir": "/nowhere"}, "--data /nowhere", id="no-images"),
    ],
)
def test_bad_requests_are_refused(name, options, message):
    with pytest.raises(UsageError, match=message) as caught:
        load_dataset(name, **options)
    assert "\n" not in str(caught.value)


def test_a_data_set_too_large_for_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with pytest.raises(RunError, match=r"1797 images at --image-size 32 need 0.0 GiB"):
        load_dataset("digits")


def test_a_platform_that_tells_no_memory_is_not_refused(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    memory.require_memory("mine", 10**9, 10**4)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 8 kB\n"}, 8192, id="meminfo"),
        pytest.param(
            {
                "/proc/meminfo": "MemAvailable: 8 kB\n",
                "/sys/fs/cgroup/memory.max": "5000\n",
                "/sys/fs/cgroup/memory.current": "4500\n",
                "/sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 500\n",
            },
            1000,
            id="container-version-2",
        ),
        pytest.param(
            {
                "/proc/meminfo": "MemAvailable: 8 kB\n",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes": "5000\n",
                "/sys/fs/cgroup/memory/memory.usage_in_bytes": "4000\n",
                "/sys/fs/cgroup/memory/memory.stat": "cache 1\ntotal_inactive_file 100\n",
            },
            1100,
            id="container-version-1",
        ),
        pytest.param(
            {
                "/proc/meminfo": "MemAvailable: 8 kB\n",
                "/sys/fs/cgroup/memory.max": "max\n",
                "/sys/fs/cgroup/memory.current": "4500\n",
            },
            8192,
            id="container-without-limit",
        ),
    ],
)
def test_available_memory(monkeypatch, files, expected):
    monkeypatch.setattr(memory, "_read", lambda path: files.get(path, ""))
    assert memory.available_memory() == expected
