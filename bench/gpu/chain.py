"""`query` and `render`, forward and backward, against the reference in float64: every flag, dtype and awkward shape."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.gpu.check import Check, Context, Judge, Skip, refused
from bench.gpu.limits import (
    FORWARD,
    GRADIENT,
    GRADIENT_16,
    PSNR,
    SLACK_16,
    TIMES_PYTORCH,
    TURNED_RELU,
    gradient_limits,
    gradients,
    judge_gradients,
    leaf_names,
    probe_like,
    rounded_gradients,
    rounded_limit,
)
from bench.gpu.problems import (
    DTYPES,
    FLAGS,
    PAPER,
    SHAPES,
    Case,
    Decode,
    decode,
    exact_query,
    flag_name,
    norm_error,
    psnr,
    range_error,
    short,
)
from liif_fast import ops
from liif_fast.ops.backends import Problem, choose

_SHAPES_16 = ("plain", "paper-width", "odd-widths", "linear", "batch-and-width-64", "deep", "one-latent")
_RENDER_SIZES = [(15, 21), (10, 14), (13, 40), (3, 2), (150, 7)]


def checks() -> Iterator[Check]:
    """Most telling first: what the backend has to run at all, then the paper's decoder, then everything awkward."""
    yield Check("runs the paper's decoder", runs_the_paper)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield Check(f"query paper {short(dtype)}", partial(query_paper, dtype=dtype))
    yield Check("query paper tf32", query_tf32)
    yield Check("fold fp32", fold_float32)
    for dtype in (torch.float32, torch.bfloat16):
        yield Check(f"query recomputed {short(dtype)}", partial(query_recomputed, dtype=dtype))
    for dtype in DTYPES.values():
        for shape in SHAPES:
            if dtype.itemsize > 2 or shape in _SHAPES_16:
                yield Check(f"query {shape} {short(dtype)}", partial(query, case=SHAPES[shape], dtype=dtype))
    for dtype in DTYPES.values():
        for flags in FLAGS:
            ensemble, unfold, cell = flags
            case = Case(
                batch=2, hidden=(32, 16), local_ensemble=ensemble, feat_unfold=unfold, cell_decode=cell, queries=130
            )
            yield Check(f"query {flag_name(flags)} {short(dtype)}", partial(query, case=case, dtype=dtype))
            yield Check(f"render {flag_name(flags)} {short(dtype)}", partial(render, case=case, dtype=dtype))
    for dtype in (torch.float64, torch.float32):
        yield Check(f"render windows and regions {short(dtype)}", partial(render_window, dtype=dtype))
    for dtype in (torch.float32, torch.bfloat16):
        yield Check(f"query many rows {short(dtype)}", partial(query_many, dtype=dtype))
    yield Check("query NaN", query_nan)
    yield Check("query infinite coordinates", query_infinite)
    yield Check("query strides", query_strides)
    for seed in range(12):
        yield Check(f"query and render, drawn by lot {seed}", partial(drawn, seed=seed))


def folded(problem: Decode, case: Case) -> Tensor:
    """The latent map, so that few queries take the fused path too."""
    return ops.fold(problem.feat, problem.weights[0], feat_unfold=case.feat_unfold)


def run_query(problem: Decode, case: Case, backend: str, *, fold: bool = False) -> Tensor:
    latent_map = folded(problem, case) if fold else None
    return ops.query(*problem, latent_map=latent_map, backend=backend, **case.flags)


def query(context: Context, judge: Judge, case: Case, dtype: torch.dtype) -> None:
    """One problem, forward and backward; in 16 bits beside what PyTorch's own layers make of it."""
    if dtype.itemsize == 2 and case.queries:
        case = case._replace(queries=max(case.queries, 300))
    problem = decode(case, dtype, context.device, grad=True)
    out = run_query(problem, case, context.backend, fold=dtype.itemsize > 2)
    exact = problem.exact()
    expected = run_query(exact, case, "reference")
    judge.true("shape and dtype", out.shape == expected.shape and out.dtype == dtype)
    plain = run_query(problem, case, "reference")
    if dtype in FORWARD:
        judge.at_most("error of the range", range_error(out, expected), FORWARD[dtype])
    else:
        limit = TIMES_PYTORCH * norm_error(plain, expected) + SLACK_16[dtype]
        judge.at_most("norm error", norm_error(out, expected), limit)
    grads, plain_grads = gradients(out, problem, dtype), gradients(plain, problem, dtype)
    exact_grads = gradients(expected, exact, dtype)
    limits = gradient_limits(exact, case, dtype, plain_grads, exact_grads)
    rounded = rounded_gradients(problem, case, dtype, probe_like(out).to(dtype))
    judge_gradients(
        judge, grads, exact_grads, limits, leaf_names(problem), rounded, rounded_limit=rounded_limit(case, dtype)
    )


def paper_case(context: Context) -> Case:
    return PAPER._replace(height=12, width=14, channels=16, queries=200) if context.small else PAPER


def runs_the_paper(context: Context, judge: Judge) -> None:
    """A backend that gathers here may refuse odd decodes, but not the one it is there for."""
    try:
        choose(Problem("gather", context.device.type, torch.float32), context.backend)
    except RuntimeError as reason:
        raise Skip(str(reason)) from None
    case = paper_case(context)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        problem = decode(case, dtype, context.device)
        layers = (problem.weights, problem.biases)
        try:
            with torch.no_grad():
                out = ops.query(*problem, backend=context.backend)
                image = ops.render(problem.feat, (30, 40), *layers, backend=context.backend)
        except RuntimeError as error:
            if not refused(error, context.backend):
                raise
            judge.note(str(error))
            judge.true(f"{short(dtype)} runs", False)
        else:
            judge.true(f"{short(dtype)} runs", bool(out.isfinite().all()) and bool(image.isfinite().all()))


def fold_float32(context: Context, judge: Judge) -> None:
    """The first layer's convolution is float32 unless tf32 is allowed: cuDNN by itself would take tf32."""
    case = paper_case(context)
    problem = decode(case, torch.float32, context.device, grad=True)
    exact = problem.exact()
    found, expected = (ops.fold(values.feat, values.weights[0]) for values in (problem, exact))
    judge.at_most("error of the range", range_error(found, expected), 2e-6)
    probe = probe_like(expected)
    grads = torch.autograd.grad(found, [problem.feat, problem.weights[0]], probe.float())
    exact_grads = torch.autograd.grad(expected, [exact.feat, exact.weights[0]], probe.float().double())
    judge_gradients(judge, list(grads), list(exact_grads), [1e-5] * 2, ["feat", "weights"])


def query_recomputed(context: Context, judge: Judge, dtype: torch.dtype) -> None:
    """recompute=True keeps no activations and gives the same gradients up to their rounding."""
    case = paper_case(context)
    problem = decode(case, dtype, context.device, grad=True)
    kept, recomputed = (
        gradients(ops.query(*problem, recompute=recompute, backend=context.backend), problem, dtype)
        for recompute in (False, True)
    )
    limit = 1e-4 if dtype == torch.float32 else GRADIENT_16[dtype]
    judge_gradients(judge, recomputed, kept, [limit] * len(kept), leaf_names(problem))


def query_paper(context: Context, judge: Judge, dtype: torch.dtype) -> None:
    """The paper's training crop, with the promised accuracies."""
    case = paper_case(context)
    problem = decode(case, dtype, context.device, grad=True)
    exact = problem.exact()
    expected = run_query(exact, case, "reference")
    plain = run_query(problem, case, "reference")
    out = run_query(problem, case, context.backend)
    with torch.no_grad():
        inferred = run_query(problem, case, context.backend)
    for what, result in (("training", out), ("inference", inferred)):
        if dtype in FORWARD:
            judge.at_most(f"{what}, error of the range", range_error(result, expected), FORWARD[dtype])
        else:
            judge.at_least(f"{what}, PSNR in dB", psnr(result, expected), PSNR[dtype])
            limit = TIMES_PYTORCH * norm_error(plain, expected)
            judge.at_most(f"{what}, norm error", norm_error(result, expected), limit)
    grads, plain_grads = gradients(out, problem, dtype), gradients(plain, problem, dtype)
    exact_grads = gradients(expected, exact, dtype)
    least = GRADIENT_16.get(dtype, GRADIENT.get(dtype, 0.0))
    limits = gradient_limits(exact, case, dtype, plain_grads, exact_grads, least=least)
    worst = max(norm_error(grad, true) for grad, true in zip(plain_grads, exact_grads))
    judge.note(f"PyTorch's own worst gradient error {worst:.1e}, wanted here {least:.1e}")
    judge_gradients(judge, grads, exact_grads, limits, leaf_names(problem))


@contextlib.contextmanager
def tf32(on: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def query_tf32(context: Context, judge: Judge) -> None:
    """float32 with tf32 allowed: no worse than twice PyTorch in tf32, and with it forbidden true float32."""
    case = paper_case(context)
    problem = decode(case, torch.float32, context.device, grad=True)
    exact = problem.exact()
    expected = run_query(exact, case, "reference")
    exact_grads = gradients(expected, exact, torch.float32)
    with tf32(True):
        out, plain = (run_query(problem, case, backend) for backend in (context.backend, "reference"))
        grads, plain_grads = (gradients(value, problem, torch.float32) for value in (out, plain))
    error, torch_error = norm_error(out, expected), norm_error(plain, expected)
    judge.at_most("tf32 norm error", error, max(TIMES_PYTORCH * torch_error, FORWARD[torch.float32]))
    limits = gradient_limits(exact, case, torch.float32, plain_grads, exact_grads, least=TURNED_RELU)
    judge_gradients(judge, grads, exact_grads, limits, leaf_names(problem))
    with tf32(False):
        strict = range_error(run_query(problem, case, context.backend), expected)
    judge.at_most("float32 error of the range, tf32 forbidden", strict, FORWARD[torch.float32])
    judge.note(f"tf32 {'is used' if error > 4 * strict else 'is not used: the result is as exact as float32'}")


def query_many(context: Context, judge: Judge, dtype: torch.dtype) -> None:
    """More rows than any backend handles in one step of its backward; activations kept, and computed again."""
    case = Case(batch=2, channels=8, height=40, width=50, queries=500 if context.small else 40_000, hidden=(64, 32))
    problem = decode(case, dtype, context.device, grad=True)
    exact = problem.exact()
    expected, plain = run_query(exact, case, "reference"), run_query(problem, case, "reference")
    exact_grads, plain_grads = gradients(expected, exact, dtype), gradients(plain, problem, dtype)
    least = 1e-4 if dtype == torch.float32 else GRADIENT_16[dtype]  # sums of 320,000 rows
    limits = gradient_limits(exact, case, dtype, plain_grads, exact_grads, least=least)
    for recompute in (False, True):
        out = ops.query(*problem, recompute=recompute, backend=context.backend)
        limit = TIMES_PYTORCH * norm_error(plain, expected) + SLACK_16.get(dtype, 1e-6)
        judge.at_most("norm error", norm_error(out, expected), limit)
        judge_gradients(judge, gradients(out, problem, dtype), exact_grads, limits, leaf_names(problem))


def drawn(context: Context, judge: Judge, seed: int) -> None:
    """A problem drawn by lot, in every dtype: batch, map, queries, depth, widths, outputs, flags."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    flags = FLAGS[draw(0, len(FLAGS) - 1)]
    case = Case(
        batch=draw(1, 3),
        channels=draw(1, 24),
        height=draw(1, 9 if context.small else 33),
        width=draw(1, 9 if context.small else 33),
        queries=draw(1, 200 if context.small else 3000),
        hidden=tuple(16 * draw(1, 16) for _ in range(draw(1, 6))),
        outs=draw(1, 16),
        local_ensemble=flags[0],
        feat_unfold=flags[1],
        cell_decode=flags[2],
    )
    judge.note(str(case))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        query(context, judge, case, dtype)
        render(context, judge, case, dtype)


def render(context: Context, judge: Judge, case: Case, dtype: torch.dtype) -> None:
    """Regular grids: equal to query at their centres, latents chosen as a CPU rounds, gradients of feat and layers."""
    problem = decode(case, dtype, context.device, grad=True)
    tolerance = {**FORWARD, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for size in _RENDER_SIZES:
        out = ops.render(problem.feat, size, problem.weights, problem.biases, backend=context.backend, **case.flags)
        expected = _exact_render(problem, case, size)
        judge.true("shape and dtype", out.shape == expected.shape and out.dtype == dtype)
        judge.at_most("error of the range", range_error(out, expected), tolerance)
    # x4: no query on a latent's centre or between two, so that float64 chooses the same latents.
    size = (4 * case.height, 4 * case.width)
    exact = problem.exact()
    grads = []
    for values, backend in ((problem, context.backend), (exact, "reference"), (problem, "reference")):
        leaves = [values.feat, *values.weights, *values.biases]
        image = ops.render(values.feat, size, values.weights, values.biases, backend=backend, **case.flags)
        grads.append(list(torch.autograd.grad(image, leaves, probe_like(image).to(dtype).to(image.dtype))))
    names = ["feat"] + ["weights"] * len(problem.weights) + ["biases"] * len(problem.biases)
    coord, cell = _grid(size, case.batch, torch.float64)
    on_grid = exact._replace(coord=coord.to(context.device), cell=cell.to(context.device))
    limits = gradient_limits(on_grid, case, dtype, grads[2], grads[1])
    coord, cell = (
        points.to(context.device).clone().requires_grad_() for points in _grid(size, case.batch, problem.coord.dtype)
    )
    points = problem._replace(coord=coord, cell=cell)
    probe = probe_like(image).to(dtype).flatten(2).transpose(1, 2)
    rounded = [[feat, *layers] for feat, _, _, *layers in rounded_gradients(points, case, dtype, probe)]
    judge_gradients(judge, grads[0], grads[1], limits, names, rounded, rounded_limit=rounded_limit(case, dtype))


def _grid(size: tuple[int, int], batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """coord and cell of a whole image, [B, Q, 2], on the CPU."""
    coord = ops.reference.window_coord(size, (0, 0, *size), dtype=dtype, device="cpu").expand(batch, -1, 2)
    return coord, torch.tensor([2 / size[0], 2 / size[1]], dtype=dtype).expand(coord.shape)


def _exact_render(problem: Decode, case: Case, size: tuple[int, int]) -> Tensor:
    """The grid's decode in float64, [B, O, h, w], with the latents that the geometry dtype chooses."""
    coord, cell = _grid(size, problem.feat.shape[0], problem.coord.dtype)
    grid = problem._replace(coord=coord, cell=cell)
    return exact_query(grid, case).transpose(1, 2).reshape(problem.feat.shape[0], -1, *size)


def render_window(context: Context, judge: Judge, dtype: torch.dtype) -> None:
    """A window equals that part of the whole image, from the whole map and from a region of it; a cell of its own."""
    case = Case(batch=2, height=12, width=9, hidden=(32, 16))
    problem = decode(case, dtype, context.device)
    feat, layers = problem.feat, (problem.weights, problem.biases)
    size, window, region = (31, 20), (11, 6, 9, 8), (2, 1, 12, 9)
    render = partial(ops.render, backend=context.backend)
    with torch.no_grad():
        whole = render(feat, size, *layers)
        part = render(feat, size, *layers, window=window)
        from_region = render(feat[:, :, 2:10, 1:8], size, *layers, window=window, feat_region=region)
        celled = render(feat, size, *layers, cell=(0.3, 0.7))
        expected = ops.render(feat, size, *layers, cell=(0.3, 0.7), backend="reference")
    judge.at_most("window, error of the range", range_error(part, whole[:, :, 11:20, 6:14]), 1e-6)
    judge.at_most("region, error of the range", range_error(from_region, part), 1e-6)
    judge.at_most("cell, error of the range", range_error(celled, expected), 1e-5)
    judge.true("the cell matters", range_error(celled, whole) > 1e-3)


def query_nan(context: Context, judge: Judge) -> None:
    """NaN in, NaN out, and only there."""
    for hidden in ((), (16,), (32, 16)):
        for ensemble in (True, False):
            case = Case(hidden=hidden, local_ensemble=ensemble, queries=40)
            problem = decode(case, torch.float32, context.device)
            with torch.no_grad():
                clean = run_query(problem, case, context.backend, fold=True)
                problem.coord[0, 7, 0] = float("nan")
                problem.coord[0, 9, 1] = float("nan")
                out = run_query(problem, case, context.backend, fold=True)
            rest = [q for q in range(40) if q not in (7, 9)]
            judge.true("NaN where a coordinate is NaN", bool(out[0, [7, 9]].isnan().all()))
            judge.true("the others unchanged", torch.equal(out[0, rest], clean[0, rest]))


def query_infinite(context: Context, judge: Judge) -> None:
    """Huge and infinite coordinates read nothing outside the map (the sanitizer looks on)."""
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(queries=6, hidden=(16,), local_ensemble=False)
        problem = decode(case, dtype, context.device)
        problem.coord[0, :, 0] = torch.tensor([1e30, -1e30, 3e9, -3e9, float("inf"), -float("inf")])
        out = run_query(problem, case, context.backend, fold=True)
        judge.true("shape", out.shape == (1, 6, 3))


def query_strides(context: Context, judge: Judge) -> None:
    """Inputs of any strides give the same result and stay as they are."""
    case = Case(batch=2, channels=4, queries=60, hidden=(32, 16))
    problem = decode(case, torch.float32, context.device)

    def strided(tensor: Tensor) -> Tensor:
        """The same values, neither contiguous nor at the beginning of their memory."""
        wide = torch.full([2 * size + 1 for size in tensor.shape], float("nan"), device=tensor.device)
        view = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
        view.copy_(tensor)
        return view

    with torch.no_grad():
        expected = run_query(problem, case, context.backend)
        spread = Decode(
            strided(problem.feat.transpose(2, 3).contiguous().transpose(2, 3)),
            strided(problem.coord),
            strided(problem.cell),
            [strided(t) for t in problem.weights],
            [strided(t) for t in problem.biases],
        )
        before = [t.clone() for t in spread.leaves]
        out = run_query(spread, case, context.backend)
        judge.true("inputs unchanged", all(torch.equal(a, b) for a, b in zip(spread.leaves, before, strict=True)))
        last = problem._replace(feat=problem.feat.contiguous(memory_format=torch.channels_last))
        channels_last = run_query(last, case, context.backend)
        one = problem._replace(
            feat=problem.feat[:1].expand(3, -1, -1, -1),
            coord=problem.coord[:1].expand(3, -1, -1),
            cell=problem.cell[:1].expand(3, -1, -1),
        )
        expanded = run_query(one, case, context.backend)
    judge.at_most("strided", range_error(out, expected), 1e-6)
    judge.at_most("channels last", range_error(channels_last, expected), 1e-6)
    judge.at_most("expanded", range_error(expanded, expected[:1].expand(3, -1, -1)), 1e-6)
