"""Charts that compare runs: their values on one axis, setting by setting, and accuracy by size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from pdarts_fast.run.charts import Frame, Series, legend, line_chart, nice_ticks
from pdarts_fast.sweep.statistics import Spread

COLOURS = (
    "var(--series-1)",
    "var(--series-2)",
    "var(--series-3)",
    "var(--op-conv_7x1_1x7)",
    "var(--op-skip_connect)",
    "var(--op-avg_pool_3x3)",
)
_ROW_HEIGHT = 30


@dataclass(frozen=True)
class Dots:
    """One row of a dot chart.

    Attributes:
        label: What the row is (plain text).
        points: (name of a run, its value).
        spread: Mean and deviation of the values.
    """

    label: str
    points: Sequence[tuple[str, float]]
    spread: Spread


def setting_colour(number: int, settings: int) -> str:
    """Colour of the setting of a number, from 0; one for all if there are too many to tell."""
    return COLOURS[number] if settings <= len(COLOURS) else COLOURS[0]


def dot_chart(
    title: str, note: str, rows: Sequence[Dots], write: Callable[[float], str], best: str | None
) -> str:
    """Draws a row a setting: a dot a run, the mean as a rule, mean ± deviation as a band.

    Args:
        title: Heading (plain text).
        note: What the values are (plain text).
        rows: The settings; an empty text is returned if none has a value.
        write: Writes a value.
        best: Name of the run whose dot is marked.
    """
    values = [value for row in rows for _, value in row.points]
    if not values:
        return ""
    low, high = _axis_range(values, rows)
    drawn = []
    for number, row in enumerate(rows):
        if not row.points:
            continue
        colour = setting_colour(number, len(rows))
        text = spread_text(row.spread, write)
        strip = _strip(row, colour, low, high, write, best)
        label = f"<span>{escape(row.label)}</span>" if row.label else ""
        drawn.append(
            f'<div class="strip">{label}<output>{escape(text)}</output>'
            f'<svg class="dots-row" width="100%" height="{_ROW_HEIGHT}" role="img" '
            f'aria-label="{escape(f"{row.label} {title}: {text}".strip())}">{strip}</svg></div>'
        )
    return (
        f'<figure class="card"><figcaption><h3>{escape(title)}</h3>'
        f'<span class="note">{escape(note)}</span></figcaption>{"".join(drawn)}'
        f"{_axis(low, high, write)}</figure>"
    )


def spread_text(spread: Spread, write: Callable[[float], str]) -> str:
    """Writes ``mean ± deviation``, or the one value there is."""
    if spread.mean is None:
        return "–"
    if spread.deviation is None:
        return write(spread.mean)
    return f"{write(spread.mean)} ± {write(spread.deviation)}"


def size_chart(groups: Sequence[tuple[str, Sequence[tuple[str, float, float]]]], note: str) -> str:
    """Draws accuracy over parameters, a dot a run.

    Args:
        groups: (label of a setting, its runs as (name, parameters, accuracy from 0 to 1)).
        note: What the accuracy is (plain text).

    Returns:
        A figure; an empty text below two runs.
    """
    points = [point for _, runs in groups for point in runs]
    if len(points) < 2:
        return ""
    sizes = [size for _, size, _ in points]
    unit, name = (1e3, "thousand parameters") if max(sizes) >= 1e4 else (1.0, "parameters")
    space = max(0.08 * (max(sizes) - min(sizes)), 0.01 * max(sizes))
    frame = Frame(
        x_range=((min(sizes) - space) / unit, (max(sizes) + space) / unit),
        y_format=lambda share: f"{100 * share:.4g}%",
        x_ticks=5,
    )
    series = [
        Series(
            label or "runs",
            setting_colour(number, len(groups)),
            [[(size / unit, accuracy)] for _, size, accuracy in runs],
            markers=True,
        )
        for number, (label, runs) in enumerate(groups)
    ]
    text = f"Accuracy by size of {len(points)} runs: " + "; ".join(
        f"{run}: {size:,.0f} parameters, {100 * accuracy:.2f}%" for run, size, accuracy in points
    )
    several = 1 < len(groups) <= len(COLOURS)
    return (
        '<figure class="card scatter"><figcaption><h3>Accuracy by size</h3>'
        f'<span class="note">{escape(note)}</span></figcaption>'
        f"{legend(series) if several else ''}{line_chart(series, frame, text)}"
        f'<p class="x-label">{name}</p></figure>'
    )


def _axis_range(values: Sequence[float], rows: Sequence[Dots]) -> tuple[float, float]:
    """Lowest and highest value drawn, bands included, with some space."""
    ends = list(values)
    for row in rows:
        if row.spread.mean is not None and row.spread.deviation is not None:
            ends += [
                row.spread.mean - row.spread.deviation,
                row.spread.mean + row.spread.deviation,
            ]
    low, high = min(ends), max(ends)
    space = 0.06 * (high - low) or 0.02 * abs(high) or 1.0
    return low - space, high + space


def _strip(
    row: Dots,
    colour: str,
    low: float,
    high: float,
    write: Callable[[float], str],
    best: str | None,
) -> str:
    def place(value: float) -> float:
        return 100 * (value - low) / (high - low)

    middle = _ROW_HEIGHT / 2
    parts = [f'<line class="base" x1="0" x2="100%" y1="{middle}" y2="{middle}"/>']
    mean, deviation = row.spread.mean, row.spread.deviation
    if mean is not None and deviation is not None:
        left, width = place(mean - deviation), 100 * 2 * deviation / (high - low)
        parts.append(
            f'<rect x="{left:.2f}%" y="{middle - 6}" width="{width:.2f}%" height="12" rx="3" '
            f'style="fill:{colour}" opacity=".2"/>'
            f'<line x1="{place(mean):.2f}%" x2="{place(mean):.2f}%" y1="{middle - 11}" '
            f'y2="{middle + 11}" style="stroke:{colour}" stroke-width="2"/>'
        )
    for name, value in row.points:
        mark = " (best)" if name == best else ""
        ring = ' class="best"' if name == best else ""
        parts.append(
            f'<circle{ring} cx="{place(value):.2f}%" cy="{middle}" r="5" style="fill:{colour}">'
            f"<title>{escape(f'{name}: {write(value)}{mark}')}</title></circle>"
        )
    return "".join(parts)


def _axis(low: float, high: float, write: Callable[[float], str]) -> str:
    texts = "".join(
        f'<text x="{100 * (tick - low) / (high - low):.2f}%" y="13" text-anchor="middle">'
        f"{escape(write(tick))}</text>"
        for tick in nice_ticks(low, high, 4)
        if 0.04 < (tick - low) / (high - low) < 0.96
    )
    return f'<svg class="dots-axis" width="100%" height="16" aria-hidden="true">{texts}</svg>'
