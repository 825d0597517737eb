"""Writes the report of a search: one HTML file that needs nothing else, from the run directory."""

import base64
import hashlib
from collections.abc import Iterable
from datetime import datetime, timezone
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from pdarts_fast.run import report_sections as sections
from pdarts_fast.run.files import write_atomically
from pdarts_fast.run.palette import css_variables
from pdarts_fast.run.report_charts import CELL_NAMES, alpha_figures, alpha_legend, curve_figures
from pdarts_fast.run.report_data import RunData, read_run
from pdarts_fast.run.report_strategy import strategy_sections

REPORT_FILE = "report.html"
SELECTION = "select"
"""What config.json of a selection says it is: it has a result, but no stages of its own."""


def write_report(run_dir: Path | str, *, train_command: str | None = None) -> Path:
    """Writes ``report.html`` into a run directory, also of a search that has not ended.

    Args:
        run_dir: folder that a search writes or has written.
        train_command: command that trains the result, shown with a copy button; None leaves it out.

    Returns:
        The report.

    Raises:
        UsageError: `run_dir` holds no run.
        RunError: a file of the run is damaged, or the report cannot be written.
    """
    path = Path(run_dir) / REPORT_FILE
    page = render_report(read_run(Path(run_dir)), train_command=train_command)
    write_atomically(path, page.encode("utf-8"))
    return path


def render_report(data: RunData, *, train_command: str | None = None) -> str:
    """Returns the report of a run as HTML; arguments as in `write_report`."""
    selected = data.info.get("kind") == SELECTION
    main = [
        _result(data, train_command),
        _restricted(data),
        _strategy(data),
        _alphas(data),
        *([] if selected else _course(data)),
        section("configuration", "Configuration", configuration(data)),
    ]
    return page(
        data,
        title=f"{'Selection' if selected else 'Search'} on {sections.dataset_name(data)}",
        finished=data.genotype is not None,
        notice=_notice(data),
        tiles=sections.tiles(data),
        links=_links(data),
        main="\n".join(main),
    )


def page(
    data: RunData,
    *,
    title: str,
    finished: bool,
    notice: str,
    tiles: str,
    links: Iterable[tuple[str, str]],
    main: str,
) -> str:
    """Returns a whole page that needs nothing else.

    Args:
        data: the run.
        title: heading (plain text).
        finished: whether the run has ended.
        notice: HTML above the tiles.
        tiles: HTML of the headline.
        links: (id of a section, text) of the navigation.
        main: HTML of the sections.
    """
    script = _template("report.js")
    style = Template(_template("report.css")).substitute(
        light=css_variables("light"), dark=css_variables("dark")
    )
    return Template(_template("report.html")).substitute(
        script_hash=_hash(script),
        style=style,
        script=script,
        title=escape(title),
        run=escape(str(data.path.resolve().name)),
        created=escape(_created(data)),
        status="finished" if finished else "unfinished",
        status_text="Finished" if finished else "Unfinished",
        notice=notice,
        tiles=tiles,
        navigation="".join(f'<a href="#{target}">{text}</a>' for target, text in links),
        main=main,
    )


def _created(data: RunData) -> str:
    text = str(data.info.get("created") or "")
    try:
        return f"{datetime.fromisoformat(text).astimezone(timezone.utc):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return text


def _notice(data: RunData) -> str:
    notes = []
    if data.genotype is None:
        notes.append(
            f"The search is unfinished: {sections.progress(data)}. "
            "This page shows what there is so far; make it again later for more."
        )
    if data.incomplete_lines:
        notes.append("The last line of a log was cut off and is left out.")
    return "".join(f'<p class="notice" role="status">{escape(note)}</p>' for note in notes)


def _links(data: RunData) -> list[tuple[str, str]]:
    links = [
        ("result", "Result", data.genotype is not None),
        ("skips", "Skips", bool(data.restricted)),
        *((name, title, True) for name, title, _ in strategy_sections(data)),
        ("alphas", "Operations", bool(data.alphas)),
        ("curves", "Curves", data.info.get("kind") != SELECTION),
        ("time", "Time", data.info.get("kind") != SELECTION),
        ("configuration", "Configuration", True),
    ]
    return [(target, text) for target, text, there in links if there]


def _result(data: RunData, train_command: str | None) -> str:
    if data.genotype is None:
        return ""
    body = f'<div class="cells">{sections.cell_figures(data.genotype)}</div>'
    if train_command is not None:
        body += sections.copy_block("Train this cell", train_command, "train-command", wrap=True)
    body += f'<div class="pair">{sections.genotype_blocks(data.genotype)}</div>'
    return section("result", "Result", body)


def _restricted(data: RunData) -> str:
    if not data.restricted:
        return ""
    note = (
        "How the normal cell changes when fewer skip connections are allowed. Nodes that differ "
        "from the row above are marked; the reduction cell is the same in every row."
    )
    body = f'<p class="lead">{note}</p><div class="card">{sections.restricted_table(data)}</div>'
    return section("skips", "Skip restriction", body)


def _strategy(data: RunData) -> str:
    """Returns what only some strategies have: costs, additions, decisions."""
    return "".join(section(name, title, body) for name, title, body in strategy_sections(data))


def _alphas(data: RunData) -> str:
    if not data.alphas:
        return ""
    note = (
        "Probability of each operation on each edge (softmax of the alphas) over the epochs. "
        "Vertical rules separate stages: each starts afresh with fewer operations. "
        "Choose an operation to follow it."
    )
    used = " Edges of the result are outlined." if data.genotype is not None else ""
    grids = "".join(
        f'<h3 class="grid-title">{name}</h3><div class="panels">{alpha_figures(data, kind)}</div>'
        for kind, name in CELL_NAMES.items()
    )
    body = f'<p class="lead">{note}{used}</p>{alpha_legend(data)}{grids}'
    return section("alphas", "Operations on each edge", body)


def _course(data: RunData) -> list[str]:
    """Returns the sections of what happened epoch by epoch and stage by stage."""
    return [
        section("curves", "Training curves", _curves(data)),
        section("time", "Time per stage", _time(data)),
    ]


def _curves(data: RunData) -> str:
    figures = curve_figures(data)
    if not figures:
        return '<p class="lead">No epoch is complete yet.</p>'
    return f'<div class="charts">{figures}</div>'


def _time(data: RunData) -> str:
    return sections.stage_bar(data) + f'<div class="card">{sections.stage_table(data)}</div>'


def configuration(data: RunData) -> str:
    """Returns the command and the tables of everything that a run was made with."""
    command = data.info.get("command")
    block = ""
    if command:
        block = sections.copy_block("Command", str(command), "search-command", wrap=True)
    return f'{block}<div class="tables">{sections.configuration(data)}</div>'


def section(name: str, title: str, body: str) -> str:
    """Returns a section of a page, under a heading (plain text) and an id."""
    return (
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>'
        f"{body}</section>"
    )


def _template(name: str) -> str:
    return (resources.files("pdarts_fast.run") / "templates" / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """Returns the source hash that allows this one script, and no other, to run."""
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
