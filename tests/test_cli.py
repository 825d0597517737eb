"""The command line: help, versions, bad input in one line, and what survives a failure."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import select
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from pdarts_fast import cli
from pdarts_fast.errors import RunError, UsageError

STEP = "pdarts_fast.step:SearchStep._step"
REPLACE = "os:replace"


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


@pytest.fixture(scope="module")
def finished(processes: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests may read it only."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert processes.run(tiny(run)).status == 0
    return run


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
    line = processes.run(["derive", str(file)]).error_line(2)
    assert str(file) in line
    assert message in line


def test_derive_of_a_folder_without_alphas(processes: Any, tmp_path: Path) -> None:
    assert "no alphas.json in it" in processes.run(["derive", str(tmp_path)]).error_line(2)
    assert "neither" in processes.run(["derive", str(tmp_path / "no")]).error_line(2)


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
    line = processes.run(["plot", str(file), "--out", str(tmp_path / "out")]).error_line(2)
    assert f"{file}: {message}" in line
    assert not (tmp_path / "out").exists()


def test_plot_into_a_file_and_of_nothing(processes: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    process = processes.run(["plot", "PDARTS", "--out", str(tmp_path / "file")])
    assert "choose a folder that can be written to" in process.error_line(1)
    process = processes.run(["plot", "PDART"])
    assert "neither a file, a run directory nor one of" in process.error_line(2)


def test_report_of_a_folder_that_is_no_run(processes: Any, tmp_path: Path) -> None:
    process = processes.run(["report", str(tmp_path)])
    assert "no config.json in it" in process.error_line(2)


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
