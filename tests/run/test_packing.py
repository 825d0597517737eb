"""Packing the tensors of a state, and getting them back."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pdarts_fast.run.checkpoint import CheckpointFolder
from pdarts_fast.run.packing import pack, unpack


def example() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 4, 5, generator=generator)
    return {
        "plain": image,
        "channels last": image.to(memory_format=torch.channels_last),
        "expanded": torch.randn(3, 1, generator=generator).expand(3, 4),
        "sliced": image[:, 1:, ::2],
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "bits": torch.tensor([True, False]),
        "half": image.to(torch.bfloat16),
        "counters": [torch.tensor(7), {3: torch.tensor([1, 2], dtype=torch.uint8)}],
        "parameter": torch.nn.Parameter(image[0]),
        "settings": {"lr": 0.1, "betas": (0.5, 0.9), "name": "tensor 0", "nothing": None, 5: [1]},
    }


def compare(got: Any, want: Any) -> None:
    if isinstance(want, Tensor):
        assert torch.equal(got, want)
        assert got.dtype == want.dtype
    elif isinstance(want, dict):
        assert list(got) == list(want)
        for key in want:
            compare(got[key], want[key])
    elif isinstance(want, (list, tuple)):
        assert type(got) is type(want)
        for one, other in zip(got, want, strict=True):
            compare(one, other)
    else:
        assert got == want


def test_every_kind_of_tensor_comes_back_through_a_file(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(example())
    loaded = folder.load()
    assert loaded is not None
    assert loaded.pop("format") == 1
    compare(loaded, example())


def test_memory_layout_is_kept() -> None:
    state = unpack(pack(example()))
    assert state["channels last"].is_contiguous(memory_format=torch.channels_last)
    assert state["plain"].is_contiguous()


def test_a_packed_state_has_one_tensor_a_dtype() -> None:
    packed = pack(example())["packed"]["values"]
    assert set(packed) == {"float32", "float64", "bool", "bfloat16", "int64", "uint8"}
    assert all(values.dim() == 1 for values in packed.values())


def test_tensors_that_come_back_share_no_memory() -> None:
    state = unpack(pack({"a": torch.zeros(2), "b": torch.zeros(2)}))
    state["a"].fill_(1)
    assert state["b"].tolist() == [0, 0]


def test_a_checkpoint_of_before_packing_is_read(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    path = folder.save({})
    torch.save({"format": 1, "a": torch.ones(2)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(f'{{"sha256": "{digest}"}}')
    loaded = folder.load()
    assert loaded is not None
    assert loaded["a"].tolist() == [1, 1]


@pytest.mark.parametrize("stride", [(4, 1), (1, 3), (1, 1)], ids=["rows", "columns", "overlap"])
def test_what_is_no_gapless_memory_is_copied(stride: tuple[int, int]) -> None:
    tensor = torch.arange(12.0).as_strided((3, 3), stride)
    assert torch.equal(unpack(pack({"a": tensor}))["a"], tensor)
