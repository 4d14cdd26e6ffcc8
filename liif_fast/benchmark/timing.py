"""Timing in turns: candidates run A B A B ..., so that a change of the machine's speed affects all of them alike.

Ratios are taken between samples of the same round. Peak rates (an FMA loop, a matrix product, a copy) are measured in
the same rounds. `CpuClock` uses torch.utils.benchmark; liif_fast/benchmark/cuda_timing.py has the clock of a GPU.
"""

from __future__ import annotations

import ctypes
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.benchmark import Timer

MIN_SAMPLE_S = 0.05  # shorter runs are repeated within one sample
LONG_S = 0.5  # runs that are known to be longer are timed without an untimed run before


@dataclass
class Candidate:
    """One of several ways to do the same work, ready to be timed.

    run: the function that is timed; a clock's `warm_up` may replace it by a captured graph (`captured`).
    calls: runs within one sample. seconds: of one run, if known.
    samples: seconds per run, by round. warm_l2: the same with a warm L2 (GPU only).
    every_n_rounds: sampled once every n rounds.
    error: why the candidate was dropped; '' while it runs.
    """

    name: str
    run: Callable[[], Any]
    calls: int = 1
    seconds: float = 0.0
    every_n_rounds: int = 1
    captured: bool = False
    samples: dict[int, float] = field(default_factory=dict)
    warm_l2: dict[int, float] = field(default_factory=dict)
    error: str = ""


@dataclass
class PeakRate:
    """`work` of one run, in operations or bytes; the rate of a round is the best of `samples_per_round` samples."""

    name: str
    work: float
    candidate: Candidate
    samples_per_round: int = 3
    rates: dict[int, float] = field(default_factory=dict)


class TooSlow(RuntimeError):
    """A run that was given up because it takes longer than it may."""


class LimitedTime(TorchFunctionMode):
    """Raises TooSlow in a block that takes longer than `seconds`: at its next op of PyTorch on a tensor, or `check`."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._end = perf_counter() + seconds

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(each, torch.Tensor) for each in args):  # not in what ends no_grad or autocast
            self.check()
        return func(*args, **(kwargs or {}))

    def check(self) -> None:
        """Raise TooSlow if the time is over."""
        if perf_counter() > self._end:
            raise TooSlow("too slow")


class Clock(Protocol):
    """How a device is timed."""

    device: torch.device

    def warm_up(self, candidate: Candidate) -> None:
        """Prepare a candidate for `sample`."""

    def sample(self, candidate: Candidate, turn: int) -> None:
        """Add one sample."""

    def once(self, run: Callable[[], Any]) -> float:
        """Seconds of one run, for choices that need no precision."""

    def peak(self, run: Callable[[], Any]) -> int | None:
        """Bytes that a run allocates in addition to the memory used before it; None where the system has no counter."""

    def is_broken(self) -> bool:
        """Whether this process can no longer use the device."""


class CpuClock:
    """Wall-clock time on the CPU, by torch.utils.benchmark with all of torch's threads."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def warm_up(self, candidate: Candidate) -> None:
        """Nothing to do: every sample starts with an untimed run."""

    def sample(self, candidate: Candidate, turn: int) -> None:
        if candidate.seconds > LONG_S:
            candidate.samples[turn] = self.once(candidate.run)
            return
        timer = Timer("run()", globals={"run": candidate.run}, num_threads=torch.get_num_threads())
        measured = timer.blocked_autorange(min_run_time=MIN_SAMPLE_S)
        candidate.samples[turn], candidate.calls = measured.median, measured.number_per_run

    def once(self, run: Callable[[], Any]) -> float:
        begin = perf_counter()
        run()
        return perf_counter() - begin

    def peak(self, run: Callable[[], Any]) -> int | None:
        if not Path("/proc/self/clear_refs").exists():
            return None
        _reset_peak()
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)

    def is_broken(self) -> bool:
        return False


def interleave(
    clock: Clock,
    candidates: Sequence[Candidate],
    rounds: int,
    peak_rates: Sequence[PeakRate] = (),
    *,
    deadline: float | None = None,
) -> int:
    """Sample all candidates in turns, up to `rounds` times, and measure the peak rates in every round.

    A candidate that fails keeps its error and is dropped. After `deadline` (of `perf_counter`) no round starts except
    the first. Returns the number of rounds.
    """
    for turn in range(rounds):
        if turn and deadline is not None and perf_counter() > deadline:
            return turn
        for rate in peak_rates:
            _measure_rate(clock, rate, turn)
        for candidate in candidates:
            if not candidate.error and turn % candidate.every_n_rounds == 0:
                _sample(clock, candidate, turn)
    return rounds


def _measure_rate(clock: Clock, rate: PeakRate, turn: int) -> None:
    best = 0.0
    for _ in range(rate.samples_per_round):
        _sample(clock, rate.candidate, turn)
        if rate.candidate.error:
            return
        best = max(best, rate.work / rate.candidate.samples[turn])
    rate.rates[turn] = best


def _sample(clock: Clock, candidate: Candidate, turn: int) -> None:
    try:
        clock.sample(candidate, turn)
    except (RuntimeError, MemoryError) as error:
        candidate.error = failure(error)


def summary(samples: Mapping[int, float] | Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, to 5 digits, and the number of samples."""
    values = list(samples.values() if isinstance(samples, Mapping) else samples)
    fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    numbers = {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[3]}
    return {**{key: float(f"{value:.5g}") for key, value in numbers.items()}, "rounds": len(values)}


def in_words(seconds: float, unit: str = "") -> str:
    """A time in three digits, never with an exponent: '2.02 s', '907 ms'. unit: s, ms or us; '' selects by size."""
    size = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
    unit = unit or next((name for name, limit in size.items() if seconds >= limit), "us")
    value = seconds / size[unit]
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{digits}f} {unit}"


def pair_ratios(numerators: Mapping[int, float], denominators: Mapping[int, float]) -> dict[int, float]:
    """Ratios of samples taken in the same round, by round."""
    return {turn: numerators[turn] / denominators[turn] for turn in numerators if turn in denominators}


def failure(error: BaseException) -> str:
    """The text of an error for a result: 'out of memory', or the error's first line."""
    text = str(error).strip()
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
        return "out of memory"
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"


def _status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}: this system does not report the memory of a process")


def _reset_peak() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # a run could otherwise reuse freed memory that malloc keeps, and its peak would be too low
    Path("/proc/self/clear_refs").write_text("5")
