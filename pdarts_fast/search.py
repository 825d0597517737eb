"""The staged search: trains one supernet a stage, drops ops between stages, derives the cell."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pdarts_fast import search_space
from pdarts_fast.alphas import save_alphas
from pdarts_fast.config import SearchConfig
from pdarts_fast.data import Augmentation, Dataset, Loader, ResidentLoader, split_indices
from pdarts_fast.errors import RunError
from pdarts_fast.run.directory import RunDirectory
from pdarts_fast.run.environment import peak_memory_mib
from pdarts_fast.run.metrics import MetricsLog
from pdarts_fast.run.progress import Display, RemainingTime, Status
from pdarts_fast.run.signals import Interrupted, StopRequest
from pdarts_fast.search_result import write_genotypes, write_supernet
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
from pdarts_fast.step import WEIGHTS, Meter, SearchStep
from pdarts_fast.strategies.base import Strategy
from pdarts_fast.supernet import Network


class Search:
    """One search in one run directory: the stages of P-DARTS or what its strategy makes of them.

    Args:
        config: A validated configuration.
        dataset: Its training images are split into weight and alpha images.
        run: Open run directory; holds the checkpoint to go on from, if any.
        device: Where the supernet runs.
        display: What the user sees.
        strategy: What it asks where strategies differ.

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
    ) -> None:
        self.config = config
        self.strategy = strategy
        self.dataset = dataset
        self.run_dir = run
        self.device = device
        self.display = display
        self._weight_indices, self._alpha_indices = split_indices(
            len(dataset.train), config.data_split
        )
        self._facts = dataset.facts(config.dataset)
        saved = load_state(config, self._facts, run)
        self.resumed = saved is not None
        self.state = saved or SearchState(Position(), search_space.all_switches(), [])
        if self.state.strategy:
            strategy.load_state_dict(self.state.strategy)
        self.metrics = MetricsLog(
            run.metrics,
            run.path / "tensorboard" if config.tensorboard else None,
            self.state.position.global_step,
        )
        steps = -(-len(self._weight_indices) // config.batch_size)
        self._remaining = RemainingTime(config, steps)
        self._steps_per_epoch = steps
        self._stop = StopRequest()

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
        return write_genotypes(self.run_dir.path, result, self.config.max_skips)

    def _run_stage(self) -> None:
        config, position = self.config, self.state.position
        step = self._build_stage()
        weights = self._loader("weights", self._weight_indices)
        alphas = self._loader("alphas", self._alpha_indices)
        while position.epoch < config.epochs:
            self._begin_epoch(step)
            self._train_epoch(step, weights, alphas)
            self._end_epoch(step, alphas)
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
        return ResidentLoader(
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
        )

    def _begin_epoch(self, step: SearchStep) -> None:
        """Let the strategy change the supernet, if no step of the epoch is done; set the rates."""
        position = self.state.position
        if position.step == 0:
            start = time.perf_counter()
            self._write_records(
                self.strategy.begin_epoch(position.epoch, step, self._trial, self._raise_if_stopped)
            )
            position.stage_seconds += time.perf_counter() - start
        self.strategy.set_epoch(position.epoch)
        rates = self._rates()
        step.set_epoch(rates["lr"], rates["dropout"])

    def _trial(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self._loader("trials", self._weight_indices).epoch(number)

    def _write_records(self, records: Iterable[dict[str, Any]]) -> None:
        for record in records:
            self.metrics.write({"kind": record["kind"], **self._where(), **record})

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
        config, position = self.config, self.state.position
        trains_alphas = position.epoch >= config.warmup_epochs
        alpha_batches = self._alpha_batches(alphas) if trains_alphas else None
        last = time.perf_counter()
        for images, labels in weights.epoch(position.epoch, position.step):
            if alpha_batches is not None:
                step.alpha_step(*next(alpha_batches), position.global_step)
            step.weight_step(images, labels, position.global_step)
            position.step += 1
            position.global_step += 1
            now = time.perf_counter()
            position.add_seconds(now - last)
            last = now
            self.display.advance()
            if position.step % config.log_interval == 0 or position.step == self._steps_per_epoch:
                self._log_interval(step)
            self._stop_or_save(step)

    def _stop_or_save(self, step: SearchStep) -> None:
        """Write a checkpoint if it is time for one or the search was asked to stop."""
        config, position = self.config, self.state.position
        interval = config.checkpoint_interval
        at_end = position.step == self._steps_per_epoch
        due = at_end or (interval > 0 and position.step % interval == 0)
        if due or self._stop.signum is not None:
            self._require_finite(step)
            self._save(step)
        self._raise_if_stopped()

    def _save(self, step: SearchStep | None) -> None:
        self.state.strategy = self.strategy.state_dict()
        save_state(self.state, step, self.config, self._facts, self.run_dir, self.device)

    def _raise_if_stopped(self) -> None:
        if self._stop.signum is not None:
            raise Interrupted(self._stop.signum)

    def _require_finite(self, step: SearchStep) -> None:
        """Refuse to go on, and to overwrite a good checkpoint, after a loss that is no number."""
        bad = int(step.first_bad_step)
        if bad < 0:
            return
        raise RunError(
            f"the loss or gradient of step {bad} (stage {self.state.position.stage + 1}) is not "
            f"finite; the last good checkpoint is in {self.run_dir.path / 'checkpoints'}; try a "
            "smaller --lr or --grad-clip"
        )

    def _where(self) -> dict[str, int]:
        at = self.state.position
        return {"stage": at.stage + 1, "epoch": at.epoch, "step": at.global_step}

    def _rates(self) -> dict[str, float]:
        stage, epoch = self.state.position.stage, self.state.position.epoch
        rates = {"lr": self.strategy.learning_rate(epoch)}
        return rates | {"dropout": self.strategy.skip_dropout(stage, epoch)}

    def _log_interval(self, step: SearchStep) -> None:
        self._require_finite(step)
        config, position = self.config, self.state.position
        seconds, position.interval_seconds = position.interval_seconds, 0.0
        weights, alphas = step.interval_meter.read()
        step.interval_meter.reset()
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
        stage_eta, search_eta = self._remaining.left(position.stage, position.epoch, position.step)
        self.display.report(
            Status(
                stage=position.stage + 1,
                stages=config.stages,
                epoch=position.epoch + 1,
                epochs=config.epochs,
                step=position.step,
                steps=self._steps_per_epoch,
                loss=weights.loss or 0.0,
                accuracy=weights.accuracy or 0.0,
                images_per_second=speed,
                stage_eta=stage_eta,
                search_eta=search_eta,
            )
        )

    def _end_epoch(self, step: SearchStep, alphas: Loader) -> None:
        """Write the records of an epoch whose steps are all done, and validate if it is time.

        The checkpoint of the epoch's last step was taken before: a search that is killed in here
        goes on at the beginning of this method.
        """
        position = self.state.position
        weights, alpha = step.epoch_meter.read()
        step.epoch_meter.reset()
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
                "peak_memory_mib": peak_memory_mib(self.device),
            }
        )
        self.run_dir.alphas.write(alphas_record(position, switches, values))
        self._write_records(self.strategy.end_epoch(self.state.switches, trained))
        if position.epoch >= self.config.epochs - self.config.validation_epochs:
            self._validate(step, alphas)
        position.epoch += 1
        position.step = 0
        position.epoch_seconds = 0.0

    @torch.no_grad()
    def _validate(self, step: SearchStep, alphas: Loader) -> None:
        """Evaluate the supernet on the alpha half, augmented as in training (the paper's way)."""
        start = time.perf_counter()
        meter = Meter(self.device)
        step.network.eval()
        for images, labels in alphas.epoch(self.config.epochs + self.state.position.epoch):
            loss, logits = step.forward(images, labels)
            meter.add(WEIGHTS, loss, logits, labels)
            self._raise_if_stopped()
        step.network.train()
        result = meter.read()[WEIGHTS]
        seconds = time.perf_counter() - start
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
        write_supernet(self.run_dir.path / f"supernet-stage{stage + 1}.safetensors", network)
        if stage + 1 < config.stages:
            state.switches = search_space.drop_ops(state.switches, values, dropped)
        save_alphas(self.run_dir.path / "alphas.json", state.finished)
        position.stage += 1
        position.epoch = position.step = 0
        position.stage_seconds = 0.0
        self._save(None)
        self._raise_if_stopped()
