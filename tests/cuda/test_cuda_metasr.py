"""The CUDA kernels of MetaSR's folded decode, run on the CPU by tests/cuda/emulator, against the float64 reference.

They are not yet run on a GPU.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from liif_fast import ops
from liif_fast.ops import registration as library
from liif_fast.ops.backends import cuda
from liif_fast.ops.metasr import metasr_fold
from tests.cuda.emulator import build
from tests.cuda.emulator.launches import SCHEDULES, both_orders
from tests.cuda.emulator.ops import Ops
from tests.helpers import norm_error, range_error

pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=build.why_not())

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# A lane holds 2 to 8 hidden units, so that a warp's share is 64, 128 or 256 of them. Outputs go by three.
SHAPES = {
    "plain": {},
    "paper-width": {"hidden": 256, "queries": 70},
    "one-unit-more": {"hidden": 257, "queries": 40},
    "two-shares": {"hidden": 512, "queries": 9, "outs": 1},
    "one-unit": {"hidden": 1},
    "one-output": {"outs": 1},
    "two-output-groups": {"outs": 4, "hidden": 64},
    "seven-outputs": {"outs": 7, "hidden": 130, "queries": 33},
    "one-query": {"queries": 1, "batch": 1},
    "no-query": {"queries": 0},
    "one-latent": {"size": (1, 1), "queries": 75},
    "one-row": {"size": (1, 9)},
}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The kernels, in the place of the extension's CUDA half."""
    module = build.load()
    monkeypatch.setattr(cuda, "_C", Ops(module))
    module.set_schedule(0, False)
    return module


def problem(dtype, batch=2, size=(5, 7), queries=90, hidden=29, outs=3, seed=3):
    """latent_map, coord (some outside the image), cell, weight, bias; all but the map in the dtype of geometry."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1

    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    others = [1.1 * uniform(batch, queries, 2), uniform(batch, queries, 2).abs() / 4, uniform(hidden, 3)]
    others = [tensor.to(geometry) for tensor in (*others, 0.2 * uniform(hidden))]
    return [t.requires_grad_() for t in (uniform(batch, *size, outs * (hidden + 1)).to(dtype), *others)]


def rendered(tensors, scale):
    """The same problem at the pixel centres of an image, row by row: neighbours share latents, rows and cells."""
    latent_map, _, _, *filters = tensors
    geometry = filters[0].dtype
    size = [scale * s for s in latent_map.shape[1:3]]
    axes = [ops.reference.pixel_centers(s, dtype=geometry) for s in size]
    coord = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1).expand(latent_map.shape[0], -1, 2)
    cell = torch.tensor([2 / s for s in size], dtype=geometry).expand(coord.shape)
    return [latent_map, *(t.clone().requires_grad_() for t in (coord, cell)), *filters]


def decode(tensors, region=None, backend="cuda"):
    latent_map, coord, cell, weight, bias = tensors
    region = region or (0, 0, *latent_map.shape[1:3])
    return library.metasr_query(latent_map, coord, cell, weight, bias, list(region), backend)


def reference(tensors, region=None):
    """The reference on a feature map that is the latent map, with a filter that picks one number for each unit."""
    latent_map, coord, cell, weight, bias = tensors
    hidden = weight.shape[0]
    outs = latent_map.shape[-1] // (hidden + 1)
    pick = torch.eye(outs * (hidden + 1), dtype=latent_map.dtype).view(outs, hidden + 1, -1)
    filters = latent_map.new_zeros(latent_map.shape[-1], 9, outs, hidden + 1)
    filters[:, 4] = pick.permute(2, 0, 1)  # the centre of the 3x3
    filters = filters.flatten(0, 2)
    feat = latent_map.permute(0, 3, 1, 2)
    layers = [weight, filters[:, :hidden]], [bias, filters[:, hidden]]
    return ops.reference.metasr_query(feat, coord, cell, *layers, feat_region=region)


def grads_of(outputs, tensors):
    probe = torch.rand(outputs.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64) - 0.3
    return torch.autograd.grad(outputs, tensors, probe.to(outputs.dtype))


@both_orders
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_and_gradients_equal_the_reference(dtype, shape, deterministic):
    tensors = problem(dtype, **shape)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    out, expected = decode(tensors), reference(exact)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    assert out.dtype == tensors[1].dtype and out.shape == expected.shape
    assert range_error(out, expected) <= tolerance
    for position, (grad, exact_grad) in enumerate(zip(grads_of(out, tensors), grads_of(expected, exact), strict=True)):
        assert grad.dtype == tensors[position].dtype
        rounded_once = position == 0 and dtype in (torch.bfloat16, torch.float16)
        assert norm_error(grad, exact_grad) <= (4e-3 if rounded_once else tolerance), position


@both_orders
@pytest.mark.parametrize("scale", [1, 3, 4])
def test_neighbours_that_share_a_latent(scale, deterministic):
    tensors = rendered(problem(torch.float32, hidden=70), scale)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    out, expected = decode(tensors), reference(exact)
    assert range_error(out, expected) <= 3e-6
    for grad, exact_grad in zip(grads_of(out, tensors), grads_of(expected, exact), strict=True):
        assert norm_error(grad, exact_grad) <= 1e-5


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 23), (255, 64), (1000, 3)], ids=str)
@pytest.mark.parametrize("scale", [1, 2, 3, 3.7, 30])
def test_latents_are_exactly_those_of_grid_sample(size, scale):
    """The judge is torch's CPU code, on a map that holds its own indices."""
    latents = torch.arange(float(size[0] * size[1])).view(1, *size, 1)
    latent_map = torch.cat([torch.zeros_like(latents), latents], dim=-1)  # one unit, and what is added to its output
    picked = []
    for s in size:
        axis = ops.reference.pixel_centers(round(s * scale), dtype=torch.float32)
        picked.append(axis[torch.linspace(0, len(axis) - 1, 400).long()])
    coord = torch.stack(picked, dim=-1).unsqueeze(0)
    cell = torch.tensor([2 / round(s * scale) for s in size]).expand(coord.shape)
    tensors = [latent_map, coord, cell, torch.zeros(1, 3), torch.zeros(1)]
    assert torch.equal(decode(tensors), reference(tensors))
    found = cuda._C.cuda_metasr_latents(coord, cell.contiguous(), [0, 0, *size], [1, *size])
    assert torch.equal(found.float(), reference(tensors).flatten())


@both_orders
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_results_do_not_depend_on_the_launch(kernels, schedule, deterministic):
    tensors = problem(torch.float32, batch=3, queries=301, hidden=40)  # four blocks
    expected = decode(tensors)
    expected_grads = grads_of(expected, tensors)
    kernels.set_schedule(*schedule)
    out = decode(tensors)
    assert torch.equal(out, expected)
    grad_map, *grads = grads_of(out, tensors)
    assert all(torch.equal(ours, other) for ours, other in zip(grads, expected_grads[1:], strict=True))
    if deterministic:
        assert torch.equal(grad_map, expected_grads[0])
    else:
        assert norm_error(grad_map, expected_grads[0]) <= 1e-6


@pytest.mark.parametrize("deterministic", [True], indirect=True)
def test_ordered_gradients_add_queries_in_their_order(deterministic):
    """To the bit what a loop over the queries makes of the bias's part, where every sum rounds."""
    tensors = problem(torch.float32, size=(2, 2), queries=500, hidden=3, outs=2)
    latent_map, coord, cell, *_ = tensors
    out = decode(tensors)
    probe = torch.rand(out.shape, generator=torch.Generator().manual_seed(5)) - 0.4
    (grad_map,) = torch.autograd.grad(out, [latent_map], probe)
    latents = cuda._C.cuda_metasr_latents(coord.detach(), cell.detach(), [0, 0, 2, 2], [2, 2, 2])
    sums = np.zeros((8, 2), np.float32)
    for latent, grad in zip(latents.tolist(), probe.flatten(0, 1).numpy(), strict=True):
        sums[latent] += grad
    assert np.array_equal(grad_map.view(8, 2, 4)[..., 3].numpy(), sums)


@both_orders
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_a_part_of_the_map(dtype, deterministic):
    latent_map, _, _, weight, bias = problem(dtype, size=(60, 9), hidden=9)
    geometry = weight.dtype
    size, band = (150, 20), (60, 0, 31, 20)
    coord = ops.reference.window_coord(size, band, dtype=geometry, device=None).expand(2, -1, 2)
    cell = torch.tensor([2 / size[0], 2 / size[1]], dtype=geometry).expand(coord.shape)
    points = [t.clone().requires_grad_() for t in (coord, cell)]
    part = latent_map.detach()[:, 20:42].clone().requires_grad_()
    out = decode([part, *points, weight, bias], region=(20, 0, 60, 9))
    whole = decode([latent_map, *points, weight, bias])
    assert torch.equal(out, whole)
    grads = grads_of(out, [part, *points, weight, bias])
    expected = grads_of(whole, [latent_map, *points, weight, bias])
    torch.testing.assert_close(grads[0], expected[0][:, 20:42])
    torch.testing.assert_close(grads[1:], expected[1:])


def test_a_region_that_lacks_the_latents_reads_only_itself():
    latent_map, coord, cell, weight, bias = problem(torch.float32)
    part = latent_map.detach()[:, :2].clone()
    out = decode([part, coord, cell, weight, bias], region=(3, 1, 9, 11))
    assert out.isfinite().all()


def test_from_features_through_the_folded_filter():
    """With the fold and its gradients, against the reference that never folds."""
    generator = torch.Generator().manual_seed(1)

    def uniform(*shape):
        return 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1

    feat, coord, cell = uniform(2, 4, 5, 7), 1.1 * uniform(2, 60, 2), uniform(2, 60, 2).abs() / 4
    layers = [uniform(20, 3), 0.3 * uniform(9 * 4 * 3, 20), 0.2 * uniform(20), 0.2 * uniform(9 * 4 * 3)]
    tensors = [t.requires_grad_() for t in (feat, coord, cell, *layers)]
    w0, w1, b0, b1 = layers
    out = decode([metasr_fold(feat, [w0, w1], [b0, b1]), coord, cell, w0, b0], region=(0, 0, 5, 7))
    expected = ops.metasr_query(feat, coord, cell, [w0, w1], [b0, b1], backend="reference")
    assert range_error(out, expected) <= 1e-12
    for grad, expected_grad in zip(grads_of(out, tensors), grads_of(expected, tensors), strict=True):
        assert norm_error(grad, expected_grad) <= 1e-12


def test_offsets_count_in_64_bits(tmp_path):
    """Maps of more than 2^31 numbers each, in a file with holes."""
    row, side = 3 * 257, 1669
    path = tmp_path / "holes"
    latent_map = torch.from_numpy(np.memmap(path, dtype=np.float16, mode="w+", shape=(3, side, side, row)))
    values = torch.rand(3, 2, row, generator=torch.Generator().manual_seed(0)).half()
    latent_map[:, -1, -2:] = values
    coord = torch.ones(3, 5, 2) - 0.5 * 2 / side
    coord[..., 1] -= torch.tensor([1.2, 0.8, 0.6, 0.4, -0.4]) * 2 / side
    cell = torch.zeros(3, 5, 2)
    weight, bias = torch.zeros(256, 3), torch.ones(256)
    out = decode([latent_map, coord, cell, weight, bias])
    expected = values.double().view(3, 2, 3, 257).sum(-1)[:, [0, 0, 0, 1, 1]]
    assert range_error(out, expected) <= 1e-6


def test_nan_in_nan_out():
    tensors = problem(torch.float32, size=(3, 4), queries=80, hidden=40)
    clean = decode(tensors)
    with torch.no_grad():
        tensors[1][0, 5, 0] = tensors[1][0, 33, 1] = tensors[2][1, 7, 0] = float("nan")
    out = decode(tensors)
    asked = torch.ones(2, 80, dtype=torch.bool)
    asked[0, 5] = asked[0, 33] = asked[1, 7] = False
    assert torch.equal(out[asked], clean[asked])
    assert out[~asked].isnan().all()
    _, *grads = grads_of(out, tensors)
    _, *expected = grads_of(reference(tensors), tensors)
    for grad, expected_grad in zip(grads[:2], expected[:2], strict=True):
        torch.testing.assert_close(grad[asked], expected_grad[asked], rtol=1e-4, atol=1e-4)
    assert grads[2].isnan().all() and expected[2].isnan().all()  # through the filter's three inputs
    with torch.no_grad():
        tensors[3][17, 1] = float("nan")
    assert decode(tensors).isnan().all()


def test_far_coordinates_stay_finite():
    tensors = problem(torch.float32, hidden=40)
    with torch.no_grad():
        tensors[1][0, 1] = torch.tensor([1e30, -1e30])
        tensors[1][1, 2] = torch.tensor([-40.0, 40.0])
    exact = [t.detach().double() for t in tensors]
    out, expected = decode(tensors), reference(exact)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@both_orders
def test_gradcheck(deterministic):
    tensors = problem(torch.float64, batch=1, size=(2, 3), queries=4, hidden=5, outs=2)
    with torch.no_grad():
        tensors[1].mul_(0.6).add_(0.013)
    assert torch.autograd.gradcheck(lambda *t: decode(t), tensors)


def test_opcheck():
    latent_map, *others = problem(torch.float32, queries=9, hidden=5)
    torch.library.opcheck(library.metasr_query, (latent_map, *others, [0, 0, 5, 7], "cuda"))


def test_a_latent_too_wide_is_refused(kernels):
    """Offsets inside a latent are 32 bits. Memory that nobody touches costs nothing."""
    outs, hidden = 3, 2**27
    sizes = [(1, 1, 1, outs * (hidden + 1)), (1, 1, 2), (1, 1, 2), (hidden, 3), (hidden,)]
    with pytest.raises(RuntimeError, match="a latent of MetaSR's map holds more than 2\\^28 numbers"):
        kernels.metasr_forward("float32", *(np.empty(size, np.float32) for size in sizes), [0, 0, 1, 1])
