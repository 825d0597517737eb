"""What the environment of a launcher means."""

from __future__ import annotations

import pytest

from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.launch import Launch, mark_reported, read_launch, should_print, speaker

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1",
    "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_MAX_RESTARTS": "5",
    "TORCHELASTIC_RUN_ID": "job7",
}  # fmt: skip


def test_a_process_alone() -> None:
    assert read_launch({}) == read_launch({"WORLD_SIZE": "1", "RANK": "0"}) == Launch()


def test_what_torchrun_sets() -> None:
    assert read_launch(TORCHRUN) == Launch(3, 4, 1, 2, 5, "torchrun job7")


def test_one_process_of_torchrun_restarts_too() -> None:
    launch = read_launch({**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"})
    assert (launch.size, launch.restarts, launch.identity) == (1, 2, "torchrun job7")


def test_without_a_run_id_the_launch_is_known_by_its_parent() -> None:
    one, two = (read_launch({**TORCHRUN, "TORCHELASTIC_RUN_ID": "none"}) for _ in "12")
    assert one.identity == two.identity != "torchrun none"


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_an_environment_is_refused(missing: str) -> None:
    with pytest.raises(UsageError, match=f"WORLD_SIZE is 4 but {missing} is not set"):
        read_launch({name: value for name, value in TORCHRUN.items() if name != missing})


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(UsageError, match="WORLD_SIZE is 'two'"):
        read_launch({**TORCHRUN, "WORLD_SIZE": "two"})


def test_who_prints_an_error() -> None:
    first = {**TORCHRUN, "RANK": "0"}
    assert should_print(UsageError(""), {"RANK": "3"})
    assert should_print(UsageError(""), first)
    assert not should_print(UsageError(""), TORCHRUN)
    assert should_print(RunError(""), TORCHRUN)
    error = RunError("")
    mark_reported(error)
    assert not should_print(error, TORCHRUN)
    assert (speaker(TORCHRUN), speaker(first), speaker({"RANK": "3"})) == ("rank 3: ", "", "")
