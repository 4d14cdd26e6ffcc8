"""`upscale`: a Pillow image, numpy array or tensor in, the same kind of thing out, larger by any factor."""

from __future__ import annotations

import contextlib
import copy
import numbers
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from liif_fast.images import tiles
from liif_fast.images.files import Picture, from_pil, to_depth, to_pil, unit_range
from liif_fast.models import checkpoints
from liif_fast.ops.backends import BACKENDS
from liif_fast.utils import memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_LONGEST_SIDE = 2**62
_ALPHA_ROWS = 256  # rows of alpha enlarged at a time

Scale = float | tuple[float, float]
Progress = Callable[[int, int], None]
AnyImage = TypeVar("AnyImage", bound=Image.Image | np.ndarray | Tensor | Picture)


# Inference tensors cannot be watched: with them the latent map would be made anew for every window.
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

    Encoder and decoder run over bands of the image with the halo that makes them exact, and the result is written band
    by band: beside input and result, memory is bounded by `working_memory`, and the result is the one without bands.

    Args:
        image: one of
            - a Pillow image of any mode. L, LA, RGB, RGBA and 16-bit or float grey keep their mode; palettes and
              other colour spaces become RGB, transparency becomes alpha. `info` stays, its orientation is not applied;
            - a numpy array [H, W] or [H, W, C], C = 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha), of uint8,
              uint16, or float in [0, 1];
            - a float tensor [C, H, W] or [B, C, H, W] in [0, 1], C = 1 or 3;
            - a `Picture` of `liif_fast.images.files`.
          Grey is run as equal RGB and averaged, or as it is by a model with n_colors = 1; alpha is enlarged by bicubic
          interpolation on the same grid.
        scale: a number, or one each for rows and columns. The result has max(1, round(H * scale)) rows.
        size: (rows, columns) of the result, instead of scale.
        model: a model with `encoder` and `render`, or what `liif_fast.load` takes; None is the shipped model. A model
            given is borrowed: it comes back in its mode and place, without features.
        device: where to run. None: the model's if one is given, else the tensor's, else a GPU if there is one.
        backend: of the ops; None lets them choose.
        dtype: of the encoder and the decoder's layers: float32, bfloat16 or float16, as a torch dtype or its name; the
            16-bit ones by autocast. None: that of the model's weights.
        working_memory: bytes to aim at beside model, image and result. Less means thinner bands and more work on halos.
        progress: called with (output pixels done, all output pixels) after every step.

    Returns:
        The result, of the image's type and dtype, clipped to its range; a tensor on the image's device.

    Raises:
        ValueError, TypeError for an unusable image, scale, size, model, dtype, device or backend; NotEnoughMemory (a
        MemoryError) when the result alone exceeds what there is.
    """
    if isinstance(image, Tensor):
        batch = _tensor_batch(image)
        target = output_size((batch.shape[2], batch.shape[3]), scale=scale, size=size)
        _require_memory(target, batch.shape[0] * batch.shape[1] * batch.element_size())
        if device is None and model is None:
            device = image.device
        result = batch.new_empty((*batch.shape[:2], *target))
        source: _TensorSource | _ArraySource = _TensorSource(batch)
        write, pixels = _tensor_writer(result), batch.shape[0] * target[0] * target[1]
    else:
        picture = _to_picture(image)
        target = output_size((picture.height, picture.width), scale=scale, size=size)
        _require_memory(target, picture.channels * picture.colour.itemsize)
        colour = np.empty((*target, picture.colour.shape[2]), picture.colour.dtype)
        source = _ArraySource(picture.colour)
        write, pixels = _array_writer(colour), target[0] * target[1]
    with _borrowed(model, device, backend, dtype) as (ready, encoder_dtype):
        source.colours = _colours(ready, source.colours)
        write = _with_progress(write, progress, pixels)
        tiles.run(ready, source, target, write, memory=working_memory, dtype=encoder_dtype)
    if isinstance(image, Tensor):
        return cast(AnyImage, result.view(*image.shape[:-2], *target))
    alpha = None if picture.alpha is None else _resized(picture.alpha, target)
    return _like(image, Picture(colour, alpha, picture.icc_profile, picture.exif))


def output_size(
    image_size: tuple[int, int], *, scale: Scale | None = None, size: tuple[int, int] | None = None
) -> tuple[int, int]:
    """(rows, columns) of the result for an image of image_size: max(1, round(side * scale)), or `size` itself.

    Raises: ValueError when not exactly one of scale and size is given, or it is not positive and finite.
    """
    if (scale is None) == (size is None):
        raise ValueError("give either scale or size: the one decides the other.")
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
            f"scale is {scale!r}, but must be a positive number that leaves fewer than 2^62 pixels a side."
        )
    return max(1, round(sides[0])), max(1, round(sides[1]))


def _colours(model: Any, colours: int) -> int:
    """How many channels the model wants of an image that has `colours` of them, 1 or 3."""
    wanted = getattr(model.encoder, "n_colors", 3)
    if wanted not in (3, colours):
        raise ValueError(f"the model takes images of {wanted} channels, but this one has {colours}: convert it first.")
    return wanted


class _ArraySource:
    """Tiles of an array [H, W, 1 or 3]; `colours` is how many channels they are given out with."""

    def __init__(self, colour: np.ndarray) -> None:
        self.colour = colour
        self.batch = 1
        self.height, self.width, self.colours = colour.shape

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        part = torch.from_numpy(to_depth(self.colour[top:bottom, left:right], np.float32))
        return part.permute(2, 0, 1)[None].expand(1, self.colours, -1, -1)


class _TensorSource:
    """Tiles of a tensor [B, 1 or 3, H, W]; `colours` as for _ArraySource."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.batch, self.colours, self.height, self.width = images.shape

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        return self.images[:, :, top:bottom, left:right].float().expand(-1, self.colours, -1, -1)


def _array_writer(colour: np.ndarray) -> tiles.Write:
    def write(top: int, left: int, pixels: Tensor) -> None:
        part = _as_many_channels(pixels, colour.shape[2])[0].permute(1, 2, 0).cpu().numpy()
        rows, cols = slice(top, top + part.shape[0]), slice(left, left + part.shape[1])
        colour[rows, cols] = to_depth(part, colour.dtype)

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

    def write_and_tell(top: int, left: int, pixels: Tensor) -> None:
        nonlocal done
        write(top, left, pixels)
        done += pixels.shape[0] * pixels.shape[2] * pixels.shape[3]
        progress(done, total)

    return write_and_tell


def _tensor_batch(image: Tensor) -> Tensor:
    if image.dim() not in (3, 4) or image.shape[-3] not in (1, 3) or 0 in image.shape:
        raise ValueError(f"a tensor must be [C, H, W] or [B, C, H, W] with C = 1 or 3, not {tuple(image.shape)}.")
    if not image.is_floating_point():
        raise TypeError(f"a tensor must hold floats in [0, 1], not {image.dtype}: convert it, e.g. image / 255.")
    low, high = (float(value) for value in image.detach().aminmax())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also refuses NaN
        raise ValueError(f"a tensor must hold floats in [0, 1], not {low:g}..{high:g}: rescale it first.")
    return image.detach() if image.dim() == 4 else image.detach()[None]


def _to_picture(image: Any) -> Picture:
    if isinstance(image, Picture):
        return image
    if isinstance(image, Image.Image):
        return from_pil(image)
    if not isinstance(image, np.ndarray):
        raise TypeError(f"the image must be a Pillow image, a numpy array or a tensor, not {type(image).__name__}.")
    samples = image[..., None] if image.ndim == 2 else image
    if samples.ndim != 3 or samples.shape[2] not in (1, 2, 3, 4) or 0 in samples.shape:
        raise ValueError(f"an array must be [H, W] or [H, W, C] with C = 1, 2, 3 or 4, not {image.shape}.")
    if samples.dtype.kind == "f":
        samples = unit_range(samples)
    elif samples.dtype.kind != "u" or samples.dtype.itemsize > 2:
        raise TypeError(f"an array must be uint8, uint16 or float, not {image.dtype}: convert it first.")
    samples = samples.astype(samples.dtype.newbyteorder("="), copy=False)
    has_alpha = samples.shape[2] in (2, 4)
    return Picture(samples[..., : samples.shape[2] - has_alpha], samples[..., -1] if has_alpha else None)


def _like(image: Any, result: Picture) -> Any:
    """The result as what `image` is."""
    if isinstance(image, Picture):
        return result
    if isinstance(image, Image.Image):
        pil = to_pil(result)
        pil.info = {key: value for key, value in image.info.items() if key != "transparency"}  # that is alpha now
        if result.icc_profile is None:
            pil.info.pop("icc_profile", None)
        return pil
    alpha = [] if result.alpha is None else [result.alpha[..., None]]
    samples = np.concatenate([result.colour, *alpha], -1) if alpha else result.colour
    return (samples[..., 0] if image.ndim == 2 else samples).astype(image.dtype, copy=False)


def _resized(alpha: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """alpha [H, W] at `size` by Pillow's bicubic, whose grid is that of the model: pixel centres, equal borders."""
    largest = 1.0 if alpha.dtype.kind == "f" else float(np.iinfo(alpha.dtype).max)
    if (alpha == largest).all():
        return np.full(size, largest, alpha.dtype)
    out = np.empty(size, alpha.dtype)
    # In floats, as Pillow rounds and clips 8-bit images between columns and rows. A box reads pixels beside it, too.
    source = Image.fromarray(to_depth(alpha, np.float32))
    for top in range(0, size[0], _ALPHA_ROWS):
        bottom = min(top + _ALPHA_ROWS, size[0])
        box = (
            0,
            top * alpha.shape[0] / size[0],
            alpha.shape[1],
            min(bottom * alpha.shape[0] / size[0], alpha.shape[0]),
        )
        band = source.resize((size[1], bottom - top), Image.Resampling.BICUBIC, box)
        out[top:bottom] = to_depth(np.clip(np.asarray(band), 0, 1), alpha.dtype)
    return out


def _require_memory(size: tuple[int, int], pixel_bytes: int) -> None:
    memory.require(
        size[0] * size[1] * pixel_bytes,
        f"A result of {size[0]}x{size[1]} pixels",
        "choose a smaller scale or size",
    )


@contextlib.contextmanager
def _borrowed(
    model: Any, device: torch.device | str | None, backend: str | None, dtype: torch.dtype | str | None
) -> Iterator[tuple[Any, torch.dtype]]:
    """The model, ready for inference as asked, and the dtype of its encoder's input; afterwards it is as before."""
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


def usable_device(device: torch.device | str) -> torch.device:
    """The device, if PyTorch can use it here."""
    try:
        place = torch.device(device)
        return torch.empty(1, device=place).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(f"device {str(device)!r} cannot be used here: {reason}.") from error
