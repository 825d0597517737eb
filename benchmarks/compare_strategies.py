"""Compares the search strategies on digits: search, train every cell alike, one table.

    python benchmarks/compare_strategies.py --seeds 3 --out runs/strategies

Every search sees the weight half of the digits, at their own 8×8 pixels, for 12 epochs (the demo
presets); perturbation takes the supernet of the P-DARTS search of the same seed. A run that is
already in the folder is not made again. Prints a table in Markdown and the commands that made it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

IMAGES = "--preset demo --image-size 8 --crop-padding 1"
VARIANTS = {
    "P-DARTS": f"search {IMAGES}",
    "RAPDARTS, params ≤ 60k": f"search {IMAGES} --strategy rapdarts",
    "OPP-DARTS": f"search {IMAGES} --strategy opp",
    "P-DARTS, beta-decay": f"search {IMAGES} --beta-decay 1.5",
    "P-DARTS, Dirichlet": f"search {IMAGES} --sample dirichlet",
    "P-DARTS, perturbation": "select SOURCE --epochs 1",
}
TRAINING = f"train {IMAGES} --epochs 15"


@dataclass(frozen=True)
class Outcome:
    """One seed of one variant: test accuracy (0 to 1), parameters, seconds of the search."""

    accuracy: float
    parameters: int
    seconds: float


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/strategies"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    outcomes: dict[str, list[Outcome]] = {name: [] for name in VARIANTS}
    commands: dict[str, str] = {}
    for seed in range(options.seeds):
        for name, command in VARIANTS.items():
            words = [*command.split(), "--threads", str(options.threads)]
            folder = _folder(options.out, name, seed)
            if words[0] == "search":
                words += ["--seed", str(seed), "--run-dir", str(folder)]
                found = folder
            else:
                source = _folder(options.out, "P-DARTS", seed)
                words = [word.replace("SOURCE", str(source)) for word in words]
                found = source / "select-perturbation"
            commands.setdefault(name, shlex.join(["pdarts-fast", *words]))
            _run(words, found / "report.html")
            training = Path(f"{folder}-train")
            flags = ["--seed", str(seed), "--genotype", str(found), "--run-dir", str(training)]
            _run(
                [*TRAINING.split(), "--threads", str(options.threads), *flags],
                training / "report.html",
            )
            outcomes[name].append(_outcome(found, training))
    print(_table(outcomes))
    print("\n".join(f"    {command}" for command in commands.values()))
    print(f"    pdarts-fast {TRAINING} --genotype RUN_DIR")


def _folder(out: Path, name: str, seed: int) -> Path:
    return out / f"{''.join(c if c.isalnum() else '-' for c in name.lower())}-{seed}"


def _run(words: list[str], result: Path) -> None:
    """Run ``pdarts-fast`` if its last file is not there yet."""
    if result.is_file():
        return
    print(shlex.join(["pdarts-fast", *words]), file=sys.stderr, flush=True)
    subprocess.run(
        [sys.executable, "-m", "pdarts_fast", *words, "--overwrite"],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _outcome(found: Path, training: Path) -> Outcome:
    records = [json.loads(line) for line in (training / "metrics.jsonl").read_text().splitlines()]
    accuracy = [r["accuracy"] for r in records if r["kind"] == "validation"][-1]
    network = json.loads((training / "config.json").read_text())["network"]
    return Outcome(accuracy, network["parameters"], _seconds(found))


def _seconds(found: Path) -> float:
    """Time of a search's stages, or of a selection and the search before it."""
    records = [json.loads(line) for line in (found / "metrics.jsonl").read_text().splitlines()]
    stages = [r["seconds"] for r in records if r["kind"] == "stage"]
    if stages:
        return sum(stages)
    own = sum(r["seconds"] for r in records if r["kind"] in ("decision", "tuning"))
    return own + _seconds(found.parent)


def _table(outcomes: dict[str, list[Outcome]]) -> str:
    lines = [
        "| strategy | test accuracy, % | parameters, k | search, s |",
        "|---|---|---|---|",
    ]
    for name, values in outcomes.items():
        columns = [
            _spread([100 * value.accuracy for value in values], 2),
            _spread([value.parameters / 1e3 for value in values], 1),
            _spread([value.seconds for value in values], 0),
        ]
        lines.append(f"| {name} | {' | '.join(columns)} |")
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    """Mean ± sample standard deviation; the value alone if there is one."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    main()
