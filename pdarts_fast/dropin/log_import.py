"""Reads the text log of an old search into a ``genotype.json``.

Logs of this family print genotypes, and tables of live operations either as nested lists of
booleans or as the names of the live operations, one edge a line.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdarts_fast.errors import UsageError
from pdarts_fast.genotype import (
    PRIMITIVES,
    Genotype,
    count_skips,
    genotype_to_json,
    genotypes_in_text,
)
from pdarts_fast.run.files import write_atomically
from pdarts_fast.search_space import MAX_SKIPS, num_nodes

Table = list[list[str]]
"""Names of the live primitives on each edge."""

# A genotype that a line about training separates from the next was an intermediate one.
_TRAINING = re.compile(r"\b(?:epoch|train|valid)\w*\b[ :=]*\d", re.IGNORECASE)
_BOOLEANS = re.compile(r"\[\s*\[\s*(?:True|False)[\[\]\s,TrueFals]*\]\s*\]")
_NAMES = re.compile(r"\[\s*(?:'\w+'\s*,\s*)*'\w+'\s*\]\s*$")


@dataclass(frozen=True)
class OldSearch:
    """What a log says.

    Attributes:
        genotype: The result: with the most skips allowed, where the log restricts them.
        max_skips: How many its normal cell was allowed; None without a restriction.
        unrestricted: The genotype before any restriction, None without one.
        restricted: Genotype for each number of skips allowed, largest first.
        switches: Tables of live operations, normal and reduction cell, in the order of the log.
    """

    genotype: Genotype
    max_skips: int | None
    unrestricted: Genotype | None
    restricted: dict[int, Genotype]
    switches: list[dict[str, Table]]


def _boolean_tables(text: str) -> list[tuple[int, Table]]:
    found = []
    for match in _BOOLEANS.finditer(text):
        try:
            rows = ast.literal_eval(match.group())
        except (SyntaxError, ValueError):
            continue
        if all(len(row) == len(PRIMITIVES) for row in rows) and _is_table(rows):
            table = [
                [name for name, alive in zip(PRIMITIVES, row, strict=True) if alive] for row in rows
            ]
            found.append((match.start(), table))
    return found


def _is_table(rows: Sequence[Any]) -> bool:
    try:
        num_nodes(len(rows))
    except UsageError:
        return False
    return True


def _name_tables(text: str) -> list[tuple[int, Table]]:
    """Runs of lines that each end in a list of primitives."""
    found: list[tuple[int, Table]] = []
    run: Table = []
    start = offset = 0
    for line in [*text.splitlines(keepends=True), ""]:
        match = _NAMES.search(line)
        names = ast.literal_eval(match.group().strip()) if match else []
        if names and all(name in PRIMITIVES for name in names):
            start = start if run else offset
            run.append(names)
        else:
            if run and _is_table(run):
                found.append((start, run))
            run = []
        offset += len(line)
    return found


def _switches(text: str) -> list[dict[str, Table]]:
    """Pairs of tables, of the normal and then of the reduction cell."""
    tables = [table for _, table in sorted(_boolean_tables(text) + _name_tables(text))]
    unique = [table for i, table in enumerate(tables) if i == 0 or tables[i - 1] is not table]
    pairs = zip(unique[::2], unique[1::2], strict=False)
    return [{"normal": normal, "reduce": reduce} for normal, reduce in pairs]


def _last_run(text: str, found: list[tuple[int, Genotype]]) -> list[Genotype]:
    """Genotypes at the end of the log with no training between them."""
    lines = text.splitlines()
    run = [found[-1][1]]
    for (line, genotype), (following, _) in zip(found[-2::-1], found[:0:-1], strict=False):
        if any(_TRAINING.search(between) for between in lines[line : following - 1]):
            break
        run.insert(0, genotype)
    return run


def read_log(path: str | Path, max_skips: int = MAX_SKIPS) -> OldSearch:
    """Reads a log.

    Args:
        path: A text file.
        max_skips: Skips that the normal cell of the result may have, where the log has genotypes
            for several numbers of them.

    Raises:
        UsageError: The file cannot be read, holds no genotype, or none with so few skips.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    found = genotypes_in_text(text, str(path))
    if not found:
        raise UsageError(f"{path}: holds no line with Genotype(normal=[...], ...)")
    run = _last_run(text, found)
    switches = _switches(text)
    distinct = {repr(genotype) for genotype in run}
    if len(distinct) == 1:
        return OldSearch(run[-1], None, None, {}, switches)
    return _restricted(path, run, max_skips, switches)


def _restricted(
    path: Path, run: list[Genotype], max_skips: int, switches: list[dict[str, Table]]
) -> OldSearch:
    """A log that goes on to restrict the skips of its genotype step by step."""
    most = len(run[0].normal)
    restricted: dict[int, Genotype] = {}
    for allowed in range(most, -1, -1):
        fitting = [genotype for genotype in run if count_skips(genotype.normal) <= allowed]
        if not fitting:
            break
        restricted[allowed] = fitting[0]
    if max_skips not in restricted:
        has = ", ".join(map(str, restricted)) or "none"
        raise UsageError(
            f"{path}: no genotype with at most {max_skips} skips (it has those for {has}); choose "
            "another --max-skips"
        )
    return OldSearch(restricted[max_skips], max_skips, run[0], restricted, switches)


def save(path: str | Path, search: OldSearch) -> None:
    """Writes a ``genotype.json`` as a run has it, with the tables under ``switches``.

    Raises:
        RunError: The file cannot be written.
    """
    fields = [f'"genotype": {genotype_to_json(search.genotype, 2)}']
    fields.append(f'"max_skips": {json.dumps(search.max_skips)}')
    if search.unrestricted is not None:
        fields.append(f'"unrestricted": {genotype_to_json(search.unrestricted, 2)}')
        entries = [f'    "{m}": {genotype_to_json(g, 4)}' for m, g in search.restricted.items()]
        fields.append('"restricted": {\n' + ",\n".join(entries) + "\n  }")
    if search.switches:
        stages = []
        for stage in search.switches:
            cells = [
                f'      "{cell}": [\n'
                + ",\n".join(f"        {json.dumps(row)}" for row in table)
                + "\n      ]"
                for cell, table in stage.items()
            ]
            stages.append("    {\n" + ",\n".join(cells) + "\n    }")
        fields.append('"switches": [\n' + ",\n".join(stages) + "\n  ]")
    text = "{\n  " + ",\n  ".join(fields) + "\n}\n"
    write_atomically(Path(path), text.encode())
