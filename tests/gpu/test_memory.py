"""Memory on a GPU: how much a decode allocates, whole images, and tensors whose offsets do not fit into 32 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from liif_fast import ops
from tests.gpu.problems import Decode, assert_close, make_problem
from tests.helpers import Case, psnr, range_error

SPARE_BYTES = 64 << 20  # for workspaces
IMAGE = Case(channels=64, height=256, width=256, queries=1, hidden=(256,) * 4)
WINDOW = 64
LEAST_DB = {torch.float16: 68.0, torch.bfloat16: 52.0}
FAR = Case(channels=1, height=2912, width=2912, queries=4000, hidden=(256, 64))  # a latent map of 2^31 numbers
KEPT = 40  # rows and columns of the last corner of that map


def exact_window(problem: Decode, size: tuple[int, int], window: tuple[int, int, int, int]) -> Tensor:
    """A window of a rendered image in float64, [1, O, h, w], of values that are already rounded.

    The CPU chooses the latents: its `grid_sample` rounds as the ops do, and a GPU's rounds once fewer.
    """
    coord = ops.reference.window_coord(size, window, dtype=torch.float32, device="cpu")[None]
    cell = torch.tensor([2 / size[0], 2 / size[1]]).expand(coord.shape)
    feat = problem.feat.cpu().float()
    gathered = ops.reference.gather(feat, coord, cell, feat_unfold=True, local_ensemble=True)
    x, area_weight = (tensor.to(problem.feat.device, torch.float64) for tensor in gathered)
    wide = problem.to(torch.float64)
    out = ops.reference.ensemble(ops.reference.imnet(x, wide.weights, wide.biases), area_weight)
    return out.transpose(1, 2).reshape(1, -1, window[2], window[3])


def render(problem: Decode, size: tuple[int, int], backend: str, **options) -> Tensor:
    with torch.no_grad():
        return ops.render(problem.feat, size, problem.weights, problem.biases, backend=backend, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [4, 8])
def test_a_decode_allocates_its_map_its_output_and_little_else(device, gpu_backend, scale, dtype):
    problem = make_problem(IMAGE, dtype, device)
    render(problem, (64, 64), gpu_backend)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    image = render(problem, (256 * scale, 256 * scale), gpu_backend)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    # The convolution has a copy of its input, a workspace and the latent map in another layout.
    latent_map = 256 * 256 * 256 * dtype.itemsize
    assert peak <= 3 * latent_map + image.numel() * (4 + dtype.itemsize) + SPARE_BYTES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [4, 3, 3.7])
def test_a_whole_image_of_the_paper(device, gpu_backend, dtype, scale):
    """1024x1024 from 256x256 and other scales: finite everywhere, and close to float64 at corners and in the middle."""
    problem, side = make_problem(IMAGE, dtype, device), round(256 * scale)
    image = render(problem, (side, side), gpu_backend)
    assert image.isfinite().all()
    last, middle = side - WINDOW, (side - WINDOW) // 2
    found, expected = [], []
    for top, left in ((0, 0), (last, last), (0, last), (middle, middle - 3)):
        found.append(image[:, :, top : top + WINDOW, left : left + WINDOW])
        expected.append(exact_window(problem, (side, side), (top, left, WINDOW, WINDOW)))
    if dtype == torch.float32:
        assert range_error(torch.stack(found), torch.stack(expected)) <= 1e-5
    else:
        assert psnr(torch.stack(found), torch.stack(expected)) >= LEAST_DB[dtype]


@pytest.fixture
def far(device, gpu_backend, reserve) -> tuple[Decode, Tensor]:
    """A problem whose latent map has more than 2^31 numbers (4.3 GB in 16 bits), and that map."""
    reserve(30)
    problem = make_problem(FAR, torch.bfloat16, device)
    return problem, ops.fold(problem.feat, problem.weights[0])


def test_render_beyond_32_bit_offsets(far, gpu_backend):
    """The last window of the image is the same from the whole map and from the last latents alone."""
    problem, latent_map = far
    side, first = FAR.height, FAR.height - KEPT
    size, window = (2 * side, 2 * side), (2 * side - 50, 2 * side - 60, 50, 60)
    whole = render(problem, size, gpu_backend, window=window, latent_map=latent_map)
    corner = {
        "latent_map": latent_map[:, first:, first:].contiguous(),
        "feat_region": (first, first, side, side),
    }
    last = problem._replace(feat=problem.feat[:, :, first:, first:])
    alone = render(last, size, gpu_backend, window=window, **corner)
    assert range_error(whole, alone) <= 1e-6
    assert psnr(whole, exact_window(problem, size, window)) >= 40


def test_query_and_its_gradients_beyond_32_bit_offsets(far, device, gpu_backend):
    """Queries in the last rows of the map equal those in a map that holds these rows only."""
    problem, latent_map = far
    generator = torch.Generator().manual_seed(5)
    # In latents, away from the border of the kept corner and never halfway between two latents.
    position = torch.rand(1, FAR.queries, 2, generator=generator, dtype=torch.float64) * (KEPT - 8) + 4
    position = (position.round(decimals=1) + 0.05).to(device)
    results = []
    corner = latent_map[:, -KEPT:, -KEPT:].contiguous()
    for offset, size, part in ((FAR.height - KEPT, FAR.height, latent_map), (0, KEPT, corner)):
        coord = ((position + offset) * 2 / size - 1).float()
        cell, feat = torch.full_like(coord, 0.3 / size), part.new_zeros(1, 1, size, size)
        values = part.detach().requires_grad_()
        layers = (problem.weights, problem.biases)
        out = ops.query(feat, coord, cell, *layers, latent_map=values, backend=gpu_backend)
        (grad,) = torch.autograd.grad(out.float().square().sum(), values)
        assert not grad[:, : size - KEPT].any()
        results.append((out.detach(), grad[:, -KEPT:, -KEPT:].clone()))
    # In a large map a float32 coordinate resolves half a thousandth of a latent.
    (far_out, far_grad), (near_out, near_grad) = results
    assert_close([far_out], [near_out], 2e-2)
    assert_close([far_grad], [near_grad], 5e-2)


def test_gather_and_its_gradient_beyond_32_bit_offsets(device, gpu_backend, reserve):
    """More than 2^31 gathered numbers: the last ones equal those of their queries alone."""
    reserve(20)
    case = Case(channels=64, height=64, width=64, queries=1_000_000)
    problem, results = make_problem(case, torch.bfloat16, device), []
    for first in (0, case.queries - 1000):
        feat = problem.feat.detach().requires_grad_()
        coord, cell = (points[:, first:].contiguous() for points in (problem.coord, problem.cell))
        x, area_weight = ops.gather(feat, coord, cell, backend=gpu_backend)
        assert first or x.numel() > 2**31
        grad_x = torch.zeros_like(x)
        grad_x[:, -1000:] = 1
        (grad,) = torch.autograd.grad(x, feat, grad_x)
        results.append((x[:, -1000:].detach().clone(), area_weight[:, -1000:].clone(), grad))
        del x, grad_x
    (x, area_weight, grad), (x_alone, weight_alone, grad_alone) = results
    assert torch.equal(x, x_alone) and torch.equal(area_weight, weight_alone)
    assert_close([grad], [grad_alone], 4e-3)
