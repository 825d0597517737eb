"""Runs perturbation-based selection on the supernet of a finished search."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass

import torch
from torch import nn

from pdarts_fast.config import SearchConfig
from pdarts_fast.data import Augmentation, Dataset, Loader, ResidentLoader, split_indices
from pdarts_fast.distributed import SINGLE, Ranks
from pdarts_fast.errors import RunError
from pdarts_fast.genotype import Genotype
from pdarts_fast.meter import CORRECT, IMAGES, LOSS
from pdarts_fast.run.checkpoint import random_state, set_random_state
from pdarts_fast.run.directory import RunDirectory
from pdarts_fast.run.metrics import MetricsLog
from pdarts_fast.run.progress import Display
from pdarts_fast.run.resume import load_matching
from pdarts_fast.run.signals import Interrupted, StopRequest
from pdarts_fast.search_space import Switches
from pdarts_fast.settings import to_json
from pdarts_fast.shared_step import collect_state, require_same, share_step
from pdarts_fast.step import WEIGHTS, Meter, SearchStep
from pdarts_fast.strategies.dirichlet import DirichletMixing
from pdarts_fast.strategies.perturbation import (
    Decision,
    PartlyDiscrete,
    Question,
    Score,
    cell_of,
    decide,
    rounds,
)
from pdarts_fast.supernet import Network

# Tuning runs at this share of the search's learning rate: the weights are trained already.
TUNING_RATE = 0.1


@dataclass
class Progress:
    """Where a selection stands; all counts are of what is done.

    Attributes:
        round: Rounds that are decided and tuned.
        epoch: Tuning epochs of the current round.
        step: Steps of the current tuning epoch.
        global_step: Steps in all.
        epoch_seconds: Time spent on the steps of this tuning epoch.
    """

    round: int = 0
    epoch: int = 0
    step: int = 0
    global_step: int = 0
    epoch_seconds: float = 0.0


class Selection:
    """Decides operation by operation, then edge by edge, tuning the weights in between.

    Args:
        config: That of the search; ``perturbation_epochs`` is the tuning after each round.
        dataset: The search's images, split as there.
        network: The trained supernet of the last stage, on its device.
        switches: Its live ops.
        run: Open run directory of the selection; holds the checkpoint to go on from, if any.
        device: Where the supernet runs.
        display: What the user sees.
        ranks: The processes that make this selection together.

    Raises:
        RunError: The checkpoint belongs to other settings or other images.

    Source:
        DARTS-PT (arXiv 2108.04392), section 4.2.
    """

    def __init__(
        self,
        config: SearchConfig,
        dataset: Dataset,
        network: Network,
        switches: Switches,
        run: RunDirectory,
        device: torch.device,
        display: Display,
        ranks: Ranks = SINGLE,
    ) -> None:
        self.config = config
        self.run_dir = run
        self.device = device
        self.display = display
        self.ranks = ranks
        self._dataset = dataset
        self._facts = dataset.facts(config.dataset)
        self._halves = split_indices(len(dataset.train), config.data_split)
        inner = DirichletMixing() if config.sample == "dirichlet" else None
        self.mixing = PartlyDiscrete(switches, inner).to(device)
        network.mixing = self.mixing
        network.train()
        self.step = SearchStep(network, config, device)
        self.rounds = rounds(config.seed)
        self.progress = Progress()
        self.decisions: list[Decision] = []
        self._stop = StopRequest()
        self.resumed = self._load()
        share_step(self.step, ranks)
        self.metrics = MetricsLog(run.metrics, None)

    def run(self, stop: StopRequest) -> Genotype:
        """Run what is left of the selection.

        Args:
            stop: Looked at after every step; once set, a checkpoint is written and it ends.

        Returns:
            The genotype, before any skip cap.

        Raises:
            Interrupted: `stop` was set; the checkpoint to go on from is there.
            RunError: The loss stopped being a number, or the disk refused.
        """
        self._stop = stop
        steps = -(-len(self._halves[0]) // self.config.batch_size)
        tuning = self.config.perturbation_epochs * steps * (len(self.rounds) - 1)
        self.display.start_stage(
            1,
            f"selection by perturbation: {len(self.rounds)} rounds, "
            f"{self.config.perturbation_epochs} epochs of tuning between them",
            tuning,
            self.progress.global_step,
        )
        train, alphas = self._loader("weights", 0), self._loader("alphas", 1)
        validation = self.ranks.without_repeats(alphas, self.config.batch_size)
        while self.progress.round < len(self.rounds):
            self._run_round(train, validation)
        require_same(self.step.network, self.ranks)
        return cell_of(self.decisions)

    def _run_round(self, train: Loader, validation: Loader) -> None:
        progress = self.progress
        questions = self.rounds[progress.round]
        for question in questions[len(self.decisions) - 2 * progress.round :]:
            self._answer(question, validation)
        last = progress.round == len(self.rounds) - 1
        while progress.epoch < self.config.perturbation_epochs and not last:
            self._tune_epoch(train)
            self._write_tuning()
            progress.epoch += 1
            progress.step = 0
        progress.round += 1
        progress.epoch = 0
        self._save()

    def _answer(self, question: Question, validation: Loader) -> None:
        start = time.perf_counter()
        scores = {}
        for candidate in self.mixing.candidates(question):
            put_back = self.mixing.remove(question, candidate)
            scores[candidate] = self._score(validation)
            put_back()
        decision = decide(question, scores)
        self.mixing.carry_out(decision)
        self.decisions.append(decision)
        seconds = time.perf_counter() - start
        self.metrics.write(
            {
                "kind": "decision",
                "stage": self.config.stages,
                "epoch": self.progress.round,
                "step": self.progress.global_step,
                "asked": question.kind,
                "cell": question.cell,
                "place": question.place,
                "accuracies": {name: score.accuracy for name, score in scores.items()},
                "losses": {name: score.loss for name, score in scores.items()},
                "chosen": decision.chosen,
                "seconds": seconds,
            }
        )
        self.display.message(
            f"  {question.cell} cell, {question.kind} of "
            f"{'edge' if question.kind == 'operation' else 'node'} {question.place}: "
            f"{', '.join(decision.chosen)}"
        )

    @torch.no_grad()
    def _score(self, validation: Loader) -> Score:
        """The supernet as it stands, in evaluation mode, on the same images for every candidate.

        Every image counts once, on whichever rank it is, so all ranks get the same score.
        """
        meter = Meter(self.device)
        self.step.network.eval()
        for images, labels in validation.epoch(self.progress.round):
            if len(labels):
                loss, logits = self.step.forward(images, labels)
                meter.add(WEIGHTS, loss, logits, labels)
            self._stop.settle()
            self._raise_if_stopped()
        self.step.network.train()
        found = self.ranks.total(meter.sums[WEIGHTS]).tolist()
        loss_sum, correct, count = found[LOSS], found[CORRECT], found[IMAGES]
        if not math.isfinite(loss_sum):
            message = "the loss of the supernet is not finite: it cannot be selected from"
            raise self.ranks.agreed(RunError(message))
        return Score(correct / count, loss_sum / count)

    def _raise_if_stopped(self) -> None:
        if self._stop.signum is not None:
            raise Interrupted(self._stop.signum)

    def _tune_epoch(self, train: Loader) -> None:
        """An epoch of the weights at a constant, small learning rate, without skip dropout."""
        progress = self.progress
        self.step.set_epoch(TUNING_RATE * self.config.lr, 0.0)
        number = progress.round * self.config.perturbation_epochs + progress.epoch
        interval = self.config.checkpoint_interval
        for images, labels in train.epoch(number, progress.step):
            start = time.perf_counter()
            self.step.weight_step(images, labels, progress.global_step)
            progress.step += 1
            progress.global_step += 1
            progress.epoch_seconds += time.perf_counter() - start
            self.display.advance()
            self._stop.settle()
            stopped = self._stop.signum is not None
            if stopped or (interval > 0 and progress.step % interval == 0):
                self._save()
            self._raise_if_stopped()

    def _write_tuning(self) -> None:
        """The record of a tuning epoch whose steps are all done."""
        seconds, self.progress.epoch_seconds = self.progress.epoch_seconds, 0.0
        self.ranks.collect(self.step.epoch_meter.sums)
        found = self.step.epoch_meter.read()[WEIGHTS]
        self.step.epoch_meter.reset()
        self.metrics.write(
            {
                "kind": "tuning",
                "stage": self.config.stages,
                "epoch": self.progress.round,
                "step": self.progress.global_step,
                "loss": found.loss,
                "accuracy": found.accuracy,
                "lr": TUNING_RATE * self.config.lr,
                "seconds": seconds,
            }
        )

    def _save(self) -> None:
        bad = self.ranks.agree(self.step.bad_step())
        if bad >= 0:
            message = (
                f"the loss or gradient of tuning step {bad} is not finite; the last good "
                f"checkpoint is in {self.run_dir.path / 'checkpoints'}"
            )
            raise self.ranks.agreed(RunError(message))
        collect_state(self.step, self.ranks)
        self.run_dir.checkpoints.save(
            {
                "settings": to_json(self.config),
                "dataset": self._facts,
                "progress": asdict(self.progress),
                "decisions": [decision.to_json() for decision in self.decisions],
                "training": self.step.state_dict(),
                "random": random_state(self.device),
                "files": self.run_dir.file_lengths(),
            }
        )

    def _load(self) -> bool:
        saved = load_matching(self.config, self._facts, self.run_dir)
        torch.manual_seed(self.config.seed)
        if saved is None:
            return False
        self.progress = Progress(**saved["progress"])
        self.decisions = [Decision.from_json(values) for values in saved["decisions"]]
        for decision in self.decisions:
            self.mixing.carry_out(decision)
        self.step.load_state_dict(saved["training"])
        set_random_state(saved["random"], self.device)
        return True

    def _loader(self, half: str, which: int) -> Loader:
        config = self.config
        return ResidentLoader(
            self._dataset.train,
            self._halves[which],
            batch_size=config.batch_size,
            augmentation=Augmentation(config.crop_padding, config.flip, config.cutout),
            mean=self._dataset.mean,
            std=self._dataset.std,
            seed=config.seed,
            stream=f"select-{half}",
            shuffle=True,
            device=self.device,
            rank=self.ranks.rank,
            world_size=self.ranks.size,
        )


def load_supernet(
    config: SearchConfig, num_classes: int, switches: Switches, tensors: dict[str, torch.Tensor]
) -> Network:
    """The supernet of the last stage as the search left it, on the CPU.

    Args:
        config: That of the search.
        num_classes: Of its data set.
        switches: Live ops of the last stage.
        tensors: Content of its ``supernet-stageN.safetensors``.

    Raises:
        RunError: The tensors are of another network.
    """
    network = Network(
        config.channels[-1],
        num_classes,
        config.cells[-1],
        nn.CrossEntropyLoss(),
        switches_normal=switches["normal"],
        switches_reduce=switches["reduce"],
        p=config.skip_dropout[-1],
        backend=config.backend,
    )
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise RunError(f"the saved supernet is of another network: {error}") from error
    return network
