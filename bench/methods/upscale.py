"""Methods of a whole model: a photo from pixels to pixels by LIIF-EDSR-baseline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.methods.method import Job, Prepared
from liif_fast.benchmark import runs
from liif_fast.benchmark.problem import HIDDEN, OUTS
from liif_fast.models import make_model

SPEC = {  # LIIF-EDSR-baseline
    "name": "liif",
    "args": {
        "encoder_spec": {"name": "edsr-baseline", "args": {"no_upsampling": True}},
        "imnet_spec": {"name": "mlp", "args": {"out_dim": OUTS, "hidden_list": list(HIDDEN)}},
    },
}


def _image(job: Job) -> Tensor:
    """The middle of the shipped photo, repeated where it is too small, [3, H, W] in [0, 1], in the problem's dtype."""
    height, width = job.workload.map_size
    pixels = runs.photo(job.device)
    pixels = pixels.repeat(1, -(-height // pixels.shape[1]), -(-width // pixels.shape[2]))
    top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
    return pixels[:, top : top + height, left : left + width].contiguous().to(job.problem.feat.dtype)


def _model(job: Job) -> Any:
    """LIIF-EDSR-baseline with random weights, the same every time, in the problem's dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make_model(SPEC).to(job.device, job.problem.feat.dtype).eval()


def upscale_original(job: Job, dtype: str = "float32") -> Prepared:
    assert job.workload.out_size is not None
    return runs.original_upscale(_model(job), _image(job), job.workload.out_size, dtype), ""


def upscale_fused(job: Job, backend: str, dtype: str) -> Prepared:
    assert job.workload.out_size is not None
    return runs.fused_upscale(_model(job), _image(job), job.workload.out_size, dtype, backend), ""
