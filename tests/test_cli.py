"""The command line: help, versions, bad input in one line, and what survives a failure."""

from __future__ import annotations

import json
import os
import pickle
import pty
import re
import resource
import select
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdarts_fast import cli
from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.run.checkpoint import CheckpointFolder

STEP = "pdarts_fast.step:SearchStep._step"
REPLACE = "os:replace"


def error_line(process: Any, status: int) -> str:
    """The one error line of a command that ended with a status, at the end of its log."""
    assert process.status == status, process.stderr
    lines = process.stderr.splitlines()
    errors = [line for line in lines if line.startswith("pdarts-fast: error: ")]
    assert len(errors) == 1, process.stderr
    assert lines[-1] == errors[0]
    assert "Traceback" not in process.stderr
    return errors[0]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_help_is_quick_and_imports_no_torch() -> None:
    program = (
        "import sys; from pdarts_fast.cli import main; main(['--help']); "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert answer.returncode == 0, answer.stderr
        # Processor time: unlike the clock it does not count what else this machine runs.
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.7
    for name in cli.COMMANDS:
        assert f"\n  {name} " in answer.stdout


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help_with_its_defaults(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    assert f"pdarts-fast {name}" in text
    assert "(default: " in text or name == "report"


def test_help_of_a_preset_shows_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["search", "--preset", "demo", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert (
        "Cells of the supernet in each stage; the number of values is the number of stages" in text
    )
    assert "(default: 3 4 5)" in text


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([flag]) == 0
    assert re.fullmatch(r"pdarts-fast \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_no_command_prints_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: pdarts-fast COMMAND" in capsys.readouterr().out


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serach"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pdarts-fast: error: no command 'serach'; there are search, ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UsageError("--x is bad"), 2, "--x is bad"),
        (RunError("the disk\nis full"), 1, "the disk is full"),
        (PermissionError(13, "Permission denied", "a/b"), 1, "a/b: Permission denied"),
        (OSError("odd"), 1, "odd"),
        (ValueError("p must be\n below 1"), 1, "p must be below 1"),
        (ValueError(), 1, "ValueError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_become_one_line(
    error: Exception,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(arguments: object) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "doctor", fail)
    assert cli.main(["doctor"]) == status
    assert capsys.readouterr().err == f"pdarts-fast: error: {line}\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: object) -> int:
        raise KeyError("bug")

    monkeypatch.setitem(cli.COMMANDS, "doctor", fail)
    with pytest.raises(KeyError, match="bug"):
        cli.main(["doctor"])


def test_an_interrupt_outside_the_search_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "doctor", interrupt)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "pdarts-fast: interrupted\n"


def test_output_that_nobody_reads_is_no_error() -> None:
    program = "import time; time.sleep(1); from pdarts_fast.cli import main; exit(main(['--help']))"
    program = program.replace("main(['--help'])", "main(['derive', '--help'])")
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait() == 141


# --- Searches that cannot start ------------------------------------------------------------------


def write_cifar(folder: Path, *, labels: int = 10, cut: int = 0) -> None:
    """Writes CIFAR-10 files of 20 images, the first one cut short."""
    folder = folder / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {
            "data": rng.integers(0, 256, (20, 3072), dtype=np.uint8),
            "labels": [int(label) for label in rng.integers(0, labels, 20)],
        }
        content = pickle.dumps(batch, protocol=2)
        (folder / name).write_bytes(content[: len(content) - (cut if name[-1] == "1" else 0)])
    names = {"label_names": [f"class{i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))


def broken_image(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for index in range(3):
            (folder / name / f"{index}.png").write_bytes(b"\x89PNG\r\n\x1a\nnot an image")


def empty_class(folder: Path) -> None:
    (folder / "a").mkdir(parents=True)
    (folder / "b").mkdir()


@pytest.mark.parametrize(
    ("dataset", "make", "status", "message"),
    [
        ("image-folder", lambda f: None, 2, "no such folder"),
        ("cifar10", lambda f: None, 2, "no such folder"),
        (
            "cifar10",
            lambda f: write_cifar(f, cut=200),
            1,
            "data_batch_1: not a readable CIFAR file",
        ),
        ("cifar10", lambda f: write_cifar(f, labels=200), 1, "is out of range"),
        ("image-folder", broken_image, 1, "not a readable image"),
        ("image-folder", empty_class, 1, "no image in this class folder"),
    ],
    ids=[
        "no-folder",
        "no-cifar-folder",
        "truncated",
        "class-counts",
        "broken-image",
        "empty-class",
    ],
)
def test_bad_data_is_one_line_and_writes_nothing(
    dataset: str, make: Any, status: int, message: str, processes: Any, tiny: Any, tmp_path: Path
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    make(data)
    before = snapshot(tmp_path)
    flags = ["--dataset", dataset, "--data", data, "--no-checksum"]
    line = error_line(processes.run(tiny(run, *flags)), status)
    assert message in line
    assert snapshot(tmp_path) == before
    assert not run.exists()


def test_too_few_images_are_refused_before_an_old_run_is_removed(
    processes: Any, tiny: Any, images: Path, tmp_path: Path
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    for name in ("circle", "cross"):
        (data / name).mkdir(parents=True)
        for index in range(2):
            source = images / name / f"{index}.png"
            (data / name / source.name).write_bytes(source.read_bytes())
    run.mkdir()
    (run / "config.json").write_text("{}")
    flags = ["--data", data, "--overwrite", "--data-split", 0.4]
    line = error_line(processes.run(tiny(run, *flags)), 2)
    assert "leaves one part empty" in line
    assert (run / "config.json").read_text() == "{}"


@pytest.fixture(scope="module")
def finished(processes: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests may read it only."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert processes.run(tiny(run)).status == 0
    return run


def test_an_existing_run_is_refused_and_left_as_it_is(
    finished: Path, processes: Any, tiny: Any
) -> None:
    before = snapshot(finished)
    line = error_line(processes.run(tiny(finished)), 2)
    assert f"--run-dir {finished} exists and is not empty" in line
    assert "--resume" in line
    assert "--overwrite" in line
    assert snapshot(finished) == before


def test_overwrite_removes_only_what_a_run_writes(
    processes: Any, tiny: Any, outcome: Any, tmp_path: Path
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    assert processes.run(tiny(run)).status == 0
    (run / "notes.txt").write_text("mine")
    (run / "report.html").write_text("old")
    (run / "kept").mkdir()
    (run / "kept" / "config.json").write_text("mine")
    assert processes.run(tiny(run, "--overwrite", "--seed", 4)).status == 0
    assert processes.run(tiny(other, "--seed", 4)).status == 0
    assert outcome(run) == outcome(other)
    assert (run / "notes.txt").read_text() == "mine"
    assert (run / "kept" / "config.json").read_text() == "mine"
    assert not (run / "report.html").exists()


def test_a_run_folder_below_a_file_cannot_be_made(
    processes: Any, tiny: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    line = error_line(processes.run(tiny(tmp_path / "file" / "run")), 1)
    assert "Not a directory; choose a folder that can be written to" in line
    line = error_line(processes.run(tiny(tmp_path / "file")), 2)
    assert "is a file: give a folder" in line
    line = error_line(processes.run(["search", "--resume", "--run-dir", str(tmp_path / "file")]), 2)
    assert "is a file: give a folder" in line or "needs --data" in line


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("EROFS", "Read-only file system; choose a folder that can be written to"),
        ("EACCES", "Permission denied; choose a folder that can be written to"),
        ("ENOSPC", "No space left on device; free some space"),
        ("EIO", "Input/output error; check the disk"),
    ],
)
def test_a_disk_that_refuses_the_first_file(
    kind: str, advice: str, processes: Any, tiny: Any, tmp_path: Path
) -> None:
    process = processes.run(tiny(tmp_path / "run"), fault=("pathlib:Path.mkdir", 1, kind))
    assert advice in error_line(process, 1)
    process = processes.run(tiny(tmp_path / "run"), fault=(REPLACE, 1, kind))
    assert advice in error_line(process, 1)


# --- Searches that fail on their way -------------------------------------------------------------


@pytest.mark.parametrize(
    "place", ["os:fsync", REPLACE, "torch:save"], ids=["write", "rename", "save"]
)
@pytest.mark.parametrize("call", [9, 12, 14], ids=lambda n: f"call{n}")
def test_no_space_during_a_checkpoint_keeps_the_last_good_one(
    place: str,
    call: int,
    finished: Path,
    processes: Any,
    tiny: Any,
    outcome: Any,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    process = processes.run(tiny(run, "--checkpoint-interval", 1), fault=(place, call, "ENOSPC"))
    assert "No space left on device" in error_line(process, 1)
    assert CheckpointFolder(run / "checkpoints").load() is not None
    assert processes.run(tiny(run, "--resume")).status == 0
    assert outcome(run) == outcome(finished)


def test_a_full_disk_under_the_metrics(
    finished: Path, processes: Any, tiny: Any, outcome: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fault = ("pdarts_fast.run.files:_finite", 40, "ENOSPC")
    assert "metrics.jsonl" in error_line(processes.run(tiny(run), fault=fault), 1)
    assert processes.run(tiny(run, "--resume")).status == 0
    assert outcome(run) == outcome(finished)


@pytest.mark.parametrize("call", [5, 9, 14], ids=lambda n: f"step{n}")
@pytest.mark.parametrize("interval", [1, 0], ids=lambda n: f"interval{n}")
def test_nan_stops_the_search_and_keeps_the_last_good_checkpoint(
    call: int,
    interval: int,
    finished: Path,
    processes: Any,
    tiny: Any,
    outcome: Any,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    flags = ["--checkpoint-interval", interval, "--log-interval", 100]
    process = processes.run(
        tiny(run, *flags), fault=(STEP.replace("_step", "forward"), call, "nan")
    )
    line = error_line(process, 1)
    stage, step = {5: (1, 3), 9: (1, 5), 14: (2, 8)}[call]
    # Two forward passes a step once alphas train, three in a validation.
    assert re.search(r"the loss or gradient of step \d+ \(stage [12]\) is not finite", line)
    assert f"(stage {stage})" in line
    assert str(run / "checkpoints") in line
    state = CheckpointFolder(run / "checkpoints").load()
    assert state is not None
    network = (state["stage_state"] or {"network": {}})["network"]
    assert all(bool(value.isfinite().all()) for value in network.values())
    assert state["position"]["global_step"] <= step + 1
    resumed = processes.run(["search", "--resume", "--run-dir", str(run), "--log-interval", "2"])
    assert resumed.status == 0
    assert outcome(run)["alphas.json"] == outcome(finished)["alphas.json"]


def test_a_huge_learning_rate_ends_in_one_line(processes: Any, tiny: Any, tmp_path: Path) -> None:
    flags = ["--lr", 100, "--grad-clip", 1e9, "--weight-decay", 1, "--epochs", 40]
    process = processes.run(tiny(tmp_path / "run", *flags))
    assert "is not finite" in error_line(process, 1)


def test_a_bug_in_a_search_keeps_its_traceback(processes: Any, tiny: Any, tmp_path: Path) -> None:
    process = processes.run(tiny(tmp_path / "run"), fault=(STEP, 2, "bug"))
    assert process.status == 1
    assert "RuntimeError: a bug" in process.stderr
    assert "Traceback" in process.stderr


@pytest.mark.usefixtures("one_thread")
def test_skips_that_cannot_be_reached_lose_nothing(
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent / "search_process")
    from toy_network import ToyNetwork

    class OnlySkips(ToyNetwork):
        """On every edge `none` and the skip are far ahead: with two live ops only they are left."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            for kind, alphas in zip(self.switches, self.arch_parameters(), strict=True):
                for edge, row in enumerate(self.switches[kind]):
                    alive = np.flatnonzero(row).tolist()
                    for op in (0, 3):
                        alphas.data[edge, alive.index(op)] += 5

    monkeypatch.setattr("pdarts_fast.search.Network", OnlySkips)
    run = tmp_path / "run"
    flags = ["--ops-kept", 8, 5, 2, "--max-skips", 0, "--alpha-lr", 1e-6]
    assert cli.main(tiny(run, *flags)) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("pdarts-fast: error: --max-skips 0 cannot be reached")
    assert f"`pdarts-fast derive {run}` lists" in line
    assert len(json.loads((run / "alphas.json").read_text())["stages"]) == 3
    assert cli.main(["derive", str(run)]) == 0
    derived = capsys.readouterr().out
    assert "at most 8 skips: Genotype(" in derived
    assert "at most 0 skips" not in derived
    assert cli.main(["derive", str(run), "--max-skips", "0"]) == 2
    assert "--max-skips 0 cannot be reached; these can: 8" in capsys.readouterr().err


def test_two_processes_do_not_write_one_run(processes: Any, tiny: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = processes.start(tiny(run), pauses={STEP: 0.2})
    deadline = time.monotonic() + 30
    while not (run / "config.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    for flag in ("--resume", "--overwrite"):
        line = error_line(processes.run(tiny(run, flag)), 1)
        assert f"another process is writing into {run}" in line
    error_line(processes.run(tiny(run)), 2)
    assert first.wait() == 0


# --- Other commands ------------------------------------------------------------------------------


def test_derive_prints_and_writes_all_genotypes(
    finished: Path, processes: Any, tmp_path: Path
) -> None:
    out = tmp_path / "genotypes.json"
    process = processes.run(["derive", str(finished), "--out", str(out)])
    assert process.status == 0
    assert len(process.stdout.splitlines()) == 10
    assert out.read_bytes() == (finished / "genotype.json").read_bytes()
    process = processes.run(["derive", str(finished / "alphas.json"), "--max-skips", "1"])
    assert process.stdout.startswith("Genotype(normal=[")
    assert len(process.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read as JSON"),
        ('{"stages": []}', "primitives: wanted none, max_pool_3x3"),
        ('{"primitives": PRIMITIVES, "stages": []}', "stages: wanted at least one"),
        ('{"primitives": PRIMITIVES, "stages": [{"normal": [1]}]}', "stage 1: normal has shape"),
        ('{"primitives": PRIMITIVES, "stages": [3]}', "stage 1: wanted normal and reduce"),
    ],
    ids=["empty", "no-primitives", "no-stages", "wrong-shape", "no-dict"],
)
def test_derive_refuses_broken_alphas(
    content: str, message: str, finished: Path, processes: Any, tmp_path: Path
) -> None:
    primitives = json.dumps(json.loads((finished / "alphas.json").read_text())["primitives"])
    file = tmp_path / "alphas.json"
    file.write_text(content.replace("PRIMITIVES", primitives))
    line = error_line(processes.run(["derive", str(file)]), 2)
    assert str(file) in line
    assert message in line


def test_derive_of_a_folder_without_alphas(processes: Any, tmp_path: Path) -> None:
    assert "no alphas.json in it" in error_line(processes.run(["derive", str(tmp_path)]), 2)
    assert "neither" in error_line(processes.run(["derive", str(tmp_path / "no")]), 2)


def test_plot_draws_a_named_genotype(processes: Any, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    process = processes.run(["plot", "PDARTS", "--out", str(out), "--name", "x"])
    assert process.status == 0, process.stderr
    drawn = {f"x-{kind}.{form}" for kind in ("normal", "reduce") for form in ("svg", "png")}
    assert {path.name for path in out.iterdir()} == drawn
    assert {Path(line).name for line in process.stdout.splitlines()} == drawn


CELL = '[["skip_connect", 0], ["OP", 1]]'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CELL.replace("OP", "sep_conv_9x9"), "normal[1]: wanted one of none, max_pool_3x3"),
        ('[["skip_connect", 0]]', "normal: wanted two [operation, source] pairs for each node"),
        ('[["skip_connect", 0], ["none", 5]]', "normal[1]: wanted a source from 0 to 1"),
    ],
    ids=["unknown-op", "wrong-shape", "unknown-source"],
)
def test_plot_refuses_a_wrong_genotype(
    content: str, message: str, processes: Any, tmp_path: Path
) -> None:
    file = tmp_path / "genotype.json"
    good = CELL.replace("OP", "none")
    file.write_text(
        f'{{"normal": {content}, "normal_concat": [2], "reduce": {good}, "reduce_concat": [2]}}'
    )
    line = error_line(processes.run(["plot", str(file), "--out", str(tmp_path / "out")]), 2)
    assert f"{file}: {message}" in line
    assert not (tmp_path / "out").exists()


def test_plot_into_a_file_and_of_nothing(processes: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    process = processes.run(["plot", "PDARTS", "--out", str(tmp_path / "file")])
    assert "choose a folder that can be written to" in error_line(process, 1)
    process = processes.run(["plot", "PDART"])
    assert "neither a file, a run directory nor one of" in error_line(process, 2)


def test_report_of_a_folder_that_is_no_run(processes: Any, tmp_path: Path) -> None:
    process = processes.run(["report", str(tmp_path)])
    assert "no config.json in it" in error_line(process, 2)


# --- The real thing ------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [160, 80])
def test_a_search_on_a_terminal_shows_a_bar(
    columns: int, processes: Any, tiny: Any, tmp_path: Path
) -> None:
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (40, columns))
    process = processes.start(
        tiny(tmp_path / "[run]", "--log-interval", 1),
        pauses={STEP: 0.05},
        terminal=os.ttyname(follower),
    )
    shown = b""
    while select.select([leader], [], [], 5)[0]:
        shown += os.read(leader, 65536)
        if b"\x1b[?25h" in shown:  # the cursor comes back when the bar is closed
            break
    assert process.wait() == 0, shown.decode()
    os.close(follower)
    os.close(leader)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert "[run]" in text
    pattern = (
        r"stage 2/3 epoch 2/2 .*\d+% +loss \d\.\d+  acc \d+\.\d%  \d+ img/s  "
        r"stage \d:\d\d  search \d:\d\d left"
    )
    assert re.search(pattern, text), text
    assert "Genotype(normal=" in process.stdout
