"""Sizes that only a GPU runs in a test's time: 1024x1024 from 256x256, and offsets beyond 32 bits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.gpu.check import Check, Context, Judge, Skip
from bench.gpu.limits import FORWARD, PSNR
from bench.gpu.problems import Case, Decode, decode, exact_query, norm_error, psnr, range_error, short
from liif_fast import ops

_GIB = 1 << 30


def checks() -> Iterator[Check]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield Check(f"1024x1024 from 256x256 {short(dtype)}", partial(paper_image, dtype=dtype))
    yield Check("render beyond 32-bit offsets", render_far)
    yield Check("query and its gradients beyond 32-bit offsets", query_far)
    yield Check("gather beyond 32-bit offsets", gather_far)


def paper_image(context: Context, judge: Judge, dtype: torch.dtype) -> None:
    """Windows of a whole image, at the corners and across, against float64; all of it finite."""
    side, hidden, window = (24, (64, 64), 8) if context.small else (256, (256,) * 4, 64)
    case = Case(channels=16 if context.small else 64, height=side, width=side, queries=1, hidden=hidden)
    problem = decode(case, dtype, context.device)
    for scale in (4, 3, 3.7):
        out_side = round(side * scale)
        with torch.no_grad():
            image = ops.render(
                problem.feat, (out_side, out_side), problem.weights, problem.biases, backend=context.backend
            )
        judge.true("finite everywhere", bool(image.isfinite().all()))
        last, middle = out_side - window, (out_side - window) // 2
        found, expected = [], []
        for top, left in ((0, 0), (last, last), (0, last), (middle, middle - 3)):
            found.append(image[:, :, top : top + window, left : left + window])
            expected.append(_exact_window(problem, case, (out_side, out_side), (top, left, window, window)))
        out, exact = torch.stack(found), torch.stack(expected)
        if dtype in FORWARD:
            judge.at_most("error of the range", range_error(out, exact), FORWARD[dtype])
        else:
            judge.at_least("PSNR in dB", psnr(out, exact), PSNR[dtype])


def _exact_window(problem: Decode, case: Case, size: tuple[int, int], window: tuple[int, int, int, int]) -> Tensor:
    coord = ops.reference.window_coord(size, window, dtype=torch.float32, device="cpu")[None]
    cell = torch.tensor([2 / size[0], 2 / size[1]]).expand(coord.shape)
    out = exact_query(problem._replace(coord=coord, cell=cell), case)
    return out.transpose(1, 2).reshape(1, -1, window[2], window[3])


def _need(context: Context, gib: float) -> None:
    if context.on_gpu and torch.cuda.mem_get_info(context.device)[0] < gib * _GIB:
        raise Skip(f"it needs {gib:g} GiB of free GPU memory")


def _far_problem(context: Context) -> tuple[Case, Decode, Tensor]:
    """A map of more than 2^31 / 256 latents, 256 channels in 16 bits: 4.3 GB; and its last rows, alone."""
    side = 60 if context.small else 2912
    case = Case(channels=1, height=side, width=side, queries=4000, hidden=(256, 64))
    problem = decode(case, torch.bfloat16, context.device)
    with torch.no_grad():
        latent_map = ops.fold(problem.feat, problem.weights[0])
    return case, problem, latent_map


def render_far(context: Context, judge: Judge) -> None:
    """The image's last window, from the whole map and from its last latents alone: the same numbers."""
    _need(context, 20)
    case, problem, latent_map = _far_problem(context)
    side, kept = case.height, 40
    first = side - kept
    size, window = (2 * side, 2 * side), (2 * side - 50, 2 * side - 60, 50, 60)
    layers = (problem.weights, problem.biases)
    with torch.no_grad():
        whole = ops.render(problem.feat, size, *layers, window=window, latent_map=latent_map, backend=context.backend)
        alone = ops.render(
            problem.feat[:, :, first:, first:],
            size,
            *layers,
            window=window,
            feat_region=(first, first, side, side),
            latent_map=latent_map[:, first:, first:].contiguous(),
            backend=context.backend,
        )
    judge.at_most("error of the range", range_error(whole, alone), 1e-6)
    judge.at_least("PSNR against float64", psnr(whole, _exact_window(problem, case, size, window)), 40.0)


def query_far(context: Context, judge: Judge) -> None:
    """Queries in the map's last rows, forward and backward; the same map moved to the front is the oracle."""
    _need(context, 30)
    case, problem, latent_map = _far_problem(context)
    side, kept = case.height, 40
    # Coordinates of latents far from the border of the kept part, in the whole map's units and in the part's.
    generator = torch.Generator().manual_seed(5)
    place = (torch.rand(1, case.queries, 2, generator=generator, dtype=torch.float64) * (kept - 8) + 4).round(
        decimals=1
    )
    place = (place + 0.05).to(context.device)  # in latents; never on a tie
    results = []
    for offset, size, part in ((side - kept, side, latent_map), (0, kept, latent_map[:, -kept:, -kept:].contiguous())):
        coord = ((place + offset) * 2 / size - 1).float()
        cell = torch.full_like(coord, 0.3 / size)
        values = part.detach().requires_grad_()
        feat = torch.zeros(1, 1, size, size, dtype=part.dtype, device=part.device)
        moved = problem._replace(feat=feat, coord=coord, cell=cell)
        out = ops.query(*moved, latent_map=values, backend=context.backend)
        (grad,) = torch.autograd.grad(out.float().square().sum(), values)
        judge.true("gradients elsewhere are zero", bool(grad[:, : size - kept].any()) is False)
        results.append((out.detach(), grad[:, -kept:, -kept:].clone()))
    # Coordinates in a large map have few bits left for a latent's inside: half a thousandth of one here.
    judge.at_most("error", norm_error(results[0][0], results[1][0]), 2e-2)
    judge.at_most("gradient of the latents", norm_error(results[0][1], results[1][1]), 5e-2)


def gather_far(context: Context, judge: Judge) -> None:
    """More than 2^31 gathered numbers: the last ones equal those of their queries alone."""
    _need(context, 20)
    case = Case(channels=64, height=64, width=64, queries=2000 if context.small else 1_000_000)
    problem = decode(case, torch.bfloat16, context.device)
    x, area_weight = ops.gather(problem.feat, problem.coord, problem.cell, backend=context.backend)
    judge.true("more than 2^31 numbers", x.numel() > 2**31 or context.small)
    part = slice(case.queries - 1000, case.queries)
    coord, cell = problem.coord[:, part].contiguous(), problem.cell[:, part].contiguous()
    last, last_weight = ops.gather(problem.feat, coord, cell, backend=context.backend)
    judge.true("the same inputs", torch.equal(x[:, part], last))
    judge.true("the same weights", torch.equal(area_weight[:, part], last_weight))
    del x, area_weight
    if context.on_gpu:
        feat = problem.feat.detach().requires_grad_()
        y, _ = ops.gather(feat, problem.coord, problem.cell, backend=context.backend)
        grad_x = torch.zeros_like(y)
        grad_x[:, part] = 1
        (grad,) = torch.autograd.grad(y, feat, grad_x)
        alone = problem.feat.detach().requires_grad_()
        z, _ = ops.gather(alone, coord, cell, backend=context.backend)
        (expected,) = torch.autograd.grad(z, alone, torch.ones_like(z))
        judge.at_most("gradient of feat", norm_error(grad, expected), 4e-3)
