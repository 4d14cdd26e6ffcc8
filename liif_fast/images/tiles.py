"""Running a model over an image in tiles: bounded memory, the same result.

An output window needs a part of the feature map. That part needs a part of the input, larger on each side by the
encoder's receptive field (`encoder.halo`). Inside the image the halo holds real pixels, and the features changed by the
convolutions' zero padding are cut off. At the border of the image the padding is the same as for the whole image. So
there are no seams, and the tiled result agrees with the untiled one up to rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from liif_fast.models import default_data_norm
from liif_fast.ops import validation
from liif_fast.utils.normalization import normalizations

DEFAULT_MEMORY = 256 << 20

# An encoder holds about this many copies of the input and output of its widest layer, reordered copies of convolutions
# included: measured on EDSR and RDN.
_LIVE_COPIES = 3
# An output pixel takes three floats in a decoding step, and as many again for their conversion.
_OUTPUT_PIXEL_BYTES = 2 * 3 * 4
_LEAST_SIDE = 32  # latents; a smaller tile would be nearly all halo


class Source(NamedTuple):
    """The image to decode.

    read(top, bottom, left, right): these rows and columns, float32 in [0, 1], [B, C, bottom - top, right - left] with
        C = channels or 1.
    """

    batch: int
    channels: int
    height: int
    width: int
    read: Callable[[int, int, int, int], Tensor]


Write = Callable[[int, int, Tensor], None]
"""write(top, left, pixels): takes [B, channels, h, w], float32 in [0, 1], whose first output pixel is (top, left)."""


class Window(NamedTuple):
    """A part of the output, in its pixels."""

    top: int
    left: int
    height: int
    width: int


def run(model: Any, source: Source, size: tuple[int, int], write: Write, *, memory: int, dtype: torch.dtype) -> None:
    """Decode `source` as an image of `size` (rows, columns) and pass every window of it to `write` once.

    Args:
        model: with `encoder`, `feat` and `render`, in eval mode; its `data_norm` is applied here.
        source: the image.
        size: of the output in pixels.
        write: receives the windows.
        memory: target in bytes, not counting the model, the source and the output. More is used if a tile would be
            smaller than its halo, or if the encoder depends on the whole image (`halo` None) and is not tiled.
        dtype: of the encoder's input.
    """
    device = next(model.parameters()).device
    encoder_scale = getattr(model.encoder, "scale", 1)
    # Without an imnet the nearest feature is the output. If two features are equally near, the rounding of coordinates
    # selects one, and it differs between the whole map and a part. So such a map is not tiled.
    samples_nearest = getattr(model, "imnet", model) is None
    halo = None if samples_nearest else getattr(model.encoder, "halo", None)
    latents = source.height * encoder_scale, source.width * encoder_scale
    inp, gt = normalizations({**default_data_norm(), **(getattr(model, "data_norm", None) or {})}, device)
    area = max(1, memory // (bytes_per_latent(model, dtype) * source.batch))
    for window in plan(size, latents, halo=None if halo is None else halo * encoder_scale, area=area):
        rows = _needed_latents(window.top, window.height, size[0], latents[0])
        cols = _needed_latents(window.left, window.width, size[1], latents[1])
        top, bottom = _with_halo(rows, source.height, halo, encoder_scale)
        left, right = _with_halo(cols, source.width, halo, encoder_scale)
        model.feat = None  # frees the features of the last tile before the next ones are computed
        pixels = source.read(top, bottom, left, right).expand(-1, source.channels, -1, -1)
        pixels = inp.normalize(pixels.to(device)).to(dtype)
        feat = model.encoder(pixels.contiguous(memory_format=torch.channels_last))
        top, left = top * encoder_scale, left * encoder_scale
        model.feat = feat[:, :, rows[0] - top : rows[1] - top, cols[0] - left : cols[1] - left]
        del pixels, feat
        step = max(1, memory // (8 * _OUTPUT_PIXEL_BYTES * source.batch * window.width))
        for row in range(window.top, window.top + window.height, step):
            part = Window(row, window.left, min(step, window.top + window.height - row), window.width)
            out = model.render(size, window=part, feat_region=(rows[0], cols[0], *latents))
            write(part.top, part.left, gt.restore(out.float()).clamp_(0, 1))


def plan(size: tuple[int, int], latents: tuple[int, int], *, halo: int | None, area: int) -> list[Window]:
    """Cover an output with windows whose part of the feature map, halo included, has about `area` latents.

    The windows are whole rows if these can be higher than their halo, otherwise tiles. Tiles are never smaller than the
    halo, because then most of the work would be the halo's.
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
    """An estimate of the memory that encoding and folding need per latent of a tile."""
    convolutions = [m for m in model.encoder.modules() if isinstance(m, nn.Conv2d)]  # type: ignore[union-attr]
    widest = max((m.in_channels + m.out_channels for m in convolutions), default=64)
    outputs = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
    folded = 2 * max(outputs, default=0)  # the latent map, and the convolution's result from which it is made
    return dtype.itemsize * max(_LIVE_COPIES * widest, folded + widest)


def _cut(length: int, parts: int) -> list[tuple[int, int]]:
    """[0, length) in at most `parts` nearly equal, non-empty parts."""
    parts = min(parts, length)
    return list(itertools.pairwise(length * i // parts for i in range(parts + 1)))


def _needed_latents(first: int, count: int, pixels: int, latents: int) -> tuple[int, int]:
    """The latents [from, to) that `count` output pixels from `first` may read along an axis.

    The center of a pixel is at (p + 0.5) * latents / pixels - 0.5. Its corners are less than one latent away. MetaSR's
    single corner may be half an output pixel farther away. Unfolding reads one more latent, and the rounding of
    coordinates may reach another one.
    """
    reach = 3 + math.ceil(latents / pixels / 2)
    low, high = validation.latent_range(first, count, pixels, latents, reach)
    return low, high + 1


def _with_halo(span: tuple[int, int], length: int, halo: int | None, encoder_scale: int) -> tuple[int, int]:
    """The input pixels [from, to) on which the latents of a span depend; without a halo the span is the whole map."""
    return max(0, span[0] // encoder_scale - (halo or 0)), min(length, -(-span[1] // encoder_scale) + (halo or 0))
