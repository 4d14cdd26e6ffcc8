"""Methods that decode an image without gradients: original, folded, and the ops' backends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.methods import folded
from bench.methods.method import SHORT, Job, Method, Prepared, compiled, matmul_dtypes, refusal
from liif_fast.benchmark import original, runs, timing
from liif_fast.benchmark.runs import DTYPES, is_16_bit, matmul_in

CHUNKS = {  # the fastest of these sizes is timed
    "cpu": (1024, 2048, 4096, 16384),
    "cuda": (original.CHUNK, 65_536, 131_072, 262_144),  # larger ones would not fit next to the other methods
}
COMPILED_CHUNK = {"cpu": 32_768, "cuda": 262_144}  # powers of two leave no smaller last chunk
TILES = {"cpu": (folded.TILE,), "cuda": (65_536, 262_144)}  # queries per tile of the folded baseline


def original_decode(job: Job, dtype: str) -> Prepared:
    """The original in PyTorch's eager mode, in chunks of 30,000 queries."""
    return runs.original_decode(job.problem, dtype), ""


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


def _original_tuned(job: Job, dtype: str) -> Prepared:
    sizes = CHUNKS[job.device.type]
    return _best(job, sizes, lambda chunk: runs.original_decode(job.problem, dtype, chunk=chunk), "chunks")


def _original_compiled(job: Job, dtype: str) -> Prepared:
    chunk = min(COMPILED_CHUNK[job.device.type], job.problem.coord.shape[1])
    query = compiled(original.query)
    return runs.original_decode(job.problem, dtype, chunk=chunk, query=query), f"chunks of {chunk}"


def _folded(job: Job, dtype: str, compile_it: bool = False) -> Prepared:
    problem = job.problem.to(DTYPES[dtype])
    decode = compiled(folded.decode_tile) if compile_it else folded.decode_tile

    def make(tile: int) -> runs.Run:
        def run() -> Tensor:
            with torch.no_grad(), matmul_in(dtype, job.device, autocast=False):
                return folded.query(*problem, tile=tile, decode=decode)

        return run

    if compile_it:
        tile = min(COMPILED_CHUNK[job.device.type], problem.coord.shape[1])
        return make(tile), f"tiles of {tile}"
    return _best(job, TILES[job.device.type], make, "tiles")


def fused(job: Job, backend: str, dtype: str) -> Prepared:
    """`ops.render` with tensors of `dtype`."""
    size, window = job.workload.out_size, job.workload.window
    assert size is not None
    return runs.fused_decode(job.problem, dtype, size, window=window, backend=backend), ""


def baselines(device: str) -> list[Method]:
    """Original and folded; the original in float32 with chunks of 30,000 comes first."""
    dtypes = matmul_dtypes(device)
    compiled_dtypes = ["float32"] if device == "cpu" else ["tf32", "bfloat16"]
    found = []
    for dtype in dtypes:
        how = ", autocast" if is_16_bit(dtype) else ""
        common = {"dtype": dtype, "refusal": refusal(dtype, device)}
        few = dtype in (("float32",) if device == "cpu" else ("float32", "bfloat16"))
        name = "original" if dtype == "float32" else f"original-{SHORT[dtype]}"
        label = f"original, eager{how}"
        found.append(Method(name, label, prepare=partial(original_decode, dtype=dtype), few=few, **common))
        tuned = partial(_original_tuned, dtype=dtype)
        found.append(Method(f"original-tuned-{SHORT[dtype]}", f"{label}, best chunk", prepare=tuned, **common))
    for dtype in compiled_dtypes:
        label = "original, torch.compile" + (", autocast" if is_16_bit(dtype) else "")
        prepare = partial(_original_compiled, dtype=dtype)
        found.append(Method(f"original-compiled-{SHORT[dtype]}", label, dtype, prepare, late=True))
    for dtype in dtypes:
        few = dtype == ("float32" if device == "cpu" else "bfloat16")
        name, prepare = f"folded-{SHORT[dtype]}", partial(_folded, dtype=dtype)
        found.append(Method(name, "folded, PyTorch calls", dtype, prepare, True, refusal(dtype, device), few=few))
    for dtype in compiled_dtypes:
        prepare = partial(_folded, dtype=dtype, compile_it=True)
        found.append(
            Method(f"folded-compiled-{SHORT[dtype]}", "folded, torch.compile", dtype, prepare, True, late=True)
        )
    return found
