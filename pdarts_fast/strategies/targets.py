"""Targets on what a derived cell may cost: ``params=3.0M``, ``latency=12ms``. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pdarts_fast.errors import UsageError

PARAMS, MACS, MEMORY, LATENCY = "params", "macs", "memory", "latency"
RESOURCES = (PARAMS, MACS, MEMORY, LATENCY)

_COUNTS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}
_BYTES = {
    "B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30,
}  # fmt: skip
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
UNITS = {PARAMS: _COUNTS, MACS: _COUNTS, MEMORY: _BYTES, LATENCY: _SECONDS}
_TEXT = re.compile(r"(?P<resource>[a-z]+)=(?P<number>[0-9]+(\.[0-9]+)?([eE][0-9]+)?)(?P<unit>\w*)")


@dataclass(frozen=True)
class Target:
    """Largest cost allowed.

    Attributes:
        resource: One of ``RESOURCES``.
        limit: In parameters, multiply-adds, bytes or seconds; above 0.
    """

    resource: str
    limit: float


def parse_target(text: str) -> Target:
    """A target from its text, ``RESOURCE=NUMBER[UNIT]``.

    Raises:
        UsageError: No such resource or unit, or the number is not positive.
    """
    match = _TEXT.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"--target {text}: wanted RESOURCE=LIMIT, like params=3.0M, macs=500M, memory=40MB "
            "or latency=12ms"
        )
    resource, unit = match["resource"], match["unit"]
    if resource not in RESOURCES:
        raise UsageError(f"--target {text}: {resource!r} is not one of {', '.join(RESOURCES)}")
    if unit not in UNITS[resource]:
        wanted = ", ".join(name or "none" for name in UNITS[resource])
        raise UsageError(f"--target {text}: unit {unit!r} of {resource} is not one of {wanted}")
    limit = float(match["number"]) * UNITS[resource][unit]
    if not 0 < limit < float("inf"):
        raise UsageError(f"--target {text}: wanted a positive limit")
    return Target(resource, limit)


def parse_targets(texts: Sequence[str]) -> tuple[Target, ...]:
    """All targets of a search.

    Raises:
        UsageError: One is wrong, or a resource has two.
    """
    targets = tuple(parse_target(text) for text in texts)
    seen = [target.resource for target in targets]
    for resource in seen:
        if seen.count(resource) > 1:
            raise UsageError(f"--target {resource}: is given {seen.count(resource)} times; give 1")
    return targets


def show(resource: str, value: float) -> str:
    """A cost for reading: ``2.912 M``, ``12.3 ms``, ``41.2 MB``."""
    if resource == LATENCY:
        return f"{1e3 * value:.3f} ms"
    unit = "B" if resource == MEMORY else ""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3f} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()
