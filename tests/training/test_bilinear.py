"""The start as bilinear interpolation."""

import pytest
import torch
import torch.nn.functional as F

from liif_fast.models import make_model
from liif_fast.models.coordinates import make_cell, make_coord
from liif_fast.training.bilinear import start_as_bilinear


def model(hidden=(8, 8), **args):
    encoder = {"name": "edsr-baseline", "args": {"n_resblocks": 1, "n_feats": 8, "no_upsampling": True}}
    imnet = {"name": "mlp", "args": {"out_dim": 3, "hidden_list": list(hidden)}}
    torch.manual_seed(3)
    return make_model({"name": "liif", "args": {"encoder_spec": encoder, "imnet_spec": imnet, **args}})


@pytest.mark.parametrize("flags", [{}, {"feat_unfold": False}, {"cell_decode": False}])
@pytest.mark.parametrize("hidden", [(6,), (16, 12, 9)])
def test_a_start_without_residual_is_bilinear_interpolation(flags, hidden):
    net = model(hidden, **flags)
    start_as_bilinear(net, residual=0.0)
    inp = torch.rand(2, 3, 7, 9) * 2 - 1
    coord = make_coord((19, 23)).expand(2, -1, 2)
    with torch.no_grad():
        out = net(inp, coord, make_cell(coord, (19, 23))).transpose(1, 2)
    grid = coord.flip(-1)[:, None]
    expected = F.grid_sample(inp, grid, mode="bilinear", padding_mode="border", align_corners=False)[:, :, 0]
    # At the image's border the four corners are not four different latents, and LIIF's weights differ.
    inside = (coord[0, :, 0].abs() < 1 - 1 / 7) & (coord[0, :, 1].abs() < 1 - 1 / 9)
    assert torch.allclose(out[..., inside], expected[..., inside], atol=1e-5)


def test_every_parameter_can_learn_from_the_start():
    net = model()
    start_as_bilinear(net)
    coord = torch.rand(1, 40, 2) * 2 - 1
    out = net(torch.rand(1, 3, 8, 8) * 2 - 1, coord, make_cell(coord, (20, 20)))
    (out - torch.rand_like(out)).abs().mean().backward()
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, name


@pytest.mark.parametrize(("hidden", "args"), [((8,), {"local_ensemble": False}), ((5,), {})])
def test_models_of_another_structure_are_refused(hidden, args):
    with pytest.raises(ValueError, match="leave init out for this model"):
        start_as_bilinear(model(hidden, **args))
