"""Small models, images and queries that the tests of models share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liif_fast.models import LIIF, MetaSR, make_model

ENCODER = {"name": "edsr-baseline", "args": {"n_resblocks": 1, "n_feats": 4, "no_upsampling": True}}
IMNET = {"name": "mlp", "args": {"out_dim": 3, "hidden_list": [12, 8]}}


def liif(**args: Any) -> LIIF:
    torch.manual_seed(0)
    model = make_model({"name": "liif", "args": {"encoder_spec": ENCODER, "imnet_spec": IMNET}}, args=args)
    assert isinstance(model, LIIF)
    return model.double()


def metasr() -> MetaSR:
    torch.manual_seed(0)
    model = make_model({"name": "metasr", "args": {"encoder_spec": ENCODER}})
    assert isinstance(model, MetaSR)
    return model.double()


def queries(count: int = 29, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    coord = torch.rand(batch, count, 2, generator=generator, dtype=torch.float64) * 2 - 1
    return coord, torch.rand(batch, count, 2, generator=generator, dtype=torch.float64) * 0.4


def image(batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, 6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2 - 1
