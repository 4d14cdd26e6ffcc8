"""Methods that decode an image, without gradients: original, folded, and the ops' backends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench import folded
from bench.method import SHORT, Job, Method, Prepared, compiled, is_16_bit, multiply_in, product_dtypes, refusal
from liif_fast import ops
from liif_fast.benchmark import original, timing
from liif_fast.benchmark.yardsticks import DTYPES, precision

CHUNKS = {  # of which the best is taken
    "cpu": (1024, 2048, 4096, 16384),
    "cuda": (original.CHUNK, 65_536, 131_072, 262_144),  # every method keeps its memory: no larger ones
}
COMPILED_CHUNK = {"cpu": 32_768, "cuda": 262_144}  # powers of two, for sizes that leave no smaller last chunk
TILES = {"cpu": (folded.TILE,), "cuda": (65_536, 262_144)}  # tiles of queries for the folded baseline


def original_in(job: Job, dtype: str, chunk: int = original.CHUNK) -> Prepared:
    """Eager, `chunk` queries at a time."""
    feat, coord, cell, weights, biases = job.problem
    imnet = original.make_imnet(weights, biases)

    def run() -> Tensor:
        if feat.dtype == torch.float64:
            return original.predict(feat, coord, cell, imnet, chunk=chunk)
        with multiply_in(dtype, job.device):
            return original.predict(feat, coord, cell, imnet, chunk=chunk)

    return run, ""


def _best(job: Job, sizes: tuple[int, ...], prepare: Callable[[int], Prepared], what: str) -> Prepared:
    """The fastest of some sizes, those beyond the number of queries counted as all of them."""
    queries = job.problem.coord.shape[0] * job.problem.coord.shape[1]
    tried: dict[int, float] = {}
    candidates = sorted({min(size, queries) for size in sizes})
    if len(candidates) == 1:
        return prepare(candidates[0])[0], f"{what} of {candidates[0]}"
    for size in candidates:
        run, _ = prepare(size)
        try:
            tried[size] = job.clock.once(run)
        except (RuntimeError, MemoryError) as error:
            if timing.failure(error) != "out of memory":
                raise
    if not tried:
        raise MemoryError(f"out of memory with {what} of any size")
    best = min(tried, key=lambda size: tried[size])
    return prepare(best)[0], f"{what} of {best}"


def _original_tuned(job: Job, dtype: str) -> Prepared:
    return _best(job, CHUNKS[job.device.type], lambda chunk: original_in(job, dtype, chunk), "chunks")


def _original_compiled(job: Job, dtype: str) -> Prepared:
    feat, coord, cell, weights, biases = job.problem
    imnet = original.make_imnet(weights, biases)
    chunk = min(COMPILED_CHUNK[job.device.type], coord.shape[1])
    query = compiled(original.query)

    def run() -> Tensor:
        with multiply_in(dtype, job.device):
            return original.predict(feat, coord, cell, imnet, chunk=chunk, query=query)

    return run, f"chunks of {chunk}"


def _folded(job: Job, dtype: str, compile_it: bool = False) -> Prepared:
    problem = job.problem.to(DTYPES[dtype])
    decode = compiled(folded.decode_tile) if compile_it else folded.decode_tile

    def prepare(tile: int) -> Prepared:
        def run() -> Tensor:
            with torch.no_grad(), precision(dtype == "tf32"):
                return folded.query(*problem, tile=tile, decode=decode)

        return run, ""

    if compile_it:
        tile = min(COMPILED_CHUNK[job.device.type], problem.coord.shape[1])
        return prepare(tile)[0], f"tiles of {tile}"
    return _best(job, TILES[job.device.type], prepare, "tiles")


def render(job: Job, backend: str, dtype: str) -> Prepared:
    """`ops.render` with tensors of `dtype`."""
    feat, _, _, weights, biases = job.problem.to(DTYPES[dtype])
    workload = job.workload
    assert workload.out_size is not None

    def run() -> Tensor:
        with torch.no_grad(), precision(dtype == "tf32"):
            return ops.render(feat, workload.out_size, weights, biases, window=workload.window, backend=backend)

    return run, ""


def baselines(device: str) -> list[Method]:
    """Original and folded; the original in float32 and chunks of 30,000 comes first."""
    dtypes = product_dtypes(device)
    compiled_in = ["float32"] if device == "cpu" else ["tf32", "bfloat16"]
    found = []
    for dtype in dtypes:
        how = ", autocast" if is_16_bit(dtype) else ""
        few = dtype in (("float32",) if device == "cpu" else ("float32", "bfloat16"))
        name = "original" if dtype == "float32" else f"original-{SHORT[dtype]}"
        run = partial(original_in, dtype=dtype)
        why_not = refusal(dtype, device)
        found.append(Method(name, f"original, eager{how}", dtype, False, run, why_not, few=few, quick=few))
        label = f"original, eager{how}, best chunk"
        tuned = partial(_original_tuned, dtype=dtype)
        found.append(Method(f"original-tuned-{SHORT[dtype]}", label, dtype, False, tuned, why_not, late=1))
    for dtype in compiled_in:
        run = partial(_original_compiled, dtype=dtype)
        how = ", autocast" if is_16_bit(dtype) else ""
        label = f"original, torch.compile{how}"
        found.append(Method(f"original-compiled-{SHORT[dtype]}", label, dtype, False, run, late=2))
    for dtype in dtypes:
        run = partial(_folded, dtype=dtype)
        few = dtype == ("float32" if device == "cpu" else "bfloat16")
        name, label = f"folded-{SHORT[dtype]}", "folded, PyTorch calls"
        found.append(Method(name, label, dtype, True, run, refusal(dtype, device), few=few))
    for dtype in compiled_in:
        run = partial(_folded, dtype=dtype, compile_it=True)
        label = "folded, torch.compile"
        found.append(
            Method(f"folded-compiled-{SHORT[dtype]}", label, dtype, True, run, late=0 if dtype == "bfloat16" else 1)
        )
    return found
