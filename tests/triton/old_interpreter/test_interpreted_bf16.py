"""The interpreter's mended bfloat16 is PyTorch's: casts both ways and matrix products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


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
