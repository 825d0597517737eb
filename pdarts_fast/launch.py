"""How this process was started: alone, or by torchrun as one of several ranks. No torch."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from pdarts_fast.errors import UsageError

# Where torchrun's run id says nothing: it was started without --standalone and --rdzv-id.
_NO_RUN_ID = ("", "none")
_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """What the launcher says in the environment.

    Attributes:
        rank: Number of this process in 0..size - 1; rank 0 writes and prints.
        size: Number of processes of the run, over all machines.
        local_rank: Number of this process on its machine: the index of its GPU.
        restarts: How often torchrun has started the processes again.
        max_restarts: How often it would.
        identity: What all attempts of one launch share and no other launch has; empty without
            torchrun.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarts: int = 0
    max_restarts: int = 0
    identity: str = ""


def read_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """Reads the environment that torchrun, or a launcher like it, has set.

    Args:
        environment: Variables by name (default: those of this process).

    Raises:
        UsageError: Several processes are announced but not how they find each other.
    """
    values = os.environ if environment is None else environment
    size = _number(values, "WORLD_SIZE", 1)
    if size > 1:
        missing = [name for name in _NEEDED if not values.get(name)]
        if missing:
            raise UsageError(
                f"WORLD_SIZE is {size} but {', '.join(missing)} is not set: start the processes "
                "with torchrun, or unset WORLD_SIZE"
            )
    elif "TORCHELASTIC_RUN_ID" not in values:
        return Launch()
    run_id = values.get("TORCHELASTIC_RUN_ID", "")
    if run_id in _NO_RUN_ID:
        # All attempts of a launch have the same torchrun process as parent.
        run_id = f"{socket.gethostname()} {os.getppid()}"
    return Launch(
        rank=_number(values, "RANK", 0),
        size=size,
        local_rank=_number(values, "LOCAL_RANK", 0),
        restarts=_number(values, "TORCHELASTIC_RESTART_COUNT", 0),
        max_restarts=_number(values, "TORCHELASTIC_MAX_RESTARTS", 0),
        identity=f"torchrun {run_id}",
    )


def mark_reported(error: BaseException, reported: bool = True) -> None:
    """Notes on an error that every rank has whether another one tells the user."""
    error.reported_by_another_rank = reported  # type: ignore[attr-defined]


def should_print(error: BaseException, environment: Mapping[str, str] | None = None) -> bool:
    """Whether this process is the one to tell the user about an error.

    A usage error follows from the command line, which all ranks share: rank 0 tells it.
    """
    reported = getattr(error, "reported_by_another_rank", None)
    if reported is not None:
        return not reported
    values = os.environ if environment is None else environment
    several = values.get("WORLD_SIZE", "1") != "1"
    return not (several and isinstance(error, UsageError) and values.get("RANK", "0") != "0")


def speaker(environment: Mapping[str, str] | None = None) -> str:
    """What an error line of a rank other than 0 begins with: ``rank N: ``; empty for rank 0."""
    values = os.environ if environment is None else environment
    rank = values.get("RANK", "0") if values.get("WORLD_SIZE", "1") != "1" else "0"
    return "" if rank == "0" else f"rank {rank}: "


def _number(values: Mapping[str, str], name: str, default: int) -> int:
    text = values.get(name, "")
    if not text:
        return default
    if not text.isdigit():
        raise UsageError(
            f"{name} is {text!r} in the environment: wanted a number, as torchrun sets"
        )
    return int(text)
