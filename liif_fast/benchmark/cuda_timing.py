"""The clock of a GPU: events around graph replays, with a cold and with a warm L2.

Not yet run on a GPU: the tests drive `CudaClock` with a stand-in for `CudaDriver`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch

from liif_fast.benchmark.timing import Contender

SAMPLE_S = 0.004  # shorter runs are repeated inside one sample
MAX_CALLS = 20
SLOW_S = 0.02  # a run of n times as long takes part in every nth round
MAX_STRIDE = 10


class Driver(Protocol):
    """What the clock asks of a device."""

    device: torch.device

    def synchronize(self) -> None:
        """Wait until the device has done everything."""

    def event(self) -> Any:
        """Something with record() and elapsed_time(other) in ms, as torch.cuda.Event."""

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """`run` as a graph; returns its replay. Raises RuntimeError where it cannot be captured."""

    def flush(self) -> None:
        """Fill the L2 with something else."""

    def peak(self, run: Callable[[], Any]) -> int:
        """Bytes allocated at most during a run, beside those before it."""


class CudaDriver:
    """torch.cuda. Its calls cannot be made without a GPU; keep decisions out of here."""

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)
        cache = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0) or 64 << 20
        self._scratch = torch.empty(2 * cache, dtype=torch.int8, device=self.device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def event(self) -> Any:
        return torch.cuda.Event(enable_timing=True)

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate their workspaces here, not while capturing
            run()
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def flush(self) -> None:
        self._scratch.zero_()

    def peak(self, run: Callable[[], Any]) -> int:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before


class CudaClock:
    """Device events. A run is captured as a CUDA graph where that works, so that launches by the host cost nothing.

    Each sample is taken twice: behind a flush of the L2 (`samples`), and back to back (`hot`).
    """

    def __init__(self, driver: Driver | None = None, *, graphs: bool = True) -> None:
        self._driver = driver or CudaDriver()
        self._graphs = graphs
        self.device = self._driver.device

    def warm_up(self, contender: Contender, seconds: float | None = None) -> None:
        contender.launch = contender.run
        contender.run()
        self._driver.synchronize()
        if self._graphs:
            try:
                contender.launch = self._driver.capture(contender.run)
                contender.launch()
                contender.captured = True
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # whatever waits for the device or copies from the host cannot be captured
                contender.launch = contender.run
            self._driver.synchronize()
        seconds = max(self.once(contender.launch), 1e-7)
        contender.calls = max(1, min(MAX_CALLS, math.ceil(SAMPLE_S / seconds)))
        contender.stride = max(1, min(MAX_STRIDE, round(seconds / SLOW_S)))

    def sample(self, contender: Contender, turn: int) -> None:
        launch = contender.launch or contender.run
        pairs = []
        for _ in range(contender.calls):
            begin, end = self._driver.event(), self._driver.event()
            self._driver.flush()  # long enough for the host to get ahead of the device
            begin.record()
            launch()
            end.record()
            pairs.append((begin, end))
        begin, end = self._driver.event(), self._driver.event()
        launch()
        begin.record()
        for _ in range(contender.calls):
            launch()
        end.record()
        self._driver.synchronize()
        contender.samples[turn] = sum(a.elapsed_time(b) for a, b in pairs) / 1e3 / contender.calls
        contender.hot[turn] = begin.elapsed_time(end) / 1e3 / contender.calls

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
        except RuntimeError:  # an invalid access lasts until the process ends
            return True
        return False
