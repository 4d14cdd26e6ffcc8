"""A start that already interpolates: fresh LIIF weights set to exact bilinear interpolation, plus room to learn."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from liif_fast.models import LIIF, linear_layers


@torch.no_grad()
def start_as_bilinear(model: nn.Module, residual: float = 0.1) -> None:
    """Set a fresh LIIF's weights so that it is exactly bilinear interpolation and learns the difference from there.

    The encoder's first three channels carry the input colours (EDSR adds its head to its body); the imnet passes the
    nearest latent's colours through, x as relu(x) - relu(-x), and the local ensemble blends the four corners, which is
    bilinear interpolation. Everything else keeps its random start, scaled by `residual` on its way to the output.
    Raises ValueError for models of another shape.
    """
    linears = linear_layers(model.imnet) if isinstance(model, LIIF) else None
    encoder = getattr(model, "encoder", None)
    fits = linears is not None and len(linears) > 1 and all(linear.out_features >= 6 for linear in linears[:-1])
    fits = fits and linears[-1].out_features == 3 and model.local_ensemble and hasattr(encoder, "head")  # type: ignore
    if not fits or not isinstance(encoder.head[0], nn.Conv2d) or not getattr(encoder, "no_upsampling", False):  # type: ignore
        raise ValueError(
            "a bilinear start needs a liif with local ensemble on an edsr encoder without upsampling and an mlp of at "
            "least one hidden layer, 6 wide or wider, and 3 outputs; set bilinear_start=False for this model"
        )
    liif = cast(Any, model)
    head, tail = liif.encoder.head[0], liif.encoder.body[-1]
    head.weight[:3] = 0
    head.bias[:3] = 0
    head.weight[range(3), range(3), 1, 1] = 1
    for tensor in (tail.weight, tail.bias):
        tensor.mul_(residual)[:3] = 0
    layers: list[nn.Linear] = linears  # type: ignore[assignment]
    places, centre = (9, 4) if liif.feat_unfold else (1, 0)
    for layer in layers[:-1]:
        layer.weight[:6] = 0
        layer.bias[:6] = 0
        if layer is layers[0]:
            for colour in range(3):
                layer.weight[2 * colour, colour * places + centre] = 1
                layer.weight[2 * colour + 1, colour * places + centre] = -1
        else:
            layer.weight[range(6), range(6)] = 1
    last = layers[-1]
    last.weight.mul_(residual)[:, :6] = 0
    last.bias.zero_()
    last.weight[range(3), range(0, 6, 2)] = 1
    last.weight[range(3), range(1, 6, 2)] = -1
