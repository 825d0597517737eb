"""The evaluate command: what a trained network reaches, what it costs, how fast it runs here."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from pdarts_fast.cells import choice
from pdarts_fast.cost import Cost, network_cost
from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.genotype import load_genotype
from pdarts_fast.precision import precision_on
from pdarts_fast.run.directory import read_config
from pdarts_fast.run.environment import hardware, versions
from pdarts_fast.run.files import write_json
from pdarts_fast.run.setup import pick_device
from pdarts_fast.scoring import Scores, score
from pdarts_fast.settings import check_device, from_json, settings_of
from pdarts_fast.train_config import AUXILIARY_IMAGE_SIZE, TrainConfig, check_data
from pdarts_fast.train_data import open_data
from pdarts_fast.trained import Trained, load_trained

WIDTH = 200
WARM_UPS = 3
MIN_REPEATS, MAX_REPEATS = 10, 200
MIN_SECONDS = 1.0
# The confusion matrix is printed for at most this many classes, else the worst confusions are.
PRINTED_CLASSES = 20
WORST = 10
# Data sets by kind of network and number of classes, for checkpoints that do not say.
_KNOWN_DATA = {("cifar", 10): "cifar10", ("cifar", 100): "cifar100", ("imagenet", 1000): "imagenet"}


@dataclass(frozen=True)
class Speed:
    """Time of a forward pass.

    Attributes:
        batch_size: Images of the pass.
        milliseconds: Median over the repeats.
        images_per_second: Images of a pass by its median time.
        repeats: Passes that were timed.
    """

    batch_size: int
    milliseconds: float
    images_per_second: float
    repeats: int


@torch.inference_mode()
def measure_speed(
    network: nn.Module, image_size: int, batch_size: int, device: torch.device, amp: bool = False
) -> Speed:
    """Times forward passes of random images that are on the device already.

    Args:
        network: In evaluation mode, on `device`.
        image_size: Side of the images in pixels.
        batch_size: Images of a pass.
        device: Where it runs; its queue is waited for around each pass.
        amp: Mixed precision, as `precision.precision_on` has it.
    """
    images = torch.randn((batch_size, 3, image_size, image_size), device=device)
    times: list[float] = []
    while len(times) < WARM_UPS + MIN_REPEATS or (
        sum(times[WARM_UPS:]) < MIN_SECONDS and len(times) < WARM_UPS + MAX_REPEATS
    ):
        _wait(device)
        start = time.perf_counter()
        with precision_on(device, amp).autocast(device):
            network(images)
        _wait(device)
        times.append(time.perf_counter() - start)
    median = statistics.median(times[WARM_UPS:])
    return Speed(batch_size, 1e3 * median, batch_size / median, len(times) - WARM_UPS)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Evaluation:
    """Everything that the command measures.

    Attributes:
        trained: The network.
        config: Data and execution settings used.
        image_size: Side of the images in pixels.
        cost: Parameters and multiply-adds.
        scores: Accuracy on the test images; None if no data was given.
        classes: Class names, empty without data.
        speeds: Latency and throughput, one a batch size.
        backend: What ran the cells.
    """

    trained: Trained
    config: TrainConfig
    image_size: int
    cost: Cost
    scores: Scores | None
    classes: list[str]
    speeds: list[Speed]
    backend: str


def run_evaluate(
    source: Path,
    *,
    weights: str = "best",
    genotype: str | None = None,
    speed_batch_sizes: tuple[int, ...] = (1, 32),
    speed: bool = True,
    out: Path | None = None,
    **settings: Any,
) -> Evaluation:
    """Evaluate a network and print the results.

    Args:
        source: Run directory, weight file or published checkpoint.
        weights: ``best`` or ``last`` weights of a run.
        genotype: The cell of a published checkpoint, as `load_genotype` takes it.
        speed_batch_sizes: Batch sizes to time.
        speed: Whether to time at all.
        out: JSON file to write.
        settings: Fields of `TrainConfig` about data and execution; None leaves them as the
            training had them.

    Raises:
        UsageError: A value that cannot work.
        RunError: Data or checkpoint is damaged or does not fit.
    """
    if speed and min(speed_batch_sizes, default=0) < 1:
        raise UsageError("--speed-batch-sizes: wanted sizes of at least 1")
    cells = load_genotype(genotype) if genotype is not None else None
    trained = load_trained(source, which=weights, genotype=cells)
    config = _settings(source, trained, settings)
    device = pick_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    network = trained.network.to(device)
    backend = choice.resolve(config.backend, device.type, network.widest_cell)
    network.use_backend(config.backend)
    scores, classes = _scores(trained, config, device)
    speeds = [
        measure_speed(network, config.image_size, size, device, config.amp)
        for size in (speed_batch_sizes if speed else ())
    ]
    cost = network_cost(network, config.image_size)
    found = Evaluation(trained, config, config.image_size, cost, scores, classes, speeds, backend)
    _print(found, device)
    if out is not None:
        write_json(out, to_json(found, device))
        print(out)
    return found


def image_size_of(trained: Trained, image_size: int | None) -> int:
    """Side of the images of a network: as asked, as in its training, or the paper's."""
    if image_size is not None:
        if not 8 <= image_size <= 1024:
            raise UsageError(f"--image-size {image_size}: wanted a value from 8 to 1024")
        return image_size
    known = trained.facts.get("dataset", {}).get("image_size")
    return known if isinstance(known, int) else AUXILIARY_IMAGE_SIZE[trained.spec.network]


def _settings(source: Path, trained: Trained, settings: dict[str, Any]) -> TrainConfig:
    """Settings of the training, if the source tells them, with those given on top."""
    config = TrainConfig()
    # A weight file lies in the run directory, a checkpoint one level deeper.
    folders = [source] if source.is_dir() else [source.parent, source.parent.parent]
    folder = next((one for one in folders if (one / "config.json").is_file()), None)
    saved = read_config(folder) if folder is not None and trained.facts else None
    if saved is not None and saved.get("kind") == config.command:
        config = from_json(settings_of(saved), config, f"{folder}/config.json")
    else:
        dataset = trained.facts.get("dataset", {}).get("name") or _KNOWN_DATA.get(
            (trained.spec.network, trained.spec.num_classes)
        )
        config = from_json({"dataset": dataset or "image-folder"}, config, str(trained.path))
    if settings.get("dataset") not in (None, config.dataset):
        config = dataclasses.replace(config, data=None, loader="auto")
    given = {name: value for name, value in settings.items() if value is not None}
    # These only say that the flag was left out.
    for name, default in (("loader", "auto"), ("checksum", True), ("skip_broken", False)):
        if given.get(name) == default:
            del given[name]
    given["image_size"] = image_size_of(trained, settings.get("image_size"))
    config = dataclasses.replace(config, cutout=0, download=False, **given)
    check_device(config.device)
    if config.batch_size < 1 or config.workers < 0:
        raise UsageError("--batch-size wants at least 1, --workers at least 0")
    return config


def _scores(
    trained: Trained, config: TrainConfig, device: torch.device
) -> tuple[Scores | None, list[str]]:
    if config.dataset != "digits" and config.data is None:
        return None, []
    check_data(config)
    facts = trained.facts.get("dataset", {})
    known = (facts["mean"], facts["std"]) if {"mean", "std"} <= facts.keys() else None
    data = open_data(config, device, known)
    if data.num_classes != trained.spec.num_classes:
        raise RunError(
            f"{trained.path} tells {trained.spec.num_classes} classes apart, the images of "
            f"--dataset {config.dataset} have {data.num_classes}: give the ones it was trained on"
        )
    found = score(trained.network, data.test, data.num_classes, amp=config.amp)
    return found, data.facts["classes"]


def to_json(found: Evaluation, device: torch.device) -> dict[str, Any]:
    """All results as JSON values."""
    scores = found.scores
    return {
        "source": str(found.trained.path),
        "network": {
            **dataclasses.asdict(found.trained.spec),
            "genotype": found.trained.spec.genotype._asdict(),
            **dataclasses.asdict(found.cost),
            "image_size": found.image_size,
        },
        "scores": None
        if scores is None
        else {
            "dataset": found.config.dataset,
            "images": scores.images,
            "loss": scores.loss,
            "accuracy": scores.accuracy,
            "top5_accuracy": scores.top5_accuracy,
            "classes": found.classes,
            "confusion": scores.confusion.tolist(),
        },
        "speed": [dataclasses.asdict(speed) for speed in found.speeds],
        "amp": found.config.amp,
        "hardware": hardware(device, found.backend),
        "versions": versions(),
    }


def _print(found: Evaluation, device: torch.device) -> None:
    # A file or pipe has no width to keep to.
    width = None if sys.stdout.isatty() else WIDTH
    console = Console(file=sys.stdout, highlight=False, width=width)
    spec, scores = found.trained.spec, found.scores
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("weights", escape(str(found.trained.path)))
    table.add_row(
        "network", f"{spec.cells} cells, {spec.channels} channels, {spec.num_classes} classes"
    )
    table.add_row("parameters", f"{found.cost.parameters:,}")
    madds = found.cost.multiply_adds / 1e6
    side = found.image_size
    table.add_row("multiply-adds", f"{madds:,.3f} M for an image of {side}×{side}")
    if scores is None:
        table.add_row("accuracy", "not measured: give --data DIR, and --dataset if it is another")
    else:
        table.add_row(
            "test accuracy",
            f"top-1 {100 * scores.accuracy:.2f}%, top-5 {100 * scores.top5_accuracy:.2f}% "
            f"of {scores.images:,} images of {found.config.dataset}",
        )
        table.add_row("test loss", f"{scores.loss:.4f}")
    place = device.type if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    for speed in found.speeds:
        table.add_row(
            f"speed, batch {speed.batch_size}",
            f"{speed.milliseconds:.2f} ms, {speed.images_per_second:,.1f} images/s ({place})",
        )
    console.print(table)
    if scores is not None:
        console.print(_confusion_table(scores, found.classes))


def _confusion_table(scores: Scores, classes: list[str]) -> Table:
    matrix = scores.confusion.tolist()
    classes = [escape(name) for name in classes]
    if len(classes) <= PRINTED_CLASSES:
        table = Table("true \\ answer", *classes, title="confusion matrix")
        for name, row in zip(classes, matrix, strict=True):
            table.add_row(name, *(str(count) if count else "·" for count in row))
        return table
    pairs = [
        (count, row, column)
        for row, counts in enumerate(matrix)
        for column, count in enumerate(counts)
        if row != column and count
    ]
    table = Table("true", "answer", "images", title="most frequent confusions")
    for count, row, column in sorted(pairs, key=lambda p: (-p[0], p[1:]))[:WORST]:
        table.add_row(classes[row], classes[column], str(count))
    return table
