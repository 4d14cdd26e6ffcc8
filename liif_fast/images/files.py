"""Reading and writing picture files, with libvips, and with Pillow for the formats that libvips does not read.

Every picture is read as gray or RGB samples of 8, 16 or 32 (float) bits, with an alpha channel if the file has one, the
ICC profile, and what the file says about the picture. Palettes, CMYK, YCbCr, Lab and 1-bit pictures are converted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from liif_fast.images.picture import Description, ImageError, Picture, from_pil, to_depth, to_pil
from liif_fast.images.reading import PictureFile, Source, opened, reason_of
from liif_fast.images.writing import LARGEST_ROW, Layout, lost, writing
from liif_fast.utils import memory
from liif_fast.utils.files import replacing

__all__ = ["FORMATS", "Description", "ImageError", "Layout", "Picture", "PictureFile", "Source"]
__all__ += ["check_target", "from_pil", "opened", "read", "to_depth", "to_pil", "write", "write_rows"]

# The suffixes of files that can be written, and the largest side in each format.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WebP", ".tif": "TIFF", ".tiff": "TIFF"}
_LARGEST_SIDE = {"JPEG": 65500, "WebP": 16383, "PNG": 2**31 - 1, "TIFF": 2**31 - 1}
_BEST_RATIO = 1032  # of deflate
_BAND = 256  # rows handed over at once


def read(path: str | os.PathLike[str], *, max_pixels: int | None = None) -> Picture:
    """Read a picture file as a viewer shows it, with its EXIF orientation applied.

    Only the first frame of an animation or page of a file is read, with a warning. Larger pictures than max_pixels are
    refused; None leaves the limit to the memory.

    Raises: ImageError for a file that is missing, broken, no image, or of an unsupported kind; NotEnoughMemory.
    """
    with opened(path, max_pixels=max_pixels, whole=True) as file:
        return file.picture()


def write(picture: Picture, path: str | os.PathLike[str], *, quality: int | None = None) -> None:
    """Write a picture under a temporary name in the folder of `path`, then rename it, so that no file is incomplete.

    PNG keeps 16 bits (float samples become 16 bits), TIFF keeps 16 bits and float, JPEG and WebP have 8. All formats
    keep the ICC profile, EXIF and XMP. WebP has no gray, so it stores gray as equal RGB.

    Args:
        picture: the picture.
        path: its suffix selects the format (`FORMATS`).
        quality: 1..100 for JPEG and WebP, 95 by default; 100 makes WebP lossless. Ignored by PNG and TIFF.

    Raises: ImageError like `check_target`, or if the file system reports an error.
    """
    check_target(path, picture, quality=quality)
    layout = Layout(picture.height, picture.width, picture.channels, picture.has_alpha, picture.dtype)
    with write_rows(path, layout, picture.description, quality=quality) as put:
        for top in range(0, picture.height, _BAND):
            put(picture.read(top, top + _BAND))


@contextlib.contextmanager
def write_rows(
    path: str | os.PathLike[str], layout: Layout, about: Description, *, quality: int | None = None
) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that takes the next rows [n, width, channels] of a picture; otherwise like `write`.

    The memory is bounded, whatever the height, except for WebP. A warning names descriptions that the format cannot
    hold.
    """
    path = Path(path)
    kind = FORMATS[path.suffix.lower()]
    if missing := lost(kind, about):
        warnings.warn(f"{path}: {kind} has no place for {' and '.join(missing)} of the input.", stacklevel=3)
    try:
        with (
            replacing(path) as file,
            open(file.name, "r+b") as both,
            writing(both, kind, layout, about, quality) as put,
        ):
            yield put
    except OSError as error:
        raise ImageError(f"{path} cannot be written: {reason_of(error)}.") from error


def check_target(
    path: str | os.PathLike[str],
    picture: Picture | PictureFile,
    size: tuple[int, int] | None = None,
    *,
    quality: int | None = None,
) -> None:
    """Raise the errors of `write` before a long computation instead of after it.

    Args:
        path: the file to be written.
        picture: the picture to be written, or the one from which it will be computed.
        size: rows and columns of the picture to be written; None = those of `picture`.
        quality: as for `write`.

    Raises: ImageError for an unknown suffix, a missing or unwritable folder, a size too large for the format or the
        disk, an alpha channel in a JPEG that is not opaque, a quality outside 1..100; NotEnoughMemory for WebP.
    """
    path = Path(path)
    height, width = size or (picture.height, picture.width)
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        known = ", ".join(sorted(FORMATS))
        raise ImageError(f"{path} has the unknown extension '{path.suffix}': name the output with one of {known}.")
    if quality is not None and not 1 <= quality <= 100:
        raise ImageError(f"The quality is {quality}, but must be between 1 and 100.")
    if not path.parent.is_dir():
        raise ImageError(f"{path} cannot be written: the folder {path.parent} does not exist.")
    if path.is_dir():
        raise ImageError(f"{path} cannot be written: it is a folder.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ImageError(f"{path} cannot be written: no permission to write in the folder {path.parent}.")
    limit = _LARGEST_SIDE[kind]
    if max(height, width) > limit:
        raise ImageError(f"{path} cannot be written: {kind} holds at most {limit} pixels a side, not {width}x{height}.")
    row_bytes = width * picture.channels * picture.dtype.itemsize
    least = height * row_bytes // _BEST_RATIO
    if row_bytes > LARGEST_ROW or least > (free := shutil.disk_usage(path.parent).free):
        needs = f"rows of {memory.readable(row_bytes)}; the most are {memory.readable(LARGEST_ROW)}"
        if row_bytes <= LARGEST_ROW:
            needs = f"at least {memory.readable(least)} of the disk, but {memory.readable(free)} are free"
        raise ImageError(f"{path} cannot be written: {width}x{height} pixels need {needs}.")
    if kind == "WebP":  # its encoder holds the whole picture
        memory.require(12 * height * width, f"{path} ({width}x{height} pixels)", "write PNG or TIFF instead")
    if kind == "JPEG" and not picture.is_opaque:
        raise ImageError(f"{path} cannot be written: JPEG has no alpha channel; use PNG, WebP or TIFF.")
