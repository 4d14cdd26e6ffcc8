"""What the machine itself gives: a register-only multiply-add loop (CPU), a library's matrix product, a copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch

from liif_fast.benchmark.timing import Clock, Contender, Yardstick

LOOP_S = 0.03
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
TRIES = {"cpu": 3, "cuda": 1}  # a CPU's neighbours disturb single samples
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@contextmanager
def precision(tf32: bool) -> Iterator[None]:
    """Whether float32 products on a GPU may run as TF32 inside the block."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def gemm(clock: Clock, dtype: str) -> Yardstick:
    """A large square product of random numbers in `dtype` (tf32: float32 that may run as TF32)."""
    size = GEMM_SIZE[clock.device.type]
    if clock.device.type == "cuda" and dtype == "float32":
        size //= 2  # without tensor cores the large one takes longer than what it is a yardstick for
    a, b = (torch.randn(size, size, device=clock.device).to(DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(a)

    def run() -> None:
        with precision(dtype == "tf32"):
            torch.matmul(a, b, out=out)

    contender = Contender(f"gemm {dtype}", run)
    clock.warm_up(contender)
    contender.stride = 1
    return Yardstick(f"gemm {dtype}", 2.0 * size**3, contender, TRIES[clock.device.type])


def copy(clock: Clock) -> Yardstick:
    """A copy of a buffer far larger than any cache; bytes read and written are both counted."""
    size = COPY_BYTES[clock.device.type]
    source = torch.zeros(size // 4, dtype=torch.float32, device=clock.device)
    target = torch.ones_like(source)
    contender = Contender("copy", lambda: target.copy_(source))
    clock.warm_up(contender)
    return Yardstick("copy", 2.0 * size, contender, TRIES[clock.device.type])


def loop_dtypes() -> list[str]:
    """Dtypes whose multiply-add loop this processor and build can run."""
    ops = torch.ops.liif_fast_C
    if not hasattr(ops, "cpu_multiply_add_loop"):
        return []
    return ["float32", "bfloat16"] if ops.cpu_has_bf16() else ["float32"]


def loop(dtype: str) -> Yardstick:
    """The register-only multiply-add loop on all of torch's threads together; a run takes about `LOOP_S`."""
    run_loop = torch.ops.liif_fast_C.cpu_multiply_add_loop
    threads = torch.get_num_threads()
    repetitions, work, seconds = 1000, 0.0, 0.0
    torch.set_num_threads(1)  # on several, waiting for a busy processor would pass for work
    try:
        while seconds < LOOP_S / 2:
            repetitions *= 4
            begin = perf_counter()
            work = run_loop(dtype, repetitions)
            seconds = perf_counter() - begin
    finally:
        torch.set_num_threads(threads)
    contender = Contender(f"loop {dtype}", lambda: run_loop(dtype, repetitions))
    return Yardstick(f"loop {dtype}", work * threads, contender)


def matrix_rates(clock: Clock) -> list[Yardstick]:
    """The yardsticks of whatever multiplies matrices."""
    if clock.device.type == "cuda":
        return [gemm(clock, dtype) for dtype in ("float32", "tf32", "bfloat16", "float16")]
    dtypes = loop_dtypes()
    return [*(loop(dtype) for dtype in dtypes), *(gemm(clock, dtype) for dtype in dtypes or ["float32"])]
