"""`liif-fast bench`: in two minutes, what a user gets on this machine against what they had.

What they had is the original formulation in plain PyTorch, eager and under autocast, with the public code's chunks of
30,000 queries. All methods of a row take turns, and ratios are taken between samples of the same round.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import liif_fast
from liif_fast import ops
from liif_fast.benchmark import original
from liif_fast.benchmark.cuda_timing import CudaClock
from liif_fast.benchmark.problem import Problem, random_problem
from liif_fast.benchmark.timing import Clock, Contender, CpuClock, failure, interleave, make_ready, pair_ratios, summary
from liif_fast.images.upscaling import upscale
from liif_fast.models import checkpoints
from liif_fast.ops import backends
from liif_fast.utils import hardware
from liif_fast.utils.files import write_atomically

SECONDS = 120.0
_ROUNDS = {"cpu": 9, "cuda": 50}
_SIXTEEN = {"cpu": torch.bfloat16, "cuda": torch.float16}
_DECODE = {"cpu": ((64, 64), (256, 256)), "cuda": ((256, 256), (1024, 1024))}
_BATCH = {"cpu": 4, "cuda": 16}
_PHOTO = Path(liif_fast.__file__).parent / "assets" / "demo.png"

Run = Callable[[], Any]


class Row(NamedTuple):
    """A job: its name, and how to do it, by (here or original, float32 or 16 bits)."""

    name: str
    runs: dict[tuple[str, torch.dtype], Run]


class Cell(NamedTuple):
    """seconds and peak_bytes of a method, speedup against the original in float32; or the reason why there are none."""

    seconds: dict[str, Any] | None
    speedup: dict[str, Any] | None
    peak_bytes: int | None
    reason: str = ""


def main(device: torch.device, *, seconds: float = SECONDS, json_file: Path | None = None) -> int:
    """Measure for about `seconds`, print the table and write it to `json_file`; 1 where not one method ran."""
    clock: Clock = CpuClock() if device.type == "cpu" else CudaClock()
    rows = make_rows(device)
    table = measure(rows, clock, seconds)
    print("\n".join(header(device)))
    print(render(table))
    if json_file is not None:
        write_atomically(json_file, (json.dumps(as_json(table, device), indent=1) + "\n").encode())
    return 0 if any(cell.seconds for cells in table.values() for cell in cells.values()) else 1


def make_rows(device: torch.device) -> list[Row]:
    """The jobs for a device, ready to run."""
    small = device.type if device.type in _DECODE else "cuda"
    map_size, out_size = _DECODE[small]
    dtypes = (torch.float32, _SIXTEEN[small])
    decode = random_problem(map_size, out_size=out_size, device=device)
    train = random_problem((48, 48), queries=2304, batch=_BATCH[small], device=device)
    rows = [
        Row(f"decode {map_size[0]}x{map_size[1]} to {out_size[0]}x{out_size[1]}", {}),
        Row(f"decoder's training step, {_BATCH[small]} maps", {}),
        Row("photo 160x120 by 4, encoder too", {}),
    ]
    model = checkpoints.load(device=device)
    photo = _photo(device)
    for dtype in dtypes:
        rows[0].runs["original", dtype] = _original_decode(decode, dtype)
        rows[1].runs["original", dtype] = _original_step(train, dtype)
        rows[2].runs["original", dtype] = _original_upscale(model, photo, dtype)
    for dtype in dtypes:
        rows[0].runs["here", dtype] = _decode(decode, out_size, dtype)
        rows[1].runs["here", dtype] = _step(train, dtype)
        rows[2].runs["here", dtype] = _upscale(model, photo, dtype)
    return rows


def measure(rows: Sequence[Row], clock: Clock, seconds: float) -> dict[str, dict[tuple[str, torch.dtype], Cell]]:
    """Every row's cells; each row gets its share of the time, and at least one round."""
    table = {}
    end = perf_counter() + seconds
    for place, row in enumerate(rows):
        now = perf_counter()
        deadline = now + (end - now) / (len(rows) - place)
        table[row.name] = _measure_row(row, clock, deadline)
    return table


def _measure_row(row: Row, clock: Clock, deadline: float) -> dict[tuple[str, torch.dtype], Cell]:
    contenders, peaks, reasons = {}, {}, {}
    for key, run in row.runs.items():
        contender = Contender(" ".join(map(str, key)), run)
        try:
            run()  # what is made once is no part of the peak
            peaks[key] = make_ready(clock, contender)
            contenders[key] = contender
        except (RuntimeError, MemoryError) as error:
            reasons[key] = failure(error)
    rounds = _ROUNDS.get(clock.device.type, _ROUNDS["cuda"])
    interleave(clock, list(contenders.values()), rounds, deadline=deadline)
    first = contenders.get(("original", torch.float32))
    cells = {}
    for key in row.runs:
        if key not in contenders or contenders[key].error:
            cells[key] = Cell(None, None, None, reasons.get(key) or contenders[key].error)
            continue
        contender = contenders[key]
        ratios = pair_ratios(first.samples, contender.samples) if first and not first.error else {}
        cells[key] = Cell(summary(contender.samples), summary(ratios) if ratios else None, peaks[key])
    return cells


def header(device: torch.device) -> list[str]:
    """What was measured, on what."""
    backend = backends.choose(backends.OpRequest("decode", device.type, torch.float32))
    where = hardware.cpu_model() if device.type == "cpu" else torch.cuda.get_device_name(device)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return [
        f"liif_fast {liif_fast.__version__}, backend {backend}; torch {torch.__version__}; {where}{threads}",
        "original: the public code's formulation in plain PyTorch, chunks of 30,000 queries; 16 bits by autocast",
        "each cell: median time, ratio to the original in float32, peak memory beside the inputs",
        "",
    ]


def render(table: dict[str, dict[tuple[str, torch.dtype], Cell]]) -> str:
    """The table as text."""
    keys = list(next(iter(table.values())))
    titles = [f"{who}, {str(dtype).removeprefix('torch.')}" for who, dtype in keys]
    lines = [["", *titles]]
    for name, cells in table.items():
        lines.append([name, *(_in_words(cells[key]) for key in keys)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(keys) + 1)]
    rows = [
        line[0].ljust(widths[0]) + "".join(f"  {c.rjust(w)}" for c, w in zip(line[1:], widths[1:])) for line in lines
    ]
    return "\n".join(rows)


def as_json(table: dict[str, dict[tuple[str, torch.dtype], Cell]], device: torch.device) -> dict[str, Any]:
    """The table as plain containers."""
    return {
        "about": header(device)[0],
        "rows": {
            name: {f"{who} {str(dtype).removeprefix('torch.')}": cell._asdict() for (who, dtype), cell in cells.items()}
            for name, cells in table.items()
        },
    }


def _in_words(cell: Cell) -> str:
    if cell.seconds is None:
        return cell.reason
    median = cell.seconds["median"]
    time = f"{median:.3g} s" if median >= 1 else f"{median * 1e3:.3g} ms"
    ratio = f" {cell.speedup['median']:5.2f}x" if cell.speedup else ""
    memory = f" {cell.peak_bytes / 1e6:5.0f} MB" if cell.peak_bytes is not None else ""
    return time + ratio + memory


# ------------------------------------------------------------------------------------------------------------ the jobs


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    sixteen = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype if sixteen else None, enabled=sixteen)


def _original_decode(problem: Problem, dtype: torch.dtype) -> Run:
    imnet = original.make_imnet(problem.weights, problem.biases)

    def run() -> Tensor:
        with _autocast(problem.feat.device, dtype):
            return original.predict(problem.feat, problem.coord, problem.cell, imnet)

    return run


def _decode(problem: Problem, size: tuple[int, int], dtype: torch.dtype) -> Run:
    feat, _, _, weights, biases = problem.to(dtype)

    def run() -> Tensor:
        with torch.no_grad():
            return ops.render(feat, size, weights, biases)

    return run


def _original_step(problem: Problem, dtype: torch.dtype) -> Run:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in problem.leaves()]
    layers = len(problem.weights)
    feat, weights, biases = leaves[0], leaves[1 : 1 + layers], leaves[1 + layers :]
    imnet = original.make_imnet(weights, biases)
    linears = [layer for layer in imnet if isinstance(layer, nn.Linear)]
    parameters = [*(layer.weight for layer in linears), *(layer.bias for layer in linears)]

    def run() -> tuple[Tensor, ...]:
        with _autocast(feat.device, dtype):
            out = original.query(feat, problem.coord, problem.cell, imnet)
        return torch.autograd.grad(out.float().abs().mean(), [feat, *parameters])

    return run


def _step(problem: Problem, dtype: torch.dtype) -> Run:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in problem.leaves()]
    layers = len(problem.weights)
    feat, weights, biases = leaves[0], leaves[1 : 1 + layers], leaves[1 + layers :]

    def run() -> tuple[Tensor, ...]:
        with _autocast(feat.device, dtype):
            out = ops.query(feat, problem.coord, problem.cell, weights, biases)
        return torch.autograd.grad(out.float().abs().mean(), leaves)

    return run


def _photo(device: torch.device) -> Tensor:
    """The shipped photo, [3, H, W] in [0, 1]."""
    with Image.open(_PHOTO) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float().div(255).to(device)


def _original_upscale(model: nn.Module, photo: Tensor, dtype: torch.dtype) -> Run:
    height, width = photo.shape[1] * 4, photo.shape[2] * 4

    def run() -> Tensor:
        with torch.no_grad(), _autocast(photo.device, dtype):
            feat = model.encoder((photo.unsqueeze(0) - 0.5) / 0.5)  # type: ignore[operator]
            coord = original.make_coord(height, width, photo).view(1, -1, 2)
            cell = original.make_cell(height, width, coord)
            out = original.predict(feat, coord, cell, model.imnet)  # type: ignore[arg-type]
            return (out * 0.5 + 0.5).clamp_(0, 1)[0].view(height, width, 3).permute(2, 0, 1)

    return run


def _upscale(model: nn.Module, photo: Tensor, dtype: torch.dtype) -> Run:
    return lambda: upscale(photo, scale=4, model=model, dtype=dtype)
