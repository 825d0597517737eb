"""The sweep command: plan and checks, the runs, the page and the summary."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from pdarts_fast.config import SearchConfig
from pdarts_fast.data import load_dataset
from pdarts_fast.errors import UsageError
from pdarts_fast.kernels import backends
from pdarts_fast.run.metrics import require_tensorboard
from pdarts_fast.run.setup import pick_device
from pdarts_fast.run.signals import StopRequest
from pdarts_fast.run_train import check_then_train
from pdarts_fast.settings import from_json
from pdarts_fast.sweep.directory import Outcome, SweepDirectory, default_sweep_dir
from pdarts_fast.sweep.display import make_display
from pdarts_fast.sweep.page import write_sweep_report
from pdarts_fast.sweep.plan import Plan, PlannedRun, extend_plan, make_plan
from pdarts_fast.sweep.process import CHILD
from pdarts_fast.sweep.ray_runner import DEFAULT_RETRIES, RayRunner, require_ray
from pdarts_fast.sweep.runner import LocalRunner
from pdarts_fast.sweep.targets import check_targets

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepOptions:
    """The sweep command's own flags.

    Attributes:
        sweep_dir: Folder of the sweep, or None for one with the time in its name.
        seeds: Number of seeds; None: not given.
        vary: Texts ``flag=value,value``.
        resume: Go on with the sweep in `sweep_dir`.
        jobs: Runs at a time; None: one a GPU, or one.
        ray: Address of a Ray cluster, empty for the one that Ray finds or starts; None: no Ray.
        max_retries: How often Ray starts a run again that died; None: not given.
        flags: Flags of the search command.
        command: The whole command line, as words.
    """

    sweep_dir: Path | None = None
    seeds: int | None = None
    vary: tuple[str, ...] = ()
    resume: bool = False
    jobs: int | None = None
    ray: str | None = None
    max_retries: int | None = None
    flags: tuple[str, ...] = ()
    command: tuple[str, ...] = ()


class Runner(Protocol):
    """Runs searches until all have ended or it is told to stop."""

    def run(self, runs: Sequence[PlannedRun], stop: StopRequest) -> None:
        """Run all of `runs`, or until `stop` is set."""


def run_sweep(options: SweepOptions, program: Sequence[str] = CHILD) -> int:
    """Run a sweep from its command line to its page.

    Args:
        options: The command line.
        program: What runs ``search ...``.

    Returns:
        Exit status: 0 if every run has finished, 1 if one has failed, 128 + signal if stopped.

    Raises:
        UsageError: A flag, a value or a combination cannot work; nothing was started.
        RunError: The folder, or the cluster, cannot be used.
    """
    _check(options)
    path, plan = _plan(options)
    folder = SweepDirectory(path)
    _check_runs(plan, on_ray=options.ray is not None)
    check_targets(plan.runs, folder.run_dir, on_ray=options.ray is not None)
    folder.open()
    try:
        if not (options.resume and folder.has_plan and folder.read_plan() == plan):
            folder.write_plan(plan, shlex.join(options.command))
        _download(plan)
        status = _run(options, folder, plan, program)
    finally:
        folder.close()
    return status


def _check(options: SweepOptions) -> None:
    """Refuse flags of the sweep that do not go together."""
    if options.resume and options.sweep_dir is None:
        raise UsageError("--resume needs --sweep-dir DIR, the folder of the sweep to go on with")
    if options.jobs is not None and options.jobs < 1:
        raise UsageError(f"--jobs {options.jobs}: wanted at least 1")
    if options.ray is None:
        if options.max_retries is not None:
            raise UsageError("--max-retries is Ray's: give --ray too, or leave it out")
        return
    if options.jobs is not None:
        raise UsageError("--jobs does not go with --ray: Ray runs as many as the cluster holds")
    if options.max_retries is not None and options.max_retries < 0:
        raise UsageError(f"--max-retries {options.max_retries}: wanted at least 0")
    require_ray()


def _plan(options: SweepOptions) -> tuple[Path, Plan]:
    """The folder and the runs: those asked for, those of the folder, or the latter extended."""
    old = None
    if options.resume:
        assert options.sweep_dir is not None
        folder = SweepDirectory(options.sweep_dir)
        if folder.has_plan:
            old = folder.read_plan()
        else:
            folder.require_new()
            if not (options.seeds or options.vary or options.flags):
                raise UsageError(f"--sweep-dir {options.sweep_dir} holds no sweep to go on with")
            log.warning("no sweep in %s: it starts from its beginning", options.sweep_dir)
    if old is None:
        plan = make_plan(options.seeds, options.vary, options.flags)
    elif not (options.seeds or options.vary or options.flags):
        plan = old
    else:
        # What is not given stays as it was.
        seeds = old.seeds if options.seeds is None else options.seeds
        plan = make_plan(seeds, options.vary or old.vary, options.flags or old.flags)
        plan = extend_plan(old, plan, f"--sweep-dir {options.sweep_dir}")
    path = options.sweep_dir or default_sweep_dir(plan.runs[0].settings["dataset"])
    if old is None:
        SweepDirectory(path).require_new()
    return path, plan


def _check_runs(plan: Plan, *, on_ray: bool) -> None:
    """Refuse a run that could not start, before any other has cost time.

    Args:
        plan: Its settings are valid.
        on_ray: The runs see other machines than this one.
    """
    seen: set[tuple[object, ...]] = set()
    for run in plan.runs:
        config = from_json(run.settings, SearchConfig(), "plan.json")
        if config.then_train:
            check_then_train(config)
        if config.tensorboard:
            require_tensorboard()
        if config.data is not None and not config.download and not config.data.is_dir():
            raise UsageError(f"--data {config.data}: no such folder: create it, or correct it")
        if on_ray:
            if ":" in config.device:
                raise UsageError(f"--device {config.device}: Ray gives each run a GPU; use cuda")
            continue
        machine = (config.device, config.amp, config.backend, config.widest_cell)
        if machine not in seen:
            seen.add(machine)
            backends.resolve(config.backend, pick_device(config.device), config.widest_cell)


def _download(plan: Plan) -> None:
    """Fetch data sets that are asked for once, before several runs do so at the same time."""
    fetched: set[tuple[str, Path | None]] = set()
    for run in plan.runs:
        config = from_json(run.settings, SearchConfig(), "plan.json")
        if config.download and (config.dataset, config.data) not in fetched:
            fetched.add((config.dataset, config.data))
            load_dataset(
                config.dataset,
                config.data,
                image_size=config.image_size,
                download=True,
                checksum=config.checksum,
            )


def gpu_slots(environment: Mapping[str, str], count: int) -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them.

    Args:
        environment: Variables of this process.
        count: How many torch sees.
    """
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(number) for number in range(count)]
    return [name.strip() for name in named.split(",")][:count]


def _slots(plan: Plan, jobs: int | None) -> list[str | None]:
    """A slot for each run at a time: its GPU, or None."""
    wants_gpu = any(run.settings["device"] in ("auto", "cuda") for run in plan.runs)
    gpus = gpu_slots(os.environ, torch.cuda.device_count()) if wants_gpu else []
    wanted = jobs or len(gpus) or 1
    return [gpus[number % len(gpus)] if gpus else None for number in range(wanted)]


def _run(options: SweepOptions, folder: SweepDirectory, plan: Plan, program: Sequence[str]) -> int:
    left = [run for run in plan.runs if folder.outcome(run).status != "finished"]
    display = make_display(len(plan.runs), len(plan.runs) - len(left), folder.path / "logs")
    display.message(f"writes into {folder.path}: {len(plan.runs)} runs, {len(left)} to do")

    def ended(run: PlannedRun, outcome: Outcome) -> None:
        write_sweep_report(folder.path)

    runner: Runner
    ray = None
    try:
        if options.ray is not None:
            retries = DEFAULT_RETRIES if options.max_retries is None else options.max_retries
            runner = ray = RayRunner(folder, options.ray, retries, display, ended, program)
        else:
            runner = LocalRunner(folder, _slots(plan, options.jobs), display, ended, program)
        with StopRequest() as stop:
            runner.run(left, stop)
    finally:
        if ray is not None:
            ray.close()
        display.close()
    report = write_sweep_report(folder.path)
    if stop.signum is not None:
        resume = shlex.join(["pdarts-fast", "sweep", "--resume", "--sweep-dir", str(folder.path)])
        log.warning("stopped by %s: %s goes on", signal.Signals(stop.signum).name, resume)
        return 128 + stop.signum
    print(f"report: {report}")
    failed = [run for run in plan.runs if folder.outcome(run).status != "finished"]
    if failed:
        names = ", ".join(run.name for run in failed)
        print(
            f"pdarts-fast: error: {len(failed)} of {len(plan.runs)} runs failed ({names}); their "
            f"logs are in {folder.path / 'logs'}; --resume tries them again",
            file=sys.stderr,
        )
        return 1
    return 0
