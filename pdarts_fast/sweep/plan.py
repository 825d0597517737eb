"""Which runs a sweep has: settings by seeds, checked as the search command checks. No torch."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pdarts_fast.config import SearchConfig, validate
from pdarts_fast.errors import UsageError
from pdarts_fast.search_flags import search_settings
from pdarts_fast.settings import differing, flag, to_json

DEFAULT_SEEDS = 4
# Each run has its own folder, and the sweep goes on with it by itself.
_OWN = ("run_dir", "resume", "overwrite")
_SWITCH = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}
# Longer names of folders are replaced by the number of the setting.
_LONGEST_NAME = 100


@dataclass(frozen=True)
class PlannedRun:
    """One search of a sweep.

    Attributes:
        name: Name of its folder and its log.
        setting: The varied values as ``flag=value`` texts; runs that differ only in their seed
            share it.
        seed: Its seed.
        arguments: Flags of the search command, without those of the run directory.
        settings: All settings that the flags give, as JSON values.
    """

    name: str
    setting: tuple[str, ...]
    seed: int
    arguments: tuple[str, ...]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """The runs of a sweep and the words that they come from.

    Attributes:
        seeds: Number of seeds, or None if the seed is among the varied flags.
        vary: Texts ``flag=value,value``, one a varied flag.
        flags: Search flags that all runs share.
        runs: The runs, seeds of a setting together.
    """

    seeds: int | None
    vary: tuple[str, ...]
    flags: tuple[str, ...]
    runs: tuple[PlannedRun, ...]

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` wrote."""
        runs = tuple(
            PlannedRun(
                str(run["name"]),
                tuple(run["setting"]),
                int(run["seed"]),
                tuple(run["arguments"]),
                dict(run["settings"]),
            )
            for run in values["runs"]
        )
        return cls(values["seeds"], tuple(values["vary"]), tuple(values["flags"]), runs)


def make_plan(seeds: int | None, vary: Sequence[str], flags: Sequence[str]) -> Plan:
    """The runs of a sweep: every combination of the varied values with every seed.

    Args:
        seeds: Number of seeds, counted up from that of the search flags; None for `DEFAULT_SEEDS`,
            or for one a value if ``seed`` is varied.
        vary: Texts ``flag=value,value``.
        flags: Flags of the search command that all runs share.

    Raises:
        UsageError: A flag or value is wrong by itself or in a combination, stands twice, or is
            the sweep's own.
    """
    _refuse_own(flags)
    search_settings(flags)
    axes = dict(_axis(text, flags) for text in vary)
    if len(axes) < len(vary):
        raise UsageError("--vary: a flag stands twice; give all its values after one =")
    if "seed" in axes and seeds is not None:
        raise UsageError("--seeds and --vary seed=... exclude each other: give one of them")
    count = 1 if "seed" in axes else DEFAULT_SEEDS if seeds is None else seeds
    if count < 1:
        raise UsageError(f"--seeds {count}: wanted at least 1")
    runs: list[PlannedRun] = []
    for number, values in enumerate(itertools.product(*axes.values()), 1):
        runs += _setting_runs(dict(zip(axes, values, strict=True)), number, count, flags)
    _refuse_equal(runs)
    return Plan(None if "seed" in axes else count, tuple(vary), tuple(flags), tuple(runs))


def extend_plan(old: Plan, new: Plan, where: str) -> Plan:
    """`new`, which has to hold every run of `old` with the same settings.

    Args:
        old: The plan of a sweep that has begun.
        new: What the command line asks for now; flags that do not change a result may differ.
        where: The folder of the sweep, for the error message.

    Raises:
        UsageError: A run of the old plan is missing or would have other settings.
    """
    found = {run.name: run for run in new.runs}
    for run in old.runs:
        if run.name not in found:
            raise UsageError(
                f"{where} holds another sweep: its run {run.name} is not among those asked for; "
                "leave --seeds, --vary and search flags out to go on, or give another --sweep-dir"
            )
        others = differing(run.settings, validate(search_settings(found[run.name].arguments)))
        if others:
            raise UsageError(
                f"{where} holds another sweep: settings of {run.name} differ: {', '.join(others)}; "
                "leave search flags out to go on, or give another --sweep-dir"
            )
    return new


def _refuse_own(flags: Sequence[str]) -> None:
    """Refuse what a sweep decides itself, and words that belong to no flag."""
    for word in flags:
        name = word.partition("=")[0].lstrip("-").replace("-", "_")
        if word.startswith("--") and name in _OWN:
            raise UsageError(
                f"{flag(name)} belongs to a single search; a sweep has --sweep-dir and --resume"
            )
    if flags and not flags[0].startswith("-"):
        raise UsageError(
            f"{flags[0]!r} belongs to no flag (pdarts-fast sweep --help and pdarts-fast search "
            "--help list the flags)"
        )


def _axis(text: str, flags: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Field and values of one ``flag=value,value``."""
    name, equals, listed = text.partition("=")
    field = name.strip().lstrip("-").replace("-", "_")
    values = tuple(value.strip() for value in listed.split(","))
    if not equals or not all(values):
        raise UsageError(f"--vary {text}: wanted FLAG=VALUE,VALUE, as in lr=0.025,0.05")
    if field in _OWN or field not in {one.name for one in dataclasses.fields(SearchConfig)}:
        raise UsageError(
            f"--vary {text}: {flag(field)} is no flag that can be varied (pdarts-fast search "
            "--help lists the flags)"
        )
    if len(set(values)) < len(values):
        raise UsageError(f"--vary {text}: a value stands twice")
    given = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in flags}
    if field in given or f"no_{field}" in given:
        raise UsageError(f"--vary {text}: {flag(field)} is given too; leave one of them out")
    return field, values


def _words(field: str, value: str) -> list[str]:
    """The command-line words that give a field a value; several numbers stand apart."""
    default = getattr(SearchConfig(), field)
    if not isinstance(default, bool):
        return [flag(field), *(value.split() if isinstance(default, tuple) else [value])]
    if value.lower() not in _SWITCH:
        raise UsageError(f"--vary {field}: {value!r} is neither yes nor no")
    return [flag(field) if _SWITCH[value.lower()] else "--no-" + flag(field)[2:]]


def _setting_runs(
    values: Mapping[str, str], number: int, seeds: int, flags: Sequence[str]
) -> Iterator[PlannedRun]:
    """The runs of one setting, a seed each.

    Args:
        values: Varied fields to their values.
        number: The setting's number, from 1.
        seeds: Number of seeds.
        flags: Search flags that all runs share.
    """
    setting = tuple(f"{flag(n)[2:]}={v}" for n, v in values.items() if n != "seed")
    label = " ".join(f"{n}={v}" for n, v in values.items())
    words = [word for name, value in values.items() for word in _words(name, value)]
    try:
        config = search_settings([*flags, *words])
        for seed in range(config.seed, config.seed + seeds):
            own = () if "seed" in values else ("--seed", str(seed))
            resolved = to_json(validate(dataclasses.replace(config, seed=seed)))
            for name in (*_OWN, "config"):
                del resolved[name]
            yield PlannedRun(
                _folder_name(setting, number, seed), setting, seed, (*flags, *words, *own), resolved
            )
    except UsageError as error:
        raise UsageError(f"--vary {label}: {error}" if label else str(error)) from error


def _folder_name(setting: Sequence[str], number: int, seed: int) -> str:
    name = re.sub(r"[^A-Za-z0-9._=+-]+", "_", "-".join((*setting, f"seed{seed}")))
    return name if len(name) <= _LONGEST_NAME else f"setting{number}-seed{seed}"


def _refuse_equal(runs: Sequence[PlannedRun]) -> None:
    """Refuse runs that would share a folder or repeat each other."""
    for one, other in itertools.combinations(runs, 2):
        pair = f"{_shown(one)} and {_shown(other)}"
        # Some file systems do not tell capital letters apart.
        if one.name.casefold() == other.name.casefold():
            raise UsageError(f"--vary: {pair} would share the folder {one.name}; change a value")
        if one.settings == other.settings:
            raise UsageError(f"--vary: {pair} are the same search; leave one of them out")


def _shown(run: PlannedRun) -> str:
    return " ".join((*run.setting, f"seed={run.seed}"))
