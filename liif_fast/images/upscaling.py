"""`upscale`: enlarge a Pillow image, numpy array or tensor by any factor; the result has the type of the input."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
import numbers
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from liif_fast.images import tiles
from liif_fast.images.picture import Picture, to_input_type, to_picture
from liif_fast.images.sources import ArrayRows, RowImage, Rows, TensorImage, Values
from liif_fast.models import checkpoints
from liif_fast.models.base import in_eval_mode
from liif_fast.ops.backends import BACKENDS
from liif_fast.utils import memory
from liif_fast.utils.hardware import emulates, usable_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_LONGEST_SIDE = 2**62
_ORIENTATION = 0x0112
_log = logging.getLogger(__name__)

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
    data_range: tuple[float, float] | None = None,
    working_memory: int = tiles.DEFAULT_MEMORY,
    ensemble: bool = False,
    progress: Progress | None = None,
) -> AnyImage:
    """Upscale an image, or other data on a grid, by any factor.

    Memory is bounded: large images are processed in overlapping tiles. The output is the same as without tiling, up to
    rounding. Any number of threads may use one model at the same time.

    Args:
        image: one of
            - a Pillow image of any mode. L, LA, RGB, RGBA and 16-bit or float gray keep their mode; palettes and
              other color spaces become RGB, transparency becomes alpha. `info` is kept. An EXIF orientation is applied,
              and the result has none: its rows are those that a viewer shows;
            - a numpy array [H, W] or [H, W, C], C = 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGB, alpha), of uint8,
              uint16, or float in [0, 1];
            - a float tensor [C, H, W] or [B, C, H, W] in [0, 1], C = 1 or 3;
            - a `Picture` of `liif_fast.images.picture`.
          A model with n_colors = 1 runs gray as it is; other models run it as equal RGB, and the result is averaged.
          Alpha is enlarged by bicubic interpolation on the same grid. Colors under alpha 0 have no influence: before
          encoding, such pixels take the color of the nearest visible ones.
          A model of another n_colors takes arrays and tensors of as many channels, none of which is alpha.
        scale: a number, or one each for rows and columns. The result has max(1, round(H * scale)) rows.
        size: (rows, columns) of the result, instead of scale.
        model: a model with `encoder` and `render`, or an argument of `liif_fast.load`; None is the default model of
            `load`. A model is not changed; it runs in eval mode, whatever its own mode is.
        device: where to run. None: the model's device if one is given, else the tensor's, else a GPU if there is one.
        backend: the backend of the ops; None lets the ops choose.
        dtype: the dtype of the encoder and the decoder's layers: float32, bfloat16 or float16, as a torch dtype or its
            name; the 16-bit ones by autocast. None: the dtype of the model's weights. A processor without products in
            a 16-bit dtype would take many times longer, so it computes in float32 there, and the log says so.
        data_range: (low, high) for arrays and tensors of other data than colors: these numbers become 0 and 1 for the
            model, whose n_colors must be the number of channels (or 3 for one). Arrays may then have any real dtype.
            Values beyond the range are allowed, nothing is clipped, and no channel is alpha. NaN marks missing values,
            channel by channel: for the model they take the nearest value, and outputs nearest to them are NaN.
            A model whose `data_norm` is for other numbers than [0, 1] takes such data without data_range.
        working_memory: target in bytes, for a tile and for a band of the result, not counting model, image and result.
            With less memory tiles are smaller and their overlap costs more time.
        ensemble: whether to average the results of the eight flips and turns of the image: 8 times the time.
        progress: called with (output pixels done, all output pixels) after every step.

    Returns:
        The result, of the image's type and dtype, clipped to its range; a tensor is on the image's device.

    Raises:
        ValueError, TypeError for an unusable image, scale, size, model, dtype, device, backend or data_range;
        NotEnoughMemory (a MemoryError) if the result alone exceeds the available memory.
    """
    given: Any = _upright(image) if isinstance(image, Image.Image) else image
    if data_range is not None:
        _check_data_range(data_range, given)
    whole: Any = _samples(given) if isinstance(given, np.ndarray | Tensor) else to_picture(given)
    if isinstance(whole, Tensor):
        (height, width), pixel_bytes = whole.shape[2:], whole.shape[0] * whole.shape[1] * whole.element_size()
        device = whole.device if device is None and model is None else device
    elif isinstance(whole, np.ndarray):
        (height, width), pixel_bytes = whole.shape[:2], whole.shape[2] * whole.itemsize
    else:
        height, width, pixel_bytes = whole.height, whole.width, whole.channels * whole.color.itemsize
    target = output_size((height, width), scale=scale, size=size)
    what = f"A result of {target[0]}x{target[1]} pixels"
    memory.require(target[0] * target[1] * pixel_bytes, what, "choose a smaller scale or size")
    with prepared_model(model, device, backend, dtype) as (ready, encoder_dtype):
        values = Values() if isinstance(whole, Picture) else _values(data_range, ready)
        job, result = _job(whole, target, getattr(ready.encoder, "n_colors", 3), values)
        _run(job, ready, target, encoder_dtype, (working_memory, ensemble, progress))
    if isinstance(whole, Picture):
        return to_input_type(result, given)
    if isinstance(whole, Tensor):
        return cast(AnyImage, result.view(*given.shape[:-2], *target))
    return cast(AnyImage, result[..., 0] if given.ndim == 2 else result)


@torch.inference_mode(False)
def upscale_rows(
    source: Rows,
    write: Callable[[np.ndarray], None],
    size: tuple[int, int],
    *,
    model: nn.Module | str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
    dtype: torch.dtype | str | None = None,
    working_memory: int = tiles.DEFAULT_MEMORY,
    ensemble: bool = False,
    progress: Progress | None = None,
) -> None:
    """Upscale a picture that is read and written row by row: the memory does not depend on its height.

    Args:
        source: the picture; alpha is treated as in `upscale`.
        write: receives the rows of the result in order, [n, columns, channels] of the source's dtype.
        size: (rows, columns) of the result.
        model, device, backend, dtype, working_memory, ensemble, progress: as for `upscale`. With a model whose encoder
            depends on the whole image (RCAN), the whole source is read at once.

    Raises: as `upscale`; errors of `source` and `write` pass.
    """
    target = output_size((source.height, source.width), size=size)
    with prepared_model(model, device, backend, dtype) as (ready, encoder_dtype):
        job = RowImage(source, write, target, getattr(ready.encoder, "n_colors", 3), Values())
        _run(job, ready, target, encoder_dtype, (working_memory, ensemble, progress))


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


def _run(
    job: RowImage | TensorImage,
    model: Any,
    size: tuple[int, int],
    dtype: torch.dtype,
    options: tuple[int, bool, Progress | None],  # working_memory, ensemble, progress
) -> None:
    working_memory, ensemble, progress = options
    done, times = 0, len(tiles.TURNS) if ensemble else 1

    def report(pixels: int) -> None:
        nonlocal done
        done += pixels
        if progress is not None:
            progress(done // times, job.source.batch * size[0] * size[1])

    tiles.run(
        model, job.source, size, job.write, memory=working_memory, dtype=dtype, ensemble=ensemble, progress=report
    )


def _upright(image: Image.Image) -> Image.Image:
    """The image with its EXIF orientation applied."""
    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
    except (SyntaxError, ValueError, struct.error):  # broken EXIF
        turned = False
    return ImageOps.exif_transpose(image) if turned else image


def _samples(image: np.ndarray | Tensor) -> Any:
    """An array as [H, W, C], or a tensor as [B, C, H, W]."""
    if isinstance(image, Tensor):
        if image.dim() not in (3, 4) or 0 in image.shape:
            raise ValueError(f"a tensor must be [C, H, W] or [B, C, H, W], not {tuple(image.shape)}.")
        if not image.is_floating_point():
            raise TypeError(f"a tensor must hold floats, not {image.dtype}: convert it, e.g. image / 255.")
        return image.detach() if image.dim() == 4 else image.detach()[None]
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise ValueError(f"an array must be [H, W] or [H, W, C], not {image.shape}.")
    return image[..., None] if image.ndim == 2 else image


def _check_data_range(data_range: Any, image: Any) -> None:
    if not isinstance(image, np.ndarray | Tensor):
        kind = type(image).__name__
        raise TypeError(f"data_range is for arrays and tensors, not for a {kind}: convert it by numpy.asarray.")
    if len(data_range) != 2 or not -math.inf < data_range[0] < data_range[1] < math.inf:
        raise ValueError(f"data_range is {data_range!r}, but must be two numbers, the smaller one first.")


def _values(data_range: tuple[float, float] | None, model: Any) -> Values:
    """What an array or tensor holds: data if there is a range or the model's normalization is not for [0, 1]."""
    if data_range is not None:
        return Values(True, float(data_range[0]), float(data_range[1]) - float(data_range[0]))
    inp = (getattr(model, "data_norm", None) or {}).get("inp", {})
    is_for_colors = all(0 <= value <= 1 for part in inp.values() for value in part)
    return Values(are_data=not is_for_colors)


def _job(whole: Any, size: tuple[int, int], n_colors: int, values: Values) -> tuple[RowImage | TensorImage, Any]:
    """The job of a Picture, an array [H, W, C] or a tensor [B, C, H, W], and the result that it fills."""
    if isinstance(whole, Tensor):
        values.check(whole, "a tensor")
        result: Any = whole.new_empty((*whole.shape[:2], *size))
        return TensorImage(whole, result, n_colors, values), result
    if isinstance(whole, Picture):
        color = np.empty((*size, whole.color.shape[2]), whole.color.dtype)
        alpha = None if whole.alpha is None else np.empty(size, whole.alpha.dtype)
        result = Picture(color, alpha, whole.description)
        rows = ArrayRows(whole.color, whole.alpha, color.dtype)
    else:
        kind = whole.dtype.kind
        if kind not in "fiu" or not (values.are_data or kind == "f" or whole.dtype.str[1:] in ("u1", "u2")):
            other = "convert it, or give data_range=(low, high)"
            raise TypeError(f"an array must be uint8, uint16 or float, not {whole.dtype}: {other}.")
        if kind == "f":
            values.check(whole, "an array")
        result = np.empty((*size, whole.shape[2]), whole.dtype)
        colors = whole.shape[2] - (whole.shape[2] in (2, 4) and not values.are_data)  # the others are alpha
        color, alpha = result[..., :colors], result[..., -1] if colors < whole.shape[2] else None
        dtype = np.float32 if kind == "f" and not values.are_data else whole.dtype.newbyteorder("=")
        rows = ArrayRows(whole[..., :colors], None if alpha is None else whole[..., -1], dtype)
    done = 0

    def write(samples: np.ndarray) -> None:
        nonlocal done
        part = slice(done, done + len(samples))
        color[part] = samples[..., : color.shape[2]]
        if alpha is not None:
            alpha[part] = samples[..., -1]
        done += len(samples)

    return RowImage(rows, write, size, n_colors, values), result


@contextlib.contextmanager
def prepared_model(
    model: Any, device: torch.device | str | None, backend: str | None, dtype: torch.dtype | str | None
) -> Iterator[tuple[Any, torch.dtype]]:
    """Yields a copy of the model that is ready for inference and shares its weights, and the dtype of its input.

    Arguments as for `upscale`. The model itself is not written to, so that several threads may use it.
    """
    wanted = _dtype(dtype)
    place = None if device is None else usable_device(device)
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, but must be one of {', '.join(BACKENDS)}.")
    if model is None or isinstance(model, str | os.PathLike):
        model = checkpoints.load(model, device=place or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = checkpoints.unwrapped(model)
    if not (isinstance(model, nn.Module) and hasattr(model, "encoder") and hasattr(model, "render")):
        raise TypeError(
            f"the model must have an encoder and render, as LIIF and MetaSR do, not {type(model).__name__}."
        )
    model = in_eval_mode(model)
    parameter = next(model.parameters())
    if place is not None and parameter.device != place:
        model = copy.deepcopy(model).to(place)
        parameter = next(model.parameters())
    autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if wanted is not None and wanted != parameter.dtype:
        if wanted == torch.float32:
            raise ValueError(f"dtype is float32, but the model's weights are {parameter.dtype}: use model.float().")
        if emulates(parameter.device, wanted):
            _report_emulation(wanted)
        else:
            # All threads share the cache: a training step in another thread would find casts without gradients.
            autocast = torch.autocast(parameter.device.type, dtype=wanted, cache_enabled=False)
    model.feat = None
    if backend is not None:
        model.backend = backend
    with torch.no_grad(), autocast:
        yield model, parameter.dtype


@functools.cache  # one line for a folder of images
def _report_emulation(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    _log.info("this processor has no %s products and would emulate them slowly: float32 is used instead", name)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        dtype = DTYPES.get(dtype, cast(Any, dtype))
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype is {dtype!r}, but must be one of {', '.join(DTYPES)}.")
    return cast("torch.dtype | None", dtype)
