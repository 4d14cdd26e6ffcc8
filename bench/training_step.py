"""Times a whole training step, the paper's, against the same loop around the original formulation.

`python -m bench.training_step [--device cuda]`: 16 crops of 48x48, 2304 samples each, EDSR-baseline, imnet 256x4, L1,
Adam, by `liif_fast.training.Stepper` with every switch that can change its speed. The loops take turns, so the ratios
come from one run. The decoder of the original's rows is `liif_fast.benchmark.original`; everything else is the same
code. The result is saved next to those of bench.run and printed as two tables.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import results
from bench.loader import BATCH, make_images, make_stepper, section
from bench.turns import parser, start, take_turns
from liif_fast import data
from liif_fast.benchmark import original
from liif_fast.benchmark.timing import Clock, in_words
from liif_fast.models import LIIF
from liif_fast.training.step import AUTOCAST_DTYPES, StepOptions, Stepper
from liif_fast.utils import tables

NAME = "training-loop"  # of the result file
IMAGES = 4


class TrainVariant(NamedTuple):
    """One loop. decoder: 'ours', 'original', or 'original in float32' where autocast applies to the encoder only."""

    label: str
    decoder: str
    options: StepOptions


_FAST = StepOptions(autocast="bf16", channels_last=True)
_ENCODER_ONLY = "original, encoder in bfloat16 and channels-last, decoder float32"
VARIANTS = {
    "original": TrainVariant("original, float32", "original", StepOptions()),
    "original-encoder": TrainVariant(_ENCODER_ONLY, "original in float32", _FAST),
    "original-amp": TrainVariant("original, autocast bfloat16 and channels-last everywhere", "original", _FAST),
    "ours": TrainVariant("liif-fast train, float32", "ours", StepOptions()),
    "ours-channels-last": TrainVariant("channels_last", "ours", StepOptions(channels_last=True)),
    "ours-compiled": TrainVariant("compile_encoder", "ours", StepOptions(compile_encoder=True)),
    "ours-bf16": TrainVariant("autocast: bf16", "ours", StepOptions(autocast="bf16")),
    "ours-fast": TrainVariant("autocast: bf16, channels_last", "ours", _FAST),
}
for _name, _label, _more in (
    ("ema", "ema, clip_grad", {"ema": 0.999, "clip_grad": 1.0}),
    ("compiled", "compile_encoder", {"compile_encoder": True}),
    ("accumulate", "accumulate: 4", {"accumulate": 4}),
):
    _options = replace(_FAST, **_more)
    VARIANTS[f"ours-fast-{_name}"] = TrainVariant(f"autocast: bf16, channels_last, {_label}", "ours", _options)
SPLIT = ("original", "ours", "ours-fast")
PARTS = ("encoder", "decoder", "optimizer")


class OriginalLIIF(LIIF):
    """LIIF whose decoder is the original's formulation."""

    in_float32 = False

    def query_rgb(self, coord: Tensor, cell: Tensor | None = None) -> Tensor:
        assert self.feat is not None and self.imnet is not None
        if not self.in_float32:
            return original.query(self.feat, coord, cell, self.imnet)
        with torch.autocast(coord.device.type, enabled=False):
            return original.query(self.feat.float(), coord, cell, self.imnet)


def make_loop(variant: TrainVariant, device: torch.device) -> Stepper:
    """The loop of a variant."""
    stepper = make_stepper(device, variant.options)
    if variant.decoder != "ours":
        model: Any = stepper.model
        model.__class__ = OriginalLIIF
        model.in_float32 = variant.decoder == "original in float32"
    return stepper


def parts(variant: TrainVariant, batch: data.Item, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Encoder and decoder, forward and backward, and the optimizer, each alone."""
    stepper = make_loop(variant, device)
    model: Any = stepper.model
    dtype = AUTOCAST_DTYPES.get(variant.options.autocast or "")
    batch = {key: value.to(device) for key, value in batch.items()}
    inp = batch["inp"] * 2 - 1
    if variant.options.channels_last:
        inp = inp.contiguous(memory_format=torch.channels_last)
    stepper.step(batch)  # makes the gradients and moments that the optimizer needs

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)

    with autocast(), torch.no_grad():
        feat = model.encoder(inp)
    probe = torch.randn_like(feat)
    encoder_leaves = [each for each in model.encoder.parameters() if each.requires_grad]
    decoder_leaves = list(model.imnet.parameters())

    def encoder() -> Any:
        with autocast():
            out = model.encoder(inp)
        return torch.autograd.grad(out, encoder_leaves, probe)

    def decoder() -> Any:
        model.feat = feat.detach().requires_grad_()
        with autocast():
            out = model.query_rgb(batch["coord"], batch["cell"])
        loss = (out.float() - (batch["gt"] * 2 - 1)).abs().mean()
        return torch.autograd.grad(loss, [model.feat, *decoder_leaves])

    return dict(zip(PARTS, (encoder, decoder, stepper.optimizer.step)))


def measure(clock: Clock, folder: Path, names: list[str], rounds: int) -> dict[str, Any]:
    """Seconds per step of every variant and of its parts, as a result to be saved. folder: of images."""
    device = clock.device
    result = results.begin(NAME, device.type, "bench.training_step")
    batches = data.make_loader(section(folder, "in_memory"), shuffle=True).epoch()
    batch = next(batches)
    runs: dict[str, Callable[[], Any]] = {}
    for name in names:
        stepper = make_loop(VARIANTS[name], device)
        runs[name] = lambda stepper=stepper: stepper.step(batch)  # type: ignore[misc]
    for name in SPLIT:
        runs |= {f"{name}: {part}": run for part, run in parts(VARIANTS[name], batch, device).items()}
    runs["data"] = lambda: next(batches)
    measured = take_turns(clock, runs, rounds, lambda name: "original" if name in VARIANTS else None)
    return {**result, "batch": BATCH, **measured}


def steps_table(result: dict[str, Any]) -> str:
    """One row per variant: images per second, time, and speedup in the same run."""
    rows = []
    for name, variant in VARIANTS.items():
        entry = result["entries"].get(name)
        if entry is None:
            continue
        if "failed" in entry:
            rows.append([variant.label, None, entry["failed"], None])
            continue
        seconds = entry["seconds"]["median"]
        speedup = f"{entry['speedup']['median']:.2f}x"
        rows.append([variant.label, f"{result['batch'] / seconds:.1f}", in_words(seconds), speedup])
    return tables.markdown(["training step", "images per second", "time", "speedup"], rows)


def split_table(result: dict[str, Any]) -> str:
    """The time of each part of a step, timed alone."""
    entries = result["entries"]
    rows = []
    for name in SPLIT:
        found = [entries[key].get("seconds") for key in (*(f"{name}: {part}" for part in PARTS), "data")]
        if all(found):
            rows.append([VARIANTS[name].label, *(in_words(each["median"]) for each in found)])
    return tables.markdown(["forward and backward", *PARTS, "data (one process, works ahead)"], rows)


def main(arguments: list[str] | None = None) -> None:
    options = parser("training_step", __doc__)
    options.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="besides the original")
    args = options.parse_args(arguments)
    clock, rounds = start(args)
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), IMAGES)
        names = [name for name in VARIANTS if name in ("original", *args.only)]
        result = measure(clock, Path(folder), names, rounds)
    print(f"{steps_table(result)}\n{split_table(result)}")
    print(results.save(result, args.results))


if __name__ == "__main__":
    main()
