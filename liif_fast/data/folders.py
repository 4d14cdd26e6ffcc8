"""Folders of images as datasets, `image-folder` and `paired-image-folders`; memory and caches hold 8-bit images."""

from __future__ import annotations

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

from liif_fast.data.pictures import MODES, header_size, list_images, read_pixels, to_tensor
from liif_fast.data.registry import register
from liif_fast.utils import memory
from liif_fast.utils.files import write_atomically

MIN_COPY_SIDE = 256  # pixels: copies shrunk below this are left out, because all their crops would be alike
CACHES = ("none", "bin", "in_memory")


@register("image-folder")
class ImageFolder(Dataset[torch.Tensor]):
    """The images of one folder, as float32 [n_colors, H, W] in [0, 1].

    root_path: the folder. split_file (JSON), split_key: use the names listed there instead of all images.
    first_k: use only the first k images. repeat: the length is this multiple of the number of images.
    cache: 'none' decodes at every access; 'bin' decodes once into `_bin_<folder>` next to the folder and maps those
        files, which all processes share; 'in_memory' keeps uint8 [H, W, n_colors], a quarter of the bytes of floats.
    shrink: factors by which copies of the images are shrunk (1 is the image itself), as additional, sharper data.
    n_colors: 1 (gray), 3 (RGB) or 4 (RGBA).
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
    ) -> None:
        if cache not in CACHES:
            raise ValueError(f"cache is {cache!r}; it must be 'none', 'bin' or 'in_memory'")
        if repeat < 1 or not shrink or any(factor < 1 for factor in shrink):
            raise ValueError(f"repeat ({repeat}) and every shrink factor ({list(shrink)}) must be at least 1")
        if n_colors not in MODES:
            raise ValueError(f"n_colors is {n_colors!r}; it must be 1 (gray), 3 (RGB) or 4 (RGBA)")
        if cache == "bin" and tuple(shrink) != (1,):
            raise ValueError("cache 'bin' cannot hold shrunken copies: use cache 'in_memory' with shrink")
        if first_k is not None and first_k < 1:
            raise ValueError(f"first_k is {first_k}; it must be at least 1, or left out for all images")
        paths = list_images(root_path) if split_file is None else _listed(Path(root_path), split_file, split_key)
        self.repeat, self.n_colors = repeat, n_colors
        self.paths = paths[:first_k]
        self._sources = [(path, factor) for factor in shrink for path in self.paths]
        self._binaries: list[Path] | None = None
        self._cache: list[np.ndarray] | None = None
        if cache == "bin":
            self._binaries = _cached_on_disk(Path(root_path), self.paths, n_colors)
        elif cache == "in_memory" or tuple(shrink) != (1,):
            _require_memory(self._sources, n_colors)
            images = decoded(lambda source: _shrunk(read_pixels(source[0], n_colors), source[1]), self._sources)
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
        """The item as uint8 [H, W, n_colors]; do not write to it."""
        index %= len(self._sources)
        if self._cache is not None:
            return self._cache[index]
        if self._binaries is not None:
            return np.load(self._binaries[index], mmap_mode="r")
        return read_pixels(self._sources[index][0], self.n_colors)

    def __getitem__(self, index: int) -> torch.Tensor:
        return to_tensor(self.array(index))


@register("paired-image-folders")
class PairedImageFolders(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Pairs of images from two folders in order of name: root_path_1 holds the small images, root_path_2 the large.

    The other arguments are those of `ImageFolder` and apply to both folders. An item is (small, large).
    Raises ValueError as ImageFolder does, and when the folders hold different numbers of images.
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
    ) -> None:
        self.dataset_1, self.dataset_2 = (
            ImageFolder(root, split_file, split_key, first_k, repeat, cache, n_colors=n_colors)
            for root in (root_path_1, root_path_2)
        )
        self.n_colors = n_colors
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
        """The pair as uint8 [h, w, n_colors] and [H, W, n_colors]; do not write to them."""
        return self.dataset_1.array(index), self.dataset_2.array(index)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.dataset_1[index], self.dataset_2[index]


def decoded(make: Callable[[Any], np.ndarray], sources: Sequence[Any]) -> Iterator[np.ndarray]:
    """make(source) of every source in order, in a few threads (decoders release the GIL), with a progress bar."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from tqdm(
            pool.map(make, sources), "images", len(sources), unit="image", leave=False, disable=not sys.stderr.isatty()
        )


def _require_memory(sources: Sequence[tuple[Path, int]], n_colors: int) -> None:
    total = 0.0
    for path, factor in sources:
        height, width = header_size(path)
        total += height * width * n_colors / factor**2
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


def _cached_on_disk(root: Path, paths: Sequence[Path], n_colors: int) -> list[Path]:
    """Decoded copies of the images; a missing copy, or one older than its image, is made first."""
    folder = root.resolve().parent / f"_bin_{root.resolve().name}"
    try:
        folder.mkdir(exist_ok=True)
        # Keep the image's suffix, because a.png and a.jpg are different images.
        copies = {path: folder / f"{path.name}.{n_colors}.npy" for path in paths}
        missing = [
            path for path, copy in copies.items() if not copy.exists() or copy.stat().st_mtime < path.stat().st_mtime
        ]
        for path, pixels in zip(missing, decoded(lambda path: read_pixels(path, n_colors), missing), strict=True):
            data = io.BytesIO()
            np.save(data, pixels)
            write_atomically(copies[path], data.getvalue())
    except OSError as error:
        raise ValueError(
            f"cache 'bin' cannot be kept in {str(folder)!r} ({error.strerror}); use cache 'in_memory' or 'none'"
        ) from error
    return list(copies.values())


def _shrunk(image: np.ndarray, factor: int) -> np.ndarray:
    if factor == 1:
        return image
    height, width = max(1, image.shape[0] // factor), max(1, image.shape[1] // factor)
    planes = [Image.fromarray(image[..., channel]) for channel in range(image.shape[2])]
    return np.stack([np.asarray(plane.resize((width, height), Image.Resampling.LANCZOS)) for plane in planes], axis=-1)
