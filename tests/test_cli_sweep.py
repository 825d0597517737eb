"""The sweep command's own flags among those of the search command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pdarts_fast.cli import main
from pdarts_fast.sweep import run as sweep_run
from pdarts_fast.sweep.run import SweepOptions


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> list[SweepOptions]:
    """What the command hands on, instead of running it."""
    seen: list[SweepOptions] = []

    def note(given: SweepOptions) -> int:
        seen.append(given)
        return 0

    monkeypatch.setattr(sweep_run, "run_sweep", note)
    return seen


def test_own_flags_are_told_from_those_of_the_search(options: list[SweepOptions]) -> None:
    line = (
        "sweep --cells 3 4 5 --seeds 2 --lr -1 --vary channels=4,8 momentum=0.8,0.9 --amp "
        "--vary=epochs=2,3 --sweep_dir out --jobs=3 --skip-dropout 0 0.1 0.2 --resume"
    )
    words = line.split()
    assert main(words) == 0
    (given,) = options
    flags = "--cells 3 4 5 --lr -1 --amp --skip-dropout 0 0.1 0.2"
    assert given == SweepOptions(
        sweep_dir=Path("out"),
        seeds=2,
        vary=("channels=4,8", "momentum=0.8,0.9", "epochs=2,3"),
        resume=True,
        jobs=3,
        flags=tuple(flags.split()),
        command=("pdarts-fast", *words),
    )


@pytest.mark.parametrize(
    ("words", "ray"),
    [([], None), (["--ray"], ""), (["--ray", "--preset", "demo"], ""), (["--ray", "a:1"], "a:1")],
    ids=["without", "local", "before another flag", "address"],
)
def test_the_address_of_ray_may_be_left_out(
    words: list[str], ray: str | None, options: list[SweepOptions]
) -> None:
    assert main(["sweep", *words]) == 0
    assert options[0].ray == ray


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "many"], "argument --seeds: invalid int value: 'many'"),
        (["--vary"], "argument --vary: expected at least one argument"),
        (["--preset", "demo", "--no-such-flag"], "Unrecognized options: --no-such-flag"),
        (["--preset", "demo", "--seeds", "2", "--run-dir", "x"], "--run-dir belongs to a single"),
    ],
    ids=["seeds", "vary", "unknown", "run-dir"],
)
def test_a_wrong_flag_is_one_line_and_status_2(
    words: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *words]) == 2
    captured: Any = capsys.readouterr()
    assert captured.err.startswith("pdarts-fast: error: ")
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
