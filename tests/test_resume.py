"""Searches that are killed, interrupted or damaged, and go on with --resume, bit for bit."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pdarts_fast.run.checkpoint import CheckpointFolder

REPLACE = "os:replace"
FSYNC = "os:fsync"
LINE = "pdarts_fast.run.files:JsonLines.write"
STEP = "pdarts_fast.step:SearchStep._step"
FORWARD = "pdarts_fast.step:SearchStep.forward"
BUILD = "pdarts_fast.search:Network"
UNLINK = "pathlib:Path.unlink"
DROP = "pdarts_fast.search_space:drop_ops"
DERIVE = "pdarts_fast.search_space:derive"
DRAW = "pdarts_fast.run_search:draw_genotype"
REPORT = "pdarts_fast.run_search:write_report"
PLACES = [REPLACE, FSYNC, LINE, STEP, FORWARD, BUILD, UNLINK, DROP, DERIVE, DRAW, REPORT]
EVERY_STEP = ("--checkpoint-interval", 1)


@pytest.fixture(scope="module")
def whole(
    processes: Any, tiny: Any, outcome: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What an uninterrupted search ends in, and how often it passes every place."""
    run = tmp_path_factory.mktemp("whole") / "run"
    process = processes.run(tiny(run, *EVERY_STEP), counts=PLACES)
    assert process.status == 0, process.stderr
    return outcome(run) | {"counts": process.counts}


@pytest.fixture
def same(whole: dict[str, Any], outcome: Any) -> Callable[[Path], None]:
    """Asserts that a run ended like the uninterrupted one."""

    def check(run: Path) -> None:
        got = outcome(run)
        for name, value in got.items():
            assert value == whole[name], name
        assert set(got) == set(whole) - {"counts"}
        kept = sorted((run / "checkpoints").iterdir())
        assert [path.suffix for path in kept] == [".json", ".pt"] * 2, kept
        assert not list(run.glob("**/*.tmp"))

    return check


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.partition(":")[2])
def test_killed_once_at_random_calls_of_every_kind(
    place: str, when: str, whole: Any, same: Any, processes: Any, tiny: Any, tmp_path: Path
) -> None:
    calls = whole["counts"][place]
    rng = random.Random(f"{place} {when}")
    for call in rng.sample(range(1, calls + 1), min(calls, 2)):
        run = tmp_path / f"run-{call}"
        process = processes.run(tiny(run, *EVERY_STEP), kill=(place, call, when))
        assert process.status == -signal.SIGKILL, process.stderr
        resumed = processes.run(tiny(run, "--resume", *EVERY_STEP))
        assert resumed.status == 0, f"call {call}: {resumed.stderr}"
        same(run)


@pytest.mark.parametrize("call", [1, 4, 9], ids=lambda call: f"line{call}")
def test_killed_in_the_middle_of_a_line(
    call: int, same: Any, processes: Any, tiny: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = processes.run(tiny(run, *EVERY_STEP), kill=(LINE, call, "half"))
    assert process.status == -signal.SIGKILL
    assert processes.run(tiny(run, "--resume")).status == 0
    same(run)


@pytest.mark.parametrize(
    ("place", "interval"),
    [(REPLACE, 0), (REPLACE, 2), (FSYNC, 1), (STEP, 0), (STEP, 1)],
    ids=[
        "replace-interval0",
        "replace-interval2",
        "fsync-interval1",
        "step-interval0",
        "step-interval1",
    ],
)
def test_killed_again_and_again(
    place: str, interval: int, same: Any, processes: Any, tiny: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    rng = random.Random(f"{place} {interval}")
    flags = ("--checkpoint-interval", interval, "--resume")
    kills = 0
    while kills < 30:
        point = (place, rng.randint(4, 16), rng.choice(["before", "after"]))
        process = processes.run(tiny(run, *flags), kill=point)
        if process.status == 0:
            break
        assert process.status == -signal.SIGKILL, process.stderr
        kills += 1
    assert 2 <= kills < 30
    same(run)


def test_killed_from_outside_at_random_times(
    same: Any, processes: Any, tiny: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    rng = random.Random(7)
    for _ in range(4):
        process = processes.start(
            tiny(run, "--resume", "--checkpoint-interval", 2), pauses={STEP: 0.02, FSYNC: 0.005}
        )
        time.sleep(rng.uniform(0.2, 0.7))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert processes.run(tiny(run, "--resume")).status == 0
    same(run)


def test_resume_of_a_finished_search_changes_nothing(
    same: Any, processes: Any, tiny: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert processes.run(tiny(run)).status == 0
    (run / "genotype.json").unlink()
    assert processes.run(["search", "--resume", "--run-dir", str(run)]).status == 0
    same(run)


def wait_for_lines(run: Path, count: int) -> None:
    """Waits until metrics.jsonl has so many lines."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        file = run / "metrics.jsonl"
        if file.exists() and file.read_text().count("\n") >= count:
            return
        time.sleep(0.005)
    raise AssertionError(f"{run}: no {count} records in 30 seconds")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    ("slow", "lines"),
    [({STEP: 0.05}, 1), ({STEP: 0.05}, 9), ({FORWARD: 0.1}, 6)],
    ids=["first-stage", "second-stage", "validation"],
)
def test_a_signal_writes_a_checkpoint_and_resume_is_exact(
    signum: int, slow: Any, lines: int, same: Any, processes: Any, tiny: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = processes.start(tiny(run, "--checkpoint-interval", 0), pauses=slow)
    wait_for_lines(run, lines)
    os.kill(process.pid, signum)
    assert process.wait() == 128 + signum
    last = process.stderr.splitlines()[-1]
    assert last.startswith(f"stopped by {signal.Signals(signum).name}")
    assert last.endswith(f"pdarts-fast search --resume --run-dir {run} goes on")
    assert "Traceback" not in process.stderr
    assert list((run / "checkpoints").glob("*.pt"))
    assert processes.run(["search", "--resume", "--run-dir", str(run)]).status == 0
    same(run)


def test_a_second_interrupt_acts_at_once(
    same: Any, processes: Any, tiny: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    place = "pdarts_fast.search:save_state"
    process = processes.start(tiny(run, "--checkpoint-interval", 1), pauses={place: 20})
    deadline = time.monotonic() + 20
    while not (run / "config.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    started = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait() == 130
    assert time.monotonic() - started < 10
    assert process.stderr.splitlines()[-1] == "pdarts-fast: interrupted"
    assert "Traceback" not in process.stderr
    assert processes.run(tiny(run, "--resume")).status == 0
    same(run)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lose_json(path: Path) -> None:
    path.with_suffix(".json").unlink()


def damage_json(path: Path) -> None:
    path.with_suffix(".json").write_text("[1]")


DAMAGES = [truncate, flip_a_bit, empty, lose_json, damage_json]


@pytest.fixture
def stopped(processes: Any, tiny: Any, tmp_path: Path) -> Path:
    """A search that was killed in its second stage, with two checkpoints."""
    run = tmp_path / "run"
    process = processes.run(tiny(run, *EVERY_STEP), kill=(STEP, 14, "before"))
    assert process.status == -signal.SIGKILL
    assert len(list((run / "checkpoints").glob("*.pt"))) == 2
    return run


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    damage: Callable[[Path], None], stopped: Path, same: Any, processes: Any
) -> None:
    newest = max((stopped / "checkpoints").glob("*.pt"))
    damage(newest)
    process = processes.run(["search", "--resume", "--run-dir", str(stopped)])
    assert process.status == 0, process.stderr
    reports = [line for line in process.stderr.splitlines() if "is ignored" in line]
    assert len(reports) == 1
    assert newest.name in reports[0]
    assert "goes on in" in process.stderr
    same(stopped)


def test_a_good_checkpoint_outlives_damaged_ones(stopped: Path, processes: Any, same: Any) -> None:
    good, newest = sorted((stopped / "checkpoints").glob("*.pt"))
    flip_a_bit(newest)
    arguments = ["search", "--resume", "--run-dir", str(stopped)]
    killed = processes.run(arguments, kill=("pdarts_fast.run.checkpoint:write_json", 1, "after"))
    assert killed.status == -signal.SIGKILL
    assert good.exists()
    flip_a_bit(max((stopped / "checkpoints").glob("*.pt")))
    assert processes.run(arguments).status == 0
    same(stopped)


def test_all_checkpoints_damaged_starts_from_the_beginning(
    stopped: Path, processes: Any, same: Any
) -> None:
    for path in (stopped / "checkpoints").glob("*.pt"):
        truncate(path)
    process = processes.run(["search", "--resume", "--run-dir", str(stopped)])
    assert process.status == 0
    assert process.stderr.count("is ignored") == 2
    assert f"no checkpoint in {stopped}: the search starts from its beginning" in process.stderr
    same(stopped)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_other_settings_are_refused_by_name_and_nothing_is_lost(
    stopped: Path, processes: Any, same: Any
) -> None:
    before = snapshot(stopped)
    resume = ["search", "--resume", "--run-dir", str(stopped)]
    process = processes.run([*resume, "--lr", "0.1", "--epochs", "3"])
    assert process.status == 1
    line = process.stderr.splitlines()[-1]
    assert line.startswith("pdarts-fast: error: the search in ")
    assert "--epochs (2, now 3), --lr (0.025, now 0.1)" in line
    assert snapshot(stopped) == before
    # Without config.json the checkpoint itself has to tell.
    (stopped / "config.json").rename(stopped / "config.away")
    process = processes.run(
        ["search", "--resume", "--run-dir", str(stopped), "--dataset", "digits"]
    )
    assert process.status == 1
    assert "pdarts-fast: error: the checkpoint in" in process.stderr
    assert "--dataset (image-folder, now digits)" in process.stderr
    (stopped / "config.away").rename(stopped / "config.json")
    assert snapshot(stopped) == before
    assert processes.run([*resume, "--log-interval", "2", "--checkpoint-interval", "7"]).status == 0
    same(stopped)


def test_other_images_are_refused(
    stopped: Path, images: Path, processes: Any, tmp_path: Path
) -> None:
    other = tmp_path / "images"
    for source in images.rglob("*.png"):
        target = other / source.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.name != "10.png":
            target.write_bytes(source.read_bytes())
    before = snapshot(stopped)
    process = processes.run(["search", "--resume", "--run-dir", str(stopped), "--data", str(other)])
    assert process.status == 1
    assert "the images differ from those of the checkpoint" in process.stderr
    assert snapshot(stopped) == before


def test_a_killed_overwrite_leaves_nothing_that_resume_would_take(
    stopped: Path, processes: Any, tiny: Any, outcome: Any, tmp_path: Path
) -> None:
    command = tiny(stopped, "--overwrite", "--seed", 5)
    process = processes.run(command, kill=("pathlib:Path.unlink", 1, "before"))
    assert process.status == -signal.SIGKILL
    process = processes.run(tiny(stopped, "--overwrite", "--seed", 5), kill=(STEP, 4, "after"))
    assert process.status == -signal.SIGKILL
    resume = ["search", "--resume", "--run-dir", str(stopped)]
    assert processes.run(resume).status == 0
    assert processes.run(tiny(tmp_path / "other", "--seed", 5)).status == 0
    assert outcome(stopped) == outcome(tmp_path / "other")


def test_skip_dropout_state_is_in_the_checkpoint(stopped: Path) -> None:
    state = CheckpointFolder(stopped / "checkpoints").load()
    assert state is not None
    assert state["position"]["stage"] == 1
    assert int(state["stage_state"]["dropout_state"][1]) > 0


def test_resume_of_a_real_supernet_with_skip_dropout_is_exact(
    processes: Any, tiny: Any, outcome: Any, tmp_path: Path
) -> None:
    flags = [
        "--cells", 3, "--ops-kept", 8, "--skip-dropout", 0.4, "--batch-size", 7,
        "--checkpoint-interval", 1,
    ]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert processes.run(tiny(whole, *flags), toy=False).status == 0
    # In the middle of the second epoch: after a checkpoint and one more alpha step.
    process = processes.run(tiny(killed, *flags), toy=False, kill=(STEP, 5, "after"))
    assert process.status == -signal.SIGKILL
    resume = ["search", "--resume", "--run-dir", str(killed)]
    assert processes.run(resume, toy=False).status == 0
    assert outcome(killed) == outcome(whole)
    assert (killed / "report.html").stat().st_size > 10_000


def test_checkpoints_are_read_with_weights_only(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    load = torch.load

    def watched(*args: Any, **options: Any) -> Any:
        seen.append(options.get("weights_only"))
        return load(*args, **options)

    monkeypatch.setattr(torch, "load", watched)
    assert CheckpointFolder(stopped / "checkpoints").load() is not None
    assert seen == [True]
    package = Path(__file__).parents[1] / "pdarts_fast"
    for file in package.rglob("*.py"):
        text = file.read_text()
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, f"{file}: {call}"
        assert not re.search(r"(?<!safe_)pickle\.load", text), file


def test_only_timing_may_differ_between_the_records(stopped: Path) -> None:
    lines = map(json.loads, (stopped / "metrics.jsonl").read_text().splitlines())
    assert {line["kind"] for line in lines} == {"interval", "epoch", "validation", "stage"}
