"""How far results may be from the exact ones: one table, and one comparison for every decode on every backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from torch import Tensor

from liif_fast.ops.backends import cuda, extension
from liif_fast.ops.backends.cuda.hopper import MOST_TRAINED_OUTS
from liif_fast.ops.limits import LIMITS
from tests.backends import Backend, Kind
from tests.helpers import Case, norm_error, range_error
from tests.ops.decoding import Problem, decode, exact, gradients, make_problem, rounded, run
from tests.ops.rounded_model import to_tf32

TIMES_PYTORCH = 2.0  # the error that PyTorch's own layers make in the same dtype, allowed so many times


def to_kind(kind: Kind):
    """How a kernel that multiplies in this kind rounds an operand."""
    return to_tf32 if kind.tf32 else lambda values: values.to(kind.narrow).float()


def assert_close(
    results: Sequence[Tensor],
    expected: Sequence[Tensor],
    limit: float,
    *,
    result_limit: float | None = None,
    pytorch: Callable[[], Sequence[Tensor]] | None = None,
) -> None:
    """[result, *gradients] against the expected ones.

    limit: of relative errors in the 2-norm, or twice PyTorch's own error where that is more. result_limit: of the
    result's largest error as a fraction of its range, instead. pytorch: computes PyTorch's own [result, *gradients].
    """
    for position, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        name = f"gradient {position}" if position else "result"
        assert result.shape == wanted.shape and result.isfinite().all(), name
        if not wanted.numel():
            continue
        if position == 0 and result_limit is not None:
            error, allowed = range_error(result, wanted), result_limit
        elif wanted.norm() < 1e-9:  # coord or cell where nothing depends on it
            error, allowed = result.norm().item(), 1e-4
        else:
            error, allowed = norm_error(result, wanted), limit
        if error > allowed and pytorch is not None:
            allowed = max(allowed, TIMES_PYTORCH * norm_error(pytorch()[position], wanted))
        assert error <= allowed, f"{name} is off by {error:.1e}, {allowed:.1e} allowed"


def assert_decode_close(problem: Problem, backend: Backend, results: Sequence[Tensor]) -> None:
    """The decode and the gradient of every leaf against the exact ones.

    16 bits and TF32: the decode errs at most twice as much as PyTorch's own layers in that dtype. A ReLU whose sign a
    rounding flips changes the gradients of a small problem more than all roundings together, for PyTorch too. So
    gradients are compared with a model that rounds where the kernel rounds, and flips the same signs.
    """
    case, kind = problem.case, problem.kind
    assert [t.dtype for t in results] == [kind.dtype, *(leaf.dtype for leaf in problem.leaves)]
    out, leaves = exact(problem)
    expected = gradients(out, leaves, kind.dtype)
    if kind.tf32:  # a CPU has no TF32, and float16 has as many bits
        plain = decode(problem._replace(kind=kind._replace(narrow=torch.float16, autocast=True)), "reference")
    else:
        plain = decode(problem, "reference")

    @cache
    def pytorch() -> list[Tensor]:
        return gradients(plain, problem.leaves, kind.dtype)

    if kind.narrow is None and not (kind.tf32 and backend.rounds_to_tf32(case)):
        limit, result_limit = LIMITS[kind.dtype, "gradient"], LIMITS[kind.dtype, "result"]
        assert_close(results, expected, limit, result_limit=result_limit, pytorch=pytorch)
        return
    narrow = kind.narrow or torch.float16
    last = LIMITS[narrow, "rounding"] if kind.dtype.itemsize == 2 else 0.0
    error, limit = norm_error(results[0], out), TIMES_PYTORCH * norm_error(plain, out) + last
    assert error <= limit, f"the result is off by {error:.1e}, {limit:.1e} allowed"
    if backend.op_backend == "reference":
        assert_close(results, expected, 2 * last, pytorch=pytorch)
    elif backend.op_backend == "cpu" and not multiplies_natively(kind, case):
        assert_close(results, expected, LIMITS[torch.float32, "gradient"] + last, pytorch=pytorch)
    else:
        limit = LIMITS[narrow, "model"] * max(len(case.hidden) / 3, 1)
        options = {"edges": backend.rounds_edges, "hidden_biases": backend.rounds_biases}
        folds = backend.op_backend == "cuda" and has_own_convolution(problem)
        expected = rounded(problem, to_kind(kind), folds=folds, **options)
        assert_close(results, expected, limit)


def has_own_convolution(problem: Problem) -> bool:
    """Whether training on the `cuda` backend folds the first layer with its own convolution."""
    case, (outs, *_) = problem.case, problem.biases[0].shape
    makes_map = problem.mode == "grid" or 4 * case.queries >= case.height * case.width  # see decoding.decode
    kernels = torch.empty(outs, case.channels, 3, 3)
    return makes_map and case.feat_unfold and cuda.convolves(problem.feat.float(), kernels, problem.kind.narrow)


def multiplies_natively(kind: Kind, case: Case) -> bool:
    """Whether the CPU kernels multiply in 16 bits; otherwise they widen operands to float32."""
    return kind.narrow == torch.bfloat16 and len(case.hidden) > 1 and extension.OPS.cpu_has_bf16()


def require(backend: Backend, kind: Kind, case: Case) -> None:
    """Skips with the backend's own reason where it refuses to decode the case."""
    if reason := backend.reason_against("decode", kind.dtype, case):
        pytest.skip(reason)


def check_decode(backend: Backend, kind: Kind, case: Case, mode: str, **options) -> None:
    """A random decode and all its gradients; on the Hopper kernel its inference too, and no gradients of points."""
    if backend.hopper:  # an imnet with a product, points in its kernel for 128 channels and a grid in that for 256
        hidden = (*case.hidden, 16, 16)[: max(len(case.hidden), 2)]
        case = case._replace(hidden=hidden if mode == "points" else (max(256, hidden[0]), *hidden[1:]))
    require(backend, kind, case)
    case = case._replace(queries=min(case.queries, backend.most_queries))
    fixes_points = backend.hopper and mode == "points"
    problem = make_problem(case, kind, "fixed" if fixes_points else mode, backend.device)
    if backend.hopper:
        with torch.no_grad():
            found, plain, out = decode(problem, "cuda", **options), decode(problem, "reference"), exact(problem)[0]
        assert found.dtype == kind.dtype and found.shape == out.shape and found.isfinite().all()
        # The map is rounded to 16 bits, as the reference rounds its first layer.
        assert norm_error(found, out) <= TIMES_PYTORCH * norm_error(plain, out) + LIMITS[kind.narrow, "rounding"]
        if case.outs > MOST_TRAINED_OUTS:
            return
    assert_decode_close(problem, backend, run(problem, backend, **options))
