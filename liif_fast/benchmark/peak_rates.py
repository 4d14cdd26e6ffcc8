"""Peak rates of the machine: an FMA loop in registers (CPU), a library's matrix product (gemm), a copy."""

from __future__ import annotations

from time import perf_counter

import torch

from liif_fast.benchmark.runs import DTYPES, matmul_in
from liif_fast.benchmark.timing import Candidate, Clock, PeakRate
from liif_fast.ops.backends import extension

FMA_S = 0.03  # of one run of the FMA loop
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
SAMPLES_PER_ROUND = {"cpu": 3, "cuda": 1}  # on a CPU other processes disturb single samples
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}


def gemm(clock: Clock, dtype: str) -> PeakRate:
    """A large square matrix product of random numbers in `dtype` (tf32: float32 tensors, TF32 allowed)."""
    size = GEMM_SIZE[clock.device.type]
    if clock.device.type == "cuda" and dtype == "float32":
        size //= 2  # without tensor cores the large product takes longer than the candidates
    a, b = (torch.randn(size, size, device=clock.device).to(DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(a)

    def run() -> None:
        with matmul_in(dtype, clock.device, autocast=False):
            torch.matmul(a, b, out=out)

    return _ready(clock, f"gemm {dtype}", 2.0 * size**3, Candidate("gemm", run))


def copy(clock: Clock) -> PeakRate:
    """A copy of a buffer far larger than any cache; bytes read and bytes written both count."""
    size = COPY_BYTES[clock.device.type]
    source = torch.zeros(size // 4, dtype=torch.float32, device=clock.device)
    target = torch.ones_like(source)
    return _ready(clock, "copy", 2.0 * size, Candidate("copy", lambda: target.copy_(source)))


def _ready(clock: Clock, name: str, work: float, candidate: Candidate) -> PeakRate:
    clock.warm_up(candidate)
    candidate.every_n_rounds = 1
    return PeakRate(name, work, candidate, SAMPLES_PER_ROUND[clock.device.type])


def fma_dtypes() -> list[str]:
    """Dtypes whose FMA loop this processor and this build of the extension can run."""
    ops = extension.OPS
    if not hasattr(ops, "cpu_multiply_add_loop"):
        return []
    return ["float32", "bfloat16"] if ops.cpu_has_bf16() else ["float32"]


def fma_peak(dtype: str) -> PeakRate:
    """The FMA loop in registers, on all of torch's threads together; a run takes about `FMA_S`."""
    run_loop = extension.OPS.cpu_multiply_add_loop
    threads = torch.get_num_threads()
    repetitions, work, seconds = 1000, 0.0, 0.0
    torch.set_num_threads(1)  # with several threads, waiting for a busy processor would count as work
    try:
        while seconds < FMA_S / 2:
            repetitions *= 4
            begin = perf_counter()
            work = run_loop(dtype, repetitions)
            seconds = perf_counter() - begin
    finally:
        torch.set_num_threads(threads)
    return PeakRate(f"fma_peak {dtype}", work * threads, Candidate("fma_peak", lambda: run_loop(dtype, repetitions)))


def matmul_rates(clock: Clock) -> list[PeakRate]:
    """The peak rates that candidates with matrix products are compared with."""
    if clock.device.type == "cuda":
        return [gemm(clock, dtype) for dtype in ("float32", "tf32", "bfloat16", "float16")]
    dtypes = fma_dtypes()
    return [*(fma_peak(dtype) for dtype in dtypes), *(gemm(clock, dtype) for dtype in dtypes or ["float32"])]
