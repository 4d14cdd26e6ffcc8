"""Triton's kernels alone, under the interpreter: rounding, packing, tiles; and the interpreter itself.

tests/ops compares every result. Run by `TRITON_INTERPRET=1 python -m pytest tests/ops tests/triton/test_interpreted.py
--backend triton-interpreted`.
"""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before the first import of Triton", allow_module_level=True)

import triton
import triton.language as tl

from liif_fast.ops.backends.triton import fused, launch, layerwise
from liif_fast.ops.backends.triton.rows import as_operand
from liif_fast.ops.inputs import DecodeInputs
from tests.backends import KINDS, TABLE
from tests.helpers import Case, norm_error, random_problem, range_error
from tests.ops import test_general as general
from tests.ops.decoding import decode, exact, gradients, make_problem, run
from tests.ops.rounded_model import to_tf32
from tests.ops.tolerances import LIMITS, TIMES_PYTORCH, check_decode
from tests.triton import interpreter

BACKEND = TABLE["triton-interpreted"]
CASE = Case()  # with the paper's flags
KIND = {kind.name: kind for kind in KINDS}
interpreter.correct()


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
    special[2] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # the NaN of a GPU's arithmetic
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
    inputs = DecodeInputs(
        latent_map, coord, cell, weights[0][:, -4:], weights[1:], biases, [], [], True, None, matmul_dtype=operands
    )
    chunk = dataclasses.replace(launch.DecodeChunk.whole(inputs), precision=precision)
    imnet = fused.pack(chunk, backward=backward)

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
    assert not any(padding.any() for padding in (imnet.last[:, 3:8], imnet.last[:, 11:], imnet.last[9:]))
    assert torch.equal(imnet.last_bias, torch.cat([biases[-1], torch.zeros(5)]))
    assert imnet.first.shape == (5, 128) and torch.equal(imnet.first[4, :20], biases[0])


@pytest.mark.prove
@pytest.mark.parametrize("hidden", [(40,), (70, 100), (112, 30), (130,), (180, 100)], ids=str)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "tf32"])
def test_memory_holds_fewer_columns_than_a_tile(hidden, kind):
    """Also widths of three blocks of 64 columns."""
    assert launch.padded_width(max(hidden)) <= launch.tile_width(max(hidden))
    check_decode(BACKEND, KIND[kind], Case(hidden=hidden, queries=8), "points")


@pytest.mark.parametrize(("save", "backward"), [(64, 128), (128, 64)])
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_forward_and_backward_may_cut_a_layer_differently(monkeypatch, kind, save, backward):
    blocks = {"forward": 32, "save": save, "backward": backward}
    monkeypatch.setattr(fused, "tile_config", lambda key, _: launch.TileConfig(64, blocks[key.kernel], 4, 2))
    check_decode(BACKEND, KIND[kind], Case(hidden=(120, 100), queries=8), "points")


def test_wide_layers_of_inference_stay_in_the_kernel(monkeypatch):
    monkeypatch.delattr(layerwise, "forward")
    case = Case(height=2, width=3, hidden=(300, 270), queries=4)
    problem = make_problem(case, KIND["float16"], grad=False)
    found, plain, out = decode(problem, "triton"), decode(problem, "reference"), exact(problem)[0]
    assert norm_error(found, out) <= TIMES_PYTORCH * norm_error(plain, out) + LIMITS[torch.float16, "rounding"]


def test_gradients_pass_the_last_layer_as_in_float32():
    """As the sum for a bias shows, which is added up before the layer's gradient becomes an operand."""
    problem = make_problem(Case(height=2, width=3, hidden=(16, 16), queries=6), KIND["autocast-float16"])
    with torch.no_grad():
        for bias in problem.biases[:2]:
            bias.add_(9)  # every ReLU passes
    plain = decode(problem._replace(kind=KIND["float32"]), "reference")
    assert norm_error(run(problem, BACKEND)[-2], gradients(plain, problem.leaves)[-2]) <= 1e-5


@pytest.mark.parametrize("mode", ["points", "source"])
def test_chunks_of_a_general_decode(monkeypatch, mode):
    """Query terms and more outputs than a kernel's, whole and with each chunk's part of the terms."""
    case = Case(batch=2, height=2, width=3, hidden=(16, 24), outs=20, queries=9)
    tensors, wide = (general.problem(case, mode, dtype) for dtype in (torch.float32, torch.float64))
    for name, tensor in wide.items():
        tensor.data.copy_(tensors[name])
    expected = general.with_gradients(general.run(case, mode, wide, backend="reference"), wide)
    for recompute, forward, backward in ((False, 1 << 29, 1 << 29), (True, 1000, 20_000)):
        monkeypatch.setattr(fused, "FUSED_CHUNK_BYTES", forward)
        out = general.run(case, mode, tensors, backend="triton", recompute=recompute)
        assert range_error(out, expected[0]) <= LIMITS[torch.float32, "result"]
        monkeypatch.setattr(fused, "FUSED_CHUNK_BYTES", backward)
        for found, wanted in zip(general.with_gradients(out, tensors), expected, strict=True):
            assert norm_error(found, wanted) <= 5 * LIMITS[torch.float32, "gradient"]


@pytest.mark.parametrize("outs", [3, 20])
def test_in_sixteen_bits_a_query_term_is_a_latent_map_of_its_own(outs):
    """Latents, terms and biases whose sums are exact in any order: every ReLU gets the same number."""
    tensors = general.problem(Case(height=2, width=3, hidden=(16, 24), outs=outs, queries=6), "points", torch.float32)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_((tensor * 64).round() / 64)
            if name.startswith(("weight", "bias", "geometry")):
                tensors[name] = tensor.half().requires_grad_()
    found = general.run(CASE, "points", tensors, backend="triton")
    by_query = {name: tensors[name].transpose(0, 1) for name in ("coord", "cell")}
    latent_map = tensors["latent_map"] + tensors["term"].view(6, 1, 1, -1)
    own = {**tensors, **by_query, "latent_map": latent_map, "term": None}
    own = general.run(CASE, "points", own, backend="triton").transpose(0, 1)
    assert torch.equal(found, own)
    results = (general.with_gradients(out, tensors) for out in (found, own))
    for grad, same in zip(*results, strict=True):
        assert norm_error(grad, same) <= LIMITS[torch.float16, "rounding"]


@triton.jit
def cast_kernel(source, narrow, wide, N: tl.constexpr):
    at = tl.arange(0, N)
    value = tl.load(source + at).to(tl.bfloat16)
    tl.store(narrow + at, value)
    tl.store(wide + at, value.to(tl.float32))


@triton.jit
def dot_kernel(a, b, out, N: tl.constexpr):
    place = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + place, tl.dot(tl.load(a + place), tl.load(b + place)))


def test_casts_round_to_nearest_even():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, generator=generator) * torch.logspace(-30, 30, 64)
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 0.0, -0.0, float("inf"), -float("inf"), 65504.0])
    values[:8] = ties
    narrow, wide = torch.empty(64, dtype=torch.bfloat16), torch.empty(64)
    cast_kernel[(1,)](values, narrow, wide, N=64)
    assert torch.equal(narrow, values.bfloat16())
    assert torch.equal(wide, values.bfloat16().float())
    values[0] = float("nan")
    cast_kernel[(1,)](values, narrow, wide, N=64)
    assert narrow[0].isnan() and wide[0].isnan()


def test_products_multiply_numbers_not_bit_patterns():
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(32, 32, generator=generator).bfloat16() for _ in range(2))
    out = torch.empty(32, 32)
    dot_kernel[(1,)](a, b, out, N=32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)
