"""What the settings of all commands share: flags, JSON, files, checks. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

from pdarts_fast.errors import UsageError


@dataclass(frozen=True)
class Settings:
    """Base of the settings of a command: a frozen dataclass with defaults, a flag a field.

    Attributes:
        command: Name of the command.
        execution_fields: Fields that do not change a run's result: a resumed run may give other
            values.
    """

    command: ClassVar[str] = ""
    execution_fields: ClassVar[frozenset[str]] = frozenset()


S = TypeVar("S", bound=Settings)

LoaderName = Literal["auto", "dali", "resident", "torchvision"]
LOADERS: tuple[str, ...] = get_args(LoaderName)

# What a configuration file may hold but does not set: it belongs to the run that wrote the file.
_OWN = frozenset({"config", "run_dir", "resume", "overwrite"})


def flag(field: str) -> str:
    """The command-line flag of a field: ``max_skips`` -> ``--max-skips``."""
    return "--" + field.replace("_", "-")


def to_json(config: Settings) -> dict[str, Any]:
    """All fields as JSON values (paths as text, tuples as lists)."""
    return {
        name: str(value)
        if isinstance(value, Path)
        else list(value)
        if type(value) is tuple
        else value
        for name, value in dataclasses.asdict(config).items()
    }


def from_json(values: Mapping[str, Any], base: S, source: str) -> S:
    """`base` with the values of a JSON object.

    Args:
        values: Field names (hyphens or underscores) to values.
        base: Settings that supply everything `values` does not name.
        source: Where the values come from, for the error message.

    Raises:
        UsageError: An unknown name, or a value of another type than the field's.
    """
    fields = {field.name: field for field in dataclasses.fields(base)}
    changes: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in fields:
            raise UsageError(
                f"{source}: unknown setting {key!r}; pdarts-fast {base.command} --help lists them"
            )
        field = fields[name]
        wrong = UsageError(f"{source}: {name} is {value!r}, wanted {field.type}")
        changes[name] = _convert(value, field.default, str(field.type), wrong)
    return dataclasses.replace(base, **changes)


def _convert(value: Any, default: Any, wanted: str, wrong: UsageError) -> Any:
    """A JSON value as the type of a field with this default and annotation, or raise `wrong`."""
    if isinstance(default, tuple):
        if not isinstance(value, list):
            raise wrong
        if "str" in wanted:
            _require(all(isinstance(one, str) for one in value), wrong)
            return tuple(value)
        kind = type(default[0])
        if not all(_is_number(v) and (kind is float or isinstance(v, int)) for v in value):
            raise wrong
        _require("..." in wanted or len(value) == len(default), wrong)
        return tuple(_number(kind, v, wrong) for v in value)
    if "None" in wanted and value is None:
        return None
    if "Path" in wanted:
        _require(isinstance(value, str), wrong)
        return Path(value)
    if isinstance(default, bool):
        _require(isinstance(value, bool), wrong)
        return value
    if isinstance(default, float):
        _require(_is_number(value), wrong)
        return _number(float, value, wrong)
    if isinstance(default, int) or wanted.startswith("int"):
        _require(isinstance(value, int) and not isinstance(value, bool), wrong)
        return value
    _require(isinstance(value, str), wrong)
    return value


def _require(fits: bool, wrong: UsageError) -> None:
    if not fits:
        raise wrong


def _number(kind: type, value: Any, wrong: UsageError) -> Any:
    try:
        return kind(value)
    except OverflowError:
        raise wrong from None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def settings_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a config.json or file of settings, less what belongs to one run only."""
    inner = values.get("config")
    values = inner if isinstance(inner, dict) else values
    return {k: v for k, v in values.items() if k.replace("-", "_") not in _OWN}


def read_values(path: Path) -> dict[str, Any]:
    """The settings in the file of --config, as JSON values; also in a run's config.json.

    Raises:
        UsageError: The file is missing or holds no JSON object.
    """
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--config {path}: not a JSON file ({error})") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {path}: wanted a JSON object of flag values")
    return settings_of(values)


def differing(saved: Mapping[str, Any], config: Settings) -> list[str]:
    """Flags whose value changes the result and differs between a saved run and `config`.

    Args:
        saved: Settings as `to_json` gives them.

    Returns:
        One text a flag, ``--epochs (3, now 5)``.
    """
    now = to_json(config)
    # A run of a version without the flag is what the flag's default stands for.
    before = {**to_json(type(config)()), **saved}
    return [
        f"{flag(name)} ({before[name]}, now {now[name]})"
        for name in now
        if name not in config.execution_fields and before[name] != now[name]
    ]


def check_choices(config: Settings, choices: Mapping[str, Sequence[str]]) -> None:
    """Raise `UsageError` if a field has a value that is not among its choices."""
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            raise UsageError(f"{flag(name)}: {value!r} is not one of {', '.join(allowed)}")


def check_device(device: str) -> None:
    """Raise `UsageError` if a text cannot name a device."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,2})?", device):
        raise UsageError(f"--device: {device!r} is not auto, cpu, cuda or cuda:N")


def check_ranges(config: Settings, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raise `UsageError` if a number is not finite or not from its lower to its upper bound."""
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None and not low <= one <= high:
                raise UsageError(f"{flag(name)} {one}: wanted a value from {low:g} to {high:g}")


def check_run_flags(run_dir: Path | None, resume: bool, overwrite: bool, what: str) -> None:
    """Raise `UsageError` if the flags about the run directory do not go together.

    Args:
        what: What a run of the command is called, ``search``.
    """
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other: give one of them")
    if resume and run_dir is None:
        raise UsageError(f"--resume needs --run-dir DIR, the folder of the {what} to go on with")
