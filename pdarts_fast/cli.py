"""The command line: one function a command; what is slow to import is imported inside it."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from pdarts_fast.config import PRESETS, SearchConfig, from_json, load_config, preset
from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.version import __version__

PROGRAM = "pdarts-fast"


def search(arguments: Sequence[str]) -> int:
    """Search a cell (P-DARTS, three stages)."""
    config = tyro.cli(
        SearchConfig,
        prog=f"{PROGRAM} search",
        args=list(arguments),
        default=_search_defaults(arguments),
    )
    from pdarts_fast.run.signals import Interrupted
    from pdarts_fast.run_search import run_search

    try:
        run_search(config)
    except Interrupted as stop:
        logging.getLogger(__name__).warning(
            "stopped by %s after writing a checkpoint: run again with --resume to go on", stop
        )
        return 128 + stop.signum
    return 0


def _search_defaults(arguments: Sequence[str]) -> SearchConfig:
    """What the flags of a search start from: preset, then file, or the run to resume."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default=None)
    parser.add_argument("--config", type=Path, default=None)
    parser.add_argument("--run-dir", "--run_dir", type=Path, default=None)
    parser.add_argument("--resume", action="store_true")
    known, _ = parser.parse_known_args([a for a in arguments if a not in ("-h", "--help")])
    if known.resume and known.run_dir and not known.preset and not known.config:
        from pdarts_fast.run.directory import read_config

        saved = read_config(known.run_dir)
        if saved is not None:
            source = str(known.run_dir / "config.json")
            return from_json(saved["config"], preset("cifar10"), source)
    base = preset(known.preset or "cifar10")
    return load_config(known.config, base) if known.config else base


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
    command = tyro.cli(DeriveCommand, prog=f"{PROGRAM} derive", args=list(arguments))
    from pdarts_fast.alphas import load_alphas
    from pdarts_fast.genotype import save_genotype
    from pdarts_fast.run.files import disk_errors
    from pdarts_fast.search_space import MAX_SKIPS
    from pdarts_fast.search_space import derive as derive_genotypes

    derivation = derive_genotypes(load_alphas(command.source))
    allowed = MAX_SKIPS if command.max_skips is None else command.max_skips
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
    command = tyro.cli(PlotCommand, prog=f"{PROGRAM} plot", args=list(arguments))
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
    """Run directory of a search."""


def report(arguments: Sequence[str]) -> int:
    """Write the report of a run directory."""
    command = tyro.cli(ReportCommand, prog=f"{PROGRAM} report", args=list(arguments))
    from pdarts_fast.run.files import disk_errors
    from pdarts_fast.run.report import write_report

    with disk_errors(command.run_dir):
        print(write_report(command.run_dir))
    return 0


@dataclass(frozen=True)
class DoctorCommand:
    """Say what this machine and installation can do, and why not where they cannot."""

    data: Path | None = None
    """Also check the data set in this folder."""
    dataset: str = "cifar10"
    """Which data set --data holds."""
    checksum: bool = True
    """Verify the MD5 of CIFAR files."""


def doctor(arguments: Sequence[str]) -> int:
    """Check this machine and installation."""
    command = tyro.cli(DoctorCommand, prog=f"{PROGRAM} doctor", args=list(arguments))
    from pdarts_fast.doctor import examine

    return examine(command.data, command.dataset, command.checksum)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "search": search,
    "derive": derive,
    "plot": plot,
    "report": report,
    "doctor": doctor,
}


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
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        if name not in COMMANDS:
            raise UsageError(f"no command {name!r}; there are {', '.join(COMMANDS)}")
        return COMMANDS[name](rest)
    except (UsageError, RunError) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
