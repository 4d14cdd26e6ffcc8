"""The library on a GPU: the choice of a backend, its refusals, training steps and `upscale`."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

import liif_fast
from liif_fast import ops
from liif_fast.training.step import StepOptions, Stepper
from tests.gpu.problems import PAPER, assert_close, make_problem, run
from tests.helpers import Case, psnr, range_error, reason_against

ENCODER = {"name": "edsr-baseline", "args": {"n_resblocks": 1, "n_feats": 16, "no_upsampling": True}}
MODELS = {"liif": {"imnet_spec": {"name": "mlp", "args": {"out_dim": 3, "hidden_list": [32, 32]}}}, "metasr": {}}
NORM = {"inp": {"sub": [0.5], "div": [0.5]}, "gt": {"sub": [0.5], "div": [0.5]}}


def make_model(name: str, backend: str, device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)
    model = liif_fast.make_model({"name": name, "args": {"encoder_spec": ENCODER, **MODELS[name]}}).to(device)
    model.backend = backend
    return model


def make_batch(count: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"inp": (count, 3, 12, 13), "coord": (count, 200, 2), "cell": (count, 200, 2), "gt": (count, 200, 3)}
    batch = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    return {**batch, "coord": batch["coord"] * 2 - 1, "cell": batch["cell"] * 0.1 + 0.02}


@pytest.mark.parametrize("op", ["query", "render"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_backend_runs_the_decoder_of_the_paper(device, gpu_backend, dtype, op):
    """tests/ops skips a case that the backend refuses. It may refuse unusual imnets, but not this one."""
    (out,) = run(op, make_problem(PAPER, dtype, device), gpu_backend)
    assert out.isfinite().all()


@pytest.mark.parametrize("hidden", [(13, 37), (256, 256), (512,), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_without_a_named_backend_every_imnet_runs_on_the_device(device, hidden, dtype):
    """An imnet that no fused kernel runs is decoded layer by layer."""
    results = []
    problem = make_problem(Case(hidden=hidden, outs=4), dtype, device)
    for values, backend in ((problem, None), (problem.to("cpu").to(torch.float64), "reference")):
        feat, *points, weights, biases = values[:5]
        out = ops.query(feat, *points, weights, biases, backend=backend)
        results.append((out, ops.render(feat, (20, 28), weights, biases, backend=backend)))
    for found, expected in zip(*results):
        assert found.device == device and range_error(found.cpu(), expected) <= 1e-5


def test_fold_is_float32_unless_tf32_is_allowed(device):
    """By default cuDNN convolves in TF32. `fold` follows the switch for matrix products instead."""
    problem = make_problem(PAPER, torch.float32, device, grad=True)
    probe = torch.rand(1, 48, 48, 256, generator=torch.Generator().manual_seed(1)).to(device) - 0.5
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (problem.feat, problem.weights[0])]
        out = ops.fold(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, probe.to(dtype))])
    (out, *grads), (expected, *exact) = results
    assert range_error(out, expected) <= 2e-6
    assert_close(grads, exact, 1e-5)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_the_first_layer_of_16_bit_training_rounds_its_operands_alone(device, narrow):
    """Four of the paper's maps, forward and backward, against float64 with the same roundings."""
    if reason := reason_against("cuda", "gather", torch.float32, "cuda"):
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)
    sizes = (4, 64, 48, 48), (256, 64, 3, 3), (4, 256, 48, 48)
    feat, kernels, probe = (torch.randn(size, generator=generator).to(device, narrow) for size in sizes)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (feat, kernels)]
        fold = import_module("liif_fast.ops.fold")._convolution
        out = fold(*leaves, narrow, "cuda") if dtype == torch.float32 else F.conv2d(*leaves, padding=1)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, probe.to(dtype))])
    for found, expected in zip(*results):
        assert range_error(found, expected) <= 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_and_renders_as_on_the_reference(device, gpu_backend, name):
    batch = {key: value.to(device) for key, value in make_batch().items()}
    results = []
    for each in (gpu_backend, "reference"):
        model = make_model(name, each, device)
        out = model(batch["inp"], batch["coord"], batch["cell"])
        out.square().mean().backward()
        grads = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        with torch.no_grad():
            model.eval().gen_feat(batch["inp"])
            results.append([out.detach(), model.render((30, 31)), *grads])
    assert_close(*results, 1e-3)  # the encoder may run in TF32 on both sides


@pytest.mark.parametrize("switches", [{}, {"autocast": "bf16"}, {"autocast": "fp16"}, {"cuda_graphs": True}], ids=str)
def test_the_trainer_steps_on_the_device_as_on_a_cpu(device, gpu_backend, switches):
    losses = []
    for place, each, options in ((device, gpu_backend, switches), (torch.device("cpu"), "reference", {})):
        model = make_model("liif", each, place).train()
        stepper = Stepper(model, torch.optim.SGD(model.parameters(), lr=0.05), StepOptions(**options), NORM)
        losses.append([stepper.step(make_batch()).item() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2 if "autocast" in switches else 2e-3)


@pytest.mark.parametrize(("dtype", "decibel"), [(None, 50), (torch.bfloat16, 35)], ids=str)
def test_upscale_on_the_device_gives_the_image_of_a_cpu(device, gpu_backend, dtype, decibel):
    small = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(4))
    image = torch.nn.functional.interpolate(small, size=(40, 50), mode="bicubic").clamp(0, 1)[0]
    model = liif_fast.load("tiny")
    expected = liif_fast.upscale(image, scale=2.7, model=model, device="cpu", backend="reference")
    found = liif_fast.upscale(image, scale=2.7, model=model, device=device, backend=gpu_backend, dtype=dtype)
    assert psnr(found.cpu(), expected) >= decibel  # the encoder may run in TF32


@pytest.mark.parametrize(
    ("dtype", "hidden", "changes", "message"),
    [
        (torch.float32, (32, 16), {"coord": "cpu"}, "coord is on cpu but feat is on cuda:0: move"),
        (torch.float32, (32, 16), {"biases": "cpu"}, r"biases\[0\] is on cpu but feat is on cuda:0: move"),
        (torch.float32, (32, 16), {"latent_map": "cpu"}, "on cuda:0, got .* on cpu: make it by fold"),
        (torch.float32, (32, 16), {"backend": "cpu"}, "backend 'cpu' takes CPU tensors, these are on 'cuda': move"),
        (torch.float64, (32, 16), {"backend": "cuda"}, "decodes in float32, bfloat16 or float16, not float64: use"),
        (torch.float32, (13,), {"backend": "cuda"}, "a multiple of 16 up to 256, not 13"),
    ],
)
def test_refusals_name_the_devices_and_the_remedy(device, dtype, hidden, changes, message):
    if "cuda" in changes.values() and (reason := reason_against("cuda", "gather", dtype, device.type)):
        pytest.skip(reason)
    problem = make_problem(Case(hidden=hidden), dtype, device)
    arguments = {**problem._asdict(), "latent_map": ops.fold(problem.feat, problem.weights[0])}
    del arguments["metasr"], arguments["case"]
    for name, value in changes.items():
        elsewhere = {**problem.to("cpu")._asdict(), "latent_map": arguments["latent_map"].cpu()}
        arguments[name] = value if name == "backend" else elsewhere[name]
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.query(**arguments)
