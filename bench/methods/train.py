"""Methods that decode with gradients: forward, backward, or both, of the decoder alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from bench.methods import folded
from bench.methods.method import SHORT, Job, Method, Prepared, compiled, matmul_dtypes, refusal
from liif_fast import ops
from liif_fast.benchmark import original, runs
from liif_fast.benchmark.runs import is_16_bit


def _exact(job: Job) -> Prepared:
    """The original in float64, chunk by chunk with added gradients: a large image would not fit in memory at once."""
    problem = job.problem
    feat, imnet, leaves = runs.original_leaves(problem)

    def run() -> Tensor | list[Tensor]:
        if job.workload.passes == "forward":
            return original.predict(problem.feat, problem.coord, problem.cell, imnet)
        probe = runs.probe_for(problem.coord.new_empty(*problem.coord.shape[:2], problem.weights[-1].shape[0]))
        sums = [torch.zeros_like(leaf) for leaf in leaves]
        for at in range(0, problem.coord.shape[1], original.CHUNK):
            part = slice(at, at + original.CHUNK)
            out = original.query(feat, problem.coord[:, part], problem.cell[:, part], imnet)
            for total, grad in zip(sums, torch.autograd.grad(out, leaves, probe[:, part])):
                total += grad
        return sums

    return run, ""


def _original(job: Job, dtype: str, compile_it: bool = False) -> Prepared:
    if job.problem.feat.dtype == torch.float64:
        return _exact(job)
    query = compiled(original.query) if compile_it else original.query
    return runs.original_training(job.problem, dtype, passes=job.workload.passes, query=query), ""


def _folded(job: Job, dtype: str, compile_it: bool = False) -> Prepared:
    decode = compiled(folded.decode_tile) if compile_it else folded.decode_tile
    query = partial(folded.query, tile=None, decode=decode)
    return runs.training(job.problem, dtype, passes=job.workload.passes, query=query), ""


def fused(job: Job, backend: str, dtype: str) -> Prepared:
    """`ops.query`, or `ops.render` of a whole image; 16 bits by autocast."""
    size = job.workload.out_size

    def render(feat: Tensor, _: Tensor, __: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        assert size is not None
        return ops.render(feat, size, weights, biases, backend=backend).flatten(2).transpose(1, 2)

    query: Callable[..., Tensor] = partial(ops.query, backend=backend) if size is None else render
    return runs.training(job.problem, dtype, passes=job.workload.passes, query=query), ""


def baselines(device: str) -> list[Method]:
    """Original and folded; the original in float32 comes first."""
    compiled_dtypes = ["float32"] if device == "cpu" else ["bfloat16"]
    originals, folds, compiles = [], [], []
    for dtype in matmul_dtypes(device):
        how = ", autocast" if is_16_bit(dtype) else ""
        why_not = refusal(dtype, device)
        name = "original" if dtype == "float32" else f"original-{SHORT[dtype]}"
        few = dtype in (("float32",) if device == "cpu" else ("float32", "bfloat16"))
        prepare = partial(_original, dtype=dtype)
        originals.append(Method(name, f"original, eager{how}", dtype, prepare, refusal=why_not, few=few))
        few = dtype == ("float32" if device == "cpu" else "bfloat16")
        name, prepare = f"folded-{SHORT[dtype]}", partial(_folded, dtype=dtype)
        folds.append(Method(name, f"folded, PyTorch calls{how}", dtype, prepare, True, why_not, few=few))
        if dtype not in compiled_dtypes:
            continue
        name, prepare = f"original-compiled-{SHORT[dtype]}", partial(_original, dtype=dtype, compile_it=True)
        compiles.append(Method(name, f"original, torch.compile{how}", dtype, prepare, late=True))
        if device == "cuda":  # on a CPU compiling its backward takes longer than the whole run
            name, prepare = f"folded-compiled-{SHORT[dtype]}", partial(_folded, dtype=dtype, compile_it=True)
            compiles.append(Method(name, f"folded, torch.compile{how}", dtype, prepare, True, late=True))
    return [*originals, *folds, *compiles]
