"""Whole models as workloads: the encoder alone, and a photo from pixels to pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import liif_fast
from bench import original
from bench.workloads import HIDDEN, OUTS, Problem, Workload
from liif_fast.models import make_model

_SPEC = {
    "name": "liif",
    "args": {
        "encoder_spec": {"name": "edsr-baseline", "args": {"no_upsampling": True}},
        "imnet_spec": {"name": "mlp", "args": {"out_dim": OUTS, "hidden_list": list(HIDDEN)}},
    },
}
_PHOTO = Path(liif_fast.__file__).parent / "assets" / "demo.png"


def photo(size: tuple[int, int]) -> Tensor:
    """The middle of the shipped photo, [3, H, W] in [0, 1]."""
    with Image.open(_PHOTO) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    top, left = ((pixels.shape[1] - size[0]) // 2, (pixels.shape[2] - size[1]) // 2)
    return pixels[:, top : top + size[0], left : left + size[1]].contiguous()


def make_liif(dtype: torch.dtype) -> Any:
    """LIIF-EDSR-baseline with random weights, the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make_model(_SPEC).to(dtype).eval()


def encode(workload: Workload, problem: Problem, autocast: bool = False) -> tuple[Any, str]:
    """The encoder, in the dtype of the problem's features or under autocast."""
    dtype = problem.feat.dtype
    encoder = make_liif(dtype).encoder
    inp = (photo(workload.map_size).to(dtype) * 2 - 1).unsqueeze(0)

    def run() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return encoder(inp)

    return run, ""


def upscale_original(workload: Workload, problem: Problem) -> tuple[Any, str]:
    """Encoder, then the original decoder in chunks, as the public code's demo does it."""
    dtype = problem.feat.dtype
    model = make_liif(dtype)
    image = photo(workload.map_size).to(dtype)
    assert workload.out_size is not None
    height, width = workload.out_size

    def run() -> Tensor:
        with torch.no_grad():
            feat = model.encoder((image.unsqueeze(0) - 0.5) / 0.5)
            coord = original.make_coord(height, width, image).view(1, -1, 2)
            cell = torch.ones_like(coord) * coord.new_tensor([2 / height, 2 / width])
            out = original.predict(feat, coord, cell, model.imnet)
            return (out * 0.5 + 0.5).clamp_(0, 1)[0].view(height, width, OUTS).permute(2, 0, 1)

    return run, ""


def upscale(workload: Workload, problem: Problem, dtype: torch.dtype) -> tuple[Any, str]:
    """`liif_fast.upscale` on the cpu backend; 16 bits by autocast."""
    from liif_fast.upscale import upscale as upscale_image

    model = make_liif(torch.float32)
    image = photo(workload.map_size)

    def run() -> Tensor:
        return upscale_image(image, size=workload.out_size, model=model, backend="cpu", dtype=dtype)

    return run, ""
