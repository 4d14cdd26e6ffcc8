"""`upscale`: enlarge a Pillow image, numpy array or tensor by any factor; the result has the type of the input."""

from __future__ import annotations

import contextlib
import copy
import numbers
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from liif_fast.images import tiles
from liif_fast.images.picture import Picture, largest, to_depth, to_input_type, to_picture
from liif_fast.models import checkpoints
from liif_fast.ops.backends import BACKENDS
from liif_fast.utils import memory
from liif_fast.utils.hardware import usable_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_LONGEST_SIDE = 2**62
_ALPHA_ROWS = 256  # rows of alpha enlarged per step

Scale = float | tuple[float, float]
Progress = Callable[[int, int], None]
AnyImage = TypeVar("AnyImage", bound=Image.Image | np.ndarray | Tensor | Picture)


# PyTorch does not count changes of inference tensors, so the latent map would be computed again for every window.
@torch.inference_mode(False)
def upscale(
    image: AnyImage,
    *,
    scale: Scale | None = None,
    size: tuple[int, int] | None = None,
    model: nn.Module | str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
    dtype: torch.dtype | str | None = None,
    working_memory: int = tiles.DEFAULT_MEMORY,
    progress: Progress | None = None,
) -> AnyImage:
    """Upscale an image by any factor.

    Memory is bounded: large images are processed in overlapping tiles. The output is the same as without tiling, up to
    rounding.

    Args:
        image: one of
            - a Pillow image of any mode. L, LA, RGB, RGBA and 16-bit or float gray keep their mode; palettes and
              other color spaces become RGB, transparency becomes alpha. `info` is kept, its orientation is not applied;
            - a numpy array [H, W] or [H, W, C], C = 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGB, alpha), of uint8,
              uint16, or float in [0, 1];
            - a float tensor [C, H, W] or [B, C, H, W] in [0, 1], C = 1 or 3;
            - a `Picture` of `liif_fast.images.picture`.
          A model with n_colors = 1 runs gray as it is; other models run it as equal RGB, and the result is averaged.
          Alpha is enlarged by bicubic interpolation on the same grid.
        scale: a number, or one each for rows and columns. The result has max(1, round(H * scale)) rows.
        size: (rows, columns) of the result, instead of scale.
        model: a model with `encoder` and `render`, or an argument of `liif_fast.load`; None is the default model of
            `load`. A model keeps its mode and device, and has no features afterward.
        device: where to run. None: the model's device if one is given, else the tensor's, else a GPU if there is one.
        backend: the backend of the ops; None lets the ops choose.
        dtype: the dtype of the encoder and the decoder's layers: float32, bfloat16 or float16, as a torch dtype or its
            name; the 16-bit ones by autocast. None: the dtype of the model's weights.
        working_memory: target in bytes, not counting model, image and result. With less memory tiles are smaller and
            their overlap costs more time.
        progress: called with (output pixels done, all output pixels) after every step.

    Returns:
        The result, of the image's type and dtype, clipped to its range; a tensor is on the image's device.

    Raises:
        ValueError, TypeError for an unusable image, scale, size, model, dtype, device or backend; NotEnoughMemory (a
        MemoryError) if the result alone exceeds the available memory.
    """
    if isinstance(image, Tensor):
        batch = _tensor_batch(image)
        target = output_size((batch.shape[2], batch.shape[3]), scale=scale, size=size)
        _require_memory(target, batch.shape[0] * batch.shape[1] * batch.element_size())
        if device is None and model is None:
            device = image.device
        result = batch.new_empty((*batch.shape[:2], *target))
        source, write = _tensor_source(batch), _tensor_writer(result)
    else:
        picture = to_picture(image)
        target = output_size((picture.height, picture.width), scale=scale, size=size)
        _require_memory(target, picture.channels * picture.color.itemsize)
        color = np.empty((*target, picture.color.shape[2]), picture.color.dtype)
        source, write = _array_source(picture.color), _array_writer(color)
    with prepared_model(model, device, backend, dtype) as (ready, encoder_dtype):
        source = source._replace(channels=_model_channels(ready, source.channels))
        write = _with_progress(write, progress, source.batch * target[0] * target[1])
        tiles.run(ready, source, target, write, memory=working_memory, dtype=encoder_dtype)
    if isinstance(image, Tensor):
        return cast(AnyImage, result.view(*image.shape[:-2], *target))
    alpha = None if picture.alpha is None else _enlarged_alpha(picture, target)
    return to_input_type(replace(picture, color=color, alpha=alpha), image)


def output_size(
    image_size: tuple[int, int], *, scale: Scale | None = None, size: tuple[int, int] | None = None
) -> tuple[int, int]:
    """(rows, columns) of the result for an image of image_size: max(1, round(side * scale)), or `size` itself.

    Raises: ValueError unless exactly one of scale and size is given, and it is positive and finite.
    """
    if (scale is None) == (size is None):
        raise ValueError("give exactly one of scale and size.")
    if size is not None:
        if len(size) != 2 or not all(1 <= side < _LONGEST_SIDE and int(side) == side for side in size):
            raise ValueError(f"size is {tuple(size)}, but must be (rows, columns), whole numbers from 1.")
        return int(size[0]), int(size[1])
    factors: Sequence[Any] = scale if isinstance(scale, tuple | list) else (scale, scale)
    if len(factors) != 2 or not all(isinstance(factor, numbers.Real) for factor in factors):
        raise ValueError(f"scale is {scale!r}, but must be a number or one each for rows and columns.")
    sides = [float(factor) * side for factor, side in zip(factors, image_size, strict=True)]
    if not all(side < _LONGEST_SIDE and factor > 0 for side, factor in zip(sides, factors, strict=True)):
        raise ValueError(
            f"scale is {scale!r}, but must be a positive number with a result of fewer than 2^62 pixels a side."
        )
    return max(1, round(sides[0])), max(1, round(sides[1]))


def _model_channels(model: Any, channels: int) -> int:
    """How many channels the model needs from an image with `channels` of them, 1 or 3."""
    needed = getattr(model.encoder, "n_colors", 3)
    if needed not in (3, channels):
        raise ValueError(f"the model takes images of {needed} channels, but this one has {channels}: convert it first.")
    return needed


def _array_source(color: np.ndarray) -> tiles.Source:
    def read(top: int, bottom: int, left: int, right: int) -> Tensor:
        part = torch.from_numpy(to_depth(color[top:bottom, left:right], np.float32))
        return part.permute(2, 0, 1)[None]

    return tiles.Source(1, color.shape[2], color.shape[0], color.shape[1], read)


def _tensor_source(images: Tensor) -> tiles.Source:
    def read(top: int, bottom: int, left: int, right: int) -> Tensor:
        return images[:, :, top:bottom, left:right].float()

    batch, channels, height, width = images.shape
    return tiles.Source(batch, channels, height, width, read)


def _array_writer(color: np.ndarray) -> tiles.Write:
    def write(top: int, left: int, pixels: Tensor) -> None:
        part = _as_many_channels(pixels, color.shape[2])[0].permute(1, 2, 0).cpu().numpy()
        rows, cols = slice(top, top + part.shape[0]), slice(left, left + part.shape[1])
        color[rows, cols] = to_depth(part, color.dtype)

    return write


def _tensor_writer(result: Tensor) -> tiles.Write:
    def write(top: int, left: int, pixels: Tensor) -> None:
        part = _as_many_channels(pixels, result.shape[1])
        result[:, :, top : top + part.shape[2], left : left + part.shape[3]] = part

    return write


def _as_many_channels(pixels: Tensor, channels: int) -> Tensor:
    return pixels if channels == 3 else pixels.mean(1, keepdim=True)


def _with_progress(write: tiles.Write, progress: Progress | None, total: int) -> tiles.Write:
    if progress is None:
        return write
    done = 0

    def write_and_report(top: int, left: int, pixels: Tensor) -> None:
        nonlocal done
        write(top, left, pixels)
        done += pixels.shape[0] * pixels.shape[2] * pixels.shape[3]
        progress(done, total)

    return write_and_report


def _tensor_batch(image: Tensor) -> Tensor:
    if image.dim() not in (3, 4) or image.shape[-3] not in (1, 3) or 0 in image.shape:
        raise ValueError(f"a tensor must be [C, H, W] or [B, C, H, W] with C = 1 or 3, not {tuple(image.shape)}.")
    if not image.is_floating_point():
        raise TypeError(f"a tensor must hold floats in [0, 1], not {image.dtype}: convert it, e.g. image / 255.")
    low, high = (float(value) for value in image.detach().aminmax())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also true for NaN
        raise ValueError(f"a tensor must hold floats in [0, 1], not {low:g}..{high:g}: rescale it first.")
    return image.detach() if image.dim() == 4 else image.detach()[None]


def _enlarged_alpha(picture: Picture, size: tuple[int, int]) -> np.ndarray:
    """The alpha channel at `size`, by Pillow's bicubic: like the model's grid, it aligns the borders of the images."""
    alpha = cast(np.ndarray, picture.alpha)
    if picture.is_opaque:
        return np.full(size, largest(alpha.dtype), alpha.dtype)
    out = np.empty(size, alpha.dtype)
    # In float, because Pillow rounds and clips 8-bit images between columns and rows. Pillow also reads around the box.
    source = Image.fromarray(to_depth(alpha, np.float32))
    for top in range(0, size[0], _ALPHA_ROWS):
        bottom = min(top + _ALPHA_ROWS, size[0])
        first, last = (row * alpha.shape[0] / size[0] for row in (top, bottom))
        box = (0, first, alpha.shape[1], min(last, alpha.shape[0]))
        part = source.resize((size[1], bottom - top), Image.Resampling.BICUBIC, box)
        out[top:bottom] = to_depth(np.clip(np.asarray(part), 0, 1), alpha.dtype)
    return out


def _require_memory(size: tuple[int, int], pixel_bytes: int) -> None:
    what = f"A result of {size[0]}x{size[1]} pixels"
    memory.require(size[0] * size[1] * pixel_bytes, what, "choose a smaller scale or size")


@contextlib.contextmanager
def prepared_model(
    model: Any, device: torch.device | str | None, backend: str | None, dtype: torch.dtype | str | None
) -> Iterator[tuple[Any, torch.dtype]]:
    """Yields the model, ready for inference, and the dtype of its encoder's input; then restores the model.

    Arguments as for `upscale`. A model on another device is copied.
    """
    wanted = _dtype(dtype)
    place = None if device is None else usable_device(device)
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, but must be one of {', '.join(BACKENDS)}.")
    if model is None or isinstance(model, str | os.PathLike):
        model = checkpoints.load(model, device=place or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not (isinstance(model, nn.Module) and hasattr(model, "encoder") and hasattr(model, "render")):
        raise TypeError(
            f"the model must have an encoder and render, as LIIF and MetaSR do, not {type(model).__name__}."
        )
    parameter = next(model.parameters())
    if place is not None and parameter.device != place:
        model = copy.deepcopy(model).to(place)
        parameter = next(model.parameters())
    autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if wanted is not None and wanted != parameter.dtype:
        if wanted == torch.float32:
            raise ValueError(f"dtype is float32, but the model's weights are {parameter.dtype}: use model.float().")
        autocast = torch.autocast(parameter.device.type, dtype=wanted)
    training, own_backend = model.training, getattr(model, "backend", None)
    try:
        model.eval()
        if backend is not None:
            model.backend = backend
        with torch.no_grad(), autocast:
            yield model, parameter.dtype
    finally:
        model.train(training)
        model.backend = own_backend
        model.feat = None


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        dtype = DTYPES.get(dtype, cast(Any, dtype))
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype is {dtype!r}, but must be one of {', '.join(DTYPES)}.")
    return cast("torch.dtype | None", dtype)
