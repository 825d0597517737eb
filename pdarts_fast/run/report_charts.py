"""The charts of a report, from a run's records."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from html import escape

import numpy as np

from pdarts_fast.run.charts import Frame, Series, legend, line_chart, small_frame
from pdarts_fast.run.palette import OP_STYLES, op_label, op_style, op_variable
from pdarts_fast.run.report_data import Record, RunData
from pdarts_fast.search_space import edges, num_nodes, probabilities

CELL_NAMES = {"normal": "Normal cell", "reduce": "Reduction cell"}


def percent(value: float) -> str:
    """Writes a share of 0..1 as a percentage without decimals."""
    return f"{100 * value:.0f}%"


def curve_figures(data: RunData) -> str:
    """Returns the figures of loss, accuracy, entropy and schedules over the epochs."""
    frame = epoch_frame(data)
    epochs, validations = data.epochs, data.validations

    def of(records: Sequence[Record], key: str) -> list[list[tuple[float, float | None]]]:
        return segments(data, records, lambda record: record.get(key))

    train, alpha, valid = "var(--series-1)", "var(--series-2)", "var(--series-3)"
    figures = [
        figure(
            "Loss", "cross-entropy in nats",
            [
                Series("weight half", train, of(epochs, "train_loss")),
                Series("alpha half", alpha, of(epochs, "alpha_loss"), "5 2.5"),
                Series("validation", valid, of(validations, "loss"), markers=True),
            ],
            frame,
        ),
        figure(
            "Accuracy", "share of images classified correctly",
            [
                Series("weight half", train, of(epochs, "train_accuracy")),
                Series("alpha half", alpha, of(epochs, "alpha_accuracy"), "5 2.5"),
                Series("validation", valid, of(validations, "accuracy"), markers=True),
            ],
            replace(frame, y_format=percent),
        ),
        figure(
            "Alpha entropy", "mean over the edges, in nats",
            [
                Series("normal cell", train, of(epochs, "entropy_normal")),
                Series("reduction cell", alpha, of(epochs, "entropy_reduce"), "5 2.5"),
            ],
            frame,
        ),
        figure(
            "Learning rate", "of the weights",
            [Series("learning rate", train, of(epochs, "lr"))],
            frame,
        ),
        figure(
            "Skip dropout", "probability after identity skips",
            [Series("skip dropout", train, of(epochs, "dropout"))],
            frame,
        ),
        figure(
            "Throughput", "training images per second",
            [Series("images per second", train, of(epochs, "images_per_second"))],
            frame,
        ),
    ]  # fmt: skip
    return "".join(figures)


def alpha_figures(data: RunData, kind: str) -> str:
    """Returns one small chart per edge of a cell type: probability of every operation by epoch.

    Args:
        data: the run; it must have alphas.
        kind: ``"normal"`` or ``"reduce"``.
    """
    shares = [
        {"stage": line["stage"], "epoch": line["epoch"], "edges": _edge_shares(line, kind)}
        for line in data.alphas
    ]
    finite = [
        p for line in shares for edge in line["edges"] for p in edge.values() if math.isfinite(p)
    ]
    highest = max(finite, default=1.0)
    wide = epoch_frame(data)
    frame = small_frame(
        wide.x_range,
        (0.0, min(1.0, max(highest * 1.05, 0.25))),
        [(x, "") for x, _ in wide.dividers],
    )
    frame = replace(frame, y_format=percent)
    chosen = _chosen(data, kind)
    panels = []
    for edge, (node, source) in enumerate(edges(num_nodes(len(data.alphas[0][kind])))):
        names = _ops_in_order(line["edges"][edge] for line in shares)
        series = [_share_series(data, shares, edge, op) for op in names]
        last = shares[-1]["edges"][edge]
        panels.append(
            _panel(
                edge,
                (source, node),
                line_chart(series, frame, _panel_text(kind, edge, (source, node), last)),
                chosen.get((source, node)),
                finished=data.genotype is not None,
            )
        )
    return "".join(panels)


def _share_series(data: RunData, shares: Sequence[Record], edge: int, op: str) -> Series:
    runs = segments(data, shares, lambda line: line["edges"][edge].get(op))
    return Series(op_label(op), f"var({op_variable(op)})", runs, op_style(op).dash, key=op)


def alpha_legend(data: RunData) -> str:
    """Returns the legend of all alpha charts: the operations that occur, as buttons."""
    names = _ops_in_order(
        dict.fromkeys(ops, 0.0)
        for line in data.alphas
        for kind in CELL_NAMES
        for ops in line["ops"][kind]
    )
    series = [
        Series(op_label(op), f"var({op_variable(op)})", [], op_style(op).dash, key=op)
        for op in names
    ]
    return legend(series, buttons=True)


def state_name(state: int, *, html: bool = True) -> str:
    """Returns the name of a state: a cell input or a node's number."""
    if state >= 2:
        return str(state - 2)
    text = f"k−{2 - state}"
    return f"c<sub>{text}</sub>" if html else f"c_{text}"


def epoch_frame(data: RunData) -> Frame:
    """Returns a frame over all epochs, planned ones included, with a rule before each stage."""
    records = [*data.epochs, *data.alphas]
    last = max((data.offset(r["stage"]) + r["epoch"] + 1 for r in records), default=1)
    planned = data.config.get("epochs")
    if isinstance(planned, int):
        last = max(last, planned * data.num_stages)
    stages = sorted({record["stage"] for record in records})
    dividers = [(data.offset(stage) + 0.5, f"stage {stage}") for stage in stages]
    return Frame(x_range=(1, last), dividers=dividers)


def segments(
    data: RunData, records: Sequence[Record], value: Callable[[Record], float | None]
) -> list[list[tuple[float, float | None]]]:
    """Returns (epoch from 1 over all stages, value), a run for each stage: stages start afresh."""
    runs: dict[int, list[tuple[float, float | None]]] = {}
    for record in records:
        x = data.offset(record["stage"]) + record["epoch"] + 1
        runs.setdefault(record["stage"], []).append((x, value(record)))
    return list(runs.values())


def figure(title: str, note: str, series: list[Series], frame: Frame) -> str:
    """Returns a chart with its title, note and legend; empty if no series has a value."""
    shown = [one for one in series if any(y is not None for run in one.segments for _, y in run)]
    if not shown:
        return ""
    ends = []
    for one in shown:
        values = [y for run in one.segments for _, y in run if y is not None]
        ends.append(f"{one.label} ends at {frame.y_format(values[-1])}")
    text = f"{title} over epochs: {'; '.join(ends)}."
    keys = legend(shown) if len(shown) > 1 else ""
    return (
        f'<figure class="card"><figcaption><h3>{escape(title)}</h3><span class="note">'
        f"{escape(note)}</span></figcaption>{keys}{line_chart(shown, frame, text)}"
        '<p class="x-label">epoch</p></figure>'
    )


def _panel(
    edge: int, ends: tuple[int, int], chart: str, chosen: str | None, *, finished: bool
) -> str:
    source, node = ends
    if chosen is not None:
        colour = f"--op:var({op_variable(chosen)})"
        mark = f'<b class="chosen" style="{colour}">{escape(op_label(chosen))}</b>'
    else:
        mark = '<span class="dropped">not used</span>' if finished else ""
    return (
        f'<figure class="panel{" kept" if chosen else ""}"><figcaption>'
        f"<span>{state_name(source)} → {node}</span>"
        f'<span class="edge">edge {edge}</span>{mark}</figcaption>{chart}</figure>'
    )


def _panel_text(kind: str, edge: int, ends: tuple[int, int], last: dict[str, float]) -> str:
    leaders = sorted(last.items(), key=lambda item: -item[1])[:3]
    if not all(math.isfinite(p) for _, p in leaders):
        leaders = []
    shares = ", ".join(f"{op_label(op)} {100 * p:.1f}%" for op, p in leaders) or "not finite"
    source = state_name(ends[0], html=False)
    return (
        f"{CELL_NAMES[kind]}, edge {edge} from {source} to node {ends[1]}: probability of each "
        f"operation over epochs; at the last one {shares}."
    )


def _chosen(data: RunData, kind: str) -> dict[tuple[int, int], str]:
    """Returns the operation of each edge (source, node) that the result uses."""
    if data.genotype is None:
        return {}
    cell = data.genotype.normal if kind == "normal" else data.genotype.reduce
    return {(source, place // 2): op for place, (op, source) in enumerate(cell)}


def _edge_shares(line: Record, kind: str) -> list[dict[str, float]]:
    """Returns the probability of each live operation per edge; NaN where alphas are not finite."""
    table = probabilities(np.array(line[kind], dtype=np.float64)).tolist()
    return [
        dict(zip(ops, row, strict=True)) for ops, row in zip(line["ops"][kind], table, strict=True)
    ]


def _ops_in_order(tables: Iterable[dict[str, float]]) -> list[str]:
    found = {op for table in tables for op in table}
    return [op for op in OP_STYLES if op in found] + sorted(found - set(OP_STYLES))
