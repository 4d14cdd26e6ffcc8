"""Folders of images as datasets, `image-folder` and `paired-image-folders`; memory and caches hold the files' dtype."""

from __future__ import annotations

import functools
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from liif_fast.data.arrays import NPY, array_header, checked_range, in_unit, read_array
from liif_fast.data.errors import naming
from liif_fast.data.pictures import MODES, header_size, list_images, read_pixels, resize_bicubic, to_tensor
from liif_fast.data.registry import register
from liif_fast.utils import memory
from liif_fast.utils.files import write_atomically

MIN_COPY_SIDE = 256  # pixels: copies shrunk below this are left out, because all their crops would be alike
CACHES = ("none", "bin", "in_memory")


@register("image-folder")
class ImageFolder(Dataset[torch.Tensor]):
    """The images of one folder, as float32 [n_colors, H, W] in [0, 1].

    Pictures are decoded to 8 bits. `.npy` files, and all files if data_range is given or n_colors is not 1, 3 or 4, are
    arrays: they keep their dtype, and data_range becomes [0, 1] without clipping; NaN is a pixel without a value.

    root_path: the folder. split_file (JSON), split_key: use the names listed there instead of all images.
    first_k: use only the first k images. repeat: the length is this multiple of the number of images.
    cache: 'none' decodes at every access; 'bin' decodes once into `_bin_<folder>` next to the folder and maps those
        files, which all processes share; 'in_memory' keeps [H, W, n_colors] in the files' dtype.
    shrink: factors by which copies of the images are shrunk (1 is the image itself), as additional, sharper data.
    n_colors: 1 (gray), 3 (RGB) or 4 (RGBA); any number of channels for arrays.
    data_range: (low, high) of arrays, by default all of uint8 and uint16, and (0, 1) for other dtypes.
    Raises ValueError for a missing or empty folder, an unreadable image, a bad split or a bad argument.
    Source: original datasets/image_folder.py. Its cache 'bin' holds pickles, which this class never reads.
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
        n_colors: int = 3,
        data_range: Sequence[float] | None = None,
    ) -> None:
        if cache not in CACHES:
            raise ValueError(f"cache is {cache!r}; it must be 'none', 'bin' or 'in_memory'")
        if repeat < 1 or not shrink or any(factor < 1 for factor in shrink):
            raise ValueError(f"repeat ({repeat}) and every shrink factor ({list(shrink)}) must be at least 1")
        if n_colors < 1:
            raise ValueError(f"n_colors is {n_colors}; it must be at least 1")
        if cache == "bin" and tuple(shrink) != (1,):
            raise ValueError("cache 'bin' cannot hold shrunken copies: use cache 'in_memory' with shrink")
        if first_k is not None and first_k < 1:
            raise ValueError(f"first_k is {first_k}; it must be at least 1, or left out for all images")
        paths = list_images(root_path) if split_file is None else _listed(Path(root_path), split_file, split_key)
        self.repeat, self.n_colors = repeat, n_colors
        self.paths = paths[:first_k]
        self._sources = [(path, factor) for factor in shrink for path in self.paths]
        arrays = data_range is not None or n_colors not in MODES or self.paths[0].suffix.lower() == NPY
        self._dtype = array_header(self.paths[0], n_colors)[1] if arrays else None
        self.data_range = None if self._dtype is None else checked_range(data_range, self._dtype)
        if data_range is not None:
            self._dtype = None  # files of other dtypes have the same units
        self._read = functools.partial(read_array if arrays else read_pixels, n_colors=n_colors)
        self._binaries: list[Path] | None = None
        self._cache: list[np.ndarray] | None = None
        if cache == "bin":
            self._binaries = _cached_on_disk(Path(root_path), self.paths, self._read, n_colors, arrays)
        elif cache == "in_memory" or tuple(shrink) != (1,):
            _require_memory(self._sources, n_colors, arrays)
            images = decoded(lambda source: _shrunk(self._read(source[0]), source[1]), self._sources)
            loaded = zip(self._sources, images, strict=True)
            kept = [
                (source, image) for source, image in loaded if source[1] == 1 or min(image.shape[:2]) >= MIN_COPY_SIDE
            ]
            self._sources = [source for source, _ in kept]
            self._cache = [image for _, image in kept]

    def __len__(self) -> int:
        return len(self._sources) * self.repeat

    @property
    def image_count(self) -> int:
        """Number of different images: shrunken copies count, repeats do not."""
        return len(self._sources)

    def name(self, index: int) -> str:
        """File name of an item, for messages."""
        return self._sources[index % len(self._sources)][0].name

    def array(self, index: int) -> np.ndarray:
        """The item as [H, W, n_colors], uint8 or an array file's dtype; do not write to it."""
        index %= len(self._sources)
        if self._cache is not None:
            image = self._cache[index]
        elif self._binaries is not None:
            image = read_array(self._binaries[index], self.n_colors)
        else:
            image = self._read(self._sources[index][0])
        if self._dtype not in (None, image.dtype):
            raise ValueError(
                f"{self.name(index)} holds {image.dtype}, but {self.name(0)} {self._dtype}: give data_range"
            )
        return image

    def __getitem__(self, index: int) -> torch.Tensor:
        return to_tensor(in_unit(self.array(index), self.data_range))


@register("paired-image-folders")
class PairedImageFolders(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Pairs of images from two folders in order of name: root_path_1 holds the small images, root_path_2 the large.

    The other arguments are those of `ImageFolder` and apply to both folders. An item is (small, large).
    Raises ValueError as ImageFolder does, and when the folders hold different numbers of images, or different data.
    Source: original datasets/image_folder.py, PairedImageFolders.
    """

    def __init__(
        self,
        root_path_1: str | Path,
        root_path_2: str | Path,
        split_file: str | Path | None = None,
        split_key: str | None = None,
        first_k: int | None = None,
        repeat: int = 1,
        cache: str = "none",
        n_colors: int = 3,
        data_range: Sequence[float] | None = None,
    ) -> None:
        self.dataset_1, self.dataset_2 = (
            ImageFolder(root, split_file, split_key, first_k, repeat, cache, n_colors=n_colors, data_range=data_range)
            for root in (root_path_1, root_path_2)
        )
        self.n_colors, self.data_range = n_colors, self.dataset_2.data_range
        if self.dataset_1.data_range != self.data_range:
            raise ValueError(f"{str(root_path_1)!r} and {str(root_path_2)!r} hold different data: give data_range")
        counts = self.dataset_1.image_count, self.dataset_2.image_count
        if counts[0] != counts[1]:
            raise ValueError(
                f"{str(root_path_1)!r} holds {counts[0]} images and {str(root_path_2)!r} holds {counts[1]}; pairs need "
                "the same number, in the same order of names"
            )

    def __len__(self) -> int:
        return len(self.dataset_1)

    @property
    def image_count(self) -> int:
        """Number of different pairs, repeats not counted."""
        return self.dataset_1.image_count

    def name(self, index: int) -> str:
        """File name of an item's small image, for messages."""
        return self.dataset_1.name(index)

    def arrays(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The pair as [h, w, n_colors] and [H, W, n_colors], as from ImageFolder.array; do not write to them."""
        return self.dataset_1.array(index), self.dataset_2.array(index)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.dataset_1[index], self.dataset_2[index]


def decoded(make: Callable[[Any], np.ndarray], sources: Sequence[tuple[Path, int]]) -> Iterator[np.ndarray]:
    """make((path, factor)) of every source in order, in a few threads (decoders release the GIL), with a progress bar.

    Errors name the path.
    """

    def named(source: tuple[Path, int]) -> np.ndarray:
        with naming(str(source[0])):
            return make(source)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from tqdm(
            pool.map(named, sources), "images", len(sources), unit="image", leave=False, disable=not sys.stderr.isatty()
        )


def _require_memory(sources: Sequence[tuple[Path, int]], n_colors: int, arrays: bool) -> None:
    total = 0.0
    for path, factor in sources:
        (height, width), dtype = array_header(path, n_colors) if arrays else (header_size(path), np.dtype(np.uint8))
        total += height * width * n_colors * dtype.itemsize / factor**2
    advice = "use cache 'bin', or fewer images (first_k)"
    memory.require(total, f"Keeping {len(sources)} images of {str(sources[0][0].parent)!r} in memory", advice)


def _listed(root: Path, split_file: str | Path, split_key: str | None) -> list[Path]:
    """The paths that a split file lists under a key."""
    try:
        splits = json.loads(Path(split_file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"split_file {str(split_file)!r} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"split_file {str(split_file)!r} is not JSON ({error})") from error
    names = splits.get(split_key) if isinstance(splits, dict) else None
    if not isinstance(names, list) or not names:
        known = ", ".join(map(repr, splits)) if isinstance(splits, dict) else "none (it is not a dictionary)"
        raise ValueError(f"split_key is {split_key!r}, but the lists in {str(split_file)!r} are {known}")
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise ValueError(
            f"{str(split_file)!r} lists {missing[0]!r}, which is not in {str(root)!r} ({len(missing)} of {len(names)} "
            "are missing); give the root_path that the split was made for"
        )
    return [root / name for name in names]


def _cached_on_disk(
    root: Path, paths: Sequence[Path], read: Callable[[Path], np.ndarray], n_colors: int, arrays: bool
) -> list[Path]:
    """Decoded copies of the images, or `.npy` images themselves.

    A missing or broken copy, or one older than its image, is made first.
    """
    folder = root.resolve().parent / f"_bin_{root.resolve().name}"
    kind = "data." if arrays else ""

    def is_current(path: Path, copy: Path) -> bool:
        try:
            return copy.stat().st_mtime >= path.stat().st_mtime and read_array(copy, n_colors) is not None
        except (OSError, ValueError):
            return False

    try:
        # Keep the image's suffix, because a.png and a.jpg are different images.
        copies = {path: folder / f"{path.name}.{n_colors}.{kind}npy" for path in paths if path.suffix.lower() != NPY}
        missing = [(path, 1) for path, copy in copies.items() if not is_current(path, copy)]
        if missing:
            folder.mkdir(exist_ok=True)
        for (path, _), pixels in zip(missing, decoded(lambda source: read(source[0]), missing), strict=True):
            data = io.BytesIO()
            np.save(data, pixels)
            write_atomically(copies[path], data.getvalue())
    except OSError as error:
        raise ValueError(
            f"cache 'bin' cannot be kept in {str(folder)!r} ({error.strerror}); use cache 'in_memory' or 'none'"
        ) from error
    return [copies.get(path, path) for path in paths]


def _shrunk(image: np.ndarray, factor: int) -> np.ndarray:
    size = max(1, image.shape[0] // factor), max(1, image.shape[1] // factor)
    return image if factor == 1 else resize_bicubic(image, size, Image.Resampling.LANCZOS)
