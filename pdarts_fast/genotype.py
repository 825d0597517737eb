"""Primitives, genotypes, the named cells of the field, and genotypes as JSON and as text.

A genotype describes one normal and one reduction cell: two (operation, source) pairs per
intermediate node, where sources 0 and 1 are the cell's inputs and source 2 + i is node i, and the
states that the cell concatenates.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from pdarts_fast import named_genotypes
from pdarts_fast.errors import UsageError
from pdarts_fast.run.files import write_atomically

PRIMITIVES: tuple[str, ...] = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
# What a derived network may use: two operations appear only in cells of other papers.
OPERATIONS: tuple[str, ...] = (*PRIMITIVES, "sep_conv_7x7", "conv_7x1_1x7")

GENOTYPE_FILE = "genotype.json"

Cell = list[tuple[str, int]]


class Genotype(NamedTuple):
    """One normal and one reduction cell.

    Attributes:
        normal: (operation, source) pairs of the normal cell, two per node, node by node.
        normal_concat: States that the normal cell concatenates (node i is state 2 + i).
        reduce: The pairs of the reduction cell.
        reduce_concat: States that the reduction cell concatenates.
    """

    normal: Cell
    normal_concat: list[int]
    reduce: Cell
    reduce_concat: list[int]


def check_genotype(genotype: Any, where: str = "genotype") -> Genotype:
    """Checks four fields and returns them as a new Genotype of lists, tuples and ints.

    Args:
        genotype: A Genotype, any sequence of its four fields in order, or a mapping with exactly
            their names.
        where: What to call it in an error: a file, or a file and the field that holds it.

    Raises:
        UsageError: An operation is unknown, a source or a concatenated state does not exist, or a
            field is missing or has the wrong shape.
    """
    if isinstance(genotype, Mapping):
        missing = [name for name in Genotype._fields if name not in genotype]
        extra = [str(name) for name in genotype if name not in Genotype._fields]
        if missing or extra:
            wrong = f"lacks {', '.join(missing)}" if missing else f"has unknown {', '.join(extra)}"
            raise UsageError(f"{where}: {wrong}; wanted the fields {', '.join(Genotype._fields)}")
        genotype = [genotype[name] for name in Genotype._fields]
    if not _is_sequence(genotype) or len(genotype) != len(Genotype._fields):
        raise UsageError(
            f"{where}: wanted the four fields {', '.join(Genotype._fields)}, got {_short(genotype)}"
        )
    normal, normal_concat, reduce, reduce_concat = genotype
    cells = [_check_cell(normal, f"{where}: normal"), _check_cell(reduce, f"{where}: reduce")]
    return Genotype(
        cells[0],
        _check_concat(normal_concat, len(cells[0]) // 2, f"{where}: normal_concat"),
        cells[1],
        _check_concat(reduce_concat, len(cells[1]) // 2, f"{where}: reduce_concat"),
    )


def count_skips(cell: Iterable[tuple[str, int]]) -> int:
    """Number of ``skip_connect`` among the pairs of one cell."""
    return sum(op == "skip_connect" for op, _ in cell)


def genotype_to_json(genotype: Genotype, indent: int = 0) -> str:
    """JSON text of one genotype, one node (two pairs) a line.

    Args:
        genotype: The genotype to write.
        indent: Spaces before every line but the first.
    """
    pad = " " * indent
    fields = []
    for name, value in check_genotype(genotype)._asdict().items():
        if name.endswith("_concat"):
            text = json.dumps(value)
        else:
            pairs = [json.dumps(pair) for pair in value]
            nodes = [", ".join(pairs[i : i + 2]) for i in range(0, len(pairs), 2)]
            text = "[\n" + ",\n".join(f"{pad}    {node}" for node in nodes) + f"\n{pad}  ]"
        fields.append(f'{pad}  "{name}": {text}')
    return "{\n" + ",\n".join(fields) + f"\n{pad}}}"


def save_genotype(
    path: str | Path,
    genotype: Genotype,
    *,
    max_skips: int | None = None,
    unrestricted: Genotype | None = None,
    restricted: Mapping[int, Genotype] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Writes a genotype file that `load_genotype` reads.

    Args:
        path: File to write; its folder must exist.
        genotype: The result.
        max_skips: Most skips that its normal cell was allowed. With this or one of the next two
            the file has the form of a run's ``genotype.json``; without them it is the bare
            genotype.
        unrestricted: The genotype before any skip restriction.
        restricted: The genotype for each number of skips allowed, largest number first.
        facts: Further entries of a run's file, as JSON values.

    Raises:
        UsageError: A genotype is invalid.
        RunError: The file cannot be written.
    """
    if max_skips is None and unrestricted is None and restricted is None:
        text = genotype_to_json(genotype)
    else:
        fields = [f'"genotype": {genotype_to_json(genotype, 2)}']
        fields.append(f'"max_skips": {json.dumps(max_skips)}')
        if unrestricted is not None:
            fields.append(f'"unrestricted": {genotype_to_json(unrestricted, 2)}')
        if restricted is not None:
            entries = [f'    "{m}": {genotype_to_json(g, 4)}' for m, g in restricted.items()]
            fields.append('"restricted": {\n' + ",\n".join(entries) + "\n  }")
        for name, value in (facts or {}).items():
            text = json.dumps(value, indent=2).replace("\n", "\n  ")
            fields.append(f"{json.dumps(name)}: {text}")
        text = "{\n  " + ",\n  ".join(fields) + "\n}"
    write_atomically(Path(path), (text + "\n").encode())


def load_genotype(source: str | Path, *, max_skips: int | None = None) -> Genotype:
    """Reads a genotype from wherever one may stand.

    Args:
        source: The name of a published cell (a key of `NAMED`); a run directory or its
            ``genotype.json``; a file with one genotype as JSON; a text file (a log, a Python file)
            that holds ``Genotype(normal=[...], ...)``; or that text itself.
        max_skips: Take the genotype of a run with at most this many skips in its normal cell
            instead of the run's result.

    Raises:
        UsageError: The source is unknown, holds no genotype, several different ones, or a wrong
            one; the message names the file and the field.
    """
    inline = isinstance(source, str) and _CALL.search(source) is not None
    if isinstance(source, str) and (source in NAMED or inline):
        if max_skips is not None:
            raise UsageError(f"{_short(source)}: a maximum of skips can only be asked of a run")
        return _only_genotype(source, "genotype") if inline else check_genotype(NAMED[source])
    path = Path(source)
    if os.path.isdir(path):
        path = path / GENOTYPE_FILE
        if not path.is_file():
            raise UsageError(f"{path.parent}: no {GENOTYPE_FILE} in it; the search has not ended")
    elif not os.path.isfile(path):
        raise UsageError(
            f"{_short(str(source))}: neither a file, a run directory nor one of {', '.join(NAMED)}"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as text ({error})") from error
    if text.lstrip().startswith("{"):
        return _from_json(text, str(path), max_skips)
    if max_skips is not None:
        raise UsageError(f"{path}: a maximum of skips can only be asked of a run")
    return _only_genotype(text, str(path))


def genotypes_in_text(text: str, where: str = "text") -> list[tuple[int, Genotype]]:
    """All ``Genotype(normal=[...], ...)`` in a log or Python file, in order.

    The text is parsed as literals (lists, tuples, strings, ints and ``range(...)``), never run.

    Args:
        text: Any text; a call may span lines.
        where: What to call the text in an error.

    Returns:
        (line number from 1, genotype) for each.

    Raises:
        UsageError: A call is not closed, is no plain literal, or is no valid genotype.
    """
    found = []
    for match in _CALL.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        found.append((line, _parse_call(text, match, f"{where}: line {line}")))
    return found


# Only a call that starts like data: prose, a class statement or a namedtuple's definition is not
# one.
_CALL = re.compile(r"\bGenotype\s*\(\s*(?=normal\s*=|\[)")
# A string literal, a comment or a bracket.
_TOKEN = re.compile(r"'[^'\n]*'|\"[^\"\n]*\"|#[^\n]*|[()\[\]]")
_LONGEST_CALL = 20_000
_LARGEST_STATE = 64


def _parse_call(text: str, match: re.Match[str], where: str) -> Genotype:
    depth = 0
    for token in _TOKEN.finditer(text, match.start(), match.start() + _LONGEST_CALL):
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(token.group(), 0)
        if depth == 0 and token.group() in ")]":
            break
    else:
        raise UsageError(f"{where}: Genotype( is never closed")
    try:
        call = ast.parse(text[match.start() : token.end()], mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UsageError(f"{where}: Genotype(...) is not well formed ({error})") from error
    if not isinstance(call, ast.Call):
        raise UsageError(f"{where}: Genotype(...) is not well formed")
    fields: dict[Any, Any] = dict(zip(Genotype._fields, map(_literal, call.args), strict=False))
    if len(call.args) > len(Genotype._fields):
        raise UsageError(f"{where}: Genotype(...) has {len(call.args)} values, wanted 4")
    for keyword in call.keywords:
        if keyword.arg in fields:
            raise UsageError(f"{where}: Genotype(...) gives {keyword.arg} twice")
        fields[keyword.arg] = _literal(keyword.value)
    for name, value in fields.items():
        if value is _NOT_LITERAL:
            raise UsageError(f"{where}: {name} is not a plain list, tuple or range of literals")
    return check_genotype(fields, where)


_NOT_LITERAL = object()


def _literal(node: ast.expr) -> Any:
    """Value of a literal or of ``range`` of up to three small ints, else `_NOT_LITERAL`."""
    try:
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            return ast.literal_eval(node)
        bounds = [ast.literal_eval(argument) for argument in node.args]
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return _NOT_LITERAL
    if node.func.id != "range" or node.keywords or not 1 <= len(bounds) <= 3:
        return _NOT_LITERAL
    if any(not _is_int(bound) or abs(bound) > _LARGEST_STATE for bound in bounds):
        return _NOT_LITERAL
    return _NOT_LITERAL if bounds[2:] == [0] else list(range(*bounds))


def _only_genotype(text: str, where: str) -> Genotype:
    found = genotypes_in_text(text, where)
    if not found:
        raise UsageError(f"{where}: holds neither JSON nor Genotype(normal=[...], ...)")
    if any(genotype != found[0][1] for _, genotype in found):
        lines = ", ".join(str(line) for line, _ in found[:8]) + (", ..." if found[8:] else "")
        raise UsageError(
            f"{where}: holds {len(found)} genotypes that differ (lines {lines}); "
            "copy the wanted one into a file of its own"
        )
    return found[0][1]


def _from_json(text: str, where: str, max_skips: int | None) -> Genotype:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: is not JSON ({error})") from error
    if "genotype" not in data:
        if max_skips is not None:
            raise UsageError(f"{where}: holds one genotype only, no choice of skips")
        return check_genotype(data, where)
    if max_skips is None:
        return check_genotype(data["genotype"], f"{where}: genotype")
    restricted = data.get("restricted")
    if not isinstance(restricted, dict) or str(max_skips) not in restricted:
        counts = ", ".join(restricted) if isinstance(restricted, dict) else "none"
        raise UsageError(f"{where}: no genotype for at most {max_skips} skips (has {counts})")
    return check_genotype(restricted[str(max_skips)], f"{where}: restricted {max_skips}")


def _check_cell(cell: Any, where: str) -> Cell:
    if not _is_sequence(cell) or len(cell) == 0 or len(cell) % 2:
        _refuse(where, "two [operation, source] pairs for each node", cell)
    checked = []
    for i, pair in enumerate(cell):
        place = f"{where}[{i}]"
        if not _is_sequence(pair) or len(pair) != 2 or not isinstance(pair[0], str):
            _refuse(place, "a pair [operation, source]", pair)
        op, source = pair
        if op not in OPERATIONS:
            _refuse(place, f"one of {', '.join(OPERATIONS)}", op)
        if not _is_int(source) or not 0 <= source < 2 + i // 2:
            _refuse(place, f"a source from 0 to {1 + i // 2}", source)
        checked.append((op, int(source)))
    return checked


def _check_concat(concat: Any, nodes: int, where: str) -> list[int]:
    wanted = f"different states from 2 to {1 + nodes}"
    if isinstance(concat, range):
        concat = concat[: _LARGEST_STATE + 1]
    if not (_is_sequence(concat) or isinstance(concat, range)) or len(concat) == 0:
        _refuse(where, wanted, concat)
    if any(not _is_int(state) or not 2 <= state < 2 + nodes for state in concat):
        _refuse(where, wanted, concat)
    if len(set(concat)) != len(concat):
        _refuse(where, wanted, concat)
    return [int(state) for state in concat]


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, range))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refuse(where: str, wanted: str, got: Any) -> NoReturn:
    raise UsageError(f"{where}: wanted {wanted}, got {_short(got)}")


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


NAMED: dict[str, Genotype] = {
    name: check_genotype(cells, name) for name, cells in named_genotypes.CELLS.items()
}
DARTS_V1 = NAMED["DARTS_V1"]
DARTS_V2 = NAMED["DARTS_V2"]
PDARTS = NAMED["PDARTS"]
