"""Latency and peak memory of one decode of a given size, one method at a time.

On a CPU each decode has a process of its own: it warms up on a small map, resets the process's high-water mark and
reads the mark after the decode. On a GPU the allocator counts. Both count memory in addition to the inputs.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import child
from bench.methods.method import Job, Method
from bench.methods.registry import methods_for
from bench.workloads import Workload, make_problem
from liif_fast.benchmark import original
from liif_fast.benchmark.problem import HIDDEN, OUTS
from liif_fast.benchmark.timing import Clock, CpuClock, failure, summary
from liif_fast.utils import memory

_WARM_UP = Workload("warm-up", "size", "", (32, 32), (64, 64), compared="few")
# The original unfolds the whole map for each chunk, so its first chunks give a lower bound of its peak (only the output
# grows from chunk to chunk) and the time of every other chunk.
ORIGINAL_CHUNKS = 4
_LIMIT_S = 300.0
_GPU_RUNS = 5


def measure(method: Method, workload: Workload, clock: Clock, limit_s: float = _LIMIT_S) -> dict[str, Any]:
    """Peak bytes in addition to the inputs and seconds of one decode, or the reason why they are missing.

    limit_s: on a CPU a decode is stopped after this many seconds.
    """
    try:
        if clock.device.type == "cpu":
            args = (method.name, workload, torch.get_num_threads())
            return {"status": "ok", **child.call(_decode_alone, *args, silence_s=min(limit_s, _LIMIT_S))}
        return {"status": "ok", **decode(method, workload, clock, runs=_GPU_RUNS)}
    except child.ChildError as error:
        return failed("out of memory (killed)" if "signal 9" in str(error) else str(error))
    except Exception as error:  # any failure of a method is its result, with the reason
        if clock.is_broken():
            raise
        return failed(failure(error))


def failed(reason: str) -> dict[str, Any]:
    """The entry of a method that failed; out of memory has a status of its own."""
    return {"status": "out of memory" if "out of memory" in reason else "failed", "reason": reason}


def fused_limit(workload: Workload, item: int) -> int:
    """Bytes of latent map and output, with numbers of `item` bytes, and 64 MB: the limit for a fused decode."""
    latents = workload.batch * workload.map_size[0] * workload.map_size[1] * HIDDEN[0]
    return (latents + workload.total_queries * OUTS) * item + 64 * 10**6


def decode(method: Method, workload: Workload, clock: Clock, runs: int = 1) -> dict[str, Any]:
    """Decode and return peak_bytes, seconds and a note."""
    total = workload.total_queries
    problem = make_problem(workload, clock.device, _window(method, workload))
    share, shortened = 1.0, ORIGINAL_CHUNKS * original.CHUNK
    if method.name.startswith("original") and shortened < total:
        problem = problem._replace(coord=problem.coord[:, :shortened], cell=problem.cell[:, :shortened])
        share = shortened / total
    run, note = method.prepare(Job(workload, problem, clock))
    if share < 1:
        note = f"from {ORIGINAL_CHUNKS} of its {-(-total // original.CHUNK)} chunks"
    times: list[float] = []

    def timed() -> None:
        times.append(clock.once(run) / share)

    peak = clock.peak(run if runs > 1 else timed)
    for _ in range(runs if runs > 1 else 0):
        timed()
    return {"peak_bytes": peak, "seconds": summary(times), "note": note}


def _window(method: Method, workload: Workload) -> tuple[int, int, int, int] | None:
    """The window whose coordinates a method needs: the original's first chunks; one row for an op that renders."""
    assert workload.out_size is not None
    height, width = workload.out_size
    rows = -(-ORIGINAL_CHUNKS * original.CHUNK // width) if method.name.startswith("original") else 1
    return (0, 0, min(rows, height), width)


def _decode_alone(send: Callable[[Any], None], name: str, workload: Workload, threads: int) -> dict[str, Any]:
    """`decode` on a CPU in a process of its own."""
    torch.set_num_threads(threads)
    method = next(method for method in methods_for(workload, "cpu") if method.name == name)
    clock = CpuClock()
    method.prepare(Job(_WARM_UP, make_problem(_WARM_UP), clock))[0]()
    _limit_memory()
    return decode(method, workload, clock)


def _limit_memory() -> None:
    """Let an allocation beyond the free memory fail, before the kernel kills a process."""
    free = memory.available()
    if free is not None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + free, resource.RLIM_INFINITY))
