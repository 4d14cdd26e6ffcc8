"""The runs that benchmarks time: a decode, a training step and a whole upscaling, by the original and by the ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import liif_fast
from liif_fast import ops
from liif_fast.benchmark import original
from liif_fast.benchmark.problem import DecodeProblem
from liif_fast.images.upscaling import upscale

Run = Callable[[], Any]  # -> Tensor or list of Tensors
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_PHOTO = Path(liif_fast.__file__).parent / "assets" / "demo.png"


def is_16_bit(dtype: str) -> bool:
    """Whether `dtype` (a key of DTYPES) has 16 bits."""
    return DTYPES[dtype].itemsize == 2


@contextmanager
def matmul_in(dtype: str, device: torch.device, *, autocast: bool = True) -> Iterator[None]:
    """Multiply float32 tensors in `dtype` inside the block: 16 bits by autocast, tf32 by PyTorch's switch."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = dtype == "tf32"
    enabled = autocast and is_16_bit(dtype)
    try:
        with torch.autocast(device.type, dtype=DTYPES[dtype] if enabled else None, enabled=enabled):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def original_decode(
    problem: DecodeProblem, dtype: str, *, chunk: int = original.CHUNK, query: Callable[..., Tensor] = original.query
) -> Run:
    """The original decode, `chunk` queries at a time; `query` may be a compiled `original.query`."""
    feat, coord, cell, weights, biases = problem
    imnet = original.make_imnet(weights, biases)

    def run() -> Tensor:
        with matmul_in(dtype, feat.device):
            return original.predict(feat, coord, cell, imnet, chunk=chunk, query=query)

    return run


def fused_decode(problem: DecodeProblem, dtype: str, size: tuple[int, int], backend: str | None = None) -> Run:
    """`ops.render` of a size (rows, columns), with tensors of `dtype`."""
    feat, _, _, weights, biases = problem.to(DTYPES[dtype])

    def run() -> Tensor:
        with torch.no_grad(), matmul_in(dtype, feat.device, autocast=False):
            return ops.render(feat, size, weights, biases, backend=backend)

    return run


def original_training(
    problem: DecodeProblem, dtype: str, *, passes: str = "both", query: Callable[..., Tensor] = original.query
) -> Run:
    """The original decoder with gradients of feat and of all layers; `query` may be a compiled `original.query`."""
    feat, _, _, weights, biases = problem.with_gradients()
    imnet = original.make_imnet(weights, biases)
    layers = [layer for layer in imnet if isinstance(layer, nn.Linear)]
    leaves = [feat, *(layer.weight for layer in layers), *(layer.bias for layer in layers)]

    def forward() -> Tensor:
        with matmul_in(dtype, feat.device):
            return query(feat, problem.coord, problem.cell, imnet)

    return with_passes(forward, leaves, passes, dtype)


def training(
    problem: DecodeProblem, dtype: str, *, passes: str = "both", query: Callable[..., Tensor] = ops.query
) -> Run:
    """Any decoder with the signature of `ops.query`, with gradients; float32 leaves, multiplied in `dtype`."""
    problem = problem.with_gradients()

    def forward() -> Tensor:
        with matmul_in(dtype, problem.feat.device):
            return query(*problem)

    return with_passes(forward, problem.leaves(), passes, dtype)


def with_passes(
    forward: Callable[[], Tensor], leaves: Sequence[Tensor], passes: str = "both", dtype: str = "float32"
) -> Run:
    """`forward`, the backward alone (repeated after one forward), or both; gradients of sum(out * probe)."""
    if passes == "forward":
        return forward
    probe = probe_for(forward())

    def backward(out: Tensor, keep_graph: bool) -> list[Tensor]:
        with matmul_in(dtype, out.device, autocast=False):
            return list(torch.autograd.grad(out, leaves, probe, retain_graph=keep_graph))

    if passes == "both":
        return lambda: backward(forward(), False)
    kept = forward()
    return lambda: backward(kept, True)


def probe_for(out: Tensor) -> Tensor:
    """A random tensor of the output's shape and dtype, the same every time."""
    generator = torch.Generator(device=out.device).manual_seed(1)
    return torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)


def flat(result: Tensor | list[Tensor]) -> Tensor:
    """The result of a run as float64 numbers in one row, images in the order of their queries [B, Q, O]."""
    if isinstance(result, list):
        return torch.cat([part.double().flatten() for part in result])
    if result.dim() == 4 and result.shape[1] == 3:
        result = result.flatten(2).transpose(1, 2)
    return result.detach().double().flatten()


def photo(device: torch.device) -> Tensor:
    """The shipped photo, [3, H, W] in [0, 1]."""
    with Image.open(_PHOTO) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float().div(255).to(device)


def original_upscale(model: Any, image: Tensor, size: tuple[int, int], dtype: str) -> Run:
    """Encoder, then the original decoder in chunks, as the demo of the public code; 16 bits by autocast."""
    height, width = size

    def run() -> Tensor:
        with torch.no_grad(), matmul_in(dtype, image.device):
            feat = model.encoder((image.unsqueeze(0) - 0.5) / 0.5)
            coord = original.make_coord(height, width, image).view(1, -1, 2)
            out = original.predict(feat, coord, original.make_cell(height, width, coord), model.imnet)
            return (out * 0.5 + 0.5).clamp_(0, 1)[0].view(height, width, -1).permute(2, 0, 1)

    return run


def fused_upscale(model: Any, image: Tensor, size: tuple[int, int], dtype: str, backend: str | None = None) -> Run:
    """`liif_fast.upscale`; 16 bits by autocast."""

    def run() -> Tensor:
        with matmul_in(dtype, image.device, autocast=False):
            return upscale(image, size=size, model=model, backend=backend, dtype=DTYPES[dtype], device=image.device)

    return run
