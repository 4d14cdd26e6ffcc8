"""The clock of a GPU: events around graph replays, with a cold and with a warm L2.

Not yet run on a GPU: the tests drive `CudaClock` with a stand-in for `CudaDriver`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from liif_fast.benchmark.timing import Candidate

SAMPLE_S = 0.004  # shorter runs are repeated within one sample
MAX_CALLS = 20
SLOW_S = 0.02  # a run of n times as long is sampled every n rounds
MAX_EVERY_N_ROUNDS = 10


class CudaDriver:
    """The calls of torch.cuda that the clock makes. They need a GPU, so this class makes no decisions."""

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)
        cache = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0) or 64 << 20
        self._scratch = torch.empty(2 * cache, dtype=torch.int8, device=self.device)

    def synchronize(self) -> None:
        """Wait until the device is idle."""
        torch.cuda.synchronize(self.device)

    def event(self) -> Any:
        """An object with record() and elapsed_time(other) in ms."""
        return torch.cuda.Event(enable_timing=True)

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """`run` as a graph; returns its replay. Raises RuntimeError where it cannot be captured."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate their workspaces in these runs, not while capturing
            run()
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def flush(self) -> None:
        """Fill the L2 with unrelated data."""
        self._scratch.zero_()

    def peak(self, run: Callable[[], Any]) -> int:
        """Largest number of bytes allocated during a run, in addition to those before it."""
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before


class CudaClock:
    """Device events. A run is captured as a CUDA graph where possible, to exclude the host's launch time.

    Each sample is taken twice: after a flush of the L2 (`samples`), and back to back (`warm_l2`).
    """

    def __init__(self, driver: Any = None, *, graphs: bool = True) -> None:
        self._driver = driver or CudaDriver()
        self._graphs = graphs
        self.device = self._driver.device

    def warm_up(self, candidate: Candidate) -> None:
        candidate.run()
        self._driver.synchronize()
        if self._graphs:
            try:
                replay = self._driver.capture(candidate.run)
                replay()
                candidate.run, candidate.captured = replay, True
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # a run that waits for the device or copies from the host cannot be captured
                pass
            self._driver.synchronize()
        seconds = max(self.once(candidate.run), 1e-7)
        candidate.calls = max(1, min(MAX_CALLS, math.ceil(SAMPLE_S / seconds)))
        candidate.every_n_rounds = max(1, min(MAX_EVERY_N_ROUNDS, round(seconds / SLOW_S)))

    def sample(self, candidate: Candidate, turn: int) -> None:
        pairs = []
        for _ in range(candidate.calls):
            begin, end = self._driver.event(), self._driver.event()
            self._driver.flush()  # takes long enough for the host to run ahead of the device
            begin.record()
            candidate.run()
            end.record()
            pairs.append((begin, end))
        begin, end = self._driver.event(), self._driver.event()
        candidate.run()
        begin.record()
        for _ in range(candidate.calls):
            candidate.run()
        end.record()
        self._driver.synchronize()
        candidate.samples[turn] = sum(a.elapsed_time(b) for a, b in pairs) / 1e3 / candidate.calls
        candidate.warm_l2[turn] = begin.elapsed_time(end) / 1e3 / candidate.calls

    def once(self, run: Callable[[], Any]) -> float:
        begin, end = self._driver.event(), self._driver.event()
        run()
        self._driver.synchronize()
        begin.record()
        run()
        end.record()
        self._driver.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def peak(self, run: Callable[[], Any]) -> int | None:
        return self._driver.peak(run)

    def is_broken(self) -> bool:
        try:
            self._driver.synchronize()
        except RuntimeError:  # after an invalid access every call fails until the process ends
            return True
        return False
