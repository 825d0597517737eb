"""The text, tables and drawings of a report as pieces of HTML; everything from files is escaped."""

import json
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from pdarts_fast.genotype import Genotype, count_skips, genotype_to_json
from pdarts_fast.run.charts import stacked_bar
from pdarts_fast.run.drawing import cell_svg_inline
from pdarts_fast.run.palette import op_label, op_variable
from pdarts_fast.run.report_charts import CELL_NAMES, state_name
from pdarts_fast.run.report_data import Record, RunData
from pdarts_fast.settings import flag

_MOST_CLASSES = 20
_STAGE_COLOURS = ("var(--series-1)", "var(--series-2)", "var(--series-3)", "var(--muted)")
NOTHING = "–"


def duration(seconds: float) -> str:
    """Writes a time for reading: ``3 h 12 min``, ``4 min 05 s`` or ``12.3 s``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def progress(data: RunData) -> str:
    """Says how far the search has come, for example ``stage 2 of 3, epoch 11 of 25``."""
    if not data.epochs:
        return "no epoch done yet"
    last = data.epochs[-1]
    planned = data.config.get("epochs")
    of_epochs = f" of {planned}" if isinstance(planned, int) else ""
    return f"stage {last['stage']} of {data.num_stages}, epoch {last['epoch'] + 1}{of_epochs}"


def tiles(data: RunData) -> str:
    """Returns the headline: data set, result, validation accuracy, time, backend, hardware."""
    return tile_list(
        [
            ("Data set", *dataset_tile(data)),
            ("Result", *_result_tile(data)),
            ("Validation accuracy", *_accuracy_tile(data)),
            ("Wall time", *_time_tile(data)),
            ("Backend", *_backend_tile(data)),
            ("Hardware", *hardware_tile(data)),
        ]
    )


def tile_list(entries: Iterable[tuple[str, str, str]]) -> str:
    """Returns headline tiles from (name, value, note)."""
    return "".join(
        f'<div class="tile"><dt>{escape(name)}</dt>'
        f"<dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in entries
    )


def dataset_name(data: RunData) -> str:
    """Returns the name of the data set of a run."""
    name = str(data.section("dataset").get("name") or data.config.get("dataset") or "unknown")
    return {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}.get(name, name)


def dataset_tile(data: RunData) -> tuple[str, str]:
    """Returns value and note of the data set's tile."""
    dataset = data.section("dataset")
    parts = []
    if isinstance(dataset.get("num_classes"), int):
        parts.append(f"{dataset['num_classes']} classes")
    if isinstance(dataset.get("train_images"), int):
        parts.append(f"{dataset['train_images']:,} training images")
    if dataset.get("image_size"):
        parts.append(f"{dataset['image_size']}×{dataset['image_size']} pixels")
    return dataset_name(data), ", ".join(parts)


def _result_tile(data: RunData) -> tuple[str, str]:
    if data.genotype is None:
        return "unfinished", progress(data)
    skips = count_skips(data.genotype.normal)
    limit = f" of at most {data.max_skips}" if data.max_skips is not None else ""
    nodes = len(data.genotype.normal) // 2
    return f"{nodes}-node cell", f"{skips}{limit} skips in the normal cell"


def _accuracy_tile(data: RunData) -> tuple[str, str]:
    for record in reversed(data.validations):
        if record.get("accuracy") is not None:
            place = f"supernet, stage {record['stage']}"
            if "epoch" in record:
                place += f", epoch {record['epoch'] + 1}"
            return f"{100 * record['accuracy']:.2f}%", place
    return NOTHING, "not measured yet"


def _time_tile(data: RunData) -> tuple[str, str]:
    return duration(data.seconds), epochs_note(data)


def epochs_note(data: RunData) -> str:
    """Says how many epochs there are, and what share of their time was not spent on steps."""
    count = len(data.epochs)
    note = f"{count} epoch{'' if count == 1 else 's'}"
    measured = [record for record in data.epochs if record.get("overhead_seconds") is not None]
    seconds = sum(record.get("seconds") or 0.0 for record in measured)
    if not seconds:
        return note
    share = sum(record["overhead_seconds"] for record in measured) / seconds
    return f"{note}, {100 * share:.1f}% of the time outside their steps"


def _backend_tile(data: RunData) -> tuple[str, str]:
    hardware = data.section("hardware")
    name = str(hardware.get("backend") or data.config.get("backend") or "unknown")
    precision = "mixed precision" if data.config.get("amp") else "float32"
    return name, precision


def hardware_tile(data: RunData) -> tuple[str, str]:
    """Returns value and note of the machine's tile."""
    hardware = data.section("hardware")
    cpu = str(hardware.get("cpu") or "unknown processor")
    details = []
    if hardware.get("gpu"):
        details.append(cpu)
    if hardware.get("cores"):
        details.append(f"{hardware['cores']} cores")
    if hardware.get("memory_gib"):
        details.append(f"{hardware['memory_gib']} GiB of memory")
    if hardware.get("ranks", 1) > 1:
        details.append(f"{hardware['ranks']} processes")
    return str(hardware.get("gpu") or cpu), ", ".join(details)


def cell_figures(genotype: Genotype) -> str:
    """Returns the drawings of both cells."""
    figures = []
    for kind, cell, concat in (
        ("normal", genotype.normal, genotype.normal_concat),
        ("reduce", genotype.reduce, genotype.reduce_concat),
    ):
        text = f"{CELL_NAMES[kind]}: {spoken_cell(cell)}"
        svg = cell_svg_inline(cell, concat, prefix=kind, description=escape(text))
        figures.append(
            f'<figure class="card"><figcaption><h3>{CELL_NAMES[kind]}</h3></figcaption>'
            '<div class="scroll" tabindex="0" role="region" '
            f'aria-label="{CELL_NAMES[kind]}, drawing">{svg}</div></figure>'
        )
    return "".join(figures)


def spoken_cell(cell: Sequence[tuple[str, int]]) -> str:
    """Describes a cell in words, for a screen reader."""
    nodes = []
    for node in range(len(cell) // 2):
        pair = cell[2 * node : 2 * node + 2]
        inputs = " and ".join(
            f"{op_label(op)} of {state_name(s, html=False) if s < 2 else f'node {s - 2}'}"
            for op, s in pair
        )
        nodes.append(f"node {node} adds {inputs}")
    return "; ".join(nodes) + "."


def genotype_python(genotype: Genotype) -> str:
    """Writes a genotype as a Python expression, a node a line."""
    fields = []
    for name in genotype._fields:
        value = getattr(genotype, name)
        if name.endswith("_concat"):
            fields.append(f"    {name}={list(value)!r},")
        else:
            pairs = [repr((op, source)) for op, source in value]
            rows = [", ".join(pairs[i : i + 2]) for i in range(0, len(pairs), 2)]
            fields.append(
                f"    {name}=[\n" + "".join(f"        {row},\n" for row in rows) + "    ],"
            )
    return "Genotype(\n" + "\n".join(fields) + "\n)"


def genotype_blocks(genotype: Genotype) -> str:
    """Returns the genotype as Python text and as JSON, each with a copy button."""
    return copy_block("Python", genotype_python(genotype), "genotype-python") + copy_block(
        "JSON", genotype_to_json(genotype), "genotype-json"
    )


def copy_block(title: str, text: str, name: str, *, wrap: bool = False) -> str:
    """Returns preformatted text under a title, with a button that copies it.

    Args:
        title: heading (plain text).
        text: what is shown and copied (plain text).
        name: id of the text on the page.
        wrap: break long lines instead of scrolling sideways.
    """
    return (
        f'<div class="code"><div class="code-head"><h3>{escape(title)}</h3>'
        f'<button type="button" class="copy" data-copy="{name}" hidden>Copy'
        f'<span class="unseen"> {escape(title)}</span></button></div>'
        f'<pre id="{name}" tabindex="0"{" class=wrap" if wrap else ""}>'
        f"<code>{escape(text)}</code></pre></div>"
    )


def restricted_table(data: RunData) -> str:
    """Returns the normal cell for every number of skips allowed, changes marked."""
    nodes = max(len(genotype.normal) for genotype in data.restricted.values()) // 2
    head = ["Skips allowed", "Skips", *(f"Node {node}" for node in range(nodes))]
    rows = []
    before: Genotype | None = None
    for count, genotype in data.restricted.items():
        result = count == data.max_skips
        note = ' <span class="badge">result</span>' if result else ""
        cells = [
            f'<th scope="row">{count}{note}</th>',
            f'<td class="number">{count_skips(genotype.normal)}</td>',
        ]
        for node in range(nodes):
            pair = genotype.normal[2 * node : 2 * node + 2]
            old = before.normal[2 * node : 2 * node + 2] if before else pair
            changed = ' class="changed"' if old != pair else ""
            cells.append(
                f"<td{changed}>{'<br>'.join(chip(op, source) for op, source in pair)}</td>"
            )
        rows.append(f"<tr{' class=result' if result else ''}>{''.join(cells)}</tr>")
        before = genotype
    return table("Normal cell for every number of skips allowed", head, rows)


def chip(op: str, source: int) -> str:
    """Returns an operation in its colour, with the state that it reads."""
    return (
        f'<span class="chip" style="--op:var({op_variable(op)})">{escape(op_label(op))}</span> '
        f'<span class="from">{state_name(source)}</span>'
    )


def stage_bar(data: RunData) -> str:
    """Returns the share of each stage in the time as one bar."""
    stages = [s for s in range(1, data.num_stages + 1) if data.stage_seconds(s) > 0]
    total = sum(data.stage_seconds(stage) for stage in stages)
    parts = []
    for stage in stages:
        seconds = data.stage_seconds(stage)
        colour = _STAGE_COLOURS[min(stage, len(_STAGE_COLOURS)) - 1]
        text = f"stage {stage}: {duration(seconds)}, {100 * seconds / total:.0f}%"
        parts.append((text, seconds, colour))
    if not parts:
        return ""
    keys = "".join(
        f'<li><i class="swatch" style="background:{colour}"></i>{escape(text)}</li>'
        for text, _, colour in parts
    )
    described = "Time per stage; " + "; ".join(text for text, _, _ in parts)
    return (
        f'<figure class="card"><figcaption><h3>Share of the time</h3></figcaption>'
        f'<ul class="legend">{keys}</ul>{stacked_bar(parts, described)}</figure>'
    )


def stage_table(data: RunData) -> str:
    """Returns one row for each stage: network, epochs, accuracy, speed, memory and time."""
    head = [
        "Stage", "Cells", "Ops per edge", "Channels", "Parameters", "Epochs",
        "Validation accuracy", "Images per second", "Peak memory", "Time",
    ]  # fmt: skip
    rows = []
    for stage in range(1, data.num_stages + 1):
        record = data.stages.get(stage, {})
        epochs = [r for r in data.epochs if r["stage"] == stage]
        accuracy = [r.get("accuracy") for r in data.validations if r["stage"] == stage]
        speeds = [r["images_per_second"] for r in epochs if r.get("images_per_second")]
        memory = [r["peak_memory_mib"] for r in epochs if r.get("peak_memory_mib")]
        seconds = data.stage_seconds(stage)
        cells = [
            _planned(data, record, stage, "cells", "cells"),
            _planned(data, record, stage, "ops", "ops_kept"),
            _planned(data, record, stage, "channels", "channels"),
            f"{record['parameters']:,}" if record.get("parameters") else NOTHING,
            f"{len(epochs)}" if stage in data.stages else f"{len(epochs)} so far",
            f"{100 * accuracy[-1]:.2f}%" if accuracy and accuracy[-1] is not None else NOTHING,
            f"{statistics.median(speeds):,.1f}" if speeds else NOTHING,
            f"{max(memory):,.0f} MiB" if memory else NOTHING,
            duration(seconds) if seconds else NOTHING,
        ]
        values = "".join(f'<td class="number">{escape(str(cell))}</td>' for cell in cells)
        rows.append(f'<tr><th scope="row">{stage}</th>{values}</tr>')
    return table("Stages of the search", head, rows, numbers=True)


def _planned(data: RunData, record: Record, stage: int, key: str, setting: str) -> Any:
    """Returns what a stage had, or will have by the configuration."""
    if record.get(key) is not None:
        return record[key]
    values = data.config.get(setting)
    if isinstance(values, list) and len(values) >= stage:
        return values[stage - 1]
    return NOTHING


def configuration(data: RunData) -> str:
    """Returns the tables of settings, versions, hardware and data set."""
    git = data.section("git")
    origin: Record = dict(data.section("versions"))
    if git:
        origin["git commit"] = f"{git.get('commit')}{' (with changes)' if git.get('dirty') else ''}"
    dataset = dict(data.section("dataset"))
    classes = dataset.get("classes")
    if isinstance(classes, list):
        more = len(classes) - _MOST_CLASSES
        shown = ", ".join(str(name) for name in classes[:_MOST_CLASSES])
        dataset["classes"] = shown + (f" and {more} more" if more > 0 else "")
    tables = (
        ("Settings", {flag(name): value for name, value in data.config.items()}),
        ("Versions", origin),
        ("Hardware", data.section("hardware")),
        ("Data set", dataset),
    )
    return "".join(
        f'<div class="card">{_pairs(title, values)}</div>' for title, values in tables if values
    )


def _pairs(title: str, values: Record) -> str:
    rows = [
        f'<tr><th scope="row">{escape(str(key))}</th><td>{escape(_written(value))}</td></tr>'
        for key, value in values.items()
    ]
    return table(title, ["Name", "Value"], rows, shown_caption=True)


def _written(value: Any) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_written(one) for one in value)
    if isinstance(value, dict):
        return json.dumps(value)
    return str(value)


def table(
    caption: str,
    head: Sequence[str],
    rows: Iterable[str],
    *,
    numbers: bool = False,
    shown_caption: bool = False,
) -> str:
    """Returns a table in a box that scrolls sideways where it is too wide for the screen."""
    columns = "".join(
        f'<th scope="col"{" class=number" if numbers and place else ""}>{escape(name)}</th>'
        for place, name in enumerate(head)
    )
    unseen = "" if shown_caption else ' class="unseen"'
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table><caption{unseen}>{escape(caption)}</caption><thead><tr>{columns}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
