"""Measures whether the loader or the step limits training: `python -m bench.loader [--device cuda] [--images DIR]`.

The paper's items (48x48 inputs, x1 to x4, 2304 samples, 16 per batch) come from images of DIV2K's size, by every kind
of loader alone; the training step of EDSR-baseline-LIIF is timed alone. Loaders work ahead, so a loader whose batches
take less time than a step cannot limit it. The result is saved next to those of bench.run and printed as a table.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench import machine, results
from bench.measure import log
from liif_fast import data
from liif_fast.benchmark import runs
from liif_fast.benchmark.problem import HIDDEN, OUTS
from liif_fast.benchmark.timing import in_words, summary
from liif_fast.models import default_data_norm, make_model
from liif_fast.training.step import StepOptions, Stepper
from liif_fast.utils import tables

NAME = "loader"  # of the result file
BATCH = 16
SIZE = (1356, 2040)  # rows and columns of most images of DIV2K
SPEC = {  # LIIF-EDSR-baseline
    "name": "liif",
    "args": {
        "encoder_spec": {"name": "edsr-baseline", "args": {"no_upsampling": True}},
        "imnet_spec": {"name": "mlp", "args": {"out_dim": OUTS, "hidden_list": list(HIDDEN)}},
    },
}
WRAPPER = {"inp_size": 48, "scale_min": 1, "scale_max": 4, "augment": True, "sample_q": 2304}


def make_images(folder: Path, count: int) -> None:
    """Images of DIV2K's size: the shipped photo, enlarged and rotated."""
    photo = Image.fromarray((runs.photo(torch.device("cpu")) * 255).byte().permute(1, 2, 0).numpy())
    for number in range(count):
        rotated = photo.rotate(90 * number, expand=True).resize((SIZE[1], SIZE[0]), Image.Resampling.LANCZOS)
        rotated.save(folder / f"{number:04d}.png")


def section(folder: Path, cache: str, **options: Any) -> dict[str, Any]:
    """The section of a configuration that trains on a folder of images as the paper does."""
    dataset = {"name": "image-folder", "args": {"root_path": str(folder), "cache": cache, "repeat": 1000}}
    wrapper = {"name": "sr-implicit-downsampled", "args": WRAPPER}
    return {"dataset": dataset, "wrapper": wrapper, "batch_size": BATCH, **options}


def loaders(folder: Path, max_workers: int) -> dict[str, dict[str, Any]]:
    """Sections of a configuration, by the name of the loader."""
    counts = sorted({0, 1, 2, max_workers} & set(range(max_workers + 1)))
    return {
        f"cache {cache}, {workers} workers": section(folder, cache, num_workers=workers)
        for cache in ("none", "bin", "in_memory")
        for workers in counts
    }


def time_batches(
    batches: Iterator[Any], run: Callable[[Any], Any], rounds: int, count: int, device: str
) -> list[float]:
    """Seconds per batch in each of `rounds` rounds of `count` batches, after one round to warm up."""
    found = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        for batch in itertools.islice(batches, count):
            run(batch)
        if device == "cuda":
            torch.cuda.synchronize()
        found.append((time.perf_counter() - begin) / count)
    return found[1:]


def make_stepper(device: torch.device | str, options: StepOptions) -> Stepper:
    """The paper's training step, from the same weights every time."""
    torch.manual_seed(0)
    model: Any = make_model(SPEC).to(device).train()
    return Stepper(model, torch.optim.Adam(model.parameters(), lr=1e-4), options, default_data_norm())


def measure(folder: Path, device: str, rounds: int, count: int, steps: int, max_workers: int) -> dict[str, Any]:
    """Seconds per batch of every loader and of the step, as a result to be saved."""
    result = results.begin(NAME, device, "bench.loader")
    entries: dict[str, dict[str, Any]] = {}

    def add(name: str, kind: str, samples: list[float]) -> None:
        entries[name] = {"kind": kind, "seconds": summary(samples)}
        log(f"{name}: {in_words(entries[name]['seconds']['median'])} per batch")

    for name, options in loaders(folder, max_workers).items():
        loader = data.make_loader(options, shuffle=True, device=device)
        endless = itertools.chain.from_iterable(loader.epoch(epoch) for epoch in itertools.count())
        add(name, "loader", time_batches(endless, lambda batch: batch, rounds, count, device))
        batch = next(loader.epoch())
        del endless, loader  # ends the loader's worker processes
    for autocast in (None, "bf16"):
        step = make_stepper(device, StepOptions(autocast=autocast, channels_last=True)).step
        samples = time_batches(itertools.repeat(batch), step, rounds, steps, device)
        add(f"training step, {autocast or 'float32'}", "step", samples)
    busy = result["machine"]["load_before"] > machine.BUSY_LOAD
    return {**result, "batch": BATCH, "warnings": [machine.SHARED] if busy else [], "entries": entries}


def table(result: dict[str, Any]) -> str:
    """The result as Markdown, with the steps that each loader keeps up with."""
    entries = result["entries"]
    steps = {name: entry["seconds"]["median"] for name, entry in entries.items() if entry["kind"] == "step"}
    rows = []
    for name, entry in entries.items():
        seconds = entry["seconds"]["median"]
        keeps_up = [None if name in steps else "yes" if seconds <= limit else "no" for limit in steps.values()]
        rows.append([name, in_words(seconds), f"{result['batch'] / seconds:.0f}", *keeps_up])
    return tables.markdown(
        ["", "per batch", "images per second", *(f"keeps up with the {name}" for name in steps)], rows
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.loader", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--images", type=Path, help="folder of images (default: eight generated ones of DIV2K's size)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=8, help="per round of a loader (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=None, help="per round (default: 2 on a CPU, 20 on a GPU)")
    parser.add_argument("--workers", type=int, default=2, help="at most (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU, for the step")
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    steps = args.steps or (20 if args.device == "cuda" else 2)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.images or Path(temporary)
        if args.images is None:
            make_images(folder, 8)
        result = measure(folder, args.device, args.rounds, args.batches, steps, args.workers)
    print(table(result))
    print(results.save(result, args.results))


if __name__ == "__main__":
    main()
