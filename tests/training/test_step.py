"""The switches of a training step, each compared with the plain step."""

import copy

import pytest
import torch
from torch import nn

from liif_fast.training.step import AveragedModel, StepOptions, Stepper
from tests.models.small_models import liif

NORM = {"inp": {"sub": [0.4, 0.5, 0.6], "div": [0.5]}, "gt": {"sub": [0.5], "div": [0.25]}}


def model():
    return liif().float()


def stepper_of(net, **options):
    """Plain gradient descent."""
    return Stepper(net, torch.optim.SGD(net.parameters(), lr=0.1), StepOptions(**options), NORM)


def batch(count=6):
    generator = torch.Generator().manual_seed(1)
    shapes = {"inp": (count, 3, 8, 8), "coord": (count, 20, 2), "cell": (count, 20, 2), "gt": (count, 20, 3)}
    found = {key: torch.rand(shape, generator=generator) for key, shape in shapes.items()}
    return {**found, "coord": found["coord"] * 2 - 1, "cell": found["cell"] * 0.2 + 0.05}


def step(items=6, **options):
    """The model, the loss and the stepper after one step."""
    stepper = stepper_of(net := model(), **options)
    return net, stepper.step(batch(items)).item(), stepper


def weights(net):
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def moved(net):
    return weights(net) - weights(model())


def test_a_step_is_gradient_descent_on_l1_of_normalized_colors():
    net, data = model(), batch()
    inp = (data["inp"] - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / 0.5
    loss = nn.functional.l1_loss(net(inp, data["coord"], data["cell"]), (data["gt"] - 0.5) / 0.25)
    loss.backward()
    ours, value, _ = step()
    assert value == pytest.approx(loss.item(), rel=1e-6)
    for mine, theirs in zip(ours.parameters(), net.parameters(), strict=True):
        if theirs.grad is not None:
            assert torch.allclose(mine, theirs - 0.1 * theirs.grad, atol=1e-7)


@pytest.mark.parametrize(("chunks", "items"), [(2, 6), (3, 6), (6, 6), (4, 3)])
def test_chunks_of_a_batch_add_up_to_the_batch(chunks, items):
    whole, loss, _ = step(items=items)
    ours, mine, _ = step(items=items, accumulate=chunks)
    assert mine == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(weights(ours), weights(whole), atol=1e-7)


def test_clipping_shortens_the_gradient_and_keeps_its_direction():
    free = moved(step()[0])
    short = moved(step(clip_grad=0.05)[0])
    assert free.norm() > 0.1 * 0.05 * 1.5
    assert short.norm().item() == pytest.approx(0.1 * 0.05, rel=1e-3)
    assert torch.nn.functional.cosine_similarity(short, free, dim=0) > 0.9999


def test_channels_last_changes_the_layout_only():
    ours, loss, _ = step(channels_last=True)
    assert ours.encoder.head[0].weight.is_contiguous(memory_format=torch.channels_last)
    whole, expected, _ = step()
    assert loss == pytest.approx(expected, rel=1e-5) and torch.allclose(weights(ours), weights(whole), atol=1e-6)


@pytest.mark.parametrize(("name", "error"), [("bf16", 0.05), ("fp16", 0.005)])
def test_autocast_follows_the_step_in_full_precision(name, error):
    net, loss, stepper = step(autocast=name)
    whole, expected, _ = step()
    assert loss == pytest.approx(expected, rel=0.02)
    assert 0 < (moved(net) - moved(whole)).norm() < error * moved(whole).norm()
    assert stepper.scaler.is_enabled() == (name == "fp16")


def test_a_scaled_loss_that_overflows_skips_the_step_and_lowers_the_scale():
    net = model()
    stepper = stepper_of(net, autocast="fp16")
    stepper.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    stepper.step(batch())
    assert torch.equal(weights(net), weights(model())) and stepper.scaler.get_scale() == 2.0**59


def test_averaged_weights():
    net, _, stepper = step(ema=0.5)
    mean = stepper.average.model
    assert not mean.training
    # The first step keeps 1/10 of the initial weights; later every step halves the distance.
    assert torch.allclose(weights(mean), weights(model()) + 0.9 * moved(net), atol=1e-6)
    average = AveragedModel(model(), 0.5)
    target = copy.deepcopy(model())
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.add_(1)
    for number in range(100, 103):
        average.update(target, number)
    distance = weights(target) - weights(average.model)
    assert torch.allclose(distance, torch.full_like(distance, 0.125), atol=1e-5)


@pytest.mark.prove
def test_a_compiled_encoder_gives_the_same_step_and_the_same_names():
    net, loss, _ = step(compile_encoder=True)
    whole, expected, _ = step()
    assert net.state_dict().keys() == whole.state_dict().keys()
    assert loss == pytest.approx(expected, rel=1e-5) and torch.allclose(weights(net), weights(whole), atol=1e-6)


@pytest.mark.parametrize("options", [{"cuda_graphs": True}, {"cuda_graphs": True, "compile_encoder": True}])
def test_cuda_graphs_are_refused_without_a_gpu(options):
    with pytest.raises(ValueError, match="cuda_graphs needs one GPU without compile_encoder, not"):
        step(**options)


def test_a_recorded_encoder_runs_only_for_training_batches_of_its_shape(monkeypatch):
    """Only the dispatch: recording needs a GPU, so a function that counts calls replaces it."""
    replayed = []

    def record(encoder, sample):
        plain, shape = encoder.forward, sample[0].shape

        def replay(x):
            assert x.shape == shape and encoder.training
            replayed.append(x.shape[0])
            return plain(x)

        encoder.forward = replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    net = model()
    stepper = stepper_of(net)
    stepper.options = StepOptions(cuda_graphs=True)
    losses = [stepper.step(batch(items)).item() for items in (6, 6, 4)]
    assert replayed == [6, 6]
    net.eval()
    net.gen_feat(batch()["inp"])
    assert replayed == [6, 6]
    plain = stepper_of(model())
    assert losses == [plain.step(batch(items)).item() for items in (6, 6, 4)]


@pytest.mark.parametrize("switch", ["channels_last", "compile_encoder", "cuda_graphs"])
def test_a_switch_of_the_encoder_needs_an_encoder(switch):
    with pytest.raises(ValueError, match=f"{switch} needs a model with an encoder, and Linear has none"):
        stepper_of(nn.Linear(3, 3), **{switch: True})


def test_options_come_from_a_configuration():
    content = {"autocast": "bf16", "ema": 0.99, "accumulate": None, "epoch_max": 3, "clip_grad": 1}
    assert StepOptions.from_config(content) == StepOptions(autocast="bf16", ema=0.99, clip_grad=1)
