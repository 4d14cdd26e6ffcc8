"""How benchmarks take time: in turns, by round, on a CPU and on a GPU (a stand-in for one); who watches a GPU's run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import measure, results, supervise
from liif_fast.benchmark import timing, yardsticks
from liif_fast.benchmark.cuda_timing import MAX_CALLS, MAX_STRIDE, CudaClock
from liif_fast.benchmark.timing import Contender, CpuClock, Yardstick
from tests.helpers import reason_against


def fail() -> None:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


def test_contenders_take_turns_and_a_failure_is_a_result() -> None:
    turns: list[str] = []

    def broken() -> None:
        turns.append("b")
        fail()

    good, bad = Contender("a", lambda: turns.append("a")), Contender("b", broken)
    slow = Contender("c", lambda: turns.append("c"), stride=2)
    assert timing.interleave(CpuClock(), [good, bad, slow], 3) == 3
    assert turns == ["a", "b", "c", "a", "a", "c"]
    assert list(good.samples) == [0, 1, 2] and list(slow.samples) == [0, 2]
    assert bad.error == "out of memory" and not bad.samples


def test_no_round_is_begun_after_the_deadline_but_the_first() -> None:
    contender = Contender("a", lambda: None)
    assert timing.interleave(CpuClock(), [contender], 5, deadline=0.0) == 1
    assert list(contender.samples) == [0]


def test_a_yardstick_is_the_best_of_its_tries() -> None:
    naps = iter([0.02, 0.001, 0.02])
    stick = Yardstick("nap", 1.0, Contender("nap", lambda: time.sleep(next(naps))))
    timing.interleave(CpuClock(), [], 1, [stick])
    assert stick.rates[0] > 1 / 0.02
    assert next(naps, None) is None


def test_short_calls_are_repeated_inside_a_sample() -> None:
    calls: list[int] = []
    contender = Contender("short", lambda: (calls.append(1), time.sleep(0.005)))
    clock = CpuClock()
    clock.warm_up(contender)
    assert 2 <= contender.calls <= 10
    before = len(calls)
    clock.sample(contender, 0)
    assert len(calls) - before == contender.calls
    assert 0.004 < contender.samples[0] < 0.5


def test_summary_and_ratios() -> None:
    assert timing.summary([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == {
        "median": 3.5,
        "p20": 2.0,
        "p80": 5.0,
        "samples": [3.0, 1.0, 2.0, 5.0, 4.0, 6.0],
    }
    assert timing.summary({7: 2.0})["p80"] == 2.0
    assert timing.pair_ratios({0: 6.0, 1: 8.0, 2: 9.0}, {0: 3.0, 2: 3.0}) == {0: 2.0, 2: 3.0}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not tell a process' memory")
def test_peak_memory_is_that_of_the_run() -> None:
    kept = torch.ones(1 << 20)
    peak = CpuClock().peak(lambda: (torch.ones(16 << 20), None)[1])
    assert peak is not None and 60e6 < peak < 120e6
    assert kept.sum() == 1 << 20


@pytest.mark.parametrize("dtype", yardsticks.loop_dtypes())
def test_the_loop_is_faster_than_a_library_product(dtype: str) -> None:
    """By the thread's own processor time, as other programs may run beside it; best of a few, so that clocks are up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a = torch.randn(512, 512).to(getattr(torch, dtype))
        product = max(_rate(lambda: a @ a, 2.0 * 512**3) for _ in range(20))
        stick = yardsticks.loop(dtype)
        loop = max(_rate(stick.contender.run, stick.work) for _ in range(5))
    finally:
        torch.set_num_threads(threads)
    assert loop > product > 0, "the loop waits for something: is it kept in registers?"


def _rate(work: Callable[[], Any], done: float) -> float:
    begin = time.thread_time()
    work()
    return done / (time.thread_time() - begin)


@pytest.mark.skipif(not yardsticks.loop_dtypes(), reason=reason_against("cpu", "query", torch.float32) or "no loop")
def test_two_threads_run_the_loop_at_once() -> None:
    """Loosely: other programs may take the processors away at any moment."""
    threads = torch.get_num_threads()
    rates = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            stick = yardsticks.loop("float32")
            timing.interleave(CpuClock(), [], 1, [stick])
            rates.append(stick.rates[0])
    finally:
        torch.set_num_threads(threads)
    assert rates[1] > rates[0] / 4 > 0


def test_precision_is_switched_and_switched_back() -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with yardsticks.precision(True):
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
        with yardsticks.precision(False):
            assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_preparing_is_stopped_when_it_takes_too_long() -> None:
    with pytest.raises(measure.TooSlow, match="more than 0 s"), measure.time_limit(0.05):
        time.sleep(5)


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
    """A device whose runs take the time they say; the first after a flush takes longer."""

    device = torch.device("cpu")

    def __init__(self, *, captures: bool = True) -> None:
        self.now, self.cold, self.captures, self.broken = 0.0, False, captures, False
        self.log: list[str] = []

    def work(self, seconds: float, name: str = "run") -> Callable[[], None]:
        def run() -> None:
            self.now += seconds * (1.5 if self.cold else 1.0)
            self.cold = False
            self.log.append(name)

        return run

    def synchronize(self) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def event(self) -> Event:
        return Event(self)

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")

        def replay() -> None:
            self.log.append("replay")
            run()

        return replay

    def flush(self) -> None:
        self.cold = True
        self.log.append("flush")

    def peak(self, run: Callable[[], Any]) -> int:
        run()
        return 123


def test_a_gpu_is_timed_with_a_cold_and_with_a_warm_cache() -> None:
    driver = Driver()
    clock = CudaClock(driver)
    contender = Contender("a", driver.work(1e-3))
    clock.warm_up(contender)
    assert contender.captured and contender.calls == 4 and contender.stride == 1
    driver.log.clear()
    clock.sample(contender, 5)
    assert contender.samples == {5: pytest.approx(1.5e-3)} and contender.hot == {5: pytest.approx(1e-3)}
    cold, hot = driver.log[: 3 * 4], driver.log[3 * 4 :]
    assert cold == ["flush", "replay", "run"] * 4
    assert hot == ["replay", "run"] * 5, "once untimed, then back to back"
    assert clock.peak(driver.work(1.0)) == 123


def test_what_cannot_be_captured_is_launched_by_the_host() -> None:
    driver = Driver(captures=False)
    contender = Contender("a", driver.work(1e-3))
    CudaClock(driver).warm_up(contender)
    assert not contender.captured and contender.launch is contender.run


@pytest.mark.parametrize(
    "seconds, calls, stride", [(1e-6, MAX_CALLS, 1), (2e-3, 2, 1), (0.1, 1, 5), (3.0, 1, MAX_STRIDE)]
)
def test_slow_methods_take_fewer_turns_on_a_gpu(seconds: float, calls: int, stride: int) -> None:
    driver = Driver()
    contender = Contender("a", driver.work(seconds))
    CudaClock(driver).warm_up(contender)
    assert (contender.calls, contender.stride) == (calls, stride)


def test_out_of_memory_while_capturing_is_out_of_memory() -> None:
    driver = Driver()
    driver.capture = lambda run: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))  # type: ignore
    with pytest.raises(torch.OutOfMemoryError) as caught:
        CudaClock(driver).warm_up(Contender("a", driver.work(1e-3)))
    assert timing.failure(caught.value) == "out of memory"


def test_a_broken_device_is_noticed() -> None:
    driver = Driver()
    clock = CudaClock(driver)
    assert not clock.is_broken()
    driver.broken = True
    assert clock.is_broken()


# ------------------------------------------------------------------------------------------------- who watches the run

# Measures two workloads of two methods each; b breaks the process, c never ends.
CHILD = """
import json, os, sys, time
from pathlib import Path
path = Path(sys.argv[1])
result = json.loads(path.read_text())
def save():
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result))
    temporary.rename(path)
for workload, methods in {"one": ["a", "b"], "two": ["c", "d"]}.items():
    if workload in result["workloads"]:
        continue
    lost = result.get("lost", {}).get(workload, {})
    for method in methods:
        result["running"] = {"workload": workload, "method": method, "since": time.time()}
        save()
        if method in lost:
            continue
        if method == "b":
            os.abort()
        if method == "c":
            time.sleep(60)
    result["workloads"][workload] = {"methods": {m: lost.get(m, "ok") for m in methods}}
    save()
for key in ("planned", "running"):
    del result[key]
save()
"""


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    path = tmp_path / "result.json"
    begun = {"schema": results.SCHEMA, "planned": ["one", "two"], "workloads": {}}
    path.write_text(json.dumps(begun))
    return path


def test_a_crash_and_a_hang_cost_one_method_each(unfinished: Path) -> None:
    restarts = supervise.run(unfinished, [sys.executable, "-c", CHILD, str(unfinished)], method_limit_s=1.0)
    assert restarts == 2
    workloads = results.load(unfinished)["workloads"]
    assert workloads["one"]["methods"] == {"a": "ok", "b": "the measuring process was ended by signal 6"}
    assert workloads["two"]["methods"] == {"c": "the measuring process hung for more than 1 s", "d": "ok"}


def test_a_process_that_dies_before_any_method_costs_workloads_and_ends(unfinished: Path) -> None:
    supervise.run(unfinished, [sys.executable, "-c", "raise SystemExit(3)"])
    skipped = {name: record["skipped"] for name, record in results.load(unfinished)["workloads"].items()}
    assert skipped == dict.fromkeys(["one", "two"], "the process ended with exit code 3")


@pytest.mark.skipif(sys.platform != "linux", reason="a process hears of its parent's death only on Linux")
def test_the_measuring_process_ends_with_the_one_that_watches_it(tmp_path: Path) -> None:
    child = (
        "import time; from bench import supervise; supervise.end_with_parent(); print(1, flush=True); time.sleep(60)"
    )
    parent = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=2);"
    parent += "print(p.pid, flush=True); time.sleep(60)"
    watched = subprocess.Popen(
        [sys.executable, "-c", parent, child],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watched.stdout is not None and watched.stderr is not None
    pid = int(watched.stdout.readline())
    assert watched.stderr.readline() == "1\n", "the child has asked for it"
    watched.kill()
    watched.wait()
    for _ in range(200):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the child outlived its parent")


def test_the_child_goes_on_with_the_same_file_and_choices(tmp_path: Path) -> None:
    command = supervise.child_command(tmp_path / "x.json", 30.0, 7, True, 4)
    assert command[:3] == [sys.executable, "-m", "bench.run"]
    options = " ".join(command[3:])
    assert f"--resume {tmp_path / 'x.json'}" in options and "--child" in options and "--device cuda" in options
    assert "--budget 30.0" in options and "--rounds 7" in options and "--quick" in options
