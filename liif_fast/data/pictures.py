"""Single pictures: list them, decode them to 8 bits, shrink them with Pillow, convert them to tensors."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from liif_fast.data.arrays import NPY
from liif_fast.images import files as picture_files
from liif_fast.images.folders import list_pictures

Item = dict[str, torch.Tensor]
Resize = Callable[[np.ndarray, tuple[int, int]], np.ndarray]

ENERGY_BLOCK = 16  # pixels: the side of the blocks for which gradient energy is computed
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's mode for a number of channels


def list_images(folder: str | Path) -> list[Path]:
    """The pictures of a folder in order of name, or its `.npy` files if it has no picture; the log tells the rest.

    Raises ValueError for a missing folder or one without images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"image folder {str(folder)!r} does not exist; give the path of a folder with images")
    pictures, left_out = list_pictures(folder)
    paths = pictures or [path for path in left_out if path.suffix.lower() == NPY]
    if not paths:
        raise ValueError(f"folder {str(folder)!r} holds no image (such as .png, .jpg, .tif) and no array ({NPY})")
    names = [path.name for path in left_out if path not in paths]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        _tell_once(f"{folder} holds {len(paths)} images; left out: {', '.join(names[:3])}{more}")
    return paths


@functools.cache
def _tell_once(sentence: str) -> None:
    logging.getLogger("liif_fast").info(sentence)


def read_pixels(path: str | Path, n_colors: int = 3) -> np.ndarray:
    """Decode an image file as uint8 [H, W, n_colors]: 1 is gray, 3 RGB, 4 RGBA.

    16-bit and float files are scaled to 8 bits. As in the original, EXIF orientation is ignored, so that both images of
    a pair keep the same orientation. Raises ValueError, naming the file, when it is not an image.
    """
    try:
        with Image.open(path) as image:
            if image.mode[0] not in "IF":  # in 16-bit and float gray files Pillow would clip values at 255
                samples = np.asarray(image.convert(MODES[n_colors]))
                return samples[..., None] if samples.ndim == 2 else samples
        deep = picture_files.to_pil(picture_files.read(path))
        eight = picture_files.to_depth(picture_files.from_pil(deep).color, np.uint8)
        samples = np.asarray(Image.fromarray(eight[..., 0]).convert(MODES[n_colors]))
        return samples[..., None] if samples.ndim == 2 else samples
    except (OSError, UnidentifiedImageError, picture_files.ImageError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as an image ({error}); remove it or replace it") from error


def header_size(path: str | Path) -> tuple[int, int]:
    """(H, W) from an image file's header; raises ValueError, naming the file, when it is not an image."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as an image ({error}); remove it or replace it") from error


def read_rgb(path: str | Path) -> np.ndarray:
    """Decode an image file as uint8 RGB [H, W, 3]; raises ValueError, naming the file, when it is not an image."""
    return read_pixels(path, 3)


def resize_bicubic(
    image: np.ndarray, size: tuple[int, int], resample: Image.Resampling = Image.Resampling.BICUBIC
) -> np.ndarray:
    """Pillow's antialiased bicubic, channel by channel: [H, W, C] -> [h, w, C] with size = (h, w).

    uint8 is resized in 8 bits, as in the original; the same filter makes float32 of any other dtype. A result with NaN
    under the filter is the mean of the valid pixels, weighted by a triangle of its width; NaN if there are none.
    """
    if image.dtype == np.uint8 and image.shape[2] == 3:  # the same as by planes, and faster
        return _resized(image, size, resample)
    planes = [image[..., channel] for channel in range(image.shape[2])]
    if image.dtype == np.uint8:
        return np.stack([_resized(plane, size, resample) for plane in planes], axis=-1)
    return np.stack([_resized_around_nan(plane.astype(np.float32), size, resample) for plane in planes], axis=-1)


def _resized(plane: np.ndarray, size: tuple[int, int], resample: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(plane)).resize(size[::-1], resample))


def _resized_around_nan(plane: np.ndarray, size: tuple[int, int], resample: Image.Resampling) -> np.ndarray:
    result = _resized(plane, size, resample)  # NaN wherever the filter meets one
    if not np.isnan(result).any():
        return result
    valid, triangle = ~np.isnan(plane), Image.Resampling.BILINEAR  # its weights are not negative
    weights = _resized(valid.astype(np.float32), size, triangle)
    sums = _resized(np.where(valid, plane, np.float32(0)), size, triangle)
    mean = np.divide(sums, weights, out=np.full_like(sums, np.nan), where=weights > 1e-6)
    return np.where(np.isnan(result), mean, result)


def shrink_whole(image: np.ndarray, scale: float, resize: Resize = resize_bicubic) -> tuple[np.ndarray, np.ndarray]:
    """A test pair from a whole image: (low [h, w, C], high [round(h*s), round(w*s), C]), h = floor(H / s + 1e-9).

    For a whole scale, high is the image cropped to a multiple. resize(high, (h, w)) makes low.
    Raises ValueError when low would have no pixels.
    Source: original datasets/wrappers.py, SRImplicitDownsampled with inp_size=None.
    """
    height, width = (math.floor(side / scale + 1e-9) for side in image.shape[:2])
    if height < 1 or width < 1:
        raise ValueError(
            f"an image of {image.shape[0]}x{image.shape[1]} pixels cannot be shrunk by {scale:g}; use a larger image"
        )
    high = image[: round(height * scale), : round(width * scale)]
    return resize(high, (height, width)), high


def to_bytes(image: np.ndarray) -> np.ndarray:
    """uint8 unchanged; floats in [0, 1] scaled to 0..255 and rounded; ValueError for floats outside, or NaN."""
    if image.dtype == np.uint8:
        return image
    if not (image.min() >= -1e-3 and image.max() <= 1 + 1e-3):
        raise ValueError(
            f"a float image must hold [0, 1], not {image.min():g} to {image.max():g}; give its dataset the attribute "
            "data_range = (low, high)"
        )
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def to_unit(samples: np.ndarray) -> torch.Tensor:
    """float32 of the same shape: uint8 divided by 255, floats unchanged."""
    tensor = torch.from_numpy(np.array(samples)).float()  # a copy: the samples may belong to a cache
    return tensor.div_(255) if samples.dtype == np.uint8 else tensor


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 (or float) [H, W, C] -> float32 [C, H, W] in [0, 1]."""
    return to_unit(image.transpose(2, 0, 1)).contiguous()


def gradient_energy(image: np.ndarray) -> np.ndarray:
    """Mean absolute difference between neighboring pixels, per block of ENERGY_BLOCK pixels a side.

    image: uint8 [H, W, C], or float with 1 as the largest value, where NaN adds nothing.
    Returns float64 [ceil(H / block), ceil(W / block)] on the scale of 0 to 255.
    """
    gray = image.astype(np.int64).sum(axis=2) if image.dtype == np.uint8 else 255 * image.astype(np.float64).sum(axis=2)
    change = np.zeros_like(gray)
    change[:-1] += np.abs(np.diff(gray, axis=0))
    change[:, :-1] += np.abs(np.diff(gray, axis=1))
    change = np.nan_to_num(change)
    rows, columns = (np.arange(0, side, ENERGY_BLOCK) for side in gray.shape)
    total = np.add.reduceat(np.add.reduceat(change, rows, axis=0), columns, axis=1)
    pixels = np.diff(np.append(rows, gray.shape[0]))[:, None] * np.diff(np.append(columns, gray.shape[1]))[None]
    return total / (pixels * image.shape[2])
