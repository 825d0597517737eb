"""The training of a derived network: epochs, evaluations, checkpoints."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pdarts_fast.capture.cuda import cuda_capture
from pdarts_fast.cost import count_parameters
from pdarts_fast.data.plan import keyed_generator
from pdarts_fast.distributed import SINGLE, Ranks
from pdarts_fast.errors import RunError
from pdarts_fast.genotype import Genotype, check_genotype
from pdarts_fast.run.checkpoint import random_state, set_random_state
from pdarts_fast.run.clock import CHECKPOINT, LOGGING, VALIDATION, Clock
from pdarts_fast.run.directory import RunDirectory
from pdarts_fast.run.environment import peak_memory_mib
from pdarts_fast.run.progress import Display
from pdarts_fast.run.resume import load_matching
from pdarts_fast.run.signals import StopRequest
from pdarts_fast.run_loop import RunLoop
from pdarts_fast.scoring import Scores, score
from pdarts_fast.settings import to_json
from pdarts_fast.shared_step import collect_state, require_same, share_step
from pdarts_fast.step import WEIGHTS
from pdarts_fast.train_config import TrainConfig
from pdarts_fast.train_data import TrainData
from pdarts_fast.train_schedule import drop_path, learning_rate
from pdarts_fast.train_step import TrainStep
from pdarts_fast.trained import WEIGHT_FILES, NetworkSpec, save_weights


@dataclass
class Progress:
    """Where a training run stands; all counts are of what is done.

    Attributes:
        epoch: 0-based epoch; equal to the number of epochs when the training is over.
        step: Steps done in the epoch.
        global_step: Steps done in all.
        epoch_seconds: Time spent on the steps of this epoch.
        interval_seconds: Time spent on steps since the last interval record.
        overhead_seconds: Time of this epoch spent on loading, logging and checkpoints.
        seconds: Time spent on steps and evaluations.
        best_epoch: Epoch after which the test accuracy was highest (the first of equals), or -1.
        best_accuracy: That accuracy, 0 to 1.
    """

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    epoch_seconds: float = 0.0
    interval_seconds: float = 0.0
    seconds: float = 0.0
    best_epoch: int = -1
    best_accuracy: float = 0.0
    overhead_seconds: float = 0.0

    def add_seconds(self, seconds: float) -> None:
        """Count time spent on a training step."""
        self.epoch_seconds += seconds
        self.interval_seconds += seconds
        self.seconds += seconds


class Training(RunLoop[TrainStep, TrainConfig]):
    """One training run in one run directory.

    Args:
        config: A validated configuration.
        genotype: The cells.
        data: Training and test images.
        run: Open run directory; holds the checkpoint to go on from, if any.
        device: Where the network runs.
        display: What the user sees.
        ranks: The processes that make this training together.
        clock: Told where the time goes.

    Raises:
        RunError: The checkpoint belongs to other settings, another cell or other images.

    Source:
        arXiv 1904.12760, sections 4.2.2 and 4.3.
    """

    def __init__(
        self,
        config: TrainConfig,
        genotype: Genotype,
        data: TrainData,
        run: RunDirectory,
        device: torch.device,
        display: Display,
        ranks: Ranks = SINGLE,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(config, run, device, display, ranks, clock)
        self.data = data
        self.spec = NetworkSpec(
            config.network,
            config.channels,
            config.cells,
            data.num_classes,
            config.auxiliary,
            genotype,
        )
        self._saved = self._load()
        self.resumed = self._saved is not None
        self.progress = Progress(**self._saved["progress"]) if self._saved else Progress()
        self._start(self.progress, len(data.train))
        self._first_step, self._first_seconds = self.progress.global_step, self.progress.seconds

    def run(self, stop: StopRequest) -> Progress:
        """Run what is left of the training.

        Args:
            stop: Looked at after every step; once set, a checkpoint is written and the training
                ends.

        Returns:
            The final state, with the best accuracy.

        Raises:
            Interrupted: `stop` was set; the checkpoint to go on from is there.
            RunError: The loss stopped being a number, or the disk refused.
        """
        self._stop = stop
        config, progress = self.config, self.progress
        step = self._build()
        try:
            while progress.epoch < config.epochs:
                step.set_epoch(**self._rates())
                self._train_epoch(step)
                self._end_epoch(step)
            require_same(step.network, self.ranks)
        finally:
            self.metrics.close()
        step.close()
        return progress

    def _load(self) -> dict[str, Any] | None:
        saved = load_matching(self.config, self.data.facts, self.run_dir)
        if saved is not None and check_genotype(saved["genotype"]) != self.spec.genotype:
            raise RunError(
                f"the checkpoint in {self.run_dir.path} is of another cell: leave --genotype out "
                "to resume, or give another --run-dir"
            )
        return saved

    def _build(self) -> TrainStep:
        """A fresh network with its optimiser, or those of the checkpoint."""
        config, progress = self.config, self.progress
        torch.manual_seed(config.seed)
        network = self.spec.build().to(self.device)
        network.train()
        network.use_backend(config.backend)
        step = TrainStep(network, config, self.device)
        if self._saved is not None:
            step.load_state_dict(self._saved["training"])
        self._share(step)
        self._saved = None
        step.capture_with(cuda_capture(self.device, config.cuda_graphs))
        self.display.start_stage(
            1,
            f"training: {config.cells} cells, {config.channels} channels, "
            f"{count_parameters(network):,} parameters, {self.data.train.num_images:,} images",
            config.epochs * self._steps_per_epoch,
            progress.global_step,
        )
        return step

    def _share(self, step: TrainStep) -> None:
        """Make a step, new or from the checkpoint, one that several ranks do together.

        Drop-path draws from torch's generator: each rank has a sequence of its own.
        """
        ranks, saved = self.ranks, self._saved
        states = [] if saved is None else [saved["random"], *saved.get("random_of_others", [])]
        if ranks.rank < len(states):
            set_random_state(states[ranks.rank], self.device)
        elif ranks.rank:
            keys = (self.config.seed, self.progress.global_step, "drop-path", ranks.rank)
            torch.manual_seed(int(keyed_generator(*keys).integers(2**63)))
        share_step(step, ranks)

    def _train_epoch(self, step: TrainStep) -> None:
        progress = self.progress
        self._run_steps(
            step,
            self.data.train.epoch(progress.epoch, progress.step),
            lambda batch: step.run(batch[0], batch[1], progress.global_step),
        )

    def _save(self, step: TrainStep) -> None:
        collect_state(step, self.ranks)
        random = self.ranks.gather(random_state(self.device))
        self.run_dir.checkpoints.save(
            {
                "settings": to_json(self.config),
                "dataset": self.data.facts,
                "genotype": self.spec.genotype._asdict(),
                "progress": asdict(self.progress),
                "training": step.state_dict(),
                "random": random[0],
                "random_of_others": random[1:],
                "files": self.run_dir.file_lengths(),
            }
        )

    def _where(self) -> dict[str, int]:
        return {"epoch": self.progress.epoch, "step": self.progress.global_step}

    def _rates(self) -> dict[str, float]:
        epoch = self.progress.epoch
        return {
            "lr": learning_rate(self.config, epoch),
            "drop_path": drop_path(self.config, epoch),
        }

    def _log_interval(self, step: TrainStep) -> None:
        seconds = self._interval_seconds(step)
        average = self._take(step.interval_meter)[WEIGHTS]
        speed = average.images / seconds
        self.metrics.write(
            {
                "kind": "interval",
                **self._where(),
                "loss": average.loss,
                "accuracy": average.accuracy,
                **self._rates(),
                "images_per_second": speed,
                "seconds": seconds,
            }
        )
        left = self._seconds_left()
        self._report(average, speed, (left, left))

    def _seconds_left(self) -> float:
        """Time left at the speed of this process so far, its evaluations included."""
        progress = self.progress
        done = progress.global_step - self._first_step
        left = self.config.epochs * self._steps_per_epoch - progress.global_step
        return (progress.seconds - self._first_seconds) / done * left

    def _end_epoch(self, step: TrainStep) -> None:
        """Write the records of an epoch whose steps are all done, and evaluate if it is time.

        The checkpoint of the epoch's last step was taken before: a run that is killed in here
        goes on at the beginning of this method.
        """
        config, progress = self.config, self.progress
        average = self._take(step.epoch_meter)[WEIGHTS]
        self.metrics.write(
            {
                "kind": "epoch",
                **self._where(),
                "train_loss": average.loss,
                "train_accuracy": average.accuracy,
                **self._rates(),
                "images_per_second": average.images / progress.epoch_seconds,
                "seconds": progress.epoch_seconds,
                "overhead_seconds": progress.overhead_seconds,
                "peak_memory_mib": peak_memory_mib(self.device),
            }
        )
        self.clock.lap(LOGGING)
        last = progress.epoch + 1 == config.epochs
        if last or (progress.epoch + 1) % config.validation_interval == 0:
            self._validate(step)
        progress.epoch += 1
        progress.step = 0
        progress.epoch_seconds = progress.overhead_seconds = 0.0
        if last:
            self._save(step)
        self.clock.lap(CHECKPOINT)

    def _validate(self, step: TrainStep) -> None:
        """Evaluate on the test images and keep the weights, also apart if they are the best."""
        progress = self.progress
        start = time.perf_counter()
        self.ranks.average_statistics(step.network)
        scores = score(
            step.network,
            self.ranks.without_repeats(self.data.test, self.config.batch_size),
            self.data.num_classes,
            amp=self.config.amp,
            memory_format=step.memory_format,
            each_batch=self._settle_and_raise,
            total=self.ranks.total,
        )
        seconds = time.perf_counter() - start
        self.clock.lap(VALIDATION)
        progress.seconds += seconds
        self.metrics.write(
            {
                "kind": "validation",
                **self._where(),
                "loss": scores.loss,
                "accuracy": scores.accuracy,
                "top5_accuracy": scores.top5_accuracy,
                "images": scores.images,
                "seconds": seconds,
            }
        )
        self._write_weights("last", step, scores)
        if progress.best_epoch < 0 or scores.accuracy > progress.best_accuracy:
            progress.best_epoch, progress.best_accuracy = progress.epoch, scores.accuracy
            self._write_weights("best", step, scores)
        self.display.message(
            f"  epoch {progress.epoch + 1}: test accuracy {100 * scores.accuracy:.2f}% "
            f"(best {100 * progress.best_accuracy:.2f}%, epoch {progress.best_epoch + 1})"
        )

    def _write_weights(self, which: str, step: TrainStep, scores: Scores) -> None:
        if not self.run_dir.writes:
            return
        facts = {
            "epoch": self.progress.epoch,
            "accuracy": scores.accuracy,
            "loss": scores.loss,
            "dataset": self.data.facts,
        }
        save_weights(self.run_dir.path / WEIGHT_FILES[which], step.network, self.spec, facts)
