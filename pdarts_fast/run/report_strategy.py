"""What a report shows of strategies: costs and targets, added operations, decisions."""

from collections.abc import Sequence
from dataclasses import replace
from html import escape

from pdarts_fast.run.charts import Series
from pdarts_fast.run.palette import op_label
from pdarts_fast.run.report_charts import CELL_NAMES, epoch_frame, figure, segments, state_name
from pdarts_fast.run.report_data import Record, RunData
from pdarts_fast.run.report_sections import NOTHING, table
from pdarts_fast.search_space import edges
from pdarts_fast.strategies.targets import parse_targets, show

RESOURCE_NAMES = {
    "params": "Parameters",
    "macs": "Multiply-adds",
    "memory": "Activation memory of an image",
    "latency": "Latency of an image",
}


def strategy_sections(data: RunData) -> list[tuple[str, str, str]]:
    """Returns (id, title, HTML) of every section that the run has something for."""
    found = [
        ("costs", "Costs and targets", _costs(data)),
        ("additions", "Added operations", _additions(data)),
        ("decisions", "Selection by perturbation", _decisions(data)),
    ]
    return [one for one in found if one[2]]


def _costs(data: RunData) -> str:
    targets = data.config.get("target")
    if not isinstance(targets, list) or not targets:
        return ""
    note = (
        "Expected cost of the alphas, cost of the cell they would give (epoch by epoch), and the "
        "target. While the gate is open, the alpha loss holds the expected cost: it is open when "
        "the cell of the moment exceeds the target."
    )
    figures, rows = [], []
    for target in parse_targets(targets):
        name = target.resource
        figures.append(_cost_figure(data, name, target.limit))
        derived = _number(data.result.get("costs"), name)
        last = data.costs[-1] if data.costs else {}
        cells = [
            show(name, target.limit),
            _shown(name, last.get(f"expected_{name}")),
            _shown(name, last.get(f"derived_{name}")),
            f"{sum(bool(record.get(f'gate_{name}')) for record in data.costs)} of "
            f"{len(data.costs)} epochs",
            _shown(name, derived),
        ]
        rows.append(_row(RESOURCE_NAMES[name], cells, numbers=True))
    head = ["Resource", "Target", "Expected at the end", "By the alphas", "Gate open", "Result"]
    body = f'<p class="lead">{note}</p><div class="charts">{"".join(figures)}</div>'
    body += f'<div class="card">{table("Costs and targets", head, rows, numbers=True)}</div>'
    return body + _repairs(data.result.get("repairs"), "Operations swapped to meet the targets")


def _cost_figure(data: RunData, name: str, limit: float) -> str:
    def of(key: str) -> list[list[tuple[float, float | None]]]:
        return segments(data, data.costs, lambda record: record.get(f"{key}_{name}"))

    lines = [
        Series("expected", "var(--series-1)", of("expected")),
        Series("derived", "var(--series-2)", of("derived"), "5 2.5"),
        Series("target", "var(--series-3)", segments(data, data.costs, lambda record: limit)),
    ]
    frame = replace(epoch_frame(data), y_format=lambda value: show(name, value))
    return figure(RESOURCE_NAMES[name], "of the derived network", lines, frame)


def _repairs(swaps: object, caption: str) -> str:
    if not isinstance(swaps, list) or not swaps:
        return ""
    rows = [
        _row(
            f"{CELL_NAMES.get(str(swap.get('cell')), swap.get('cell'))}, node {swap.get('node')}",
            [
                state_name(int(swap.get("source", 0)), html=False),
                op_label(str(swap.get("before"))),
                op_label(str(swap.get("after"))),
                f"{swap['loss']:.3f}" if isinstance(swap.get("loss"), (int, float)) else NOTHING,
            ],
        )
        for swap in swaps
    ]
    head = ["Place", "From", "By the search", "Result", "Log-probability lost"]
    return f'<div class="card">{table(caption, head, rows, shown_caption=True)}</div>'


def _additions(data: RunData) -> str:
    if not data.operations:
        return ""
    note = (
        "Operations in the order in which the supernet got them: of those that remain, the one "
        "with which the supernet loses most on the weight half (without training) comes next. "
        "The loss of every trial stands behind its name."
    )
    rows = []
    for record in data.operations:
        losses = record.get("losses") or {}
        trials = ", ".join(f"{op_label(name)} {loss:.4f}" for name, loss in losses.items())
        rows.append(
            _row(
                str(record.get("number", NOTHING)),
                [
                    f"epoch {record['epoch'] + 1}",
                    op_label(str(record.get("operation"))),
                    trials or "without a trial",
                ],
            )
        )
    head = ["Number", "Added before", "Operation", "Trials"]
    return (
        f'<p class="lead">{note}</p><div class="card">{table("Added operations", head, rows)}</div>'
    )


def _decisions(data: RunData) -> str:
    selection = data.result.get("selection")
    if not isinstance(selection, dict):
        return ""
    note = (
        "Validation accuracy of the supernet without each candidate: the one whose removal costs "
        "most stays. Later rows were decided with what earlier rows had left, after tuning."
    )
    rows = [_decision(decision) for decision in selection.get("decisions", [])]
    head = ["Cell", "Decision", "Accuracy without", "Stays"]
    body = f'<p class="lead">{note}</p><div class="card">{table("Decisions", head, rows)}</div>'
    return body + _repairs(selection.get("skip_swaps"), "Skips replaced to keep to --max-skips")


def _decision(decision: Record) -> str:
    question = decision["question"]
    if question["kind"] == "operation":
        node, source = edges()[question["place"]]
        asked = f"operation {state_name(source, html=False)} → {node}"
        names = {name: op_label(name) for name in decision["scores"]}
    else:
        asked = f"edges into node {question['place']}"
        names = {name: state_name(edges()[int(name)][1], html=False) for name in decision["scores"]}
    scores = ", ".join(
        f"{names[name]} {100 * score['accuracy']:.2f}%"
        for name, score in decision["scores"].items()
    )
    chosen = ", ".join(names[name] for name in decision["chosen"])
    return _row(CELL_NAMES.get(question["cell"], question["cell"]), [asked, scores, chosen])


def _row(name: str, cells: Sequence[str], *, numbers: bool = False) -> str:
    mark = " class=number" if numbers else ""
    values = "".join(f"<td{mark}>{escape(str(cell))}</td>" for cell in cells)
    return f'<tr><th scope="row">{escape(name)}</th>{values}</tr>'


def _number(values: object, name: str) -> float | None:
    return values.get(name) if isinstance(values, dict) else None


def _shown(resource: str, value: float | None) -> str:
    return NOTHING if value is None else show(resource, value)
