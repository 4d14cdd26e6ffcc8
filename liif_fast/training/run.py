"""A training run from a configuration: the original's loop of epochs, resumable, in one process or several."""

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
from liif_fast.models import LIIF, checkpoints, linear_layers, make_model
from liif_fast.training import state as states
from liif_fast.training.bilinear import start_as_bilinear
from liif_fast.training.config import OPTIMIZERS, Config, ConfigError
from liif_fast.training.log import RunLog
from liif_fast.training.state import RunState
from liif_fast.training.step import StepOptions, Stepper
from liif_fast.utils import distributed
from liif_fast.utils.files import write_atomically

UNIT_NORM = {side: {"sub": [0.0], "div": [1.0]} for side in ("inp", "gt")}  # for configurations without data_norm
MAX_WORKERS = 8  # as many as the original starts


class TrainingError(RuntimeError):
    """A run that cannot continue; the message is one sentence."""


@data.explaining_killed_workers()
def train(
    config: Config,
    folder: str | Path,
    *,
    resume: str | Path | None = None,
    device: str | torch.device | None = None,
    source: str = "the configuration",
    report: Callable[[str], None] = print,
) -> Path:
    """Train from a configuration and return the run's folder; `training.state` and `training.log` describe its files.

    config: from `config.load`. folder: of this run; an existing folder needs `resume`.
    resume: 'auto' uses the newest state in the folder; a file is a state.pth or a checkpoint of the original.
    device: 'cpu', 'cuda', ...; None uses a GPU if there is one. source: the configuration's name for messages.
    report: called with every line of the log. Under torchrun all processes call this function; the first one writes.
    Raises ValueError for a bad configuration, folder or file, TrainingError if the loss is not finite.
    """
    with distributed.setup(device) as own_device:
        run = _Run(config, Path(folder), resume or config.get("resume"), own_device, source)
        try:
            run.go(report)
        finally:
            run.close()
    return Path(folder)


class _Run:
    """One run: its model, data, optimizer and progress."""

    def __init__(
        self, config: Config, folder: Path, resume: str | Path | None, device: torch.device, source: str
    ) -> None:
        self.started = time.monotonic()
        self.config, self.folder, self.device, self.source = config, folder, device, source
        self.log: RunLog | None = None
        start = states.starting_point(folder, resume)
        distributed.barrier()  # the first process makes the folder after all processes have checked for it
        self.seed = config.get("seed") or 0
        _seed_everything(self.seed)
        self.model = _build_model(config, source).to(device)
        _seed_everything(self.seed + distributed.rank())  # equal weights in all processes, but different dropout
        section = config["optimizer"]
        self.optimizer = OPTIMIZERS[section["name"]](self.model.parameters(), **(section.get("args") or {}))
        self.train_loader, self.val_loader = (self._loader(key) for key in ("train_dataset", "val_dataset"))
        self.epoch, self.best, self.seconds = 0, -math.inf, 0.0
        self.history: list[Mapping[str, float]] = []
        self.resumed: tuple[Path, RunState] | None = None
        if start is not None:
            found = states.load_state(start)
            states.check_same(found, self.model.spec, section, start)
            self.model.load_state_dict(found.model["sd"])
            self.resumed = start, found
        # The stepper changes memory formats and copies the weights, so it follows the loading of weights.
        ddp = distributed.world_size() > 1
        try:
            self.stepper = Stepper(
                self.model, self.optimizer, StepOptions.from_config(config), self.model.data_norm, ddp=ddp
            )
        except ValueError as error:
            raise ConfigError(f"{source}: {error}") from None

    def _loader(self, key: str) -> Any:
        """The loader of a section, None if the configuration has no such section."""
        config, world = self.config, distributed.world_size()
        section = config.get(key)
        if section is None:
            return None
        options: dict[str, Any] = {"shuffle": True} if key == "train_dataset" else {"split": "items"}
        workers = section.get("num_workers", config.get("num_workers"))
        options["workers"] = min(MAX_WORKERS, os.cpu_count() or 1) if workers is None else workers
        try:
            loader = data.make_loader(
                section, seed=self.seed, rank=distributed.rank(), world=world, device=self.device, **options
            )
        except ValueError as error:
            raise ConfigError(f"{self.source}: {key}: {error}") from error
        self._check_channels(loader, key)
        if key == "train_dataset" and len(loader) == 0:
            raise ConfigError(f"{self.source}: {key} has no batch of items for {world} processes")
        return loader

    def _check_channels(self, loader: Any, key: str) -> None:
        """Raise ConfigError if the model or data_norm is for another number of channels than the items have."""
        channels, model = loader.n_colors, self.model
        if channels is None:
            return
        found = {"the encoder's n_colors": getattr(getattr(model, "encoder", None), "n_colors", channels)}
        if isinstance(model, LIIF) and (layers := linear_layers(model.imnet)):
            found["the imnet's out_dim"] = layers[-1].out_features
        for side, parts in model.data_norm.items():
            found |= {
                f"the length of data_norm.{side}.{part}": len(each) for part, each in parts.items() if len(each) > 1
            }
        for name, number in found.items():
            if number != channels:
                raise ConfigError(f"{self.source}: {key} has {channels} channels, but {name} is {number}: correct it")

    def _open(self, report: Callable[[str], None]) -> None:
        """Create the folder, write the configuration and open the log, in the first process."""
        if not distributed.is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for unfinished in self.folder.glob(".*.tmp"):  # from a process that was killed while it wrote
            unfinished.unlink()
        write_atomically(self.folder / "config.yaml", yaml.safe_dump(self.config, sort_keys=False).encode())
        switches = {key: self.config.get(key) for key in ("tensorboard", "plots")}
        self.log = RunLog(self.folder, report=report, epoch=self.epoch, **switches)

    def line(self, text: str) -> None:
        if self.log is not None:
            self.log.line(text)

    def close(self) -> None:
        if self.log is not None:
            self.log.close()

    def go(self, report: Callable[[str], None]) -> None:
        """Train to the last epoch, or to the last one that ends within max_minutes. Every epoch writes all files."""
        if self.resumed is not None:
            self._restore(self.resumed[1])
        self._open(report)
        if self.resumed is not None:
            self.line(f"resumed from {self.resumed[0]} after epoch {self.epoch}")
            self._export(self.resumed[1])  # the last process may have ended before it wrote these files
        if not self.epoch:
            parameters = sum(each.numel() for each in self.model.parameters())
            self.line(f"model: {self.model.spec['name']}, {parameters:,} parameters, on {self.device}")
        config, last, longest = self.config, self.config["epoch_max"], 0.0
        while self.epoch < last:
            begin = time.monotonic()
            epoch = self.epoch + 1
            self._set_learning_rate(self.epoch)
            row = {"epoch": epoch, "lr": self.optimizer.param_groups[0]["lr"]}
            row["loss"], images = self._train_epoch(epoch)
            row["images_per_second"] = images / (time.monotonic() - begin)
            self._set_learning_rate(epoch)  # the original's checkpoints hold the learning rate of the next epoch
            validates = self.val_loader is not None and config.get("epoch_val") and epoch % config["epoch_val"] == 0
            if validates:
                row.update(self._validate())
            self.epoch, self.best = epoch, max(self.best, row.get("psnr", -math.inf))
            longest = max(longest, time.monotonic() - begin)
            row["seconds"] = self.seconds = self.seconds + time.monotonic() - begin
            self.history.append(row)
            self._save()
            self.line(self._describe(row))
            stops = epoch < last and self._exceeds_max_minutes(longest)
            if self.log is not None and (validates or stops or epoch == last):
                self.log.draw(self.history)
            if stops:
                limit = f"another epoch would exceed max_minutes {config['max_minutes']:g}"
                self.line(f"stopped after epoch {epoch}/{last}: {limit}; continue with --resume auto")
                return

    def _exceeds_max_minutes(self, epoch_seconds: float) -> bool:
        """Whether an epoch of that length would end after the limit, in any of the processes."""
        limit = self.config.get("max_minutes")
        if limit is None:
            return False
        late = time.monotonic() - self.started + epoch_seconds > 60 * limit
        return distributed.sum_over_ranks([float(late)])[0] > 0

    def _set_learning_rate(self, epoch: int, batch: int = 0) -> None:
        """For the batch of that number after `epoch` whole epochs."""
        each = len(self.train_loader)
        rate = learning_rate(self.config, self.optimizer.defaults["lr"], epoch * each + batch, each)
        if rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = rate

    def _train_epoch(self, epoch: int) -> tuple[float, int]:
        """One pass over the training items: (mean loss over all processes, images)."""
        self.model.train()
        total, images = 0.0, 0.0
        pending: tuple[Tensor, Item] | None = None  # a loss is read after the next step, so that no step waits for it
        batches = self._progress(self.train_loader.epoch(epoch), len(self.train_loader), f"epoch {epoch}")
        for number, batch in enumerate(batches):
            self._set_learning_rate(epoch - 1, number)
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
        """The loss times the images of its batch; saves the batch and raises TrainingError if it is not finite."""
        value = loss.item()
        if math.isfinite(value):
            return value * batch["inp"].shape[0]
        name = f"bad-batch-rank{distributed.rank()}.pth"
        states.save_torch({key: tensor.cpu() for key, tensor in batch.items()}, self.folder / name)
        raise TrainingError(
            f"the loss is {value} in epoch {self.epoch + 1}: the batch is saved as {self.folder / name}; resume from "
            "the last epoch with a lower learning rate, with clip_grad, or without autocast"
        )

    def _progress(self, batches: Iterator[Item], count: int, title: str) -> Iterator[Item]:
        quiet = not distributed.is_main() or not sys.stderr.isatty()
        return tqdm(batches, total=count, desc=title, unit="batch", leave=False, disable=quiet)

    def _validate(self) -> dict[str, float]:
        """Mean PSNR over the validation items of all processes; of the averaged weights if the run has them.

        For data also the mean RMSE, in their unit.
        """
        names = ["psnr"] if self.val_loader.data_range is None else ["psnr", "rmse"]
        sums, count = dict.fromkeys(names, 0.0), 0
        if len(self.val_loader):  # a process has no items if there are more processes than items
            sums, count = evaluation.eval_metrics_sum(
                self.val_loader,
                self.evaluated,
                data_norm=self.model.data_norm,
                eval_type=self.config.get("eval_type"),
                eval_bsize=self.config.get("eval_bsize"),
                metrics=names,
            )
        *totals, items = distributed.sum_over_ranks([*sums.values(), count])
        return {name: total / items for name, total in zip(names, totals, strict=True)}

    @property
    def evaluated(self) -> nn.Module:
        """The model that is validated and exported."""
        return self.stepper.average.model if self.stepper.average is not None else self.model

    def _save(self) -> None:
        """Write all files of an epoch, state.pth first."""
        random_states = distributed.gather(states.random_states())
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
            random=random_states,
        )
        states.save_state(state, self.folder)
        self._export(state)

    def _export(self, state: RunState) -> None:
        """Write the files that follow from the state after an epoch."""
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
        """Continue from a state; fields that a checkpoint of the original lacks start from their defaults."""
        self.optimizer.load_state_dict(found.optimizer["sd"])
        self.epoch, self.seconds = found.epoch, found.seconds
        self.best = -math.inf if found.best is None else found.best
        self.history = list(found.history)
        self.stepper.steps = found.steps
        if self.stepper.average is not None and found.average is not None:
            self.stepper.average.model.load_state_dict(found.average)
        if found.scaler:
            self.stepper.scaler.load_state_dict(found.scaler)
        if len(found.random) == distributed.world_size():
            states.restore_random_states(found.random[distributed.rank()])

    def _describe(self, row: Mapping[str, float]) -> str:
        last, done = self.config["epoch_max"], self.epoch
        parts = [f"epoch {done}/{last}", f"train: loss={row['loss']:.4f}"]
        if "psnr" in row:
            parts.append(", ".join(["val: psnr={psnr:.4f}", "rmse={rmse:.4g}"][: 1 + ("rmse" in row)]).format(**row))
        spent = f"{_time(self.seconds)}/{_time(self.seconds / done * last)}"
        return ", ".join([*parts, f"{row['images_per_second']:.1f} images/s", spent])


def learning_rate(config: Config, base: float, step: int, steps_per_epoch: int) -> float | None:
    """The learning rate of a step, counted from 0 over all epochs; None without a schedule.

    base: the optimizer's lr. `multi_step_lr` changes the rate between epochs. `cosine_lr` raises it linearly over
    `warmup` steps, and lowers it on a cosine to `min_lr` after epoch_max epochs.
    """
    steps, cosine = config.get("multi_step_lr"), config.get("cosine_lr")
    if steps is not None:
        for milestone in steps["milestones"]:
            base *= (steps.get("gamma") or 0.1) if milestone <= step // steps_per_epoch else 1
        return base
    if cosine is None:
        return None
    low, warmup = cosine.get("min_lr") or 0.0, cosine.get("warmup") or 1
    falling = (1 + math.cos(math.pi * step / (config["epoch_max"] * steps_per_epoch))) / 2
    return min(1.0, (step + 1) / warmup) * (low + (base - low) * falling)


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (users' code may draw from it)
    torch.manual_seed(seed)


def _build_model(config: Config, source: str) -> Any:
    """The configuration's model, with its normalization, backend and, for `init`, its weights."""
    try:
        model: Any = make_model(config["model"])
        inspect.signature(model.forward).bind("inp", "coord", "cell")
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: model: {config['model']['name']} cannot be trained: {error}") from None
    model.data_norm = config.get("data_norm") or UNIT_NORM
    model.backend = config.get("backend")
    if config.get("init") == "bilinear":
        try:
            start_as_bilinear(model)
        except ValueError as error:
            raise ConfigError(f"{source}: {error}") from None
    elif config.get("init"):
        weights = checkpoints.load(config["init"])
        try:
            model.load_state_dict(weights.state_dict())
        except RuntimeError:
            raise ConfigError(f"{source}: init: the weights of {config['init']} do not fit this model") from None
    return model


def _time(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f}h"
    return f"{seconds / 60:.1f}m" if seconds >= 60 else f"{seconds:.1f}s"
