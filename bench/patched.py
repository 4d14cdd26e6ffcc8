"""Times the loops of existing LIIF code with and without `liif_fast.patch()`.

`python -m bench.patched [--device cuda]`: inference is the public code's loop, EDSR-baseline and then chunks of 30,000
queries, for an image of 64x64 enlarged to 256x256. The training step is the paper's. Both models have the class of
`bench.training_step`'s original; in one of the two the class is patched. The loops take turns, so the ratios come from
one run. The result is saved next to those of bench.run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import liif_fast
from bench import results
from bench.loader import BATCH, WRAPPER, make_stepper
from bench.training_step import OriginalLIIF
from bench.turns import parser, start, take_turns
from liif_fast.benchmark import original
from liif_fast.benchmark.timing import Clock, in_words
from liif_fast.training.step import StepOptions
from liif_fast.utils import tables

NAME = "patched"  # of the result file
LOOPS = {"inference": "inference, 64x64 to 256x256", "training": "training step"}
SIZE, SCALE = 64, 4


class _Patched(OriginalLIIF):
    """The same class with the function in its own namespace: patching it leaves the original alone."""

    query_rgb = OriginalLIIF.query_rgb


def predict(model: Any, inp: Tensor, coord: Tensor, cell: Tensor, chunk: int = original.CHUNK) -> Tensor:
    """The public code's inference: inp [B,3,H,W], coord and cell [B,Q,2] -> [B,Q,3]."""
    with torch.no_grad():
        model.gen_feat(inp)
        parts = range(0, coord.shape[1], chunk)
        return torch.cat([model.query_rgb(coord[:, at : at + chunk], cell[:, at : at + chunk]) for at in parts], dim=1)


def make_loops(cls: type[nn.Module], device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Both loops of a class, on the same weights and inputs every time, by their names in LOOPS."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device)

    model: Any = make_stepper(device, StepOptions()).model.eval()
    stepper = make_stepper(device, StepOptions())
    for each in (model, stepper.model):
        each.__class__ = cls
    inp, size = random(1, 3, SIZE, SIZE), SIZE * SCALE
    coord = original.make_coord(size, size, inp).view(1, -1, 2)
    cell = original.make_cell(size, size, coord)
    crop, samples = WRAPPER["inp_size"], WRAPPER["sample_q"]
    batch = {"inp": random(BATCH, 3, crop, crop), "coord": random(BATCH, samples, 2) * 2 - 1}
    batch |= {"cell": random(BATCH, samples, 2) / crop, "gt": random(BATCH, samples, 3)}
    return {"inference": lambda: predict(model, inp, coord, cell), "training": lambda: stepper.step(batch)}


def measure(clock: Clock, rounds: int) -> dict[str, Any]:
    """Seconds of both loops, original and patched, as a result to be saved."""
    result = results.begin(NAME, clock.device.type, "bench.patched")
    with liif_fast.patched(_Patched):
        by_code = {"original": make_loops(OriginalLIIF, clock.device), "patched": make_loops(_Patched, clock.device)}
        runs = {f"{loop}: {code}": by_code[code][loop] for loop in LOOPS for code in by_code}
        measured = take_turns(clock, runs, rounds, lambda name: f"{name.rpartition(': ')[0]}: original")
    return {**result, "batch": BATCH, **measured}


def table(result: dict[str, Any]) -> str:
    """One row per loop: the time of the original code, the time after patch(), the ratio."""
    rows = []
    for loop, label in LOOPS.items():
        before, after = (result["entries"][f"{loop}: {code}"] for code in ("original", "patched"))
        if failed := before.get("failed") or after.get("failed"):
            raise RuntimeError(f"{label} failed: {failed}")
        seconds = [in_words(entry["seconds"]["median"]) for entry in (before, after)]
        rows.append([label, *seconds, f"{after['speedup']['median']:.2f}x"])
    return tables.markdown(["EDSR-baseline-LIIF, float32", "original", "after patch()", "speedup"], rows)


def main(arguments: list[str] | None = None) -> None:
    args = parser("patched", __doc__).parse_args(arguments)
    result = measure(*start(args))
    print(table(result))
    print(results.save(result, args.results))


if __name__ == "__main__":
    main()
