"""The NEON kernels: their values against the reference in float64, on an emulator, and their machine code."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from liif_fast.ops import reference

from . import emulator

pytestmark = pytest.mark.prove
ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "csrc/cpu/isa_neon.cpp", ROOT / "csrc/cpu/isa_neon_bf16.cpp", ROOT / "tests/cpu_arm/probe.cpp"]
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", f"-I{ROOT}/csrc"]  # as in setup.py
KINDS = {"float32": 2e-6, "float64": 1e-14, "bfloat16": 3e-2, "bfloat16-map": 3e-2}  # probe.cpp's; the error allowed
WIDTHS = [14, 13, 18, 3]  # no whole vectors, and more than one panel of 12


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    pytest.importorskip("ziglang", reason="ziglang is not installed: `make prove` installs it")
    return emulator.build(SOURCES, FLAGS, tmp_path_factory.mktemp("arm"), "probe")


def _problem(batch: int, queries: int, height: int, width: int) -> list[Tensor]:
    """Latent map, coord, cell, weight_geometry, weights, biases and grad_out; bfloat16 numbers, except for geometry."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().double()

    coord, cell = torch.rand(2, batch, queries, 2, generator=generator).double()
    weights = [normal(out, inner) / 4 for inner, out in pairwise(WIDTHS)]
    biases, grad_out = [normal(each) / 4 for each in WIDTHS], normal(batch, queries, WIDTHS[-1])
    latent_map, weight_geometry = normal(batch, height, width, WIDTHS[0]), normal(WIDTHS[0], 4) / 2
    return [latent_map, coord * 2 - 1, cell, weight_geometry, *weights, *biases, grad_out]


def _expected(problem: list[Tensor], local_ensemble: bool) -> list[Tensor]:
    """The decode, and the gradients of the problem's tensors. Its first layer is folded, so here it copies latents."""
    inputs = [each.requires_grad_() for each in problem[:-1]]
    latent_map, coord, cell, weight_geometry, *layers = inputs
    first = torch.cat([torch.eye(WIDTHS[0]).double(), weight_geometry], dim=1)
    weights, biases = [first, *layers[: len(WIDTHS) - 1]], layers[len(WIDTHS) - 1 :]
    feat = latent_map.permute(0, 3, 1, 2)
    out = reference.query(feat, coord, cell, weights, biases, feat_unfold=False, local_ensemble=local_ensemble)
    return [out.detach(), *torch.autograd.grad(out, inputs, problem[-1])]


@pytest.mark.parametrize(
    ("kind", "corners"), [("float32", 4), ("float32", 1), ("float64", 4), ("bfloat16", 4), ("bfloat16-map", 1)]
)
def test_decode_and_gradients(program: bytes, kind: str, corners: int) -> None:
    pytest.importorskip("unicorn", reason="unicorn is not installed: `make prove` installs it")
    batch, queries, height, width = 2, 13 * 4 // corners, 5, 4
    problem = _problem(batch, queries, height, width)
    expected = _expected(problem, corners == 4)
    dtype = np.float64 if kind == "float64" else np.float32
    sizes = [list(KINDS).index(kind), batch, queries, height, width, corners, len(WIDTHS) - 1, *WIDTHS]
    arguments = np.concatenate([each.detach().numpy().ravel() for each in problem]).astype(dtype)
    results = np.zeros(sum(each.numel() for each in expected), dtype)
    blocks = np.array(sizes, np.int64).tobytes(), arguments.tobytes(), results.tobytes()
    results = np.frombuffer(emulator.run(program, *blocks, memory=1 << 22)[-1], dtype)
    for index, wanted in enumerate(expected):
        found, results = results[: wanted.numel()].reshape(wanted.shape), results[wanted.numel() :]
        error = float(np.linalg.norm(found - wanted.numpy()) / wanted.norm())
        assert error < KINDS[kind], (index, error)


def test_machine_code(program: bytes) -> None:
    """A step of the products has 18 multiply-adds, and no access to the stack.

    There are at least six such loops: for float32, float64 and bfloat16, with rows as they are and transposed.
    """
    loops = emulator.inner_loops(program)
    for patterns, fewest in ((emulator.FMLA, 4), (emulator.BFDOT, 2)):
        counts = [sum(emulator.matches(word, patterns) for word in loop) for loop in loops]
        steps = [loop for loop, count in zip(loops, counts, strict=True) if count == max(counts)]
        assert max(counts) == 18
        assert len(steps) >= fewest
        for loop in steps:
            assert len(loop) <= 36
            assert not any(emulator.matches(word, emulator.ON_STACK) for word in loop)
