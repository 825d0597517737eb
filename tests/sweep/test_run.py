"""Sweeps with a quick stand-in for the search: order, GPUs, failures, stops, going on."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.run.report import REPORT_FILE
from pdarts_fast.sweep import run as sweep_run
from pdarts_fast.sweep import targets as sweep_targets
from pdarts_fast.sweep.directory import SweepDirectory
from pdarts_fast.sweep.run import SweepOptions, gpu_slots, run_sweep

DEMO = ("--preset", "demo", "--device", "cpu")


@pytest.fixture
def sweep(stand_in: Any, tmp_path: Path) -> Callable[..., int]:
    """Runs a sweep of the stand-in in ``tmp_path/sweep``; keywords as in `SweepOptions`."""

    def run(**options: Any) -> int:
        given = {"sweep_dir": tmp_path / "sweep", "flags": DEMO, "command": ("sweep",), **options}
        return run_sweep(SweepOptions(**given), stand_in.program)

    return run


def outcomes(path: Path) -> dict[str, str]:
    folder = SweepDirectory(path)
    return {run.name: folder.outcome(run).status for run in folder.read_plan().runs}


def times(path: Path, name: str) -> list[float]:
    return json.loads((path / "runs" / name / "times").read_text())


def test_runs_go_one_after_the_other_on_a_cpu(
    sweep: Any, stand_in: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert sweep(seeds=2, vary=("lr=0.1,0.2",)) == 0
    path = tmp_path / "sweep"
    names = [f"lr={lr}-seed{seed}" for lr in (0.1, 0.2) for seed in (0, 1)]
    assert outcomes(path) == dict.fromkeys(names, "finished")
    spans = [times(path, name) for name in names]
    assert all(spans[n][1] <= spans[n + 1][0] for n in range(3))
    (call,) = stand_in.attempts(path / "runs" / names[-1])
    run_dir = str(path / "runs" / names[-1])
    assert call["words"] == [
        "search", *DEMO, "--lr", "0.2", "--seed", "1", "--run-dir", run_dir,
    ]  # fmt: skip
    assert call["gpu"] == os.environ.get("CUDA_VISIBLE_DEVICES")
    assert "lr=0.1-seed0: started" in caplog.messages
    assert any(text.endswith("[4/4]") for text in caplog.messages)
    assert (path / REPORT_FILE).is_file()
    assert json.loads((path / "sweep.json").read_text())["counts"]["finished"] == 4


def test_one_run_a_gpu(
    sweep: Any, stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5e")
    monkeypatch.setattr(sweep_run.torch.cuda, "device_count", lambda: 2)
    # The check of the devices would need real ones.
    monkeypatch.setattr(sweep_run, "pick_device", lambda name: sweep_run.torch.device("cpu"))
    stand_in.behave(meet=2)
    assert sweep(seeds=4, flags=("--preset", "demo", "--device", "cuda")) == 0
    path = tmp_path / "sweep"
    used = [stand_in.attempts(path / "runs" / f"seed{n}")[0]["gpu"] for n in range(4)]
    assert sorted(used) == ["3", "3", "GPU-5e", "GPU-5e"]


@pytest.mark.parametrize(
    ("variable", "count", "slots"),
    [(None, 2, ["0", "1"]), ("2,3", 2, ["2", "3"]), ("", 0, []), ("-1", 0, []), ("1,-1", 1, ["1"])],
    ids=["all", "two named", "none named", "hidden", "cut short"],
)
def test_gpus_of_this_process(variable: str | None, count: int, slots: list[str]) -> None:
    environment = {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}
    assert gpu_slots(environment, count) == slots


def test_jobs_run_side_by_side(sweep: Any, stand_in: Any) -> None:
    stand_in.behave(meet=2)
    assert sweep(seeds=2, jobs=2) == 0


def test_data_is_downloaded_once_before_the_runs(
    sweep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    def load(name: str, folder: Path, **options: Any) -> None:
        assert not list((tmp_path / "sweep" / "runs").iterdir())
        calls.append((name, folder, options["download"]))

    monkeypatch.setattr(sweep_run, "load_dataset", load)
    data = tmp_path / "data"
    flags = ("--dataset", "cifar10", "--download", "--data", str(data), "--device", "cpu")
    assert sweep(seeds=2, vary=("lr=0.1,0.2",), flags=flags) == 0
    assert calls == [("cifar10", data, True)]


def test_a_failing_run_does_not_stop_the_others_and_can_be_tried_again(
    sweep: Any, stand_in: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.behave(seed0=["fail"], seed1=["die"])
    assert sweep(seeds=3) == 1
    path = tmp_path / "sweep"
    assert outcomes(path) == {"seed0": "failed", "seed1": "failed", "seed2": "finished"}
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("pdarts-fast: error: 2 of 3 runs failed (seed0, seed1); their logs are")
    assert str(path / "logs") in said
    summary = json.loads((path / "sweep.json").read_text())
    errors = {run["name"]: run["error"] for run in summary["runs"]}
    assert errors["seed0"] == "exit status 1: the loss is not finite"
    assert errors["seed1"] == "killed by SIGKILL: begins"
    page = (path / REPORT_FILE).read_text()
    assert "seed0 failed (exit status 1: the loss is not finite). Its log: logs/seed0.log" in page

    assert sweep(resume=True, seeds=None, flags=()) == 0
    assert set(outcomes(path).values()) == {"finished"}
    again = stand_in.attempts(path / "runs" / "seed0")
    assert [call["words"][-1] == "--resume" for call in again] == [False, True]
    assert len(stand_in.attempts(path / "runs" / "seed2")) == 1, "a finished run is kept"


def test_a_sweep_can_grow(sweep: Any, stand_in: Any, tmp_path: Path) -> None:
    assert sweep(seeds=1) == 0
    assert sweep(seeds=2, resume=True, flags=()) == 0
    path = tmp_path / "sweep"
    assert outcomes(path) == {"seed0": "finished", "seed1": "finished"}
    assert len(stand_in.attempts(path / "runs" / "seed0")) == 1
    with pytest.raises(UsageError, match=r"holds another sweep: settings of seed0 differ: --lr"):
        sweep(resume=True, flags=(*DEMO, "--lr", "0.5"))
    with pytest.raises(UsageError, match=r"its run seed0 is not among those asked for"):
        sweep(resume=True, vary=("lr=0.1,0.2",), flags=())


def test_folders_that_cannot_be_used(sweep: Any, tmp_path: Path) -> None:
    path = tmp_path / "sweep"
    with pytest.raises(UsageError, match=r"--sweep-dir .* holds no sweep to go on with"):
        sweep(resume=True, flags=())
    path.mkdir()
    (path / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match=r"is not empty and holds no sweep: give another folder"):
        sweep(seeds=1)
    with pytest.raises(UsageError, match=r"is a file: give a folder"):
        sweep(seeds=1, sweep_dir=path / "letter.txt")
    assert sweep(seeds=1, sweep_dir=tmp_path / "other") == 0
    with pytest.raises(UsageError, match=r"holds a sweep: --resume goes on with it; give another"):
        sweep(seeds=1, sweep_dir=tmp_path / "other")
    (tmp_path / "other" / "plan.json").write_text('{"plan": {"runs": [{}]}}')
    with pytest.raises(RunError, match=r"plan.json is damaged"):
        sweep(resume=True, flags=(), sweep_dir=tmp_path / "other")


def test_one_process_at_a_time(sweep: Any, tmp_path: Path) -> None:
    assert sweep(seeds=1) == 0
    held = SweepDirectory(tmp_path / "sweep")
    held.open()
    with pytest.raises(RunError, match=r"another process is running the sweep in"):
        sweep(resume=True, flags=())
    held.close()
    assert sweep(resume=True, flags=()) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"resume": True, "sweep_dir": None}, "--resume needs --sweep-dir DIR"),
        ({"jobs": 0}, "--jobs 0: wanted at least 1"),
        ({"max_retries": 1}, "--max-retries is Ray's"),
        ({"ray": "", "jobs": 2}, "--jobs does not go with --ray"),
        ({"ray": "", "max_retries": -1}, "--max-retries -1: wanted at least 0"),
        ({"flags": ("--dataset", "cifar10", "--data", "gone")}, "--data gone: no such folder"),
        ({"flags": ("--preset", "demo", "--device", "cuda:9")}, "--device cuda:9"),
        (
            {"flags": ("--dataset", "digits", "--image-size", "16", "--then-train")},
            "--then-train: --cutout 16 would erase whole images",
        ),
    ],
    ids=["resume", "jobs", "retries", "ray-jobs", "ray-retries", "data", "device", "then-train"],
)
def test_flags_are_checked_before_anything_starts(
    sweep: Any, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as error:
        sweep(**{"seeds": 1, **options})
    assert said in str(error.value)
    assert not (tmp_path / "sweep").exists()


INFEASIBLE = {
    "params": ((), ("--target", "params=1k"), "--target cannot be met: params=1.000 k"),
    "one-of-two": (
        (), ("--target", "params=60k", "memory=1kB"), "--target cannot be met: memory=1.000 kB"
    ),
    "latency": ((), ("--target", "latency=1us"), "--target cannot be met: latency=0.001 ms"),
    "one-setting": (
        ("target=params=60k,macs=2k",), (), "--vary target=macs=2k: --target cannot be met: macs=2"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("vary", "flags", "said"), INFEASIBLE.values(), ids=INFEASIBLE)
def test_targets_that_no_cell_meets_are_refused_before_anything_starts(
    sweep: Any, vary: tuple[str, ...], flags: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as error:
        sweep(seeds=2, vary=vary, flags=(*DEMO, *flags))
    assert str(error.value).startswith(said)
    assert str(error.value).endswith("; give a larger limit")
    assert not (tmp_path / "sweep").exists()


def test_a_latency_that_a_run_has_measured_counts_on_a_resume(
    sweep: Any, stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def note(config: Any, classes: int, device: Any, folder: Path) -> None:
        asked.append((config.target, classes, folder))

    monkeypatch.setattr(sweep_targets, "make_costs", note)
    flags = (*DEMO, "--target", "latency=1s", "params=60k")
    assert sweep(seeds=2, flags=flags) == 0
    folder = tmp_path / "sweep" / "runs" / "seed0"
    assert asked == [(("latency=1s", "params=60k"), 10, folder)]
    runs = SweepDirectory(tmp_path / "sweep").read_plan().runs
    sweep_targets.check_targets(runs, lambda run: folder, on_ray=True)
    assert asked[1:] == [(("params=60k",), 10, None)], "nodes of a cluster have their own latency"


def test_a_signal_stops_all_and_resume_goes_on(
    sweep: Any, stand_in: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in.behave(seed0=["sleep"], seed1=["sleep"])
    path = tmp_path / "sweep"

    def interrupt() -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if all((path / "runs" / f"seed{n}" / "attempt-0").exists() for n in (0, 1)):
                break
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert sweep(seeds=3, jobs=2) == 128 + signal.SIGINT
    assert outcomes(path) == {"seed0": "stopped", "seed1": "stopped", "seed2": "waiting"}
    for name in ("seed0", "seed1"):
        assert not stand_in.alive(stand_in.attempts(path / "runs" / name)[0]["pid"])
    assert caplog.messages[-1].endswith(f"pdarts-fast sweep --resume --sweep-dir {path} goes on")
    assert sweep(resume=True, flags=()) == 0
    assert set(outcomes(path).values()) == {"finished"}


def wait_until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.05)


SWEEP_PROGRAM = """
import sys
from pathlib import Path
from pdarts_fast.sweep.run import SweepOptions, run_sweep
options = SweepOptions(sweep_dir=Path(sys.argv[1]), seeds=2, jobs=2, flags=tuple(sys.argv[3:]))
sys.exit(run_sweep(options, (sys.executable, sys.argv[2])))
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to look at processes")
def test_runs_end_when_their_sweep_is_killed(sweep: Any, stand_in: Any, tmp_path: Path) -> None:
    stand_in.behave(seed0=["sleep"], seed1=["sleep"])
    path = tmp_path / "sweep"
    words = [sys.executable, "-c", SWEEP_PROGRAM, str(path), str(stand_in.path), *DEMO]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    notes = [path / "runs" / f"seed{n}" / "attempt-0" for n in (0, 1)]
    wait_until(lambda: all(note.exists() and note.stat().st_size for note in notes))
    pids = [json.loads(note.read_text())["pid"] for note in notes]
    assert all(map(stand_in.alive, pids))
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(stand_in.alive, pids)), 10)
    assert outcomes(path) == {"seed0": "waiting", "seed1": "waiting"}
    assert sweep(resume=True, flags=()) == 0
    assert set(outcomes(path).values()) == {"finished"}
    assert stand_in.attempts(path / "runs" / "seed0")[1]["words"][-1] == "--resume"
