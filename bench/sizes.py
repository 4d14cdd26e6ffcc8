"""Latency and peak memory of one decode of a given size, each method on its own.

On a CPU in a process of its own (`python -m bench.sizes METHOD --workload NAME` prints one line of JSON): inputs are
made and everything is warmed up on a small map first, then the process' high-water mark is reset and read again after
the decode. On a GPU the allocator tells. Both count what the decode takes beside its inputs.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.method import Job, Method
from bench.methods import methods_for
from bench.workloads import WORKLOADS, Workload, make_problem
from liif_fast.benchmark import original
from liif_fast.benchmark.problem import HIDDEN, OUTS
from liif_fast.benchmark.timing import Clock, CpuClock, failure, summary
from liif_fast.utils import memory

_WARM_UP = Workload("warm-up", "size", "", (32, 32), (64, 64), compared="few")
# The original unfolds the whole map anew for each chunk, so its first chunks tell its peak (but for the output, which
# grows from chunk to chunk: a lower bound) and the time of every other chunk.
ORIGINAL_CHUNKS = 4
_LIMIT_S = 300.0
_GPU_RUNS = 5


def measure(method: Method, workload: Workload, clock: Clock, limit_s: float = _LIMIT_S) -> dict[str, Any]:
    """Peak bytes beside the inputs and seconds of one decode, or the reason why there are none.

    limit_s: seconds after which a decode on a CPU is stopped.
    """
    if clock.device.type == "cpu":
        return _in_a_child(method.name, workload, min(limit_s, _LIMIT_S))
    try:
        return {"status": "ok", **decode(method, workload, clock, runs=_GPU_RUNS)}
    except Exception as error:  # whatever stops a method is its result, with the reason
        if clock.is_broken():
            raise
        return failed(failure(error))


def failed(reason: str) -> dict[str, Any]:
    """The entry of a method that was stopped; out of memory is a result of its own."""
    return {"status": "out of memory" if "out of memory" in reason else "failed", "reason": reason}


def allowance(workload: Workload, item: int) -> int:
    """Bytes of latent map and output, of `item` bytes a number, and 64 MB: what a fused decode may take."""
    latents = workload.batch * workload.map_size[0] * workload.map_size[1] * HIDDEN[0]
    return (latents + workload.total_queries * OUTS) * item + 64 * 10**6


def decode(method: Method, workload: Workload, clock: Clock, runs: int = 1) -> dict[str, Any]:
    """Run it and return peak_bytes, seconds and a note."""
    total = workload.total_queries
    problem = make_problem(workload, clock.device, _queries_of(method, workload))
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


def _queries_of(method: Method, workload: Workload) -> tuple[int, int, int, int] | None:
    """The window that a method needs coordinates of: the original's first chunks, none for an op that renders."""
    assert workload.out_size is not None
    height, width = workload.out_size
    if method.name.startswith("folded"):
        return None
    rows = -(-ORIGINAL_CHUNKS * original.CHUNK // width) if method.name.startswith("original") else 1
    return (0, 0, min(rows, height), width)


def _in_a_child(name: str, workload: Workload, limit_s: float) -> dict[str, Any]:
    threads = torch.get_num_threads()
    command = [sys.executable, "-m", "bench.sizes", name, "--workload", workload.name, "--threads", str(threads)]
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"status": "skipped", "reason": f"took more than {limit_s:.0f} s"}
    if done.returncode < 0:
        return failed(f"out of memory (killed by signal {-done.returncode})")
    if done.returncode > 0:
        lines = done.stderr.strip().splitlines()
        return failed(lines[-1] if lines else f"exit code {done.returncode}")
    return {"status": "ok", **json.loads(done.stdout)}


def _limit_memory() -> None:
    """Let an allocation beyond what there is fail, before the kernel kills somebody."""
    there = memory.available()
    if there is not None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + there, resource.RLIM_INFINITY))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method")
    parser.add_argument("--workload", default="size-2048", choices=WORKLOADS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    workload = WORKLOADS[args.workload]
    methods = {method.name: method for method in methods_for(workload, "cpu")}
    if args.method not in methods:
        parser.error(f"there is no method {args.method}: choose one of {', '.join(methods)}")
    method, clock = methods[args.method], CpuClock()
    try:
        method.prepare(Job(_WARM_UP, make_problem(_WARM_UP), clock))[0]()
        _limit_memory()
        print(json.dumps(decode(method, workload, clock)))
    except (RuntimeError, MemoryError) as error:
        sys.exit(failure(error))


if __name__ == "__main__":
    main()
