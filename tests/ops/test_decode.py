"""query and render, forward and backward, on every backend: every shape, flag and kind of operands."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from liif_fast import ops
from tests.backends import KINDS
from tests.conftest import tf32
from tests.helpers import FLAGS, SHAPES, Case, as_float64, norm_error, psnr, random_problem, range_error
from tests.ops.decoding import MODES, decode, exact, gradients, latent_map_of, make_problem, run
from tests.ops.rounded_model import rounded_query
from tests.ops.tolerances import LIMITS, TIMES_PYTORCH, assert_close, check_decode, require

modes = pytest.mark.parametrize("mode", MODES)
every_kind = pytest.mark.kinds("float64", "float32", "tf32", "bfloat16", "float16")
two_kinds = pytest.mark.kinds("float32", "bfloat16")
SMALL = Case(batch=2, hidden=(32, 16), queries=9)


def flag_name(flags) -> str:
    """The paper's names of an ablation: -e without ensemble, -u without unfolding, -c without cells."""
    return "".join(f"-{letter}" for letter, on in zip("euc", flags) if not on) or "full"


@modes
@pytest.mark.parametrize("shape", SHAPES)
@every_kind
@pytest.mark.hopper
def test_every_shape(backend, kind, shape, mode):
    check_decode(backend, kind, SHAPES[shape], mode)


@modes
@pytest.mark.parametrize("flags", FLAGS, ids=flag_name)
@pytest.mark.hopper
def test_every_flag(backend, kind, flags, mode):
    check_decode(backend, kind, Case(2, 3, 5, 7, 30, (32, 16), 3, *flags), mode)


@pytest.mark.prove
@pytest.mark.parametrize("seed", range(6))
@every_kind
@pytest.mark.hopper
def test_random_cases(backend, kind, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    hidden = tuple(16 * draw(1, 16) for _ in range(draw(1, 4)))
    sizes = draw(1, 3), draw(1, 24), draw(1, 33), draw(1, 33), draw(1, 400)
    case = Case(*sizes, hidden, draw(1, 16), *FLAGS[draw(0, 7)])
    for mode in MODES:
        check_decode(backend, kind, case, mode)


@pytest.mark.parametrize("flags", FLAGS, ids=flag_name)
def test_the_rounded_model_without_rounding_is_the_reference(flags):
    case = Case(2, 3, 5, 7, 40, (20, 12), 3, *flags)
    feat, coord, cell, weights, biases = random_problem(case, torch.float32)
    same = rounded_query(feat, coord, cell, weights, biases, torch.clone, edges=True, **case.flags)
    wide = as_float64([feat, coord, cell, *weights, *biases])
    expected = ops.reference.query(*wide[:3], wide[3:6], wide[6:], **case.flags)
    assert norm_error(same, expected) <= 1e-6


@modes
@pytest.mark.parametrize("trained", [True, False], ids=["training", "inference"])
@pytest.mark.kinds("autocast-bfloat16", "autocast-float16")
@pytest.mark.hopper
def test_sixteen_bits_keep_the_documented_accuracy(backend, kind, trained, mode):
    """In dB, with weights that keep the size of signals through four layers, as in the paper's decoder."""
    case = SHAPES["paper-width"]._replace(queries=16)
    require(backend, kind, case)
    problem = make_problem(case, kind, mode, backend.device, grad=trained)
    with torch.no_grad():
        for weight in problem.weights:
            weight.mul_(2**0.5)
    out, expected = decode(problem, backend.op_backend), exact(problem)[0]
    assert psnr(out, expected) >= LIMITS[kind.narrow, "psnr"]
    assert norm_error(out, expected) <= TIMES_PYTORCH * norm_error(decode(problem, "reference"), expected)


# ------------------------------------------------------------------------------------------------- forward to backward


@modes
@pytest.mark.parametrize("deterministic", [True], indirect=True)
@pytest.mark.kinds("float32", "tf32", "bfloat16", "float16")
@pytest.mark.hopper
def test_recomputing_and_repeating_change_no_bit(backend, kind, mode, deterministic, monkeypatch):
    case = SMALL._replace(height=3, width=4)
    problem = make_problem(case, kind, mode, backend.device)
    kept = run(problem, backend)
    assert all(torch.equal(a, b) for a, b in zip(run(problem, backend), kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(run(problem, backend, recompute=True), kept, strict=True))
    limit = LIMITS[kind.dtype, "rounding" if kind.dtype.itemsize == 2 else "gradient"]
    torch.use_deterministic_algorithms(False)  # the fixture puts it back
    assert_close(run(problem, backend), kept, limit)
    for module, name, size in backend.chunks:
        monkeypatch.setattr(import_module(module), name, size)
    for recompute in (False, True) if backend.chunks else ():
        in_steps = run(problem, backend, recompute=recompute)
        assert torch.equal(in_steps[0], kept[0])
        assert_close(in_steps, kept, limit)


class ZeroBytes(TorchDispatchMode):
    """The sizes of the tensors of zero bytes that PyTorch makes."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.uint8 and "zero" in str(function):
            self.sizes.append(out.numel())
        return out


@modes
@two_kinds
@pytest.mark.hopper
def test_the_backward_makes_no_gradient_of_what_the_forward_saved(backend, kind, mode):
    """It would be zeros of the same size, which PyTorch writes in every step."""
    problem = make_problem(Case(hidden=(32, 16)), kind, mode, backend.device)
    out = decode(problem, backend.op_backend)
    with ZeroBytes() as made:
        gradients(out, problem.leaves)
    assert made.sizes == []


class Ends(torch.autograd.Function):
    """The identity, whose backward has no gradient."""

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@two_kinds
def test_without_a_gradient_of_the_result_there_are_none(backend, kind):
    problem = make_problem(Case(hidden=(32, 16)), kind, device=backend.device)
    out = Ends.apply(decode(problem, backend.op_backend))
    grads = torch.autograd.grad(out.sum(), problem.leaves, allow_unused=True)
    assert not any(grad is not None and grad.any() for grad in grads)


@pytest.mark.parametrize("needed", ["coord", "cell", "neither"])
@pytest.mark.kinds("float32", "autocast-bfloat16")
def test_gradients_do_not_depend_on_what_else_is_differentiated(backend, kind, needed):
    problem = make_problem(SMALL, kind, device=backend.device)
    _, *expected = run(problem, backend)
    problem.coord.requires_grad_(needed == "coord")
    problem.cell.requires_grad_(needed == "cell")
    wanted = [index for index, leaf in enumerate(problem.leaves) if leaf.requires_grad]
    leaves = [problem.leaves[index] for index in wanted]
    _, *grads = gradients(decode(problem, backend.op_backend), leaves, kind.dtype)
    for grad, index in zip(grads, wanted, strict=True):
        assert norm_error(grad, expected[index]) <= 1e-5


def test_the_switch_for_tf32_may_change_between_forward_and_backward(backend):
    if not backend.has_tf32:
        pytest.skip("this backend has no TF32")
    problem = make_problem(SMALL, KINDS[1], device=backend.device)
    expected = None
    for recompute in (None, False, True):
        with tf32(recompute is not None):
            out = decode(problem, backend.op_backend, recompute=bool(recompute))
        with tf32(False):
            grads = torch.autograd.grad(out.sum(), problem.leaves)
        expected = expected or grads
        assert all(norm_error(a, b) <= 1e-2 for a, b in zip(grads, expected, strict=True))


# ------------------------------------------------------------------------------------------------------------- the grid

# Whole scales put queries on latents' centers, where the 1e-6 of the shift and rounding choose the latent.
SIZES = [((5, 7), (13, 40)), ((5, 7), (3, 2)), ((5, 7), (150, 7))]
SIZES += [((17, 23), (17 * scale, 23 * scale)) for scale in (1, 2, 3, 5, 30)]


@pytest.mark.parametrize(("latents", "size"), SIZES, ids=str)
@pytest.mark.parametrize("ensemble", [True, False], ids=["ensemble", "nearest"])
@pytest.mark.kinds("float64", "float32")
def test_render_chooses_the_reference_s_latents(backend, kind, latents, size, ensemble):
    case = Case(1, 3, *latents, hidden=(16,), local_ensemble=ensemble)
    require(backend, kind, case)
    feat, _, _, weights, biases = random_problem(case, kind.dtype)
    side = min(int(2 * backend.most_queries**0.5), 30)
    window = [size[0] // 3, size[1] // 3, min(side, size[0] - size[0] // 3), min(side, size[1] - size[1] // 3)]
    arguments = {"window": window, "local_ensemble": ensemble}
    expected = ops.render(feat, size, weights, biases, backend="reference", **arguments)
    tensors = [t.to(backend.device) for t in (feat, *weights, *biases)]
    out = ops.render(tensors[0], size, tensors[1:3], tensors[3:], backend=backend.op_backend, **arguments)
    assert range_error(out.cpu(), expected) <= LIMITS[kind.dtype, "result"]


@pytest.mark.parametrize("scale", [1, 3, 5, 7])
@pytest.mark.parametrize("latents", [(48, 61), (100, 1), (4, 500)], ids=str)
@pytest.mark.kinds("float32")
def test_render_at_odd_scales_errs_no_more_than_query(backend, kind, latents, scale):
    """Against float64. `query` evaluates every corner; `render` may leave out corners whose weight is rounding noise.

    In the last row and column of centers all areas vanish and rounding chooses the weights: there both must agree.
    """
    case = Case(2, 3, *latents, hidden=(32, 16))
    require(backend, kind, case)
    feat, _, _, weights, biases = random_problem(case, torch.float64)
    layers = [[t.float().to(backend.device) for t in each] for each in (weights, biases)]
    latent_map = ops.fold(feat.float().to(backend.device), layers[0][0])
    size = tuple(scale * count for count in latents)
    side = int(2 * backend.most_queries**0.5)
    cell = torch.tensor([2 / each for each in size])
    errors = []
    for part in (0, 0.37, 1):
        rows, cols = (min(each, side) for each in size)
        window = (round(part * (size[0] - rows)), round(part * (size[1] - cols)), rows, cols)
        on = {"latent_map": latent_map, "backend": backend.op_backend}
        out = ops.render(feat.float().to(backend.device), size, *layers, window=window, **on).cpu()
        coord = ops.reference.window_coord(size, window, dtype=torch.float32, device=None).expand(2, -1, 2)
        points = [t.to(backend.device) for t in (coord, cell.expand_as(coord))]
        same = ops.query(feat.float().to(backend.device), *points, *layers, **on).cpu()
        same = same.transpose(1, 2).reshape(out.shape)
        expected = ops.render(feat, size, weights, biases, window=window, backend="reference")
        rest = torch.ones(rows, cols, dtype=torch.bool)
        for axis, mask in enumerate((rest, rest.T)):
            last = size[axis] - scale // 2 - 1 - window[axis]  # the pixel on the last latent's center
            mask[last : last + 1] = last < 0
        assert range_error(out[..., ~rest], same[..., ~rest]) <= 1e-6
        errors.append([range_error(each[..., rest], expected[..., rest]) for each in (out, same)])
    worst, worst_of_query = torch.tensor(errors).max(0).values
    assert worst <= max(1.2 * worst_of_query, 1e-6)


@pytest.mark.kinds("float64", "float32")
def test_render_a_window_from_a_part_of_the_map(backend, kind):
    case = Case(batch=2, height=12, width=9, hidden=(32, 16))
    require(backend, kind, case)
    feat, _, _, weights, biases = random_problem(case, kind.dtype, requires_grad=True)
    leaves = [t.detach().to(backend.device).requires_grad_() for t in (feat, *weights, *biases)]
    size, window, cell = (31, 20), (11, 6, 5, 4), (0.3, 0.2)
    results = []
    for name in (backend.op_backend, "reference"):
        out = ops.render(
            leaves[0][:, :, 2:10, 1:8], size, leaves[1:4], leaves[4:],
            window=window, feat_region=(2, 1, 12, 9), cell=cell, backend=name,
        )  # fmt: skip
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    limit = LIMITS[kind.dtype, "gradient"]
    assert_close(*results, limit)
    with torch.no_grad():
        arguments = {"window": window, "backend": backend.op_backend}
        whole_map = ops.render(leaves[0], size, leaves[1:4], leaves[4:], cell=cell, **arguments)
        own_cell = ops.render(leaves[0], size, leaves[1:4], leaves[4:], **arguments)
    assert range_error(results[0][0], whole_map) <= limit
    assert range_error(own_cell, whole_map) > 1e-3  # the cell matters


@pytest.mark.with_reference
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("hidden", [(32, 16), (20,), ()], ids=str)
@pytest.mark.kinds("float32", "bfloat16", "autocast-bfloat16")
def test_an_empty_window_or_batch(backend, kind, hidden, recompute):
    """A result of the right shape, and gradients of 0."""
    case = Case(batch=2, height=4, width=3, hidden=hidden, queries=6)
    feat, coord, cell, weights, biases = (
        [t.to(backend.device) for t in each] if isinstance(each, list) else each.to(backend.device)
        for each in random_problem(case, kind.dtype)
    )
    layers = [t.requires_grad_() for t in (*weights, *biases)]
    arguments = (layers[: len(weights)], layers[len(weights) :])
    options = {"backend": backend.op_backend, "recompute": recompute}
    for batch, window in ((2, (3, 1, 0, 4)), (2, (3, 1, 2, 0)), (2, (9, 7, 0, 0)), (0, (3, 1, 2, 4))):
        leaf = feat[:batch].detach().requires_grad_()
        with torch.autocast(backend.device, kind.narrow or torch.bfloat16, enabled=kind.autocast):
            try:
                outs = [ops.render(leaf, (9, 7), *arguments, window=window, **options)]
            except RuntimeError as error:
                assert str(error).startswith("backend ")  # it cannot decode with this imnet
                return
            points = [t[:batch, : 6 if batch == 0 else 0].detach().requires_grad_() for t in (coord, cell)]
            outs.append(ops.query(leaf, *points, *arguments, **options))
            x, area_weight = ops.gather(leaf, *points, backend=backend.op_backend)
            outs += [x, ops.ensemble(x, area_weight, backend=backend.op_backend)]
        assert outs[0].shape == (batch, 3, *window[2:]) and outs[1].shape == (*points[0].shape[:2], 3)
        assert x.shape[2:] == (4, 9 * 3 + 4) and outs[3].shape == (*points[0].shape[:2], 9 * 3 + 4)
        grads = torch.autograd.grad(sum(out.float().sum() for out in outs), [leaf, *points, *layers])
        assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("ensemble", [True, False], ids=["ensemble", "nearest"])
@two_kinds
@pytest.mark.hopper
def test_render_is_query_at_the_centers(backend, kind, ensemble):
    case = SMALL._replace(local_ensemble=ensemble, queries=20)
    problem = make_problem(case, kind, "grid", backend.device, grad=False)
    latent_map = latent_map_of(problem)
    image, points = (
        decode(problem._replace(mode=mode), backend.op_backend, latent_map=latent_map) for mode in ("grid", "points")
    )
    assert range_error(image, points) <= (1e-6 if kind.narrow is None else LIMITS[kind.narrow, "rounding"])


# --------------------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("ensemble", [True, False], ids=["ensemble", "nearest"])
@every_kind
@pytest.mark.hopper
def test_nan_in_nan_out_and_only_there(backend, kind, ensemble):
    case = SMALL._replace(batch=1, local_ensemble=ensemble, queries=12)
    require(backend, kind, case)
    problem = make_problem(case, kind, device=backend.device, grad=False)
    clean = decode(problem, backend.op_backend)
    problem.coord[0, 7, 0] = problem.coord[0, 9, 1] = problem.cell[0, 4, 1] = float("nan")
    out = decode(problem, backend.op_backend)
    broken = [4, 7, 9]
    rest = [query for query in range(12) if query not in broken]
    assert out[0, broken].isnan().all()
    assert torch.equal(out[0, rest], clean[0, rest])
    # Far and infinite coordinates read inside the map.
    problem.coord[0, :6, 0] = torch.tensor([1e30, -1e30, 3e9, -3e9, float("inf"), -float("inf")])
    problem.coord[0, 6] = torch.tensor([1e3, -1e3])
    far = decode(problem, backend.op_backend)
    assert far.shape == (1, 12, 3)
    limit = LIMITS[kind.narrow or torch.float16, "model"] if kind.narrow or kind.tf32 else 1e-5
    assert norm_error(far[0, 6], decode(problem, "reference")[0, 6]) <= limit
    problem.feat[0, 2, 3, 3] = float("nan")
    finite = problem.coord.isfinite().all(-1) & (problem.coord.abs() < 1e9).all(-1)
    found, wanted = decode(problem, backend.op_backend).isnan(), decode(problem, "reference").isnan()
    assert torch.equal(found[finite], wanted[finite])


@pytest.mark.kinds("float32", "autocast-bfloat16")
@pytest.mark.hopper
def test_nan_leaves_the_gradients_of_other_queries_alone(backend, kind):
    case = SMALL._replace(batch=1, queries=12)
    clean = make_problem(case, kind, device=backend.device)
    broken = clean.mapped(torch.clone)
    with torch.no_grad():
        broken.coord[0, 9, 1] = float("nan")
    results = []
    for problem in (clean, broken):
        out = decode(problem, backend.op_backend)
        results.append([out, *torch.autograd.grad(out.sum(), [problem.coord, problem.cell])])
    rest = [query for query in range(12) if query != 9]
    assert all(torch.equal(a[0, rest], b[0, rest]) for a, b in zip(*results, strict=True))


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, neither contiguous nor at the beginning of their memory, which is NaN elsewhere."""
    wide = torch.full([2 * size + 1 for size in tensor.shape], float("nan"), dtype=tensor.dtype, device=tensor.device)
    view = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
    view.copy_(tensor)
    return view


@two_kinds
@pytest.mark.hopper
def test_inputs_may_have_any_strides_and_are_not_changed(backend, kind):
    case = SMALL._replace(channels=4)
    problem = make_problem(case, kind, device=backend.device, grad=False)
    expected = decode(problem, backend.op_backend)
    limit = 1e-6 if kind.narrow is None else LIMITS[kind.narrow, "rounding"]
    transposed = problem._replace(feat=problem.feat.transpose(2, 3).contiguous().transpose(2, 3))
    channels_last = problem._replace(feat=problem.feat.contiguous(memory_format=torch.channels_last))
    for changed in (transposed.mapped(strided), channels_last):
        before = [t.clone() for t in changed.leaves]
        assert range_error(decode(changed, backend.op_backend), expected) <= limit
        assert all(torch.equal(a, b) for a, b in zip(changed.leaves, before, strict=True))
    one = {name: getattr(problem, name)[:1] for name in ("feat", "coord", "cell")}
    expanded = {name: tensor.expand(3, *tensor.shape[1:]) for name, tensor in one.items()}
    found = decode(problem._replace(**expanded), backend.op_backend)
    assert range_error(found, expected[:1].expand(3, -1, -1)) <= limit


@modes
@every_kind
@pytest.mark.hopper
def test_a_precomputed_latent_map(backend, kind, mode):
    """In the operands' dtype or wider, at any address; in training its gradient is that of its own decode."""
    require(backend, kind, SMALL)
    problem = make_problem(SMALL, kind, mode, backend.device, grad=False)
    wide = latent_map_of(problem)
    expected = decode(problem, backend.op_backend, latent_map=wide)
    assert range_error(decode(problem, backend.op_backend), expected) <= 2 * LIMITS.get((kind.narrow, "rounding"), 1e-6)
    memory = torch.empty(wide.numel() + 1, dtype=wide.dtype, device=wide.device)
    view = memory[1:].view(wide.shape).copy_(wide)
    assert view.data_ptr() % 16
    assert torch.equal(decode(problem, backend.op_backend, latent_map=view), expected)
    if kind.narrow is None:
        return
    maps = [wide.to(kind.narrow), wide.to(kind.narrow).to(wide.dtype)]
    grads = []
    for latent_map in maps:
        out = decode(problem, backend.op_backend, latent_map=latent_map.requires_grad_())
        assert range_error(out, expected) <= 2 * LIMITS[kind.narrow, "rounding"]
        grads.append(torch.autograd.grad(out.float().sum(), latent_map)[0])
    assert grads[0].any() and norm_error(grads[0], grads[1]) <= LIMITS[kind.narrow, "rounding"]


@every_kind
@pytest.mark.hopper
def test_few_queries_on_a_large_map_gather_instead_of_folding(backend, kind):
    case = Case(height=20, width=25, queries=9, hidden=(16, 16))
    require(backend, kind, case)
    problem = make_problem(case, kind, device=backend.device, grad=False)
    out = ops.query(*problem.tensors, backend=backend.op_backend)
    assert norm_error(out, decode(problem, "reference")) <= LIMITS.get((kind.narrow, "rounding"), 1e-6)
