"""`init: bilinear`: the weights with which an untrained LIIF equals bilinear interpolation and can still learn."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from liif_fast.models import LIIF, linear_layers


@torch.no_grad()
def start_as_bilinear(model: nn.Module, residual: float = 0.1) -> None:
    """Set the weights of a new LIIF so that its output is close to bilinear interpolation; exact for residual 0.

    The first three channels of the encoder carry the input's colors (EDSR adds its head to its body). The imnet passes
    the colors of the nearest latent through, x as relu(x) - relu(-x), and the local ensemble blends the four corners:
    bilinear interpolation. All other weights stay random, and `residual` scales their contribution to the output.
    Raises ValueError for models with another structure.
    """
    linears = linear_layers(model.imnet) if isinstance(model, LIIF) else None
    encoder = getattr(model, "encoder", None)
    fits = linears is not None and len(linears) > 1 and all(linear.out_features >= 6 for linear in linears[:-1])
    fits = fits and linears[-1].out_features == 3 and model.local_ensemble and hasattr(encoder, "head")  # type: ignore
    if not fits or not isinstance(encoder.head[0], nn.Conv2d) or not getattr(encoder, "no_upsampling", False):  # type: ignore
        raise ValueError(
            "init is 'bilinear', which needs a liif with local ensemble, an edsr encoder without upsampling and an mlp "
            "with 3 outputs and hidden layers (at least one) of 6 or more units; leave init out for this model"
        )
    liif = cast(Any, model)
    layers = cast("list[nn.Linear]", linears)
    head, tail = liif.encoder.head[0], liif.encoder.body[-1]
    head.weight[:3] = 0
    head.bias[:3] = 0
    head.weight[range(3), range(3), 1, 1] = 1
    for tensor in (tail.weight, tail.bias):
        tensor.mul_(residual)[:3] = 0
    places, center = (9, 4) if liif.feat_unfold else (1, 0)
    for layer in layers[:-1]:
        layer.weight[:6] = 0
        layer.bias[:6] = 0
        if layer is layers[0]:
            for color in range(3):
                layer.weight[2 * color, color * places + center] = 1
                layer.weight[2 * color + 1, color * places + center] = -1
        else:
            layer.weight[range(6), range(6)] = 1
    last = layers[-1]
    last.weight.mul_(residual)[:, :6] = 0
    last.bias.zero_()
    last.weight[range(3), range(0, 6, 2)] = 1
    last.weight[range(3), range(1, 6, 2)] = -1
