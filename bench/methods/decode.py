"""Methods that decode an image without gradients: original, and the ops' backends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.methods.method import Job, Prepared, compiled
from liif_fast import ops
from liif_fast.benchmark import original, runs, timing
from liif_fast.benchmark.runs import DTYPES, matmul_in

CHUNKS = {  # the fastest of these sizes is timed
    "cpu": (1024, 2048, 4096, 16384),
    "cuda": (original.CHUNK, 65_536, 131_072, 262_144),  # larger ones would not fit next to the other methods
}
COMPILED_CHUNK = {"cpu": 32_768, "cuda": 262_144}  # powers of two leave no smaller last chunk


def _best(job: Job, sizes: tuple[int, ...], make: Callable[[int], runs.Run], unit: str) -> Prepared:
    """The fastest of some sizes; a size above the number of queries means all of them at once."""
    queries = job.problem.coord.shape[0] * job.problem.coord.shape[1]
    seconds: dict[int, float] = {}
    candidates = sorted({min(size, queries) for size in sizes})
    if len(candidates) == 1:
        return make(candidates[0]), f"{unit} of {candidates[0]}"
    for size in candidates:
        try:
            seconds[size] = job.clock.once(make(size))
        except (RuntimeError, MemoryError) as error:
            if timing.failure(error) != "out of memory":
                raise
    if not seconds:
        raise MemoryError(f"out of memory with {unit} of any size")
    best = min(seconds, key=lambda size: seconds[size])
    return make(best), f"{unit} of {best}"


def original_decode(job: Job, dtype: str, compile_it: bool = False) -> Prepared:
    """The original in chunks of 30,000 queries, or compiled in larger ones."""
    if not compile_it:
        return runs.original_decode(job.problem, dtype), ""
    chunk = min(COMPILED_CHUNK[job.device.type], job.problem.coord.shape[1])
    query = compiled(original.query)
    return runs.original_decode(job.problem, dtype, chunk=chunk, query=query), f"chunks of {chunk}"


def original_tuned(job: Job, dtype: str) -> Prepared:
    """The original in chunks of the best size."""
    sizes = CHUNKS[job.device.type]
    return _best(job, sizes, lambda chunk: runs.original_decode(job.problem, dtype, chunk=chunk), "chunks")


def torch_compiled(job: Job, dtype: str) -> Prepared:
    """The `torch` backend with tensors of `dtype`, compiled, in chunks that share the latent map."""
    feat, coord, cell, weights, biases = job.problem.to(DTYPES[dtype])
    chunk = min(COMPILED_CHUNK[job.device.type], coord.shape[1])
    query = compiled(partial(ops.query, backend="torch"))

    def run() -> Tensor:
        with torch.no_grad(), matmul_in(dtype, job.device, autocast=False):
            latent_map = ops.fold(feat, weights[0])
            parts = zip(coord.split(chunk, 1), cell.split(chunk, 1))
            return torch.cat([query(feat, *part, weights, biases, latent_map=latent_map) for part in parts], 1)

    return run, f"chunks of {chunk}"


def fused(job: Job, backend: str, dtype: str) -> Prepared:
    """`ops.render` with tensors of `dtype`."""
    assert job.workload.out_size is not None
    return runs.fused_decode(job.problem, dtype, job.workload.out_size, backend=backend), ""
