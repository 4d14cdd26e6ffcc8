"""What the interpreter's tests of query and render share: kinds of operands, checks of a decode and its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from liif_fast import ops
from liif_fast.ops.backends.triton import decode as triton_query
from tests.helpers import Case, as_float64, norm_error, random_problem
from tests.ops.rounded_model import rounded_query, to_tf32

KINDS = ("float64", "float32", "tf32", "bfloat16", "float16")  # of operands
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
# Of a picture's range, to the reference in the same dtype.
RENDER_TOLERANCE = {"float64": 1e-13, "float32": 1e-5, "tf32": 2e-3, "bfloat16": 2e-2, "float16": 4e-3}


def dtype_of(kind: str) -> torch.dtype:
    return torch.float32 if kind == "tf32" else getattr(torch, kind)


@contextmanager
def operands(kind: str) -> Iterator[None]:
    """PyTorch's switch for float32 products, on for tf32."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if kind == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"


def decode(case: Case, leaves: list[torch.Tensor], how, **arguments) -> torch.Tensor:
    """how: a backend's name, or what stands in for `ops.query`."""
    feat, coord, cell, *layers = leaves
    tensors = (feat, coord, cell, layers[: len(layers) // 2], layers[len(layers) // 2 :])
    if callable(how):
        return how(*tensors, **case.flags)
    return ops.query(*tensors, backend=how, **case.flags, **arguments)


def run(case: Case, leaves: list[torch.Tensor], how, **arguments) -> list[torch.Tensor]:
    """The decode and the gradient of every leaf."""
    out = decode(case, leaves, how, **arguments)
    probe = torch.rand(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5
    grads = torch.autograd.grad(out, leaves, probe.to(out.dtype), allow_unused=True)
    return [out, *(torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(grads, leaves, strict=True))]


def problem(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    feat, coord, cell, weights, biases = random_problem(case, dtype, requires_grad=True)
    return [feat, coord, cell, *weights, *biases]


def check_exact(case: Case, dtype: torch.dtype, **arguments) -> None:
    leaves = problem(case, dtype)
    results = run(case, leaves, "triton", **arguments)
    for position, (result, expected) in enumerate(
        zip(results, run(case, as_float64(leaves), "reference"), strict=True)
    ):
        assert result.dtype == (leaves[position - 1].dtype if position else dtype)
        if expected.numel() and expected.norm() < 1e-9:  # e.g. coord, where nothing depends on it
            assert result.norm() < 1e-4, position
        else:
            assert norm_error(result, expected) <= TOLERANCE[dtype], position


def check_layers(case: Case, dtype: torch.dtype, **arguments) -> None:
    """At most twice the error of PyTorch's own layers in that dtype, and a ReLU that turns round now and then."""
    leaves = problem(case, dtype)
    results = run(case, leaves, "triton", **arguments)
    expected = run(case, as_float64(leaves), "reference")
    plain = run(case, leaves, "reference")
    assert norm_error(results[0], expected[0]) <= 2 * norm_error(plain[0], expected[0])
    slack = 8e-3 if dtype == torch.bfloat16 else 2e-3
    for position, (grad, exact, theirs) in enumerate(zip(results[1:], expected[1:], plain[1:], strict=True)):
        assert grad.dtype == leaves[position].dtype
        if exact.norm() > 1e-9:
            assert norm_error(grad, exact) <= 2 * norm_error(theirs, exact) + slack, position


def check_rounded(case: Case, kind: str, leaves: list[torch.Tensor], **arguments) -> None:
    """The decode as near to float64 as PyTorch's own layers, at least half; gradients as of a model that rounds where
    the kernel does."""
    narrow = torch.float16 if kind == "tf32" else dtype_of(kind)  # of PyTorch's layers; TF32 has as many bits
    rounding = to_tf32 if kind == "tf32" else lambda values: values.to(narrow).float()
    results = run(case, leaves, "triton", **arguments)
    with torch.autocast("cpu", enabled=False):
        model = run(case, leaves, lambda *tensors, **flags: rounded_query(*tensors, rounding, edges=True, **flags))
        expected = decode(case, as_float64(leaves), "reference")
    with torch.autocast("cpu", narrow):
        plain = decode(case, [leaf.detach() for leaf in leaves], "reference")
    error = norm_error(results[0], expected)
    assert error <= 2 * norm_error(plain, expected)
    if case.queries and len(case.hidden) > 1:
        assert error > 1e-5  # it did round
    bound = (1e-2 if kind == "bfloat16" else 2e-3) * max(len(case.hidden) / 3, 1)
    for position, (result, right) in enumerate(zip(results, model, strict=True)):
        assert result.dtype == (leaves[position - 1] if position else leaves[0]).dtype
        if right.norm() > 1e-6:
            assert norm_error(result, right) <= bound, position


def check(case: Case, kind: str, **arguments) -> None:
    """The decode and every gradient, against float64 or what that is when operands are rounded."""
    dtype = dtype_of(kind)
    with operands(kind):
        if kind in ("float64", "float32"):
            check_exact(case, dtype, **arguments)
        elif triton_query.is_fused((*case.hidden, case.outs), dtype):
            check_rounded(case, kind, problem(case, dtype), **arguments)
        elif kind == "tf32":  # layer by layer PyTorch multiplies, which rounds to TF32 on a GPU only
            check_exact(case, dtype, **arguments)
        else:
            check_layers(case, dtype, **arguments)
