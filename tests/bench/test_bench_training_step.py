"""The benchmark of a whole training step compares loops that compute the same, and its tables say what was measured."""

import json

import pytest
import torch

from bench import results, training_step
from bench.loader import make_images
from bench.training_step import QUICK, ROWS, SPLIT, make_stepper
from liif_fast.benchmark.timing import CpuClock

SMALL = {
    "name": "liif",
    "args": {
        "encoder_spec": {"name": "edsr-baseline", "args": {"n_resblocks": 1, "n_feats": 8, "no_upsampling": True}},
        "imnet_spec": {"name": "mlp", "args": {"out_dim": 3, "hidden_list": [16, 16]}},
    },
}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(training_step, "SPEC", SMALL)
    monkeypatch.setattr(training_step, "WRAPPER", {"inp_size": 8, "scale_max": 4, "sample_q": 16})


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    shapes = {"inp": (4, 3, 8, 8), "coord": (4, 16, 2), "cell": (4, 16, 2), "gt": (4, 16, 3)}
    found = {key: torch.rand(shape, generator=generator) for key, shape in shapes.items()}
    return {**found, "coord": found["coord"] * 2 - 1}


@pytest.mark.parametrize("name", [name for name in ROWS if "compiled" not in name])  # whose compiling takes long
def test_every_loop_learns_the_same(name, batch):
    losses, weights = [], []
    for row in (ROWS["original"], ROWS[name]):
        stepper = make_stepper(row, CPU)
        losses.append([stepper.step(batch).item() for _ in range(3)])
        weights.append(torch.cat([each.detach().flatten() for each in stepper.model.imnet.parameters()]))
    exact = ROWS[name].options.autocast is None
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if exact else 5e-3)
    assert losses[0][2] < losses[0][0]
    if name != "ours-fast-ema":  # its clipped gradients are shorter
        assert torch.allclose(weights[1], weights[0], atol=2e-6 if exact else 7e-4)


def test_the_original_decodes_in_float32_where_its_row_says_so(batch):
    dtypes = {}
    for name in ("original-encoder", "original-amp"):
        stepper = make_stepper(ROWS[name], CPU)
        layer = stepper.model.imnet.layers[0]
        layer.register_forward_hook(lambda module, inputs, out, name=name: dtypes.update({name: out.dtype}))
        stepper.step(batch)
    assert dtypes == {"original-encoder": torch.float32, "original-amp": torch.bfloat16}


def test_measured_steps_are_saved_and_tabulated(tmp_path):
    make_images(tmp_path, 1)
    result = training_step.measure(CpuClock(), tmp_path, list(QUICK), rounds=1)
    assert training_step.newest(tmp_path / "results") is None
    path = results.save(result, tmp_path / "results")
    assert training_step.newest(tmp_path / "results") == json.loads(path.read_text())
    text = training_step.tables(result)
    for name in QUICK:
        median = result["entries"][name]["seconds"]["median"]
        assert f"| {ROWS[name].label} | {16 / median:.1f} |" in text
    ratio = result["entries"]["ours-fast"]["speedup_over"]["original"]["median"]
    assert f"| {ratio:.2f}x |" in text
    for name in SPLIT:
        assert (
            f"| {ROWS[name].label} | {result['entries'][f'{name}: encoder']['seconds']['median'] * 1e3:.0f} |" in text
        )
    result["yardsticks"]["loop float32"] = {"median": 100.0, "samples": [50.0, 100.0]}
    assert "The processor was shared" in training_step.tables(result)
    result["entries"]["ours"] = {"failed": "out of memory"}
    assert f"| {ROWS['ours'].label} | out of memory |" in training_step.tables(result)
