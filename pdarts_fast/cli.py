"""The command line: one function a command; what is slow to import is imported inside it."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pdarts_fast import cli_dropin, cli_sweep, cli_train
from pdarts_fast.config import PRESETS, BackendName, DatasetName
from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.flags import PROGRAM, parse
from pdarts_fast.launch import read_launch, should_print, speaker
from pdarts_fast.search_flags import search_settings
from pdarts_fast.version import __version__


def search(arguments: Sequence[str]) -> int:
    """Search a cell (P-DARTS in three stages, OPP-DARTS or RAPDARTS)."""
    config = search_settings(arguments)
    from pdarts_fast.distributed import joined
    from pdarts_fast.run.signals import Interrupted
    from pdarts_fast.run_search import run_search
    from pdarts_fast.run_train import check_then_train, run_train, then_train

    try:
        with joined() as ranks:
            config = ranks.first(lambda: config)
            if config.then_train:
                check_then_train(config)
            run_dir = run_search(config)
            if config.then_train:
                run_train(then_train(config, run_dir))
    except Interrupted as stop:
        return 128 + stop.signum
    return 0


@dataclass(frozen=True)
class DeriveCommand:
    """Derive genotypes from the alphas of a search."""

    source: Annotated[Path, tyro.conf.Positional]
    """Run directory, or an alphas.json file of one."""
    max_skips: int | None = None
    """Print only the genotype with at most so many skips (default: all)."""
    out: Path | None = None
    """Also write the genotypes to this file, in the form of a run's genotype.json."""


def derive(arguments: Sequence[str]) -> int:
    """Derive genotypes from an alphas file or a run directory."""
    command = parse(DeriveCommand, "derive", arguments)
    from pdarts_fast.alphas import load_alphas
    from pdarts_fast.genotype import save_genotype
    from pdarts_fast.run.files import disk_errors
    from pdarts_fast.search_space import MAX_SKIPS
    from pdarts_fast.search_space import derive as derive_genotypes

    derivation = derive_genotypes(load_alphas(command.source))
    # The fewest that can be reached where that is more than the usual number.
    usual = max(MAX_SKIPS, min(derivation.restricted))
    allowed = usual if command.max_skips is None else command.max_skips
    if allowed not in derivation.restricted:
        reachable = ", ".join(map(str, derivation.restricted))
        raise UsageError(f"--max-skips {allowed} cannot be reached; these can: {reachable}")
    if command.max_skips is None:
        print(f"unrestricted: {derivation.genotype}")
        for m, genotype in derivation.restricted.items():
            print(f"at most {m} skips: {genotype}")
    else:
        print(derivation.restricted[allowed])
    if command.out is not None:
        with disk_errors(command.out):
            save_genotype(
                command.out,
                derivation.restricted[allowed],
                max_skips=allowed,
                unrestricted=derivation.genotype,
                restricted=derivation.restricted,
            )
    return 0


@dataclass(frozen=True)
class SelectCommand:
    """Select a cell from the last supernet of a finished search, with other means than alphas.

    The result is a run directory of its own, RUN_DIR/select-perturbation: train takes it as
    --genotype.
    """

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory of the search."""
    method: Literal["perturbation"] = "perturbation"
    """What decides: how much validation accuracy is lost without an operation."""
    epochs: int | None = None
    """Epochs of tuning after each decision (default: --perturbation-epochs of the search)."""
    data: Path | None = None
    """Folder of the data set (default: that of the search)."""
    backend: BackendName | None = None
    """How cells run (default: as in the search)."""
    device: str | None = None
    """auto, cpu, cuda or cuda:N (default: as in the search)."""
    threads: int | None = None
    """CPU threads (default: as in the search)."""
    resume: bool = False
    """Go on with a selection that was stopped."""
    overwrite: bool = False
    """Replace an earlier selection."""


def select(arguments: Sequence[str]) -> int:
    """Select a cell from a search's supernet by perturbation."""
    command = parse(SelectCommand, "select", arguments)
    from pdarts_fast.run.signals import Interrupted
    from pdarts_fast.run_select import run_select

    try:
        run_select(
            command.run_dir,
            epochs=command.epochs,
            data=command.data,
            backend=command.backend,
            device=command.device,
            threads=command.threads,
            resume=command.resume,
            overwrite=command.overwrite,
        )
    except Interrupted as stop:
        return 128 + stop.signum
    return 0


@dataclass(frozen=True)
class PlotCommand:
    """Draw the two cells of a genotype as SVG and PNG."""

    genotype: Annotated[str, tyro.conf.Positional]
    """Name (PDARTS, DARTS_V2, ...), genotype file, run directory, or a log that prints one."""
    out: Path = field(default_factory=lambda: Path("."))
    """Folder to write into."""
    name: str = "cell"
    """Start of the file names: NAME-normal.svg and so on."""


def plot(arguments: Sequence[str]) -> int:
    """Draw the cells of a genotype."""
    command = parse(PlotCommand, "plot", arguments)
    from pdarts_fast.genotype import load_genotype
    from pdarts_fast.run.drawing import draw_genotype
    from pdarts_fast.run.files import disk_errors

    genotype = load_genotype(command.genotype)
    with disk_errors(command.out):
        command.out.mkdir(parents=True, exist_ok=True)
        for path in draw_genotype(genotype, command.out / command.name):
            print(path)
    return 0


@dataclass(frozen=True)
class ReportCommand:
    """Write report.html of a run again, also of one that is not finished."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory of a search or a training, or folder of a sweep."""


def report(arguments: Sequence[str]) -> int:
    """Write the report of a run directory."""
    command = parse(ReportCommand, "report", arguments)
    from pdarts_fast.run.files import disk_errors
    from pdarts_fast.run.train_report import write_run_report
    from pdarts_fast.sweep.directory import SweepDirectory
    from pdarts_fast.sweep.page import write_sweep_report

    is_sweep = SweepDirectory(command.run_dir).has_plan
    with disk_errors(command.run_dir):
        path = command.run_dir
        print(write_sweep_report(path) if is_sweep else write_run_report(path))
    return 0


@dataclass(frozen=True)
class DoctorCommand:
    """Say what this machine and installation can do, and why not where they cannot."""

    data: Path | None = None
    """Folder of the data set to check."""
    dataset: DatasetName | None = None
    """Data set to check (cifar10 if only --data is given, else the bundled digits)."""
    checksum: bool = True
    """Verify the MD5 of CIFAR files."""
    kernels: bool = False
    """Also check every Triton kernel against plain torch on each GPU (seconds)."""


def doctor(arguments: Sequence[str]) -> int:
    """Check this machine and installation."""
    command = parse(DoctorCommand, "doctor", arguments)
    from pdarts_fast.doctor import examine

    dataset = command.dataset or ("cifar10" if command.data else "digits")
    return examine(command.data, dataset, command.checksum, command.kernels)


def bench(arguments: Sequence[str]) -> int:
    """Measure the search against the published graph on this machine."""
    from pdarts_fast.bench.run import BenchOptions, run_bench

    run_bench(parse(BenchOptions, "bench", arguments))
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "search": search,
    "sweep": cli_sweep.sweep,
    "train": cli_train.train,
    "evaluate": cli_train.evaluate,
    "export": cli_train.export,
    "derive": derive,
    "select": select,
    "plot": plot,
    "report": report,
    "run": cli_dropin.run,
    "import-log": cli_dropin.import_log,
    "doctor": doctor,
    "bench": bench,
}

# What several processes can do together.
SHARED_COMMANDS = ("search", "train", "select")


def usage() -> str:
    """The text of ``pdarts-fast --help``."""
    width = max(map(len, COMMANDS))
    lines = [
        f"usage: {PROGRAM} COMMAND [FLAGS]",
        "",
        "Fast, faithful P-DARTS: finds a convolutional cell for your images.",
        "",
        "commands:",
        *(f"  {name:{width}}  {run.__doc__}" for name, run in COMMANDS.items()),
        "",
        f"{PROGRAM} COMMAND --help lists the flags of a command with their defaults.",
        f"First try: {PROGRAM} search --preset demo   (presets: {', '.join(PRESETS)})",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, 1 (failure), 2 (usage), 128 + signal."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"{PROGRAM} {__version__}")
        return 0
    name, *rest = arguments
    # Waiting threads of GNU OpenMP spin briefly, then sleep, and leave their core to a busy
    # neighbour (docs/cpu-kernels.md has measurements). Read when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_StderrHandler()])
    try:
        if name not in COMMANDS:
            raise UsageError(f"no command {name!r}; there are {', '.join(COMMANDS)}")
        launch = read_launch()
        if launch.size > 1 and name not in SHARED_COMMANDS:
            raise UsageError(
                f"{name} runs in one process: start it without torchrun (what torchrun can start: "
                f"{', '.join(SHARED_COMMANDS)})"
            )
        return COMMANDS[name](rest)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Whoever read the output has enough; nothing may be flushed into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (RunError, OSError, ValueError) as error:
        logging.getLogger(__name__).debug("the error came from", exc_info=True)
        if should_print(error):
            print(f"{PROGRAM}: error: {speaker()}{_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(text.split()) or type(error).__name__


class _StderrHandler(logging.StreamHandler):
    """Logs to whatever standard error is at the time: a progress bar takes its place."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        """Nothing to keep."""
