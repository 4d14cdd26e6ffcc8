"""Data that are not 8-bit pictures: arrays of any number of channels and any range, with NaN where there is no value.

`.npy` files are mapped into memory; libvips reads the others, above all TIFF. Both keep the file's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyvips
import torch

from liif_fast.images.fill import fill_from_nearest

NPY = ".npy"
Range = tuple[float, float]  # the values that become 0 and 1
_REACH = 100  # pixels: inputs without a value take the nearest one within this distance
_DTYPES = {
    "uchar": np.uint8,
    "char": np.int8,
    "ushort": np.uint16,
    "short": np.int16,
    "uint": np.uint32,
    "int": np.int32,
    "float": np.float32,
    "double": np.float64,
}


def read_array(path: str | Path, n_colors: int) -> np.ndarray:
    """A file as [H, W, n_colors] in its own dtype; do not write to it.

    `.npy` holds [H, W, C], or [H, W] for one channel. Other files have n_colors bands, or as many pages of one band.
    Raises ValueError, naming the file, for another number of channels, complex numbers, and a broken file.
    """
    return _opened(path, n_colors, pixels=True)[0]


def array_header(path: str | Path, n_colors: int) -> tuple[tuple[int, int], np.dtype]:
    """((H, W), dtype) of a file, without its pixels; raises ValueError as `read_array` does."""
    array, dtype = _opened(path, n_colors, pixels=False)
    return (array.shape[0], array.shape[1]), dtype


def _opened(path: str | Path, n_colors: int, pixels: bool) -> tuple[np.ndarray, np.dtype]:
    try:
        array = _mapped(path) if str(path).lower().endswith(NPY) else _from_libvips(path, n_colors, pixels)
    except (OSError, ValueError, EOFError, pyvips.Error) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{str(path)!r} cannot be read as an array ({reason}); remove it or replace it") from error
    if array.shape[2] != n_colors:
        raise ValueError(f"{str(path)!r} has {array.shape[2]} channels, but n_colors is {n_colors}; correct it")
    return array, array.dtype


def _mapped(path: str | Path) -> np.ndarray:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.ndim not in (2, 3) or 0 in array.shape or array.dtype.kind not in "biuf":
        raise ValueError(f"it holds {array.dtype} {list(array.shape)}, not numbers [H, W] or [H, W, C]")
    return array if array.ndim == 3 else array[..., None]


def _from_libvips(path: str | Path, n_colors: int, pixels: bool) -> np.ndarray:
    # A file that was replaced must not come from libvips' cache.
    options: dict[str, Any] = {"access": "sequential", "fail_on": "error", "revalidate": True}
    image: Any = pyvips.Image.new_from_file(str(path), **options)
    pages = image.get_n_pages() if image.bands == 1 and n_colors > 1 else 1
    if pages == n_colors > 1:
        image = pyvips.Image.new_from_file(str(path), n=-1, **options)
    else:
        pages = 1
    dtype = _DTYPES.get(image.format)
    if dtype is None:
        raise ValueError(f"its samples are {image.format}")
    shape = pages, image.height // pages, image.width, image.bands
    if pixels:
        # A region is computed in this thread: libvips' own threads do not exist in a forked loader process.
        array = np.frombuffer(pyvips.Region.new(image).fetch(0, 0, image.width, image.height), dtype).reshape(shape)
    else:
        array = np.broadcast_to(np.zeros((), dtype), shape)
    return array.transpose(1, 2, 0, 3).reshape(*shape[1:3], -1) if pages > 1 else array[0]


def checked_range(data_range: Sequence[float] | None, dtype: np.dtype) -> Range:
    """data_range, or what it is by default: all of uint8 and uint16, and 0 to 1, which changes nothing, for others."""
    if data_range is None:
        return (0.0, float(np.iinfo(dtype).max)) if dtype.kind == "u" and dtype.itemsize <= 2 else (0.0, 1.0)
    if len(data_range) != 2 or not -math.inf < data_range[0] < data_range[1] < math.inf:
        raise ValueError(f"data_range is {data_range!r}; it must be two numbers [low, high], low < high")
    return float(data_range[0]), float(data_range[1])


def in_unit(values: np.ndarray, data_range: Range | None) -> np.ndarray:
    """Values as float32, data_range as [0, 1], without clipping; unchanged for None. NaN stays.

    Raises ValueError for infinite values.
    """
    if data_range is None:
        return values
    low, high = data_range
    mapped = ((values.astype(np.float64) - low) / (high - low)).astype(np.float32)
    if np.isinf(mapped).any():
        raise ValueError("infinite values cannot be used; write NaN where there is no value")
    return mapped


def filled(values: torch.Tensor) -> torch.Tensor:
    """[C, H, W] with the nearest value of the channel in place of NaN."""
    valid = ~values.isnan()
    return values if valid.all() else fill_from_nearest(values[None], valid[None], _REACH)[0]
