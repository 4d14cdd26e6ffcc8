"""Peak memory of one decode, in a process of its own: `python -m bench.memory METHOD` prints one line of JSON.

Inputs are made and everything is warmed up on a small map first; then the process' high-water mark is reset
(/proc/self/clear_refs) and read again after the decode. The difference is what the decode took beside its inputs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from bench import methods, original
from bench.timing import failure
from bench.workloads import HIDDEN, OUTS, WORKLOADS, Problem, Workload, make_problem

_WARM_UP = Workload("warm-up", "memory", "", (32, 32), (64, 64))
# The original unfolds the whole map anew for each chunk, so its first chunks tell its peak but for the output, which
# grows from chunk to chunk: what is measured is a lower bound.
ORIGINAL_CHUNKS = 4
_LIMIT_S = 400
_METHODS = {method.name: method for method in methods.BY_KIND["memory"]}


def measure(name: str, workload: Workload) -> dict[str, Any]:
    """Peak bytes beside the inputs and seconds of one decode, or the reason why there are none."""
    threads = torch.get_num_threads()
    command = [sys.executable, "-m", "bench.memory", name, "--workload", workload.name, "--threads", str(threads)]
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"status": "skipped", "reason": f"took more than {_LIMIT_S} s"}
    if done.returncode < 0:
        return {"status": "out of memory", "reason": f"killed by signal {-done.returncode}"}
    if done.returncode > 0:
        reason = done.stderr.strip().splitlines()[-1]
        return {"status": "out of memory" if "out of memory" in reason else "failed", "reason": reason}
    return {"status": "ok", **json.loads(done.stdout)}


def allowance(workload: Workload, dtype: torch.dtype) -> int:
    """Bytes of latent map and output and 64 MB: what a fused decode may take."""
    latents = workload.batch * workload.map_size[0] * workload.map_size[1] * HIDDEN[0]
    return (latents + workload.total_queries * OUTS) * dtype.itemsize + 64 * 10**6


def _status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key} here: this system does not tell a process' memory")


def _reset_peak() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # memory freed but kept would hide as much of the decode's own
    Path("/proc/self/clear_refs").write_text("5")


def _shortened(name: str, problem: Problem) -> tuple[Problem, str]:
    queries = original.CHUNK * ORIGINAL_CHUNKS
    total = problem.coord.shape[1]
    if not name.startswith("original") or total <= queries:
        return problem, ""
    shorter = problem._replace(coord=problem.coord[:, :queries], cell=problem.cell[:, :queries])
    return shorter, f"its first {ORIGINAL_CHUNKS} chunks of {-(-total // original.CHUNK)}"


def _child(name: str, workload: Workload) -> dict[str, Any]:
    method = _METHODS[name]
    problem, part = _shortened(name, make_problem(workload))
    run, note = method.prepare(workload, problem)
    method.prepare(_WARM_UP, make_problem(_WARM_UP))[0]()
    _reset_peak()
    before = _status("VmRSS")
    begin = perf_counter()
    run()
    seconds = perf_counter() - begin
    peak = _status("VmHWM") - before
    return {"peak_bytes": peak, "seconds": round(seconds, 3), "note": part or note}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=_METHODS)
    parser.add_argument("--workload", default="memory-512-to-2048", choices=WORKLOADS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        print(json.dumps(_child(args.method, WORKLOADS[args.workload])))
    except (RuntimeError, MemoryError) as error:
        sys.exit(failure(error))


if __name__ == "__main__":
    main()
