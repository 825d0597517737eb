"""The command for several searches: sweep."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from pdarts_fast.errors import UsageError
from pdarts_fast.flags import PROGRAM

_DESCRIPTION = """\
Run several searches, every combination of settings and seeds, and compare what they find.

All flags of the search command can be given too: each run gets them as they are
(pdarts-fast search --help lists them)."""

_EPILOG = """\
examples:
  pdarts-fast sweep --preset demo --seeds 4
  pdarts-fast sweep --preset demo --seeds 3 --vary lr=0.025,0.05 channels=8,16 --then-train
  pdarts-fast sweep --resume --sweep-dir DIR

Runs go one after the other on a CPU and one on each GPU of this machine; with --ray they go where
the cluster has room. The exit status is 1 if a run failed; the others run all the same."""


class _Parser(argparse.ArgumentParser):
    """Raises `UsageError` instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ({PROGRAM} sweep --help lists the flags)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"{PROGRAM} sweep",
        usage=f"{PROGRAM} sweep [FLAGS] [FLAGS OF SEARCH]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--seeds",
        type=int,
        metavar="N",
        help="number of seeds of each setting, counted up from --seed (default: 4)",
    )
    add(
        "--vary",
        nargs="+",
        action="extend",
        default=[],
        metavar="FLAG=VALUE,VALUE",
        help="values of a search flag to try, in all combinations with the others; several "
        "numbers of one value stand apart: 'cells=3 4 5,5 11 17'; switches take yes,no "
        "(default: nothing varies)",
    )
    add(
        "--sweep-dir",
        "--sweep_dir",
        type=Path,
        metavar="DIR",
        help="folder of the sweep (default: runs/sweep-<dataset>-<time>)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with the sweep in --sweep-dir: finished runs are kept, others go on from "
        "their checkpoint; larger --seeds or more values of --vary add runs (default: no)",
    )
    _add_places(parser)
    return parser


def _add_places(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where runs go."""
    add = parser.add_argument
    add(
        "--jobs",
        type=int,
        metavar="N",
        help="runs at a time on this machine (default: one a GPU, else one)",
    )
    add(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="run on a Ray cluster: its address, or nothing for the running one or, without one, "
        "a new one on this machine; all nodes have to see the sweep's folder (default: no Ray)",
    )
    add(
        "--max-retries",
        "--max_retries",
        type=int,
        metavar="N",
        help="how often Ray starts a run again whose process or node died (default: 3)",
    )


def sweep(arguments: Sequence[str]) -> int:
    """Run several searches (seeds, settings) and compare them."""
    options, flags = _parser().parse_known_args(list(arguments))
    from pdarts_fast.sweep.run import SweepOptions, run_sweep

    return run_sweep(
        SweepOptions(
            sweep_dir=options.sweep_dir,
            seeds=options.seeds,
            vary=tuple(options.vary),
            resume=options.resume,
            jobs=options.jobs,
            ray=options.ray,
            max_retries=options.max_retries,
            flags=tuple(flags),
            command=("pdarts-fast", "sweep", *arguments),
        )
    )
