"""The commands for existing scripts: run, import-log."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pdarts_fast.flags import PROGRAM, parse
from pdarts_fast.genotype import GENOTYPE_FILE


def run(arguments: Sequence[str]) -> int:
    """Run an existing P-DARTS or DARTS script, accelerated."""
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} run",
        description="Run an existing script. What follows its name is its own command line.",
        allow_abbrev=False,
    )
    parser.add_argument("--cpu", action="store_true", help="run on the CPU what it puts on CUDA")
    parser.add_argument("--backend", default="auto", help="what runs the cells (default: auto)")
    parser.add_argument("--amp", action="store_true", help="bfloat16 activations")
    parser.add_argument("script", type=Path, metavar="SCRIPT.py", help="the script")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="its own flags")
    options = parser.parse_args(list(arguments))
    from pdarts_fast.dropin.runner import run_script

    return run_script(
        options.script, options.flags, backend=options.backend, amp=options.amp, cpu=options.cpu
    )


@dataclass(frozen=True)
class ImportLogCommand:
    """Read the text log of an old search into a genotype file."""

    log: Annotated[Path, tyro.conf.Positional]
    """The log."""
    out: Path = Path(GENOTYPE_FILE)
    """File to write."""
    max_skips: int = 2
    """Skips that the normal cell may have, where the log has genotypes for several numbers."""


def import_log(arguments: Sequence[str]) -> int:
    """Read an old search's text log into genotype.json."""
    command = parse(ImportLogCommand, "import-log", arguments)
    from pdarts_fast.dropin.log_import import read_log, save

    search = read_log(command.log, command.max_skips)
    save(command.out, search)
    print(f"{search.genotype}\n{command.out}")
    return 0
