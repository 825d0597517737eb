"""Writes the page that compares the runs of a sweep: one HTML file that needs nothing else."""

from __future__ import annotations

from html import escape
from pathlib import Path

from pdarts_fast.run import report_sections as sections
from pdarts_fast.run.files import write_atomically
from pdarts_fast.run.report import REPORT_FILE, page, section
from pdarts_fast.run.report_data import RunData
from pdarts_fast.sweep import page_sections as parts
from pdarts_fast.sweep.charts import spread_text
from pdarts_fast.sweep.directory import SweepDirectory
from pdarts_fast.sweep.plan import Plan
from pdarts_fast.sweep.statistics import Spread
from pdarts_fast.sweep.summary import SettingSummary, SweepSummary, read_sweep, write_summary


def write_sweep_report(path: Path) -> Path:
    """Writes ``report.html`` and ``sweep.json`` of a sweep, also of one that has not ended.

    Args:
        path: Folder of the sweep.

    Returns:
        The page.

    Raises:
        UsageError: It holds no sweep.
        RunError: A file of the sweep is damaged, or a file cannot be written.
    """
    folder = SweepDirectory(path)
    plan, summary = folder.read_plan(), read_sweep(folder)
    write_summary(folder, plan, summary)
    report = path / REPORT_FILE
    write_atomically(report, render(folder, plan, summary).encode("utf-8"))
    return report


def render(folder: SweepDirectory, plan: Plan, summary: SweepSummary) -> str:
    """Returns the page of a sweep as HTML."""
    planned = RunData(folder.path, {"config": plan.runs[0].settings})
    first = next(iter(summary.data.values()), planned)
    ended = len(summary.with_status("finished", "failed")) == len(summary.runs)
    bodies = [
        ("comparison", "Comparison", _comparison(summary)),
        ("runs", "Runs", f'<div class="card">{_runs(folder, summary)}</div>'),
        ("cells", "Cells", parts.cell_drawings(summary)),
        ("agreement", "Agreement between seeds", _agreement(summary)),
        ("configuration", "Configuration", _configuration(folder, plan, first)),
    ]
    shown = [(name, title, body) for name, title, body in bodies if body]
    about = RunData(folder.path, {"created": folder.created()})
    return page(
        about,
        title=f"Sweep on {sections.dataset_name(first)}",
        finished=ended,
        notice=_notice(folder, summary),
        tiles=_tiles(summary, first),
        links=[(name, title.split()[0]) for name, title, _ in shown],
        main="\n".join(section(name, title, body) for name, title, body in shown),
    )


def _notice(folder: SweepDirectory, summary: SweepSummary) -> str:
    failed = summary.with_status("failed")
    notes = [f"{run.name} failed ({run.error}). Its log: {run.log}" for run in failed]
    left = len(summary.runs) - len(failed) - len(summary.with_status("finished"))
    if left:
        notes.append(
            f"The sweep is unfinished: {left} of {len(summary.runs)} runs have not ended. This "
            "page shows what there is so far."
        )
    return "".join(f'<p class="notice" role="status">{escape(note)}</p>' for note in notes)


def _tiles(summary: SweepSummary, first: RunData) -> str:
    finished = summary.with_status("finished")
    failed = len(summary.with_status("failed"))
    seeds = len({run.seed for run in summary.runs})
    kinds = f"{len(summary.settings)} setting{'s' if len(summary.settings) > 1 else ''}"
    over = f"{kinds}, {seeds} seed{'s' if seeds > 1 else ''}"
    ranked = [run for run in finished if run.feasible and run.accuracy is not None]
    best = max(ranked, key=lambda run: run.accuracy or 0.0, default=None)
    kind = "Test" if summary.trained else "Validation"
    settings = [one for one in summary.settings if _accuracy(summary, one).mean is not None]
    leader = max(settings, key=lambda one: _accuracy(summary, one).mean or 0.0, default=None)
    seconds = sum((run.search_seconds or 0) + (run.train_seconds or 0) for run in summary.runs)
    done = "searching and training" if summary.trained else "searching"
    return sections.tile_list(
        [
            ("Data set", *sections.dataset_tile(first)),
            (
                "Runs finished",
                f"{len(finished)} of {len(summary.runs)}",
                f"{over}, {failed} failed" if failed else over,
            ),
            (f"{kind} accuracy", *_accuracy_tile(summary, leader)),
            (
                "Best run",
                parts.percent(best.accuracy if best is not None else None),
                best.name if best is not None else "none has ended",
            ),
            ("Time of all runs", sections.duration(seconds), done),
            ("Hardware", *sections.hardware_tile(first)),
        ]
    )


def _accuracy(summary: SweepSummary, setting: SettingSummary) -> Spread:
    return setting.test_accuracy if summary.trained else setting.validation_accuracy


def _accuracy_tile(summary: SweepSummary, leader: SettingSummary | None) -> tuple[str, str]:
    """Returns value and note of the setting of the highest mean."""
    if leader is None:
        return sections.NOTHING, "none has ended"
    accuracy = _accuracy(summary, leader)
    note = "one run"
    if accuracy.count > 1:
        note = f"mean ± sample standard deviation of {accuracy.count} runs"
    if leader.setting:
        note += f", {parts.setting_name(leader.setting)}"
    return spread_text(accuracy, parts.percent), note


def _comparison(summary: SweepSummary) -> str:
    note = (
        "Mean ± sample standard deviation over the finished runs of each setting. Feasible: share "
        "of the runs that ended with a valid cell, within its targets where the search has some. "
        "Shared: share of the operations that a pair of seeds has alike, on the same edge (mean "
        "over the pairs). Times are means."
    )
    if summary.scale is not None:
        scale = summary.scale
        note += (
            f" Costs are those of the derived network of {scale.layers} cells with {scale.C} "
            f"channels on {scale.image_size}×{scale.image_size} images."
        )
    charts = parts.dot_charts(summary)
    return (
        f'<p class="lead">{note}</p><div class="card">{parts.comparison_table(summary)}</div>'
        f'<div class="charts dots">{charts}</div>'
    )


def _runs(folder: SweepDirectory, summary: SweepSummary) -> str:
    reports = {
        run.name for run in summary.runs if (folder.path / run.run_dir / REPORT_FILE).is_file()
    }
    return parts.run_table(summary, reports)


def _agreement(summary: SweepSummary) -> str:
    tables = parts.agreement_tables(summary)
    if not tables:
        return ""
    note = (
        "What each seed has on every edge; a dash means that its cell does not use the edge. "
        "Pairs alike: share of the pairs of seeds that have the same there, an unused edge "
        "included. The operation that most seeds have is filled."
    )
    return f'<p class="lead">{note}</p>{tables}'


def _configuration(folder: SweepDirectory, plan: Plan, first: RunData) -> str:
    block = sections.copy_block("Command", folder.command(), "sweep-command", wrap=True)
    varied = {text.partition("=")[0].lstrip("-").replace("-", "_") for text in plan.vary}
    config = {name: value for name, value in first.config.items() if name not in varied}
    for name in ("run_dir", "seed", "resume", "overwrite"):
        config.pop(name, None)
    what = {} if plan.seeds is None else {"--seeds": str(plan.seeds)}
    what |= {f"--vary {t.partition('=')[0]}": t.partition("=")[2] for t in plan.vary}
    shared = RunData(folder.path, {**first.info, "config": config})
    tables = sections.configuration(shared)
    rows = [
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in what.items()
    ]
    own = sections.table("Sweep", ["Name", "Value"], rows, shown_caption=True)
    return f'{block}<div class="tables"><div class="card">{own}</div>{tables}</div>'
