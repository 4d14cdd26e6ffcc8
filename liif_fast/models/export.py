"""Models as files for other programs: ONNX, and programs of torch.export."""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from liif_fast.models import checkpoints
from liif_fast.models.base import ImplicitModel, in_eval_mode, linear_layers
from liif_fast.ops.validation import check_size
from liif_fast.utils.normalization import normalizations

DTYPES = {"float32": torch.float32, "float16": torch.float16}
OPSET = 18
SUFFIXES = (".onnx", ".pt2")
_SCALES = (1, 1000)
_SCALE_STEPS = 10_000  # the largest denominator of a scale
_EXAMPLE = (7, 9)  # rows, columns of the image that is traced: no two sizes in the program are equal


class _Upscaler(nn.Module):
    """image [B, C, H, W] of the model's unnormalized values -> [B, out, rows, columns]."""

    def __init__(self, model: ImplicitModel, scale: tuple[float, float] | None, size: tuple[int, int] | None) -> None:
        super().__init__()
        self.model, self.scale, self.size = model, scale, size
        parameter = next(model.parameters())
        self.norms = normalizations(model.data_norm, parameter.device, parameter.dtype)

    def forward(self, image: Tensor, size: Tensor | None = None) -> Tensor:
        if size is not None:
            rows, cols = size.tolist()
            for side in (rows, cols):
                torch._check(side >= 1)
        elif self.scale is not None:
            rows, cols = (_scaled(pixels, each) for pixels, each in zip(image.shape[2:], self.scale))
        else:
            rows, cols = cast("tuple[int, int]", self.size)
        inp, gt = self.norms
        encoded = self.model.encode(inp.normalize(image))
        return gt.restore(encoded.render((rows, cols)))


def _scaled(pixels: int, scale: float) -> int:
    """round(pixels * scale) for a symbolic number of pixels."""
    factor = Fraction(scale).limit_denominator(_SCALE_STEPS)
    twice, half = 2 * pixels * factor.numerator + factor.denominator, 2 * factor.denominator
    sides = twice // half
    if factor.denominator % 2 == 0:  # between two whole numbers Python rounds to the even one
        sides = sides - (1 - torch.sym_min(twice % half, 1)) * (sides % 2)
    return sides


def to_program(
    model: nn.Module | str | os.PathLike[str] | None = None,
    *,
    scale: float | tuple[float, float] | None = None,
    size: tuple[int, int] | None = None,
    dtype: torch.dtype | str | None = None,
) -> ExportedProgram:
    """Encoder and decoder as one program of `torch.export`: what `export` writes. Arguments as for `export`."""
    ready, example, shapes = _prepared(model, scale, size, dtype)
    with _reported(ready.model):
        return torch.export.export(ready, example, dynamic_shapes=shapes, strict=False)


def export(
    model: nn.Module | str | os.PathLike[str] | None,
    path: str | os.PathLike[str],
    *,
    scale: float | tuple[float, float] | None = None,
    size: tuple[int, int] | None = None,
    dtype: torch.dtype | str | None = None,
) -> Path:
    """Write a model, encoder and decoder, to a file that other programs run: ONNX or a program of torch.export.

    The program's input `image` is [B, C, H, W] of any batch, height and width, in the dtype of the program, with the
    values that `upscale` takes: colors in [0, 1]. Its output `enlarged` is [B, C, rows, columns]; nothing is clipped.
    The decoder is the backend `torch`, so the program has only operators that PyTorch or ONNX (opset 18) defines.

    Args:
        model: a LIIF or MetaSR, which is not changed, or an argument of `liif_fast.load`; None is its default model.
        path: the file, *.onnx or *.pt2 (`torch.export.load` reads it).
        scale: a number from 1, or one each for rows and columns. The result has round(H * scale) rows.
        size: (rows, columns) of the result. Without scale and size the program has a second input `size`, two int64
            numbers: rows and columns.
        dtype: float32 or float16, as a torch dtype or its name; None is the dtype of the model's weights.

    Returns:
        path.

    Raises:
        ValueError, TypeError: an unusable model, path, scale, size or dtype. The error names the part of a model that
        cannot be exported. RuntimeError: ONNX needs the packages onnx and onnxscript.
    """
    target = Path(path)
    if target.suffix not in SUFFIXES:
        raise ValueError(f"{target} has the unknown extension '{target.suffix}': name it {' or '.join(SUFFIXES)}")
    if target.suffix == ".pt2":
        torch.export.save(to_program(model, scale=scale, size=size, dtype=dtype), target)
        return target
    for package in ("onnx", "onnxscript"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise RuntimeError(f"exporting to ONNX needs the packages onnx and onnxscript: {error}") from error
    ready, example, shapes = _prepared(model, scale, size, dtype)
    names = ["image", "size"][: len(example)]
    with _reported(ready.model):
        # The optimizer of onnxscript takes 1e-9, the least area of a corner, for 0, and leaves its addition out.
        options: dict[str, Any] = {"opset_version": OPSET, "optimize": False, "verbose": False}
        program = torch.onnx.export(
            ready, example, dynamo=True, dynamic_shapes=shapes, input_names=names, output_names=["enlarged"], **options
        )
    assert program is not None
    program.save(target)
    return target


def _prepared(model: Any, scale: Any, size: Any, dtype: Any) -> tuple[_Upscaler, tuple[Tensor, ...], dict[str, Any]]:
    """The module to trace, the inputs to trace it with, and which of their sizes are dynamic."""
    if scale is not None and size is not None:
        raise ValueError("scale and size are both given: leave one of them out")
    if size is not None:
        size = check_size("size", size)
    if scale is not None:
        scale = (scale, scale) if isinstance(scale, int | float) else tuple(scale)
        if len(scale) != 2 or not all(_SCALES[0] <= each <= _SCALES[1] for each in scale):
            least, most = _SCALES
            raise ValueError(f"scale is {scale}, but a program takes numbers from {least} to {most}: export without")
    wanted = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if wanted is not None and wanted not in DTYPES.values():
        raise ValueError(f"dtype is {dtype!r}, but must be one of {', '.join(DTYPES)}")
    if model is None or isinstance(model, str | os.PathLike):
        model = checkpoints.load(model)
    model = checkpoints.unwrapped(model)
    if not isinstance(model, ImplicitModel):
        raise TypeError(f"the model must be a LIIF or MetaSR, not {type(model).__name__}")
    if model.imnet is None:
        raise ValueError(
            "this LIIF has no imnet, so nothing decodes its features: export its encoder by torch.onnx.export"
        )
    ready = copy.deepcopy(in_eval_mode(model)).cpu().requires_grad_(False)
    ready = ready if wanted is None else ready.to(wanted)
    ready.backend = "torch"
    colors = getattr(ready.encoder, "n_colors", 3)
    example: tuple[Tensor, ...] = (torch.zeros(2, colors, *_EXAMPLE, dtype=next(ready.parameters()).dtype),)
    shapes: dict[str, Any] = {"image": {0: Dim("batch", min=1), 2: Dim("height", min=1), 3: Dim("width", min=1)}}
    if scale is None and size is None:
        example = (*example, torch.tensor([20, 31]))
        shapes["size"] = None
    return _Upscaler(ready, scale, size).eval(), example, shapes


@contextlib.contextmanager
def _reported(model: ImplicitModel) -> Iterator[None]:
    """Without the exporter's warnings; its error becomes one sentence that names the part of the model."""
    log = logging.getLogger("torch")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        part = "encoder" if linear_layers(cast(nn.Module, model.imnet)) is not None else "imnet"
        name = type(getattr(model, part)).__name__
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        why = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise ValueError(f"this model cannot be exported, probably because of its {part} {name}: {why}") from error
    finally:
        log.setLevel(level)
