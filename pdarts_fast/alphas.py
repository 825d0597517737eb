"""Reads and writes ``alphas.json``: the architecture parameters at the end of each stage."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pdarts_fast.errors import UsageError
from pdarts_fast.genotype import PRIMITIVES
from pdarts_fast.run.files import write_atomically
from pdarts_fast.search_space import CELL_TYPES, Alphas, check_alphas

ALPHAS_FILE = "alphas.json"


def save_alphas(path: str | Path, stages: Sequence[Alphas]) -> None:
    """Writes the alphas of all stages, one edge a line, exactly as float32 holds them.

    Args:
        path: File to write; its folder must exist.
        stages: One {"normal": [E, k], "reduce": [E, k]} per stage, raw (before softmax).

    Raises:
        UsageError: The alphas of a stage are malformed.
        RunError: The file cannot be written.
    """
    blocks = []
    for number, stage in enumerate(stages, start=1):
        tables = check_alphas(stage, f"stage {number}")
        cells = []
        for cell in CELL_TYPES:
            rows = [f"        [{', '.join(map(_digits, row))}]" for row in tables[cell]]
            cells.append(f'      "{cell}": [\n' + ",\n".join(rows) + "\n      ]")
        blocks.append("    {\n" + ",\n".join(cells) + "\n    }")
    text = f'{{\n  "primitives": {json.dumps(PRIMITIVES)},\n  "stages": [\n'
    text += ",\n".join(blocks) + "\n  ]\n}\n"
    write_atomically(Path(path), text.encode())


def load_alphas(source: str | Path) -> list[dict[str, npt.NDArray[np.float32]]]:
    """Reads the alphas of all stages.

    Args:
        source: A run directory or its ``alphas.json``.

    Returns:
        One {"normal": float32 [E, k], "reduce": float32 [E, k]} per stage, raw (before softmax).

    Raises:
        UsageError: There is no such file or its content is wrong; the message names the file and
            the field.
    """
    path = Path(source)
    if os.path.isdir(path):
        path = path / ALPHAS_FILE
        if not path.is_file():
            raise UsageError(f"{path.parent}: no {ALPHAS_FILE} in it; no stage has ended")
    elif not os.path.isfile(path):
        raise UsageError(f"{str(path)[:200]}: neither a run directory nor an {ALPHAS_FILE}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(data, dict) or not isinstance(data.get("stages"), list):
        raise UsageError(f'{path}: wanted {{"primitives": [...], "stages": [...]}}')
    if data.get("primitives") != list(PRIMITIVES):
        raise UsageError(f"{path}: primitives: wanted {', '.join(PRIMITIVES)} in this order")
    if not data["stages"]:
        raise UsageError(f"{path}: stages: wanted at least one, got none")
    return [
        check_alphas(stage, f"{path}: stage {number}")
        for number, stage in enumerate(data["stages"], start=1)
    ]


def _digits(value: np.float32) -> str:
    """Shortest decimal that reads back as the same float32, in JSON's syntax."""
    return json.dumps(float(str(value)))
