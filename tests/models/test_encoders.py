"""Encoders: keys, sizes, results and receptive fields."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liif_fast.models import make_model

FULL = [  # name, args, keys of LIIF on it, parameters of LIIF on it
    ("edsr-baseline", {}, 82, 1_567_323),
    ("edsr", {}, 146, 39_151_643),
    ("rdn", {}, 306, 22_320_835),
    ("rcan", {}, 1638, 15_642_107),
]
UNSCALED = {"no_upsampling": True}
SMALL = {
    "edsr-baseline": {"n_resblocks": 2, "n_feats": 6},
    "edsr": {"n_resblocks": 2, "n_feats": 6},
    "rdn": {"G0": 4, "RDNconfig": "A"},
    "rcan": {"n_resgroups": 2, "n_resblocks": 2, "n_feats": 8, "reduction": 4},
}


def small(name: str, **args: object) -> Any:
    torch.manual_seed(0)
    return make_model({"name": name, "args": {**SMALL[name], **args}}).double()


@pytest.mark.parametrize("name, args, keys, parameters", FULL, ids=lambda value: str(value))
def test_liif_has_the_originals_keys_and_size(name: str, args: dict[str, object], keys: int, parameters: int) -> None:
    imnet = {"name": "mlp", "args": {"out_dim": 3, "hidden_list": [256] * 4}}
    encoder = {"name": name, "args": {"no_upsampling": True, **args}}
    with torch.device("meta"):
        model = make_model({"name": "liif", "args": {"encoder_spec": encoder, "imnet_spec": imnet}})
    assert len(model.state_dict()) == keys
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_keys_by_name() -> None:
    keys = {name: list(small(name).state_dict()) for name in SMALL}
    means = ["sub_mean.weight", "sub_mean.bias", "add_mean.weight", "add_mean.bias"]
    assert keys["edsr"] == keys["edsr-baseline"]
    assert keys["edsr"][:6] == [*means, "head.0.weight", "head.0.bias"]
    blocks = [f"body.{block}.body.{layer}" for block in range(2) for layer in (0, 2)]
    tail = ["body.2", "tail.0.0", "tail.1"]
    assert keys["edsr"][6:] == [f"{key}.{part}" for key in blocks + tail for part in ("weight", "bias")]

    dense = [f"RDBs.{block}.convs.{layer}.conv.0" for block in range(20) for layer in range(6)]
    dense += [f"RDBs.{block}.LFF" for block in range(20)]
    dense += ["SFENet1", "SFENet2", "GFF.0", "GFF.1", "UPNet.0", "UPNet.2"]
    assert set(keys["rdn"]) == {f"{key}.{part}" for key in dense for part in ("weight", "bias")}

    attention = [f"body.{g}.body.{b}.body.{k}" for g in range(2) for b in range(2) for k in ("0", "2")]
    attention += [f"body.{g}.body.{b}.body.3.conv_du.{k}" for g in range(2) for b in range(2) for k in ("0", "2")]
    attention += ["body.0.body.2", "body.1.body.2", "body.2", "head.0", "tail.0.0", "tail.1"]
    assert set(keys["rcan"]) == {f"{key}.{part}" for key in attention for part in ("weight", "bias")} | set(means)


def test_rdn_upsampling_by_four_has_two_shuffles() -> None:
    keys = {key for key in small("rdn", scale=4).state_dict() if key.startswith("UPNet")}
    assert keys == {f"UPNet.{layer}.{part}" for layer in (0, 2, 4) for part in ("weight", "bias")}


@pytest.mark.parametrize("config, shape", [("A", (20, 6, 32)), ("B", (16, 8, 64))])
def test_rdn_configurations(config: str, shape: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        encoder = make_model({"name": "rdn", "args": {"RDNconfig": config, "no_upsampling": True}})
    block = encoder.RDBs[0]
    assert (len(encoder.RDBs), len(block.convs), block.convs[0].conv[0].out_channels) == shape
    assert encoder.out_dim == 64


@pytest.mark.parametrize("name", ["edsr-baseline", "edsr", "rcan"])
def test_mean_colors_are_there_but_never_applied(name: str) -> None:
    encoder = small(name, no_upsampling=True, rgb_range=255)
    mean = torch.tensor([0.4488, 0.4371, 0.4040]).double() * 255
    torch.testing.assert_close(encoder.sub_mean.bias, -mean)
    torch.testing.assert_close(encoder.add_mean.bias, mean)
    assert torch.equal(encoder.sub_mean.weight[:, :, 0, 0], torch.eye(3).double())
    assert not any(parameter.requires_grad for key, parameter in encoder.named_parameters() if "mean" in key)
    inp = torch.randn(1, 3, 8, 8).double()
    before = encoder(inp)
    with torch.no_grad():
        encoder.sub_mean.bias.fill_(9)
        encoder.add_mean.weight.fill_(9)
    assert torch.equal(encoder(inp), before)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("scale", "n_colors"), [(2, 3), (3, 1), (4, 4)])
def test_shapes(name: str, scale: int, n_colors: int) -> None:
    with torch.device("meta"):
        inp = torch.randn(2, n_colors, 7, 9).double()
        upsampling, plain = (small(name, n_colors=n_colors, **args) for args in ({"scale": scale}, UNSCALED))
    assert (upsampling.n_colors, upsampling.out_dim, upsampling.scale) == (n_colors, n_colors, scale)
    assert upsampling(inp).shape == (2, n_colors, 7 * scale, 9 * scale)
    assert (plain.n_colors, plain.scale) == (n_colors, 1)
    assert plain(inp).shape == (2, plain.out_dim, 7, 9)
    assert not any("tail" in key or "UPNet" in key for key in plain.state_dict())


def conv(x: Tensor, layer: nn.Module) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)


def test_edsr_computes_the_papers_formula() -> None:
    encoder = small("edsr", n_resblocks=1, res_scale=0.5, scale=3)
    inp = torch.randn(1, 3, 5, 6).double()
    head = conv(inp, encoder.head[0])
    block = encoder.body[0].body
    residual = head + 0.5 * conv(F.relu(conv(head, block[0])), block[2])
    body = conv(residual, encoder.body[1]) + head
    upsampled = F.pixel_shuffle(conv(body, encoder.tail[0][0]), 3)
    torch.testing.assert_close(encoder(inp), conv(upsampled, encoder.tail[1]))


def test_rcan_computes_the_papers_formula() -> None:
    encoder = small("rcan", n_resgroups=1, n_resblocks=1, no_upsampling=True)
    inp = torch.randn(2, 3, 5, 6).double()
    head = conv(inp, encoder.head[0])
    block = encoder.body[0].body[0].body
    features = conv(F.relu(conv(head, block[0])), block[2])
    squeeze, excite = block[3].conv_du[0], block[3].conv_du[2]
    factor = torch.sigmoid(conv(F.relu(conv(features.mean((2, 3), keepdim=True), squeeze)), excite))
    group = conv(features * factor + head, encoder.body[0].body[1]) + head
    torch.testing.assert_close(encoder(inp), conv(group, encoder.body[1]) + head)


@pytest.mark.parametrize("args", [UNSCALED, {"n_resblocks": 5}, {"scale": 3}, {"scale": 4}, {"scale": 8}])
def test_edsrs_halo_is_the_receptive_field(args: dict[str, object]) -> None:
    check_halo(small("edsr-baseline", **args))


@pytest.mark.parametrize("args", [UNSCALED, {"scale": 2}, {"RDNkSize": 1, **UNSCALED}])
def test_rdns_halo_is_the_receptive_field(args: dict[str, object]) -> None:
    encoder = small("rdn", **args)
    # 18 of the 20 blocks return their input, so that small images are large enough for the rest.
    for block in encoder.RDBs[2:]:
        nn.init.zeros_(block.LFF.weight)
    radius = encoder.SFENet1.kernel_size[0] // 2
    # With positive weights no change is canceled or stopped by a ReLU.
    check_halo(encoder, encoder.halo - radius * 18 * 6)


def check_halo(encoder: nn.Module, halo: int | None = None) -> None:
    """A change `halo` + 1 pixels away has no effect; one `halo` - 2 away has (a tail's radius is rounded up)."""
    halo = encoder.halo if halo is None else halo
    for parameter in encoder.parameters():
        parameter.data.abs_()
    side = 2 * halo + 3
    inp = torch.rand(1, 3, side, 5).double()
    changed = inp.clone()
    changed[:, :, 0] += 1
    with torch.no_grad():
        difference = (encoder(changed) - encoder(inp)).abs().amax((0, 1, 3)).view(side, -1).amax(1)
    assert (difference[halo + 1 :] == 0).all(), "the halo is smaller than the receptive field"
    assert (difference[: max(halo - 1, 1)] > 0).all(), "the halo is larger than the receptive field"


def test_rcan_reads_the_whole_image() -> None:
    encoder = small("rcan", no_upsampling=True)
    assert encoder.halo is None
    inp = torch.rand(1, 3, 64, 5).double()
    changed = inp.clone()
    changed[:, :, 0] += 1
    assert (encoder(changed) != encoder(inp))[:, :, -1].any()


@pytest.mark.parametrize("name", SMALL)
def test_inputs_are_not_changed(name: str) -> None:
    inp = torch.randn(1, 3, 6, 6).double()
    kept = inp.clone()
    small(name, no_upsampling=True)(inp)
    assert torch.equal(inp, kept)


@pytest.mark.parametrize(
    "name, args, words",
    [
        ("edsr-baseline", {"scale": 5}, "not by 5"),
        ("edsr-baseline", {"scale": 0}, "not by 0"),
        ("rcan", {"scale": 6}, "not by 6"),
        ("rdn", {"scale": 8}, "not by 8"),
        ("rdn", {"RDNconfig": "C"}, "not 'C'"),
        ("rcan", {"reduction": 100}, "not be 100"),
    ],
)
def test_bad_arguments_are_refused(name: str, args: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small(name, **args)
