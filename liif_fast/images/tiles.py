"""Running a model over an image in tiles: bounded memory, the same result.

An output window needs a part of the feature map. That part needs a part of the input, larger on each side by the
encoder's receptive field (`encoder.halo`). Inside the image the halo holds real pixels, and the features changed by the
convolutions' zero padding are cut off. At the border of the image the padding is the same as for the whole image. So
there are no seams, and the tiled result agrees with the untiled one up to rounding.

The image is read, and the output is written, in bands of rows from top to bottom.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from liif_fast.images.fill import fill_from_nearest
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
_FARTHEST_FILL = 256  # pixels; holes are filled from pixels within the model's reach, or this one if that is unlimited


class Source(NamedTuple):
    """The image to decode.

    read(top, bottom): prepares these rows, of which neither end ever decreases, and returns a function of (left, right)
        for their columns: float32 [B, C, bottom - top, right - left] with C = channels or 1. NaN is a hole.
    """

    batch: int
    channels: int
    height: int
    width: int
    read: Callable[[int, int], Callable[[int, int], Tensor]]
    has_holes: bool = False  # whether there may be any; the model takes the nearest values in their place
    keeps_holes: bool = False  # whether outputs whose nearest pixel is a hole are NaN


Write = Callable[[int, Tensor], None]
"""write(top, pixels): takes [B, channels, h, columns], float32 on the model's device: the rows from `top`, in order."""


class Window(NamedTuple):
    """A part of the output, in its pixels."""

    top: int
    left: int
    height: int
    width: int


class Turn(NamedTuple):
    """A turn or flip of an image: rows and columns change places, then axes are reversed."""

    transposes: bool = False
    flips: tuple[int, ...] = ()  # -2: rows, -1: columns

    def apply(self, image: Tensor) -> Tensor:
        return (image.transpose(-2, -1) if self.transposes else image).flip(self.flips)

    def undo(self, image: Tensor) -> Tensor:
        image = image.flip(self.flips)
        return image.transpose(-2, -1) if self.transposes else image

    def box(self, box: tuple[int, int, int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(top, left, height, width) after the turn of a part of an image of `size`."""
        order = (1, 0) if self.transposes else (0, 1)
        (row, height, rows), (col, width, cols) = ((box[axis], box[2 + axis], size[axis]) for axis in order)
        return (
            rows - row - height if -2 in self.flips else row,
            cols - col - width if -1 in self.flips else col,
            height,
            width,
        )


TURNS = [Turn(transposes, flips) for transposes in (False, True) for flips in ((), (-2,), (-1,), (-2, -1))]


def run(
    model: Any,
    source: Source,
    size: tuple[int, int],
    write: Write,
    *,
    memory: int,
    dtype: torch.dtype,
    ensemble: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Decode `source` as an image of `size` (rows, columns) and pass all its rows to `write`.

    Args:
        model: with `encoder`, `feat` and `render`, in eval mode; its `data_norm` is applied here, and `feat` assigned.
        source: the image.
        size: of the output in pixels.
        write: receives the rows.
        memory: target in bytes for a tile, and for a band of the output, not counting the model, the source and the
            output. More is used if a tile would be smaller than its halo, or if the encoder depends on the whole image
            (`halo` None) and is not tiled.
        dtype: of the encoder's input.
        ensemble: whether to average the outputs of the eight turns and flips of the input.
        progress: receives the number of output pixels that a step has computed.
    """
    decoder = _Decoder(model, source, size, dtype)
    area = max(1, memory // (bytes_per_latent(model, dtype) * source.batch))
    rows = max(1, memory // (4 * source.batch * source.channels * size[1]))
    turns = TURNS if ensemble else TURNS[:1]
    for tiles in plan(size, decoder.latents, halo=decoder.latent_halo, area=area, rows=rows):
        first, end = tiles[0].top, tiles[0].top + tiles[0].height
        step = rows if len(tiles) == 1 else tiles[0].height
        for top in range(first, end, step):
            band: Any = None
            for tile in tiles:
                part = tile._replace(top=top, height=min(step, end - top))
                steps = max(1, memory // (8 * _OUTPUT_PIXEL_BYTES * source.batch * tile.width))
                for index, turn in enumerate(turns):
                    for row in range(part.top, part.top + part.height, steps):
                        window = part._replace(top=row, height=min(steps, part.top + part.height - row))
                        pixels = decoder.decode(tile, window, turn)
                        if band is None:
                            band = pixels.new_empty((*pixels.shape[:2], part.height, size[1]))
                        here = band[:, :, row - top : row - top + window.height, tile.left : tile.left + tile.width]
                        _ = here.copy_(pixels) if index == 0 else here.add_(pixels)
                        if progress is not None:
                            progress(source.batch * window.height * window.width)
            write(top, band.div_(len(turns)) if ensemble else band)


class _Decoder:
    """Decodes windows of tiles; keeps the features of the last tile."""

    def __init__(self, model: Any, source: Source, size: tuple[int, int], dtype: torch.dtype) -> None:
        self._model, self._source, self._size, self._dtype = model, source, size, dtype
        self._device = next(model.parameters()).device
        self._scale = getattr(model.encoder, "scale", 1)
        # Without an imnet the nearest feature is the output. If two features are equally near, the rounding of
        # coordinates selects one, and it differs between the whole map and a part. So such a map is not tiled.
        samples_nearest = getattr(model, "imnet", model) is None
        self._halo = None if samples_nearest else getattr(model.encoder, "halo", None)
        self.latent_halo = None if self._halo is None else self._halo * self._scale
        self.latents = source.height * self._scale, source.width * self._scale
        norm = {**default_data_norm(), **(getattr(model, "data_norm", None) or {})}
        self._inp, self._gt = normalizations(norm, self._device)
        reach = _FARTHEST_FILL if self._halo is None else self._halo
        self._margin = _hole_margin(source, size, reach) if source.has_holes else 0
        self._rows: tuple[int, int] | None = None  # of the input, that are prepared
        self._tile: Window | None = None  # whose pixels are prepared
        self._encoded: object = None  # tile and turn of the features

    def decode(self, tile: Window, window: Window, turn: Turn) -> Tensor:
        """The pixels of a window of a tile [B, channels, h, w], float32, by way of a turn."""
        if self._encoded != (tile, turn):
            self._encode(tile, turn)
            self._encoded = tile, turn
        region = turn.box(self._region, self.latents)[:2] + turn.box((0, 0, *self.latents), self.latents)[2:]
        size = turn.box((0, 0, *self._size), self._size)[2:]
        out = self._model.render(size, window=Window(*turn.box(window, self._size)), feat_region=region)
        pixels = turn.undo(self._gt.restore(out.float()))
        if self._holes is None or not self._source.keeps_holes:
            return pixels
        return pixels.masked_fill(self._holes_at(window), math.nan)

    def _encode(self, tile: Window, turn: Turn) -> None:
        self._model.feat = None  # frees the features of the last tile before the next ones are computed
        if self._tile != tile:
            self._read(tile)
            self._tile = tile
        pixels = turn.apply(self._pixels.expand(-1, self._source.channels, -1, -1)).to(self._dtype)
        feat = turn.undo(self._model.encoder(pixels.contiguous(memory_format=torch.channels_last)))
        del pixels
        top, left, height, width = self._region
        top, left = top - self._origin[0] * self._scale, left - self._origin[1] * self._scale
        self._model.feat = turn.apply(feat[:, :, top : top + height, left : left + width])

    def _read(self, tile: Window) -> None:
        """The pixels that the tile's features need, normalized and without holes."""
        source, scale = self._source, self._scale
        spans = [_needed_latents(tile[axis], tile[2 + axis], self._size[axis], self.latents[axis]) for axis in (0, 1)]
        self._region = spans[0][0], spans[1][0], spans[0][1] - spans[0][0], spans[1][1] - spans[1][0]
        lengths = source.height, source.width
        (top, bottom), (left, right) = (
            _with_halo(span, length, self._halo, scale) for span, length in zip(spans, lengths, strict=True)
        )
        rows, cols = (
            (max(0, low - self._margin), min(length, high + self._margin))
            for low, high, length in zip((top, left), (bottom, right), lengths, strict=True)
        )
        if self._rows != rows:
            self._columns, self._rows = source.read(*rows), rows
        pixels = self._inp.normalize(self._columns(*cols).to(self._device))
        self._holes = None
        if source.has_holes and (holes := pixels.isnan()).any():
            self._holes = holes = holes[:, :1] if bool((holes == holes[:, :1]).all()) else holes
            pixels = fill_from_nearest(pixels, ~holes, min(self._margin, _FARTHEST_FILL))
        top, bottom, left, right = top - rows[0], bottom - rows[0], left - cols[0], right - cols[0]
        self._pixels = pixels[:, :, top:bottom, left:right]
        self._origin, self._hole_origin = (rows[0] + top, cols[0] + left), (rows[0], cols[0])

    def _holes_at(self, window: Window) -> Tensor:
        """[B, 1 or C, h, w]: whether the input pixel nearest to an output pixel is a hole."""
        assert self._holes is not None
        rows, cols = (
            (2 * torch.arange(first, first + count, device=self._device) + 1) * length // (2 * pixels) - origin
            for first, count, length, pixels, origin in zip(
                window[:2],
                window[2:],
                (self._source.height, self._source.width),
                self._size,
                self._hole_origin,
                strict=True,
            )
        )
        return self._holes[:, :, rows][:, :, :, cols]


def plan(
    size: tuple[int, int], latents: tuple[int, int], *, halo: int | None, area: int, rows: int
) -> list[list[Window]]:
    """Cover an output with bands of windows whose part of the feature map, halo included, has about `area` latents.

    A band is a whole row if it can be higher than its halo, otherwise tiles side by side. Tiles are never smaller than
    the halo, because then most of the work would be the halo's, unless they would have more than `rows` output rows.
    """
    height, width = latents
    if halo is None or height * width <= area:
        return [[Window(0, 0, *size)]]
    least = max(halo, _LEAST_SIDE)
    high, wide = area // width - 2 * halo, width
    if high < least:
        high = min(max(math.isqrt(area) - 2 * halo, least), max(1, rows * height // size[0]))
        wide = max(area // (high + 2 * halo) - 2 * halo, least)
    tops, lefts = (
        _cut(pixels, -(-length // step)) for pixels, length, step in zip(size, latents, (high, wide), strict=True)
    )
    return [[Window(top, left, bottom - top, right - left) for left, right in lefts] for top, bottom in tops]


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


def _hole_margin(source: Source, size: tuple[int, int], reach: int) -> int:
    """How far around the needed input a hole may take its value from, in pixels.

    The output shows an input pixel where alpha, enlarged by bicubic interpolation, reaches it. Such an output pixel is
    at most two pixels away (of the output, when this is the smaller one). Then come the latents that it reads, and
    the encoder's `reach`.
    """
    pixel = max(source.height / size[0], source.width / size[1], 1)
    return reach + 5 + math.ceil(2.5 * pixel)
