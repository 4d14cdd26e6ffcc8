"""Training a LIIF on a folder of photographs: random crops and scales as in the paper, L1, Adam, averaged weights.

`python -m liif_fast.training.budget --images DIR --val DIR --minutes 60 --out DIR` trains, and ends by writing the
weights, the PSNR table and the curve into the out folder; after a kill, the same line with `--resume` goes on. The
budget is minutes or steps, and the learning rate follows the elapsed fraction of it, so a busy machine only means
fewer steps.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import io
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from liif_fast.data import ImageFolder, Item, SRImplicitDownsampled
from liif_fast.evaluation import Score, evaluate, markdown_table, mean_scores, read_folder, write_csv
from liif_fast.initialization import start_as_bilinear
from liif_fast.models import checkpoints, make_model
from liif_fast.utils.files import write_atomically

VALIDATION_SCALES = (2, 4)
CURVE_COLUMNS = ("step", "seconds", "lr", "loss", *(f"psnr_x{scale}" for scale in VALIDATION_SCALES))
TABLE_SCALES = (2, 3, 4, 6)
HALF_TOLERANCE = 0.005  # dB that storing the weights in float16 may cost


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run is made of, beside model, images and budget; all of it is saved with the run.

    inp_size, sample_q, scale_min, scale_max, augment, energy: as in data.SRImplicitDownsampled; shrink: as in
    data.ImageFolder. lr: highest learning rate, after `warmup` steps; it falls to `final_lr` of that on a cosine.
    ema: decay of the averaged weights a step. clip: largest gradient norm (None: any). autocast: bfloat16 where PyTorch
    sees fit. bilinear_start: begin as exact bilinear interpolation, unless `init` names a trained model to begin with,
    whole (init_part 'model') or with its encoder alone ('encoder'). workers: processes that prepare the batches.
    """

    batch_size: int = 16
    inp_size: int = 32
    sample_q: int = 1024
    scale_min: float = 1.0
    scale_max: float = 4.0
    augment: bool = True
    energy: float = 0.5
    shrink: tuple[int, ...] = (1,)
    lr: float = 1e-3
    final_lr: float = 0.01
    warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.99)
    ema: float = 0.999
    clip: float | None = None
    autocast: bool = True
    channels_last: bool = True
    bilinear_start: bool = True
    init: str = ""
    init_part: str = "model"
    seed: int = 0
    workers: int = 1


def small_spec(blocks: int = 8, feats: int = 48, hidden: Sequence[int] = (64, 64)) -> dict[str, Any]:
    """Spec of a small LIIF on EDSR-baseline: residual blocks, channels, widths of the imnet."""
    encoder = {"name": "edsr-baseline", "args": {"n_resblocks": blocks, "n_feats": feats, "no_upsampling": True}}
    imnet = {"name": "mlp", "args": {"out_dim": 3, "hidden_list": list(hidden)}}
    return {"name": "liif", "args": {"encoder_spec": encoder, "imnet_spec": imnet}}


class _Draws(Dataset[Item]):
    """Item n is a function of the seed and n alone, whichever process makes it and whenever."""

    def __init__(self, wrapper: SRImplicitDownsampled, seed: int) -> None:
        self.wrapper, self.seed = wrapper, seed

    def __getitem__(self, number: int) -> Item:
        return self.wrapper.draw(np.random.default_rng((self.seed, number)))


class Budget:
    """Minutes of wall clock or a number of steps; knows which fraction is spent."""

    def __init__(self, minutes: float | None, steps: int | None) -> None:
        if (minutes is None) == (steps is None):
            raise ValueError(f"give either minutes ({minutes}) or steps ({steps}) as the budget")
        self.total = steps if steps is not None else 60 * cast(float, minutes)
        if not self.total > 0:
            raise ValueError(f"the budget is {self.total:g}; it must be above 0")
        self.counts_steps = steps is not None

    def fraction(self, step: int, seconds: float) -> float:
        return min(1.0, (step if self.counts_steps else seconds) / self.total)


class Trainer:
    """The state of one run (model, averaged model, optimiser, step, seconds, curve) and what moves or saves it."""

    def __init__(self, spec: dict[str, Any], settings: Settings, *, backend: str | None = None) -> None:
        torch.manual_seed(settings.seed)
        self.spec, self.settings = spec, settings
        self.model = cast(Any, make_model(spec))
        if settings.init:
            self._start_from(settings.init, settings.init_part)
        elif settings.bilinear_start:
            start_as_bilinear(self.model)
        self.model.backend = backend
        if settings.channels_last:
            self.model.encoder.to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.model).eval()
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr=settings.lr, betas=settings.betas)
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []  # since the last row of the curve
        self.curve: list[list[float]] = []
        norm = self.model.data_norm
        self._norm = {side: [torch.tensor(norm[side][key]) for key in ("sub", "div")] for side in ("inp", "gt")}

    def _start_from(self, path: str, part: str) -> None:
        """Take over a trained model's weights, or those of its encoder alone."""
        if part not in ("model", "encoder"):
            raise ValueError(f"init_part is {part!r}; it must be 'model' or 'encoder'")
        weights = cast(Any, checkpoints.load(path))
        ours, theirs = (self.model, weights) if part == "model" else (self.model.encoder, weights.encoder)
        try:
            ours.load_state_dict(theirs.state_dict())
        except RuntimeError:
            raise ValueError(f"the weights of {path!r} do not fit this model's {part}") from None

    def batches(self, images: ImageFolder) -> Iterator[Item]:
        """Batches without end, from the one that belongs to the current step on."""
        own = self.settings
        wrapper = SRImplicitDownsampled(
            images, own.inp_size, own.scale_min, own.scale_max, own.augment, own.sample_q, own.energy
        )
        numbers = (range(step * own.batch_size, (step + 1) * own.batch_size) for step in itertools.count(self.step))
        ahead = {"num_workers": own.workers, "prefetch_factor": 4 if own.workers else None}
        return iter(DataLoader(_Draws(wrapper, own.seed), batch_sampler=cast(Any, numbers), **ahead))  # type: ignore

    def learning_rate(self, fraction: float) -> float:
        own = self.settings
        cosine = (1 + math.cos(math.pi * fraction)) / 2
        return own.lr * min(1.0, (self.step + 1) / max(1, own.warmup)) * (own.final_lr + (1 - own.final_lr) * cosine)

    def update(self, batch: Item, fraction: float) -> None:
        """One step. Raises RuntimeError, before the weights change, when the loss is not a finite number."""
        own = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(fraction)
        inp = self._normalized(batch["inp"], "inp", (-1, 1, 1))
        if own.channels_last:
            inp = inp.contiguous(memory_format=torch.channels_last)
        with torch.autocast(inp.device.type, dtype=torch.bfloat16, enabled=own.autocast):
            pred = self.model(inp, batch["coord"], batch["cell"])
        loss = (pred.float() - self._normalized(batch["gt"], "gt", (-1,))).abs().mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), math.inf if own.clip is None else own.clip)
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            raise RuntimeError(
                f"the loss is {loss.item():g} and the gradient's norm {norm.item():g} at step {self.step}, so training "
                "stopped; go on from the last checkpoint with a lower lr, or set clip"
            )
        self.optimizer.step()
        self.step += 1
        decay = min(own.ema, self.step / (self.step + 9))  # follows closely while the start is still in the average
        with torch.no_grad():
            for mean, parameter in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(parameter, 1 - decay)
        self.losses.append(loss.item())

    def _normalized(self, values: Tensor, side: str, shape: tuple[int, ...]) -> Tensor:
        sub, div = (part.view(shape) for part in self._norm[side])
        return (values - sub) / div

    def add_to_curve(self, lr: float, psnr: Sequence[float] = ()) -> str:
        """Close a stretch of the curve: its mean loss, with the validation's PSNR where there was one; also as text."""
        gap = [math.nan] * (len(VALIDATION_SCALES) - len(psnr))
        row = [self.step, round(self.seconds, 1), lr, sum(self.losses) / max(1, len(self.losses)), *psnr, *gap]
        self.losses.clear()
        self.curve.append(row)
        return ", ".join(f"{key} {value:.5g}" for key, value in zip(CURVE_COLUMNS, row, strict=True) if value == value)

    def save(self, path: Path) -> None:
        """Write everything a resumed run needs, in tensors and plain containers."""
        state = {
            "spec": self.spec,
            "settings": json.dumps(dataclasses.asdict(self.settings)),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
            "curve": self.curve,
            "rng": torch.get_rng_state(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(path, buffer.getvalue())

    def restore(self, path: Path) -> None:
        """Continue from a saved state; ValueError when it belongs to another spec or other settings."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        mine = json.loads(json.dumps(dataclasses.asdict(self.settings)))
        theirs = json.loads(state["settings"])
        changed = [f"{key} {theirs.get(key)!r} -> {mine[key]!r}" for key in mine if mine[key] != theirs.get(key)]
        if state["spec"] != self.spec:
            changed.append("the model's spec")
        if changed:
            raise ValueError(f"{str(path)!r} was made with other settings ({', '.join(changed)}); use its own")
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.losses, self.curve = state["losses"], state["curve"]
        torch.set_rng_state(state["rng"])


def train(
    spec: dict[str, Any],
    images: str | Path,
    *,
    out: str | Path,
    minutes: float | None = None,
    steps: int | None = None,
    val: str | Path | None = None,
    settings: Settings | None = None,
    name: str = "model",
    resume: bool = False,
    backend: str | None = None,
    validations: int = 10,
    checkpoint_seconds: float = 120,
    log_steps: int = 50,
    report: Callable[[str], None] = print,
) -> Path:
    """Train a model on a folder of images within a budget and write what came of it; returns the weights' path.

    spec: as make_model takes it. images, val: folders of photographs. Exactly one of minutes and steps. Written to out:
    checkpoint.pt while training (resume=True goes on from it, bit for bit where the budget is in steps), and in the end
    `<name>.safetensors` (averaged weights, float16 where that costs nothing), `<name>-curve.csv`, `<name>-run.json`
    and, with val, `<name>-psnr.csv`. An out folder with a checkpoint is refused without resume.
    Raises ValueError for bad arguments, RuntimeError when the loss is no longer finite.
    """
    settings = settings or Settings()
    budget = Budget(minutes, steps)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists() and not resume:
        raise ValueError(f"{str(checkpoint)!r} exists: pass resume (--resume) to go on with it, or another out folder")
    trainer = Trainer(spec, settings, backend=backend)
    if checkpoint.exists():
        trainer.restore(checkpoint)
        report(f"resumed at step {trainer.step} after {trainer.seconds:.0f} s")
    val_images = read_folder(val) if val is not None else []
    batches = trainer.batches(ImageFolder(images, cache="in_memory", shrink=settings.shrink))
    start = saved = time.monotonic() - trainer.seconds
    fraction = budget.fraction(trainer.step, trainer.seconds)
    with tqdm(total=100, initial=100 * fraction, unit="%", disable=not sys.stderr.isatty()) as bar:
        while fraction < 1:
            lr = trainer.learning_rate(fraction)
            trainer.update(next(batches), fraction)
            trainer.seconds = time.monotonic() - start
            before, fraction = fraction, budget.fraction(trainer.step, trainer.seconds)
            bar.update(100 * (fraction - before))
            if int(fraction * validations) > int(before * validations):
                scores = evaluate(trainer.average, val_images, VALIDATION_SCALES)
                report(trainer.add_to_curve(lr, [score.model for score in mean_scores(scores)]))
            elif trainer.step % log_steps == 0:
                bar.set_postfix_str(trainer.add_to_curve(lr), refresh=False)
            if time.monotonic() - saved > checkpoint_seconds:
                trainer.seconds = time.monotonic() - start
                trainer.save(checkpoint)
                saved = time.monotonic()
    trainer.save(checkpoint)
    return _finish(trainer, out, name, val_images, report)


def _finish(trainer: Trainer, out: Path, name: str, val_images: list[Any], report: Callable[[str], None]) -> Path:
    """Write weights, curve, table and the run's description; the table is of the weights as they are stored."""
    weights = out / f"{name}.safetensors"
    checkpoints.save(trainer.average, weights)
    stored, scores = "float32", list[Score]()
    if val_images:
        full = evaluate(_reloaded(weights, trainer), val_images, TABLE_SCALES)
        checkpoints.save(trainer.average, weights, dtype=torch.float16)
        stored, scores = "float16", evaluate(_reloaded(weights, trainer), val_images, TABLE_SCALES)
        pairs = zip(mean_scores(full), mean_scores(scores), strict=True)
        if any(half.model < whole.model - HALF_TOLERANCE for whole, half in pairs):
            checkpoints.save(trainer.average, weights)
            stored, scores = "float32", full
        write_csv(scores, out / f"{name}-psnr.csv")
        report(markdown_table(mean_scores(scores)))
    run = {
        "spec": trainer.spec,
        "settings": dataclasses.asdict(trainer.settings),
        "steps": trainer.step,
        "seconds": round(trainer.seconds),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad),
        "stored_as": stored,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    write_atomically(out / f"{name}-run.json", (json.dumps(run, indent=1) + "\n").encode())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CURVE_COLUMNS)
    writer.writerows([["" if value != value else f"{value:.6g}" for value in row] for row in trainer.curve])
    write_atomically(out / f"{name}-curve.csv", text.getvalue().encode())
    report(f"wrote {weights} ({weights.stat().st_size / 1e6:.2f} MB, {stored}) after {trainer.step} steps")
    return weights


def _reloaded(weights: Path, trainer: Trainer) -> Any:
    model = cast(Any, checkpoints.load(weights))
    model.backend = trainer.model.backend
    return model


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m liif_fast.training.budget", description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="folder of photographs to train on")
    parser.add_argument("--val", help="folder of photographs to validate on")
    parser.add_argument("--out", required=True, help="folder for checkpoint, weights, table and curve")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="wall-clock budget")
    budget.add_argument("--steps", type=int, help="budget in steps")
    parser.add_argument("--name", default="tiny", help="of the written files (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the out folder's checkpoint, if there is one")
    parser.add_argument("--blocks", type=int, default=8, help="residual blocks of the encoder (%(default)s)")
    parser.add_argument("--feats", type=int, default=48, help="channels of the encoder (%(default)s)")
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 64], help="widths of the imnet (%(default)s)")
    parser.add_argument("--metasr", action="store_true", help="train MetaSR on the same encoder instead of LIIF")
    parser.add_argument("--threads", type=int, help="threads of PyTorch and of the ops")
    parser.add_argument("--backend", help="backend of the ops; the first that can run when left out")
    for field in dataclasses.fields(Settings):
        option = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=field.default)
        elif isinstance(field.default, tuple):
            kind, count = type(field.default[0]), "+" if field.name == "shrink" else len(field.default)
            parser.add_argument(option, type=kind, nargs=count, default=field.default)
        else:
            kind = float if field.default is None else type(field.default)
            parser.add_argument(option, type=kind, default=field.default, help="%(default)s")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = vars(_parser().parse_args(arguments))
    chosen: dict[str, Any] = {field.name: options[field.name] for field in dataclasses.fields(Settings)}
    chosen = {key: tuple(value) if isinstance(value, list) else value for key, value in chosen.items()}
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    try:
        spec = small_spec(options["blocks"], options["feats"], options["hidden"])
        if options["metasr"]:
            spec = {"name": "metasr", "args": {"encoder_spec": spec["args"]["encoder_spec"]}}
        train(
            spec,
            settings=Settings(**chosen),
            report=lambda line: print(line, flush=True),
            **{key: options[key] for key in ("images", "out", "minutes", "steps", "val", "name", "resume", "backend")},
        )
    except (OSError, RuntimeError, ValueError) as error:
        print(f"training: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
