"""Threads that share one model: every result is that of the model used alone."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from liif_fast.images import upscaling
from liif_fast.images.upscaling import upscale
from liif_fast.models import checkpoints
from tests.images.upscaling import SMALL, liif, metasr, photo


class Duck(nn.Module):
    """A model of someone else: an encoder, features as an attribute, and render."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Dropout(0.5))
        self.encoder.halo = 1
        self.register_buffer("feat", None)

    def render(self, size, *, window, feat_region):
        top, left, height, width = window
        rows = [(2 * at + 1) * feat_region[2] // (2 * size[0]) - feat_region[0] for at in range(top, top + height)]
        cols = [(2 * at + 1) * feat_region[3] // (2 * size[1]) - feat_region[1] for at in range(left, left + width)]
        return self.feat[:, :, rows][:, :, :, cols].sigmoid()


def changed_imnet():
    model = liif()
    model.imnet.layers[1] = nn.GELU()
    return model


@pytest.fixture(autouse=True)
def _one_thread():
    """Of PyTorch's own for each of Python's: more of them wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("make", "training"),
    [
        (liif, False),
        *(
            pytest.param(*case, marks=pytest.mark.prove)
            for case in ((liif, True), (metasr, False), (changed_imnet, True), (Duck, True))
        ),
    ],
)
def test_threads_share_a_model(make, training):
    """With different options, and a callback that fails."""
    model = make().train(training)
    jobs = [
        (photo(1, 25 + 7 * seed, 30, seed), {"scale": 1 + seed / 8, "dtype": torch.bfloat16 if seed == 3 else None,
                                             "ensemble": seed == 5, "backend": "reference" if seed == 6 else None})
        for seed in range(8)
    ]  # fmt: skip

    def run(job, fails=False):
        windows = 0

        def look(done, total):
            nonlocal windows
            windows += 1
            assert all(module.training == training for module in model.modules())
            if fails and windows == 2:
                raise KeyError("stop")

        result = upscale(job[0], model=model, working_memory=SMALL // 4, progress=look, **job[1])
        assert windows > 3
        return result

    expected = [run(job) for job in jobs]
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with ThreadPoolExecutor(8) as threads:
        found = [threads.submit(run, job, index == 8) for index, job in enumerate([*jobs, jobs[0]])]
        results = [each.exception() or each.result() for each in found]
    assert isinstance(results.pop(), KeyError)
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_a_step_of_training_next_to_inference(monkeypatch):
    """Autocast's cache of casts is one for all threads; casts made without gradients must not get into it."""
    monkeypatch.setattr(upscaling, "emulates", lambda *_: False)
    model, images = liif().train(), photo(1, 12, 9)
    grads = []
    with torch.autocast("cpu", torch.bfloat16):
        for looks in (False, True):
            model.zero_grad()
            if looks:
                with ThreadPoolExecutor(1) as threads:
                    threads.submit(upscale, images, scale=2, model=model, dtype="bfloat16").result()
            model(images, torch.zeros(1, 4, 2), torch.ones(1, 4, 2)).sum().backward()
            grads.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_threads_load_one_file(tmp_path):
    model = liif()
    checkpoints.save(model, tmp_path / "model.safetensors")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with ThreadPoolExecutor(8) as threads:
        models = list(threads.map(checkpoints.load, 16 * [tmp_path / "model.safetensors"]))
    assert torch.equal(torch.rand(1), expected)
    for each in models:
        assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in each.state_dict().items())


def test_encode_leaves_the_model_as_it_is():
    model, other = liif(), photo(1, 6, 5)
    with torch.no_grad():
        feat = model.gen_feat(other)
        expected = model.render((9, 9))
        twin = model.encode(photo(1, 6, 5, 1))
        assert type(twin) is type(model) and twin.imnet is model.imnet and model.feat is feat
        twin.backend = "reference"
        assert not torch.equal(twin.render((9, 9)), expected) and model.backend is None
        assert torch.equal(model.render((9, 9)), expected)
    twin.encoder = None
    assert model.encoder is not None
    assert list(twin.state_dict()) != list(model.state_dict())
