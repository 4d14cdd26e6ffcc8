"""How operands are rounded and layers packed, and that the table of launch settings holds together."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl

from bench import tune_triton
from liif_fast import ops
from liif_fast.ops.backends.triton import decode as triton_query
from liif_fast.ops.backends.triton import launch as triton_launch
from liif_fast.ops.backends.triton import pack as triton_pack
from liif_fast.ops.backends.triton.problem import decode_points
from liif_fast.ops.backends.triton.rows import as_operand
from tests.helpers import Case, random_problem
from tests.ops.rounded_model import to_tf32


@triton.jit
def round_kernel(source, rounded, N: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(rounded + at, as_operand(tl.load(source + at), tl.float32, PRECISION))


def test_tf32_is_rounded_to_nearest():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(256, generator=generator) * torch.logspace(-30, 30, 256)
    values[:6] = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-11, 1 + 2**-11 - 2**-20, 0.0, -0.0])
    rounded, same = torch.empty(256), torch.empty(256)
    round_kernel[(1,)](values, rounded, N=256, PRECISION="tf32")
    round_kernel[(1,)](values, same, N=256, PRECISION="ieee")
    assert torch.equal(rounded, to_tf32(values)) and not torch.equal(rounded, values)
    assert torch.equal(same, values)
    assert rounded[:4].tolist() == [1 + 2**-10, 1 + 2**-9, -1 - 2**-10, 1.0]
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), -float("nan")]).repeat(64)
    special[2] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # what a GPU's arithmetic makes
    round_kernel[(1,)](special, rounded, N=256, PRECISION="tf32")
    assert torch.equal(rounded[:2], special[:2]) and rounded[2:4].isnan().all()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("operands", "precision"),
    [(torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")],
    ids=str,
)
def test_layers_are_packed_as_the_kernels_read_them(operands, precision, backward):
    case = Case(channels=4, hidden=(20, 70, 9), outs=3, queries=5)
    _, coord, cell, weights, biases = random_problem(case, torch.float32)
    weights[2] = weights[2].t().contiguous().t()
    latent_map = torch.zeros(1, 2, 2, 20)
    decode = decode_points(latent_map, coord, cell, weights[0][:, -4:], biases[0], True)
    imnet = triton_pack.pack(decode, weights[1:], biases, operands, precision, backward=backward)

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        return to_tf32(tensor) if precision == "tf32" else tensor.to(operands).float()

    assert imnet.weights.shape == (2, 128, 128) and imnet.weights.dtype == operands
    for layer in range(2):
        weight = weights[layer + 1]
        packed = imnet.weights[layer].float()
        packed = packed.t() if backward and operands == torch.float32 else packed
        assert torch.equal(packed[: weight.shape[0], : weight.shape[1]], rounded(weight))
        assert packed.count_nonzero() == rounded(weight).count_nonzero()
        assert torch.equal(imnet.biases[layer, : weight.shape[0]], biases[layer + 1])
        assert imnet.biases[layer, weight.shape[0] :].count_nonzero() == 0
    last = weights[-1].t()
    assert torch.equal(imnet.last[:9, :3].float(), rounded(last))
    assert torch.equal(imnet.last[:9, 8:11].float(), rounded(last - rounded(last)))
    assert (
        imnet.last[:, 3:8].count_nonzero() == imnet.last[:, 11:].count_nonzero() == imnet.last[9:].count_nonzero() == 0
    )
    assert torch.equal(imnet.last_bias, torch.cat([biases[-1], torch.zeros(5)]))
    assert imnet.first.shape == (5, 128) and torch.equal(imnet.first[4, :20], biases[0])


def test_launch_settings_fit_together():
    target = triton_launch.GPUTarget
    devices = [target("cuda", arch, 32) for arch in (80, 86, 87, 89, 90, 100, 103, 120)]
    devices += [target("hip", "gfx942", 64), target("xpu", {}, 32), None]
    for device, width, dtype in itertools.product(devices, range(1, 257), (torch.bfloat16, torch.float32)):
        columns = triton_launch.tile_width(width)
        assert width <= triton_launch.padded_width(width) <= columns and triton_launch.padded_width(width) % 16 == 0
        for kernel, precision in itertools.product(("forward", "save", "backward"), ("ieee", "tf32")):
            problem = triton_launch.Problem(kernel, columns, dtype, precision)
            settings = triton_launch.launch_settings(problem, device)
            assert columns % settings.block == 0 and settings.block & (settings.block - 1) == 0
            assert settings.rows % 32 == 0 and settings.block >= 16
            if dtype != torch.float32:  # masks in groups of 64 bits
                assert settings.block == columns or settings.block % 64 == 0


def test_what_a_search_times(monkeypatch):
    """Every setting is really launched, one that cannot run is named and left out, and the table is put back."""
    problem = triton_launch.Problem("save", 32, torch.float16, "ieee")
    settings = [triton_launch.Settings(rows, 32, 4, 2) for rows in (32, 64)]
    settings.append(triton_launch.Settings(48, 32, 4, 2))  # tiles are powers of two
    seen = []

    def run():
        wanted = triton_query.launch_settings(problem, None)
        seen.append((wanted, triton_query.launch_settings(problem._replace(kernel="backward"), None)))
        leaves = random_problem(Case(hidden=(20, 30), queries=9), torch.float16, requires_grad=True)
        ops.query(*leaves, backend="triton").sum().backward()

    def clock(call):
        call()
        return {32: 2.0, 64: 1.0}[seen[-1][0].rows]

    monkeypatch.setattr(tune_triton, "REPETITIONS", 2)
    found = tune_triton.search(problem, run, settings, clock)
    assert list(found.items()) == [(settings[1], 1.0), (settings[0], 2.0)]
    assert {wanted for wanted, _ in seen} == set(settings)
    table = triton_launch.launch_settings(problem._replace(kernel="backward"), None)
    assert {other for _, other in seen} == {table}
    assert triton_query.launch_settings is triton_launch.launch_settings


@pytest.mark.parametrize("width", [20, 64, 180, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_search_tries_what_the_table_says(width, dtype):
    columns = triton_launch.tile_width(width)
    tried = tune_triton.candidates(width, dtype)
    assert len(tried) == len(set(tried)) and all(columns % setting.block == 0 for setting in tried)
    for arch, kernel in itertools.product((80, 86, 90, 100), ("forward", "save", "backward")):
        for precision in ("ieee", "tf32"):
            problem = triton_launch.Problem(kernel, columns, dtype, precision)
            assert triton_launch.launch_settings(problem, triton_launch.GPUTarget("cuda", arch, 32)) in tried


def test_precision_follows_the_switch_and_the_device(monkeypatch):
    assert triton_launch.product_precision(torch.float32) == "ieee"
    monkeypatch.setattr(triton_launch, "allows_tf32", lambda: True)
    assert triton_launch.product_precision(torch.float32) == "tf32"
    assert triton_launch.product_precision(torch.float16) == "ieee"
    targets = {("cuda", 90, 32): True, ("hip", "gfx942", 64): True, ("hip", "gfx90a", 64): False}
    for target, has_tf32 in targets.items():
        assert ("tf32" in triton_launch._precisions(triton_launch.GPUTarget(*target))) == has_tf32
