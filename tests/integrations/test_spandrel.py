"""LIIF in the real spandrel: files of ours, of the original and of MMagic, by file and by weights as ComfyUI does."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import safetensors.torch
import torch

import liif_fast
from liif_fast.models import make_model
from liif_fast.models.checkpoints import CheckpointError
from tests.integrations import real_spandrel
from tests.models import small_models

NORM = {"inp": {"sub": [0.4, 0.5, 0.6], "div": [1.0, 1.0, 1.0]}, "gt": {"sub": [0.25], "div": [0.5]}}
IMAGE = torch.rand(1, 3, 9, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def spandrel(monkeypatch):
    """The real package with LIIF installed; its registry and loader are restored."""
    package = real_spandrel.import_or_skip(monkeypatch)
    monkeypatch.setattr(package, "MAIN_REGISTRY", package.MAIN_REGISTRY)
    loader = package.ModelLoader
    monkeypatch.setattr(loader, "load_from_file", loader.load_from_file)
    registry = package.MAIN_REGISTRY
    state = dict(registry.__dict__)
    from liif_fast.integrations import spandrel as integration

    integration.install()
    yield package
    registry.__dict__.update(state)
    integration.install.__globals__["LIIFArchitecture"].scale = 4


def small(**args):
    model = small_models.liif(**args).float().eval()
    model.data_norm = NORM
    return model


def save_original(model, path, **more):
    """A file with the layout of the original's checkpoints."""
    optimizer = {"name": "adam", "args": {"lr": 1e-4}, "sd": torch.optim.Adam(model.parameters()).state_dict()}
    torch.save({"model": {**model.spec, "sd": model.state_dict()}, "optimizer": optimizer, "epoch": 7, **more}, path)


def mmagic_state(model):
    """The weights of a LIIF on EDSR under MMagic's names."""
    rules = [
        (r"^encoder\.head\.0", "conv_first"),
        (r"^encoder\.body\.1\.(weight|bias)", r"conv_after_body.\1"),
        (r"^encoder\.body\.(\d)\.body\.0", r"body.\1.conv1"),
        (r"^encoder\.body\.(\d)\.body\.2", r"body.\1.conv2"),
    ]
    state = {}
    for key, tensor in model.state_dict().items():
        for pattern, name in rules:
            key = re.sub(pattern, name, key)
        if "_mean" not in key:
            state[f"generator.{key}"] = tensor
    return state


def check(spandrel, descriptor, model, scale=4):
    """The descriptor is an image model, and its output is that of `liif_fast.upscale`."""
    assert isinstance(descriptor, spandrel.ImageModelDescriptor)
    assert (descriptor.architecture.id, descriptor.purpose, descriptor.scale) == ("LIIF", "SR", scale)
    assert (descriptor.input_channels, descriptor.output_channels) == (3, 3)
    assert descriptor.model.data_norm == model.data_norm
    assert descriptor.model.spec == model.spec
    assert torch.equal(descriptor(IMAGE), liif_fast.upscale(IMAGE, scale=scale, model=model))


def test_our_file_keeps_spec_and_normalization(spandrel, tmp_path, caplog):
    model = small(local_ensemble=False, cell_decode=False)
    liif_fast.save(model, tmp_path / "ours.safetensors")
    check(spandrel, spandrel.ModelLoader().load_from_file(tmp_path / "ours.safetensors"), model)
    assert not caplog.records


def test_the_originals_file(spandrel, tmp_path, caplog):
    model = small(local_ensemble=False)
    save_original(model, tmp_path / "theirs.pth", data_norm=NORM)
    check(spandrel, spandrel.ModelLoader("cpu").load_from_file(str(tmp_path / "theirs.pth")), model)
    model.data_norm = liif_fast.models.default_data_norm()
    save_original(model, tmp_path / "theirs.pth")
    check(spandrel, spandrel.ModelLoader().load_from_file(tmp_path / "theirs.pth"), model)
    assert not caplog.records


def test_mmagics_file(spandrel, tmp_path):
    torch.save({"meta": {"epoch": 3}, "state_dict": mmagic_state(small())}, tmp_path / "mmagic.pth")
    model = liif_fast.load(tmp_path / "mmagic.pth")
    assert model.data_norm["inp"]["sub"] == [0.4488, 0.4371, 0.4040]
    check(spandrel, spandrel.ModelLoader().load_from_file(tmp_path / "mmagic.pth"), model)


def test_metasr(spandrel, tmp_path):
    model = small_models.metasr().float().eval()
    model.data_norm = NORM
    liif_fast.save(model, tmp_path / "metasr.safetensors")
    check(spandrel, spandrel.ModelLoader().load_from_file(tmp_path / "metasr.safetensors"), model)


def test_weights_alone_say_what_is_assumed(spandrel, tmp_path, caplog):
    """As in ComfyUI, whose own reader gives the weights of a .safetensors file and the whole of a .pth file."""
    model = small()
    liif_fast.save(model, tmp_path / "ours.safetensors")
    descriptor = spandrel.ModelLoader().load_from_state_dict(safetensors.torch.load_file(tmp_path / "ours.safetensors"))
    assert "whose normalization {'inp': {'sub': [0.5]" in caplog.text and "and spec {'name'" in caplog.text
    model.data_norm = liif_fast.models.default_data_norm()
    assert descriptor.model.spec["args"]["imnet_spec"] == model.spec["args"]["imnet_spec"]
    assert torch.equal(descriptor(IMAGE), liif_fast.upscale(IMAGE, scale=4, model=model))
    save_original(small(cell_decode=False), tmp_path / "theirs.pth")
    content = torch.load(tmp_path / "theirs.pth", weights_only=True)
    caplog.clear()
    assert spandrel.ModelLoader().load_from_state_dict(content).model.cell_decode is False
    assert "normalization" in caplog.text and "spec" not in caplog.text


def test_a_file_without_metadata_is_read_from_its_weights(spandrel, tmp_path, caplog):
    safetensors.torch.save_file(small().state_dict(), tmp_path / "bare.safetensors")
    descriptor = spandrel.ModelLoader().load_from_file(tmp_path / "bare.safetensors")
    assert descriptor.architecture.id == "LIIF" and "assumed" in caplog.text


def test_weights_that_cannot_be_recognized_are_one_sentence(spandrel):
    state = {**small_models.metasr().state_dict()}
    with pytest.raises(CheckpointError, match="its imnet takes 3 inputs"):
        spandrel.ModelLoader().load_from_state_dict(state)


def test_gray_models(spandrel, tmp_path):
    encoder = {"name": "edsr-baseline", "args": {**small_models.ENCODER["args"], "n_colors": 1}}
    imnet = {"name": "mlp", "args": {"out_dim": 1, "hidden_list": [8]}}
    model = make_model({"name": "liif", "args": {"encoder_spec": encoder, "imnet_spec": imnet}}).eval()
    descriptor = spandrel.ModelLoader().load_from_state_dict(model.state_dict())
    assert (descriptor.input_channels, descriptor.output_channels) == (1, 1)
    assert torch.equal(descriptor(IMAGE[:, :1]), liif_fast.upscale(IMAGE[:, :1], scale=4, model=model))


def test_scale_and_second_install(spandrel, tmp_path):
    from liif_fast.integrations.spandrel import install

    once = spandrel.ModelLoader.load_from_file
    install(scale=2)
    assert spandrel.ModelLoader.load_from_file is once
    model = small()
    liif_fast.save(model, tmp_path / "ours.safetensors")
    descriptor = spandrel.ModelLoader().load_from_file(tmp_path / "ours.safetensors")
    check(spandrel, descriptor, model, scale=2)
    descriptor.scale = 3
    check(spandrel, descriptor, model, scale=3)
    with pytest.raises(ValueError, match=r"scale is 2.5, but spandrel needs a whole number"):
        install(scale=2.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(spandrel, dtype):
    descriptor = spandrel.ModelLoader().load_from_state_dict(small().state_dict()).to(dtype)
    exact = spandrel.ModelLoader().load_from_state_dict(small().state_dict())(IMAGE)
    out = descriptor(IMAGE.to(dtype))
    assert out.dtype == dtype
    assert (out.float() - exact).abs().max() < 0.02


def test_other_models_load_as_before(spandrel, tmp_path):
    """A small RealESRGAN-compact model, saved from spandrel's own class."""
    compact = spandrel.MAIN_REGISTRY["Compact"].architecture
    state = {}
    for index, shape in ((0, (4, 3, 3, 3)), (2, (4, 4, 3, 3)), (4, (12, 4, 3, 3))):
        state[f"body.{index}.weight"] = torch.rand(shape) / 30
        state[f"body.{index}.bias"] = torch.zeros(shape[0])
        if index < 4:
            state[f"body.{index + 1}.weight"] = torch.zeros(4)
    torch.save({"params": state}, tmp_path / "compact.pth")
    descriptor = spandrel.ModelLoader().load_from_file(tmp_path / "compact.pth")
    assert descriptor.architecture is compact and descriptor(IMAGE).shape == (1, 3, 18, 14)
    with pytest.raises(spandrel.UnsupportedModelError):
        spandrel.ModelLoader().load_from_state_dict({"x": torch.zeros(1)})


@pytest.mark.prove
def test_without_spandrel_the_import_is_one_sentence():
    code = "import sys; sys.modules['spandrel'] = None\nimport liif_fast.integrations.spandrel"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: liif_fast.integrations.spandrel needs spandrel: pip install spandrel")
