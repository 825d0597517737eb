"""Checkpoints: written atomically, verified when read, the last two kept."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pdarts_fast.errors import RunError
from pdarts_fast.run.files import disk_errors, write_atomically, write_json
from pdarts_fast.run.packing import PACKED, pack, unpack

log = logging.getLogger(__name__)

FORMAT = 1
KEPT = 2
_NAME = re.compile(r"checkpoint-(\d{9})\.pt")


class CheckpointFolder:
    """The numbered checkpoints of a run.

    A checkpoint is two files: ``checkpoint-N.pt`` (`torch.save`, loads with
    ``weights_only=True``) and ``checkpoint-N.json`` with its SHA-256. The second is written last,
    so a checkpoint without it was interrupted and does not count.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._unusable: set[int] = set()

    def save(self, state: dict[str, Any]) -> Path:
        """Write a state as the next checkpoint and remove all but the last two usable ones.

        Args:
            state: Tensors, numbers, texts, lists and dicts of such.

        Raises:
            RunError: The disk refuses; the checkpoints before this one stay.
        """
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        numbers = self._numbers()
        number = numbers[-1] + 1 if numbers else 1
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, **pack(state)}, buffer)
        content = buffer.getbuffer()
        path = self._path(number)
        write_atomically(path, content)
        digest = hashlib.sha256(content).hexdigest()
        write_json(path.with_suffix(".json"), {"sha256": digest, "bytes": len(content)})
        usable = [n for n in (*numbers, number) if n not in self._unusable]
        for old in sorted({*numbers} - {*usable[-KEPT:]}):
            self._remove(old)
        return path

    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint that is whole, on the CPU; None if there is none.

        A damaged one is reported through the log and the one before it is taken.

        Raises:
            RunError: The checkpoint belongs to another version, or the disk refuses.
        """
        self._remove_partial_files()
        for number in reversed(self._numbers()):
            path = self._path(number)
            problem = self._damage(path)
            if problem is None:
                return _read(path)
            log.warning("checkpoint %s %s: it is ignored", path, problem)
            self._unusable.add(number)
        return None

    def _damage(self, path: Path) -> str | None:
        """What is wrong with a checkpoint's bytes, or None."""
        with disk_errors(path):
            try:
                expected = json.loads(path.with_suffix(".json").read_text())["sha256"]
            except FileNotFoundError:
                return "was not written to its end"
            except (ValueError, KeyError, TypeError):
                return "has a damaged .json file"
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        return None if found == expected else "is damaged (its SHA-256 differs)"

    def _remove_partial_files(self) -> None:
        """Remove what a killed process was writing."""
        with disk_errors(self.folder):
            for path in self.folder.glob(".checkpoint-*.tmp"):
                path.unlink()

    def _numbers(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def _path(self, number: int) -> Path:
        return self.folder / f"checkpoint-{number:09d}.pt"

    def _remove(self, number: int) -> None:
        path = self._path(number)
        with disk_errors(path):
            # The .json first: without it the .pt no longer counts.
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    """A verified checkpoint file."""
    with disk_errors(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
    if state.get("format") != FORMAT:
        raise RunError(
            f"checkpoint {path} has format {state.get('format')}, this version reads {FORMAT}: "
            "resume with the version that wrote it (config.json names it), or give another "
            "--run-dir"
        )
    return unpack(state) if PACKED in state else state


def random_state(device: torch.device) -> dict[str, Any]:
    """State of the random generators of torch and numpy, ready for a checkpoint."""
    _, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, cached],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    keys, position, has_gauss, cached = state["numpy"]
    numpy_keys = keys.numpy().astype(np.uint32)
    np.random.set_state(("MT19937", numpy_keys, position, has_gauss, cached))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
