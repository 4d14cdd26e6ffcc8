"""Methods of the pieces: gather alone, ensemble alone, and the parts of a decode one by one (where the time goes)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import decoding, models
from bench.method import SHORT, Job, Method, Prepared
from liif_fast import ops
from liif_fast.benchmark import original
from liif_fast.benchmark.yardsticks import DTYPES


def _with_gradients(job: Job, forward: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Prepared:
    """Forward without gradients, or the backward of a sum of squares alone."""
    if job.workload.passes == "forward":

        def run() -> Tensor:
            with torch.no_grad():
                return forward()

        return run, ""
    for leaf in leaves:
        leaf.requires_grad_()
    out = forward()
    probe = torch.ones_like(out)
    return lambda: list(torch.autograd.grad(out, leaves, probe, retain_graph=True)), ""


# ------------------------------------------------------------------------------------------------------------- gather


def gather_original(job: Job) -> Prepared:
    feat, coord, cell = (tensor.clone() for tensor in job.problem[:3])

    def forward() -> Tensor:
        return torch.stack(original.corner_inputs(original.unfold(feat), coord, cell)[0], dim=2)

    return _with_gradients(job, forward, [feat, coord, cell])


def gather(job: Job, backend: str, dtype: str) -> Prepared:
    feat, coord, cell = (tensor.clone() for tensor in job.problem.to(DTYPES[dtype])[:3])
    return _with_gradients(job, lambda: ops.gather(feat, coord, cell, backend=backend)[0], [feat, coord, cell])


# ----------------------------------------------------------------------------------------------------------- ensemble


def _predictions(job: Job) -> tuple[Tensor, Tensor]:
    """pred [B, Q, 4, 3] and areas [B, Q, 4], in the problem's dtype."""
    generator = torch.Generator(device=job.device).manual_seed(1)
    shape = (job.workload.batch, job.workload.queries, 4)
    pred = torch.randn(*shape, 3, generator=generator, device=job.device)
    area = torch.rand(shape, generator=generator, device=job.device) + 0.01
    return pred.to(job.problem.feat.dtype), area.to(job.problem.coord.dtype)


def ensemble_original(job: Job) -> Prepared:
    pred, area = _predictions(job)

    def forward() -> Tensor:
        return original.blend(preds, areas)

    # Corner by corner, as the four predictions come from the imnet.
    preds = [corner.contiguous() for corner in pred.unbind(2)]
    areas = [corner.contiguous() for corner in area.unbind(2)]
    return _with_gradients(job, forward, preds)


def ensemble(job: Job, backend: str, dtype: str) -> Prepared:
    pred, area = _predictions(job)
    pred = pred.to(DTYPES[dtype])
    area_weight = area.flip(2) / area.sum(2, keepdim=True)
    run, note = _with_gradients(job, lambda: ops.ensemble(pred, area_weight, backend=backend), [pred])
    if job.workload.passes == "forward":
        return run, note
    return lambda: list(run()[0].unbind(2)), note  # views, in the form that the original's gradients have


# -------------------------------------------------------------------------------------------------------------- parts


def _chunks(job: Job) -> list[tuple[Tensor, Tensor]]:
    coord, cell = job.problem.coord, job.problem.cell
    parts = [slice(at, at + original.CHUNK) for at in range(0, coord.shape[1], original.CHUNK)]
    return [(coord[:, part], cell[:, part]) for part in parts]


def original_part(job: Job, part: str) -> Prepared:
    """One part of the original decode, for every chunk: unfold, inputs, imnet or blend."""
    chunks = _chunks(job)
    imnet = original.make_imnet(job.problem.weights, job.problem.biases)
    with torch.no_grad():
        unfolded = original.unfold(job.problem.feat)
        inputs, areas = original.corner_inputs(unfolded, *chunks[0])
        preds = original.apply_imnet(imnet, inputs)
    works: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "unfold": lambda coord, cell: original.unfold(job.problem.feat),
        "inputs": lambda coord, cell: original.corner_inputs(unfolded, coord, cell),
        "imnet": lambda coord, cell: original.apply_imnet(imnet, [x[:, : coord.shape[1]] for x in inputs]),
        "blend": lambda coord, cell: original.blend(
            [pred[:, : coord.shape[1]] for pred in preds], [area[:, : coord.shape[1]] for area in areas]
        ),
    }
    work = works[part]

    def run() -> None:
        with torch.no_grad():
            for coord, cell in chunks:
                work(coord, cell)

    return run, ""


def fold(job: Job, dtype: str) -> Prepared:
    """The first layer's convolution, which `render` makes itself where it is not given one."""
    feat, weight = job.problem.feat.to(DTYPES[dtype]), job.problem.weights[0].to(DTYPES[dtype])

    def run() -> Tensor:
        with torch.no_grad():
            return ops.fold(feat, weight)

    return run, ""


def fused(job: Job, backend: str, dtype: str) -> Prepared:
    """Everything behind the first layer's convolution."""
    feat, _, _, weights, biases = job.problem.to(DTYPES[dtype])
    workload = job.workload
    with torch.no_grad():
        latent_map = ops.fold(feat, weights[0])

    def run() -> Tensor:
        with torch.no_grad():
            return ops.render(feat, workload.out_size, weights, biases, latent_map=latent_map, backend=backend)

    return run, ""


PARTS = {
    "unfold": "unfolding, anew for every chunk",
    "inputs": "nearest latents, relative coordinates, concatenation",
    "imnet": "imnet",
    "blend": "ensemble",
}


def parts(fused_methods: list[Method]) -> list[Method]:
    """The original whole and in parts, the encoder, and for every fused method the convolution before it and itself.

    What the parts leave of the whole is what the baseline spends beside the calls its structure asks for.
    """
    whole = partial(decoding.original_in, dtype="float32")
    found = [
        Method("original", "original, eager", "float32", False, whole),
        Method("encoder", "encoder", "float32", False, models.encode),
    ]
    for part, about in PARTS.items():
        found.append(Method(f"original/{part}", f"its {about}", "float32", False, partial(original_part, part=part)))
    for dtype in dict.fromkeys(method.dtype for method in fused_methods if not method.refusal):
        label = "first layer as a convolution"
        found.append(Method(f"fold-{SHORT[dtype]}", label, dtype, True, partial(fold, dtype=dtype)))
    return [*found, *fused_methods]
