"""A stand-in for `liif_fast.images.jobs.upscale_file` until that exists: the whole picture is in memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image

from liif_fast.images import files, upscaling
from liif_fast.utils import memory


class Result(NamedTuple):
    """Sizes as (rows, columns)."""

    input_size: tuple[int, int]
    output_size: tuple[int, int]


def upscale_file(
    source: str | os.PathLike[str] | BinaryIO, target: str | os.PathLike[str] | BinaryIO, **options: Any
) -> Result:
    """Upscale one file to another; see `liif_fast.images.jobs.upscale_file`."""
    with tempfile.TemporaryDirectory() as folder:
        if not isinstance(source, str | os.PathLike):
            file = Path(folder) / "stdin"
            file.write_bytes(source.read())
            source = file
        if isinstance(target, str | os.PathLike):
            return _upscale_path(Path(source), Path(target), **options)
        suffix = next(suffix for suffix, kind in files.FORMATS.items() if kind == options["kind"])
        file = Path(folder) / f"stdout{suffix}"
        result = _upscale_path(Path(source), file, **options)
        with open(file, "rb") as opened:
            shutil.copyfileobj(opened, target)
        target.flush()
        return result


def _upscale_path(source: Path, target: Path, **options: Any) -> Result:
    largest, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # memory is checked instead
    try:
        picture = files.read(source)
    finally:
        Image.MAX_IMAGE_PIXELS = largest
    height, width = picture.height, picture.width
    if options["max_pixels"] is not None and height * width > options["max_pixels"]:
        raise ValueError(f"{source} has {height * width} pixels, more than the limit of {options['max_pixels']}.")
    size = options["size"]
    if size is not None:
        rows, cols = size
        size = (rows or max(1, round(height * cols / width)), cols or max(1, round(width * rows / height)))
    size = rows, cols = upscaling.output_size((height, width), scale=options["scale"], size=size)
    pixel_bytes = 2 * picture.channels * picture.color.itemsize + 4
    memory.require(rows * cols * pixel_bytes, f"The {rows}x{cols} result of {source}", "choose a smaller scale or size")
    files.check_target(target, picture, size, quality=options["quality"])
    if target.exists():
        if target.samefile(source):
            raise ValueError(f"{target} is the input itself: name another output.")
        if not options["overwrite"]:
            raise ValueError(f"{target} exists already: name another output or add --overwrite.")
    options["started"](size)
    kept = {name: options[name] for name in ("model", "backend", "dtype", "working_memory", "progress")}
    if options["ensemble"]:
        kept["ensemble"] = True
    files.write(upscaling.upscale(picture, size=size, **kept), target, quality=options["quality"])
    return Result((height, width), size)
