"""The images that `upscale` reads and writes: pictures row by row, arrays and tensors, of colors or of other data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from liif_fast.images import tiles
from liif_fast.images.picture import ImageError, largest, to_depth
from liif_fast.ops.dtypes import geometry_dtype

_STEP = 256  # rows converted at once


class Rows(Protocol):
    """A picture that is read from top to bottom.

    channels: samples of a pixel, alpha, the last one, included.
    dtype: uint8, uint16, or float32 in [0, 1].
    """

    height: int
    width: int
    channels: int
    has_alpha: bool
    dtype: np.dtype

    def read(self, top: int, bottom: int) -> np.ndarray:
        """Rows [bottom - top, width, channels]; neither end ever decreases from one call to the next."""


class Values(NamedTuple):
    """How samples become the numbers that the model's normalization takes, and how these become samples again.

    Colors are scaled to [0, 1] and clipped. Of data, `low` becomes 0 and `low + span` 1, NaN is a hole, and nothing is
    clipped.
    """

    are_data: bool = False
    low: float = 0.0
    span: float = 1.0

    def of(self, samples: np.ndarray) -> np.ndarray:
        """Samples as float32."""
        if self.are_data:
            return ((samples.astype(np.float64) - self.low) / self.span).astype(np.float32)
        colors = to_depth(samples, np.float32)
        return np.clip(colors, 0, 1) if samples.dtype.kind == "f" else colors

    def samples(self, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """The inverse of `of`."""
        if not self.are_data:
            return to_depth(np.clip(values, 0, 1), dtype)
        values = values.astype(np.float64) * self.span + self.low
        if dtype.kind != "f":
            values = np.clip(np.rint(values), np.iinfo(dtype).min, np.iinfo(dtype).max)
        return values.astype(dtype)

    def check(self, samples: Any, what: str) -> None:
        """Raise ImageError unless the numbers of a float array or tensor can be used."""
        if self.are_data:
            if bool((samples.isinf() if isinstance(samples, Tensor) else np.isinf(samples)).any()):
                raise ImageError(
                    f"{what} holds infinite numbers: replace them, for example by NaN where data is missing."
                )
            return
        low, high = float(samples.min()), float(samples.max())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # also true for NaN
            raise ImageError(
                f"{what} must hold numbers in [0, 1], not {low:g}..{high:g}: rescale it, or give "
                "data_range=(low, high) if these are no colors."
            )


class ArrayRows:
    """Arrays in memory as Rows: color [H, W, C], and alpha [H, W] of the same dtype or None."""

    def __init__(self, color: np.ndarray, alpha: np.ndarray | None, dtype: Any) -> None:
        self._color, self._alpha = color, alpha
        self.height, self.width = color.shape[:2]
        self.has_alpha = alpha is not None
        self.channels = color.shape[2] + self.has_alpha
        self.dtype = np.dtype(dtype)

    def read(self, top: int, bottom: int) -> np.ndarray:
        color = self._color[top:bottom]
        return color if self._alpha is None else np.concatenate([color, self._alpha[top:bottom, :, None]], -1)


class RowImage:
    """Rows as the source and the target of `tiles.run`, which makes an image of `size` for a model of `n_colors`."""

    def __init__(
        self, rows: Rows, write: Callable[[np.ndarray], None], size: tuple[int, int], n_colors: int, values: Values
    ) -> None:
        self._input, self._write, self._size, self._values = rows, write, size, values
        # A model of 2 or 4 channels that fits takes alpha as one of them.
        self._has_alpha = rows.has_alpha and not (n_colors not in (1, 3) and rows.channels == n_colors)
        self._colors = rows.channels - self._has_alpha
        _check_channels(self._colors, n_colors)
        holes = self._has_alpha or (values.are_data and rows.dtype.kind == "f")
        self.source = tiles.Source(1, n_colors, rows.height, rows.width, self._read, holes, values.are_data)

    def _read(self, top: int, bottom: int) -> Callable[[int, int], Tensor]:
        self._top, self._rows = top, self._input.read(top, bottom)
        return self._pixels

    def _pixels(self, left: int, right: int) -> Tensor:
        part = self._rows[:, left:right]
        color = np.ascontiguousarray(self._values.of(part[..., : self._colors]))
        if self._has_alpha:
            color[part[..., -1] == 0] = math.nan
        return torch.from_numpy(color).permute(2, 0, 1)[None]

    def write(self, top: int, band: Tensor) -> None:
        for first in range(0, band.shape[2], _STEP):
            part = as_many_channels(band[:, :, first : first + _STEP], self._colors)[0].permute(1, 2, 0).cpu().numpy()
            rows = np.empty((*part.shape[:2], self._input.channels), self._input.dtype)
            rows[..., : self._colors] = self._values.samples(part, rows.dtype)
            if self._has_alpha:
                rows[..., -1] = self._alpha(top + first, top + first + len(rows))
            self._write(rows)

    def _alpha(self, top: int, bottom: int) -> np.ndarray:
        """Rows of alpha in the result, by Pillow's bicubic: like the model's grid, it aligns the images' borders."""
        height, scale = self._input.height, self._input.height / self._size[0]
        support = 2 * max(1, scale) + 1
        low, high = max(0, int(top * scale - support)), min(height, math.ceil(bottom * scale + support))
        alpha = self._rows[low - self._top : high - self._top, :, -1]
        size, opaque = (self._size[1], bottom - top), largest(alpha.dtype)
        if (alpha == opaque).all():
            return np.full(size[::-1], opaque, alpha.dtype)
        # In float, because Pillow rounds and clips 8-bit images between columns and rows.
        source = Image.fromarray(to_depth(np.ascontiguousarray(alpha), np.float32))
        box = (0, top * scale - low, alpha.shape[1], min(bottom * scale - low, len(alpha)))
        return to_depth(np.clip(np.asarray(source.resize(size, Image.Resampling.BICUBIC, box)), 0, 1), alpha.dtype)


class TensorImage:
    """Tensors [B, C, H, W] as the source and the target of `tiles.run`."""

    def __init__(self, images: Tensor, result: Tensor, n_colors: int, values: Values) -> None:
        self._images, self._result, self._values = images, result, values
        batch, channels, height, width = images.shape
        _check_channels(channels, n_colors)
        self.source = tiles.Source(batch, n_colors, height, width, self._read, values.are_data, values.are_data)

    def _read(self, top: int, bottom: int) -> Callable[[int, int], Tensor]:
        def pixels(left: int, right: int) -> Tensor:
            part = self._images[:, :, top:bottom, left:right]
            if not self._values.are_data:
                return part.float().clamp(0, 1)
            return ((part.to(geometry_dtype(part)) - self._values.low) / self._values.span).float()

        return pixels

    def write(self, top: int, band: Tensor) -> None:
        rows = as_many_channels(band, self._result.shape[1])
        if self._values.are_data:
            rows = rows.to(geometry_dtype(self._result)) * self._values.span + self._values.low
        else:
            rows = rows.clamp(0, 1)
        self._result[:, :, top : top + rows.shape[2]] = rows


def as_many_channels(pixels: Tensor, channels: int) -> Tensor:
    """Pixels [B, C, h, w] of a model, averaged if the image has one channel."""
    if pixels.shape[1] == channels:
        return pixels
    if channels == 1:
        return pixels.mean(1, keepdim=True)
    raise ValueError(f"the model makes {pixels.shape[1]} channels of {channels}: use its encode and render.")


def _check_channels(channels: int, n_colors: int) -> None:
    if channels != n_colors and (channels, n_colors) != (1, 3):
        raise ValueError(
            f"the model takes images of {n_colors} channels, but this one has {channels}: convert it first."
        )
