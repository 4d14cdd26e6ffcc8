"""The Hopper decode on the CPU: what tests/ops does not ask of it."""

from __future__ import annotations

import os
import time
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from liif_fast import ops
from liif_fast.benchmark import peak_rates
from tests.backends import KINDS, TABLE, hopper_emulated, set_device
from tests.cuda.emulator import build
from tests.gpu import hopper
from tests.helpers import Case, norm_error, random_problem
from tests.ops import tolerances
from tests.ops.decoding import decode, gradients, make_problem, run
from tests.ops.tolerances import LIMITS, assert_close, assert_decode_close, check_decode

pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=build.why_not())
BACKEND, BFLOAT16, FLOAT16 = TABLE["hopper-emulated"], KINDS[3], KINDS[6]
PAPER = (256, 256, 256, 256)


def proved(value):
    """A parameter's value that only `make prove` tries."""
    return pytest.param(value, marks=pytest.mark.prove)


@pytest.fixture
def kernels():
    with hopper_emulated():
        yield build.load()


# A cluster of two blocks, which have two tiles and one, and a single block.
@pytest.mark.parametrize("seeds", [range(1, 2), proved(range(20))], ids=["one", "twenty"])
@pytest.mark.parametrize("device", ["sm_90", "sm_90-pair"])
@pytest.mark.parametrize(
    ("kind", "hidden", "outs", "queries"),
    [(BFLOAT16, PAPER, 3, 70), (FLOAT16, (64, 256, 192), 4, 70), (BFLOAT16, (128,) * 6, 6, 130)],
    ids=["paper", "any-layers-float16", "narrow"],
)
def test_no_schedule_changes_a_bit(kernels, kind, hidden, outs, queries, device, seeds):
    problem = make_problem(Case(1, 3, 5, 7, queries, hidden, outs), kind, grad=False)
    set_device(device)
    kernels.set_schedule(0, False, 0)
    expected = decode(problem, "cuda")
    for seed in seeds:
        kernels.set_schedule(0, True, seed)
        assert torch.equal(decode(problem, "cuda"), expected), seed


# Layers of 256 and of 128 channels: the fewest, as many as the ring has stages, more. Outputs in one pass and in more.
@pytest.mark.parametrize(
    "hidden",
    [(256, 16), (16, 256), (256,) * 7, (48, 240, 256, 16), (128, 16), (16,) * 5, (80,) * 6, proved((16,) * 20)],
    ids=str,
)
@pytest.mark.parametrize("outs", [6, proved(4), proved(16)])
@pytest.mark.parametrize("ensemble", [True, False], ids=["ensemble", "nearest"])
def test_layers_and_outputs(kernels, hidden, outs, ensemble):
    check_decode(BACKEND, BFLOAT16, Case(2, 2, 4, 5, 40, hidden, outs, ensemble), "points")


def test_the_hopper_kernel_is_the_one_that_runs(kernels):
    """In inference and in training, except in a backward to coordinates."""
    module = import_module("liif_fast.ops.backends.cuda.decode")
    packed = []
    pack = module._C.cuda_decode_pack
    module._C.cuda_decode_pack = lambda *arguments: packed.append(arguments[10:]) or pack(*arguments)
    problem = make_problem(Case(queries=9, hidden=PAPER), BFLOAT16)
    with torch.no_grad():
        decode(problem, "cuda")
    decode(problem, "cuda").sum().backward()
    problem.coord.requires_grad_(False), problem.cell.requires_grad_(False)
    decode(problem, "cuda").sum().backward()
    forward, points, backward = (5, False, False), (5, True, True), (5, True, False)
    assert packed == [forward, forward, points, forward, backward]


# Corners, cells of every query, of the grid and none, batches, narrower latents, one layer and more; blocks have two
# tiles, one and none.
TRAINED = [
    Case(2, 3, 5, 7, 40, (256, 256), 3),
    Case(2, 3, 5, 7, 70, (64, 256, 192), 4),
    Case(1, 3, 5, 7, 70, (256, 16, 32), 1, cell_decode=False),
    Case(2, 2, 4, 5, 70, (144,) * 5, 2, local_ensemble=False),
    Case(1, 3, 5, 7, 70, (128, 16, 96, 80, 112, 128), 4),
]


@pytest.mark.parametrize("mode", ["grid", "points"])
@pytest.mark.parametrize("case", [TRAINED[0], *map(proved, TRAINED[1:])], ids=str)
def test_training(kernels, case, mode):
    problem = make_problem(case, BFLOAT16, mode)
    found = run(problem, BACKEND)
    assert_decode_close(problem, BACKEND, found)
    if mode == "grid":
        return
    # The gradients of coordinates and cells came from other kernels, and with them all others.
    problem.coord.requires_grad_(False), problem.cell.requires_grad_(False)
    leaves = [leaf for leaf in problem.leaves if leaf.requires_grad]
    kept = [grad for leaf, grad in zip(problem.leaves, found[1:], strict=True) if leaf.requires_grad]
    again = gradients(decode(problem, "cuda"), leaves, BFLOAT16.dtype)
    assert_close(again, [found[0], *kept], LIMITS[torch.bfloat16, "model"])


@pytest.mark.prove
@pytest.mark.parametrize("deterministic", [True], indirect=True)
@pytest.mark.parametrize("case", TRAINED[::2], ids=str)
def test_recomputing_and_repeating_change_no_bit(kernels, case, deterministic, monkeypatch):
    problem = make_problem(case, BFLOAT16, "grid")
    kept = run(problem, BACKEND)
    assert all(torch.equal(a, b) for a, b in zip(run(problem, BACKEND), kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(run(problem, BACKEND, recompute=True), kept, strict=True))
    torch.use_deterministic_algorithms(False)  # the fixture puts it back
    for size in (None, 128):
        if size:
            monkeypatch.setattr(import_module("liif_fast.ops.backends.cuda.decode"), "_CHUNK_ROWS", size)
        assert_close(run(problem, BACKEND, recompute=bool(size)), kept, LIMITS[torch.bfloat16, "rounding"])


@pytest.mark.parametrize("kind", [BFLOAT16, FLOAT16], ids=lambda kind: kind.name)
def test_a_window_from_a_part_of_the_map(kernels, kind):
    """The grid's cell, regions, batches; the window is wider than a tile."""
    feat, _, _, weights, biases = random_problem(Case(2, 3, 12, 9, hidden=(256, 256)), kind.dtype)
    arguments = {"window": (11, 12, 5, 16), "feat_region": (2, 1, 12, 9), "cell": (0.3, 0.2)}
    with torch.autocast("cpu", kind.narrow, enabled=kind.autocast):
        image, plain = (
            ops.render(feat[:, :, 2:10, 1:8], (31, 40), weights, biases, backend=name, **arguments)
            for name in ("cuda", "reference")
        )
    exact = ops.render(
        feat.double()[:, :, 2:10, 1:8], (31, 40), [w.double() for w in weights], [b.double() for b in biases],
        backend="reference", **arguments,
    )  # fmt: skip
    assert norm_error(image, exact) <= 2 * norm_error(plain, exact) + 1e-3


@pytest.mark.prove
def test_the_check_on_a_gpu_compares_with_float64(kernels, monkeypatch):
    """tests.gpu.hopper on the emulator: it passes right results, and names a wrong one."""
    backend, cases = hopper.BACKEND._replace(device="cpu", most_queries=40), hopper.CASES[::7]
    assert len(hopper.CASES) == 20
    assert hopper.check(backend, cases) == []
    scale = {"cuda": 1.03, "reference": 1.0}
    monkeypatch.setattr(tolerances, "decode", lambda problem, name: decode(problem, name) * scale[name])
    (wrong,) = hopper.check(backend, cases[:1])
    assert wrong.startswith("bfloat16, points, Case(")


@pytest.mark.prove
def test_a_training_step_is_timed_next_to_the_original(kernels, monkeypatch, capsys):
    """Every run once on the emulator, with the times of a clock that stands still; and the step for the sanitizers."""
    seconds, steps = {"step": 0.5e-3, "original": 3e-3, "gemm": 2e-3}, []
    wait = SimpleNamespace(
        device=torch.device("cpu"),
        warm_up=lambda candidate: steps.append((candidate.name, candidate.run())),
        sample=lambda candidate, turn: candidate.samples.update({turn: seconds[candidate.name]}),
    )
    monkeypatch.setitem(peak_rates.GEMM_SIZE, "cpu", 64)
    found = hopper.training_rate(wait, batch=1, side=3)
    assert (found["step_milliseconds"], found["original_milliseconds"], found["speedup"]) == (0.5, 3, 6)
    (_, ours), (_, theirs), _ = steps
    assert len(ours) == 11 and all(norm_error(a, b) < 0.3 for a, b in zip(ours, theirs, strict=True))
    hopper.run_sanitized("cpu", Case(queries=9, hidden=(256, 256)))
    assert capsys.readouterr().out.strip() == hopper.sanitizer.FINISHED


def test_the_log_of_clocks_covers_the_loop(tmp_path, monkeypatch):
    """With a stand-in for nvidia-smi, whose last line may be cut off."""
    program = tmp_path / "nvidia-smi"
    lines = 'echo "1980, 700.5, 60"; echo "1500, 690.5, 62"; echo "[N/A], [N/A], 61"; printf 17'
    program.write_text(f"#!/bin/sh\necho 210, 70, 30\nsleep 0.05\n{lines}\nexec sleep 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = []
    found = hopper.watch(lambda: calls.append(time.sleep(0.01)), 0.2)
    medians = {"clocks.sm": 1740, "power.draw": 695.5, "temperature.gpu": 61}
    assert found == {**medians, "lowest clocks.sm": 1500, "samples": 2}
    assert len(calls) >= 10
    monkeypatch.setattr(hopper.shutil, "which", lambda _: None)
    assert hopper.watch(calls.clear) == {}
