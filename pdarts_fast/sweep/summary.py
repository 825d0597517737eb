"""What a sweep has found so far, from its folder: run by run and setting by setting."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pdarts_fast.config import SearchConfig
from pdarts_fast.cost import Cost, Scale, genotype_cost
from pdarts_fast.errors import RunError
from pdarts_fast.genotype import GENOTYPE_FILE, Genotype, count_skips
from pdarts_fast.network import NetworkCIFAR, NetworkImageNet
from pdarts_fast.run.files import write_json
from pdarts_fast.run.report_data import RunData, read_json, read_run
from pdarts_fast.run.train_report import best_validation, read_training
from pdarts_fast.run_train import then_train
from pdarts_fast.search_space import CELL_TYPES
from pdarts_fast.settings import from_json
from pdarts_fast.sweep.directory import SUMMARY_FILE, SweepDirectory
from pdarts_fast.sweep.plan import Plan, PlannedRun
from pdarts_fast.sweep.process import has_begun
from pdarts_fast.sweep.statistics import CellAgreement, Spread, agreement, spread
from pdarts_fast.sweep.targets import meets_targets

ENDED = ("finished", "failed")


@dataclass
class RunSummary:
    """One run.

    Attributes:
        name: Name of its folder.
        setting: The varied values, ``flag=value``.
        seed: Its seed.
        status: finished, failed, stopped, unfinished or waiting.
        error: What went wrong in a run that failed.
        run_dir: Its folder, relative to the sweep.
        log: What it has printed, relative to the sweep.
        genotype: The derived cell, once there is one.
        skips: Skip connections in its normal cell.
        parameters: Of the derived network at the scale of its recipe, without auxiliary head.
        multiply_adds: Of one image through that network.
        validation_accuracy: Of the last stage's supernet, 0 to 1.
        test_accuracy: Of the trained network after its last epoch, 0 to 1.
        best_test_accuracy: The highest of all its epochs.
        search_seconds: Time of the search.
        train_seconds: Time of the training after it.
        feasible: Whether its cell meets the targets of the search (any cell, if there are none);
            None while there is no cell, or if a cost is not known.
    """

    name: str
    setting: tuple[str, ...]
    seed: int
    status: str
    error: str | None
    run_dir: str
    log: str
    genotype: Genotype | None = None
    skips: int | None = None
    parameters: int | None = None
    multiply_adds: int | None = None
    validation_accuracy: float | None = None
    test_accuracy: float | None = None
    best_test_accuracy: float | None = None
    search_seconds: float | None = None
    train_seconds: float | None = None
    feasible: bool | None = None

    @property
    def accuracy(self) -> float | None:
        """What runs are ranked by: the test accuracy if they are trained, else validation."""
        return self.validation_accuracy if self.test_accuracy is None else self.test_accuracy


@dataclass
class SettingSummary:
    """The runs that differ only in their seed; numbers are over the finished ones.

    Attributes:
        setting: The varied values, ``flag=value``.
        runs: Names of its runs.
        finished: How many have finished.
        failed: How many have failed.
        feasible_fraction: Share of those that ended (finished or failed) whose cell is feasible;
            None before one has, or if a cost is not known.
        validation_accuracy: Spread of that number; likewise the next five.
        best: Name of the feasible run of the highest accuracy.
        agreement: How far the derived cells agree, by cell type; None below two.
    """

    setting: tuple[str, ...]
    runs: tuple[str, ...]
    finished: int
    failed: int
    feasible_fraction: float | None
    validation_accuracy: Spread
    test_accuracy: Spread
    parameters: Spread
    multiply_adds: Spread
    search_seconds: Spread
    train_seconds: Spread
    best: str | None
    agreement: dict[str, CellAgreement | None]


@dataclass
class SweepSummary:
    """All of a sweep.

    Attributes:
        runs: In the order of the plan.
        settings: In the same order.
        trained: Whether networks are trained after the searches.
        scale: How a genotype becomes the network whose cost is given; None before a run began, or
            if the settings differ in it.
        data: What the runs' folders hold, by name, for the page; those that have begun.
    """

    runs: list[RunSummary]
    settings: list[SettingSummary]
    trained: bool
    scale: Scale | None
    data: dict[str, RunData] = field(default_factory=dict)

    def with_status(self, *statuses: str) -> list[RunSummary]:
        """The runs that have one of some statuses."""
        return [run for run in self.runs if run.status in statuses]


def read_sweep(folder: SweepDirectory) -> SweepSummary:
    """What a sweep's folder holds, finished or not.

    Raises:
        UsageError: It holds no sweep.
        RunError: Its plan or an outcome is damaged; damage in a run only fails that run.
    """
    plan = folder.read_plan()
    summary = SweepSummary([], [], any(run.settings.get("then_train") for run in plan.runs), None)
    for planned in plan.runs:
        summary.runs.append(_read_run(folder, planned, summary))
    scales = {
        _scale_of(run, summary.data[run.name]) for run in plan.runs if run.name in summary.data
    }
    summary.scale = scales.pop() if len(scales) == 1 else None
    for setting in dict.fromkeys(run.setting for run in plan.runs):
        runs = [run for run in summary.runs if run.setting == setting]
        summary.settings.append(summarise(setting, runs))
    return summary


def write_summary(folder: SweepDirectory, plan: Plan, summary: SweepSummary) -> Path:
    """Write ``sweep.json``, the summary for scripts; see docs/sweep.md for its keys."""
    path = folder.path / SUMMARY_FILE
    runs = []
    for run in summary.runs:
        genotype = run.genotype._asdict() if run.genotype is not None else None
        runs.append(asdict(run) | {"genotype": genotype})
    scale = None
    if summary.scale is not None:
        scale = asdict(summary.scale) | {"network": summary.scale.network.__name__}
    content: dict[str, Any] = {
        "kind": "sweep",
        "command": folder.command(),
        "created": folder.created(),
        "seeds": plan.seeds,
        "vary": list(plan.vary),
        "flags": list(plan.flags),
        "trained": summary.trained,
        "counts": {
            "runs": len(runs),
            "finished": len(summary.with_status("finished")),
            "failed": len(summary.with_status("failed")),
        },
        "network": scale,
        "settings": [asdict(setting) for setting in summary.settings],
        "runs": runs,
    }
    write_json(path, content)
    return path


def summarise(setting: tuple[str, ...], runs: Sequence[RunSummary]) -> SettingSummary:
    """The numbers of the runs of one setting."""
    finished = [run for run in runs if run.status == "finished"]
    ended = [run for run in runs if run.status in ENDED]
    verdicts = [run.feasible if run.status == "finished" else False for run in ended]
    known = bool(ended) and None not in verdicts
    ranked = [run for run in finished if run.feasible and run.accuracy is not None]
    best = max(ranked, key=lambda run: run.accuracy or 0.0, default=None)

    def over(name: str) -> Spread:
        return spread([getattr(run, name) for run in finished])

    return SettingSummary(
        setting=setting,
        runs=tuple(run.name for run in runs),
        finished=len(finished),
        failed=len(ended) - len(finished),
        feasible_fraction=sum(map(bool, verdicts)) / len(ended) if known else None,
        validation_accuracy=over("validation_accuracy"),
        test_accuracy=over("test_accuracy"),
        parameters=over("parameters"),
        multiply_adds=over("multiply_adds"),
        search_seconds=over("search_seconds"),
        train_seconds=over("train_seconds"),
        best=best.name if best is not None else None,
        agreement={kind: agreement(_cells(finished, kind)) for kind in CELL_TYPES},
    )


def _cells(runs: Sequence[RunSummary], kind: str) -> list[Any]:
    return [getattr(run.genotype, kind) for run in runs if run.genotype is not None]


def _read_run(folder: SweepDirectory, planned: PlannedRun, summary: SweepSummary) -> RunSummary:
    outcome, run_dir = folder.outcome(planned), folder.run_dir(planned)
    run = RunSummary(
        name=planned.name,
        setting=planned.setting,
        seed=planned.seed,
        status=outcome.status,
        error=outcome.error,
        run_dir=str(run_dir.relative_to(folder.path)),
        log=str(folder.log(planned).relative_to(folder.path)),
    )
    if run.status == "waiting" and has_begun(run_dir):
        run.status = "unfinished"
    if not (run_dir / "config.json").is_file():
        return run
    try:
        summary.data[run.name] = data = read_run(run_dir)
        _add_search(run, planned, data)
        if (run_dir / "train" / "config.json").is_file():
            _add_training(run, read_training(run_dir / "train"))
    except RunError as error:
        run.status, run.error = "failed", str(error)
    return run


def _add_search(run: RunSummary, planned: PlannedRun, data: RunData) -> None:
    """Add what the search of a run has left."""
    run.search_seconds = data.seconds
    last = [record for record in data.validations if record["stage"] == data.num_stages]
    run.validation_accuracy = last[-1].get("accuracy") if last else None
    if data.genotype is None:
        return
    run.genotype, run.skips = data.genotype, count_skips(data.genotype.normal)
    cost = _cost(*(_hashable(cell) for cell in data.genotype), _scale_of(planned, data))
    run.parameters, run.multiply_adds = cost.parameters, cost.multiply_adds
    targets = planned.settings.get("target") or ()
    run.feasible = meets_targets(targets, cost, read_json(data.path / GENOTYPE_FILE))


def _add_training(run: RunSummary, data: RunData) -> None:
    """Add what the training after a search has left."""
    evaluations = sum(record.get("seconds") or 0.0 for record in data.validations)
    run.train_seconds = data.seconds + evaluations
    best = best_validation(data)
    if len(data.epochs) == data.config.get("epochs") and best is not None:
        run.test_accuracy = data.validations[-1].get("accuracy")
        run.best_test_accuracy = best["accuracy"]


def _scale_of(planned: PlannedRun, data: RunData) -> Scale:
    classes = data.section("dataset").get("num_classes")
    return evaluation_scale(planned.settings, int(classes or 10))


def evaluation_scale(settings: Mapping[str, Any], num_classes: int) -> Scale:
    """The network that ``--then-train`` makes of the cell of a search with some settings."""
    recipe = then_train(from_json(settings, SearchConfig(), "plan.json"), Path("."))
    return Scale(
        NetworkCIFAR if recipe.network == "cifar" else NetworkImageNet,
        recipe.channels,
        recipe.cells,
        num_classes,
        recipe.image_size,
    )


def _hashable(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(tuple(one) if isinstance(one, list) else one for one in values)


@functools.lru_cache(maxsize=4096)
def _cost(normal: Any, normal_concat: Any, reduce: Any, reduce_concat: Any, scale: Scale) -> Cost:
    """Cost of a genotype, counted once: the page is written again after every run."""
    genotype = Genotype(list(normal), list(normal_concat), list(reduce), list(reduce_concat))
    return genotype_cost(genotype, scale)
