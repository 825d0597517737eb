"""Writes the report of a training run, from its run directory; pages look like a search's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from pdarts_fast.errors import UsageError
from pdarts_fast.genotype import GENOTYPE_FILE, load_genotype
from pdarts_fast.run import report_sections as sections
from pdarts_fast.run.charts import Frame, Series
from pdarts_fast.run.files import write_atomically
from pdarts_fast.run.report import REPORT_FILE, configuration, page, section, write_report
from pdarts_fast.run.report_charts import figure, percent, segments
from pdarts_fast.run.report_data import Record, RunData, in_order, read_json, read_lines

KIND = "train"
"""What config.json of a training run says it is."""


def write_run_report(run_dir: Path) -> Path:
    """Writes ``report.html`` of a search or of a training run, whichever `run_dir` holds."""
    file = run_dir / "config.json"
    if file.is_file() and read_json(file).get("kind") == KIND:
        return write_train_report(run_dir)
    return write_report(run_dir)


def write_train_report(run_dir: Path) -> Path:
    """Writes ``report.html`` into the directory of a training run, also of one in progress.

    Returns:
        The report.

    Raises:
        UsageError: `run_dir` holds no training run.
        RunError: a file of the run is damaged, or the report cannot be written.
    """
    path = run_dir / REPORT_FILE
    write_atomically(path, render(read_training(run_dir)).encode("utf-8"))
    return path


def read_training(run_dir: Path) -> RunData:
    """Reads the directory of a training run; the whole run counts as stage 1.

    Raises:
        UsageError: `run_dir` holds no training run.
        RunError: a file is damaged; the message names the file and the line.
    """
    if not (run_dir / "config.json").is_file():
        raise UsageError(f"{run_dir}: no config.json in it; wanted the folder of a training run")
    data = RunData(run_dir, read_json(run_dir / "config.json"))
    lines, data.incomplete_lines = read_lines(run_dir / "metrics.jsonl", ("kind", "epoch"))
    records = [record | {"stage": 1} for record in lines]
    data.epochs = in_order(records, "epoch")
    data.validations = in_order(records, "validation")
    if (run_dir / GENOTYPE_FILE).is_file():
        data.genotype = load_genotype(run_dir)
    return data


def render(data: RunData) -> str:
    """Returns the report of a training run as HTML."""
    finished = len(data.epochs) == data.config.get("epochs")
    main = []
    if data.genotype is not None:
        body = f'<div class="cells">{sections.cell_figures(data.genotype)}</div>'
        body += f'<div class="pair">{sections.genotype_blocks(data.genotype)}</div>'
        main.append(section("cells", "Cells", body))
    main.append(section("curves", "Training curves", _curves(data)))
    main.append(section("configuration", "Configuration", configuration(data)))
    return page(
        data,
        title=f"Training on {sections.dataset_name(data)}",
        finished=finished,
        notice=_notice(data, finished),
        tiles=_tiles(data),
        links=[
            *([("cells", "Cells")] if data.genotype is not None else []),
            ("curves", "Curves"),
            ("configuration", "Configuration"),
        ],
        main="\n".join(main),
    )


def best_validation(data: RunData) -> Record | None:
    """Returns the first validation record of the highest accuracy."""
    known = [record for record in data.validations if record.get("accuracy") is not None]
    return max(known, key=lambda record: record["accuracy"], default=None)


def _notice(data: RunData, finished: bool) -> str:
    notes = []
    if not finished:
        notes.append(
            f"The training is unfinished: {len(data.epochs)} of {data.config.get('epochs')} "
            "epochs. This page shows what there is so far; make it again later for more."
        )
    if data.incomplete_lines:
        notes.append("The last line of a log was cut off and is left out.")
    return "".join(f'<p class="notice" role="status">{escape(note)}</p>' for note in notes)


def _tiles(data: RunData) -> str:
    return sections.tile_list(
        [
            ("Data set", *sections.dataset_tile(data)),
            ("Network", *_network_tile(data)),
            ("Test accuracy", *_accuracy_tile(data)),
            ("Test error", *_error_tile(data)),
            ("Wall time", *_time_tile(data)),
            ("Hardware", *sections.hardware_tile(data)),
        ]
    )


def _network_tile(data: RunData) -> tuple[str, str]:
    network = data.section("network")
    size = f"{data.config.get('cells')} cells, {data.config.get('channels')} channels"
    parts = []
    if isinstance(network.get("parameters"), int):
        parts.append(f"{network['parameters']:,} parameters")
    if isinstance(network.get("multiply_adds"), int):
        parts.append(f"{network['multiply_adds'] / 1e6:,.1f} M multiply-adds")
    return size, ", ".join(parts)


def _accuracy_tile(data: RunData) -> tuple[str, str]:
    if not data.validations or data.validations[-1].get("accuracy") is None:
        return sections.NOTHING, "not measured yet"
    last, best = data.validations[-1], best_validation(data)
    assert best is not None
    return (
        f"{100 * last['accuracy']:.2f}%",
        f"epoch {last['epoch'] + 1}; best {100 * best['accuracy']:.2f}%, epoch {best['epoch'] + 1}",
    )


def _error_tile(data: RunData) -> tuple[str, str]:
    last: Record = data.validations[-1] if data.validations else {}
    if last.get("accuracy") is None or last.get("top5_accuracy") is None:
        return sections.NOTHING, "not measured yet"
    return (
        f"{100 * (1 - last['accuracy']):.2f}%",
        f"top-5 {100 * (1 - last['top5_accuracy']):.2f}%, over {last['images']:,} images",
    )


def _time_tile(data: RunData) -> tuple[str, str]:
    evaluations = sum(record.get("seconds") or 0.0 for record in data.validations)
    return sections.duration(data.seconds + evaluations), sections.epochs_note(data)


def _curves(data: RunData) -> str:
    epochs, validations = data.epochs, data.validations
    if not epochs:
        return '<p class="lead">No epoch is complete yet.</p>'
    best = best_validation(data)
    planned = data.config.get("epochs")
    last = max(len(epochs), planned if isinstance(planned, int) else 1)
    frame = Frame(
        x_range=(1, last), dividers=[(best["epoch"] + 1, "best")] if best is not None else []
    )

    def of(records: Sequence[Record], key: str) -> list[list[tuple[float, float | None]]]:
        return segments(data, records, lambda record: record.get(key))

    def line(label: str, number: int, records: Sequence[Record], key: str, **style: Any) -> Series:
        return Series(label, f"var(--series-{number})", of(records, key), **style)

    shares = replace(frame, y_format=percent)
    figures = [
        figure(
            "Loss",
            "in nats; of training, that of the auxiliary head too"
            if data.config.get("auxiliary")
            else "cross-entropy in nats",
            [
                line("training", 1, epochs, "train_loss"),
                line("test", 3, validations, "loss", dash="5 2.5"),
            ],
            frame,
        ),
        figure(
            "Accuracy",
            "share of images classified correctly",
            [
                line("training", 1, epochs, "train_accuracy"),
                line("test", 3, validations, "accuracy", dash="5 2.5"),
                line("test, top 5", 2, validations, "top5_accuracy", dash="2 2"),
            ],
            shares,
        ),
        figure("Learning rate", "", [line("learning rate", 1, epochs, "lr")], frame),
        figure(
            "Drop-path",
            "probability that an operation's output is dropped",
            [line("drop-path", 1, epochs, "drop_path")],
            frame,
        ),
        figure(
            "Throughput",
            "training images per second",
            [line("images per second", 1, epochs, "images_per_second")],
            frame,
        ),
    ]
    return f'<div class="charts">{"".join(figures)}</div>'
