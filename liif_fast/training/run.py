"""A training run from a configuration: the original's loop of epochs, resumable, on one process or several."""

from __future__ import annotations

import inspect
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from liif_fast import data, evaluation
from liif_fast.data import Item
from liif_fast.models import checkpoints, make_model
from liif_fast.training import state as states
from liif_fast.training.config import OPTIMIZERS, Config, ConfigError
from liif_fast.training.log import RunLog
from liif_fast.training.state import RunState
from liif_fast.training.step import StepOptions, Stepper
from liif_fast.utils import distributed
from liif_fast.utils.files import write_atomically

UNIT_NORM = {side: {"sub": [0.0], "div": [1.0]} for side in ("inp", "gt")}  # where a configuration has no data_norm
MAX_WORKERS = 8  # as many as the original starts


class TrainingError(RuntimeError):
    """A run that cannot go on; the message is one sentence."""


def train(
    config: Config,
    folder: str | Path,
    *,
    resume: str | Path | None = None,
    device: str | torch.device | None = None,
    source: str = "the configuration",
    report: Callable[[str], None] = print,
) -> Path:
    """Train as a configuration says and return the run's folder, which holds what `training.state` and `.log` name.

    config: as `config.load` returns it, checked. folder: of this run; one that exists is only gone on with (resume).
    resume: 'auto' goes on where the folder stands; a file is a state.pth or a checkpoint of the original's.
    device: 'cpu', 'cuda', ...; None takes a GPU where there is one. source: the configuration's name for messages.
    Under torchrun all processes call this; the first one writes.
    Raises ValueError for a bad configuration, folder or file, TrainingError when the loss is no number any more.
    """
    with distributed.setup(device) as place:
        run = _Run(config, Path(folder), resume or config.get("resume"), place, source, report)
        try:
            run.go()
        finally:
            run.close()
    return Path(folder)


class _Run:
    """One run: what it is made of and where it stands."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        resume: str | Path | None,
        device: torch.device,
        source: str,
        report: Callable[[str], None],
    ) -> None:
        self.config, self.folder, self.device = config, folder, device
        start = states.starting_point(folder, resume)
        distributed.barrier()  # every process has looked at the folder before the first one makes it
        self.seed = config.get("seed") or 0
        _seed_everything(self.seed)
        self.model = _build_model(config, source).to(device)
        _seed_everything(self.seed + distributed.rank())  # the same weights everywhere, but not the same dropout
        section = config["optimizer"]
        self.optimizer = OPTIMIZERS[section["name"]](self.model.parameters(), **(section.get("args") or {}))
        self.scheduler = _scheduler(config, self.optimizer)
        ddp = distributed.world_size() > 1
        options = StepOptions.from_config(config)
        self.train_loader, self.val_loader = self._loaders(source)
        self.epoch, self.best, self.seconds = 0, -math.inf, 0.0
        self.history: list[Mapping[str, float]] = []
        found: RunState | None = None
        if start is not None:
            found = states.load_state(start)
            states.check_same(found, self.model.spec, section, start)
            self.model.load_state_dict(found.model["sd"])
        # Formats and copies of the weights are made from the weights with which the run goes on.
        try:
            self.stepper = Stepper(self.model, self.optimizer, options, self.model.data_norm, ddp=ddp)
        except ValueError as error:
            raise ConfigError(f"{source}: {error}") from None
        if found is not None:
            self._restore(found)
        self.log = self._open(report)
        if found is not None:
            self.line(f"resumed from {start} after epoch {self.epoch}")
            self._export(found)  # a kill may have come between the state and what follows from it

    def _loaders(self, source: str) -> tuple[Any, Any]:
        """Loaders of training and validation; the latter None where the configuration has none."""
        config, rank, world = self.config, distributed.rank(), distributed.world_size()
        found: list[Any] = []
        for key in ("train_dataset", "val_dataset"):
            section = config.get(key)
            if section is None:
                found.append(None)
                continue
            workers = section.get("num_workers", config.get("num_workers"))
            if workers is None:
                workers = min(MAX_WORKERS, os.cpu_count() or 1)
            kind: dict[str, Any] = {"shuffle": True} if key == "train_dataset" else {"split": "items"}
            try:
                loader = data.make_loader(
                    section, seed=self.seed, rank=rank, world=world, workers=workers, device=self.device, **kind
                )
            except ValueError as error:
                raise ConfigError(f"{source}: {key}: {error}") from None
            if key == "train_dataset" and len(loader) == 0:
                raise ConfigError(f"{source}: {key} has no batch of items for {world} processes")
            found.append(loader)
        return found[0], found[1]

    def _open(self, report: Callable[[str], None]) -> RunLog | None:
        """Make the folder, write the configuration, open the log: in the first process."""
        if not distributed.is_main():
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            left.unlink()
        write_atomically(self.folder / "config.yaml", yaml.safe_dump(self.config, sort_keys=False).encode())
        return RunLog(
            self.folder,
            tensorboard=self.config.get("tensorboard"),
            plots=self.config.get("plots"),
            report=report,
            epoch=self.epoch,
        )

    def line(self, text: str) -> None:
        if self.log is not None:
            self.log.line(text)

    def close(self) -> None:
        if self.log is not None:
            self.log.close()

    def go(self) -> None:
        """Epochs until the last one; each of them ends with everything on disk."""
        config, last = self.config, self.config["epoch_max"]
        parameters = sum(each.numel() for each in self.model.parameters())
        if not self.epoch:
            self.line(f"model: {self.model.spec['name']}, {parameters:,} parameters, on {self.device}")
        while self.epoch < last:
            begin = time.monotonic()
            epoch = self.epoch + 1
            lr = self.optimizer.param_groups[0]["lr"]
            loss, images = self._train_epoch(epoch)
            spent = time.monotonic() - begin
            if self.scheduler is not None:
                self.scheduler.step()
            row = {"epoch": epoch, "lr": lr, "loss": loss, "images_per_second": images / spent}
            validates = self.val_loader is not None and config.get("epoch_val") and epoch % config["epoch_val"] == 0
            if validates:
                row["psnr"] = self._validate()
            self.epoch, self.best = epoch, max(self.best, row.get("psnr", -math.inf))
            row["seconds"] = self.seconds = self.seconds + time.monotonic() - begin
            self.history.append(row)
            self._save()
            self.line(self._describe(row))
            if self.log is not None and (validates or epoch == last):
                self.log.draw(self.history)

    def _train_epoch(self, epoch: int) -> tuple[float, int]:
        """One pass over the training items: (mean loss over all processes, images)."""
        self.model.train()
        total, images = 0.0, 0.0
        pending: tuple[Tensor, Item] | None = None  # a loss is read while the next step runs, so no step waits for it
        for batch in self._progress(self.train_loader.epoch(epoch), len(self.train_loader), f"epoch {epoch}"):
            loss = self.stepper.step(batch)
            if pending is not None:
                total += self._checked(*pending)
            pending = (loss, batch)
            images += batch["inp"].shape[0]
        assert pending is not None
        total += self._checked(*pending)
        total, images = distributed.sum_over_ranks([total, images])
        return total / images, int(images)

    def _checked(self, loss: Tensor, batch: Item) -> float:
        """The loss times the images of its batch; TrainingError, with the batch saved, where it is no number."""
        value = loss.item()
        if math.isfinite(value):
            return value * batch["inp"].shape[0]
        name = f"bad-batch-rank{distributed.rank()}.pth"
        states.save_torch({key: tensor.cpu() for key, tensor in batch.items()}, self.folder / name)
        raise TrainingError(
            f"the loss is {value} in epoch {self.epoch + 1}: the batch is saved as {self.folder / name}; go on from "
            "the last epoch with a lower learning rate, clip_grad or without autocast"
        )

    def _progress(self, batches: Iterator[Item], count: int, title: str) -> Iterator[Item]:
        quiet = not distributed.is_main() or not sys.stderr.isatty()
        return tqdm(batches, total=count, desc=title, unit="batch", leave=False, disable=quiet)

    def _validate(self) -> float:
        """Mean PSNR over the validation items of all processes; of the averaged weights where the run keeps them."""
        config = self.config
        found = (0.0, 0)
        if len(self.val_loader):  # with more processes than items some have none
            found = evaluation.eval_psnr_sum(
                self.val_loader,
                self.evaluated,
                data_norm=self.model.data_norm,
                eval_type=config.get("eval_type"),
                eval_bsize=config.get("eval_bsize"),
            )
        total, count = distributed.sum_over_ranks(found)
        return total / count

    @property
    def evaluated(self) -> nn.Module:
        """The model that is validated and exported."""
        return self.stepper.average.model if self.stepper.average is not None else self.model

    def _save(self) -> None:
        """Everything after an epoch, state.pth first."""
        everyone = distributed.gather(states.random_states())
        if self.log is None:
            return
        average = self.stepper.average
        state = RunState(
            epoch=self.epoch,
            model=states.with_weights(self.model.spec, self.model),
            optimizer=states.with_weights(self.config["optimizer"], self.optimizer),
            scaler=self.stepper.scaler.state_dict(),
            average=average.model.state_dict() if average is not None else None,
            best=self.best,
            steps=self.stepper.steps,
            seconds=self.seconds,
            history=self.history,
            random=everyone,
        )
        states.save_state(state, self.folder)
        self._export(state)

    def _export(self, state: RunState) -> None:
        """The files that follow from the state after an epoch."""
        if self.log is None:
            return
        states.save_checkpoint(state, self.folder / "epoch-last.pth")
        states.save_model(self.evaluated, self.folder / "epoch-last.safetensors")
        if state.history and state.history[-1].get("psnr") == state.best:
            states.save_checkpoint(state, self.folder / "epoch-best.pth", self.evaluated)
            states.save_model(self.evaluated, self.folder / "epoch-best.safetensors")
        every = self.config.get("epoch_save")
        if every and self.epoch % every == 0:
            states.save_checkpoint(state, self.folder / f"epoch-{self.epoch}.pth")
        if state.history:
            self.log.epoch(state.history)

    def _restore(self, found: RunState) -> None:
        """Go on from a state; one in the original's dictionary says less, and the rest begins anew."""
        self.optimizer.load_state_dict(found.optimizer["sd"])
        self.epoch, self.seconds = found.epoch, found.seconds
        self.best = -math.inf if found.best is None else found.best
        self.history = list(found.history)
        self.stepper.steps = found.steps
        if self.stepper.average is not None and found.average is not None:
            self.stepper.average.model.load_state_dict(found.average)
        if found.scaler:
            self.stepper.scaler.load_state_dict(found.scaler)
        if self.scheduler is not None:
            # What the optimizer holds is the rate after the epoch's step; only the count of epochs is missing.
            self.scheduler.last_epoch = found.epoch
            self.scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        if len(found.random) == distributed.world_size():
            states.restore_random_states(found.random[distributed.rank()])

    def _describe(self, row: Mapping[str, float]) -> str:
        last, done = self.config["epoch_max"], self.epoch
        parts = [f"epoch {done}/{last}", f"train: loss={row['loss']:.4f}"]
        if "psnr" in row:
            parts.append(f"val: psnr={row['psnr']:.4f}")
        spent = f"{_time(self.seconds)}/{_time(self.seconds / done * last)}"
        return ", ".join([*parts, f"{row['images_per_second']:.1f} images/s", spent])


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (users' code may draw from it)
    torch.manual_seed(seed)


def _build_model(config: Config, source: str) -> Any:
    """The configuration's model, with its normalisation, backend and, for `init`, weights."""
    try:
        model: Any = make_model(config["model"])
        inspect.signature(model.forward).bind("inp", "coord", "cell")
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: model: {config['model']['name']} cannot be trained: {error}") from None
    model.data_norm = config.get("data_norm") or UNIT_NORM
    model.backend = config.get("backend")
    if config.get("init"):
        weights = checkpoints.load(config["init"])
        try:
            model.load_state_dict(weights.state_dict())
        except RuntimeError:
            raise ConfigError(f"{source}: init: the weights of {config['init']} do not fit this model") from None
    return model


def _scheduler(config: Config, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.MultiStepLR | None:
    section = config.get("multi_step_lr")
    if section is None:
        return None
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, section["milestones"], section.get("gamma") or 0.1)


def _time(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f}h"
    return f"{seconds / 60:.1f}m" if seconds >= 60 else f"{seconds:.1f}s"
