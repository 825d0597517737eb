"""Searched cells against random ones of the same space, at equal training, on the bundled digits.

    python benchmarks/searched_vs_random.py --out DIR [--seeds 0 1 2] [--random 2] [--epochs 5]

For every seed one search (``--preset demo``) and some random cells; every cell is then trained in
the same way from the same seed. Prints a table in Markdown. Runs that are in DIR already are not
made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

from pdarts_fast.cost import Scale, genotype_cost
from pdarts_fast.genotype import PRIMITIVES, Genotype, count_skips, load_genotype, save_genotype
from pdarts_fast.network import NetworkCIFAR

MAX_SKIPS = 2
NODES = 4
# What --preset demo trains.
SCALE = Scale(NetworkCIFAR, C=12, layers=5, num_classes=10, image_size=16)


def random_cell(rng: np.random.Generator) -> list[tuple[str, int]]:
    """Two different sources a node, and a primitive other than ``none``, all uniform."""
    pairs = []
    for node in range(NODES):
        for source in sorted(rng.choice(2 + node, 2, replace=False).tolist()):
            pairs.append((str(rng.choice(PRIMITIVES[1:])), int(source)))
    return pairs


def random_genotype(rng: np.random.Generator) -> Genotype:
    """A random cell of the space, under the rule of at most two skips in the normal cell."""
    while count_skips(normal := random_cell(rng)) > MAX_SKIPS:
        pass
    concat = list(range(2, 2 + NODES))
    return Genotype(normal, concat, random_cell(rng), concat)


def command(*words: object) -> None:
    """Runs a command of the package; its failure stops everything."""
    subprocess.run([sys.executable, "-m", "pdarts_fast", *map(str, words)], check=True)


def search(folder: Path, seed: int, threads: int) -> Path:
    """Run directory of a search, made if it is not there."""
    path = folder / f"search-{seed}"
    if not (path / "genotype.json").is_file():
        command(
            "search", "--preset", "demo", "--seed", seed, "--run-dir", path, "--threads", threads
        )
    return path


def accuracy(
    folder: Path, name: str, genotype: Path, epochs: int, seed: int, threads: int
) -> float:
    """Test accuracy after the last epoch of a training, made if it is not there."""
    path = folder / name
    if not (path / "report.html").is_file():
        command(
            *("train", "--preset", "demo", "--genotype", genotype, "--epochs", epochs),
            *("--seed", seed, "--run-dir", path, "--threads", threads, "--overwrite"),
        )
    records = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [r["accuracy"] for r in records if r["kind"] == "validation"][-1]


def main() -> None:
    """Searches, trains and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--random", type=int, default=2, help="random cells a seed")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    rows, scores = [], {"searched": [], "random": []}  # type: ignore[var-annotated]
    for seed in options.seeds:
        rng = np.random.default_rng(seed)
        cells = {f"searched-{seed}": search(options.out, seed, options.threads)}
        for number in range(options.random):
            name = f"random-{seed}-{number}"
            cells[name] = options.out / f"{name}.json"
            save_genotype(cells[name], random_genotype(rng))
        for name, source in cells.items():
            found = accuracy(
                options.out, f"train-{name}", source, options.epochs, seed, options.threads
            )
            genotype = load_genotype(str(source))
            cost = genotype_cost(genotype, SCALE)
            scores[name.partition("-")[0]].append(found)
            rows.append(
                f"| {name} | {100 * found:.2f} % | {cost.parameters:,} "
                f"| {cost.multiply_adds / 1e6:.2f} M | {count_skips(genotype.normal)} |"
            )
    print("\n| cell | test accuracy | parameters | multiply-adds | skips |\n|---|---|---|---|---|")
    print("\n".join(rows))
    for kind, found in scores.items():
        spread = f" ± {100 * statistics.stdev(found):.2f}" if len(found) > 1 else ""
        print(f"\n{kind}: {100 * statistics.mean(found):.2f}{spread} % over {len(found)} cells")


if __name__ == "__main__":
    main()
