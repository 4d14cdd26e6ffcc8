"""Timing in turns: methods run A B A B ..., so that drifting clocks and neighbours hit all of them alike.

Ratios are taken between samples of the same round. Beside the methods, yardsticks take turns: a register-only
multiply-add loop, a library's matrix product, a copy. What they reach in a round is what the machine gives just then.
`CpuClock` times here; `liif_fast/benchmark/cuda_timing.py` has the clock of a GPU.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch

MIN_SAMPLE_S = 0.05  # shorter calls are repeated inside one sample


@dataclass
class Contender:
    """A method ready to run.

    launch: what a sample runs: `run` itself or a captured form of it, as the clock's `warm_up` left it.
    calls: how often a sample runs it. samples: seconds a call, by round. hot: the same with a warm L2 (GPU only).
    stride: it takes part in every so-manieth round.
    """

    name: str
    run: Callable[[], Any]
    launch: Callable[[], Any] | None = None
    calls: int = 1
    stride: int = 1
    captured: bool = False
    samples: dict[int, float] = field(default_factory=dict)
    hot: dict[int, float] = field(default_factory=dict)
    error: str = ""


@dataclass
class Yardstick:
    """`work` done by one run, in operations or bytes; its rate is the best of `tries` samples a round."""

    name: str
    work: float
    contender: Contender
    tries: int = 3
    rates: dict[int, float] = field(default_factory=dict)


class Clock(Protocol):
    """How a device is timed."""

    device: torch.device

    def warm_up(self, contender: Contender, seconds: float | None = None) -> None:
        """Run it until warm, and choose how a sample is taken; `seconds` of a run that was timed before."""

    def sample(self, contender: Contender, turn: int) -> None:
        """Add one sample."""

    def once(self, run: Callable[[], Any]) -> float:
        """Seconds of one run, for choices that need no precision."""

    def peak(self, run: Callable[[], Any]) -> int | None:
        """Bytes that a run takes beside what is there before it; None where the system does not say."""

    def is_broken(self) -> bool:
        """Whether this process can no longer use the device."""


class CpuClock:
    """Wall clock of calls on the CPU."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def warm_up(self, contender: Contender, seconds: float | None = None) -> None:
        contender.launch = contender.run
        if seconds is None or seconds < MIN_SAMPLE_S:  # otherwise one run is a sample, whatever it takes
            contender.run()
            seconds = self.once(contender.run)
        contender.calls = max(1, round(MIN_SAMPLE_S / max(seconds, 1e-9)))

    def sample(self, contender: Contender, turn: int) -> None:
        launch = contender.launch or contender.run
        begin = perf_counter()
        for _ in range(contender.calls):
            launch()
        contender.samples[turn] = (perf_counter() - begin) / contender.calls

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


def make_ready(clock: Clock, contender: Contender) -> int | None:
    """Warm a contender up that has run once; returns its run's peak memory."""
    times: list[float] = []
    peak = clock.peak(lambda: times.append(clock.once(contender.run)))
    clock.warm_up(contender, times[0])
    return peak


def interleave(
    clock: Clock,
    contenders: Sequence[Contender],
    rounds: int,
    yardsticks: Sequence[Yardstick] = (),
    *,
    deadline: float | None = None,
) -> int:
    """Time all contenders in turns, up to `rounds` times; fills their samples and the yardsticks' rates.

    A contender that fails keeps its error and drops out. After `deadline` (of `perf_counter`) no round is begun but the
    first. Returns the number of rounds.
    """
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    done = 0
    try:
        for turn in range(rounds):
            if turn and deadline is not None and perf_counter() > deadline:
                break
            for yardstick in yardsticks:
                _measure_rate(clock, yardstick, turn)
            for contender in contenders:
                if not contender.error and turn % contender.stride == 0:
                    _sample(clock, contender, turn)
            done += 1
    finally:
        if collecting:
            gc.enable()
    return done


def _measure_rate(clock: Clock, yardstick: Yardstick, turn: int) -> None:
    best = 0.0
    for _ in range(yardstick.tries):
        _sample(clock, yardstick.contender, turn)
        if yardstick.contender.error:
            return
        best = max(best, yardstick.work / yardstick.contender.samples[turn])
    yardstick.rates[turn] = best


def _sample(clock: Clock, contender: Contender, turn: int) -> None:
    try:
        clock.sample(contender, turn)
    except (RuntimeError, MemoryError) as error:
        contender.error = failure(error)


def summary(samples: Mapping[int, float] | Sequence[float]) -> dict[str, Any]:
    """Median, 20th and 80th percentile, and the samples themselves, to 5 digits."""
    values = list(samples.values() if isinstance(samples, Mapping) else samples)
    ordered = sorted(values)
    p20, p80 = (ordered[0],) * 2 if len(ordered) == 1 else _percentiles(ordered)
    rounded = [float(f"{value:.5g}") for value in (statistics.median(ordered), p20, p80, *values)]
    return {"median": rounded[0], "p20": rounded[1], "p80": rounded[2], "samples": rounded[3:]}


def _percentiles(ordered: list[float]) -> tuple[float, float]:
    fifths = statistics.quantiles(ordered, n=5, method="inclusive")
    return fifths[0], fifths[3]


def pair_ratios(numerators: Mapping[int, float], denominators: Mapping[int, float]) -> dict[int, float]:
    """Ratios of samples taken in the same round, by round."""
    return {turn: numerators[turn] / denominators[turn] for turn in numerators if turn in denominators}


def failure(error: BaseException) -> str:
    """An error as a result: out of memory, or its first line."""
    text = str(error).strip()
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
        return "out of memory"
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"


# ---------------------------------------------------------------------------------------------------- a process' memory


def _status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key} here: this system does not tell a process' memory")


def _reset_peak() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # memory freed but kept would hide as much of the run's own
    Path("/proc/self/clear_refs").write_text("5")
