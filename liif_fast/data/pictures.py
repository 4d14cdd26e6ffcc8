"""Single pictures: list them, decode them to 8 bits, shrink them with Pillow, convert them to tensors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from liif_fast.images import files as picture_files

Item = dict[str, torch.Tensor]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"})
ENERGY_BLOCK = 16  # pixels: the side of the blocks for which gradient energy is computed
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's mode for a number of channels


def list_images(folder: str | Path) -> list[Path]:
    """All image files of a folder in order of name; raises ValueError for a missing folder or one without images."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"image folder {str(folder)!r} does not exist; give the path of a folder with images")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"folder {str(folder)!r} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return paths


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


def resize_bicubic(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pillow's antialiased 8-bit bicubic: uint8 [H, W, C] -> uint8 [h, w, C] with size = (h, w), C = 1, 3 or 4.

    Channels are independent. Pillow would multiply RGB by a fourth channel, because it treats that as opacity.
    """
    image = np.ascontiguousarray(image)
    if image.shape[2] == 4:
        source = Image.frombuffer("RGBX", (image.shape[1], image.shape[0]), image.tobytes(), "raw", "RGBX", 0, 1)
    else:
        source = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    shrunk = np.asarray(source.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return shrunk.reshape(*size, image.shape[2])


def shrink_whole(image: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """A test pair from a whole image: (low [h, w, C], high [round(h*s), round(w*s), C]), h = floor(H / s + 1e-9).

    For a whole scale, high is the image cropped to a multiple. image: uint8, or float in [0, 1]; low is always 8-bit.
    Raises ValueError when low would have no pixels.
    Source: original datasets/wrappers.py, SRImplicitDownsampled with inp_size=None.
    """
    height, width = (math.floor(side / scale + 1e-9) for side in image.shape[:2])
    if height < 1 or width < 1:
        raise ValueError(
            f"an image of {image.shape[0]}x{image.shape[1]} pixels cannot be shrunk by {scale:g}: use a larger image"
        )
    high = image[: round(height * scale), : round(width * scale)]
    return resize_bicubic(to_bytes(high), (height, width)), high


def to_bytes(image: np.ndarray) -> np.ndarray:
    """uint8 unchanged; floats in [0, 1] scaled to 0..255 and rounded."""
    return image if image.dtype == np.uint8 else np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def to_unit(samples: np.ndarray) -> torch.Tensor:
    """float32 of the same shape: uint8 divided by 255, floats unchanged."""
    tensor = torch.from_numpy(np.array(samples)).float()  # a copy: the samples may belong to a cache
    return tensor.div_(255) if samples.dtype == np.uint8 else tensor


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 (or float) [H, W, C] -> float32 [C, H, W] in [0, 1]."""
    return to_unit(image.transpose(2, 0, 1)).contiguous()


def gradient_energy(image: np.ndarray) -> np.ndarray:
    """Mean absolute difference between neighboring pixels, per block of ENERGY_BLOCK pixels a side.

    image: uint8 [H, W, C]. Returns float64 [ceil(H / block), ceil(W / block)] on the scale of 0 to 255.
    """
    gray = image.astype(np.int16).sum(axis=2)
    change = np.zeros(gray.shape, dtype=np.int64)
    change[:-1] += np.abs(np.diff(gray, axis=0))
    change[:, :-1] += np.abs(np.diff(gray, axis=1))
    rows, columns = (np.arange(0, side, ENERGY_BLOCK) for side in gray.shape)
    total = np.add.reduceat(np.add.reduceat(change, rows, axis=0), columns, axis=1)
    pixels = np.diff(np.append(rows, gray.shape[0]))[:, None] * np.diff(np.append(columns, gray.shape[1]))[None]
    return total / (pixels * image.shape[2])
