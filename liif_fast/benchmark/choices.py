"""Whether the table of preferred backends chooses the faster one: every GPU backend does the same work, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch

import liif_fast
from liif_fast import ops
from liif_fast.benchmark import runs, timing
from liif_fast.benchmark.problem import HIDDEN, OUTS, random_problem
from liif_fast.ops import backends
from liif_fast.ops.backends import gpu, preferences

ROUNDS = 5
NAMES = ("cuda", "triton")
# (training, dtype of products, map, output or number of queries of each of 16 maps)
WORK = (
    (False, "float16", (256, 256), (1024, 1024)),
    (False, "bfloat16", (256, 256), (1024, 1024)),
    (False, "float32", (256, 256), (1024, 1024)),
    (False, "float16", (48, 48), (48, 48)),
    (True, "float16", (48, 48), 2304),
    (True, "bfloat16", (48, 48), 2304),
    (True, "float32", (48, 48), 2304),
)


class Choice(NamedTuple):
    """One piece of work: seconds of each backend that can do it, and the backend that the table chooses."""

    training: bool
    dtype: str
    queries: int
    seconds: dict[str, float]
    chosen: str


def measure(clock: timing.Clock, names: Sequence[str] = NAMES, work: Sequence[tuple] = WORK) -> list[Choice]:
    """The work that at least two of the backends can do; one that fails is left out."""
    found = []
    for training, dtype, map_size, size in work:
        request = _request(clock.device, training, dtype, 16 * size if isinstance(size, int) else size[0] * size[1])
        able = [name for name in names if backends.BACKENDS[name](request)]
        candidates = [
            timing.Candidate(name, _run(clock.device, name, training, dtype, map_size, size)) for name in able
        ]
        for candidate in candidates:
            try:
                clock.warm_up(candidate)
                candidate.seconds = clock.once(candidate.run)
            except (RuntimeError, MemoryError) as error:
                candidate.error = timing.failure(error)
        timing.interleave(clock, candidates, ROUNDS)
        seconds = {each.name: statistics.median(each.samples.values()) for each in candidates if not each.error}
        if len(seconds) > 1:
            chosen = next(name for name in backends.in_order(request) if name in seconds)
            found.append(Choice(training, dtype, request.queries or 0, seconds, chosen))
    return found


def _request(device: torch.device, training: bool, dtype: str, queries: int) -> backends.OpRequest:
    multiplied = runs.DTYPES[dtype]
    features = torch.float32 if training else multiplied
    place = device.type, features, (*HIDDEN, OUTS), device.index
    return backends.OpRequest("decode", *place, multiplied, training, queries)


def _run(device: torch.device, name: str, training: bool, dtype: str, map_size: tuple, size: tuple | int) -> runs.Run:
    if isinstance(size, int):
        problem = random_problem(map_size, queries=size, batch=16, device=device)
        return runs.training(problem, dtype, query=lambda *tensors: ops.query(*tensors, backend=name))
    return runs.fused_decode(random_problem(map_size, out_size=size, device=device), dtype, size, name)


def lines(choices: Sequence[Choice], device: torch.device) -> list[str]:
    """One line for each piece of work, and after it the line to report where another choice is 3 % faster."""
    text = []
    for training, dtype, queries, seconds, chosen in choices:
        what = f"{'training' if training else 'decode'}, {dtype}, {queries} queries"
        best = min(seconds, key=seconds.__getitem__)
        times = ", ".join(f"{name} {timing.in_words(value)}" for name, value in seconds.items())
        if seconds[chosen] <= 1.03 * seconds[best]:
            text.append(f"{what}: {times}; {chosen}, the choice of the table, is right")
            continue
        row = backends.preference(_request(device, training, dtype, queries))
        gain, source = seconds[chosen] / seconds[best], row.source if row else preferences.NO_ROW
        text.append(f"{what}: {times}; {best} would have been {gain:.2f}x as fast as the chosen {chosen}")
        text.append(
            f"  to report: {what}: {best} before {chosen} ({times}); table: {source}; "
            f"liif_fast {liif_fast.__version__}, {gpu.describe(device)}"
        )
    return text
