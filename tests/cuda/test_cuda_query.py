"""The fused decode's CUDA kernels, run on the CPU by tests/cuda/emulator, against the float64 reference: every kind of
products, flag and tile, forward and backward, through the ops' doors. Not yet run on a GPU.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ops.rounded_model import rounded_query
from liif_fast import ops
from liif_fast.ops import backends
from liif_fast.ops import registration as library
from liif_fast.ops.backends import cuda
from liif_fast.ops.backends.cuda import decode as cuda_query
from tests.cuda.emulator import build
from tests.cuda.emulator.ops import Ops
from tests.helpers import FLAGS, Case, as_float64, norm_error, psnr, random_problem, range_error

pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=build.why_not())

# Name: (operands' dtype, whether float32 may round to TF32)
KINDS = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
}
# Processors, shared memory of a block and of a processor in KB, compute capability.
DEVICES = {"as-sm_90": (3, 227, 228, 9, 0), "as-sm_80": (4, 163, 164, 8, 0), "as-sm_86": (2, 99, 100, 8, 6)}
CASES = {
    "plain": Case(batch=2, channels=3, height=5, width=7, queries=70, hidden=(32, 48)),
    "one-query": Case(queries=1, hidden=(16,)),
    "no-query": Case(queries=0, batch=2, hidden=(16, 16)),
    "one-latent": Case(height=1, width=1, queries=33, hidden=(64, 64)),
    "one-column": Case(height=9, width=1, queries=40, hidden=(16,) * 5),
    "mixed-widths": Case(channels=2, batch=2, queries=99, hidden=(112, 16, 48), outs=16),
}
WIDE = Case(channels=5, height=4, width=6, queries=45, hidden=(256,) * 4)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The kernels in the place of the extension's CUDA half, and a table that lets CPU tensors go there."""
    module = build.load()
    monkeypatch.setattr(cuda, "_C", Ops(module))
    monkeypatch.setattr(cuda_query, "_C", Ops(module))
    monkeypatch.setitem(backends.BACKENDS, "cuda", lambda problem, raise_error=False: True)
    module.set_schedule(0, False)
    set_device(module, "as-sm_90")
    return module


def set_device(module, name):
    processors, block, processor, *capability = DEVICES[name]
    module.set_device(processors, block << 10, processor << 10, *capability)


@pytest.fixture
def kind(request):
    """(operands' dtype, kind's name), with torch's switch for TF32 set as the kind says."""
    dtype, tf32 = KINDS[request.param]
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    yield dtype, request.param
    torch.backends.cuda.matmul.fp32_precision = before


every_kind = pytest.mark.parametrize("kind", KINDS, indirect=True)
two_kinds = pytest.mark.parametrize("kind", ["float32", "bfloat16"], indirect=True)


def make_problem(case, flags, requires_grad=False):
    """(leaves, arguments, keywords) of ops.query for float32 parameters, coordinates away from ties."""
    ensemble, unfold, with_cell = flags
    feat, coord, cell, weights, biases = random_problem(case, torch.float32, requires_grad=requires_grad)
    with torch.no_grad():
        coord.mul_(0.97).add_(0.0031)  # float64 chooses the same latents
        first = weights[0]
        features = first[:, : 9 * case.channels : 1 if unfold else 9]
        first = torch.cat([features, first[:, 9 * case.channels :][:, : 4 if with_cell else 2]], dim=1)
    weights = [first.detach().requires_grad_(requires_grad), *weights[1:]]
    leaves = [feat, coord, *([cell] if with_cell else []), *weights, *biases]
    keywords = {"local_ensemble": ensemble, "feat_unfold": unfold, "cell_decode": with_cell}
    return leaves, keywords


def decode(leaves, keywords, run, **more):
    feat, coord, *rest = leaves
    cell = rest.pop(0) if keywords["cell_decode"] else None
    layers = len(rest) // 2
    return run(feat, coord, cell, rest[:layers], rest[layers:], **keywords, **more)


def on_kernels(leaves, keywords, dtype, **more):
    """What the kernels make of it: float32 as it is, 16 bits by autocast."""
    feat = leaves[0]
    weight = leaves[3 if keywords["cell_decode"] else 2]
    trained = torch.is_grad_enabled() and feat.requires_grad
    latent = library.latent_dtype("cuda", dtype, trained)
    latent_map = ops.fold(feat.to(latent), weight.to(latent), feat_unfold=keywords["feat_unfold"])
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return decode(leaves, keywords, ops.query, latent_map=latent_map, backend="cuda", **more)


def on_torch(leaves, keywords, dtype):
    """What PyTorch's own layers make of it in the dtype; float16 stands in for TF32, which a CPU does not have."""
    with torch.autocast("cpu", dtype if dtype != torch.float32 else torch.float16):
        return decode(leaves, keywords, ops.reference.query)


def check_forward(out, exact, own, name):
    if name == "float32":
        assert range_error(out, exact) <= 1e-5
    else:
        assert psnr(out, exact) >= (52 if name == "bfloat16" else 68)
        assert norm_error(out, exact) <= 2 * norm_error(own, exact)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@every_kind
def test_query_equals_the_reference(case, flags, kind):
    dtype, name = kind
    leaves, keywords = make_problem(case, flags)
    out = on_kernels(leaves, keywords, dtype)
    exact = decode(as_float64(leaves), keywords, ops.reference.query)
    assert out.shape == exact.shape and out.dtype == torch.float32
    if case.queries:
        check_forward(out, exact, on_torch(leaves, keywords, dtype), name)


@pytest.mark.parametrize("device", ["as-sm_90", "as-sm_86"])
@every_kind
def test_gradients_of_the_papers_width(kernels, device, kind):
    set_device(kernels, device)
    check_gradients(WIDE, (True, True, True), kind)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [64, 128, 256])
@every_kind
def test_the_largest_workspace_fits(kernels, device, width, kind):
    """Sixteen outputs, a query a row, gradients of coordinates: what asks for the most shared memory."""
    set_device(kernels, device)
    check_gradients(Case(channels=2, queries=2, hidden=(width, 16), outs=16), (False, True, True), kind)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@every_kind
def test_gradients_with_every_flag(flags, kind):
    check_gradients(CASES["plain"], flags, kind)


@pytest.mark.parametrize("case", list(CASES.values())[1:], ids=list(CASES)[1:])
@two_kinds
def test_gradients_of_awkward_shapes(case, kind):
    check_gradients(case, (True, True, True), kind)


def check_gradients(case, flags, kind):
    """All at once: where ReLUs turn round in 16 bits, single gradients of so few rows are mostly luck."""
    dtype, name = kind
    leaves, keywords = make_problem(case, flags, requires_grad=True)
    exact_leaves = as_float64(leaves)
    out, own = on_kernels(leaves, keywords, dtype), on_torch(leaves, keywords, dtype)
    exact = decode(exact_leaves, keywords, ops.reference.query)
    grad_out = torch.rand(out.shape, generator=torch.Generator().manual_seed(1)) - 0.5
    grads = torch.autograd.grad(out, leaves, grad_out)
    own_grads = torch.autograd.grad(own, leaves, grad_out)
    exact_grads = torch.autograd.grad(exact, exact_leaves, grad_out.double())
    for grad, leaf in zip(grads, leaves, strict=True):
        assert grad.shape == leaf.shape and grad.dtype == leaf.dtype and grad.isfinite().all()
    if name == "float32":
        assert all(norm_error(grad, right) <= 1e-5 for grad, right in zip(grads, exact_grads, strict=True))
    elif case.queries > 1:
        errors, own_errors = (
            torch.tensor([norm_error(grad, right) for grad, right in zip(made, exact_grads, strict=True)])
            for made in (grads, own_grads)
        )
        assert errors.square().mean() <= (2 * own_errors).square().mean()
    if case.queries:
        check_forward(out, exact, own, name)


@pytest.mark.parametrize("ensemble", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_round_where_they_say(dtype, ensemble):
    """Against a float32 model with the same roundings, so that every ReLU lets the same values through."""
    case = Case(channels=3, batch=2, queries=60, hidden=(48, 32, 64))
    leaves, keywords = make_problem(case, (ensemble, True, True), requires_grad=True)
    out = on_kernels(leaves, keywords, dtype)
    feat, coord, cell, *layers = leaves
    weights, biases = layers[:4], layers[4:]
    narrow = lambda values: values.to(dtype).float()  # noqa: E731
    expected = rounded_query(feat, coord, cell, weights, biases, narrow, edges=False, local_ensemble=ensemble)
    # A sum in another order may round to the other neighbour, now and then.
    assert range_error(out, expected) <= (2e-4 if dtype == torch.float16 else 2e-3)
    grad_out = torch.rand(out.shape, generator=torch.Generator().manual_seed(1)) - 0.5
    grads = torch.autograd.grad(out, leaves, grad_out)
    expected_grads = torch.autograd.grad(expected, leaves, grad_out)
    # What is left: saved activations and blended vectors are rounded where the last layer's gradient reads them.
    bound = 1e-3 if dtype == torch.float16 else 8e-3
    assert all(norm_error(grad, right) <= bound for grad, right in zip(grads, expected_grads, strict=True))


@pytest.mark.parametrize("flags", [(True, True, True), (False, True, True), (True, False, False)], ids=str)
@two_kinds
def test_render_equals_query_on_its_grid(flags, kind):
    dtype, name = kind
    case = Case(batch=2, channels=3, height=5, width=6, hidden=(32, 16))
    leaves, keywords = make_problem(case, flags)
    feat, _, *rest = leaves
    rest = rest[1:] if flags[2] else rest
    weights, biases = rest[:3], rest[3:]
    size, window = (17, 22), (3, 2, 11, 17)
    latent_map = ops.fold(feat.to(dtype), weights[0].to(dtype), feat_unfold=flags[1])
    more = {"latent_map": latent_map, "backend": "cuda", **keywords}
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        image = ops.render(feat, size, weights, biases, window=window, **more)
        coord = ops.reference.window_coord(size, window, dtype=torch.float32, device=None).expand(2, -1, 2)
        cell = torch.tensor([2 / 17, 2 / 22]).expand(coord.shape).contiguous()
        points = ops.query(feat, coord.contiguous(), cell, weights, biases, **more)
    assert image.shape == (2, 3, 11, 17)
    assert range_error(image, points.transpose(1, 2).reshape(image.shape)) <= 1e-6
    exact = ops.reference.render(
        feat.double(),
        size,
        [w.double() for w in weights],
        [b.double() for b in biases],
        window=window,
        cell=(2 / 17, 2 / 22),
        feat_region=(0, 0, 5, 6),
        **keywords,
    )
    assert range_error(image, exact) <= 1e-5 if name == "float32" else psnr(image, exact) >= 52


def test_render_from_a_part_of_the_map():
    case = Case(channels=3, height=9, width=8, hidden=(32, 16))
    feat, _, _, weights, biases = random_problem(case, torch.float32)
    window, part = (8, 5, 10, 9), (2, 0, 9, 8)
    whole = ops.render(feat, (30, 26), weights, biases, window=window, backend="cuda")
    strip = ops.render(
        feat[:, :, 2:9, :7], (30, 26), weights, biases, window=(12, 7, 5, 6), feat_region=part, backend="cuda"
    )
    inside = whole[:, :, 4:9, 2:8]
    assert range_error(strip, inside) <= 2e-6


@two_kinds
def test_render_has_gradients(kind):
    dtype, name = kind
    case = Case(channels=3, height=4, width=5, hidden=(32, 16))
    feat, _, _, weights, biases = random_problem(case, torch.float32, requires_grad=True)
    leaves = [feat, *weights, *biases]
    exact_leaves = as_float64(leaves)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        image = ops.render(feat, (8, 10), weights, biases, backend="cuda")
    exact = ops.render(exact_leaves[0], (8, 10), exact_leaves[1:4], exact_leaves[4:], backend="reference")
    grads = torch.autograd.grad(image.square().sum(), leaves)
    exact_grads = torch.autograd.grad(exact.square().sum(), exact_leaves)
    bound = 1e-5 if name == "float32" else 0.1
    assert all(norm_error(grad, right) <= bound for grad, right in zip(grads, exact_grads, strict=True))


def gradients(leaves, keywords, dtype, **more):
    out = on_kernels(leaves, keywords, dtype, **more)
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize("ensemble", [True, False])
@every_kind
def test_recomputing_changes_nothing(monkeypatch, kind, ensemble):
    leaves, keywords = make_problem(CASES["plain"], (ensemble, True, True), requires_grad=True)
    kept = gradients(leaves, keywords, kind[0])
    again = gradients(leaves, keywords, kind[0], recompute=True)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    monkeypatch.setattr(cuda_query, "_CHUNK_ROWS", 128)
    for recompute in (False, True):
        in_steps = gradients(leaves, keywords, kind[0], recompute=recompute)
        assert all(norm_error(a, b) <= 1e-6 for a, b in zip(in_steps, kept, strict=True))


@pytest.mark.parametrize("schedule", [(1, False), (2, True)], ids=["one-block", "two-blocks-backwards"])
@two_kinds
def test_results_do_not_depend_on_the_launch(kernels, kind, schedule):
    leaves, keywords = make_problem(CASES["mixed-widths"], (True, True, True), requires_grad=True)
    as_launched = gradients(leaves, keywords, kind[0])
    kernels.set_schedule(*schedule)
    otherwise = gradients(leaves, keywords, kind[0])
    assert torch.equal(as_launched[0], otherwise[0])
    assert all(norm_error(a, b) <= 1e-6 for a, b in zip(otherwise, as_launched, strict=True))


@two_kinds
def test_the_fixed_order_is_the_same_sum(kernels, kind):
    leaves, keywords = make_problem(CASES["plain"], (True, True, True), requires_grad=True)
    atomics = gradients(leaves, keywords, kind[0])
    torch.use_deterministic_algorithms(True)
    try:
        ordered = gradients(leaves, keywords, kind[0])
        kernels.set_schedule(0, True)  # the hardware's order would now be another one
        assert all(torch.equal(a, b) for a, b in zip(ordered, gradients(leaves, keywords, kind[0]), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(norm_error(a, b) <= 1e-6 for a, b in zip(ordered, atomics, strict=True))


@two_kinds
def test_coordinates_without_gradients_keep_less(kind):
    dtype, _ = kind
    leaves, keywords = make_problem(CASES["plain"], (True, True, True), requires_grad=True)
    with_points = gradients(leaves, keywords, dtype)
    for point in leaves[1:3]:
        point.requires_grad_(False)
    out = on_kernels(leaves, keywords, dtype)
    rest = [leaves[0], *leaves[3:]]
    grads = torch.autograd.grad(out.square().sum(), rest)
    assert all(torch.equal(a, b) for a, b in zip(grads, [with_points[1], *with_points[4:]], strict=True))
    sizes = [cuda_query.saved_bytes(64, 256, (32, 32, 3), dtype, points) for points in (False, True)]
    assert sizes[1] - sizes[0] == 256 * 64 * dtype.itemsize


@pytest.mark.parametrize("ensemble", [True, False])
@every_kind
def test_nan_and_far_coordinates(kind, ensemble):
    leaves, keywords = make_problem(CASES["plain"], (ensemble, True, True))
    coord, cell = leaves[1:3]
    coord[0, 5, 0] = cell[1, 7, 1] = float("nan")
    coord[0, 9] = torch.tensor([1e3, -1e3])
    out = on_kernels(leaves, keywords, kind[0])
    exact = decode(leaves, keywords, ops.reference.query)
    assert torch.equal(out.isnan(), exact.isnan()) and out.isnan().any(-1).sum() == 2
    known = ~exact.isnan()
    known[0, 9] = False
    assert range_error(out[known], exact[known]) <= 0.02
    assert norm_error(out[0, 9], exact[0, 9]) <= 0.02


def test_a_map_that_is_a_view_at_an_odd_address():
    leaves, _ = make_problem(CASES["plain"], (True, True, True))
    feat, coord, cell, *layers = leaves
    latent_map = ops.fold(feat, layers[0])
    memory = torch.empty(latent_map.numel() + 1)
    view = memory[1:].view(latent_map.shape).copy_(latent_map)
    assert view.data_ptr() % 16
    results = [
        ops.query(feat, coord, cell, layers[:3], layers[3:], latent_map=each, backend="cuda")
        for each in (latent_map, view)
    ]
    assert torch.equal(*results)


def test_nan_features_stay_nan():
    leaves, keywords = make_problem(CASES["plain"], (True, True, True))
    leaves[0][1, 2, 3, 3] = float("nan")
    exact = decode(leaves, keywords, ops.reference.query)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(on_kernels(leaves, keywords, dtype).isnan(), exact.isnan())


def test_offsets_are_counted_in_64_bits(tmp_path):
    """Three maps of 2^30 values each, in a file with holes."""
    shape = (3, 8192, 8192, 16)
    latent_map = torch.from_numpy(np.memmap(tmp_path / "holes", dtype=np.float16, mode="w+", shape=shape))
    generator = torch.Generator().manual_seed(0)
    patch = torch.rand(4, 4, 16, generator=generator)
    latent_map[2, 8188:, 8188:] = patch.half()
    geometry, weight = torch.rand(16, 2, generator=generator), torch.rand(3, 16, generator=generator)
    biases = [torch.rand(16, generator=generator), torch.rand(3, generator=generator)]
    coord = ops.reference.pixel_centers(8192, dtype=torch.float32)[8189:8191] + 0.00003
    coord = torch.stack([coord, coord.flip(0)], -1).expand(3, 2, 2).contiguous()
    arguments = (coord, None, geometry, [weight], biases, True, torch.float16, False, False, "cuda")
    out, _ = library.query(latent_map, *arguments)
    rows = cols = slice(8188, 8192)
    index = ((coord[2] + 1) * 8192 - 1) / 2 - 8188
    x = torch.zeros(2, 4, 16)
    weights = torch.zeros(2, 4)
    for q in range(2):
        for corner in range(4):
            at = [int(torch.floor(index[q, axis]).item()) + (corner >> (1 - axis) & 1) for axis in range(2)]
            rel = [(coord[2, q, axis] - (-1 + (2 * (at[axis] + 8188) + 1) / 8192)) * 8192 for axis in range(2)]
            x[q, corner] = torch.relu(patch.half()[at[0], at[1]].float() + geometry @ torch.stack(rel) + biases[0])
            weights[q, 3 - corner] = (rel[0] * rel[1]).abs()
    weights /= weights.sum(1, keepdim=True)
    expected = torch.einsum("qck,qc->qk", x, weights) @ weight.t() + biases[1]
    assert latent_map[2, rows, cols].any()
    assert range_error(out[2], expected) <= 1e-2
    assert norm_error(out[0], out[2]) > 0.1


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("operands", range(4), ids=KINDS)
def test_packing_moves_every_weight_once(kernels, operands, width):
    vector = 4 if operands >= 2 else 8  # of kFloat16, kBFloat16, kTf32, kFloat32
    units = kernels.packed_units(operands, width)
    assert len(units) == len(set(units)) == width * width // vector
    assert {out for out, _ in units} == set(range(width))
    assert {first for _, first in units} == set(range(0, width, vector))


def test_fakes_and_autograd_agree_with_the_kernels():
    case = Case(channels=2, height=3, width=4, queries=9, hidden=(16, 16), outs=2)
    feat, coord, cell, weights, biases = random_problem(case, torch.float32, requires_grad=True)
    latent_map = ops.fold(feat, weights[0]).detach().requires_grad_()
    geometry = weights[0][:, -4:].detach().requires_grad_()
    layers = (geometry, weights[1:], biases)
    tests = ("test_schema", "test_faketensor")  # the others compare what is saved, padding and all
    for save in (True, False):
        arguments = (latent_map, coord, cell, *layers, True, torch.bfloat16, save, True, "cuda")
        torch.library.opcheck(library.query, arguments, test_utils=tests)
        arguments = (latent_map, *layers, [6, 8, 0, 0, 6, 8, 0, 0, 3, 4], [0.3, 0.2], True, torch.float32, save, "cuda")
        torch.library.opcheck(library.render, arguments, test_utils=tests)


def test_compile_fullgraph_does_not_change_the_result():
    torch._dynamo.reset()
    leaves, keywords = make_problem(Case(queries=40, hidden=(16, 16)), (True, True, True), requires_grad=True)

    def run(*leaves):
        image = ops.render(leaves[0], (9, 11), leaves[3:6], leaves[6:], backend="cuda")
        return decode(leaves, keywords, ops.query, backend="cuda").square().sum() + image.square().sum()

    expected = torch.autograd.grad(run(*leaves), leaves)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for grad, right in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-4, atol=1e-4)


REFUSALS = {
    "float64": (torch.float64, (64, 64, 3), "decodes in float32, bfloat16 or float16, not float64"),
    "odd": (torch.float32, (64, 40, 3), "width is a multiple of 16 up to 256, not 40"),
    "wide": (torch.float32, (272, 64, 3), "width is a multiple of 16 up to 256, not 272"),
    "outs": (torch.float16, (64, 64, 17), "decodes to at most 16 outputs, not 17"),
    "linear": (torch.float16, (3,), "decodes with 2 to 65 layers, this imnet has 1"),
}


@pytest.mark.parametrize(("dtype", "widths", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_what_no_kernel_fuses_is_refused_with_its_reason(monkeypatch, dtype, widths, reason):
    monkeypatch.undo()  # the table as it is
    monkeypatch.setattr(backends, "_BUILT_WITH_CUDA", True)
    monkeypatch.setattr(backends.extension, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for op in ("query", "render"):
        problem = backends.Problem(op, "cuda", dtype, widths)
        assert not backends.can_run_cuda(problem)
        with pytest.raises(RuntimeError, match=reason):
            backends.choose(problem, "cuda")
        assert backends.can_run_cuda(problem._replace(dtype=torch.float32, widths=(64, 256, 16)))


@pytest.mark.parametrize("hidden", [(24, 40), ()], ids=["odd-widths", "linear"])
def test_other_imnets_run_between_gather_and_ensemble(monkeypatch, hidden):
    def gathers_only(problem, raise_error=False):
        return problem.op in ("gather", "ensemble")

    for name in ("cuda", "triton", "cpu"):
        if name in backends.BACKENDS:
            monkeypatch.setitem(backends.BACKENDS, name, gathers_only)
    leaves, keywords = make_problem(Case(channels=3, queries=60, hidden=hidden), (True, True, True))
    out = decode(leaves, keywords, ops.query)
    exact = decode(as_float64(leaves), keywords, ops.reference.query)
    assert range_error(out, exact) <= 1e-5
    feat, _, _, *layers = leaves
    half = len(layers) // 2
    image = ops.render(feat, (9, 12), layers[:half], layers[half:])
    expected = ops.render(feat, (9, 12), layers[:half], layers[half:], backend="reference")
    assert range_error(image, expected) <= 1e-5
