"""Whole models as workloads: the encoder alone, and a photo from pixels to pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import liif_fast
from bench.method import Job, Prepared, multiply_in
from liif_fast.benchmark import original
from liif_fast.benchmark.problem import HIDDEN, OUTS
from liif_fast.benchmark.yardsticks import DTYPES, precision
from liif_fast.models import make_model

_SPEC = {
    "name": "liif",
    "args": {
        "encoder_spec": {"name": "edsr-baseline", "args": {"no_upsampling": True}},
        "imnet_spec": {"name": "mlp", "args": {"out_dim": OUTS, "hidden_list": list(HIDDEN)}},
    },
}
_PHOTO = Path(liif_fast.__file__).parent / "assets" / "demo.png"


def photo(job: Job) -> Tensor:
    """The middle of the shipped photo, repeated where it is too small, [3, H, W] in [0, 1], in the problem's dtype."""
    height, width = job.workload.map_size
    with Image.open(_PHOTO) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    pixels = pixels.repeat(1, -(-height // pixels.shape[1]), -(-width // pixels.shape[2]))
    top, left = ((pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2)
    part = pixels[:, top : top + height, left : left + width].contiguous()
    return part.to(job.device, job.problem.feat.dtype)


def make_liif(job: Job) -> Any:
    """LIIF-EDSR-baseline with random weights, the same every time, in the problem's dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make_model(_SPEC).to(job.device, job.problem.feat.dtype).eval()


def encode(job: Job, dtype: str = "float32") -> Prepared:
    """The encoder in PyTorch, 16 bits by autocast."""
    encoder = make_liif(job).encoder
    inp = (photo(job) * 2 - 1).unsqueeze(0)

    def run() -> Tensor:
        with torch.no_grad(), multiply_in(dtype, job.device):
            return encoder(inp)

    return run, ""


def upscale_original(job: Job, dtype: str = "float32") -> Prepared:
    """Encoder, then the original decoder in chunks, as the public code's demo does it; 16 bits by autocast."""
    model = make_liif(job)
    image = photo(job)
    assert job.workload.out_size is not None
    height, width = job.workload.out_size

    def run() -> Tensor:
        with torch.no_grad(), multiply_in(dtype, job.device):
            feat = model.encoder((image.unsqueeze(0) - 0.5) / 0.5)
            coord = original.make_coord(height, width, image).view(1, -1, 2)
            out = original.predict(feat, coord, original.make_cell(height, width, coord), model.imnet)
            return (out * 0.5 + 0.5).clamp_(0, 1)[0].view(height, width, OUTS).permute(2, 0, 1)

    return run, ""


def upscale(job: Job, backend: str, dtype: str) -> Prepared:
    """`liif_fast.upscale`; 16 bits by autocast."""
    from liif_fast.images.upscaling import upscale as upscale_image

    model = make_liif(job)
    image = photo(job)

    def run() -> Tensor:
        with precision(dtype == "tf32"):
            return upscale_image(
                image, size=job.workload.out_size, model=model, backend=backend, dtype=DTYPES[dtype], device=job.device
            )

    return run, ""
