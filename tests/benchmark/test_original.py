"""The baseline computes the original's numbers, with no more calls than the original's structure requires."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from liif_fast.benchmark import original
from tests.helpers import Case, random_problem
from tests.ops.test_golden import FILES, assert_close, golden, uniform

WITH_IMNET = [file for file in FILES if file.stem.startswith("liif-") and file.stem != "liif-no-imnet"]
FLOATS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


def imnet_of(case: Any, dtype: torch.dtype) -> torch.nn.Sequential:
    """The imnet of a golden file; its gradients are stored for every layer."""
    keys = [key.removeprefix("grad.") for key in case.numbers if key.startswith("grad.imnet.")]
    layers = sorted({int(key.split(".")[2]) for key in keys})
    hidden = case.spec["args"]["imnet_spec"]["args"]["hidden_list"]
    assert len(layers) == len(hidden) + 1, "the file lacks the shape of a layer"

    def layer(index: int, kind: str) -> torch.Tensor:
        key = f"imnet.layers.{index}.{kind}"
        shape = case.numbers[f"grad.{key}"].shape
        scale = 0.05 if len(shape) == 1 else (6 / shape[1]) ** 0.5
        return (uniform(key, shape, case.seed) * scale).to(dtype)

    return original.make_imnet([layer(i, "weight") for i in layers], [layer(i, "bias") for i in layers])


@pytest.mark.parametrize("dtype, tolerance", FLOATS, ids=["float64", "float32"])
@pytest.mark.parametrize("file", WITH_IMNET, ids=lambda file: file.stem)
def test_the_baseline_is_the_original(file: Path, dtype: torch.dtype, tolerance: float) -> None:
    case = golden(file)
    flags = case.spec["args"]
    feat = case.numbers["feat_f64"].to(dtype)
    coord = case.coord.to(dtype)
    cell = case.cell.to(dtype) if flags.get("cell_decode", True) else None
    imnet = imnet_of(case, dtype)
    switches = {name: flags.get(name, True) for name in ("local_ensemble", "feat_unfold")}
    before = [tensor.clone() for tensor in (feat, coord, case.cell)]

    out = original.query(feat, coord, cell, imnet, **switches)
    assert_close(out, case.numbers["out_f64"], tolerance, "out")
    (out * uniform("probe", out.shape, case.seed).to(dtype)).sum().backward()
    for name, parameter in imnet.named_parameters():
        expected = case.numbers[f"grad.imnet.layers.{name}"]
        assert_close(parameter.grad, expected, tolerance, f"grad of {name}")
    assert all(torch.equal(a, b) for a, b in zip(before, (feat, coord, case.cell))), "an input was changed"


@pytest.mark.parametrize("stem", ["liif-full", "liif-paper-width"])
def test_the_baseline_in_chunks_is_the_original(stem: str) -> None:
    case = golden(next(file for file in FILES if file.stem == stem))
    out = original.predict(case.numbers["feat_f64"], case.coord, case.cell, imnet_of(case, torch.float64), chunk=50)
    assert case.coord.shape[1] > 50
    assert_close(out, case.numbers["out_f64"], 1e-10, "out")


class Calls(TorchDispatchMode):
    """Counts the calls that reach the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counted[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def test_the_baseline_makes_the_calls_of_the_public_code() -> None:
    """Per chunk the public code calls one unfold; per corner two grid_samples, two concatenations and five layers."""
    feat, coord, cell, weights, biases = random_problem(Case(hidden=(16,) * 4, queries=130), dtype=torch.float32)
    imnet = original.make_imnet(weights, biases)
    with Calls() as calls:
        original.predict(feat, coord, cell, imnet, chunk=50)
    chunks = 3
    assert calls.counted["im2col"] == chunks
    assert calls.counted["grid_sampler_2d"] == 8 * chunks
    assert calls.counted["addmm"] == 20 * chunks
    assert calls.counted["relu"] == 16 * chunks
    assert calls.counted["cat"] <= 8 * chunks + 1
    assert calls.counted["clone"] <= 9 * chunks, "coord per corner, the grid, the cells"
    made_on_the_host = {"lift_fresh", "lift_fresh_copy", "scalar_tensor"} & set(calls.counted)
    assert not made_on_the_host, "on a GPU each of these calls waits for a copy from the host"
    assert original.CHUNK == 30_000
