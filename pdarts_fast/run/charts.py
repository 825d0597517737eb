"""Line charts as small SVG documents for HTML pages, coloured by CSS variables.

Written directly: a report has dozens of charts, and one matplotlib axes each would take longer than
all the rest of the report.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        label: what it shows; becomes its tooltip.
        colour: a CSS colour, usually ``var(--...)``.
        segments: runs of (x, y) points; no line joins two runs or crosses a y of None.
        dash: SVG ``stroke-dasharray``, empty for a solid line.
        key: value of the line's ``data-op`` attribute, for highlighting.
        markers: draw a dot at every point.
    """

    label: str
    colour: str
    segments: Sequence[Sequence[Point]]
    dash: str = ""
    key: str = ""
    markers: bool = False


@dataclass(frozen=True)
class Frame:
    """Size and axes of a chart.

    Attributes:
        width: width of the view box; text sizes are in the same unit.
        height: height of the view box.
        margins: left, right, top and bottom space around the plot area.
        font_size: of tick labels.
        x_range: first and last x.
        y_range: lowest and highest y, or None to fit the data.
        dividers: x where a vertical rule stands, with its label (may be empty).
        y_format: writes a tick of the y axis.
        x_ticks: upper bound on the number of ticks of the x axis.
        y_ticks: the same for the y axis.
    """

    width: float = 440
    height: float = 230
    margins: tuple[float, float, float, float] = (46, 12, 20, 26)
    font_size: float = 11.5
    x_range: tuple[float, float] = (0, 1)
    y_range: tuple[float, float] | None = None
    dividers: Sequence[tuple[float, str]] = ()
    y_format: Callable[[float], str] = "{:g}".format
    x_ticks: int = 6
    y_ticks: int = 5


SMALL_MARGINS = (28.0, 4.0, 6.0, 14.0)


def small_frame(
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    dividers: Sequence[tuple[float, str]],
) -> Frame:
    """Returns the frame of one of many panels with common axes (small multiples)."""
    return Frame(
        width=150, height=90, margins=SMALL_MARGINS, font_size=9.5, x_range=x_range,
        y_range=y_range, dividers=dividers, x_ticks=4, y_ticks=5,
    )  # fmt: skip


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """Returns at most `most` (at least 2 wanted) round numbers from `low` to `high`."""
    span = max(high - low, 1e-12)
    for exponent in range(math.floor(math.log10(span / most)), math.ceil(math.log10(span)) + 2):
        for factor in (1, 2, 5):
            step = factor * 10.0**exponent
            first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
            if last - first + 1 <= most:
                return [round(n * step, 12) for n in range(first, last + 1)]
    return [low, high]


def line_chart(series: Sequence[Series], frame: Frame, description: str) -> str:
    """Draws lines in one frame.

    Args:
        series: the lines, drawn in this order.
        frame: size and axes.
        description: what a screen reader says (plain text).

    Returns:
        An ``<svg>`` element; all text in it is escaped.
    """
    scale = _Scale(frame, series)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {frame.width:g} {frame.height:g}" '
        f'role="img" aria-label="{escape(description)}" class="chart" '
        f'font-size="{frame.font_size:g}">',
        _axes(frame, scale),
        *(_line(one, scale) for one in series),
        "</svg>",
    ]
    return "".join(parts)


def legend(series: Sequence[Series], *, buttons: bool = False) -> str:
    """Returns the legend of charts as an HTML list.

    Args:
        series: what to explain; data is not used.
        buttons: make each entry a button with the key, for a script that highlights lines.
    """
    entries = []
    for one in series:
        dash = f' stroke-dasharray="{one.dash}"' if one.dash else ""
        swatch = (
            '<svg viewBox="0 0 24 8" width="24" height="8" aria-hidden="true"><line x1="1" y1="4" '
            f'x2="23" y2="4" stroke-width="2.5"{dash} style="stroke:{one.colour}"/></svg>'
        )
        text = f"{swatch}<span>{escape(one.label)}</span>"
        if buttons:
            key = escape(one.key)
            text = f'<button type="button" data-key="{key}" aria-pressed="false">{text}</button>'
        entries.append(f"<li>{text}</li>")
    return f'<ul class="legend">{"".join(entries)}</ul>'


def stacked_bar(parts: Sequence[tuple[str, float, str]], description: str) -> str:
    """Draws shares of a whole as one horizontal bar.

    Args:
        parts: (label, size, CSS colour) from left to right; sizes of one unit, not negative.
        description: what a screen reader says (plain text).
    """
    total = sum(size for _, size, _ in parts) or 1.0
    cells = []
    left = 0.0
    for label, size, colour in parts:
        width = 100 * size / total
        cells.append(
            f'<rect x="{left:.3f}%" y="0" width="{max(width - 0.3, 0.1):.3f}%" height="26" rx="3" '
            f'style="fill:{colour}"><title>{escape(label)}</title></rect>'
        )
        left += width
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="100%" height="26" role="img" '
        f'class="bar" aria-label="{escape(description)}">{"".join(cells)}</svg>'
    )


class _Scale:
    """Maps data to the view box."""

    def __init__(self, frame: Frame, series: Sequence[Series]) -> None:
        left, right, top, bottom = frame.margins
        self.left, self.right = left, frame.width - right
        self.top, self.bottom = top, frame.height - bottom
        self.x_low, self.x_high = frame.x_range
        if self.x_high <= self.x_low:
            self.x_low, self.x_high = self.x_low - 0.5, self.x_low + 0.5
        self.y_low, self.y_high = frame.y_range or _fit(series, frame.y_ticks)

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return self.left + share * (self.right - self.left)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return self.bottom - min(max(share, 0.0), 1.0) * (self.bottom - self.top)


def _fit(series: Sequence[Series], ticks: int) -> tuple[float, float]:
    values = [y for one in series for segment in one.segments for _, y in segment if y is not None]
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(abs(high), 1e-12):
        low, high = (0.0, high * 1.25) if high > 0 else (low - 1.0, high + 1.0)
    elif 0 <= low < 0.35 * high:
        low = 0.0
    space = 0.05 * (high - low)
    return (low if low == 0 else low - space), high + space


def _axes(frame: Frame, scale: _Scale) -> str:
    grid, texts = [], []
    for tick in nice_ticks(scale.y_low, scale.y_high, frame.y_ticks):
        y = scale.y(tick)
        grid.append(f"M{scale.left:g} {y:.1f}H{scale.right:g}")
        texts.append(
            f'<text x="{scale.left - 5:g}" y="{y:.1f}" dy=".35em" text-anchor="end">'
            f"{escape(frame.y_format(tick))}</text>"
        )
    ticks = [t for t in nice_ticks(scale.x_low, scale.x_high, frame.x_ticks) if t == round(t)]
    for tick in ticks or [frame.x_range[0]]:
        texts.append(
            f'<text x="{scale.x(tick):.1f}" y="{frame.height - 3:g}" text-anchor="middle">'
            f"{tick:g}</text>"
        )
    rules = []
    for x, label in frame.dividers:
        if scale.x_low < x < scale.x_high:
            rules.append(f"M{scale.x(x):.1f} {scale.top:g}V{scale.bottom:g}")
        if label:
            start = max(scale.x(x), scale.left)
            texts.append(f'<text x="{start + 3:.1f}" y="{scale.top - 7:g}">{escape(label)}</text>')
    base = f"M{scale.left:g} {scale.bottom:g}H{scale.right:g}"
    return (
        f'<path class="grid" d="{"".join(grid)}"/><path class="rule" d="{"".join(rules)}"/>'
        f'<path class="axis" d="{base}"/><g class="ticks">{"".join(texts)}</g>'
    )


def _line(series: Series, scale: _Scale) -> str:
    path, dots = [], []
    for run in _runs(series.segments):
        points = [f"{scale.x(x):.1f} {scale.y(y):.1f}" for x, y in run]
        path.append("M" + "L".join(points))
        if series.markers or len(points) == 1:
            dots += points
    if not path:
        return ""
    dash = f' stroke-dasharray="{series.dash}"' if series.dash else ""
    key = f' data-op="{escape(series.key)}"' if series.key else ""
    # A path of zero-length pieces with round caps is a row of dots in one element.
    spots = f'<path class="dots" d="{"".join(f"M{p}h0" for p in dots)}"/>' if dots else ""
    return (
        f'<g class="line"{key} style="stroke:{series.colour}"><title>{escape(series.label)}</title>'
        f'<path d="{"".join(path)}"{dash}/>{spots}</g>'
    )


def _runs(segments: Sequence[Sequence[Point]]) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = []
    for segment in segments:
        run: list[tuple[float, float]] = []
        for x, y in segment:
            if y is None or not math.isfinite(y):
                runs.append(run)
                run = []
            else:
                run.append((x, y))
        runs.append(run)
    return [run for run in runs if run]
