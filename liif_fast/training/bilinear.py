"""`init: bilinear`: the weights with which an untrained LIIF equals bilinear interpolation and can still learn."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from liif_fast.models import LIIF, linear_layers


@torch.no_grad()
def start_as_bilinear(model: nn.Module, residual: float = 0.1) -> None:
    """Set the weights of a new LIIF so that its output is close to bilinear interpolation; exact for residual 0.

    The first channels of the encoder carry the input's colors (EDSR adds its head to its body). The imnet passes
    the colors of the nearest latent through, x as relu(x) - relu(-x), and the local ensemble blends the four corners:
    bilinear interpolation. All other weights stay random, and `residual` scales their contribution to the output.
    Raises ValueError for models with another structure.
    """
    linears = linear_layers(model.imnet) if isinstance(model, LIIF) else None
    encoder = getattr(model, "encoder", None)
    n = linears[-1].out_features if linears else 0
    fits = len(linears or ()) > 1 and all(linear.out_features >= 2 * n for linear in linears[:-1])  # type: ignore
    fits = fits and model.local_ensemble and getattr(encoder, "no_upsampling", False)  # type: ignore
    head = encoder.head[0] if hasattr(encoder, "head") else None  # type: ignore
    if not fits or not isinstance(head, nn.Conv2d) or head.in_channels != n or head.out_channels < n:
        raise ValueError(
            "init is 'bilinear', which needs a liif with local ensemble, an edsr encoder without upsampling and an mlp "
            "whose outputs are the image's channels, with hidden layers (at least one) of twice as many units; leave "
            "init out for this model"
        )
    liif = cast(Any, model)
    layers = cast("list[nn.Linear]", linears)
    head, tail = liif.encoder.head[0], liif.encoder.body[-1]
    head.weight[:n] = 0
    head.bias[:n] = 0
    head.weight[range(n), range(n), 1, 1] = 1
    for tensor in (tail.weight, tail.bias):
        tensor.mul_(residual)[:n] = 0
    places, center = (9, 4) if liif.feat_unfold else (1, 0)
    for layer in layers[:-1]:
        layer.weight[: 2 * n] = 0
        layer.bias[: 2 * n] = 0
        if layer is layers[0]:
            for color in range(n):
                layer.weight[2 * color, color * places + center] = 1
                layer.weight[2 * color + 1, color * places + center] = -1
        else:
            layer.weight[range(2 * n), range(2 * n)] = 1
    last = layers[-1]
    last.weight.mul_(residual)[:, : 2 * n] = 0
    last.bias.zero_()
    last.weight[range(n), range(0, 2 * n, 2)] = 1
    last.weight[range(n), range(1, 2 * n, 2)] = -1
