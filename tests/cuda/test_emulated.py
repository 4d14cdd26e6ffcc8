"""What only the CUDA sources on the CPU can show: launches, workspaces, offsets beyond 32 bits, the emulator itself.

tests/ops compares every result of these kernels. They are not yet run on a GPU. Only one can show races, memory order,
speed, the bindings' streams and devices.
"""

from __future__ import annotations

import subprocess
from importlib import import_module

import numpy as np
import pytest
import torch

from liif_fast import ops
from liif_fast.ops import registration
from tests.backends import DEVICES, KINDS, TABLE, emulated, set_device
from tests.cuda.emulator import build
from tests.helpers import Case, norm_error, random_problem, range_error, reason_against
from tests.ops.decoding import MODES, decode, make_problem, run
from tests.ops.test_gather import both_orders, gather
from tests.ops.test_metasr import decode as decode_metasr
from tests.ops.test_metasr import problem as metasr_problem
from tests.ops.tolerances import LIMITS, assert_close, check_decode

BACKEND = TABLE["cuda-emulated"]
# Most blocks of a launch (0: no limit), and whether they run from last to first.
SCHEDULES = {"one-block": (1, False), "two-blocks-backwards": (2, True), "backwards": (0, True)}
schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
kinds = pytest.mark.parametrize("kind", [KINDS[i] for i in (1, 2, 5, 6)], ids=lambda kind: kind.name, indirect=True)
ordered = pytest.mark.parametrize("deterministic", [True], indirect=True)


@pytest.fixture
def kernels():
    """The emulated kernels, in the place of the extension's CUDA part."""
    with emulated():
        yield build.load()


def train_gather(unfold, name="cuda"):
    case = Case(batch=2, channels=34, height=4, width=5, queries=67, feat_unfold=unfold)
    leaves = random_problem(case, torch.float32, requires_grad=True)[:3]
    outs = gather(leaves, case, name)
    generator = torch.Generator().manual_seed(1)
    probes = [torch.rand(out.shape, generator=generator) - 0.3 for out in outs]
    return [*outs, *torch.autograd.grad(outs, leaves, probes)]


def train_ensemble():
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.rand(shape, generator=generator, requires_grad=True) for shape in ((2, 300, 4, 3), (2, 300, 4))]
    out = ops.ensemble(*leaves, backend="cuda")
    return [out, *torch.autograd.grad(out.sin().sum(), leaves)]


def train_metasr():
    leaves = [t.requires_grad_() for t in metasr_problem(torch.float32, batch=3, queries=150, hidden=40)]
    out = decode_metasr(leaves, "cuda")
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


def train_decode(kind):
    return run(make_problem(Case(2, 2, 5, 7, 50, (112, 16, 48), 16), kind), BACKEND)


RUNS = {
    "gather-patches": lambda: train_gather(True),
    "gather-latents": lambda: train_gather(False),
    "ensemble": train_ensemble,
    "metasr": train_metasr,
    "decode-float32": lambda: train_decode(KINDS[1]),
    "decode-bfloat16": lambda: train_decode(KINDS[3]),
}


@both_orders
@schedules
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.prove if "decode" in name else ()) for name in RUNS]
)
def test_results_do_not_depend_on_the_launch(kernels, name, schedule, deterministic):
    set_device("sm_80")  # whose launches have four blocks
    out, *grads = RUNS[name]()
    kernels.set_schedule(*schedule)
    other, *others = RUNS[name]()
    assert torch.equal(other, out)
    if deterministic and (schedule[0] == 0 or not name.startswith("decode")):  # which adds its blocks' sums
        assert all(torch.equal(a, b) for a, b in zip(others, grads, strict=True))
    else:
        assert_close(others, grads, 4e-3 if grads[-1].dtype == torch.bfloat16 else 1e-6)


@ordered
# Copies arrive at random, and as late as the rules allow.
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.prove)])
@pytest.mark.parametrize("name", [pytest.param("decode-float32", marks=pytest.mark.prove), "decode-bfloat16"])
def test_no_order_of_threads_and_copies_changes_a_bit(kernels, name, seed, deterministic):
    expected = RUNS[name]()
    kernels.set_schedule(0, False, seed)
    assert all(torch.equal(a, b) for a, b in zip(RUNS[name](), expected, strict=True))


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[3]], ids=lambda kind: kind.name, indirect=True)
def test_a_nan_activation_keeps_its_gradient(kernels, kind):
    """As in PyTorch, whose ReLU stops gradients of what is at most zero. Every activation of a NaN latent is NaN."""
    case = Case(height=2, width=2, queries=9, hidden=(16, 32))
    grads = {}
    for name in ("cuda", "reference"):
        problem = make_problem(case, kind)
        with torch.no_grad():
            problem.feat.fill_(float("nan"))
        out = decode(problem, name)
        grads[name] = torch.autograd.grad(out, problem.biases, torch.ones_like(out))
    for found, expected in zip(*grads.values(), strict=True):
        assert expected.abs().max() > 0
        assert norm_error(found, expected) <= (1e-5 if kind.dtype == torch.float32 else 2e-2)


@ordered
@schedules
@pytest.mark.parametrize("unfold", [True, False])
def test_ordered_gradients_of_gather_are_those_of_the_cpu_backend(kernels, schedule, unfold, deterministic):
    """Both add the queries from first to last, so that no rounding differs, whatever the launch."""
    if reason := reason_against("cpu", "gather", torch.float32):
        pytest.skip(reason)
    kernels.set_schedule(*schedule)
    assert all(torch.equal(a, b) for a, b in zip(train_gather(unfold), train_gather(unfold, "cpu"), strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ensemble", [True, pytest.param(False, marks=pytest.mark.prove)], ids=["ensemble", "nearest"])
def test_steps_of_many_outputs_end_inside_of_batch_entries(kernels, monkeypatch, mode, ensemble):
    """The last layer is then a product outside of the kernels, of a bounded number of queries."""
    case = Case(3, 2, 3, 4, 50, (16, 32), 17, local_ensemble=ensemble)
    problem = make_problem(case, KINDS[3], mode)
    whole = run(problem, BACKEND)
    monkeypatch.setattr(import_module("liif_fast.ops.backends.cuda.decode"), "_CHUNK_ROWS", 128)
    limit = LIMITS[KINDS[3].dtype, "rounding"]
    for recompute in (False, True):
        assert_close(run(problem, BACKEND, recompute=recompute), whole, limit)
    with torch.no_grad():
        assert range_error(decode(problem, "cuda"), whole[0]) <= limit


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [64, 128, pytest.param(256, marks=pytest.mark.prove)])
@kinds
def test_the_largest_workspace_fits(kernels, device, width, kind):
    """Sixteen outputs, a query a row, gradients of coordinates: the case with the most shared memory."""
    set_device(device)
    case = Case(channels=2, queries=2, hidden=(width, 16), outs=16, local_ensemble=False)
    check_decode(BACKEND, kind, case, "points")


@pytest.mark.prove
@pytest.mark.parametrize("device", ["sm_90", "sm_86"])
@kinds
def test_the_papers_width_on_other_devices(kernels, device, kind):
    set_device(device)
    check_decode(BACKEND, kind, Case(channels=5, height=4, width=6, queries=40, hidden=(256,) * 4), "points")


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize(
    "operands", range(6), ids=["float16", "bfloat16", "tf32", "float32", "wgmma", "wgmma-bfloat16"]
)
def test_packing_moves_every_weight_once(kernels, operands, width):
    if operands >= 4 and width == 64:
        pytest.skip("the wgmma policies have two widths")
    words = 1 if operands in (2, 3) else 2  # weights of a word, of which a unit has four
    units = kernels.packed_units(operands, width)
    weights = {(out, first + i * step + j) for out, first, step in units for i in range(4) for j in range(words)}
    assert len(units) * 4 * words == len(weights) == width * width
    assert weights == {(out, into) for out in range(width) for into in range(width)}


@ordered
def test_ordered_gradients_of_metasr_add_queries_in_their_order(kernels, deterministic):
    """To the bit what a loop over the queries makes of the bias's part, where every sum rounds."""
    generator = torch.Generator().manual_seed(5)
    latent_map = torch.rand(2, 2, 2, 8, generator=generator).requires_grad_()
    coord, cell = 2.2 * torch.rand(2, 500, 2, generator=generator) - 1.1, torch.rand(2, 500, 2, generator=generator) / 4
    layers = torch.rand(3, 3, generator=generator), torch.rand(3, generator=generator)
    out = registration.metasr_query(latent_map, coord, cell, *layers, [0, 0, 2, 2], "cuda")
    probe = torch.rand(out.shape, generator=generator) - 0.4
    (grad_map,) = torch.autograd.grad(out, [latent_map], probe)
    native = import_module("liif_fast.ops.backends.cuda.gather")._C
    latents = native.cuda_metasr_latents(coord, cell, [0, 0, 2, 2], [2, 2, 2])
    sums = np.zeros((8, 2), np.float32)
    for latent, grad in zip(latents.tolist(), probe.flatten(0, 1).numpy(), strict=True):
        sums[latent] += grad
    assert np.array_equal(grad_map.view(8, 2, 4)[..., 3].numpy(), sums)


def test_a_latent_too_wide_is_refused(kernels):
    """Offsets inside a latent are 32 bits. Memory that nobody touches costs nothing."""
    outs, hidden = 3, 2**27
    sizes = [(1, 1, 1, outs * (hidden + 1)), (1, 1, 2), (1, 1, 2), (hidden, 3), (hidden,)]
    with pytest.raises(RuntimeError, match="a latent of MetaSR's map holds more than 2\\^28 numbers"):
        kernels.metasr_forward("float32", *(np.empty(size, np.float32) for size in sizes), [0, 0, 1, 1])


def test_gather_counts_offsets_in_64_bits(kernels, tmp_path):
    """Maps that lie more than 2^32 elements apart, in a file with holes."""
    map_stride, channel_stride = 2**32 + 77, 2**31 + 13
    memory = np.memmap(tmp_path / "holes", dtype=np.float16, mode="w+", shape=(map_stride + channel_stride + 64,))
    feat = torch.from_numpy(memory).as_strided((2, 2, 2, 2), (map_stride, channel_stride, 3, 1))
    values = torch.arange(16.0).half().view(2, 2, 2, 2)
    feat.copy_(values)
    _, coord, cell, *_ = random_problem(Case(batch=2, channels=2, height=2, width=2, queries=9), torch.float32)
    x, _ = registration.gather(feat, coord, cell, True, True, "cuda")
    assert torch.equal(x, ops.reference.gather(values, coord, cell)[0])


@pytest.mark.prove
def test_decode_counts_offsets_in_64_bits(kernels, tmp_path):
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
    arguments = (coord, None, geometry, [weight], biases, [], [], True, None, torch.float16, False, False, "cuda")
    out, _ = registration.decode(latent_map, *arguments)
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


def test_metasr_counts_offsets_in_64_bits(kernels, tmp_path):
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
    out = registration.metasr_query(latent_map, coord, cell, weight, bias, [0, 0, side, side], "cuda")
    expected = values.double().view(3, 2, 3, 257).sum(-1)[:, [0, 0, 0, 1, 1]]
    assert range_error(out, expected) <= 1e-6


# The emulator itself: kernels with planted mistakes.
PROBES = {
    "sound": (0, ""),
    "shared_overflow": (1, "out of bounds for type 'int [64]'"),
    "global_overflow": (1, "heap-buffer-overflow"),
    "divergent_block": (3, "the kernel diverged: threads wait at __syncthreads, 24 of 64 have exited"),
    "divergent_warp": (3, "the kernel diverged: threads wait at __shfl_xor_sync, 10 of 64 have exited"),
    "fenced_product": (0, ""),
    "unfenced_product": (4, ""),
    "absent_lane": (3, "__shfl_xor_sync: lane 16 is not in the mask"),
}


@pytest.mark.prove
@pytest.mark.parametrize("name", PROBES)
def test_planted_mistakes_are_caught(name):
    try:
        program = build.probes()
    except RuntimeError as error:
        if "libasan" in str(error) or "libubsan" in str(error):
            pytest.skip("this compiler has no sanitizers")
        raise
    environment = {"ASAN_OPTIONS": "detect_leaks=0"}  # a fiber that never ends does not free its memory
    result = subprocess.run([program, name], capture_output=True, text=True, env=environment)
    code, message = PROBES[name]
    assert result.returncode == code, result.stderr
    assert message in result.stderr
