"""Timing on a CPU: methods take turns (A B A B ...), so that drifting clocks and neighbours hit all of them alike.

Beside every turn a loop that only multiplies and adds in registers is timed on as many threads: its rate is what the
arithmetic units give at that moment, and the yardstick for each method's own rate.
"""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

_MIN_SAMPLE_S = 0.05  # shorter calls are repeated inside one sample
_LOOP_S = 0.03


@dataclass
class Contender:
    """A method ready to run; `samples` are seconds a call, one a round."""

    name: str
    run: Callable[[], Any]
    calls: int = 1
    samples: list[float] = field(default_factory=list)
    error: str = ""


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median, 20th and 80th percentile, and the samples themselves, to 5 digits."""
    ordered = sorted(samples)
    p20, p80 = (ordered[0],) * 2 if len(ordered) == 1 else _percentiles(ordered)
    rounded = [float(f"{value:.5g}") for value in (statistics.median(ordered), p20, p80, *samples)]
    return {"median": rounded[0], "p20": rounded[1], "p80": rounded[2], "samples": rounded[3:]}


def _percentiles(ordered: list[float]) -> tuple[float, float]:
    fifths = statistics.quantiles(ordered, n=5, method="inclusive")
    return fifths[0], fifths[3]


def pair_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Ratios of samples taken in the same round."""
    return [a / b for a, b in zip(numerators, denominators)]


def warm_up(contender: Contender) -> None:
    """Run until warm, and choose how many calls make a sample long enough to time."""
    contender.run()
    begin = perf_counter()
    contender.run()
    contender.calls = max(1, round(_MIN_SAMPLE_S / max(perf_counter() - begin, 1e-9)))


def interleave(contenders: Sequence[Contender], rounds: int, loop_dtypes: Sequence[str]) -> dict[str, list[float]]:
    """Time all contenders in turns, `rounds` times; fills their samples.

    A contender that fails keeps its error and drops out. Returns the loop's rate in FLOP/s, a number a round, by dtype.
    """
    loops: dict[str, list[float]] = {dtype: [] for dtype in loop_dtypes}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for dtype, rates in loops.items():
                rates.append(loop_rate(dtype))
            for contender in contenders:
                if not contender.error:
                    _sample(contender)
    finally:
        if collecting:
            gc.enable()
    return loops


def _sample(contender: Contender) -> None:
    try:
        begin = perf_counter()
        for _ in range(contender.calls):
            contender.run()
        contender.samples.append((perf_counter() - begin) / contender.calls)
    except (RuntimeError, MemoryError) as error:
        contender.error = failure(error)


def failure(error: BaseException) -> str:
    """An error as a result: out of memory, or its first line."""
    text = str(error).strip()
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return "out of memory"
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"


def loop_dtypes() -> list[str]:
    """Dtypes whose multiply-add loop this processor and build can run."""
    ops = torch.ops.liif_fast_C
    if not hasattr(ops, "cpu_multiply_add_loop"):
        return []
    return ["float32", "bfloat16"] if ops.cpu_has_bf16() else ["float32"]


def loop_rate(dtype: str, tries: int = 3) -> float:
    """FLOP/s of the register-only multiply-add loop on all of torch's threads together: the best of a few tries."""
    repetitions = _loop_repetitions(dtype)
    return max(_run_loop(dtype, repetitions)[1] for _ in range(tries))


_repetitions: dict[str, int] = {}


def _loop_repetitions(dtype: str) -> int:
    """How many repetitions take about `_LOOP_S`."""
    if dtype not in _repetitions:
        count = 1000
        while (spent := _run_loop(dtype, count)[0]) < _LOOP_S / 4:
            count *= 4
        _repetitions[dtype] = round(count * _LOOP_S / spent)
    return _repetitions[dtype]


def _run_loop(dtype: str, repetitions: int) -> tuple[float, float]:
    """Seconds spent, and FLOP/s."""
    begin = perf_counter()
    operations = torch.ops.liif_fast_C.cpu_multiply_add_loop(dtype, repetitions)
    spent = perf_counter() - begin
    return spent, operations / spent


def note(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)
