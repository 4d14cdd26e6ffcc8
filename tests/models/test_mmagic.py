"""Loading MMagic's checkpoints, and the settings that their weights do not tell."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from liif_fast.models import make_model
from liif_fast.models.checkpoints import CheckpointError, load, save
from liif_fast.models.mmagic import convert as convert_from_mmagic
from tests.models.test_checkpoints import EDSR, assert_same, liif, refusal

RDN = {"name": "rdn", "args": {"G0": 8, "RDNconfig": "A", "no_upsampling": True}}


@pytest.fixture(scope="module")
def rdn() -> nn.Module:
    return liif(RDN)


# The keys that MMagic's LIIFEDSRNet and LIIFRDNNet write, in the original's terms: (ours, theirs).
MMAGIC_EDSR = [
    ("encoder.head.0.", "conv_first."),
    ("encoder.body.0.body.0.", "body.0.conv1."),
    ("encoder.body.0.body.2.", "body.0.conv2."),
    ("encoder.body.1.body.0.", "body.1.conv1."),
    ("encoder.body.1.body.2.", "body.1.conv2."),
    ("encoder.body.2.", "conv_after_body."),
    ("imnet.layers.", "imnet.layers."),
]
MMAGIC_RDN = [
    ("encoder.SFENet1.", "sfe1."),
    ("encoder.SFENet2.", "sfe2."),
    *((f"encoder.RDBs.{b}.convs.{c}.conv.0.", f"rdbs.{b}.layers.{c}.conv.") for b in range(20) for c in range(6)),
    *((f"encoder.RDBs.{b}.LFF.", f"rdbs.{b}.lff.") for b in range(20)),
    ("encoder.GFF.0.", "gff.0."),
    ("encoder.GFF.1.", "gff.1."),
    ("imnet.layers.", "imnet.layers."),
]


def mmagic(model: nn.Module, names: list[tuple[str, str]], prefix: str = "generator.") -> dict[str, Any]:
    """A checkpoint as MMagic writes it for this model, with parts that loading must ignore."""
    weights: dict[str, Tensor] = OrderedDict()
    for key, tensor in model.state_dict().items():
        for ours, theirs in names:
            if key.startswith(ours) and "_mean." not in key:
                weights[prefix + theirs + key.removeprefix(ours)] = tensor
    if prefix:
        weights.update({key.replace("generator.", "generator_ema."): tensor + 1 for key, tensor in weights.items()})
        weights["data_preprocessor.input_mean"] = torch.zeros(3, 1, 1)
        weights["step_counter"] = torch.tensor(5)
    return {"meta": {"epoch": 1, "cfg": "..."}, "state_dict": weights}


@pytest.mark.parametrize(
    ("prefix", "unfold", "cell"),
    [("generator.", True, True), ("module.generator.", True, False), ("", False, True), ("generator.", False, False)],
)
def test_mmagics_edsr(tmp_path: Path, prefix: str, unfold: bool, cell: bool) -> None:
    model = liif(feat_unfold=unfold, cell_decode=cell)
    torch.save(mmagic(model, MMAGIC_EDSR, prefix), tmp_path / "liif_edsr_norm.pth")
    loaded = load(tmp_path / "liif_edsr_norm.pth")
    assert_same(loaded, model)
    assert (loaded.feat_unfold, loaded.cell_decode, loaded.local_ensemble) == (unfold, cell, True)
    mean = {"sub": [0.4488, 0.4371, 0.4040], "div": [1, 1, 1]}
    assert loaded.data_norm == {"inp": mean, "gt": mean}


def test_mmagics_rdn(tmp_path: Path, rdn: nn.Module) -> None:
    torch.save(mmagic(rdn, MMAGIC_RDN), tmp_path / "liif_rdn_norm.pth")
    loaded = load(tmp_path / "liif_rdn_norm.pth")
    assert_same(loaded, rdn)
    assert loaded.data_norm["inp"] == {"sub": [0.5] * 3, "div": [0.5] * 3}


def test_mmagics_full_size_edsr_scales_its_residuals() -> None:
    weights = {
        "generator.conv_first.weight": torch.empty(256, 3, 3, 3),
        "generator.imnet.layers.0.weight": torch.empty(3, 2308),
    }
    weights |= {f"generator.body.{block}.conv1.weight": torch.empty(256, 256, 3, 3) for block in range(32)}
    spec, _, _ = convert_from_mmagic(weights)
    assert spec["args"]["encoder_spec"]["name"] == "edsr"
    assert spec["args"]["encoder_spec"]["args"]["res_scale"] == 0.1
    assert spec["args"]["imnet_spec"]["args"] == {"out_dim": 3, "hidden_list": []}


def test_what_mmagics_weights_do_not_tell_can_be_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scaled = {"name": "edsr-baseline", "args": {**EDSR["args"], "res_scale": 0.1}}
    model = liif(scaled, local_ensemble=False)
    file = tmp_path / "liif.pth"
    torch.save(mmagic(model, MMAGIC_EDSR), file)
    with caplog.at_level("INFO", "liif_fast"):
        assert_same(load(file, settings={"res_scale": 0.1, "local_ensemble": False}), model)
        assert not caplog.records
        assert load(file, settings={"res_scale": 0.1}).local_ensemble
        load(file)
    one, both = (record.getMessage().removeprefix(f"{file}: ") for record in caplog.records)
    assert one.startswith("the weights of MMagic do not tell local_ensemble=true, which is assumed; for a model that ")
    assert "do not tell local_ensemble=true and res_scale=1, which is assumed" in both
    assert both.endswith("add --set res_scale=0.1 or local_ensemble=false")
    save(load(file, settings={"res_scale": 0.1}), tmp_path / "saved.safetensors")
    assert load(tmp_path / "saved.safetensors").spec["args"]["encoder_spec"] == {
        "name": "edsr-baseline",
        "args": {"n_resblocks": 2, "n_feats": 8, "res_scale": 0.1, "no_upsampling": True},
    }


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"cell_decode": False}, "cell_decode cannot be set: the weights of {file} determine everything but local_"),
        ({"local_ensemble": 0}, "local_ensemble is 0, but must be a bool"),
        ({"res_scale": True}, "res_scale is True, but must be a number"),
        ({"res_scale": "0.1"}, "res_scale is '0.1', but must be a number"),
        ({"res_scale": 0.1}, "res_scale cannot be set: the rdn in {file} has none"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, rdn: nn.Module, settings: dict[str, Any], words: str) -> None:
    file = tmp_path / "rdn.pth"
    torch.save(mmagic(rdn, MMAGIC_RDN), file)
    with pytest.raises(CheckpointError) as caught:
        load(file, settings=settings)
    assert str(caught.value).startswith(words.format(file=file))


def test_settings_of_metasr(tmp_path: Path) -> None:
    file = tmp_path / "metasr.safetensors"
    save(make_model({"name": "metasr", "args": {"encoder_spec": EDSR}}), file)
    with pytest.raises(CheckpointError, match=r"local_ensemble cannot be set: the metasr in .* has none"):
        load(file, settings={"local_ensemble": False})
    assert load(file, settings={"res_scale": 0.5}).spec["args"]["encoder_spec"]["args"]["res_scale"] == 0.5


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda w: {key: t for key, t in w.items() if "imnet" not in key}, "has no imnet.layers, so it is no LIIF"),
        (
            lambda w: {key: t for key, t in w.items() if "conv_first" not in key},
            "neither conv_first (EDSR) nor sfe1 (RDN)",
        ),
        (lambda w: {**w, "generator.imnet.layers.0.weight": torch.zeros(16, 50)}, "imnet takes 50 inputs"),
        (lambda w: {**w, "generator.sfe1.weight": torch.zeros(8, 3, 3, 3)}, "unexpected 'encoder.SFENet1.weight'"),
    ],
)
def test_other_networks_of_mmagic(tmp_path: Path, change: Any, words: str) -> None:
    content = mmagic(liif(), MMAGIC_EDSR)
    torch.save({**content, "state_dict": change(content["state_dict"])}, tmp_path / "model.pth")
    assert words in refusal(tmp_path / "model.pth")


def test_an_rdn_of_another_size_is_refused(tmp_path: Path, rdn: nn.Module) -> None:
    content = mmagic(rdn, MMAGIC_RDN)
    weights = {key: tensor for key, tensor in content["state_dict"].items() if ".rdbs.19." not in key}
    torch.save({"state_dict": weights}, tmp_path / "model.pth")
    assert "(blocks, layers, growth) = (19, 6, 32)" in refusal(tmp_path / "model.pth")
