"""Which limits training, the loader or the step: `python -m bench.loader [--device cuda] [--images DIR]`.

The paper's items (48x48 inputs, x1 to x4, 2304 samples, 16 a batch) from images of DIV2K's size, by every kind of
loader alone, and the training step of EDSR-baseline-LIIF alone. A loader whose batches take less time than a step
cannot limit it, as it works ahead. The result is saved beside those of bench.run and printed as a table.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench import machine, results
from liif_fast import data
from liif_fast.cli.demo import PHOTO
from liif_fast.models import default_data_norm, make_model
from liif_fast.training.step import StepOptions, Stepper

BATCH = 16
SIZE = (1356, 2040)  # rows and columns of most images of DIV2K
_WRAPPER = {"inp_size": 48, "scale_min": 1, "scale_max": 4, "augment": True, "sample_q": 2304}
_ENCODER = {"name": "edsr-baseline", "args": {"no_upsampling": True}}
_IMNET = {"name": "mlp", "args": {"out_dim": 3, "hidden_list": [256, 256, 256, 256]}}
_SCHEMA = 1


def make_images(folder: Path, count: int) -> None:
    """Images of DIV2K's size: the shipped photo, enlarged and turned."""
    photo = Image.open(PHOTO).convert("RGB")
    for number in range(count):
        turned = photo.rotate(90 * number, expand=True).resize((SIZE[1], SIZE[0]), Image.Resampling.LANCZOS)
        turned.save(folder / f"{number:04d}.png")


def endless(loader: data.Loader) -> Iterator[data.Item]:
    """Batches of one epoch after the other."""
    for epoch in itertools.count():
        yield from loader.epoch(epoch)


def time_batches(
    batches: Iterator[Any], run: Callable[[Any], Any], rounds: int, count: int, device: str
) -> list[float]:
    """Seconds a batch in each of `rounds` rounds of `count` batches, after one for warming up."""
    found = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        for batch in itertools.islice(batches, count):
            run(batch)
        if device == "cuda":
            torch.cuda.synchronize()
        found.append((time.perf_counter() - begin) / count)
    return found[1:]


def loaders(folder: Path, device: str, most_workers: int) -> dict[str, dict[str, Any]]:
    """Sections of a configuration by what they are called."""
    counts = sorted({0, 1, 2, most_workers} & set(range(most_workers + 1)))
    found: dict[str, dict[str, Any]] = {}
    for cache in ("none", "bin", "in_memory"):
        for workers in counts:
            found[f"cache {cache}, {workers} workers"] = {"cache": cache, "num_workers": workers}
    found[f"loader: device ({device})"] = {"cache": "none", "loader": "device"}
    return {
        name: {
            "dataset": {
                "name": "image-folder",
                "args": {"root_path": str(folder), "cache": options.pop("cache"), "repeat": 1000},
            },
            "wrapper": {"name": "sr-implicit-downsampled", "args": _WRAPPER},
            "batch_size": BATCH,
            **options,
        }
        for name, options in found.items()
    }


def stepper(device: str, autocast: str | None) -> Stepper:
    """The paper's training step."""
    torch.manual_seed(0)
    model = make_model({"name": "liif", "args": {"encoder_spec": _ENCODER, "imnet_spec": _IMNET}}).to(device).train()
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=1e-4)
    return Stepper(model, optimizer, StepOptions(autocast=autocast, channels_last=True), default_data_norm())


def measure(folder: Path, device: str, rounds: int, count: int, steps: int, most_workers: int) -> dict[str, Any]:
    """Seconds a batch of every loader and step, as a result to be saved."""
    entries: dict[str, dict[str, Any]] = {}

    def record(name: str, kind: str, samples: list[float]) -> None:
        low, median, high = min(samples), statistics.median(samples), max(samples)
        entries[name] = {"kind": kind, "seconds": {"low": low, "median": median, "high": high}}
        note = f"{name}: {median * 1e3:.1f} ms a batch, {BATCH / median:.1f} images a second"
        print(note, file=sys.stderr, flush=True)

    machine_now = machine.describe(device)
    machine.warn_if_busy(machine_now)
    result = {
        "schema": _SCHEMA,
        "name": "loader",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": machine_now,
        "versions": machine.versions(),
        "settings": {"batch": BATCH, **_WRAPPER, "images": len(list(folder.glob("*"))), "size": list(SIZE)},
    }
    for name, section in loaders(folder, device, most_workers).items():
        loader = data.make_loader(section, shuffle=True, device=device)
        record(name, "loader", time_batches(endless(loader), lambda batch: batch, rounds, count, device))
        batch = next(loader.epoch())
        del loader  # its workers end with it
    for autocast in (None, "bf16"):
        step = stepper(device, autocast).step
        samples = time_batches(itertools.repeat(batch), step, rounds, steps, device)
        record(f"training step, {autocast or 'float32'}", "step", samples)
    return {**result, "entries": entries}


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: which of the loaders keep up with which step."""
    entries = result["entries"]
    steps = {name: entry["seconds"]["median"] for name, entry in entries.items() if entry["kind"] == "step"}
    lines = [["", "ms a batch (low to high)", "images a second", *(f"limits the {name}" for name in steps)]]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for name, entry in entries.items():
        seconds = entry["seconds"]
        limits = [] if name in steps else ["yes" if seconds["median"] > limit else "no" for limit in steps.values()]
        spread = f"{seconds['median'] * 1e3:.1f} ({seconds['low'] * 1e3:.1f} to {seconds['high'] * 1e3:.1f})"
        lines.append(
            [name, spread, f"{result['settings']['batch'] / seconds['median']:.1f}", *(limits or [""] * len(steps))]
        )
    where = result["machine"].get("gpu") or f"{result['machine']['cpu']}, {result['machine']['threads']} threads"
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    versions = f"torch {result['versions']['torch']}; commit {result['commit']}, {result['date'][:10]}"
    load = result["machine"].get("load_before", 0)
    doubt = f" **Others used the machine (load average {load}): times are too long.**" if load > 0.5 else ""
    return f"{rows}\n\n{where}; {versions}.{doubt}\n"


def block(_: list[dict[str, Any]]) -> str | None:
    """The README's block: the newest result of every device, or None where there is none."""
    newest: dict[str, dict[str, Any]] = {}
    for path in sorted(results.FOLDER.glob("*/*-loader.json")):
        result = json.loads(path.read_text())
        newest[path.parent.name] = max(newest.get(path.parent.name, result), result, key=lambda each: each["date"])
    return "\n".join(table(result) for result in newest.values()) or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--images", type=Path, help="folder of images (default: eight of DIV2K's size, made up)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=8, help="of a loader a round (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=None, help="a round (default: 2 on a CPU, 20 on a GPU)")
    parser.add_argument("--workers", type=int, default=2, help="at most (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU, for the step")
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    steps = args.steps or (20 if args.device == "cuda" else 2)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.images or Path(temporary) / "images"
        if args.images is None:
            folder.mkdir()
            make_images(folder, 8)
        result = measure(folder, args.device, args.rounds, args.batches, steps, args.workers)
    print(table(result))
    print(results.save(result, args.results))


if __name__ == "__main__":
    main()
