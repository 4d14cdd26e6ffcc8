"""Running a model over an image in tiles: bounded memory, the same result.

An output window needs a part of the feature map, and that part needs a part of the input: as many pixels more on each
side as the encoder's receptive field reaches (`encoder.halo`). Inside the image these are real pixels, and what the
convolutions' zero padding has touched is cut off again; at the image's own border the padding is what the whole image
would have seen. So tiles meet without seams, and agree with the untiled result up to rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from liif_fast.ops.validation import latent_range

DEFAULT_MEMORY = 256 << 20

# Copies of its widest layer's input and output that an encoder holds at once: measured on EDSR and RDN, with the
# convolutions' own reordered copies.
_LIVE_COPIES = 3
# Output pixels of one decoding step take three floats and as many again while they are converted.
_OUTPUT_PIXEL_BYTES = 2 * 3 * 4
_LEAST_SIDE = 32  # latents; below this a tile is nearly all halo


class Source(Protocol):
    """Where tiles come from."""

    batch: int
    height: int
    width: int

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        """These rows and columns, [B, n_colors, bottom - top, right - left] float32 in [0, 1]."""


Write = Callable[[int, int, Tensor], None]
"""write(top, left, pixels): takes [B, n_colors, h, w], float32 in [0, 1], that begins at (top, left) of the output."""


class Window(NamedTuple):
    """A part of the output, in its pixels."""

    top: int
    left: int
    height: int
    width: int


def run(model: Any, source: Source, size: tuple[int, int], write: Write, *, memory: int, dtype: torch.dtype) -> None:
    """Decode `source` as an image of `size` (rows, columns) and hand every window of it to `write` once.

    Args:
        model: with `encoder`, `feat` and `render`, in eval mode; its `data_norm` is applied here.
        source: the image.
        size: of the output in pixels.
        write: receives the windows.
        memory: bytes to aim at beside the model, the source and what `write` keeps. A tile's side is never below its
            halo, nor is an encoder that sees the whole image (`halo` None) tiled: then it takes more.
        dtype: of the encoder's input.
    """
    device = next(model.parameters()).device
    fineness = getattr(model.encoder, "scale", 1)
    # Without an imnet the nearest feature is taken, and which of two equally near ones depends on how coordinates of
    # the whole map or of a part are rounded: such a map is not cut.
    samples_nearest = getattr(model, "imnet", model) is None
    halo = None if samples_nearest else getattr(model.encoder, "halo", None)
    latents = source.height * fineness, source.width * fineness
    inp, gt = _Affine(model, "inp", device), _Affine(model, "gt", device)
    area = max(1, memory // (bytes_per_latent(model, dtype) * source.batch))
    for window in plan(size, latents, halo=None if halo is None else halo * fineness, area=area):
        rows = _reached(window.top, window.height, size[0], latents[0])
        cols = _reached(window.left, window.width, size[1], latents[1])
        top, bottom = _with_halo(rows, source.height, halo, fineness)
        left, right = _with_halo(cols, source.width, halo, fineness)
        model.feat = None  # the last tile's features need not outlive the making of the next ones
        pixels = inp.normalised(source.read(top, bottom, left, right).to(device)).to(dtype)
        feat = model.encoder(pixels.contiguous(memory_format=torch.channels_last))
        top, left = top * fineness, left * fineness
        model.feat = feat[:, :, rows[0] - top : rows[1] - top, cols[0] - left : cols[1] - left]
        del pixels, feat
        step = max(1, memory // (8 * _OUTPUT_PIXEL_BYTES * source.batch * window.width))
        for row in range(window.top, window.top + window.height, step):
            part = Window(row, window.left, min(step, window.top + window.height - row), window.width)
            out = model.render(size, window=part, feat_region=(rows[0], cols[0], *latents))
            write(part.top, part.left, gt.restored(out.float()).clamp_(0, 1))


def plan(size: tuple[int, int], latents: tuple[int, int], *, halo: int | None, area: int) -> list[Window]:
    """Cut an output into windows whose part of the feature map, halo included, has about `area` latents.

    Bands of whole rows where they can be higher than their halo; otherwise tiles, never smaller than the halo, as most
    of the work would be spent on it.
    """
    height, width = latents
    if halo is None or height * width <= area:
        return [Window(0, 0, *size)]
    least = max(halo, _LEAST_SIDE)
    rows, cols = area // width - 2 * halo, width
    if rows < least:
        rows = cols = max(math.isqrt(area) - 2 * halo, least)
    tops, lefts = (
        _cut(pixels, -(-length // step)) for pixels, length, step in zip(size, latents, (rows, cols), strict=True)
    )
    return [Window(top, left, bottom - top, right - left) for top, bottom in tops for left, right in lefts]


def bytes_per_latent(model: nn.Module, dtype: torch.dtype) -> int:
    """An estimate of what encoding and folding hold at once for every latent of a tile."""
    convolutions = [m for m in model.encoder.modules() if isinstance(m, nn.Conv2d)]  # type: ignore[union-attr]
    widest = max((m.in_channels + m.out_channels for m in convolutions), default=64)
    outputs = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
    folded = 2 * max(outputs, default=0)  # the latent map and the convolution's result it comes from
    return dtype.itemsize * max(_LIVE_COPIES * widest, folded + widest)


class _Affine:
    """One half of a model's data_norm: x -> (x - sub) / div and back, per channel."""

    def __init__(self, model: nn.Module, which: str, device: torch.device) -> None:
        norm = getattr(model, "data_norm", None) or {}
        entry = norm.get(which) or {"sub": [0.5], "div": [0.5]}
        self.sub, self.div = (torch.tensor(entry[key], device=device).view(1, -1, 1, 1) for key in ("sub", "div"))

    def normalised(self, pixels: Tensor) -> Tensor:
        return (pixels - self.sub) / self.div

    def restored(self, pixels: Tensor) -> Tensor:
        return pixels * self.div + self.sub


def _cut(length: int, parts: int) -> list[tuple[int, int]]:
    """[0, length) in at most `parts` nearly equal, non-empty parts."""
    parts = min(parts, length)
    return list(itertools.pairwise(length * i // parts for i in range(parts + 1)))


def _reached(first: int, count: int, pixels: int, latents: int) -> tuple[int, int]:
    """The latents [from, to) that `count` output pixels from `first` may read along an axis.

    A pixel's centre is at (p + 0.5) * latents / pixels - 0.5. Its corners lie less than one latent away, MetaSR's
    single one half an output pixel further; unfolding takes one more, and one more is for the rounding of coordinates.
    """
    reach = 3 + math.ceil(latents / pixels / 2)
    low, high = latent_range(first, count, pixels, latents, reach)
    return low, high + 1


def _with_halo(span: tuple[int, int], length: int, halo: int | None, fineness: int) -> tuple[int, int]:
    """The input pixels [from, to) that the latents of a span see. Without a halo the span is the whole map already."""
    return max(0, span[0] // fineness - (halo or 0)), min(length, -(-span[1] // fineness) + (halo or 0))
