"""What the public ops refuse, in which words, and how they choose a backend."""

from __future__ import annotations

import pytest
import torch

from liif_fast import ops
from liif_fast.ops import backends
from liif_fast.ops.validation import latent_range
from tests.helpers import Case, random_problem, reason_against, run_after_torch

WHY_NOT = reason_against("cpu", "decode", torch.float32)


@pytest.mark.parametrize("op", ["gather", "ensemble", "decode", "metasr_query"])
def test_an_explicit_backend_runs_or_says_why(op):
    request = backends.OpRequest(op, "cuda", torch.float32)
    with pytest.raises(RuntimeError, match="takes CPU tensors, these are on 'cuda'"):
        backends.choose(request, "cpu")
    assert backends.choose(request) == ("cuda" if backends.can_run_cuda(request) else "torch")
    with pytest.raises(ValueError, match="backend is 'warp', which is not a backend: choose one of"):
        backends.choose(request, "warp")


def test_can_run_without_raising_says_the_same():
    for dtype, runs in ((torch.float32, not WHY_NOT), (torch.float8_e4m3fn, False)):
        assert backends.can_run_cpu(backends.OpRequest("decode", "cpu", dtype)) == runs


@pytest.mark.prove
def test_environment_overrides_the_choice():
    script = """
import os
os.environ["LIIF_FAST_BACKEND"] = "{}"
from liif_fast.ops import backends
print(backends.choose(backends.OpRequest("decode", "cpu", torch.float32)))
"""
    right, wrong = run_after_torch(*(script.format(value) for value in ("reference", "nonsense")))
    assert right == "reference"
    assert "LIIF_FAST_BACKEND is 'nonsense', which is not a backend" in wrong


def bad(**changes):
    case = Case(queries=4, hidden=(8,))
    feat, coord, cell, weights, biases = random_problem(case, torch.float32)
    arguments = {"feat": feat, "coord": coord, "cell": cell, "weights": weights, "biases": biases}
    arguments.update({name: change(arguments[name]) for name, change in changes.items()})
    return arguments


QUERY_MESSAGES = [
    ({"feat": lambda t: t[0]}, ValueError, r"feat must be \[B, C, H, W\], got shape \(3, 5, 7\)"),
    ({"feat": lambda t: t.int()}, TypeError, r"feat must be a floating point tensor, got torch.int32"),
    ({"feat": lambda t: t[:, :, :0]}, ValueError, r"at least one channel, row and column, got shape \(1, 3, 0, 7\)"),
    ({"coord": lambda t: t[0]}, ValueError, r"coord must be \[B, Q, 2\].*got shape \(4, 2\)"),
    ({"coord": lambda t: t.int()}, TypeError, r"coord must be a floating point tensor.*torch.int32"),
    ({"coord": lambda t: t.repeat(2, 1, 1)}, ValueError, r"coord has batch 2 but feat has batch 1"),
    ({"cell": lambda t: None}, ValueError, r"cell is None but cell_decode is on"),
    ({"cell": lambda t: t[:, :2]}, ValueError, r"cell must have coord's shape \(1, 4, 2\), got \(1, 2, 2\)"),
    ({"weights": lambda t: [t[0][:, :9], t[1]]}, ValueError, r"weights\[0\] must be \[out, 31\], got \(8, 9\)"),
    ({"weights": lambda t: [t[0], t[1].T]}, ValueError, r"weights\[1\] must be \[out, 8\], got \(8, 3\)"),
    ({"weights": lambda t: []}, ValueError, r"as many biases as weights and at least one, got 0 and 2"),
    ({"biases": lambda t: [t[1], t[1]]}, ValueError, r"biases\[0\] must be \[8\], got \(3,\)"),
    (
        {"weights": lambda t: [t[0].double(), t[1]]},
        TypeError,
        r"weights\[0\] is torch.float64 but feat is torch.float32",
    ),
    ({"weights": lambda t: [t[0].to("meta"), t[1]]}, ValueError, r"weights\[0\] is on meta but feat is on cpu"),
    ({"coord": lambda t: t.to("meta")}, ValueError, r"coord is on meta but feat is on cpu"),
]


@pytest.mark.parametrize(("changes", "error", "message"), QUERY_MESSAGES, ids=[m for *_, m in QUERY_MESSAGES])
def test_query_messages(changes, error, message):
    with pytest.raises(error, match=message):
        ops.query(**bad(**changes))


RENDER_MESSAGES = [
    ({"size": (0, 5)}, r"size must be at least 1x1, got 0x5"),
    ({"size": (4, 5, 6)}, r"size must be \(rows, columns\), got \(4, 5, 6\)"),
    ({"window": (0, 0, 11, 3)}, r"window \(0, 0, 11, 3\).*exceeds the 10x14 image"),
    ({"window": (1, 2)}, r"window must be \(top, left, height, width\), got \(1, 2\)"),
    ({"cell": (0.1,)}, r"cell must be \(row, col\)"),
    ({"feat_region": (1, 0, 5, 7)}, r"feat_region \(1, 0, 5, 7\).*does not hold feat of 5x7"),
    ({"feat_region": (1, 2)}, r"feat_region must be \(top, left, H, W\)"),
    ({"feat_region": (20, 0, 40, 7)}, r"the window needs feature rows 0 to 39, but feat holds 20 to 24"),
]


@pytest.mark.parametrize(("changes", "message"), RENDER_MESSAGES, ids=[m for _, m in RENDER_MESSAGES])
def test_render_messages(changes, message):
    arguments = bad()
    del arguments["coord"], arguments["cell"]
    with pytest.raises(ValueError, match=message):
        ops.render(**{"size": (10, 14), **arguments, **changes})


def test_ensemble_and_latent_map_messages():
    with pytest.raises(ValueError, match=r"pred must be \[B, Q, S, O\], got shape \(2, 3, 4\)"):
        ops.ensemble(torch.zeros(2, 3, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"area_weight must be \(2, 3, 4\), got \(2, 3\)"):
        ops.ensemble(torch.zeros(2, 3, 4, 5), torch.zeros(2, 3))
    if not WHY_NOT:
        with pytest.raises(ValueError, match=r"latent_map must be \(1, 5, 7, 8\) on cpu, got \(1, 2\) on cpu"):
            ops.query(**bad(), latent_map=torch.zeros(1, 2), backend="cpu")


@pytest.mark.parametrize(("pixels", "latents"), [(10, 5), (7, 7), (31, 12), (5, 20), (1, 9)])
def test_latent_range_covers_every_latent_a_pixel_takes(pixels, latents):
    feat = torch.arange(latents).float().view(1, 1, latents, 1)
    for first in range(pixels):
        coord = torch.stack([ops.reference.pixel_centers(pixels, dtype=torch.float32)[first], torch.tensor(0.0)])
        x, _ = ops.gather(feat, coord.view(1, 1, 2), feat_unfold=False)
        low, high = latent_range(first, 1, pixels, latents, 0)
        assert low <= x[..., 0].min() and x[..., 0].max() <= high
