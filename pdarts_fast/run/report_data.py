"""Reads what a search has written into its run directory, finished or not."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.genotype import Genotype, check_genotype

Record = dict[str, Any]


@dataclass
class RunData:
    """The files of a run directory, parsed.

    Attributes:
        path: the run directory.
        info: content of ``config.json``.
        epochs: metrics records of kind ``epoch`` in order of stage and epoch.
        validations: metrics records of kind ``validation``, in the same order.
        stages: metrics records of kind ``stage`` (one for each completed stage) by stage number.
        alphas: lines of ``alphas.jsonl`` in order of stage and epoch.
        genotype: the result, or None while the search is unfinished.
        max_skips: skips allowed in the normal cell of the result, if known.
        restricted: genotype for each number of skips allowed, largest number first.
        costs: metrics records of kind ``cost`` in order of stage and epoch.
        operations: metrics records of kind ``operation``, in the same order.
        result: content of ``genotype.json``, empty while the search is unfinished.
        incomplete_lines: lines cut off at the end of a file by a search that was stopped.
    """

    path: Path
    info: Record
    epochs: list[Record] = field(default_factory=list)
    validations: list[Record] = field(default_factory=list)
    stages: dict[int, Record] = field(default_factory=dict)
    alphas: list[Record] = field(default_factory=list)
    genotype: Genotype | None = None
    max_skips: int | None = None
    restricted: dict[int, Genotype] = field(default_factory=dict)
    costs: list[Record] = field(default_factory=list)
    operations: list[Record] = field(default_factory=list)
    result: Record = field(default_factory=dict)
    incomplete_lines: int = 0

    @property
    def config(self) -> Record:
        """The resolved configuration of the search."""
        return self.section("config")

    def section(self, name: str) -> Record:
        """Returns an object of ``config.json``, empty if it is missing or null."""
        value = self.info.get(name)
        return value if isinstance(value, dict) else {}

    @property
    def num_stages(self) -> int:
        """Stages that the search has when finished."""
        cells = self.config.get("cells")
        seen = [record["stage"] for record in (*self.epochs, *self.alphas)]
        return max([len(cells) if isinstance(cells, list) else 0, *self.stages, *seen])

    @property
    def seconds(self) -> float:
        """Time that the recorded epochs and stages took, in seconds."""
        return sum(self.stage_seconds(stage) for stage in range(1, self.num_stages + 1))

    def stage_seconds(self, stage: int) -> float:
        """Returns the time of a stage so far, in seconds; 0 if it has not begun."""
        if stage in self.stages and self.stages[stage].get("seconds") is not None:
            return float(self.stages[stage]["seconds"])
        return sum(r.get("seconds") or 0.0 for r in self.epochs if r["stage"] == stage)

    def offset(self, stage: int) -> int:
        """Returns how many recorded epochs lie before a stage."""
        return sum(length for number, length in self._lengths.items() if number < stage)

    @cached_property
    def _lengths(self) -> dict[int, int]:
        lengths: dict[int, int] = {}
        for record in (*self.epochs, *self.alphas):
            length = int(record["epoch"]) + 1
            lengths[record["stage"]] = max(lengths.get(record["stage"], 0), length)
        return lengths


def read_run(run_dir: Path) -> RunData:
    """Reads a run directory.

    Only ``config.json`` has to exist. A record that is there twice (an epoch repeated after a
    resume) counts as its last writing says.

    Raises:
        UsageError: `run_dir` is no directory or holds no ``config.json``.
        RunError: a file is damaged; the message names the file and the line.
    """
    if not run_dir.is_dir():
        raise UsageError(f"{run_dir}: no such run directory")
    if not (run_dir / "config.json").is_file():
        raise UsageError(f"{run_dir}: no config.json in it; wanted the folder of a search")
    data = RunData(run_dir, read_json(run_dir / "config.json"))
    metrics, cut_metrics = read_lines(run_dir / "metrics.jsonl", ("kind", "stage"))
    alphas, cut_alphas = read_lines(
        run_dir / "alphas.jsonl", ("stage", "epoch", "ops", "normal", "reduce")
    )
    data.incomplete_lines = cut_metrics + cut_alphas
    data.epochs = in_order(metrics, "epoch")
    data.validations = in_order(metrics, "validation")
    data.costs = in_order(metrics, "cost")
    data.operations = in_order(metrics, "operation")
    data.stages = {record["stage"]: record for record in metrics if record["kind"] == "stage"}
    data.alphas = in_order([record | {"kind": "alphas"} for record in alphas], "alphas")
    if (run_dir / "genotype.json").is_file():
        _read_result(data, run_dir / "genotype.json")
    return data


def _read_result(data: RunData, path: Path) -> None:
    data.result = content = read_json(path)
    data.genotype = check_genotype(content.get("genotype"), f"{path}: genotype")
    data.max_skips = content.get("max_skips")
    restricted = content.get("restricted") or {}
    data.restricted = {
        int(count): check_genotype(restricted[count], f"{path}: restricted {count}")
        for count in sorted(restricted, key=int, reverse=True)
    }


def read_json(path: Path) -> Record:
    """Returns the object in a JSON file; raises `RunError` if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise RunError(f"{path}: not JSON ({error}); was it cut off or edited?") from error
    if not isinstance(content, dict):
        raise RunError(f"{path}: wanted a JSON object, got {type(content).__name__}")
    return content


def read_lines(path: Path, wanted: tuple[str, ...]) -> tuple[list[Record], int]:
    """Returns a file's JSON objects and the number (0 or 1) of lines cut off at its end."""
    if not path.is_file():
        return [], 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return records, 1
            raise RunError(f"{path}: line {number} is not JSON ({error})") from error
        missing = [key for key in wanted if not isinstance(record, dict) or key not in record]
        if missing:
            raise RunError(f"{path}: line {number} lacks {', '.join(missing)}")
        records.append(record)
    return records, 0


def in_order(records: list[Record], kind: str) -> list[Record]:
    """Returns the records of a kind by stage and epoch; of repeated ones, the last."""
    last = {(r["stage"], r.get("epoch", 0)): r for r in records if r["kind"] == kind}
    return [last[key] for key in sorted(last)]
