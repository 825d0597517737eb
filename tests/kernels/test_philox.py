"""Philox4x32-10 and the dropout mask made of it, against published vectors and plain integers."""

from __future__ import annotations

import pytest
import torch

from pdarts_fast.kernels import philox

ALL_ONES = 0xFFFFFFFF
# kat_vectors of the Random123 library.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL_ONES,) * 4, (ALL_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox_of_ints(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 in Python's unbounded integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        wide0, wide1 = philox.MULTIPLIERS[0] * c0, philox.MULTIPLIERS[1] * c2
        c0, c1 = (wide1 >> 32) ^ c1 ^ k0, wide1 % 2**32
        c2, c3 = (wide0 >> 32) ^ c3 ^ k1, wide0 % 2**32
        k0, k1 = (k0 + philox.WEYL[0]) % 2**32, (k1 + philox.WEYL[1]) % 2**32
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    ("counter", "key", "want"), KNOWN_ANSWERS, ids=["zeros", "ones", "digits_of_pi"]
)
def test_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], want: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    k0, k1 = (torch.tensor([word]) for word in key)
    got = philox.philox4x32((c0, c1, c2, c3), (k0, k1))
    assert tuple(int(word) for word in got) == want
    assert philox_of_ints(counter, key) == want


@pytest.mark.parametrize("numel", [1, 3, 4, 30], ids=lambda numel: f"numel={numel}")
@pytest.mark.parametrize(
    ("seed", "step"),
    [(0, 0), (123456789012345, 7), (-5, 2**32 + 3)],
    ids=["zero", "64bit_seed", "negative_seed_step_wraps"],
)
def test_uniform_follows_its_formula(seed: int, step: int, numel: int) -> None:
    got = philox.uniform(torch.tensor([seed, step]), 70, numel)
    key = (seed % 2**32, (seed >> 32) % 2**32)
    words = [philox_of_ints((e // 4, 0, 70, step % 2**32), key)[e % 4] for e in range(numel)]
    assert got.dtype == torch.float32
    assert got.tolist() == [(word >> 8) * 2.0**-24 for word in words]


def test_uniform_is_uniform() -> None:
    u = philox.uniform(torch.tensor([1, 2]), 0, 1 << 18)
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, bins=16, min=0.0, max=1.0)
    expected = u.numel() / 16
    # 99.9 % point of chi-squared with 15 degrees of freedom.
    assert ((counts - expected) ** 2 / expected).sum() < 37.7


def test_streams_are_uncorrelated() -> None:
    state = torch.tensor([1, 2])
    count = 1 << 16
    u = torch.stack([philox.uniform(state, stream, count) for stream in range(8)])
    correlation = torch.corrcoef(u) - torch.eye(8)
    assert correlation.abs().max() < 5 / count**0.5


def test_mask_counts_elements_in_nhwc_order() -> None:
    state, p = torch.tensor([9, 4]), torch.tensor([0.5])
    shape = torch.Size([2, 3, 4, 5])
    mask = philox.keep_mask(p, state, 6, shape)
    assert mask.shape == shape
    assert mask.is_contiguous(memory_format=torch.channels_last)
    flat = (philox.uniform(state, 6, 120) >= p).tolist()
    for n, c, h, w in [(0, 0, 0, 0), (0, 2, 0, 0), (1, 1, 3, 2), (1, 2, 3, 4), (0, 1, 2, 4)]:
        assert mask[n, c, h, w].item() == flat[((n * 4 + h) * 5 + w) * 3 + c]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_dropout_does_not_depend_on_the_memory_layout(layout: str) -> None:
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    state, p = torch.tensor([9, 4]), torch.tensor([0.5])
    want = philox.dropout(x, p, state, 6)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = torch.stack([x, x], dim=-1)[..., 0]
    assert torch.equal(philox.dropout(x, p, state, 6), want)
