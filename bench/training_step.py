"""A whole training step, the paper's, against the same loop around the original formulation.

`python -m bench.training_step [--device cuda]`: 16 crops of 48x48, 2304 samples each, EDSR-baseline, imnet 256x4, L1,
Adam, by `liif_fast.training.Stepper` with every switch that can change its speed; loops take turns, so the ratios are
of one run. The decoder of the original's rows is `liif_fast.benchmark.original`; everything else is the same code. The
result is saved beside those of bench.run and printed as tables: images a second, and where the time goes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import machine, results
from bench.loader import BATCH, make_images
from bench.measure import note
from liif_fast import data
from liif_fast.benchmark import original, yardsticks
from liif_fast.benchmark.cuda_timing import CudaClock
from liif_fast.benchmark.timing import Clock, Contender, CpuClock, interleave, pair_ratios, summary
from liif_fast.models import LIIF, default_data_norm, make_model
from liif_fast.training.step import AUTOCAST_DTYPES, StepOptions, Stepper

IMAGES = 4
SPEC = {
    "name": "liif",
    "args": {
        "encoder_spec": {"name": "edsr-baseline", "args": {"no_upsampling": True}},
        "imnet_spec": {"name": "mlp", "args": {"out_dim": 3, "hidden_list": [256, 256, 256, 256]}},
    },
}
WRAPPER = {"inp_size": 48, "scale_min": 1, "scale_max": 4, "augment": True, "sample_q": 2304}
_SCHEMA = 1


class Row(NamedTuple):
    """One loop. decoder: 'ours', 'original', or 'original in float32' whatever the switches say of the encoder."""

    label: str
    decoder: str
    options: StepOptions


_FAST = StepOptions(autocast="bf16", channels_last=True)
ROWS = {
    "original": Row("original, float32", "original", StepOptions()),
    "original-encoder": Row(
        "original, encoder in bfloat16 and channels-last, decoder float32", "original in float32", _FAST
    ),
    "original-amp": Row("original, autocast bfloat16 and channels-last everywhere", "original", _FAST),
    "ours": Row("liif-fast train, float32", "ours", StepOptions()),
    "ours-channels-last": Row("channels_last", "ours", StepOptions(channels_last=True)),
    "ours-compiled": Row("compile_encoder", "ours", StepOptions(compile_encoder=True)),
    "ours-bf16": Row("autocast: bf16", "ours", StepOptions(autocast="bf16")),
    "ours-fast": Row("autocast: bf16, channels_last", "ours", _FAST),
    "ours-fast-ema": Row(
        "autocast: bf16, channels_last, ema, clip_grad",
        "ours",
        StepOptions(autocast="bf16", channels_last=True, ema=0.999, clip_grad=1.0),
    ),
    "ours-fast-compiled": Row(
        "autocast: bf16, channels_last, compile_encoder",
        "ours",
        StepOptions(autocast="bf16", channels_last=True, compile_encoder=True),
    ),
    "ours-accumulate": Row(
        "autocast: bf16, channels_last, accumulate: 4",
        "ours",
        StepOptions(autocast="bf16", channels_last=True, accumulate=4),
    ),
}
QUICK = ("original", "original-encoder", "original-amp", "ours", "ours-fast")
SPLIT = ("original", "ours", "ours-fast")


class _Original(LIIF):
    """LIIF whose decoder is the original's formulation."""

    in_float32 = False

    def query_rgb(self, coord: Tensor, cell: Tensor | None = None) -> Tensor:
        assert self.feat is not None and self.imnet is not None
        if not self.in_float32:
            return original.query(self.feat, coord, cell, self.imnet)
        with torch.autocast(coord.device.type, enabled=False):
            return original.query(self.feat.float(), coord, cell, self.imnet)


def make_stepper(row: Row, device: torch.device) -> Stepper:
    """The loop of a row, from the same weights."""
    torch.manual_seed(0)
    model: Any = make_model(SPEC).to(device).train()
    if row.decoder != "ours":
        model.__class__ = _Original
        model.in_float32 = row.decoder == "original in float32"
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    return Stepper(model, optimizer, row.options, default_data_norm())


def parts(row: Row, batch: data.Item, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Encoder and decoder, forward and backward, and the optimiser, each by itself."""
    stepper = make_stepper(row, device)
    model: Any = stepper.model
    dtype = AUTOCAST_DTYPES.get(row.options.autocast or "")
    batch = {key: value.to(device) for key, value in batch.items()}
    inp = batch["inp"] * 2 - 1
    if row.options.channels_last:
        inp = inp.contiguous(memory_format=torch.channels_last)
    stepper.step(batch)  # gradients and moments for the optimiser

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

    return {"encoder": encoder, "decoder": decoder, "optimiser": stepper.optimizer.step}


def measure(clock: Clock, folder: Path, names: list[str], rounds: int) -> dict[str, Any]:
    """Seconds a step of every row and of its parts, as a result to be saved. folder: of images."""
    device = clock.device
    described = machine.describe(device.type)
    machine.warn_if_busy(described)
    section = {
        "dataset": {"name": "image-folder", "args": {"root_path": str(folder), "cache": "in_memory", "repeat": 1000}},
        "wrapper": {"name": "sr-implicit-downsampled", "args": WRAPPER},
        "batch_size": BATCH,
    }
    batches = data.make_loader(section, shuffle=True).epoch()
    batch = next(batches)
    contenders: dict[str, Contender] = {}
    for name in names:
        stepper = make_stepper(ROWS[name], device)
        contenders[name] = Contender(name, lambda stepper=stepper: stepper.step(batch))  # type: ignore[misc]
    for name in SPLIT:
        for part, run in parts(ROWS[name], batch, device).items():
            contenders[f"{name}: {part}"] = Contender(f"{name}: {part}", run)
    contenders["data"] = Contender("data", lambda: next(batches))
    for contender in contenders.values():
        begin = time.perf_counter()
        clock.warm_up(contender)
        note(f"{contender.name}: ready after {time.perf_counter() - begin:.0f} s")
    sticks = yardsticks.matrix_rates(clock)
    done = interleave(clock, list(contenders.values()), rounds, sticks)
    entries: dict[str, Any] = {}
    for name, contender in contenders.items():
        if contender.error:
            entries[name] = {"failed": contender.error}
            continue
        entries[name] = {"seconds": summary(contender.samples)}
        for rival in ("original", "original-encoder", "original-amp"):
            if name in ROWS and rival in contenders and contenders[rival].samples:
                ratios = pair_ratios(contenders[rival].samples, contender.samples)
                entries[name].setdefault("speedup_over", {})[rival] = summary(ratios)
    return {
        "schema": _SCHEMA,
        "name": "training-loop",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": machine.commit(),
        "machine": described,
        "versions": machine.versions(),
        "rounds": done,
        "batch": BATCH,
        "yardsticks": {stick.name: summary(stick.rates) for stick in sticks if stick.rates},
        "entries": entries,
    }


def steps_table(result: dict[str, Any]) -> str:
    """A row a loop: images a second, and ratios of the same run."""
    entries = result["entries"]
    rivals = {
        "original": "original",
        "original-encoder": "original, same encoder",
        "original-amp": "original, autocast",
    }
    lines = [["training step", "images a second", "ms a step (20th to 80th percentile)", *rivals.values()]]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for name, row in ROWS.items():
        entry = entries.get(name)
        if entry is None:
            continue
        if "failed" in entry:
            lines.append([row.label, entry["failed"], *[""] * (len(rivals) + 1)])
            continue
        seconds = entry["seconds"]
        spread = f"{seconds['median'] * 1e3:.0f} ({seconds['p20'] * 1e3:.0f} to {seconds['p80'] * 1e3:.0f})"
        ratios = [f"{entry['speedup_over'][rival]['median']:.2f}x" for rival in rivals]
        lines.append([row.label, f"{result['batch'] / seconds['median']:.1f}", spread, *ratios])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def split_table(result: dict[str, Any]) -> str:
    """Where the time of a step goes: the same parts, each by itself."""
    entries = result["entries"]
    names = ("encoder", "decoder", "optimiser")
    lines = [["ms, forward and backward", *names, "data (one process, works ahead)"]]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for name in SPLIT:
        times = [entries[f"{name}: {part}"].get("seconds") for part in names]
        if all(times):
            cells = [f"{each['median'] * 1e3:.0f}" for each in [*times, entries["data"]["seconds"]]]
            lines.append([ROWS[name].label, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def tables(result: dict[str, Any]) -> str:
    """Both tables, and where they were measured."""
    where = result["machine"].get("gpu") or f"{result['machine']['cpu']}, {result['machine']['threads']} threads"
    source = f"{where}; torch {result['versions']['torch']}; commit {result['commit'][:12]}, {result['date'][:10]}"
    loops = [rate for name, rate in result["yardsticks"].items() if name.startswith("loop")]
    doubt = f" **{machine.SHARED}**" if any(map(machine.was_shared, loops)) else ""
    return f"{steps_table(result)}\n{split_table(result)}\n{source}.{doubt}\n"


def newest(folder: Path = results.FOLDER, device: str = "cpu") -> dict[str, Any] | None:
    """The newest saved result of a device type."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*/*-training-loop.json"))]
    found = [result for result in found if result["machine"]["device"] == device]
    return max(found, key=lambda result: result["date"]) if found else None


def block(_: list[dict[str, Any]]) -> str | None:
    """The README's block: the newest result of a CPU, or None where there is none."""
    result = newest()
    return tables(result) if result else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="only the loops that the project promises something about")
    parser.add_argument("--rounds", type=int, help="default: 5 on a CPU, 50 on a GPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock: Clock = CpuClock() if args.device == "cpu" else CudaClock(graphs=False)
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), IMAGES)
        names = [name for name in ROWS if name in QUICK or not args.quick]
        result = measure(clock, Path(folder), names, args.rounds or (5 if args.device == "cpu" else 50))
    print(tables(result))
    print(results.save(result, args.results))


if __name__ == "__main__":
    main()
