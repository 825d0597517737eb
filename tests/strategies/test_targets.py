"""Targets as text."""

from __future__ import annotations

import pytest

from pdarts_fast.errors import UsageError
from pdarts_fast.strategies.targets import Target, parse_target, parse_targets, show


@pytest.mark.parametrize(
    ("text", "resource", "limit"),
    [
        ("params=3.0M", "params", 3e6),
        ("params=2912073", "params", 2912073.0),
        ("params=60k", "params", 6e4),
        ("macs=0.5G", "macs", 5e8),
        ("macs=5e8", "macs", 5e8),
        ("memory=40MB", "memory", 4e7),
        ("memory=2MiB", "memory", 2.0**21),
        ("latency=12ms", "latency", 0.012),
        ("latency=800us", "latency", 8e-4),
        ("latency=1s", "latency", 1.0),
    ],
)
def test_units(text: str, resource: str, limit: float) -> None:
    assert parse_target(text) == Target(resource, pytest.approx(limit, rel=1e-15))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["3.0M"], "--target 3.0M: wanted RESOURCE=LIMIT"),
        (["params=-3M"], "wanted RESOURCE=LIMIT"),
        (["params="], "wanted RESOURCE=LIMIT"),
        (["params=0"], "wanted a positive limit"),
        (["params=1e999"], "wanted a positive limit"),
        (["flops=3M"], "'flops' is not one of params, macs, memory, latency"),
        (["latency=12"], "unit '' of latency is not one of us, ms, s"),
        (["params=12ms"], "unit 'ms' of params is not one of none, k, K, M, G"),
        (["params=1M", "macs=1M", "params=2M"], "--target params: is given 2 times"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_wrong_targets_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_targets(texts)
    assert message in str(caught.value)


def test_costs_for_reading() -> None:
    assert show("params", 2_912_073) == "2.912 M"
    assert show("macs", 532_174_464) == "532.174 M"
    assert show("latency", 0.0123) == "12.300 ms"
    assert show("memory", 90_021_928) == "90.022 MB"
    assert show("params", 12.0) == "12"
