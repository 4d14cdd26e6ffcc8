"""Methods that decode with gradients: forward, backward, or both, of the decoder alone."""

from __future__ import annotations

from functools import partial

from bench.methods.method import Job, Prepared, compiled
from liif_fast import ops
from liif_fast.benchmark import original, runs


def original_training(job: Job, dtype: str, compile_it: bool = False) -> Prepared:
    """The original with gradients; 16 bits by autocast."""
    query = compiled(original.query) if compile_it else original.query
    return runs.original_training(job.problem, dtype, passes=job.workload.passes, query=query), ""


def torch_compiled(job: Job, dtype: str) -> Prepared:
    """The `torch` backend with gradients, compiled; 16 bits by autocast."""
    query = compiled(partial(ops.query, backend="torch"))
    return runs.training(job.problem, dtype, passes=job.workload.passes, query=query), ""


def fused(job: Job, backend: str, dtype: str) -> Prepared:
    """`ops.query`; 16 bits by autocast."""
    query = partial(ops.query, backend=backend)
    return runs.training(job.problem, dtype, passes=job.workload.passes, query=query), ""
