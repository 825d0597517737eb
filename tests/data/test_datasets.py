"""What is known of a data set before its images are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdarts_fast.data.datasets import class_count, load_dataset
from pdarts_fast.errors import RunError, UsageError


def test_the_number_of_classes_is_that_of_the_loaded_data_set(images: Path) -> None:
    assert class_count("digits") == load_dataset("digits", image_size=8).num_classes == 10
    folder = load_dataset("image-folder", images, image_size=8)
    assert class_count("image-folder", images) == folder.num_classes == 3
    assert [class_count(name) for name in ("cifar10", "cifar100")] == [10, 100]


def test_what_has_no_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--dataset mnist: unknown, choose one of"):
        class_count("mnist")
    with pytest.raises(UsageError, match="--dataset image-folder needs --data DIR"):
        class_count("image-folder")
    with pytest.raises(UsageError, match="no such folder"):
        class_count("image-folder", tmp_path / "gone")
    with pytest.raises(RunError, match="has 0 class folders"):
        class_count("image-folder", tmp_path)
