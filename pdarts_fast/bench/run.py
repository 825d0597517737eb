"""The bench command: the search network of every stage against the published graph."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pdarts_fast.bench import accuracy, measure, primitives, rivals
from pdarts_fast.bench.predict import run_predict
from pdarts_fast.config import SearchConfig
from pdarts_fast.data.memory import available_memory
from pdarts_fast.errors import UsageError
from pdarts_fast.kernels import backends
from pdarts_fast.kernels import cell as fused
from pdarts_fast.kernels.cpu.pages import collapse_small_pages
from pdarts_fast.run.environment import cpu_name, usable_cores, versions

log = logging.getLogger(__name__)

# A CIFAR-10 search: steps an epoch, epochs with weights only, epochs with both steps; batch 96.
STEPS, WEIGHT_EPOCHS, BOTH_EPOCHS, BATCH = 261, 10, 15, 96

# Memory of a process that times the published graph in both layouts, over what one of them saves
# for backward.
_MEMORY_FACTOR = 1.9

# The same of a process that compares with float64, in the batches that are tried for that.
_ACCURACY_FACTOR, _ACCURACY_BATCHES = 3.5, (32, 8)

# Seconds of a turn: calls of the published graph take longer, those of the fused cells repeat.
_TURN = 3.0


@dataclass(frozen=True)
class BenchOptions:
    """Measure the supernet of each stage against the published graph, interleaved.

    Attributes:
        stages: Of 1, 2, 3.
        batch: Images in a batch.
        repeats: Rounds in which all rivals take turns of three seconds or a call.
        backend: Rival of the published graph.
        quick: Batch 8, two rounds, no published bilevel step: minutes instead of an hour.
        accuracy: Compare with float64 too.
        json: Also write all numbers to this file.
        predict: Measure nothing; predict the search on a GPU, a100, h100, b200 or rtx4090, from
            the launches it would make (a few minutes).
    """

    stages: tuple[int, ...] = (1, 2, 3)
    batch: int = 32
    repeats: int = 3
    backend: str = "cpu"
    quick: bool = False
    accuracy: bool = True
    json: Path | None = None
    predict: str | None = None


def _check(options: BenchOptions) -> None:
    for stage in options.stages:
        if stage not in rivals.CELLS:
            raise UsageError(f"--stages {stage}: stages are 1, 2 and 3")
    for name in ("batch", "repeats"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} {getattr(options, name)}: must be at least 1")
    if options.backend == backends.REFERENCE:
        raise UsageError("--backend reference is the published graph itself; choose a fused one")
    backends.check(options.backend)


def _shortage(stage: int, batch: int, factor: float) -> tuple[float, float] | None:
    """Bytes needed and free if the published graph does not fit, ``factor`` times what it saves."""
    small = rivals.make(stage, 2, backends.REFERENCE)[rivals.PUBLISHED]
    needed = measure.saved_bytes(small.network, small.loss) // 2 * batch * factor
    available = available_memory()
    return None if available is None or needed <= available else (needed, available)


def _fits(stage: int, batch: int) -> bool:
    """Whether there is memory for the published graph; says so if not."""
    shortage = _shortage(stage, batch, _MEMORY_FACTOR)
    if shortage is None:
        return True
    log.warning(
        "stage %d at batch %d: the published graph is left out, it needs about %.0f GB of memory "
        "and %.0f GB are free; use a smaller --batch to compare",
        *(stage, batch, *(size / 1e9 for size in shortage)),
    )
    return False


def _errors(stage: int, batch: int, backend: str) -> dict[str, Any] | None:
    """``accuracy.errors`` and their batch, the largest up to ``batch`` that fits; says if none."""
    for size in sorted({min(batch, size) for size in _ACCURACY_BATCHES}, reverse=True):
        if _shortage(stage, size, _ACCURACY_FACTOR) is None:
            return {"batch": size, "rivals": accuracy.errors(stage, size, backend)}
    log.warning("stage %d: too little memory to compare with float64, which is left out", stage)
    return None


def _stage(options: BenchOptions, stage: int, batch: int, repeats: int) -> dict[str, Any]:
    """All numbers of one stage; of the published graph as well where its memory is there."""
    with_published = _fits(stage, batch)
    made = rivals.make(stage, batch, options.backend, published=with_published)
    own, amp = made[options.backend], made[f"{options.backend} amp"]
    for rival in (own, amp):
        rival.forward_backward()
    # As a search does after some hundred passes, and before the published graph's arrays are there.
    collapse_small_pages()
    saved = {name: measure.saved_bytes(r.network, r.loss) for name, r in made.items()}
    calls = {name: rival.forward_backward for name, rival in made.items()}
    turn = 0.0 if options.quick else _TURN
    passes = measure.interleaved(calls, repeats, turn)
    config = SearchConfig()
    alpha, weight = rivals.own_steps(own, config)
    amp_alpha, amp_weight = rivals.own_steps(amp, config)

    def bilevel() -> None:
        alpha()
        weight()

    steps = {
        "alpha step": alpha,
        "weight step": weight,
        "bilevel step": bilevel,
        "amp alpha step": amp_alpha,
        "amp weight step": amp_weight,
    }
    if with_published and not options.quick:
        published = rivals.published_bilevel(made[rivals.PUBLISHED], config)
        steps["published bilevel step"] = published
    timed = measure.interleaved(steps, repeats, turn)
    for parameter in own.network.parameters():
        parameter.requires_grad_(True)
    with fused.primitive_by_primitive(options.backend):
        # The first pass this way asks for fresh memory, which takes longer than to fill it.
        own.forward_backward()
        with primitives.recording(fused.backend_named(options.backend)) as costs:
            own.forward_backward()
    return {
        "stage": stage,
        "batch": batch,
        "passes": {name: asdict(timing) for name, timing in passes.items()},
        "steps": {name: asdict(timing) for name, timing in timed.items()},
        "saved_bytes": saved,
        "primitives": {name: asdict(cost) for name, cost in costs.items()},
    }


def projected_seconds(results: list[dict[str, Any]], prefix: str = "") -> float | None:
    """Seconds of a whole CIFAR-10 search at batch 96, steps alone; None without all stages."""
    if {result["stage"] for result in results} != {1, 2, 3}:
        return None
    total = 0.0
    for result in results:
        scale = BATCH / result["batch"]
        weight = result["steps"][f"{prefix}weight step"]["median"] * scale
        alpha = result["steps"][f"{prefix}alpha step"]["median"] * scale
        total += STEPS * ((WEIGHT_EPOCHS + BOTH_EPOCHS) * weight + BOTH_EPOCHS * alpha)
    return total


def _print_stage(console: Console, options: BenchOptions, result: dict[str, Any]) -> None:
    passes, steps = result["passes"], result["steps"]
    table = Table(title=f"stage {result['stage']}, batch {result['batch']}", title_justify="left")
    for heading in ("forward + backward", "ms", "vs published", "vs channels-last", "saved MiB"):
        table.add_column(heading, justify="left" if heading == "forward + backward" else "right")
    for name, timing in passes.items():
        ratios = [
            f"{passes[rival]['median'] / timing['median']:.1f}×" if rival in passes else "–"
            for rival in (rivals.PUBLISHED, rivals.PUBLISHED_LAST)
        ]
        table.add_row(
            name,
            f"{timing['median'] * 1e3:.0f}",
            *ratios,
            f"{result['saved_bytes'][name] / 2**20:.0f}",
        )
    console.print(table)
    line = ", ".join(f"{name} {timing['median'] * 1e3:.0f} ms" for name, timing in steps.items())
    if "published bilevel step" in steps:
        ratio = steps["published bilevel step"]["median"] / steps["bilevel step"]["median"]
        line += f"; bilevel {ratio:.1f}×"
    console.print(line)
    table = Table(title=f"primitives of {options.backend}, one pass", title_justify="left")
    for heading in ("primitive", "calls", "ms", "GFLOP/s", "GB/s"):
        table.add_column(heading, justify="left" if heading == "primitive" else "right")
    for name, cost in result["primitives"].items():
        seconds = cost["seconds"]
        table.add_row(
            name,
            str(cost["calls"]),
            f"{seconds * 1e3:.1f}",
            f"{cost['flops'] / seconds / 1e9:.0f}",
            f"{cost['bytes'] / seconds / 1e9:.1f}",
        )
    console.print(table)


def _print_errors(console: Console, found: dict[str, Any]) -> None:
    kinds = list(next(iter(found["rivals"].values()))["rounding"])
    table = Table(
        title=f"largest relative errors against float64, batch {found['batch']}",
        title_justify="left",
        caption="Flips: ReLUs and maximum pools that take another side than in float64. Left out: "
        "the float64 graph takes the sides of the float32 pass.",
        caption_justify="left",
    )
    table.add_column("float32 of")
    table.add_column("flips", justify="right")
    for kind in kinds:
        table.add_column(kind.replace(" ", "\n"), justify="right")
    for errors in ("rounding", "plain"):
        for name, rival in found["rivals"].items():
            flips = str(rival["flips"]) if errors == "plain" else "left out"
            values = [f"{rival[errors][kind]:.1e}" for kind in kinds]
            table.add_row(name, flips, *values)
    console.print(table)


def run_bench(options: BenchOptions) -> dict[str, Any]:
    """Measures, prints tables to standard output and returns all numbers.

    Raises:
        UsageError: An option is out of its range or the backend is not usable.
    """
    if options.json is not None and not (folder := options.json.resolve().parent).is_dir():
        raise UsageError(f"--json {options.json}: there is no folder {folder}; make it")
    if options.predict is not None:
        return run_predict(options.predict, options.json)
    _check(options)
    console = Console(file=sys.stdout, highlight=False)
    batch = 8 if options.quick else options.batch
    repeats = 2 if options.quick else options.repeats
    report: dict[str, Any] = {
        "machine": {"cpu": cpu_name(), "cores": usable_cores(), "threads": torch.get_num_threads()},
        "versions": versions(),
        "backend": backends.available()[options.backend].reason,
        "matmul_flops": measure.matmul_rate(),
        "copy_bytes": measure.copy_rate(),
        "stages": [],
    }
    console.print(
        f"{cpu_name()}, {torch.get_num_threads()} threads; {report['backend']}; a large matrix "
        f"product reaches {report['matmul_flops'] / 1e9:.0f} GFLOP/s, a stream copy "
        f"{report['copy_bytes'] / 1e9:.1f} GB/s"
    )
    for stage in options.stages:
        result = _stage(options, stage, batch, repeats)
        measure.release_memory()
        report["stages"].append(result)
        _print_stage(console, options, result)
        if options.accuracy:
            result["errors"] = _errors(stage, batch, options.backend)
            measure.release_memory()
            if result["errors"] is not None:
                _print_errors(console, result["errors"])
    for name, prefix in (("float32", ""), ("amp", "amp ")):
        seconds = projected_seconds(report["stages"], prefix)
        report[f"projected_seconds_{name}"] = seconds
        if seconds is not None:
            console.print(
                f"projected: a whole CIFAR-10 search in {name} takes {seconds / 3600:.1f} hours "
                "here (31,320 passes at batch 96)"
            )
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1))
    return report
