"""The staged search: trains one supernet a stage, drops ops between stages, derives the cell."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pdarts_fast import search_space
from pdarts_fast.capture.cuda import cuda_capture
from pdarts_fast.config import SearchConfig
from pdarts_fast.data import Augmentation, Dataset, Loader, split_indices
from pdarts_fast.data.choose import array_loader, choose_loader
from pdarts_fast.distributed import SINGLE, Ranks
from pdarts_fast.run.clock import CHECKPOINT, LOGGING, VALIDATION, Clock
from pdarts_fast.run.directory import RunDirectory
from pdarts_fast.run.environment import peak_memory_mib
from pdarts_fast.run.progress import Display, RemainingTime
from pdarts_fast.run.signals import StopRequest
from pdarts_fast.run_loop import RunLoop
from pdarts_fast.search_result import write_genotypes, write_stage
from pdarts_fast.search_space import Derivation
from pdarts_fast.search_state import (
    Position,
    SearchState,
    alphas_of,
    alphas_record,
    load_state,
    restore_random,
    save_state,
)
from pdarts_fast.shared_step import collect_state, require_same, share_step
from pdarts_fast.step import WEIGHTS, Meter, SearchStep
from pdarts_fast.strategies.base import Strategy, Trials
from pdarts_fast.supernet import Network


class Search(RunLoop[SearchStep, SearchConfig]):
    """One search in one run directory: the stages of P-DARTS or what its strategy makes of them.

    Args:
        config: A validated configuration.
        dataset: Its training images are split into weight and alpha images.
        run: Open run directory; holds the checkpoint to go on from, if any.
        device: Where the supernet runs.
        display: What the user sees.
        strategy: What it asks where strategies differ.
        ranks: The processes that make this search together.
        clock: Told where the time goes.

    Raises:
        RunError: The checkpoint belongs to other settings.

    Source:
        arXiv 1904.12760, sections 3 and 4.2.
    """

    def __init__(
        self,
        config: SearchConfig,
        dataset: Dataset,
        run: RunDirectory,
        device: torch.device,
        display: Display,
        strategy: Strategy,
        ranks: Ranks = SINGLE,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(config, run, device, display, ranks, clock)
        self.strategy = strategy
        self.dataset = dataset
        self._capture = cuda_capture(device, config.cuda_graphs)
        self._weight_indices, self._alpha_indices = split_indices(
            len(dataset.train), config.data_split
        )
        self._facts = dataset.facts(config.dataset)
        self._loader_name = choose_loader(config.loader, device, files=False)
        saved = load_state(config, self._facts, run)
        self.resumed = saved is not None
        self.state = saved or SearchState(Position(), search_space.all_switches(), [])
        if self.state.strategy:
            strategy.load_state_dict(self.state.strategy)
        steps = -(-len(self._weight_indices) // config.batch_size)
        self._remaining = RemainingTime(config, steps)
        self._start(self.state.position, steps)

    def run(self, stop: StopRequest) -> Derivation:
        """Run what is left of the search.

        Args:
            stop: Looked at after every step; once set, a checkpoint is written and the search
                ends.

        Returns:
            The derived genotypes, which genotype.json holds too.

        Raises:
            Interrupted: `stop` was set; the checkpoint to go on from is there.
            RunError: The loss stopped being a number, or the disk refused.
        """
        self._stop = stop
        try:
            while self.state.position.stage < self.config.stages:
                self._run_stage()
        finally:
            self.metrics.close()
        result = self.strategy.result(self.state.finished)
        return write_genotypes(self.run_dir, self.ranks, result, self.config.max_skips)

    def _run_stage(self) -> None:
        config, position = self.config, self.state.position
        step = self._build_stage()
        weights = self._loader("weights", self._weight_indices)
        alphas = self._loader("alphas", self._alpha_indices)
        while position.epoch < config.epochs:
            self._begin_epoch(step)
            self._train_epoch(step, weights, alphas)
            self._end_epoch(step, self.ranks.without_repeats(alphas, config.batch_size))
        step.close()
        self._end_stage(step.network)

    def _build_stage(self) -> SearchStep:
        """A fresh supernet with its optimisers, or those of the checkpoint."""
        config, state = self.config, self.state
        stage = state.position.stage
        if not self.resumed and stage == 0:
            torch.manual_seed(config.seed)
            np.random.seed(config.seed)
        restore_random(state, self.device)
        network = Network(
            config.channels[stage],
            self.dataset.num_classes,
            config.cells[stage],
            nn.CrossEntropyLoss(),
            switches_normal=state.switches["normal"],
            switches_reduce=state.switches["reduce"],
            p=config.skip_dropout[stage],
            backend=config.backend,
        ).to(self.device)
        network.train()
        resumed = state.stage_state is not None
        self.strategy.start_stage(network, state.switches, resumed=resumed)
        step = SearchStep(network, config, self.device, self.strategy.alpha_term)
        if state.stage_state is not None:
            step.load_state_dict(state.stage_state)
            restore_random(state, self.device)
        state.stage_state = state.random = None
        share_step(step, self.ranks)
        self.ranks.shift_seed(network.dropout_state)
        step.capture_with(self._capture)
        self.display.start_stage(
            stage + 1,
            f"stage {stage + 1}/{config.stages}: {config.cells[stage]} cells, "
            f"{config.ops_kept[stage]} ops an edge, {config.channels[stage]} channels, "
            f"{sum(p.numel() for p in step.weights):,} parameters",
            config.epochs * self._steps_per_epoch,
            state.position.epoch * self._steps_per_epoch + state.position.step,
        )
        return step

    def _loader(self, half: str, indices: np.ndarray) -> Loader:
        config = self.config
        return array_loader(
            self._loader_name,
            self.dataset.train,
            indices,
            batch_size=config.batch_size,
            augmentation=Augmentation(config.crop_padding, config.flip, config.cutout),
            mean=self.dataset.mean,
            std=self.dataset.std,
            seed=config.seed,
            stream=f"stage{self.state.position.stage}-{half}",
            shuffle=True,
            device=self.device,
            workers=config.workers,
            rank=self.ranks.rank,
            world_size=self.ranks.size,
        )

    def _begin_epoch(self, step: SearchStep) -> None:
        """Let the strategy change the supernet, if no step of the epoch is done; set the rates."""
        position = self.state.position
        if position.step == 0:
            start = time.perf_counter()
            trials = Trials(self._trial_batches, self.ranks, self._settle_and_raise)
            changes = self._write_records(self.strategy.begin_epoch(position.epoch, step, trials))
            if changes:
                require_same(step.network, self.ranks)
            position.stage_seconds += time.perf_counter() - start
        self.strategy.set_epoch(position.epoch)
        rates = self._rates()
        step.set_epoch(rates["lr"], rates["dropout"])

    def _trial_batches(self, number: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        loader = self._loader("trials", self._weight_indices)
        counts = self.ranks.shard.own_of_batches(loader.num_images, self.config.batch_size)
        for own, (images, labels) in zip(counts, loader.epoch(number), strict=True):
            yield images, labels, own

    def _write_records(self, records: Iterable[dict[str, Any]]) -> int:
        """Write what a strategy has to say; how many records that was."""
        written = 0
        for record in records:
            self.metrics.write({"kind": record["kind"], **self._where(), **record})
            written += 1
        return written

    def _alpha_batches(self, loader: Loader) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the alpha half without end, from where the current step needs them."""
        position = self.state.position
        epochs = position.epoch - self.config.warmup_epochs
        done = epochs * self._steps_per_epoch + position.step
        passes, start = divmod(done, len(loader))
        while True:
            yield from loader.epoch(passes, start)
            passes, start = passes + 1, 0

    def _train_epoch(self, step: SearchStep, weights: Loader, alphas: Loader) -> None:
        position = self.state.position
        trains_alphas = position.epoch >= self.config.warmup_epochs
        alpha_batches = self._alpha_batches(alphas) if trains_alphas else repeat(None)
        self._run_steps(
            step,
            zip(weights.epoch(position.epoch, position.step), alpha_batches, strict=False),
            lambda batch: step.run(batch[0], batch[1], position.global_step),
        )

    def _save(self, step: SearchStep | None) -> None:
        if step is not None:
            collect_state(step, self.ranks)
        self.state.strategy = self.strategy.state_dict()
        save_state(self.state, step, self.config, self._facts, self.run_dir, self.device)

    def _part(self) -> str:
        return f" (stage {self.state.position.stage + 1})"

    def _where(self) -> dict[str, int]:
        at = self.state.position
        return {"stage": at.stage + 1, "epoch": at.epoch, "step": at.global_step}

    def _rates(self) -> dict[str, float]:
        stage, epoch = self.state.position.stage, self.state.position.epoch
        rates = {"lr": self.strategy.learning_rate(epoch)}
        return rates | {"dropout": self.strategy.skip_dropout(stage, epoch)}

    def _log_interval(self, step: SearchStep) -> None:
        config, position = self.config, self.state.position
        seconds = self._interval_seconds(step)
        weights, alphas = self._take(step.interval_meter)
        speed = (weights.images + alphas.images) / seconds
        passes = sum(-(-part.images // config.batch_size) for part in (weights, alphas))
        self._remaining.add(position.stage, passes, seconds)
        self.metrics.write(
            {
                "kind": "interval",
                **self._where(),
                "loss": weights.loss,
                "accuracy": weights.accuracy,
                "alpha_loss": alphas.loss,
                "alpha_accuracy": alphas.accuracy,
                **self._rates(),
                "images_per_second": speed,
                "seconds": seconds,
            }
        )
        etas = self._remaining.left(position.stage, position.epoch, position.step)
        self._report(weights, speed, etas, position.stage + 1, config.stages)

    def _end_epoch(self, step: SearchStep, alphas: Loader) -> None:
        """Write the records of an epoch whose steps are all done, and validate if it is time.

        The checkpoint of the epoch's last step was taken before: a search that is killed in here
        goes on at the beginning of this method.
        """
        position = self.state.position
        weights, alpha = self._take(step.epoch_meter)
        trained = alphas_of(step.network)
        switches, values = self.strategy.visible(self.state.switches, trained)
        self.metrics.write(
            {
                "kind": "epoch",
                **self._where(),
                "train_loss": weights.loss,
                "train_accuracy": weights.accuracy,
                "alpha_loss": alpha.loss,
                "alpha_accuracy": alpha.accuracy,
                **self._rates(),
                "entropy_normal": search_space.entropy(values["normal"]),
                "entropy_reduce": search_space.entropy(values["reduce"]),
                "images_per_second": (weights.images + alpha.images) / position.epoch_seconds,
                "seconds": position.epoch_seconds,
                "overhead_seconds": position.overhead_seconds,
                "peak_memory_mib": peak_memory_mib(self.device),
            }
        )
        self.run_dir.alphas.write(alphas_record(position, switches, values))
        self._write_records(self.strategy.end_epoch(self.state.switches, trained))
        self.clock.lap(LOGGING)
        if position.epoch >= self.config.epochs - self.config.validation_epochs:
            self._validate(step, alphas)
        position.epoch += 1
        position.step = 0
        position.epoch_seconds = position.overhead_seconds = 0.0

    @torch.no_grad()
    def _validate(self, step: SearchStep, alphas: Loader) -> None:
        """Evaluate the supernet on the alpha half, augmented as in training (the paper's way)."""
        start = time.perf_counter()
        meter = Meter(self.device)
        self.ranks.average_statistics(step.network)
        step.network.eval()
        for images, labels in alphas.epoch(self.config.epochs + self.state.position.epoch):
            if len(labels):
                loss, logits = step.forward(images, labels)
                meter.add(WEIGHTS, loss, logits, labels)
            self._settle_and_raise()
        step.network.train()
        result = self._take(meter)[WEIGHTS]
        seconds = time.perf_counter() - start
        self.clock.lap(VALIDATION)
        self.state.position.stage_seconds += seconds
        self.metrics.write(
            {
                "kind": "validation",
                **self._where(),
                "loss": result.loss,
                "accuracy": result.accuracy,
                "images": result.images,
                "seconds": seconds,
            }
        )
        self.display.message(
            f"  epoch {self.state.position.epoch + 1}: validation accuracy "
            f"{100 * (result.accuracy or 0.0):.1f}% on the alpha half"
        )

    def _end_stage(self, network: Network) -> None:
        config, state = self.config, self.state
        position = state.position
        stage = position.stage
        dropped = config.ops_kept[stage] - (*config.ops_kept, 1)[stage + 1]
        self.metrics.write(
            {
                "kind": "stage",
                "stage": stage + 1,
                "epoch": position.epoch - 1,
                "step": position.global_step,
                "cells": config.cells[stage],
                "ops": config.ops_kept[stage],
                "channels": config.channels[stage],
                "epochs": config.epochs,
                "parameters": sum(p.numel() for p in network.weight_parameters()),
                "seconds": position.stage_seconds,
                "dropped": dropped,
            }
        )
        values = alphas_of(network)
        state.finished.append(values)
        write_stage(self.run_dir, self.ranks, stage, network, state.finished)
        if stage + 1 < config.stages:
            state.switches = search_space.drop_ops(state.switches, values, dropped)
        position.stage += 1
        position.epoch = position.step = 0
        position.stage_seconds = 0.0
        self._save(None)
        self.clock.lap(CHECKPOINT)
        self._settle_and_raise()
