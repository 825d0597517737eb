"""Sweeps on a Ray of several nodes, all on this machine: where runs go, a node that is lost."""

from __future__ import annotations

import importlib.util
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pdarts_fast.sweep.directory import SweepDirectory
from pdarts_fast.sweep.run import SweepOptions, run_sweep

DEMO = ("--preset", "demo", "--device", "cpu", "--threads", "1")


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Three nodes with a core each; the first one is the head."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: pip install 'pdarts-fast[ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        nodes.add_node(num_cpus=1)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def raylet(node: Any) -> str:
    """What the processes of a node know it by."""
    return str(node.all_processes["raylet"][0].process.pid)


@pytest.fixture
def sweep(cluster: Any, stand_in: Any, tmp_path: Path) -> Callable[[int], int]:
    """Runs a sweep of so many runs of the stand-in on the cluster, in ``tmp_path/sweep``."""

    def run(seeds: int) -> int:
        path = tmp_path / "sweep"
        options = SweepOptions(path, seeds, ray=cluster.address, flags=DEMO, command=("sweep",))
        return run_sweep(options, stand_in.program)

    return run


def test_runs_go_to_all_nodes(sweep: Any, cluster: Any, stand_in: Any, tmp_path: Path) -> None:
    stand_in.behave(meet=3)
    assert sweep(3) == 0
    calls = [stand_in.attempts(tmp_path / "sweep" / "runs" / f"seed{n}") for n in range(3)]
    assert [len(of_run) for of_run in calls] == [1, 1, 1]
    assert {of_run[0]["raylet"] for of_run in calls} == set(map(raylet, cluster.list_all_nodes()))


def test_a_run_whose_node_is_lost_goes_on_at_another(
    sweep: Any, cluster: Any, stand_in: Any, tmp_path: Path
) -> None:
    """Neither run ends before there were three attempts: two, and the one after the loss."""
    stand_in.behave(meet=3)
    folders = [tmp_path / "sweep" / "runs" / f"seed{n}" for n in (0, 1)]
    lost: list[str] = []

    def lose_a_node() -> None:
        deadline = time.monotonic() + 60
        notes = [folder / "attempt-0" for folder in folders]
        while not all(note.exists() and note.stat().st_size for note in notes):
            if time.monotonic() > deadline:
                return
            time.sleep(0.1)
        used = {json.loads(note.read_text())["raylet"] for note in notes}
        node = next(one for one in cluster.list_all_nodes()[1:] if raylet(one) in used)
        lost.append(raylet(node))
        cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=lose_a_node)
    thread.start()
    assert sweep(2) == 0
    thread.join()
    calls = {folder.name: stand_in.attempts(folder) for folder in folders}
    (moved,) = (name for name, of_run in calls.items() if of_run[0]["raylet"] in lost)
    (stayed,) = calls.keys() - {moved}
    assert [call["words"][-1] == "--resume" for call in calls[moved]] == [False, True]
    assert calls[moved][1]["raylet"] in set(map(raylet, cluster.list_all_nodes()))
    assert len(calls[stayed]) == 1
    assert not stand_in.alive(calls[moved][0]["pid"])
    folder = SweepDirectory(tmp_path / "sweep")
    assert {folder.outcome(run).status for run in folder.read_plan().runs} == {"finished"}
    runs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["runs"]
    assert [run["error"] for run in runs] == [None, None]
