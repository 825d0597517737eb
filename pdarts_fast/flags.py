"""From the command line to the settings of a command."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from pdarts_fast.errors import UsageError
from pdarts_fast.settings import Settings, from_json, read_values, settings_of

PROGRAM = "pdarts-fast"

C = TypeVar("C")
S = TypeVar("S", bound=Settings)


def run_defaults(
    arguments: Sequence[str], preset: Callable[..., S], variants: Sequence[str] = ()
) -> S:
    """What the flags of a run start from: preset, then file, or the run to resume.

    Args:
        arguments: The command line after the command's name.
        preset: Gives the settings of a preset by its name, and by those of `variants` that are
            given as keywords.
        variants: Fields that choose between variants of a preset.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # A flag without its value is left to the real parser.
    parser.add_argument("--preset", nargs="?")
    parser.add_argument("--config", nargs="?", type=Path)
    parser.add_argument("--run-dir", "--run_dir", nargs="?", type=Path)
    parser.add_argument("--resume", action="store_true")
    for name in variants:
        parser.add_argument(f"--{name}", nargs="?")
    known, _ = parser.parse_known_args([a for a in arguments if a not in ("-h", "--help")])
    if known.resume and known.run_dir and not known.preset and not known.config:
        from pdarts_fast.run.directory import read_config

        saved = read_config(known.run_dir)
        if saved is not None:
            source = str(known.run_dir / "config.json")
            return from_json(settings_of(saved), preset("cifar10"), source)
    values = read_values(known.config) if known.config else {}
    chosen = {name: getattr(known, name) or values.get(name) for name in variants}
    given = {name: str(value) for name, value in chosen.items() if value is not None}
    base = preset(known.preset or str(values.get("preset", "cifar10")), **given)
    return from_json(values, base, f"--config {known.config}")


def gathered(arguments: Sequence[str], name: str) -> list[str]:
    """`arguments` with all values of a flag that is given several times behind the first one.

    Args:
        name: The flag, ``--target``.
    """
    others: list[str] = []
    values: list[str] = []
    place: int | None = None
    taking = False
    for argument in arguments:
        word, equals, value = argument.partition("=")
        if word == name:
            place = len(others) if place is None else place
            taking = not equals
            values += [value] if equals else []
        elif taking and not argument.startswith("-"):
            values.append(argument)
        else:
            taking = False
            others.append(argument)
    if place is None:
        return others
    return [*others[:place], name, *values, *others[place:]]


def parse(settings: type[C], command: str, arguments: Sequence[str], default: C | None = None) -> C:
    """The settings that some flags give.

    Args:
        settings: Dataclass with a field for each flag.
        command: Name of the command.
        arguments: The command line after that name.
        default: Values of flags that are not given; the dataclass's own if None.

    Raises:
        UsageError: A flag or value is wrong.
        SystemExit: Help was asked for and printed.
    """
    given: dict[str, Any] = {} if default is None else {"default": default}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), warnings.catch_warnings():
            # A value of a settings file outside its choices: the checks that follow refuse it.
            warnings.simplefilter("ignore")
            return tyro.cli(settings, prog=f"{PROGRAM} {command}", args=list(arguments), **given)
    except SystemExit as stop:
        if not stop.code:
            raise
    # The parser draws a box: a title, the complaint, a rule, hints.
    lines = [line.strip("│ ") for line in complaint.getvalue().splitlines()[1:]]
    said = itertools.takewhile(lambda line: line and not set(line) <= set("─╰╯"), lines)
    raise UsageError(f"{' '.join(said)} ({PROGRAM} {command} --help lists the flags)")
