"""`liif-fast bench`: the speed of liif_fast on this machine compared with the original formulation, in two minutes.

The original formulation runs in plain PyTorch, in float32 and under autocast, with the public code's chunks of 30,000
queries. The methods of a row take turns, and ratios are taken between samples of the same round. A method whose first
run shows that a second one would take too long is left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import liif_fast
from liif_fast.benchmark import choices, runs, timing
from liif_fast.benchmark.cuda_timing import CudaClock
from liif_fast.benchmark.problem import random_problem
from liif_fast.benchmark.runs import Run
from liif_fast.models import checkpoints
from liif_fast.ops import backends
from liif_fast.utils import hardware, tables
from liif_fast.utils.files import write_atomically

SECONDS = 120.0
_GRACE_S = 10.0  # added to twice the duration, so that a short one does not leave every method out
_TOO_SLOW = "too slow"
_ROUNDS = {"cpu": 9, "cuda": 50}
_16_BITS = {"cpu": "bfloat16", "cuda": "float16"}
_DECODE = {"cpu": ((64, 64), (256, 256)), "cuda": ((256, 256), (1024, 1024))}
_TRAIN = {"cpu": (4, 2304), "cuda": (16, 2304)}  # maps of 48x48, queries per map

Method = tuple[str, str]  # (original or liif_fast, dtype)


class BenchRow(NamedTuple):
    """One piece of work: its name, and a run for every method."""

    name: str
    runs: dict[Method, Run]


class Cell(NamedTuple):
    """Time, speedup against the original in float32 and peak memory of a method, or the reason why they are missing."""

    seconds: dict[str, float] | None
    speedup: dict[str, float] | None
    peak_bytes: int | None
    reason: str = ""


Table = dict[str, dict[Method, Cell]]


def main(device: torch.device, *, seconds: float = SECONDS, json_file: Path | None = None) -> int:
    """Measure for about `seconds`, print the table and write it to `json_file`; 1 where no method ran."""
    clock: timing.Clock = timing.CpuClock() if device.type == "cpu" else CudaClock()
    form, hidden = "{desc} [{elapsed}]", not sys.stderr.isatty()
    with tqdm(desc="preparing", bar_format=form, leave=False, disable=hidden) as bar:
        table = measure(make_rows(device), clock, seconds, bar.set_description_str)
    print("\n".join(header(device)))
    print(render(table), end="")
    if any(cell.reason == _TOO_SLOW for cells in table.values() for cell in cells.values()):
        print(f"{_TOO_SLOW}: left out, because --seconds {seconds:g} are too few for it")
    if device.type == "cuda":
        print("\n".join(["", "the choice among the GPU's backends:", *choices.lines(choices.measure(clock), device)]))
    if json_file is not None:
        write_atomically(json_file, (json.dumps(as_json(table, device), indent=1) + "\n").encode())
    return 0 if any(cell.seconds for cells in table.values() for cell in cells.values()) else 1


def make_rows(device: torch.device) -> list[BenchRow]:
    """The rows for a device, ready to run."""
    kind = device.type if device.type in _DECODE else "cuda"
    (height, width), size = _DECODE[kind]
    decode = random_problem((height, width), out_size=size, device=device)
    maps, queries = _TRAIN[kind]
    train = random_problem((48, 48), queries=queries, batch=maps, device=device)
    model, photo = checkpoints.load("tiny", device=device), runs.photo(device)
    photo_size = (photo.shape[1] * 4, photo.shape[2] * 4)
    rows = [
        BenchRow(f"decode {height}x{width} to {size[0]}x{size[1]}", {}),
        BenchRow(f"decoder's training step, {maps} maps", {}),
        BenchRow(f"photo {photo.shape[2]}x{photo.shape[1]} by 4, with encoder", {}),
    ]
    dtypes = ["float32"] if _emulates_16_bits(device) else ["float32", _16_BITS[kind]]
    for dtype in dtypes:
        rows[0].runs["original", dtype] = runs.original_decode(decode, dtype)
        rows[1].runs["original", dtype] = runs.original_training(train, dtype)
        rows[2].runs["original", dtype] = runs.original_upscale(model, photo, photo_size, dtype)
    for dtype in dtypes:
        rows[0].runs["liif_fast", dtype] = runs.fused_decode(decode, dtype, size)
        rows[1].runs["liif_fast", dtype] = runs.training(train, dtype)
        rows[2].runs["liif_fast", dtype] = runs.fused_upscale(model, photo, photo_size, dtype)
    return rows


def measure(
    rows: Sequence[BenchRow], clock: timing.Clock, seconds: float, progress: Callable[[str], None] = lambda _: None
) -> Table:
    """The cells of every row. The rows share the time; each has a round of all methods that 2 * seconds + 10 s allow.

    progress: called with a line of text before every step.
    """
    table = {}
    begin = perf_counter()
    for place, row in enumerate(rows):
        now = perf_counter()
        ends = (begin + seconds, begin + 2 * seconds + _GRACE_S)
        deadline, last = (now + (end - now) / (len(rows) - place) for end in ends)
        table[row.name] = _measure_row(row, clock, deadline, last, progress)
    return table


def _measure_row(
    row: BenchRow, clock: timing.Clock, deadline: float, last: float, progress: Callable[[str], None]
) -> dict[Method, Cell]:
    """No round but the first starts after `deadline`; methods without time for a round before `last` are left out."""
    candidates = {key: timing.Candidate(" ".join(key), run) for key, run in row.runs.items()}
    peaks = {}
    for key in sorted(candidates, key=lambda method: (method[0], method[1] != "float32")):  # liif_fast first
        candidate = candidates[key]
        progress(f"{row.name}: {', '.join(key)}")
        begin = perf_counter()
        sampling = sum(max(each.seconds, 2 * timing.MIN_SAMPLE_S) for each in candidates.values() if not each.error)
        try:
            with timing.LimitedTime((last - begin - sampling) / 2) as limit:
                peaks[key] = clock.peak(candidate.run)
                limit.check()
            candidate.seconds = perf_counter() - begin
            if candidate.seconds < timing.LONG_S:  # the first run also allocates buffers that later runs reuse
                peaks[key] = clock.peak(candidate.run)
            clock.warm_up(candidate)
        except (RuntimeError, MemoryError) as error:
            candidate.error = _TOO_SLOW if isinstance(error, timing.TooSlow) else timing.failure(error)
    rounds = _ROUNDS.get(clock.device.type, _ROUNDS["cuda"])
    progress(f"{row.name}: rounds")
    timing.interleave(clock, list(candidates.values()), rounds, deadline=deadline)
    original = candidates.get(("original", "float32"))
    cells = {}
    for key, candidate in candidates.items():
        if candidate.error:
            cells[key] = Cell(None, None, None, candidate.error)
            continue
        ratios = timing.pair_ratios(original.samples, candidate.samples) if original and not original.error else {}
        cells[key] = Cell(timing.summary(candidate.samples), timing.summary(ratios) if ratios else None, peaks[key])
    return cells


def header(device: torch.device) -> list[str]:
    """The lines before the table: versions, device, and the meaning of the cells."""
    backend = backends.choose(backends.OpRequest("decode", device.type, torch.float32))
    where = hardware.cpu_model() if device.type == "cpu" else torch.cuda.get_device_name(device)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return [
        f"liif_fast {liif_fast.__version__}, backend {backend}; torch {torch.__version__}; {where}{threads}",
        "original: the public code's formulation in plain PyTorch, chunks of 30,000 queries; 16 bits by autocast",
        "each cell: median time, speedup against the original in float32, peak memory in addition to the inputs",
        *(["bfloat16 is left out: this processor would emulate it slowly"] if _emulates_16_bits(device) else []),
        "",
    ]


def _emulates_16_bits(device: torch.device) -> bool:
    return hardware.emulates(device, runs.DTYPES[_16_BITS["cpu"]])


def render(table: Table) -> str:
    """The table as text."""
    methods = list(next(iter(table.values())))
    rows = [[name, *(_text(cells[method]) for method in methods)] for name, cells in table.items()]
    return tables.plain(["", *(", ".join(method) for method in methods)], rows)


def as_json(table: Table, device: torch.device) -> dict[str, Any]:
    """The table as plain containers."""
    return {
        "about": header(device)[0],
        "rows": {
            name: {" ".join(method): cell._asdict() for method, cell in cells.items()} for name, cells in table.items()
        },
    }


def _text(cell: Cell) -> str:
    if cell.seconds is None:
        return cell.reason
    ratio = f" {cell.speedup['median']:5.2f}x" if cell.speedup else ""
    memory = f" {cell.peak_bytes / 1e6:5.0f} MB" if cell.peak_bytes is not None else ""
    return timing.in_words(cell.seconds["median"]) + ratio + memory
