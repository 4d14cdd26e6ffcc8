"""The original code's numbers, reproduced: outputs and gradients of whole models, on every backend.

tests/golden/README.md describes how the files were made, and the formula for weights and inputs.
"""

from __future__ import annotations

import itertools
import json
import math
import zlib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from liif_fast.models import make_model
from liif_fast.models.coordinates import make_cell, make_coord
from tests.helpers import reason_against

FILES = sorted((Path(__file__).parents[1] / "golden").glob("*.safetensors"))
GRIDS = [file for file in FILES if file.stem in ("liif-full", "metasr")]
EDGES = [-1.5, -1, -1 + 5e-7, -0.999999, -0.99, 0.123, 0.99, 0.999999, 1 - 5e-7, 1, 1.5]

# (backend, dtype, largest error allowed as a fraction of the largest golden number)
RUNS = [
    ("reference", torch.float64, 1e-10),
    ("reference", torch.float32, 1e-5),
    ("cpu", torch.float64, 1e-10),
    ("cpu", torch.float32, 1e-5),
]
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
each_run = pytest.mark.parametrize("name, dtype, tolerance", RUNS, ids=lambda value: str(value).removeprefix("torch."))


class Golden(NamedTuple):
    spec: dict[str, Any]
    seed: int
    inp: Tensor  # [B,3,H,W]
    size: list[int] | None  # (h, w) where the queries are an image's pixels
    coord: Tensor  # [B,Q,2]
    cell: Tensor  # [B,Q,2]
    shapes: dict[str, list[int]]  # of the first parameters
    numbers: dict[str, Tensor]


def mix(name: str, count: int, seed: int) -> np.ndarray:
    """`count` numbers in [0, 1): the formula in tests/golden/README.md."""
    mask = np.uint64(0xFFFFFFFF)
    start = np.uint64(zlib.crc32(name.encode()) + 97 * seed)
    mixed = (np.arange(count, dtype=np.uint64) * np.uint64(2654435761) + start) & mask
    mixed ^= mixed >> np.uint64(16)
    mixed = (mixed * np.uint64(0x7FEB352D)) & mask
    mixed ^= mixed >> np.uint64(15)
    mixed = (mixed * np.uint64(0x846CA68B)) & mask
    mixed ^= mixed >> np.uint64(16)
    return mixed / 2**32


def uniform(name: str, shape: list[int] | torch.Size, seed: int, low: float = -1, high: float = 1) -> Tensor:
    values = low + (high - low) * mix(name, math.prod(shape), seed)
    return torch.from_numpy(values).view(*shape)


@cache
def golden(file: Path) -> Golden:
    with safe_open(file, "pt") as handle:
        facts = {key: json.loads(value) for key, value in handle.metadata().items()}
        numbers = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (the handle is no dictionary)
    seed, batch = facts["seed"], facts["inp_shape"][0]
    kind, count = facts["query"]
    if kind == "random":
        coord = uniform("coord", [batch, count, 2], seed)
        cell = uniform("cell", [batch, count, 2], seed, 0.01, 0.4)
    elif kind == "grid":
        coord = make_coord(count, dtype=torch.float64).repeat(batch, 1, 1)
        cell = make_cell(coord, count)
    else:
        assert kind == "edges"
        coord = torch.tensor(list(itertools.product(EDGES, EDGES)), dtype=torch.float64).repeat(batch, 1, 1)
        cell = torch.full_like(coord, 0.07)
    inp = uniform("inp", facts["inp_shape"], seed)
    size = count if kind == "grid" else None
    return Golden(facts["spec"], seed, inp, size, coord, cell, facts["state_dict"], numbers)


def build(case: Golden, backend: str, dtype: torch.dtype) -> torch.nn.Module:
    """The model of a golden file with its weights; skips where the backend cannot run here."""
    if reason := reason_against(backend, "decode", dtype):
        pytest.skip(reason)
    model = make_model(case.spec).to(dtype)
    model.backend = backend
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "mean" not in key:
                scale = 0.05 if parameter.dim() == 1 else math.sqrt(6 / math.prod(parameter.shape[1:]))
                parameter.copy_(uniform(key, parameter.shape, case.seed) * scale)
    return model


def assert_close(actual: Tensor | None, expected: Tensor, tolerance: float, name: str) -> None:
    assert actual is not None and actual.shape == expected.shape, name
    stored = torch.finfo(expected.dtype).eps  # some gradients are stored as float32
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= max(tolerance, stored), f"{name} is off by {error:.1e} of its largest number"


def test_all_golden_files_are_here() -> None:
    liif = {"full", "paper-width", "c", "u", "e", "d", "cue", "linear", "no-imnet", "edges", "rdn-a"}
    assert {file.stem for file in FILES} == {f"liif-{name}" for name in liif} | {"metasr"}


@each_run
@each_file
def test_outputs_and_gradients(file: Path, name: str, dtype: torch.dtype, tolerance: float) -> None:
    case = golden(file)
    model = build(case, name, dtype)
    inp = case.inp.to(dtype, copy=True).requires_grad_()
    out = model(inp, case.coord.to(dtype), case.cell.to(dtype))
    assert out.dtype == dtype
    (out * uniform("probe", out.shape, case.seed).to(dtype)).sum().backward()

    assert_close(model.feat, case.numbers["feat_f64"], tolerance, "feat")
    assert_close(out, case.numbers["out_f64"], tolerance, "out")
    assert_close(inp.grad, case.numbers["grad_inp_f64"], tolerance, "grad of inp")
    parameters = dict(model.named_parameters())
    for key, expected in case.numbers.items():
        if key.startswith("grad."):
            assert_close(parameters[key.removeprefix("grad.")].grad, expected, tolerance, key)


@each_run
@pytest.mark.parametrize("file", GRIDS, ids=lambda file: file.stem)
def test_render_is_the_original_on_a_grid(file: Path, name: str, dtype: torch.dtype, tolerance: float) -> None:
    case = golden(file)
    model = build(case, name, dtype)
    with torch.no_grad():
        model.gen_feat(case.inp.to(dtype))
        image = model.render(case.size)
    height, width = case.size
    assert image.shape == (case.inp.shape[0], 3, height, width)
    assert_close(image.flatten(2).transpose(1, 2), case.numbers["out_f64"], tolerance, "the image")


@each_run
@each_file
def test_queries_in_chunks_without_gradients(file: Path, name: str, dtype: torch.dtype, tolerance: float) -> None:
    """The original's `batched_predict`: one gen_feat, then slices of the queries."""
    case = golden(file)
    model = build(case, name, dtype)
    coord, cell = case.coord.to(dtype), case.cell.to(dtype)
    with torch.no_grad():
        model.gen_feat(case.inp.to(dtype))
        parts = [model.query_rgb(coord[:, at : at + 50], cell[:, at : at + 50]) for at in range(0, coord.shape[1], 50)]
    assert_close(torch.cat(parts, dim=1), case.numbers["out_f64"], tolerance, "out")


@each_file
def test_state_dict_has_the_originals_keys_in_their_order(file: Path) -> None:
    case = golden(file)
    shapes = {key: list(tensor.shape) for key, tensor in make_model(case.spec).state_dict().items()}
    assert list(shapes.items())[: len(case.shapes)] == list(case.shapes.items())
    assert {key.removeprefix("grad.") for key in case.numbers if key.startswith("grad.")} <= set(shapes)
