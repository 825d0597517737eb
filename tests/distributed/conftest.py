"""Starts the ranks of a run as torchrun would, without importing torch for each."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any

import pytest


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def start_ranks(processes: Any) -> Callable[..., list[Any]]:
    """Starts ``pdarts-fast arguments`` on two ranks.

    ``only`` holds options of `Processes.start` for some ranks, the other options are for all.
    """

    def start(
        arguments: Sequence[str],
        *,
        size: int = 2,
        environment: dict[str, str] | None = None,
        only: dict[int, dict[str, Any]] | None = None,
        **options: Any,
    ) -> list[Any]:
        shared = {
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            **(environment or {}),
        }
        return [
            processes.start(
                arguments,
                environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                **options,
                **(only or {}).get(rank, {}),
            )
            for rank in range(size)
        ]

    return start


@pytest.fixture(scope="module")
def run_ranks(start_ranks: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """`start_ranks`, and waits for the end of all of them."""

    def run(*args: Any, **options: Any) -> list[Any]:
        ranks = start_ranks(*args, **options)
        for process in ranks:
            process.wait()
        return ranks

    return run
