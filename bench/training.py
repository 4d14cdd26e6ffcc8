"""Methods that decode with gradients: forward, backward, or both, of the decoder alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench import folded
from bench.method import SHORT, Job, Method, Prepared, compiled, is_16_bit, multiply_in, product_dtypes, refusal
from liif_fast import ops
from liif_fast.benchmark import original
from liif_fast.benchmark.yardsticks import precision


def _probe(job: Job) -> Tensor:
    """What the gradients are the gradients of: sum(out * probe). [B, Q, 3]"""
    generator = torch.Generator(device=job.device).manual_seed(1)
    shape = (*job.problem.coord.shape[:2], 3)
    return torch.randn(shape, generator=generator, device=job.device).to(job.problem.feat.dtype)


def _passes(job: Job, dtype: str, forward: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Callable[[], Any]:
    """The passes that the workload asks for. A backward alone runs again and again on one forward."""
    probe = _probe(job)

    def backward(out: Tensor, again: bool) -> list[Tensor]:
        with precision(dtype == "tf32"):
            return list(torch.autograd.grad(out, leaves, probe.to(out.dtype), retain_graph=again))

    if job.workload.passes == "forward":
        return forward
    if job.workload.passes == "both":
        return lambda: backward(forward(), False)
    kept = forward()
    return lambda: backward(kept, True)


def _leaves(job: Job) -> tuple[Tensor, nn.Module, list[Tensor]]:
    """The original's features and imnet with gradients, and all that is differentiated, as `Problem.leaves` has it."""
    feat = job.problem.feat.detach().clone().requires_grad_()
    imnet = original.make_imnet(job.problem.weights, job.problem.biases)
    layers = [layer for layer in imnet if isinstance(layer, nn.Linear)]
    return feat, imnet, [feat, *(layer.weight for layer in layers), *(layer.bias for layer in layers)]


def _exact(job: Job) -> Prepared:
    """The original in float64, chunk by chunk, whose gradients add up: of a large image all at once would not fit."""
    problem = job.problem
    feat, imnet, leaves = _leaves(job)
    probe = _probe(job)

    def run() -> Tensor | list[Tensor]:
        if job.workload.passes == "forward":
            return original.predict(problem.feat, problem.coord, problem.cell, imnet)
        sums = [torch.zeros_like(leaf) for leaf in leaves]
        for at in range(0, problem.coord.shape[1], original.CHUNK):
            part = slice(at, at + original.CHUNK)
            out = original.query(feat, problem.coord[:, part], problem.cell[:, part], imnet)
            for total, grad in zip(sums, torch.autograd.grad(out, leaves, probe[:, part])):
                total += grad
        return sums

    return run, ""


def _original(job: Job, dtype: str, compile_it: bool = False) -> Prepared:
    problem = job.problem
    if problem.feat.dtype == torch.float64:
        return _exact(job)
    feat, imnet, leaves = _leaves(job)
    query = compiled(original.query) if compile_it else original.query

    def forward() -> Tensor:
        with multiply_in(dtype, job.device):
            return query(feat, problem.coord, problem.cell, imnet)

    return _passes(job, dtype, forward, leaves), ""


def _with(job: Job, dtype: str, make_query: Callable[[], Callable[..., Tensor]]) -> Prepared:
    """float32 leaves, multiplied in `dtype`: as one trains."""
    problem, query = job.problem, make_query()
    leaves = [leaf.detach().clone().requires_grad_() for leaf in problem.leaves()]
    layers = len(problem.weights)
    feat, weights, biases = leaves[0], leaves[1 : 1 + layers], leaves[1 + layers :]

    def forward() -> Tensor:
        with multiply_in(dtype, job.device):
            return query(feat, problem.coord, problem.cell, weights, biases)

    return _passes(job, dtype, forward, leaves), ""


def _folded(compile_it: bool) -> Callable[..., Tensor]:
    decode = compiled(folded.decode_tile) if compile_it else folded.decode_tile
    return partial(folded.query, tile=None, decode=decode)


def query(job: Job, backend: str, dtype: str) -> Prepared:
    """`ops.query`, or `ops.render` of a whole image, under autocast where dtype has 16 bits."""
    size = job.workload.out_size

    def render(feat: Tensor, _: Tensor, __: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        assert size is not None
        return ops.render(feat, size, weights, biases, backend=backend).flatten(2).transpose(1, 2)

    return _with(job, dtype, lambda: partial(ops.query, backend=backend) if size is None else render)


def baselines(device: str) -> list[Method]:
    """Original and folded; the original in float32 comes first."""
    dtypes = product_dtypes(device)
    compiled_in = ["float32"] if device == "cpu" else ["bfloat16"]
    found = []
    for dtype in dtypes:
        how = ", autocast" if is_16_bit(dtype) else ""
        few = dtype in (("float32",) if device == "cpu" else ("float32", "bfloat16"))
        name = "original" if dtype == "float32" else f"original-{SHORT[dtype]}"
        run = partial(_original, dtype=dtype)
        label = f"original, eager{how}"
        found.append(Method(name, label, dtype, False, run, refusal(dtype, device), few=few, quick=few))
    for dtype in dtypes:
        how = ", autocast" if is_16_bit(dtype) else ""
        run = partial(_with, dtype=dtype, make_query=partial(_folded, False))
        few = dtype == ("float32" if device == "cpu" else "bfloat16")
        name, label = f"folded-{SHORT[dtype]}", f"folded, PyTorch calls{how}"
        found.append(Method(name, label, dtype, True, run, refusal(dtype, device), few=few))
    for dtype in compiled_in:
        how = ", autocast" if is_16_bit(dtype) else ""
        run = partial(_original, dtype=dtype, compile_it=True)
        label = f"original, torch.compile{how}"
        found.append(Method(f"original-compiled-{SHORT[dtype]}", label, dtype, False, run, late=2))
        if device == "cuda":  # on a CPU compiling its backward takes longer than all that is timed
            run = partial(_with, dtype=dtype, make_query=partial(_folded, True))
            label = f"folded, torch.compile{how}"
            found.append(Method(f"folded-compiled-{SHORT[dtype]}", label, dtype, True, run))
    return found
