"""Searches of two ranks: their result, resuming on another number of ranks, failures of one."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdarts_fast.alphas import load_alphas

STEP = "pdarts_fast.step:SearchStep._step"
FORWARD = "pdarts_fast.step:SearchStep.forward"
# 12 images for the weights and 15 for the alphas: the last batch of a validation has three.
FLAGS = ("--batch-size", 4, "--data-split", 0.4445, "--checkpoint-interval", 1)
PLAIN = (*FLAGS, "--skip-dropout", 0)

Run = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def alone(processes: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search without BatchNorm by one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    process = processes.run(tiny(run, *PLAIN), network="PlainNetwork")
    assert process.status == 0, process.stderr
    return run


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_up_to_rounding(run: Path, other: Path) -> None:
    for stage, (mine, yours) in enumerate(zip(load_alphas(run), load_alphas(other), strict=True)):
        for kind in ("normal", "reduce"):
            np.testing.assert_allclose(
                mine[kind], yours[kind], rtol=0, atol=5e-4, err_msg=f"stage {stage + 1} {kind}"
            )
    for mine, yours in zip(records(run), records(other), strict=True):
        assert mine.keys() == yours.keys()
        for key, value in mine.items():
            if key.endswith("seconds") or key in ("images_per_second", "peak_memory_mib"):
                continue
            if isinstance(value, float):
                assert value == pytest.approx(yours[key], abs=1e-4), (mine["kind"], key)
            else:
                assert value == yours[key], (mine["kind"], key)


def test_two_ranks_find_what_one_process_finds_and_rank_0_alone_writes(
    alone: Path, run_ranks: Run, tiny: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first, second = run_ranks(tiny(run, *PLAIN), network="PlainNetwork")
    assert (first.status, second.status) == (0, 0), first.stderr + second.stderr
    assert_same_up_to_rounding(run, alone)
    assert "genotype (at most" in first.stdout
    assert first.stderr.count(f"writes into {run}") == 1
    assert (second.stdout, second.stderr) == ("", "")
    assert {path.name for path in run.iterdir()} == {path.name for path in alone.iterdir()}
    assert json.loads((run / "config.json").read_text())["hardware"]["ranks"] == 2


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)], ids=["2-to-1", "1-to-2"])
def test_resume_on_another_number_of_ranks(
    before: int, after: int, alone: Path, run_ranks: Run, processes: Any, tiny: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for size, flags, kill in ((before, [], (STEP, 18, "before")), (after, ["--resume"], None)):
        command = tiny(run, *PLAIN, *flags)
        options: dict[str, Any] = {"network": "PlainNetwork", "kill": kill}
        run_them = run_ranks if size > 1 else lambda *args, **kw: [processes.run(*args, **kw)]
        ended = run_them(command, **options)
        for process in ended:
            assert process.status == (-signal.SIGKILL if kill else 0), process.stderr
    assert f"goes on in {run} after" in ended[0].stderr
    assert_same_up_to_rounding(run, alone)


@pytest.fixture(scope="module")
def whole(
    run_ranks: Run, tiny: Any, outcome: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What a search of two ranks with BatchNorm and skip dropout ends in."""
    run = tmp_path_factory.mktemp("whole") / "run"
    for process in run_ranks(tiny(run, *FLAGS)):
        assert process.status == 0, process.stderr
    return outcome(run)


@pytest.mark.parametrize("rank", [0, 1], ids=["rank0", "rank1"])
def test_a_killed_rank_ends_the_others_within_seconds_and_resume_is_exact(
    rank: int, whole: Any, start_ranks: Run, run_ranks: Run, tiny: Any, outcome: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ranks = start_ranks(tiny(run, *FLAGS), only={rank: {"kill": (STEP, 20, "before")}})
    assert ranks[rank].wait() == -signal.SIGKILL
    killed = time.monotonic()
    other = ranks[1 - rank]
    assert other.wait() == 1
    assert time.monotonic() - killed < 10
    message = "pdarts-fast: error: stopped, because another rank has ended"
    assert (message in other.stderr) == (rank == 1), other.stderr
    assert "Traceback" not in other.stderr
    for process in run_ranks(tiny(run, *FLAGS, "--resume")):
        assert process.status == 0, process.stderr
    assert outcome(run) == whole


@pytest.mark.parametrize("rank", [0, 1], ids=["rank0", "rank1"])
@pytest.mark.parametrize("place", [STEP, FORWARD], ids=["step", "validation"])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    place: str,
    rank: int,
    whole: Any,
    start_ranks: Run,
    run_ranks: Run,
    tiny: Any,
    outcome: Any,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    ranks = start_ranks(tiny(run, *FLAGS), pauses={place: 0.05})
    deadline = time.monotonic() + 30
    lines = 3 if place == STEP else 6
    while time.monotonic() < deadline:
        file = run / "metrics.jsonl"
        if file.exists() and file.read_text().count("\n") >= lines:
            break
        time.sleep(0.01)
    os.kill(ranks[rank].pid, signal.SIGINT)
    asked = time.monotonic()
    assert [process.wait() for process in ranks] == [130, 130], ranks[0].stderr + ranks[1].stderr
    assert time.monotonic() - asked < 10
    assert ranks[0].stderr.splitlines()[-1].startswith("stopped by SIGINT")
    assert ranks[1].stderr == ""
    for process in run_ranks(tiny(run, *FLAGS, "--resume")):
        assert process.status == 0, process.stderr
    assert outcome(run) == whole


FAILURES = {
    "a-bug-on-rank-1": (
        1, (STEP, 9, "bug"), "stopped, because another rank failed: rank 1: RuntimeError: a bug"
    ),
    "not-finite-on-rank-1": (1, (FORWARD, 9, "nan"), "is not finite; the last good checkpoint"),
    "full-disk-on-rank-0": (0, ("os:fsync", 9, "ENOSPC"), "No space left on device"),
    "other-alphas-on-rank-1": (
        1, (STEP, 9, "drift"), "the weights and alphas of rank 1 differ from those of rank 0"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("rank", "fault", "message"), FAILURES.values(), ids=FAILURES)
def test_a_failure_of_one_rank_ends_all_with_one_line_of_rank_0(
    rank: int, fault: Any, message: str, run_ranks: Run, tiny: Any, tmp_path: Path
) -> None:
    started = time.monotonic()
    first, second = run_ranks(tiny(tmp_path / "run", *FLAGS), only={rank: {"fault": fault}})
    assert time.monotonic() - started < 30
    assert message in first.error_line(1)
    assert second.status == 1
    # What is no error of the user's comes with a traceback, from the rank that has it.
    assert second.stderr == "" or fault[2] == "bug"


USAGE = {
    "odd-batch": (["--batch-size", 5], {}, "--batch-size 5 is the batch of all 2 ranks together"),
    "one-gpu": (["--device", "cuda:0"], {}, "--device cuda:0 is one GPU for 2 ranks"),
    "no-images": (["--data", "/nowhere"], {}, "--data"),
    "wrong-flag": (["--epochs", "many"], {}, "many"),
    "restart-without-folder": (
        ["--run-dir", None],
        {"TORCHELASTIC_MAX_RESTARTS": "1", "TORCHELASTIC_RUN_ID": "x"},
        "torchrun --max-restarts needs --run-dir DIR",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("flags", "environment", "message"), USAGE.values(), ids=USAGE)
def test_wrong_usage_is_one_line_of_rank_0(
    flags: list[Any],
    environment: dict[str, str],
    message: str,
    run_ranks: Run,
    tiny: Any,
    tmp_path: Path,
) -> None:
    command = tiny(tmp_path / "run", "--batch-size", 4, *flags)
    if None in flags:
        command = command[: command.index("--run-dir")]
    first, second = run_ranks(command, environment=environment)
    assert message in first.error_line(2)
    assert (second.status, second.stderr) == (2, "")
    assert not (tmp_path / "run").exists()


def test_other_commands_refuse_torchrun(run_ranks: Run, tmp_path: Path) -> None:
    first, second = run_ranks(["derive", str(tmp_path)])
    assert "derive runs in one process: start it without torchrun" in first.error_line(2)
    assert (second.status, second.stderr) == (2, "")


def test_a_restart_goes_on_with_the_run_of_its_own_launch_only(
    whole: Any, run_ranks: Run, tiny: Any, outcome: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    launch = {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RUN_ID": "mine"}
    again = {**launch, "TORCHELASTIC_RESTART_COUNT": "1"}
    for process in run_ranks(tiny(run, *FLAGS), environment=launch, kill=(STEP, 9, "before")):
        assert process.status == -signal.SIGKILL
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    other = {**again, "TORCHELASTIC_RUN_ID": "another"}
    first, _ = run_ranks(tiny(run, *FLAGS), environment=other)
    assert "exists and is not empty" in first.error_line(2)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    # --overwrite is what the first attempt was to do.
    for process in run_ranks(tiny(run, *FLAGS, "--overwrite"), environment=again):
        assert process.status == 0, process.stderr
    assert outcome(run) == whole
