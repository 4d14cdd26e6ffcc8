"""`upscale_file`: a picture file in, a larger picture file out, both row by row in bounded memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import torch
from torch import nn

from liif_fast.images import files, tiles, upscaling

_SUFFIXES = {kind: suffix for suffix, kind in reversed(files.FORMATS.items())}


class Result(NamedTuple):
    """(rows, columns) of the picture that was read, as it is shown, and of the picture that was written."""

    input_size: tuple[int, int]
    output_size: tuple[int, int]


def upscale_file(
    source: files.Source,
    target: str | os.PathLike[str] | BinaryIO,
    *,
    scale: upscaling.Scale | None = None,
    size: tuple[int | None, int | None] | None = None,
    model: nn.Module | str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
    dtype: torch.dtype | str | None = None,
    working_memory: int = tiles.DEFAULT_MEMORY,
    ensemble: bool = False,
    quality: int | None = None,
    kind: str | None = None,
    overwrite: bool = False,
    max_pixels: int | None = None,
    progress: upscaling.Progress | None = None,
    started: Callable[[tuple[int, int]], None] | None = None,
) -> Result:
    """Upscale a picture file by any factor. Gray, color, alpha, depth, profile and descriptions are kept.

    Both files are processed row by row, so the memory does not grow with the picture's height. Exceptions: WebP, AVIF,
    GIF, interlaced PNG, progressive JPEG and formats that Pillow decodes are decoded in memory; a large picture that
    must be turned needs a temporary file next to the output.

    Args:
        source: a path, or a binary file such as a pipe.
        target: a path; or a binary file, which gets the complete picture at the end.
        size: (rows, columns) of the result, instead of scale; one of them may be None and follows from the other.
        quality: 1..100 for JPEG and WebP, as for `files.write`.
        kind: PNG, JPEG, WebP or TIFF, if target is a binary file.
        overwrite: replace a target that exists.
        max_pixels: refuse larger pictures; None leaves the limit to the memory.
        started: called with the size of the result before the computation.
        The others are those of `upscale`.

    Raises: ImageError, a ValueError, for what cannot be read or written; ValueError for a target that exists or is the
        source; what `upscale` raises.
    """
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(_path_of(target, kind))
        folder = path.parent if path.parent.is_dir() else None
        rows = stack.enter_context(files.opened(source, folder=folder, max_pixels=max_pixels))
        before = (rows.height, rows.width)
        after = upscaling.output_size(before, scale=scale, size=_both_sides(before, size))
        files.check_target(path, rows, after, quality=quality)
        if path.exists():
            if isinstance(source, str | os.PathLike) and path.samefile(source):
                raise ValueError(f"{path} is the input itself: name another output.")
            if not overwrite:
                raise ValueError(f"{path} exists already: name another output or add --overwrite or --skip-existing.")
        if started is not None:
            started(after)
        layout = files.Layout(*after, rows.channels, rows.has_alpha, rows.dtype)
        with files.write_rows(path, layout, rows.description, quality=quality) as put:
            upscaling.upscale_rows(
                rows,
                put,
                after,
                model=model,
                device=device,
                backend=backend,
                dtype=dtype,
                working_memory=working_memory,
                ensemble=ensemble,
                progress=progress,
            )
    return Result(before, after)


@contextlib.contextmanager
def _path_of(target: str | os.PathLike[str] | BinaryIO, kind: str | None) -> Iterator[Path]:
    """The target's path; for a binary file, that of a temporary file, which is copied into it at the end."""
    if isinstance(target, str | os.PathLike):
        yield Path(target)
        return
    if kind not in _SUFFIXES:
        raise ValueError(f"kind is {kind!r}, but must be one of {', '.join(_SUFFIXES)} for an output without a name.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"output{_SUFFIXES[kind]}")
        yield path
        with open(path, "rb") as file:
            shutil.copyfileobj(file, target, 1 << 20)
        target.flush()


def _both_sides(before: tuple[int, int], size: tuple[int | None, int | None] | None) -> tuple[int, int] | None:
    """The size, with a side that is None set in the proportion of the input."""
    if size is None or size == (None, None) or len(size) != 2:
        return cast("tuple[int, int] | None", size)
    rows, columns = size
    if rows is None and columns is not None:
        rows = max(1, round(before[0] * columns / before[1]))
    if columns is None and rows is not None:
        columns = max(1, round(before[1] * rows / before[0]))
    return cast(tuple[int, int], (rows, columns))
