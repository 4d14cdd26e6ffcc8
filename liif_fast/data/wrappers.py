"""Wrappers turn images into items for training and testing.

An item is {'inp': [C, h, w], 'coord': [Q, 2], 'cell': [Q, 2], 'gt': [Q, C]} in float32, with colors in [0, 1]. Data
with a `data_range` are mapped to [0, 1] without clipping or rounding; a gt without a value is NaN.
Source: original datasets/wrappers.py; paper, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from liif_fast.data.arrays import Range, filled, in_unit
from liif_fast.data.errors import item_name, naming
from liif_fast.data.pictures import (
    ENERGY_BLOCK,
    Item,
    gradient_energy,
    resize_bicubic,
    shrink_whole,
    to_bytes,
    to_tensor,
    to_unit,
)
from liif_fast.data.registry import register
from liif_fast.models.coordinates import make_coord

FLAT_ENERGY = 0.1  # on the scale of 0 to 255; added to every block, so that flat blocks are sometimes drawn


class _Wrapper(Dataset[Item]):
    """Base of all wrappers: item `index` depends only on the seed and on the index."""

    dataset: Any
    sample_q: int | None
    seed: int

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Item:
        return self.item(index, np.random.default_rng((self.seed, index)))

    @property
    def data_range(self) -> Range | None:
        """The values that become 0 and 1; None for 8-bit pictures, and for a user's images in [0, 1]."""
        return getattr(self.dataset, "data_range", None)

    def item(self, index: int, rng: np.random.Generator) -> Item:
        """One item of image `index`, with all random decisions from `rng`; errors name the image."""
        with naming(item_name(self.dataset, index)):
            return self._item(index, rng)

    def _item(self, index: int, rng: np.random.Generator) -> Item:
        raise NotImplementedError

    def _resize(self, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """As in the original, in 8 bits, except for data."""
        return resize_bicubic(to_bytes(image) if self.data_range is None else image, size)

    def _samples(self, low: np.ndarray, high: np.ndarray, rng: np.random.Generator) -> Item:
        """An item from the small and the large image, uint8 or float [H, W, C]."""
        height, width = high.shape[:2]
        if self.sample_q is None:
            chosen = np.arange(height * width)
        else:
            if self.sample_q > height * width:
                raise ValueError(f"sample_q is {self.sample_q}, but this image has {height}x{width} pixels; lower it")
            chosen = rng.choice(height * width, self.sample_q, replace=False, shuffle=False)
        row, column = np.divmod(chosen, width)
        axes = [make_coord((side,), flatten=False)[:, 0] for side in (height, width)]
        coord = torch.stack([axes[0][torch.from_numpy(row)], axes[1][torch.from_numpy(column)]], dim=-1)
        cell = torch.tensor([2 / height, 2 / width]).expand(len(chosen), 2).contiguous()
        return {"inp": filled(to_tensor(low)), "coord": coord, "cell": cell, "gt": to_unit(high[row, column])}


@register("sr-implicit-paired")
class SRImplicitPaired(_Wrapper):
    """Items from pairs of a small and a large image whose sizes differ by a whole factor s = H // h.

    dataset: pairs, such as PairedImageFolders.
    inp_size: side of a random crop of the small image; None uses the whole image, and h*s x w*s of the large image.
    augment: flip rows, flip columns, transpose, each with probability 1/2.
    sample_q: number of pixels sampled without replacement; None uses all. seed: seed of all random decisions.
    Raises ValueError for a bad argument, and for a pair that does not fit or is too small, with the image's name.
    Source: original datasets/wrappers.py, SRImplicitPaired.
    """

    def __init__(
        self,
        dataset: Any,
        inp_size: int | None = None,
        augment: bool = False,
        sample_q: int | None = None,
        seed: int = 0,
    ) -> None:
        _check_at_least_one("inp_size", inp_size, "whole images")
        _check_at_least_one("sample_q", sample_q, "all pixels")
        self.dataset, self.inp_size, self.augment, self.sample_q, self.seed = dataset, inp_size, augment, sample_q, seed

    def _item(self, index: int, rng: np.random.Generator) -> Item:
        low, high = _pair(self.dataset, index)
        scale = _factor(low.shape, high.shape)
        if self.inp_size is None:
            high = high[: low.shape[0] * scale, : low.shape[1] * scale]
        else:
            side = self.inp_size
            _check_holds(low.shape, side, f"inp_size {side}", "inp_size")
            top, left = int(rng.integers(low.shape[0] - side + 1)), int(rng.integers(low.shape[1] - side + 1))
            low = low[top : top + side, left : left + side]
            top, left, side = top * scale, left * scale, side * scale
            high = high[top : top + side, left : left + side]
        low, high = in_unit(low, self.data_range), in_unit(high, self.data_range)
        flips = _draw_flips(rng, self.augment)
        return self._samples(_augmented(low, flips), _augmented(high, flips), rng)


@register("sr-implicit-downsampled")
class SRImplicitDownsampled(_Wrapper):
    """Items from single images: a shrunken image and samples of the original image.

    dataset: uint8 images (`array`, `name`, `image_count`), such as ImageFolder, or float tensors [C, H, W].
    inp_size: side of the shrunken crop; None uses the whole image.
    scale_min, scale_max: the scale s is uniform between them.
    augment: flip rows, flip columns, transpose, each with probability 1/2.
    sample_q: number of pixels sampled without replacement; None uses all.
    energy: within an image, draw crops in proportion to gradient energy to this power; 0 draws them uniformly, as in
        the paper.
    seed: seed of all random decisions of `wrapper[i]`; `item` takes another generator.
    Raises ValueError for a bad argument, and for an image that is smaller than a crop, with the image's name.
    Source: original datasets/wrappers.py, SRImplicitDownsampled.
    """

    def __init__(
        self,
        dataset: Any,
        inp_size: int | None = None,
        scale_min: float = 1,
        scale_max: float | None = None,
        augment: bool = False,
        sample_q: int | None = None,
        energy: float = 0.0,
        seed: int = 0,
    ) -> None:
        scale_max = scale_min if scale_max is None else scale_max
        if not 1 <= scale_min <= scale_max:
            raise ValueError(f"scales {scale_min} to {scale_max} are not a range; they must satisfy 1 <= min <= max")
        _check_at_least_one("inp_size", inp_size, "whole images")
        _check_at_least_one("sample_q", sample_q, "all pixels")
        if sample_q is not None and inp_size is not None and sample_q > round(inp_size * scale_min) ** 2:
            raise ValueError(
                f"sample_q is {sample_q}, but the smallest crop has {round(inp_size * scale_min) ** 2} pixels; lower it"
            )
        self.dataset, self.inp_size, self.augment, self.sample_q = dataset, inp_size, augment, sample_q
        self.scale_min, self.scale_max, self.energy, self.seed = scale_min, scale_max, energy, seed
        self._block_weights = [
            (gradient_energy(in_unit(dataset.array(index), self.data_range)) + FLAT_ENERGY) ** energy
            for index in range(dataset.image_count if energy else 0)
        ]
        self._block_sums = [np.cumsum(weights) for weights in self._block_weights]

    def _item(self, index: int, rng: np.random.Generator) -> Item:
        image, scale = _single(self.dataset, index), float(rng.uniform(self.scale_min, self.scale_max))
        if self.inp_size is None:
            low, high = shrink_whole(in_unit(image, self.data_range), scale, self._resize)
        else:
            side, cause = round(self.inp_size * scale), f"inp_size {self.inp_size} at this scale"
            _check_holds(image.shape, side, cause, "inp_size or scale_max")
            top, left = self._draw_corner(index, image.shape, side, rng)
            high = in_unit(image[top : top + side, left : left + side], self.data_range)
            low = self._resize(high, (self.inp_size, self.inp_size))
        flips = _draw_flips(rng, self.augment)
        return self._samples(_augmented(low, flips), _augmented(high, flips), rng)

    def _draw_corner(self, index: int, shape: tuple[int, ...], side: int, rng: np.random.Generator) -> tuple[int, int]:
        """(top, left) of a crop of image `index`, which has the shape [H, W, ...]."""
        height, width = shape[:2]
        if not self.energy:
            return int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        sums = self._block_sums[index % self.dataset.image_count]
        weights = self._block_weights[index % self.dataset.image_count]
        block = min(int(np.searchsorted(sums, rng.random() * sums[-1], side="right")), len(sums) - 1)
        # The crop's center is uniform in the chosen block, as far as the image's borders allow.
        center = (np.array(divmod(block, weights.shape[1])) + rng.random(2)) * ENERGY_BLOCK
        corner = np.clip(np.rint(center - side / 2), 0, (height - side, width - side))
        return int(corner[0]), int(corner[1])


@register("sr-implicit-uniform-varied")
class SRImplicitUniformVaried(_Wrapper):
    """Items from pairs whose large image is resized to a size that grows with the item's number.

    dataset: pairs, such as PairedImageFolders.
    size_min, size_max: shorter side of the large image for the first item and for the last (None: as size_min).
    augment: flip columns with probability 1/2.
    gt_resize: resize the large image to this shorter side afterward, so that all items have the same number of pixels.
    sample_q: number of pixels sampled without replacement; None uses all.
    Raises ValueError for a bad argument. Source: original datasets/wrappers.py, SRImplicitUniformVaried.
    """

    def __init__(
        self,
        dataset: Any,
        size_min: int,
        size_max: int | None = None,
        augment: bool = False,
        gt_resize: int | None = None,
        sample_q: int | None = None,
        seed: int = 0,
    ) -> None:
        size_max = size_min if size_max is None else size_max
        if not 1 <= size_min <= size_max:
            raise ValueError(f"sizes {size_min} to {size_max} are not a range; they must satisfy 1 <= min <= max")
        _check_at_least_one("gt_resize", gt_resize, "no second resize")
        _check_at_least_one("sample_q", sample_q, "all pixels")
        self.dataset, self.size_min, self.size_max, self.augment = dataset, size_min, size_max, augment
        self.gt_resize, self.sample_q, self.seed = gt_resize, sample_q, seed

    def _item(self, index: int, rng: np.random.Generator) -> Item:
        low, high = _pair(self.dataset, index)
        # The size follows the item's position in the epoch, not the image's position, which starts again with `repeat`.
        progress = (index % len(self)) / max(1, len(self) - 1)
        low, high = in_unit(low, self.data_range), in_unit(high, self.data_range)
        high = self._resize_shorter(high, round(self.size_min + (self.size_max - self.size_min) * progress))
        if self.augment and rng.random() < 0.5:
            low, high = low[:, ::-1], high[:, ::-1]
        if self.gt_resize is not None:
            high = self._resize_shorter(high, self.gt_resize)
        return self._samples(low, high, rng)

    def _resize_shorter(self, image: np.ndarray, side: int) -> np.ndarray:
        """Resize the shorter side to `side` pixels; the longer side is rounded down, as in torchvision's Resize."""
        height, width = image.shape[:2]
        size = (side, int(side * width / height)) if height <= width else (int(side * height / width), side)
        return self._resize(image, size)


def _check_at_least_one(name: str, value: int | None, meaning: str) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1, or None for {meaning}")


def _check_holds(shape: tuple[int, ...], side: int, cause: str, advice: str) -> None:
    if min(shape[:2]) < side:
        raise ValueError(
            f"{shape[0]}x{shape[1]} pixels are less than a crop of {side}x{side} ({cause}); remove the image or lower "
            f"{advice}"
        )


def _factor(low: tuple[int, ...], high: tuple[int, ...]) -> int:
    """The factor s of a pair of these shapes [h, w, ...] and [H, W, ...]."""
    scale = high[0] // low[0]
    if scale < 1 or high[1] // low[1] != scale:
        raise ValueError(
            f"its {low[0]}x{low[1]} pixels and the {high[0]}x{high[1]} of its large image differ by no whole factor; "
            "pair each image with its own enlargement"
        )
    return scale


def _draw_flips(rng: np.random.Generator, augment: bool) -> Sequence[bool]:
    """Whether to flip rows, flip columns and transpose, in this order."""
    return (rng.random(3) < 0.5).tolist() if augment else [False] * 3


def _single(dataset: Any, index: int) -> np.ndarray:
    """Image `index` as [H, W, C]: in its own dtype from a dataset of this package, float32 from a user's."""
    return dataset.array(index) if hasattr(dataset, "array") else _as_array(dataset[index % len(dataset)])


def _pair(dataset: Any, index: int) -> tuple[np.ndarray, np.ndarray]:
    if hasattr(dataset, "arrays"):
        return dataset.arrays(index)
    low, high = dataset[index % len(dataset)]
    return _as_array(low), _as_array(high)


def _as_array(image: Any) -> np.ndarray:
    return torch.as_tensor(image).float().permute(1, 2, 0).numpy()


def _augmented(image: np.ndarray, flips: Sequence[bool]) -> np.ndarray:
    if flips[0]:
        image = image[::-1]
    if flips[1]:
        image = image[:, ::-1]
    return image.transpose(1, 0, 2) if flips[2] else image
