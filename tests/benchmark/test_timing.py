"""Timing in turns and by round, on a CPU and on a stand-in for a GPU; the peak rates of the machine."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from liif_fast.benchmark import peak_rates, runs, timing
from liif_fast.benchmark.cuda_timing import MAX_CALLS, MAX_EVERY_N_ROUNDS, CudaClock
from liif_fast.benchmark.timing import Candidate, CpuClock, PeakRate
from liif_fast.ops.backends import extension

has_peak = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system has no peak memory")


class CountingClock(CpuClock):
    """A clock whose samples are one run each."""

    def sample(self, candidate: Candidate, turn: int) -> None:
        candidate.samples[turn] = self.once(candidate.run)


def test_candidates_take_turns_and_a_failure_is_a_result() -> None:
    turns: list[str] = []

    def fail() -> None:
        turns.append("b")
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    good, bad = Candidate("a", lambda: turns.append("a")), Candidate("b", fail)
    slow = Candidate("c", lambda: turns.append("c"), every_n_rounds=2)
    assert timing.interleave(CountingClock(), [good, bad, slow], 3) == 3
    assert turns == ["a", "b", "c", "a", "a", "c"]
    assert list(good.samples) == [0, 1, 2] and list(slow.samples) == [0, 2]
    assert bad.error == "out of memory" and not bad.samples


def test_after_the_deadline_only_the_first_round_starts() -> None:
    candidate = Candidate("a", lambda: None)
    assert timing.interleave(CountingClock(), [candidate], 5, deadline=0.0) == 1
    assert list(candidate.samples) == [0]


def test_a_peak_rate_is_the_best_of_its_samples() -> None:
    naps = iter([0.02, 0.001, 0.02])
    rate = PeakRate("nap", 1.0, Candidate("nap", lambda: time.sleep(next(naps))))
    timing.interleave(CountingClock(), [], 1, [rate])
    assert rate.rates[0] > 1 / 0.02
    assert next(naps, None) is None


def test_short_calls_are_repeated_within_a_sample() -> None:
    calls: list[int] = []
    candidate = Candidate("short", lambda: (calls.append(1), time.sleep(0.005)))
    CpuClock().sample(candidate, 0)
    assert len(calls) >= timing.MIN_SAMPLE_S / 0.02
    assert 0.004 < candidate.samples[0] < 0.5


def test_summary_and_ratios() -> None:
    assert timing.summary([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0, "rounds": 6}
    assert timing.summary({7: 2.0}) == {"median": 2.0, "p20": 2.0, "p80": 2.0, "rounds": 1}
    assert timing.pair_ratios({0: 6.0, 1: 8.0, 2: 9.0}, {0: 3.0, 2: 3.0}) == {0: 2.0, 2: 3.0}


@pytest.mark.parametrize(
    "seconds, unit, text",
    [
        (2.0, "", "2.00 s"),
        (1.0284, "ms", "1028 ms"),
        (0.0123, "", "12.3 ms"),
        (907.4, "", "907 s"),
        (4.5e-6, "", "4.50 us"),
        (0.0, "", "0 us"),
    ],
)
def test_times_have_three_digits_and_no_exponent(seconds: float, unit: str, text: str) -> None:
    assert timing.in_words(seconds, unit) == text


@has_peak
def test_peak_memory_is_that_of_the_run() -> None:
    kept = torch.ones(1 << 20)
    peak = CpuClock().peak(lambda: (torch.ones(16 << 20), None)[1])
    assert peak is not None and 60e6 < peak < 120e6
    assert kept.sum() == 1 << 20


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump was found")
@pytest.mark.skipif(not peak_rates.fma_dtypes(), reason="no FMA loop without the extension")
def test_the_fma_loop_keeps_its_operands_in_registers() -> None:
    """Read from the machine code: a comparison of rates would depend on what else the machine runs."""
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", extension.path()]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    bodies = re.findall(r"^\w+ <[^\n]*multiply_add_loop<[^\n]*>:\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    product = r"\t(?:vfmadd|vdpbf16ps)"
    loops = [found[0] for body in bodies if (found := re.search(rf"{product}.*{product}", body, re.DOTALL))]
    if not loops:
        pytest.skip("the extension has no fused multiply-add of x86")
    assert all(len(re.findall(product, loop)) >= 10 for loop in loops)  # latency times rate: fewer chains would wait
    assert not [line for loop in loops for line in loop.splitlines() if "(" in line]


@pytest.mark.parametrize("dtype", peak_rates.fma_dtypes())
def test_every_thread_runs_the_fma_loop(dtype: str) -> None:
    threads, work = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            work.append(extension.OPS.cpu_multiply_add_loop(dtype, 1000))
        fma = peak_rates.fma_peak(dtype)
        assert fma.work == fma.candidate.run()
    finally:
        torch.set_num_threads(threads)
    assert work[1] == 2 * work[0] > 0


def test_the_precision_of_products_is_set_and_restored() -> None:
    cpu, matmul = torch.device("cpu"), torch.backends.cuda.matmul
    before = matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    a = torch.ones(2, 2)
    with runs.matmul_in("tf32", cpu):
        assert matmul.allow_tf32 and torch.backends.cudnn.allow_tf32 and (a @ a).dtype == torch.float32
        with runs.matmul_in("bfloat16", cpu):
            assert not matmul.allow_tf32 and (a @ a).dtype == torch.bfloat16
    assert (matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


# ------------------------------------------------------------------------------------------------- a stand-in for a GPU


class Event:
    """As torch.cuda.Event, on the stand-in's clock."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._at = 0.0

    def record(self) -> None:
        self._at = self._driver.now

    def elapsed_time(self, other: Event) -> float:
        return (other._at - self._at) * 1e3


class Driver:
    """A device whose runs take a given time; the first run after a flush takes longer."""

    device = torch.device("cpu")

    def __init__(self, capture_error: RuntimeError | None = None) -> None:
        self.now, self.cold, self.broken = 0.0, False, False
        self.capture_error = capture_error
        self.log: list[str] = []

    def work(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds * (1.5 if self.cold else 1.0)
            self.cold = False
            self.log.append("run")

        return run

    def synchronize(self) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def event(self) -> Event:
        return Event(self)

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        if self.capture_error:
            raise self.capture_error
        return lambda: (self.log.append("replay"), run())

    def flush(self) -> None:
        self.cold = True
        self.log.append("flush")

    def peak(self, run: Callable[[], Any]) -> int:
        run()
        return 123


def test_a_gpu_is_timed_with_a_cold_and_with_a_warm_cache() -> None:
    driver = Driver()
    clock = CudaClock(driver)
    candidate = Candidate("a", driver.work(1e-3))
    clock.warm_up(candidate)
    assert candidate.captured and candidate.calls == 4 and candidate.every_n_rounds == 1
    driver.log.clear()
    clock.sample(candidate, 5)
    assert candidate.samples == {5: pytest.approx(1.5e-3)} and candidate.warm_l2 == {5: pytest.approx(1e-3)}
    cold, warm = driver.log[: 3 * 4], driver.log[3 * 4 :]
    assert cold == ["flush", "replay", "run"] * 4
    assert warm == ["replay", "run"] * 5, "once untimed, then back to back"
    assert clock.peak(driver.work(1.0)) == 123


@pytest.mark.parametrize(
    "seconds, calls, every", [(1e-6, MAX_CALLS, 1), (2e-3, 2, 1), (0.1, 1, 5), (3.0, 1, MAX_EVERY_N_ROUNDS)]
)
def test_slow_candidates_are_sampled_less_often_on_a_gpu(seconds: float, calls: int, every: int) -> None:
    driver = Driver()
    candidate = Candidate("a", driver.work(seconds))
    CudaClock(driver).warm_up(candidate)
    assert (candidate.calls, candidate.every_n_rounds) == (calls, every)


def test_a_run_that_cannot_be_captured_is_launched_by_the_host() -> None:
    driver = Driver(RuntimeError("operation not permitted when stream is capturing"))
    run = driver.work(1e-3)
    candidate = Candidate("a", run)
    CudaClock(driver).warm_up(candidate)
    assert not candidate.captured and candidate.run is run


def test_out_of_memory_while_capturing_is_out_of_memory() -> None:
    driver = Driver(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        CudaClock(driver).warm_up(Candidate("a", driver.work(1e-3)))
    assert timing.failure(caught.value) == "out of memory"


def test_a_broken_device_is_detected() -> None:
    driver = Driver()
    clock = CudaClock(driver)
    assert not clock.is_broken()
    driver.broken = True
    assert clock.is_broken()
