"""The CUDA kernels' own source, run on the CPU by tests/cuda/emulator: kernels, flags and dtypes against the reference.

The kernels are not yet run on a GPU. What only one can show: races, memory order, speed, the bindings' streams and
devices, and whether the indices agree with torch's own CUDA grid_sample. That one is compiled with FMA contraction,
ours is not (see csrc/cuda/gather.cu): a sweep there should count the positions where a tie is decided differently.
"""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from liif_fast import ops
from liif_fast.ops import backends
from liif_fast.ops import registration as library
from liif_fast.ops.backends import cuda, extension
from tests.cuda.emulator import build
from tests.cuda.emulator.launches import SCHEDULES, both_orders
from tests.cuda.emulator.ops import Ops
from tests.helpers import FLAGS, Case, norm_error, random_problem, reason_against

pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=build.why_not())

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
CASES = {
    "plain": Case(batch=2, channels=5, height=6, width=9, queries=70),
    "one-query": Case(queries=1),
    "no-query": Case(queries=0, batch=2),
    "one-latent": Case(height=1, width=1),
    "one-column": Case(height=8, width=1, channels=33),
    "two-columns": Case(height=3, width=2),
    "many-channels": Case(channels=64, height=4, width=3, queries=19),
    "half-a-step": Case(channels=24, height=3, width=5, queries=11, batch=2),
    "two-steps": Case(channels=72, height=2, width=4, queries=7),
}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The kernels, in the place of the extension's CUDA half."""
    module = build.load()
    monkeypatch.setattr(cuda, "_C", Ops(module))
    module.set_schedule(0, False)
    return module


def rand_like(tensor, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)


def gather_both(case, flags, dtype, requires_grad=False):
    """(leaves, what the kernels made of them, what the reference did)."""
    ensemble, unfold, with_cell = flags
    feat, coord, cell, *_ = random_problem(case, dtype, requires_grad=requires_grad)
    cell = cell if with_cell else None
    ours = library.gather(feat, coord, cell, unfold, ensemble, "cuda")
    expected = ops.reference.gather(feat, coord, cell, feat_unfold=unfold, local_ensemble=ensemble)
    return [feat, coord] + ([cell] if with_cell else []), ours, expected


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_equals_the_reference(case, flags, dtype):
    _, (x, area_weight), (expected_x, expected_weight) = gather_both(case, flags, dtype)
    assert x.dtype == dtype and x.shape == expected_x.shape
    assert torch.equal(x, expected_x)  # copies and the original's arithmetic: nothing is rounded differently
    assert area_weight.dtype == expected_weight.dtype
    torch.testing.assert_close(area_weight, expected_weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_gather_does_not_depend_on_the_launch(kernels, schedule):
    kernels.set_schedule(*schedule)
    case = Case(batch=3, channels=5, queries=301)  # about fifteen blocks
    _, (x, area_weight), (expected_x, expected_weight) = gather_both(case, (True, True, True), torch.float32)
    assert torch.equal(x, expected_x)
    torch.testing.assert_close(area_weight, expected_weight, rtol=1e-6, atol=1e-7)


LAYOUTS = {
    "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "every-second": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "sliced": lambda t: F.pad(t, (1, 2, 3, 4))[..., 3 : 3 + t.shape[2], 1 : 1 + t.shape[3]],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gather_reads_any_layout(layout, dtype):
    feat, coord, cell, *_ = random_problem(CASES["plain"], dtype)
    feat = layout(feat)
    coord = coord.transpose(0, 1).contiguous().transpose(0, 1)
    cell = cell[:, :1].expand(cell.shape)
    assert not (feat.is_contiguous() or coord.is_contiguous() or cell.is_contiguous())
    x, area_weight = library.gather(feat, coord, cell, True, True, "cuda")
    expected_x, expected_weight = ops.reference.gather(feat, coord, cell)
    assert torch.equal(x, expected_x)
    torch.testing.assert_close(area_weight, expected_weight, rtol=1e-6, atol=1e-7)


def test_gather_counts_offsets_in_64_bits(tmp_path):
    """Maps that lie more than 2^32 elements apart, in a file with holes."""
    map_stride, channel_stride = 2**32 + 77, 2**31 + 13
    memory = np.memmap(tmp_path / "holes", dtype=np.float16, mode="w+", shape=(map_stride + channel_stride + 64,))
    feat = torch.from_numpy(memory).as_strided((2, 2, 2, 2), (map_stride, channel_stride, 3, 1))
    values = torch.arange(16.0).half().view(2, 2, 2, 2)
    feat.copy_(values)
    _, coord, cell, *_ = random_problem(Case(batch=2, channels=2, height=2, width=2, queries=9), torch.float32)
    x, _ = library.gather(feat, coord, cell, True, True, "cuda")
    assert torch.equal(x, ops.reference.gather(values, coord, cell)[0])


@pytest.mark.parametrize("ensemble", [True, False])
def test_nan_and_far_coordinates(ensemble):
    feat, coord, cell, *_ = random_problem(CASES["plain"], torch.float32)
    coord[0, 0, 0] = cell[1, 2, 1] = float("nan")
    coord[0, 1] = torch.tensor([1e30, -1e30])
    coord[1, 3] = torch.tensor([float("inf"), 0.3])
    x, area_weight = library.gather(feat, coord, cell, True, ensemble, "cuda")
    expected_x, expected_weight = ops.reference.gather(feat, coord, cell, local_ensemble=ensemble)
    known = coord.isfinite().all(-1)  # where not, grid_sample may take any latent
    assert known.sum() == known.numel() - 2
    torch.testing.assert_close(x[known], expected_x[known], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(area_weight, expected_weight, rtol=1e-6, atol=1e-7, equal_nan=True)
    assert torch.equal(x[..., 45:].isnan(), expected_x[..., 45:].isnan())


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (16, 16), (17, 23), (255, 64), (1000, 3)], ids=str)
@pytest.mark.parametrize("scale", [1, 2, 3, 3.7, 30])
def test_indices_are_exactly_those_of_grid_sample(size, scale):
    """A map that holds its own indices, sampled at pixel centres of rows and columns; the judge is torch's CPU code."""
    rows, cols = torch.meshgrid(*(torch.arange(s) for s in size), indexing="ij")
    feat = torch.stack([rows, cols]).float().unsqueeze(0)
    axes = [ops.reference.pixel_centers(round(s * scale), dtype=torch.float32) for s in size]
    picked = [axis[torch.linspace(0, len(axis) - 1, 400).long()] for axis in axes]
    coord = torch.stack(picked, dim=-1).unsqueeze(0)
    x, _ = library.gather(feat, coord, None, False, True, "cuda")
    assert torch.equal(x, ops.reference.gather(feat, coord, feat_unfold=False)[0])


@both_orders
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_corners_that_a_rounding_moved_apart(dtype, deterministic):
    """On maps of tens of thousands of rows a tie can put two latents' distance between neighbouring corners."""
    height, channels = 40000, 8
    rows = torch.rand(20000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows[:3] = torch.tensor([0.8534741401672363, 0.22477400302886963, -0.02092599868774414])
    coord = torch.stack([rows, torch.zeros_like(rows)], dim=-1)[:12].unsqueeze(0)
    index = torch.arange(height).view(1, 1, height, 1)
    feat = (index * 7 % 1009).to(dtype).expand(1, channels, height, 1).contiguous(memory_format=torch.channels_last)
    feat.requires_grad_()
    x, _ = library.gather(feat, coord, None, True, True, "cuda")
    found = [geometry_index(coord[0, :, 0], height, side) for side in (-1, 1)]
    assert (found[1] - found[0])[:3].tolist() == [2, 2, 2]
    expected = ops.reference.gather(feat, coord)[0]
    assert torch.equal(x, expected)
    probe = torch.arange(x.numel()).view(x.shape).remainder(17).to(dtype)  # sums without rounding
    grads = [torch.autograd.grad(t, feat, probe)[0] for t in (x, expected)]
    assert grads[0].count_nonzero() and torch.equal(*grads)


def geometry_index(coord, size, side):
    shifted = (coord + (side * (2 / size / 2) + 1e-6)).clamp(-1 + 1e-6, 1 - 1e-6)
    return (((shifted + 1) * size - 1) * 0.5).round()


@both_orders
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_gather_gradients(case, flags, deterministic):
    leaves, ours, expected = gather_both(case, flags, torch.float64, requires_grad=True)
    probes = [rand_like(t, seed) for seed, t in enumerate(ours)]
    grads, expected_grads = (torch.autograd.grad(outputs, leaves, probes) for outputs in (ours, expected))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert norm_error(grad, expected_grad) <= 1e-13


@both_orders
@pytest.mark.parametrize("channels", [4, 5, 40, 64])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gather_gradients_in_lower_precision(dtype, channels, deterministic):
    """grad_x comes in feat's dtype, sums are float32, and feat's gradient is rounded once."""
    case = Case(batch=2, channels=channels, height=3, width=4, queries=1600 // channels)
    leaves, ours, _ = gather_both(case, (True, True, True), dtype, requires_grad=True)
    probes = [rand_like(t, seed) for seed, t in enumerate(ours)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    with torch.no_grad():  # the same latents, which float64 might choose differently at a tie
        features = 9 * channels
        assert torch.equal(ops.reference.gather(*exact)[0][..., :features], ours[0].double()[..., :features])
    grads = torch.autograd.grad(ours, leaves, probes)
    expected = torch.autograd.grad(ops.reference.gather(*exact), exact, [probe.double() for probe in probes])
    limits = [4e-3 if dtype in SIXTEEN_BITS else 1e-6, 1e-5, 1e-5]
    for grad, expected_grad, limit in zip(grads, expected, limits, strict=True):
        assert norm_error(grad, expected_grad) <= limit


@pytest.mark.parametrize("deterministic", [True], indirect=True)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("unfold", [True, False])
def test_ordered_gradients_are_those_of_the_cpu_backend_to_the_bit(kernels, schedule, unfold, deterministic):
    """Both walk the queries from first to last, so that no rounding differs, whatever the launch."""
    if reason := reason_against("cpu", "gather", torch.float32):
        pytest.skip(reason)
    kernels.set_schedule(*schedule)
    feat, coord, cell, *_ = random_problem(
        Case(batch=2, channels=34, height=4, width=5, queries=67), torch.float32, requires_grad=True
    )
    grads = []
    for backend in ("cuda", "cpu"):
        outputs = library.gather(feat, coord, cell, unfold, True, backend)
        grads.append(torch.autograd.grad(outputs, [feat, coord, cell], [rand_like(t, 1) - 0.3 for t in outputs]))
    for ours, cpus in zip(*grads, strict=True):
        assert torch.equal(ours, cpus)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("channels", [5, 8])
@pytest.mark.parametrize("deterministic", [False], indirect=True)
def test_atomic_gradients_do_not_depend_on_the_launch_beyond_rounding(kernels, schedule, channels, deterministic):
    kernels.set_schedule(*schedule)
    case = Case(batch=3, channels=channels, queries=301)
    leaves, ours, expected = gather_both(case, (True, True, True), torch.float32, requires_grad=True)
    probes = [rand_like(t, 1) for t in ours]
    for grad, expected_grad in zip(
        torch.autograd.grad(ours, leaves, probes), torch.autograd.grad(expected, leaves, probes), strict=True
    ):
        assert norm_error(grad, expected_grad) <= 1e-5


@pytest.mark.parametrize("corners", [1, 4, 3])
@pytest.mark.parametrize("outs", [1, 3, 16, 33, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ensemble_and_its_gradients(corners, outs, dtype):
    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    pred = (rand_like(torch.empty(2, 75, corners, outs), 0) - 0.5).to(dtype).requires_grad_()
    area_weight = rand_like(torch.empty(2, 75, corners), 1).to(geometry).requires_grad_()
    out = library.ensemble(pred, area_weight, "cuda")
    exact = [t.detach().double().requires_grad_() for t in (pred, area_weight)]
    expected = ops.reference.ensemble(*exact)
    assert out.dtype == geometry
    tolerance = 1e-14 if geometry == torch.float64 else 1e-6
    assert norm_error(out, expected) <= tolerance
    probe = rand_like(out, 2) - 0.5
    grads = torch.autograd.grad(out, [pred, area_weight], probe)
    expected_grads = torch.autograd.grad(expected, exact, probe.double())
    assert grads[0].dtype == dtype
    assert norm_error(grads[0], expected_grads[0]) <= (4e-3 if dtype in SIXTEEN_BITS else tolerance)
    assert norm_error(grads[1], expected_grads[1]) <= tolerance


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("shape", [(2, 1000, 4, 3), (1, 0, 4, 3), (1, 5, 4, 0)], ids=str)
def test_ensemble_shapes_and_launches(kernels, schedule, shape):
    kernels.set_schedule(*schedule)
    pred = rand_like(torch.empty(shape, dtype=torch.float64), 0).requires_grad_()
    area_weight = rand_like(pred[..., 0] if shape[3] else torch.empty(shape[:3]).double(), 1).requires_grad_()
    out, expected = library.ensemble(pred, area_weight, "cuda"), ops.reference.ensemble(pred, area_weight)
    torch.testing.assert_close(out, expected)
    grads, expected_grads = (torch.autograd.grad(o.sin().sum(), [pred, area_weight]) for o in (out, expected))
    torch.testing.assert_close(grads, expected_grads)


def test_gradcheck():
    feat, coord, cell, *_ = random_problem(
        Case(channels=2, height=3, width=4, queries=5), torch.float64, requires_grad=True
    )
    with torch.no_grad():
        coord.mul_(0.7).add_(0.013)
    assert torch.autograd.gradcheck(lambda *t: library.gather(*t, True, True, "cuda"), (feat, coord, cell))
    pred, area_weight = torch.rand(1, 3, 4, 2).double().requires_grad_(), torch.rand(1, 3, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: library.ensemble(*t, "cuda"), (pred, area_weight))


def test_opcheck():
    feat, coord, cell, *_ = random_problem(Case(queries=5), torch.float32, requires_grad=True)
    torch.library.opcheck(library.gather, (feat, coord, cell, True, True, "cuda"))
    torch.library.opcheck(library.gather, (feat, coord, None, False, False, "cuda"))
    pred, area_weight = torch.rand(1, 3, 4, 2, requires_grad=True), torch.rand(1, 3, 4, requires_grad=True)
    torch.library.opcheck(library.ensemble, (pred, area_weight, "cuda"))


def test_compile_fullgraph_does_not_change_the_result():
    torch._dynamo.reset()
    feat, coord, cell, *_ = random_problem(Case(queries=40), torch.float32, requires_grad=True)

    def run(feat, coord, cell):
        x, area_weight = library.gather(feat, coord, cell, True, True, "cuda")
        return library.ensemble(x[..., :3].square(), area_weight, "cuda").sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(feat, coord, cell)
    expected = run(feat, coord, cell)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(*(torch.autograd.grad(t, [feat, coord]) for t in (compiled, expected)))


# ---- choosing the backend --------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """As if the extension had its CUDA half, and torch had a GPU."""
    monkeypatch.setattr(backends, "_BUILT_WITH_CUDA", True)
    monkeypatch.setattr(extension, "_state", {"reason": ""})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


def test_cuda_comes_first_where_it_runs(gpu):
    for dtype in DTYPES:
        assert backends.choose(backends.Problem("gather", "cuda", dtype)) == "cuda"
        assert backends.choose(backends.Problem("ensemble", "cuda", dtype)) == "cuda"
        assert backends.choose(backends.Problem("metasr_query", "cuda", dtype)) == "cuda"
    for dtype in DTYPES[1:]:
        assert backends.choose_fused(backends.Problem("query", "cuda", dtype, (64, 256, 3))) == ("cuda", True)
    assert backends.choose(backends.Problem("gather", "cpu", torch.float32)) == "cpu"
    assert ("cuda", True, "") in backends.report()


def test_the_choice_is_made_while_tracing(monkeypatch):
    """torch.cuda.is_available, the real one, does not break the graph."""
    if not extension.is_available():
        pytest.skip(extension.reason())
    monkeypatch.setattr(backends, "_BUILT_WITH_CUDA", True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    torch._dynamo.reset()

    def run(x):
        return x + 1 if backends.can_run_cuda(backends.Problem("gather", "cuda", x.dtype)) else x - 1

    expected = 1.0 if torch.cuda.is_available() else -1.0
    assert torch.compile(run, fullgraph=True, backend="eager")(torch.zeros(())).item() == expected


REFUSALS = {
    "tensors": ("gather", "cpu", torch.float32, "takes CUDA tensors, these are on 'cpu': move them"),
    "dtype": ("gather", "cuda", torch.int32, "takes float64, float32, bfloat16 or float16 features, not torch.int32"),
}


@pytest.mark.parametrize(("op", "device", "dtype", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_cuda_refuses(gpu, op, device, dtype, message):
    problem = backends.Problem(op, device, dtype)
    with pytest.raises(RuntimeError, match=f"^backend 'cuda' {message}"):
        backends.choose(problem, "cuda")
    assert not backends.can_run_cuda(problem)


def test_what_cuda_needs(gpu, monkeypatch):
    problem = backends.Problem("gather", "cuda", torch.float32)
    assert reason_against("cuda", "gather", torch.float32, "cuda") == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason_against("cuda", *problem[::2], "cuda") == (
        "backend 'cuda' needs an NVIDIA GPU, and torch finds none that it can use"
    )
    monkeypatch.setattr(torch.version, "cuda", None)
    assert reason_against("cuda", *problem[::2], "cuda") == (
        "backend 'cuda' needs a torch built with CUDA, this one is without"
    )
    monkeypatch.setattr(backends, "_BUILT_WITH_CUDA", False)
    monkeypatch.setattr(extension, "build_facts", lambda: {"why_no_cuda": "no nvcc was found"})
    assert reason_against("cuda", *problem[::2], "cuda") == (
        "backend 'cuda' needs an extension compiled with CUDA, this one is without: no nvcc was found"
    )
    monkeypatch.setattr(extension, "_state", {"reason": "LIIF_FAST_BUILD=none"})
    assert reason_against("cuda", *problem[::2], "cuda") == (
        "backend 'cuda' needs the compiled extension: LIIF_FAST_BUILD=none"
    )
    assert backends.choose(problem) == "reference"


def test_the_door_refuses_cpu_tensors():
    with pytest.raises(RuntimeError, match="backend 'cuda' takes CUDA tensors, these are on 'cpu'"):
        ops.gather(torch.rand(1, 3, 4, 5), torch.zeros(1, 2, 2), backend="cuda")


# ---- the judge itself ------------------------------------------------------------------------------------------------

PROBES = {
    "sound": (0, ""),
    "shared_overflow": (1, "out of bounds for type 'int [64]'"),
    "global_overflow": (1, "heap-buffer-overflow"),
    "divergent_block": (3, "the kernel diverged: threads wait at __syncthreads, 24 of 64 have exited"),
    "divergent_warp": (3, "the kernel diverged: threads wait at __shfl_xor_sync, 10 of 64 have exited"),
    "absent_lane": (3, "__shfl_xor_sync: lane 16 is not in the mask"),
}


@pytest.mark.parametrize("name", PROBES)
def test_planted_mistakes_are_caught(name):
    try:
        program = build.probes()
    except RuntimeError as error:
        if "libasan" in str(error) or "libubsan" in str(error):
            pytest.skip("this compiler has no sanitisers")
        raise
    environment = {"ASAN_OPTIONS": "detect_leaks=0"}  # what a stuck fiber holds is never freed
    result = subprocess.run([program, name], capture_output=True, text=True, env=environment)
    code, message = PROBES[name]
    assert result.returncode == code, result.stderr
    assert message in result.stderr
