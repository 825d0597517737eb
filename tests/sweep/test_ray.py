"""Sweeps on a local Ray: its retries, what is not tried again, stops, and a real search."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pdarts_fast.cli import main
from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.sweep import ray_runner
from pdarts_fast.sweep.directory import SweepDirectory
from pdarts_fast.sweep.ray_runner import Job, run_job
from pdarts_fast.sweep.run import SweepOptions, run_sweep

DEMO = ("--preset", "demo", "--device", "cpu", "--threads", "1")
HAS_RAY = importlib.util.find_spec("ray") is not None


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of two cores on this machine."""
    if not HAS_RAY:
        pytest.skip("ray is not installed: pip install 'pdarts-fast[ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    ray.init(
        address="local", num_cpus=2, log_to_driver=False, logging_level="error",
        include_dashboard=False,
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture
def sweep(cluster: None, stand_in: Any, tmp_path: Path) -> Callable[..., int]:
    """Runs a sweep of the stand-in on Ray in ``tmp_path/sweep``; keywords as in `SweepOptions`."""

    def run(**options: Any) -> int:
        given = {
            "sweep_dir": tmp_path / "sweep", "flags": DEMO, "command": ("sweep",), "ray": "",
            **options,
        }  # fmt: skip
        return run_sweep(SweepOptions(**given), stand_in.program)

    return run


def outcomes(path: Path) -> dict[str, str]:
    folder = SweepDirectory(path)
    return {run.name: folder.outcome(run).status for run in folder.read_plan().runs}


def test_runs_that_die_go_on_and_runs_that_fail_do_not(
    sweep: Any, stand_in: Any, tmp_path: Path
) -> None:
    stand_in.behave(seed0=["die", "die"], seed1=["fail"], seed2=["die"] * 9, meet=2)
    assert sweep(seeds=4, max_retries=2) == 1
    path = tmp_path / "sweep"
    assert outcomes(path) == {
        "seed0": "finished", "seed1": "failed", "seed2": "failed", "seed3": "finished",
    }  # fmt: skip
    words = [call["words"] for call in stand_in.attempts(path / "runs" / "seed0")]
    assert [one[-1] == "--resume" for one in words] == [False, True, True]
    assert len(stand_in.attempts(path / "runs" / "seed1")) == 1
    assert len(stand_in.attempts(path / "runs" / "seed2")) == 3
    runs = json.loads((path / "sweep.json").read_text())["runs"]
    assert runs[1]["error"] == "exit status 1: the loss is not finite"
    assert runs[2]["error"] == "killed by SIGKILL: begins"


def test_a_signal_stops_all_and_resume_goes_on(
    sweep: Any, stand_in: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in.behave(seed0=["sleep"], seed1=["sleep"])
    path = tmp_path / "sweep"
    notes = [path / "runs" / f"seed{n}" / "attempt-0" for n in (0, 1)]

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while not all(note.exists() for note in notes) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    start = time.monotonic()
    assert sweep(seeds=3) == 128 + signal.SIGINT
    assert time.monotonic() - start < 50, "they would have slept for a minute"
    assert set(outcomes(path).values()) == {"stopped"}
    for note in notes:
        pid = json.loads(note.read_text())["pid"]
        assert not stand_in.alive(pid)
    assert sweep(resume=True, flags=()) == 0
    assert set(outcomes(path).values()) == {"finished"}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to find the worker")
def test_a_run_whose_worker_is_killed_goes_on(sweep: Any, stand_in: Any, tmp_path: Path) -> None:
    stand_in.behave(seed0=["sleep"])
    run_dir = tmp_path / "sweep" / "runs" / "seed0"
    note = run_dir / "attempt-0"

    def kill_worker() -> None:
        deadline = time.monotonic() + 60
        while not (note.exists() and note.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.1)
        stat = Path(f"/proc/{json.loads(note.read_text())['pid']}/stat").read_text()
        os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)

    threading.Thread(target=kill_worker).start()
    start = time.monotonic()
    assert sweep(seeds=1) == 0
    assert time.monotonic() - start < 50, "it would have slept for a minute"
    calls = stand_in.attempts(run_dir)
    assert [call["words"][-1] == "--resume" for call in calls] == [False, True]
    deadline = time.monotonic() + 10
    while stand_in.alive(calls[0]["pid"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not stand_in.alive(calls[0]["pid"])


def test_a_real_search_on_ray(cluster: None, images: Path, tmp_path: Path) -> None:
    path = tmp_path / "sweep"
    flags = (
        "--dataset image-folder --image-size 8 --channels 1 --cells 3 --ops-kept 8 --epochs 2 "
        "--warmup-epochs 1 --skip-dropout 0 --batch-size 8 --threads 1 --device cpu"
    )
    words = ["sweep", *flags.split(), "--data", str(images), "--seeds", "1", "--ray"]
    assert main([*words, "--sweep-dir", str(path)]) == 0
    (run,) = json.loads((path / "sweep.json").read_text())["runs"]
    assert run["status"] == "finished"
    assert len(run["genotype"]["normal"]) == 8
    assert "stage 1/1: 3 cells" in (path / "logs" / "seed0.log").read_text()


def test_gpus_are_left_to_ray(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--device cuda:1: Ray gives each run a GPU; use cuda"):
        run_sweep(SweepOptions(ray="", seeds=1, flags=("--preset", "demo", "--device", "cuda:1")))


def test_a_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not HAS_RAY:
        pytest.skip("ray is not installed: pip install 'pdarts-fast[ray]'")
    import ray

    def refuse(**options: Any) -> None:
        assert options["address"] == "there:6379"
        raise ConnectionError("no answer")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    options = SweepOptions(tmp_path / "sweep", seeds=1, ray="there:6379", flags=DEMO)
    with pytest.raises(RunError, match=r"--ray there:6379: no cluster there \(no answer\)"):
        run_sweep(options)


def test_without_ray_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_runner.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"extra: pip install 'pdarts-fast\[ray\]'"):
        run_sweep(SweepOptions(ray="", seeds=1, flags=DEMO))


def test_a_node_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    job = Job((), tmp_path / "runs" / "a", tmp_path / "logs" / "a.log", tmp_path, ("true",))
    with pytest.raises(RunError, match=r"does not see .*logs: all nodes have to share"):
        run_job(job)
