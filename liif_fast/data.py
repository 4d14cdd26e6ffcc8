"""Photographs as training and test items: a folder of images and the wrapper that cuts, shrinks and samples them.

Names, arguments and semantics are those of the original's YAML files (`image-folder`, `sr-implicit-downsampled`); what
is ours is optional and off by default: shrunken copies, crops drawn by gradient energy. Images stay 8-bit in memory.
Every random decision about an item comes from one numpy generator, so an item is a function of its seed and number.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from liif_fast.coordinates import make_coord

Item = dict[str, torch.Tensor]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"})
ENERGY_BLOCK = 16  # pixels: gradient energy is kept per block of this side
FLAT_ENERGY = 0.1  # levels of 255 added to every block, so that flat ones keep a small share
MIN_COPY_SIDE = 256  # pixels: a shrunken copy with a shorter side is left out, it would only repeat one crop

_registry: dict[str, Callable[..., Any]] = {}
_Class = TypeVar("_Class", bound=Callable[..., Any])


def register(name: str) -> Callable[[_Class], _Class]:
    """Let configurations name a dataset or wrapper class: `@register('my-folder')`."""

    def decorate(cls: _Class) -> _Class:
        _registry[name] = cls
        return cls

    return decorate


def make_dataset(spec: dict[str, Any], args: dict[str, Any] | None = None) -> Any:
    """Build a registered dataset or wrapper from `{'name', 'args'}`; `args` override a deep copy of `spec['args']`.

    Raises ValueError for a name nobody registered. Source: original datasets/datasets.py, make.
    """
    name = spec.get("name")
    if name not in _registry:
        raise ValueError(f"no dataset is named {name!r}; choose one of {', '.join(sorted(_registry))} or register it")
    merged = copy.deepcopy(spec.get("args") or {})
    merged.update(args or {})
    return _registry[name](**merged)


def list_images(folder: str | Path) -> list[Path]:
    """Every image file of a folder in order of name; raises ValueError when there is no folder or no image in it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"image folder {str(folder)!r} does not exist; give the path of a folder with images")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"folder {str(folder)!r} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return paths


def read_rgb(path: str | Path) -> np.ndarray:
    """Decode an image file as uint8 RGB [H, W, 3]; raises ValueError, naming the file, when it is not an image."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as an image ({error}); remove it or replace it") from error


def resize_bicubic(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pillow's antialiased 8-bit bicubic: uint8 [H, W, 3] -> uint8 [h, w, 3] with size = (h, w)."""
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def shrink_whole(image: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """A test pair from a whole image: (low [h, w, 3], high [round(h*s), round(w*s), 3]), h = floor(H / s + 1e-9).

    For a whole-numbered scale this is the crop to a multiple. Raises ValueError when nothing would be left.
    Source: original datasets/wrappers.py, SRImplicitDownsampled with inp_size=None.
    """
    height, width = (math.floor(side / scale + 1e-9) for side in image.shape[:2])
    if height < 1 or width < 1:
        raise ValueError(f"an image of {image.shape[0]}x{image.shape[1]} pixels cannot be shrunk by {scale:g}")
    high = image[: round(height * scale), : round(width * scale)]
    return resize_bicubic(high, (height, width)), high


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 [H, W, C] -> float32 [C, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float().div_(255)


def gradient_energy(image: np.ndarray) -> np.ndarray:
    """Mean absolute difference between neighbouring pixels, per block of ENERGY_BLOCK pixels a side.

    image: uint8 [H, W, C]. Returns float64 [ceil(H / block), ceil(W / block)] in levels of 255.
    """
    grey = image.astype(np.int16).sum(axis=2)
    change = np.zeros(grey.shape, dtype=np.int64)
    change[:-1] += np.abs(np.diff(grey, axis=0))
    change[:, :-1] += np.abs(np.diff(grey, axis=1))
    rows, columns = (np.arange(0, side, ENERGY_BLOCK) for side in grey.shape)
    total = np.add.reduceat(np.add.reduceat(change, rows, axis=0), columns, axis=1)
    pixels = np.diff(np.append(rows, grey.shape[0]))[:, None] * np.diff(np.append(columns, grey.shape[1]))[None]
    return total / (pixels * image.shape[2])


@register("image-folder")
class ImageFolder(Dataset[torch.Tensor]):
    """The images of one folder, as float32 [3, H, W] in [0, 1].

    root_path: the folder; split_file (JSON) and split_key: take the names listed there instead of all images;
    first_k: only the first so many; repeat: the length is so many times the number of images;
    cache: 'none' decodes at every access, 'in_memory' keeps uint8 [H, W, 3] (a quarter of floats);
    shrink: also the images shrunk by these whole numbers (1 is the image itself), as extra, sharper data.
    Raises ValueError for a missing or empty folder, an unreadable image or a bad argument.
    Source: original datasets/image_folder.py.
    """

    def __init__(
        self,
        root_path: str | Path,
        split_file: str | Path | None = None,
        split_key: str | None = None,
        first_k: int | None = None,
        repeat: int = 1,
        cache: str = "none",
        shrink: Sequence[int] = (1,),
    ) -> None:
        if cache not in ("none", "in_memory"):
            raise ValueError(f"cache is {cache!r}; image-folder knows 'none' and 'in_memory'")
        if repeat < 1 or not shrink or any(factor < 1 for factor in shrink):
            raise ValueError(f"repeat ({repeat}) and every shrink factor ({list(shrink)}) must be at least 1")
        if split_file is None:
            paths = list_images(root_path)
        else:
            names = json.loads(Path(split_file).read_text(encoding="utf-8"))[split_key]
            paths = [Path(root_path) / name for name in names]
        self.repeat = repeat
        self.paths = paths[:first_k]
        self._sources = [(path, factor) for factor in shrink for path in self.paths]
        self._cache: list[np.ndarray] | None = None
        if cache == "in_memory" or tuple(shrink) != (1,):
            loaded = [(source, _shrunk(read_rgb(source[0]), source[1])) for source in self._sources]
            kept = [
                (source, image) for source, image in loaded if source[1] == 1 or min(image.shape[:2]) >= MIN_COPY_SIDE
            ]
            self._sources = [source for source, _ in kept]
            self._cache = [image for _, image in kept]

    def __len__(self) -> int:
        return len(self._sources) * self.repeat

    @property
    def image_count(self) -> int:
        """Number of different images, shrunken copies counted, repeats not."""
        return len(self._sources)

    def name(self, index: int) -> str:
        """File name of an item, for messages."""
        return self._sources[index % len(self._sources)][0].name

    def array(self, index: int) -> np.ndarray:
        """The item as uint8 [H, W, 3]; do not write to it."""
        index %= len(self._sources)
        return read_rgb(self._sources[index][0]) if self._cache is None else self._cache[index]

    def __getitem__(self, index: int) -> torch.Tensor:
        return to_tensor(self.array(index))


def _shrunk(image: np.ndarray, factor: int) -> np.ndarray:
    if factor == 1:
        return image
    height, width = max(1, image.shape[0] // factor), max(1, image.shape[1] // factor)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


@register("sr-implicit-downsampled")
class SRImplicitDownsampled(Dataset[Item]):
    """Training and test items of LIIF: a shrunken image and samples of the image it came from.

    dataset: gives uint8 images (`array`, `name`, `image_count`), such as ImageFolder.
    inp_size: side of the shrunken crop; None takes the whole image. scale_min..scale_max: s is uniform in between.
    augment: flip rows, flip columns, transpose, each with probability one half. sample_q: number of pixels sampled
    without replacement, None takes all. energy: draw crops in proportion to gradient energy to this power (0:
    uniformly, as in the paper). seed: item i of a dataset object is always the same; call `item` for other draws.

    An item is {'inp': [3, h, w], 'coord': [Q, 2], 'cell': [Q, 2], 'gt': [Q, 3]} in float32, colours in [0, 1].
    Raises ValueError for a bad argument or an image smaller than a crop, naming it.
    Source: original datasets/wrappers.py, SRImplicitDownsampled; paper, section 4.
    """

    def __init__(
        self,
        dataset: ImageFolder,
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
        if inp_size is not None and inp_size < 1:
            raise ValueError(f"inp_size is {inp_size}; it must be at least 1, or None for whole images")
        if sample_q is not None and inp_size is not None and not 1 <= sample_q <= round(inp_size * scale_min) ** 2:
            raise ValueError(
                f"sample_q is {sample_q}, but the smallest crop has {round(inp_size * scale_min) ** 2} pixels; lower it"
            )
        self.dataset, self.inp_size, self.augment, self.sample_q = dataset, inp_size, augment, sample_q
        self.scale_min, self.scale_max, self.energy, self.seed = scale_min, scale_max, energy, seed
        self._block_weights = [
            (gradient_energy(dataset.array(index)) + FLAT_ENERGY) ** energy
            for index in range(dataset.image_count if energy else 0)
        ]
        self._block_sums = [np.cumsum(weights) for weights in self._block_weights]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Item:
        return self.item(index, np.random.default_rng((self.seed, index)))

    def draw(self, rng: np.random.Generator) -> Item:
        """An item of an image that is drawn too: uniformly, or by the image's sum of energy."""
        if not self.energy:
            return self.item(int(rng.integers(self.dataset.image_count)), rng)
        totals = np.cumsum([sums[-1] for sums in self._block_sums])
        return self.item(int(np.searchsorted(totals, rng.random() * totals[-1], side="right")), rng)

    def item(self, index: int, rng: np.random.Generator) -> Item:
        """One item of image `index`; all its random decisions are drawn from `rng`."""
        image = self.dataset.array(index)
        scale = float(rng.uniform(self.scale_min, self.scale_max))
        if self.inp_size is None:
            low, high = shrink_whole(image, scale)
        else:
            side = round(self.inp_size * scale)
            top, left = self._corner(index, image.shape, side, rng)
            high = image[top : top + side, left : left + side]
            low = resize_bicubic(high, (self.inp_size, self.inp_size))
        if self.augment:
            flips = rng.random(3) < 0.5
            low, high = _augmented(low, flips), _augmented(high, flips)
        return self._samples(low, high, rng)

    def _corner(self, index: int, shape: tuple[int, ...], side: int, rng: np.random.Generator) -> tuple[int, int]:
        height, width = shape[:2]
        if min(height, width) < side:
            raise ValueError(
                f"{self.dataset.name(index)!r} has {height}x{width} pixels, less than a crop of {side}x{side} "
                f"(inp_size {self.inp_size} at this scale); remove the image or lower inp_size or scale_max"
            )
        if not self.energy:
            return int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        sums = self._block_sums[index % self.dataset.image_count]
        weights = self._block_weights[index % self.dataset.image_count]
        block = min(int(np.searchsorted(sums, rng.random() * sums[-1], side="right")), len(sums) - 1)
        # The crop's centre falls anywhere in the chosen block, as far as the borders allow.
        centre = (np.array(divmod(block, weights.shape[1])) + rng.random(2)) * ENERGY_BLOCK
        corner = np.clip(np.rint(centre - side / 2), 0, (height - side, width - side))
        return int(corner[0]), int(corner[1])

    def _samples(self, low: np.ndarray, high: np.ndarray, rng: np.random.Generator) -> Item:
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
        colour = torch.from_numpy(high[row, column]).float().div_(255)
        return {"inp": to_tensor(low), "coord": coord, "cell": cell, "gt": colour}


def _augmented(image: np.ndarray, flips: np.ndarray) -> np.ndarray:
    if flips[0]:
        image = image[::-1]
    if flips[1]:
        image = image[:, ::-1]
    return image.transpose(1, 0, 2) if flips[2] else image
