"""Windows, mirroring and colours of image files: torchvision's distributions and rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as tv
from torchvision.transforms import v2

from pdarts_fast.data import views
from pdarts_fast.data.views import StreamAugmentation, View, evaluation_view, training_view

DRAWS = 3000


def draw(height: int, width: int, count: int = DRAWS, **changes: object) -> list[View]:
    augmentation = StreamAugmentation(**changes)  # type: ignore[arg-type]
    return [
        training_view(height, width, 24, augmentation, (0, "t", 1), row) for row in range(count)
    ]


def kolmogorov(first: Sequence[float], second: Sequence[float]) -> float:
    """The largest distance of two samples' distribution functions, 1 at the 0.1 % level."""
    a, b = np.sort(first), np.sort(second)
    both = np.concatenate([a, b])
    distance = np.abs(
        np.searchsorted(a, both, "right") / len(a) - np.searchsorted(b, both, "right") / len(b)
    ).max()
    return float(distance / (1.95 * math.sqrt((len(a) + len(b)) / (len(a) * len(b)))))


@pytest.mark.parametrize(
    ("height", "width"),
    [
        pytest.param(60, 80, id="wide"),
        pytest.param(50, 50, id="square"),
        pytest.param(9, 31, id="strip"),
    ],
)
def test_windows_are_distributed_as_torchvisions(height: int, width: int) -> None:
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(24)
    image = Image.new("RGB", (width, height))
    theirs = [crop.make_params([image]) for _ in range(DRAWS)]
    ours = [view.box for view in draw(height, width)]
    for place, name in enumerate(("top", "left", "height", "width")):
        assert kolmogorov([box[place] for box in ours], [box[name] for box in theirs]) < 1, name
    areas = [box[2] * box[3] for box in ours]
    assert kolmogorov(areas, [box["height"] * box["width"] for box in theirs]) < 1
    ends = [box[0] + box[2] for box in ours], [box[1] + box[3] for box in ours]
    assert max(ends[0]) <= height
    assert max(ends[1]) <= width


@pytest.mark.parametrize(
    ("height", "width"),
    [pytest.param(4, 400, id="very-wide"), pytest.param(400, 4, id="very-tall")],
)
def test_an_image_that_no_window_fits_is_cut_at_its_centre(height: int, width: int) -> None:
    crop = v2.RandomResizedCrop(24).make_params([Image.new("RGB", (width, height))])
    theirs = tuple(crop[name] for name in ("top", "left", "height", "width"))
    assert {view.box for view in draw(height, width, 30)} == {theirs}


def test_colours_are_uniform_around_one_and_the_hue_around_zero() -> None:
    colours = np.array([view.colours for view in draw(40, 40, jitter=(0.4, 0.3, 0.2, 0.1))])
    expected = [(0.6, 1.4), (0.7, 1.3), (0.8, 1.2), (-0.1, 0.1)]
    for column, (low, high) in zip(colours.T, expected, strict=True):
        assert kolmogorov(column, np.linspace(low, high, DRAWS)) < 1
        assert low <= column.min() < column.max() <= high
    correlation = np.corrcoef(colours.T) - np.eye(4)
    assert np.abs(correlation).max() < 4 / math.sqrt(DRAWS)


def test_every_order_of_the_colours_is_as_likely() -> None:
    orders = [view.order for view in draw(40, 40)]
    counts = np.array([orders.count(order) for order in set(orders)])
    assert len(counts) == 24
    assert np.abs(counts - DRAWS / 24).max() < 5 * math.sqrt(DRAWS / 24)


def test_half_of_the_images_are_mirrored() -> None:
    flips = sum(view.flip for view in draw(40, 40))
    assert abs(flips - DRAWS / 2) < 4 * math.sqrt(DRAWS / 4)
    assert not any(view.flip for view in draw(40, 40, 50, flip=False))


def test_what_is_wanted_moves_no_other_choice() -> None:
    for full, plain in zip(
        draw(40, 60, 50), draw(40, 60, 50, flip=False, jitter=(0.0,) * 4), strict=True
    ):
        assert full.box == plain.box
        assert plain.colours == (1, 1, 1, 0)
    assert any(view.flip for view in draw(40, 60, 50))


@pytest.mark.parametrize(
    "change", [{"key": (1, "t", 1)}, {"key": (0, "t", 2)}, {"row": 1}], ids=["seed", "epoch", "row"]
)
def test_seed_epoch_and_image_each_draw_anew(change: dict[str, object]) -> None:
    arguments = {"height": 90, "width": 90, "side": 24, "augmentation": StreamAugmentation(),
                 "key": (0, "t", 1), "row": 0}  # fmt: skip
    assert training_view(**arguments) == training_view(**arguments)  # type: ignore[arg-type]
    assert training_view(**arguments) != training_view(**arguments | change)  # type: ignore[arg-type]


@pytest.mark.parametrize("side", [24, 56, 224])
@pytest.mark.parametrize(
    ("height", "width"), [(57, 57), (33, 64), (101, 50), (375, 500), (29, 28), (1, 7)]
)
def test_the_evaluation_view_rounds_as_torchvision(height: int, width: int, side: int) -> None:
    view = evaluation_view(height, width, side)
    image = Image.fromarray(
        np.arange(height * width, dtype=np.uint32).astype(np.uint8).reshape(height, width)
    )
    scaled = tv.resize(image, round(side * views.EVALUATION_MARGIN))
    assert view.resized == (scaled.height, scaled.width)
    assert (
        tv.crop(scaled, *view.window, side, side).tobytes()
        == tv.center_crop(scaled, [side] * 2).tobytes()
    )
