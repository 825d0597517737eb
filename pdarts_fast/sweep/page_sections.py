"""Tables and drawings of a sweep's page as pieces of HTML; everything from files is escaped."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from urllib.parse import quote

from pdarts_fast.genotype import Genotype
from pdarts_fast.run import report_sections as sections
from pdarts_fast.run.drawing import cell_svg_inline
from pdarts_fast.run.palette import op_label, op_variable
from pdarts_fast.run.report_charts import CELL_NAMES, state_name
from pdarts_fast.sweep.charts import Dots, dot_chart, size_chart, spread_text
from pdarts_fast.sweep.statistics import CellAgreement, EdgeAgreement
from pdarts_fast.sweep.summary import RunSummary, SettingSummary, SweepSummary

NOTHING = sections.NOTHING
# More runs than that: only the best cell of each setting is unfolded.
_UNFOLDED = 3
# More seeds than that: the tables of both cells do not fit side by side.
_NARROW = 3


def percent(share: float | None) -> str:
    """Writes a share of 0..1 as a percentage with two decimals."""
    return NOTHING if share is None else f"{100 * share:.2f}%"


def whole_percent(share: float | None) -> str:
    """Writes a share of 0..1 as a percentage without decimals."""
    return NOTHING if share is None else f"{100 * share:.0f}%"


def count(value: float | None) -> str:
    """Writes a size with three or four digits: ``3.43 M``, ``41.2 k``."""
    if value is None:
        return NOTHING
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g} {prefix}"
    return f"{value:.4g}"


def seconds(value: float | None) -> str:
    """Writes a time for reading."""
    return NOTHING if value is None else sections.duration(value)


def setting_name(setting: Sequence[str]) -> str:
    """Writes a setting; an empty text if nothing is varied."""
    return ", ".join(setting)


def comparison_table(summary: SweepSummary) -> str:
    """Returns a row for each setting: mean ± sample standard deviation over its finished runs."""
    columns: list[tuple[str, Callable[[SettingSummary], str]]] = [
        ("Runs", lambda one: f"{one.finished} of {len(one.runs)}"),
    ]
    if summary.trained:
        columns.append(("Test accuracy", lambda one: spread_text(one.test_accuracy, percent)))
    columns += [
        ("Best", lambda one: percent(_best(summary, one))),
        ("Validation accuracy", lambda one: spread_text(one.validation_accuracy, percent)),
        ("Feasible", lambda one: whole_percent(one.feasible_fraction)),
        ("Parameters", lambda one: spread_text(one.parameters, count)),
        ("Multiply-adds", lambda one: spread_text(one.multiply_adds, count)),
        ("Shared, normal cell", lambda one: _shared(one, "normal")),
        ("Shared, reduction", lambda one: _shared(one, "reduce")),
        ("Search time", lambda one: seconds(one.search_seconds.mean)),
    ]
    if summary.trained:
        columns.append(("Training time", lambda one: seconds(one.train_seconds.mean)))
    rows = []
    for setting in summary.settings:
        cells = "".join(f'<td class="number">{escape(write(setting))}</td>' for _, write in columns)
        name = escape(setting_name(setting.setting) or "all runs")
        rows.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    head = ["Setting", *(name for name, _ in columns)]
    return sections.table("Settings compared", head, rows, numbers=True)


def _best(summary: SweepSummary, setting: SettingSummary) -> float | None:
    return next((run.accuracy for run in summary.runs if run.name == setting.best), None)


def _shared(setting: SettingSummary, kind: str) -> str:
    found = setting.agreement[kind]
    return whole_percent(found.shared if found is not None else None)


def run_table(summary: SweepSummary, reports: set[str]) -> str:
    """Returns a row for each run.

    Args:
        summary: The sweep.
        reports: Names of the runs that have a report.
    """
    head = ["Run", "State", "Validation accuracy"]
    head += ["Test accuracy", "Best epoch"] if summary.trained else []
    head += ["Feasible", "Skips", "Parameters", "Multiply-adds", "Search time"]
    head += ["Training time"] if summary.trained else []
    best = {setting.best for setting in summary.settings}
    rows = []
    for run in summary.runs:
        values = [percent(run.validation_accuracy)]
        if summary.trained:
            values += [percent(run.test_accuracy), percent(run.best_test_accuracy)]
        values += [
            {None: NOTHING, True: "yes", False: "no"}[run.feasible],
            NOTHING if run.skips is None else str(run.skips),
            f"{run.parameters:,}" if run.parameters is not None else NOTHING,
            count(run.multiply_adds),
            seconds(run.search_seconds),
        ]
        values += [seconds(run.train_seconds)] if summary.trained else []
        cells = "".join(f'<td class="number">{escape(value)}</td>' for value in values)
        name = escape(run.name)
        if run.name in reports:
            name = f'<a href="{quote(run.run_dir)}/report.html">{name}</a>'
        mark = ' <span class="badge">best</span>' if run.name in best else ""
        state = f'<span class="status {_state_class(run)}">{escape(run.status)}</span>'
        rows.append(
            f'<tr><th scope="row">{name}{mark}</th><td class="number">{state}</td>{cells}</tr>'
        )
    return sections.table("All runs", head, rows, numbers=True)


def _state_class(run: RunSummary) -> str:
    return {"finished": "finished", "failed": "failed"}.get(run.status, "unfinished")


def dot_charts(summary: SweepSummary) -> str:
    """Returns the charts of accuracy, size and time over all settings."""
    charts: list[tuple[str, str, str, Callable[[float], str]]] = [
        ("Validation accuracy", "of the last supernet", "validation_accuracy", percent),
        ("Parameters", "of the derived network", "parameters", count),
        ("Search time", "of the whole search", "search_seconds", seconds),
    ]
    if summary.trained:
        charts.insert(
            0, ("Test accuracy", "of the trained network, last epoch", "test_accuracy", percent)
        )
    ranked = "test_accuracy" if summary.trained else "validation_accuracy"
    figures = []
    finished = {run.name: run for run in summary.with_status("finished")}
    ranks = [run for run in finished.values() if run.feasible and run.accuracy is not None]
    best = max(ranks, key=lambda run: run.accuracy or 0.0, default=None)
    for title, note, key, write in charts:
        rows = []
        for setting in summary.settings:
            runs = [finished[name] for name in setting.runs if name in finished]
            known = [(run.name, getattr(run, key)) for run in runs]
            points = [(name, float(value)) for name, value in known if value is not None]
            rows.append(Dots(setting_name(setting.setting), points, getattr(setting, key)))
        marked = best.name if best is not None and key == ranked else None
        figures.append(dot_chart(title, note, rows, write, marked))
    groups = [
        (
            setting_name(setting.setting),
            [
                (run.name, float(run.parameters), float(run.accuracy))
                for run in finished.values()
                if run.name in setting.runs
                and run.parameters is not None
                and run.accuracy is not None
            ],
        )
        for setting in summary.settings
    ]
    figures.append(size_chart(groups, "test" if summary.trained else "validation"))
    return "".join(figures)


def cell_drawings(summary: SweepSummary) -> str:
    """Returns the drawings of every derived cell, folded where there are many."""
    number_drawn = sum(run.genotype is not None for run in summary.runs)
    best = {setting.best for setting in summary.settings}
    drawn: dict[str, tuple[int, str]] = {}
    parts = []
    for number, run in enumerate(summary.runs):
        if run.genotype is None:
            continue
        key = str(run.genotype)
        note = f"{count(run.parameters)} parameters, {percent(run.accuracy)}"
        mark = ' <span class="badge">best</span>' if run.name in best else ""
        head = f"{escape(run.name)}{mark} <span class=note>{escape(note)}</span>"
        if key in drawn:
            place, name = drawn[key]
            same = f'<a href="#cells-{place}">{escape(name)}</a>'
            body = f'<p class="lead">The same cells as {same}.</p>'
        else:
            drawn[key] = (number, run.name)
            cells = _cells(run.genotype, number, run.name)
            body = f'<div class="cells" id="cells-{number}">{cells}</div>'
        unfolded = " open" if number_drawn <= _UNFOLDED or run.name in best else ""
        parts.append(
            f'<details class="run-cells"{unfolded}><summary>{head}</summary>{body}</details>'
        )
    return "".join(parts)


def _cells(genotype: Genotype, number: int, run: str) -> str:
    cells = (
        ("normal", genotype.normal, genotype.normal_concat),
        ("reduce", genotype.reduce, genotype.reduce_concat),
    )
    return "".join(
        _cell_figure(kind, tuple(cell), tuple(concat), number, run) for kind, cell, concat in cells
    )


# The page is written after every run; drawing is most of its time.
@functools.lru_cache(maxsize=512)
def _cell_figure(
    kind: str, cell: tuple[tuple[str, int], ...], concat: tuple[int, ...], number: int, run: str
) -> str:
    spoken = escape(f"{run}, {CELL_NAMES[kind]}: {sections.spoken_cell(cell)}")
    svg = cell_svg_inline(cell, concat, prefix=f"run{number}-{kind}", description=spoken)
    return (
        f'<figure class="card"><figcaption><h3>{CELL_NAMES[kind]}</h3></figcaption>'
        '<div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(run)}, {CELL_NAMES[kind]}, drawing">{svg}</div></figure>'
    )


def agreement_tables(summary: SweepSummary) -> str:
    """Returns, for each setting, what its runs have on every edge of both cells."""
    parts = []
    seeds = {run.name: run.seed for run in summary.runs}
    for setting in summary.settings:
        names = [
            run.name
            for run in summary.with_status("finished")
            if run.name in setting.runs and run.genotype is not None
        ]
        tables = [
            _agreement_table(kind, found, [f"seed {seeds[name]}" for name in names])
            for kind, found in setting.agreement.items()
            if found is not None
        ]
        if tables:
            name = setting_name(setting.setting)
            title = f'<h3 class="grid-title">{escape(name)}</h3>' if name else ""
            wide = " wide" if len(names) > _NARROW else ""
            parts.append(f'{title}<div class="agreements{wide}">{"".join(tables)}</div>')
    return "".join(parts)


def _agreement_table(kind: str, found: CellAgreement, runs: Sequence[str]) -> str:
    rows = []
    for edge in found.edges:
        common, times = Counter(edge.choices).most_common(1)[0]
        cells = "".join(
            f"<td>{_choice(op, times > 1 and op == common)}</td>" for op in edge.choices
        )
        rows.append(
            f'<tr><th scope="row">{state_name(edge.source)} → {edge.node}</th>'
            f"<td>{_meter(edge)}</td>{cells}</tr>"
        )
    note = (
        f"{whole_percent(found.shared)} of the operations shared by a pair of seeds, "
        f"{whole_percent(found.mean)} of the edges alike"
    )
    head = ["Edge", "Pairs alike", *runs]
    caption = f"{CELL_NAMES[kind]}, edge by edge"
    return (
        f'<figure class="card"><figcaption><h3>{CELL_NAMES[kind]}</h3>'
        f'<span class="note">{note}</span></figcaption>'
        f"{sections.table(caption, head, rows)}</figure>"
    )


def _choice(op: str | None, common: bool) -> str:
    if op is None:
        return '<span class="dropped">–</span>'
    strong = " common" if common else ""
    return (
        f'<span class="chip{strong}" style="--op:var({op_variable(op)})">'
        f"{escape(op_label(op))}</span>"
    )


def _meter(edge: EdgeAgreement) -> str:
    share = f"{100 * edge.agreement:.0f}%"
    return f'<span class="meter" style="--share:{share}"><i></i>{share}</span>'
